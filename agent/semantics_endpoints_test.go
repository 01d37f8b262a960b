// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"strings"
	"time"

	"github.com/lbagent/lbagent/internal/testenv"
)

const (
	externalLocal = "externalTrafficPolicy: Local"
	internalLocal = "internalTrafficPolicy: Local"
)

// rowsOfEndpoints say which endpoints a client gets.
var rowsOfEndpoints = []row{
	{"usable", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, ends: []end{here(b[0]), here(b[1], draining), here(b[2], unready)}},
			service{number: 2, ends: []end{here(b[0], draining), there(b[1], draining), here(b[2], unready)}},
			service{number: 3, ends: []end{here(b[0], unready), there(b[1], "conditions: {ready: false, serving: false, terminating: true}")}},
			// Each scope for itself.
			service{number: 4, kind: "LoadBalancer", spec: externalLocal, ends: []end{here(b[0], draining), there(b[1])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0])
			s.answers(from, clusterIP(2), b[0], b[1])
			s.refused(from, clusterIP(3))
			s.answers(from, clusterIP(4), b[1])
		}
		s.answers(s.Client, loadBalancer(4), b[0])
		s.answers(s.pod, loadBalancer(4), b[1])
	}},
	{"where an endpoint is", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, spec: internalLocal, ends: []end{here(b[0]), there(b[1])}},
			// By the route to its address, where the slice does not say.
			service{number: 2, spec: internalLocal, ends: []end{{host: b[0]}, {host: s.Client}, there(b[2])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0])
			s.answers(from, clusterIP(2), b[0])
		}
	}},
	{"publishNotReadyAddresses", func(s *rows) {
		b := s.Backends
		s.apply(service{number: 1, spec: "publishNotReadyAddresses: true", ends: []end{
			here(b[0], "conditions: {ready: true, serving: false, terminating: true}"), here(b[1], draining)}})
		s.answers(s.Client, clusterIP(1), b[0])
	}},
	{"internalTrafficPolicy Local", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, kind: "LoadBalancer", spec: internalLocal, ends: []end{here(b[0]), there(b[1])}},
			service{number: 2, kind: "LoadBalancer", spec: internalLocal, ends: []end{there(b[1])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0])
			s.dropped(from, clusterIP(2), "no_local_backend")
			for _, to := range frontendsOf(1)[1:] {
				s.answers(from, to, b[0], b[1])
			}
		}
		// An endpoint that comes here, and the policy that goes.
		s.apply(
			service{number: 1, kind: "LoadBalancer", ends: []end{here(b[0]), there(b[1])}},
			service{number: 2, kind: "LoadBalancer", spec: internalLocal, ends: []end{here(b[1])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0], b[1])
			s.answers(from, clusterIP(2), b[1])
		}
	}},
	{"externalTrafficPolicy Local", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, kind: "LoadBalancer", spec: externalLocal, ends: []end{here(b[0]), there(b[1])}},
			service{number: 2, kind: "LoadBalancer", spec: externalLocal, ends: []end{there(b[1])}},
			// Of a ClusterIP it says nothing.
			service{number: 3, ends: []end{here(b[0]), there(b[1])}})
		for _, to := range frontendsOf(1)[1:] {
			s.answers(s.Client, to, b[0])
			s.answers(s.pod, to, b[0], b[1])
		}
		for _, to := range frontendsOf(2)[1:] {
			s.dropped(s.Client, to, "no_local_backend")
			s.answers(s.pod, to, b[1])
		}
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0], b[1])
			s.answers(from, clusterIP(2), b[1])
			s.answers(from, clusterIP(3), b[0], b[1])
		}
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(b[0]), there(b[1])}})
		s.answers(s.Client, loadBalancer(1), b[0], b[1])
	}},
	{"externalTrafficPolicy Cluster", func(s *rows) {
		b := s.Backends
		s.apply(service{number: 1, kind: "LoadBalancer", spec: "externalTrafficPolicy: Cluster", ends: []end{here(b[0]), there(b[1])}})
		for _, from := range s.clients() {
			for _, to := range frontendsOf(1) {
				s.answers(from, to, b[0], b[1])
			}
		}
	}},
	{"reject or drop", func(s *rows) {
		b := s.Backends
		const both = externalLocal + "\n" + internalLocal
		s.apply(
			service{number: 1, kind: "LoadBalancer", ends: []end{here(b[0], unready)}},
			service{number: 2, kind: "LoadBalancer", spec: both, ends: []end{there(b[0], unready)}},
			// What drains is usable too.
			service{number: 3, kind: "LoadBalancer", spec: both, ends: []end{there(b[0], draining)}},
			service{number: 4, kind: "LoadBalancer", spec: `loadBalancerSourceRanges: [10.0.0.0/8, "fd00:244::/32"]`, ends: []end{here(b[0], unready)}})
		for _, from := range s.clients() {
			for _, n := range []int{1, 2} {
				for _, to := range frontendsOf(n) {
					s.refused(from, to)
				}
			}
			s.dropped(from, clusterIP(3), "no_local_backend")
		}
		for _, to := range frontendsOf(3)[1:] {
			s.dropped(s.Client, to, "no_local_backend")
			s.answers(s.pod, to, b[0])
		}
		s.dropped(s.Client, loadBalancer(4), "source_denied")
		s.refused(s.pod, loadBalancer(4))
	}},
	{"topology", func(s *rows) {
		b := s.Backends
		zone := func(name string) string { return fmt.Sprintf("hints: {forZones: [{name: %s}]}", name) }
		node := func(name, zone string) string {
			return fmt.Sprintf("hints: {forNodes: [{name: %s}], forZones: [{name: %s}]}", name, zone)
		}
		services := []fmt.Stringer{
			service{number: 1, ends: []end{here(b[0], zone("here")), here(b[1], zone("away")), there(b[2], zone("here"))}},
			service{number: 2, ends: []end{here(b[0], zone("here")), here(b[1], zone("away")), there(b[2])}},
			service{number: 3, ends: []end{here(b[0], zone("away")), here(b[1], zone("away"))}},
			// A node before a zone, if all have one and one is this.
			service{number: 4, ends: []end{there(b[0], node("node", "away")), here(b[1], node("other", "here"))}},
			service{number: 5, ends: []end{here(b[0], node("other", "away")), here(b[1], node("other", "here"))}},
			service{number: 6, ends: []end{here(b[0], node("node", "here")), here(b[1], zone("here")), here(b[2], zone("away"))}},
			// Of the ready ones.
			service{number: 7, ends: []end{here(b[0], zone("here")), here(b[1], zone("away")), here(b[2], draining)}},
			service{number: 8, ends: []end{here(b[0], zone("here"), draining), here(b[1], zone("away"), draining)}},
			// Not in the scope Local.
			service{number: 9, spec: internalLocal, ends: []end{here(b[0], zone("away")), there(b[1], zone("here"))}},
		}
		s.apply(services...)
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0], b[2])
			s.answers(from, clusterIP(2), b...)
			s.answers(from, clusterIP(3), b[0], b[1])
			s.answers(from, clusterIP(4), b[0])
			s.answers(from, clusterIP(5), b[1])
			s.answers(from, clusterIP(6), b[0], b[1])
			s.answers(from, clusterIP(7), b[0])
			s.answers(from, clusterIP(8), b[0], b[1])
			s.answers(from, clusterIP(9), b[0])
		}
		// A node without a zone.
		s.write("node.yaml", strings.Replace(nodeHere, ", labels: {topology.kubernetes.io/zone: here}", "", 1))
		defer s.write("node.yaml", nodeHere)
		s.apply(services...)
		s.answers(s.Client, clusterIP(1), b...)
		s.answers(s.Client, clusterIP(4), b[0])
		s.answers(s.Client, clusterIP(5), b[0], b[1])
	}},
	{"trafficDistribution", func(s *rows) {
		b := s.Backends
		s.apply(
			text("apiVersion: v1\nkind: Node\nmetadata: {name: other, labels: {topology.kubernetes.io/zone: away}}\n"),
			service{number: 1, spec: "trafficDistribution: PreferClose", ends: []end{here(b[0], "zone: here"), here(b[1], "zone: away")}},
			// The zone is that of its Node's object.
			service{number: 2, spec: "trafficDistribution: PreferSameZone", ends: []end{here(b[0]), there(b[1])}},
			service{number: 3, spec: "trafficDistribution: PreferSameNode", ends: []end{here(b[0]), there(b[1], "zone: here"), there(b[2])}},
			service{number: 4, spec: "trafficDistribution: PreferSameNode", ends: []end{there(b[1], "zone: here"), there(b[2])}},
			service{number: 5, spec: "trafficDistribution: PreferSameNode", ends: []end{there(b[1]), there(b[2])}},
			service{number: 6, ends: []end{here(b[0]), there(b[1])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0])
			s.answers(from, clusterIP(2), b[0])
			s.answers(from, clusterIP(3), b[0])
			s.answers(from, clusterIP(4), b[1])
			s.answers(from, clusterIP(5), b[1], b[2])
			s.answers(from, clusterIP(6), b[0], b[1])
		}
	}},
	{"sessionAffinity", (*rows).affinity},
	{"sessionAffinity timeout", (*rows).affinityTimeout},
	{"loadBalancerSourceRanges", func(s *rows) {
		b := s.Backends
		first, second := s.Client, s.outside()[1]
		one := service{number: 1, kind: "LoadBalancer", ends: []end{here(b[0])},
			spec: fmt.Sprintf(`loadBalancerSourceRanges: [%s/32, "%s/128"]`, first.IPv4, first.IPv6)}
		// A family that it does not name is open.
		two := service{number: 2, kind: "LoadBalancer", ends: []end{here(b[0])}, spec: "loadBalancerSourceRanges: [10.244.0.0/16]"}
		s.apply(one, two)
		s.answers(first, loadBalancer(1), b[0])
		s.answers(s.pod, loadBalancer(2), b[0])
		for _, denied := range []*testenv.Host{second, s.pod} {
			s.dropped(denied, loadBalancer(1), "source_denied")
			for _, to := range []place{clusterIP(1), nodePort(1), external(1)} {
				s.answers(denied, to, b[0])
			}
		}
		s.dropped(first, loadBalancer(2).only(4), "source_denied")
		s.answers(first, loadBalancer(2).only(6), b[0])
		// A connection goes on when its client is let in no more; a new one does not begin.
		c, err := testenv.DialEcho(s.soon(), first.Namespace, s.source(first, 4), loadBalancer(1)(4))
		if err != nil {
			s.t.Fatal(err)
		}
		defer c.Close()
		one.spec = `loadBalancerSourceRanges: [10.244.0.0/16, "fd00:244::/32"]`
		s.apply(one)
		s.dropped(first, loadBalancer(1), "source_denied")
		s.answers(s.pod, loadBalancer(1), b[0])
		if err := c.Say(s.soon(), "still here"); err != nil {
			s.t.Error("a connection from before:", err)
		}
		one.spec = ""
		s.apply(one)
		s.answers(second, loadBalancer(1), b[0])
	}},
	{"weights", func(s *rows) {
		b := s.Backends
		s.apply(service{number: 1, slices: []slice{{ends: []end{here(b[0]), here(b[1]), here(b[2])},
			meta: fmt.Sprintf(`annotations: {lbagent.io/weights: "%s=0,%s=0"}`, b[0].IPv4, b[0].IPv6)}}})
		s.answers(s.Client, clusterIP(1), b[1], b[2])
	}},
	{"algorithm", func(s *rows) {
		s.apply(service{number: 1, meta: "annotations: {lbagent.io/algorithm: maglev}", ends: []end{here(s.Backends[0]), here(s.Backends[1])}})
		s.answers(s.Client, clusterIP(1), s.Backends[0], s.Backends[1])
	}},
}

