// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"net/netip"

	"github.com/lbagent/lbagent/internal/testenv"
)

// rowsOfObjects say which objects count.
var rowsOfObjects = []row{
	{"service-proxy-name", func(s *rows) {
		theirs := service{number: 1, kind: "LoadBalancer", meta: `labels: {service.kubernetes.io/service-proxy-name: ""}`, ends: []end{here(s.Backends[0])}}
		ours := theirs
		ours.meta = ""
		nobodys := clusterIP(99)
		for _, round := range []bool{false, true} {
			s.apply(theirs)
			for _, from := range s.clients() {
				for _, to := range frontendsOf(1) {
					s.untouched(from, to)
				}
				s.untouched(from, clusterIP(1).port(9))
				s.dropped(from, nobodys, "unassigned")
			}
			if !round {
				s.apply(ours)
				for _, to := range frontendsOf(1) {
					s.answers(s.Client, to, s.Backends[0])
				}
			}
		}
	}},
	{"headless", func(s *rows) {
		const headless = `labels: {service.kubernetes.io/headless: ""}`
		first, second := []end{here(s.Backends[0])}, []end{here(s.Backends[1])}
		s.apply(
			service{number: 1, meta: headless, ends: first},
			service{number: 2, slices: []slice{{ends: first}, {meta: headless, ends: second}}},
			service{number: 3, slices: []slice{{meta: headless, ends: first}}},
			text("apiVersion: v1\nkind: Service\nmetadata: {name: none}\nspec: {clusterIP: None, ports: [{port: 7}]}\n"))
		for _, from := range s.clients() {
			s.untouched(from, clusterIP(1))
			s.answers(from, clusterIP(2), s.Backends[0])
			s.refused(from, clusterIP(3))
		}
	}},
	{"ExternalName", func(s *rows) {
		before := service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}}
		s.apply(before)
		s.answers(s.pod, clusterIP(1), s.Backends[0])
		// What is left of the other type.
		after := before
		after.kind, after.spec = "ExternalName", "externalName: example.com\nexternalIPs: [203.0.113.1, \"fd00:e::1\"]"
		after.status = `{loadBalancer: {ingress: [{ip: 198.51.100.1}, {ip: "fd00:1b::1"}]}}`
		s.apply(after)
		for _, from := range s.clients() {
			s.dropped(from, clusterIP(1), "unassigned")
			s.untouched(from, nodePort(1))
			s.untouched(from, loadBalancer(1))
			s.untouched(from, external(1))
		}
	}},
	{"change of type", func(s *rows) {
		before := service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}}
		s.apply(before)
		for _, to := range frontendsOf(1) {
			s.answers(s.Client, to, s.Backends[0])
		}
		after := before
		after.kind = ""
		after.status = `{loadBalancer: {ingress: [{ip: 198.51.100.1}, {ip: "fd00:1b::1"}]}}`
		s.apply(after)
		s.answers(s.Client, clusterIP(1), s.Backends[0])
		s.untouched(s.Client, nodePort(1))
		s.untouched(s.Client, loadBalancer(1))
		s.apply(before)
		for _, to := range frontendsOf(1) {
			s.answers(s.Client, to, s.Backends[0])
		}
	}},
	{"slices of a Service", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, slices: []slice{{ends: []end{here(b[0])}}, {ends: []end{here(b[1])}}}},
			// The more usable of two entries wins, whichever is first.
			service{number: 2, slices: []slice{
				{ends: []end{here(b[0], unready), here(b[1])}}, {ends: []end{here(b[0]), here(b[1], draining)}}}},
			service{number: 3, slices: []slice{{ends: []end{here(b[0])}}}},
			text(`apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: names, labels: {kubernetes.io/service-name: row-3}}
addressType: FQDN
ports: [{name: tcp, port: 7007}]
endpoints: [{addresses: [example.com]}]
`),
			// Another Service's.
			service{number: 4, ends: []end{here(b[2])}})
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), b[0], b[1])
			s.answers(from, clusterIP(2), b[0], b[1])
			s.answers(from, clusterIP(3), b[0])
			s.answers(from, clusterIP(4), b[2])
		}
	}},
	{"nil conditions", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, ends: []end{here(b[0]), here(b[1], "conditions: {}"), here(b[2], unready)}},
			service{number: 2, ends: []end{here(b[0], unready), here(b[1], "conditions: {ready: false, terminating: true}")}})
		s.answers(s.Client, clusterIP(1), b[0], b[1])
		s.answers(s.Client, clusterIP(2), b[1])
	}},
	{"ports", func(s *rows) {
		b := s.Backends
		ports := "{name: first, port: 7, targetPort: web}, {name: second, port: 9, targetPort: 7008}, {name: first-u, port: 7, targetPort: web, protocol: UDP}, {name: second-u, port: 9, targetPort: 7008, protocol: UDP}"
		s.apply(
			// A named targetPort is another number on each of two endpoints.
			service{number: 1, ports: ports, slices: []slice{
				{ports: "{name: first, port: 7007}, {name: first-u, port: 7007, protocol: UDP}, {name: second, port: 7008}, {name: second-u, port: 7008, protocol: UDP}", ends: []end{here(b[0])}},
				{ports: "{name: first, port: 7008}, {name: first-u, port: 7008, protocol: UDP}", ends: []end{here(b[1])}}}},
			// The same name with the other protocol, and a port without a number, are no port of it.
			service{number: 2, slices: []slice{
				{ports: "{name: tcp, port: 7007, protocol: UDP}, {name: udp, port: 7007, protocol: TCP}", ends: []end{here(b[0])}},
				{ports: "{name: tcp}, {name: udp, protocol: UDP}", ends: []end{here(b[1])}}}},
			// Without a name.
			text(`apiVersion: v1
kind: Service
metadata: {name: row-3}
spec: {clusterIP: 10.96.0.3, clusterIPs: [10.96.0.3, "fd00:96::3"], ipFamilyPolicy: RequireDualStack, ports: [{port: 7007}]}
`), text(slice{ports: "{port: 7007}, {name: other, port: 7008}", ends: []end{here(b[2])}}.of(3, 0, 4, 6)))
		for _, from := range s.clients() {
			s.answersBy(from, clusterIP(1), "backend0", "backend1/second")
			s.answersBy(from, clusterIP(1).port(9), "backend0/second")
			s.refused(from, clusterIP(2))
		}
		for _, family := range []int{4, 6} {
			s.who(s.Client, true, clusterIP(3).port(7007)(family), "backend2")
		}
	}},
	{"one number, two protocols", func(s *rows) {
		s.apply(service{number: 1, ports: "{name: tcp, port: 7, targetPort: 7007}, {name: udp, port: 7, targetPort: 7008, protocol: UDP}", slices: []slice{
			{ports: "{name: tcp, port: 7007}, {name: udp, port: 7008, protocol: UDP}", ends: []end{here(s.Backends[0])}}}})
		for _, from := range s.clients() {
			for _, family := range []int{4, 6} {
				s.who(from, true, clusterIP(1)(family), "backend0")
				s.who(from, false, clusterIP(1)(family), "backend0/second")
			}
		}
	}},
	{"families", func(s *rows) {
		b := s.Backends
		s.apply(
			service{number: 1, kind: "LoadBalancer", family: "IPv4", ends: []end{here(b[0])}},
			// Each family its own endpoints.
			service{number: 2},
			text(slice{ends: []end{here(b[1])}}.of(2, 0, 4)), text(slice{ends: []end{here(b[2])}}.of(2, 1, 6)))
		for _, from := range s.clients() {
			for _, to := range frontendsOf(1) {
				s.answers(from, to.only(4), b[0])
			}
			s.dropped(from, clusterIP(1).only(6), "unassigned")
			s.untouched(from, nodePort(1).only(6))
			s.untouched(from, loadBalancer(1).only(6))
			s.untouched(from, external(1).only(6))
			s.answers(from, clusterIP(2).only(4), b[1])
			s.answers(from, clusterIP(2).only(6), b[2])
		}
	}},
	{"one address, several claims", func(s *rows) {
		b := s.Backends
		claim := "externalIPs: [203.0.113.50, \"fd00:e::50\"]"
		elder := service{number: 1, meta: "creationTimestamp: " + older, spec: claim, ends: []end{here(b[0])}}
		younger := service{number: 2, meta: "creationTimestamp: " + newer, spec: claim, ends: []end{here(b[1])}}
		s.apply(younger)
		s.answers(s.Client, external(50), b[1])
		s.apply(younger, elder)
		for _, from := range s.clients() {
			s.answers(from, external(50), b[0])
			s.answers(from, clusterIP(2), b[1])
		}
		elder.spec = ""
		s.apply(younger, elder)
		for _, from := range s.clients() {
			s.answers(from, external(50), b[1])
			s.answers(from, clusterIP(1), b[0])
		}
	}},
	{"one address twice in one Service", func(s *rows) {
		// As a load balancer's it is held to the ranges, as an external one it would not be.
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])},
			spec:   "loadBalancerSourceRanges: [10.244.0.0/16, \"fd00:244::/32\"]",
			status: `{loadBalancer: {ingress: [{ip: 203.0.113.1}, {ip: "fd00:e::1"}]}}`})
		s.answers(s.pod, external(1), s.Backends[0])
		s.dropped(s.Client, external(1), "source_denied")
	}},
	{"appProtocol, loadBalancerClass", func(s *rows) {
		s.apply(service{number: 1, kind: "LoadBalancer", spec: "loadBalancerClass: example.com/other", ends: []end{here(s.Backends[0])},
			ports: "{name: tcp, port: 7, targetPort: 7007, nodePort: 30001, appProtocol: kubernetes.io/h2c}, {name: udp, port: 7, targetPort: 7007, nodePort: 30001, protocol: UDP, appProtocol: example.com/quic}"})
		for _, from := range s.clients() {
			for _, to := range frontendsOf(1) {
				s.answers(from, to, s.Backends[0])
			}
		}
	}},
}

// who asks once, by one protocol, and wants this server.
func (s *rows) who(from *testenv.Host, tcp bool, to netip.AddrPort, want string) {
	s.t.Helper()
	if p := s.probe(from, tcp, to, longEnough); p.err != nil || p.Server != want {
		s.t.Errorf("%s from %s: %s, %v; want %s", p, from.Name, p.Server, p.err, want)
	}
}