// outside are clients outside, each an address of the one.
func (s *rows) outside() []*testenv.Host {
	var all []*testenv.Host
	ipv4, ipv6 := s.Client.IPv4, s.Client.IPv6
	for range s.Config.ClientAddresses {
		all = append(all, &testenv.Host{Namespace: s.Client.Namespace, IPv4: ipv4, IPv6: ipv6})
		ipv4, ipv6 = ipv4.Next(), ipv6.Next()
	}
	return all
}

// client is who asks by one protocol in one family.
type client struct {
	*testenv.Host
	family int
	tcp    bool
}

func (s *rows) eachClient() []client {
	var all []client
	for _, h := range append(s.outside(), s.pod) {
		for _, family := range []int{4, 6} {
			all = append(all, client{h, family, true}, client{h, family, false})
		}
	}
	return all
}

// server is who answers a client.
func (s *rows) server(c client, to place) string {
	s.t.Helper()
	p := s.probe(c.Host, c.tcp, to(c.family), longEnough)
	if p.err != nil {
		s.t.Errorf("%s from %s: %v", p, c.Addr(c.family), p.err)
	}
	return p.Server
}

const sticky = "sessionAffinity: ClientIP\n"

func (s *rows) affinity() {
	b := s.Backends
	all := service{number: 1, kind: "LoadBalancer", spec: sticky, ends: []end{here(b[0]), here(b[1]), here(b[2])}}
	s.apply(all)
	has := map[client]string{}
	remember := func() {
		s.t.Helper()
		for _, c := range s.eachClient() {
			has[c] = s.server(c, clusterIP(1))
		}
	}
	keeps := func(when string, c client) {
		s.t.Helper()
		for _, to := range append(frontendsOf(1), frontendsOf(1)...) {
			if got := s.server(c, to); got != has[c] {
				s.t.Fatalf("%s: %v at %s is answered by %s, and had %s", when, c, to(c.family), got, has[c])
			}
		}
	}
	remember()
	spread := map[string]bool{}
	for c, server := range has {
		spread[server] = true
		keeps("at once", c)
	}
	if len(spread) != 3 {
		s.t.Errorf("all clients are at %v", spread)
	}

	// One goes, and comes back: who had it has another from then on, all others what they had.
	without := all
	without.ends = []end{here(b[0], unready), here(b[1]), here(b[2])}
	s.apply(without)
	for c, server := range has {
		if server != b[0].Name {
			keeps("one unready", c)
		} else if has[c] = s.server(c, clusterIP(1)); has[c] == b[0].Name {
			s.t.Errorf("%v has one that is not ready", c)
		}
	}
	s.apply(all)
	for c := range has {
		keeps("all ready", c)
	}

	// Switched off and on, live.
	off := all
	off.spec = ""
	s.apply(off)
	for _, from := range s.clients() {
		s.answers(from, clusterIP(1), b...)
	}
	s.apply(all)
	remember()
	for c := range has {
		keeps("switched on", c)
	}

	// The scope is stronger.
	local := all
	local.spec, local.ends = sticky+externalLocal, []end{here(b[0]), there(b[1]), there(b[2])}
	s.apply(local)
	elsewhere := 0
	for _, c := range s.eachClient() {
		if c.Host.Namespace != s.Client.Namespace {
			continue
		}
		if s.server(c, clusterIP(1)) != b[0].Name {
			elsewhere++
		}
		if got := s.server(c, loadBalancer(1)); got != b[0].Name {
			s.t.Errorf("%v gets %s under a policy Local", c, got)
		}
	}
	if elsewhere == 0 {
		s.t.Error("no client had an endpoint elsewhere")
	}
}

func (s *rows) affinityTimeout() {
	const timeout = 2 * time.Second
	b := s.Backends
	one := service{number: 1, spec: sticky + "sessionAffinityConfig: {clientIP: {timeoutSeconds: 2}}", ends: []end{here(b[0])}}
	all := one
	all.ends = append(all.ends, here(b[1]), here(b[2]))
	// ask returns how many have another than the first, and when this began.
	ask := func() (others int, began time.Time) {
		began = time.Now()
		for _, c := range s.eachClient() {
			if s.server(c, clusterIP(1)) != b[0].Name {
				others++
			}
		}
		return others, began
	}
	s.apply(one)
	_, last := ask()
	s.apply(all)
	// Each of these rounds is within the timeout since the one before, the last is not since the first.
	for range 3 {
		others, now := ask()
		if late := time.Since(last) >= timeout; others > 0 && !late {
			s.t.Errorf("%d clients have another within the timeout", others)
		} else if late {
			s.t.Log("this machine is too slow to ask within the timeout")
		}
		last = now
		time.Sleep(timeout * 6 / 10)
	}
	time.Sleep(timeout)
	if others, _ := ask(); others == 0 {
		s.t.Error("all clients have the first after the timeout")
	}
}
