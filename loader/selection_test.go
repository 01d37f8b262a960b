// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

const bothScopes = maps.BackendCluster | maps.BackendLocal

// front leads an address and port to a service, for TCP and UDP, as a frontend of a kind.
func (r *rig) front(at netip.AddrPort, service uint32, kind lb.Kind) {
	r.t.Helper()
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
		r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: at.Addr(), Port: at.Port(), Protocol: p}), maps.FrontendOf(service, kind)))
	}
}

// local gives a service a table for the scope Local, behind that for Cluster.
func (r *rig) local(service uint32, ids ...uint32) {
	r.t.Helper()
	first := service*64 + 32
	r.must(r.maps.SetSlots(first, ids))
	r.must(r.maps.SetServiceLocal(service, maps.SlotRange{First: first, Count: uint32(len(ids))}))
}

func (r *rig) policy(service uint32, flags uint32, affinity time.Duration) {
	r.t.Helper()
	r.must(r.maps.SetServicePolicy(service, maps.Policy{Flags: flags, AffinityTimeoutS: uint32(affinity / time.Second)}))
}

// usable writes a backend that new flows may choose in these scopes.
func (r *rig) usable(id, service uint32, at netip.AddrPort, scopes uint8) {
	r.t.Helper()
	r.must(r.maps.SetBackend(id, maps.BackendOf(service, lb.VIP{Addr: at.Addr(), Port: at.Port()},
		maps.BackendLife{Generation: 1, State: maps.BackendActive, Flags: scopes})))
}

// choose returns where a program sends a packet: a backend's address, or else the reason why it goes nowhere.
func (r *rig) choose(program string, p testenv.Packet) string {
	r.t.Helper()
	got := r.run(program, p.Bytes())
	if got.Verdict != pass {
		return got.Reason
	}
	out, err := testenv.Parse(got.Frame)
	r.must(err)
	return out.Destination.String()
}

// opening is the first packet of a flow.
func opening(p lb.Protocol, from, to netip.AddrPort) testenv.Packet {
	if p == lb.UDP {
		return testenv.DatagramUDP(from, to, "x")
	}
	return testenv.SegmentTCP(from, to, testenv.SYN)
}

// nth returns the address that is n behind another, with the same port.
func nth(a netip.AddrPort, n int) netip.AddrPort {
	b := a.Addr().As16()
	b[14] += byte(n >> 8)
	b[15] += byte(n)
	return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), a.Port())
}

// TestScope: which endpoints a packet may go to, by the kind of its frontend, the program that sees it, the policies
// and where there are endpoints.
func TestScope(t *testing.T) {
	const internal, external = maps.InternalLocal, maps.ExternalLocal
	everywhere := []string{"pod_in", "port_in", "node_in"}
	// Where a policy makes it the scope Local; everywhere else it is Cluster.
	local := map[lb.Kind]map[uint32][]string{
		lb.ClusterIP:    {internal: everywhere, external: nil, internal | external: everywhere},
		lb.NodePort:     {internal: nil, external: {"node_in"}, internal | external: {"node_in"}},
		lb.LoadBalancer: {internal: nil, external: {"node_in"}, internal | external: {"node_in"}},
		lb.External:     {internal: nil, external: {"node_in"}, internal | external: {"node_in"}},
		lb.HostPort:     {},
	}
	for _, f := range families {
		r := newRig(t)
		r.usable(1, 1, f.backend, maps.BackendCluster)
		r.usable(2, 1, f.backend2, bothScopes)
		for kind, policies := range local {
			r.front(f.vip, 1, kind)
			for _, policy := range []uint32{0, internal, external, internal | external} {
				for _, program := range everywhere {
					for _, endpoints := range []string{"here and elsewhere", "elsewhere", "none"} {
						r.slots(1)
						r.local(1)
						r.policy(1, policy, 0)
						cluster, localScope := "no_backend", "no_backend"
						switch endpoints {
						case "here and elsewhere":
							r.slots(1, 1) // so that the choice shows the scope
							r.local(1, 2)
							cluster, localScope = f.backend.String(), f.backend2.String()
						case "elsewhere":
							r.slots(1, 1)
							cluster, localScope = f.backend.String(), "no_local_backend"
						}
						want := cluster
						if slices.Contains(policies[policy], program) {
							want = localScope
						}
						for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
							r.clearFlows()
							if got := r.choose(program, opening(p, f.client, f.vip)); got != want {
								t.Errorf("%s, %s, %s, policy %d, at %s, endpoints %s: %s, want %s", f.name, p, kind, policy, program, endpoints, got, want)
							}
						}
					}
				}
			}
		}
	}
}

// TestScopeOfCable: what comes by the node's own port of a bridge is from outside, what comes by a pod's is not.
func TestScopeOfCable(t *testing.T) {
	for _, f := range families {
		r := newPort(t)
		r.usable(1, 1, f.backend, maps.BackendCluster)
		r.usable(2, 1, f.backend2, bothScopes)
		r.slots(1, 1)
		r.local(1, 2)
		r.policy(1, maps.ExternalLocal, 0)
		r.front(f.vip, 1, lb.NodePort)
		p := sentTo(bridgeMAC, opening(lb.TCP, f.client, f.vip))
		if got := r.choose("port_in", p); got != f.backend.String() {
			t.Errorf("%s, from a pod: %s", f.name, got)
		}
		r.clearFlows()
		if got := r.choose("node_in", p); got != f.backend2.String() {
			t.Errorf("%s, from the cable: %s", f.name, got)
		}
	}
}

// TestPolicyMovesNoFlow: a flow stays where it is, of whichever protocol, though a new one would go elsewhere, or
// nowhere.
func TestPolicyMovesNoFlow(t *testing.T) {
	for _, f := range families {
		for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
			r := newRig(t)
			r.usable(1, 1, f.backend, maps.BackendCluster)
			r.usable(2, 1, f.backend2, bothScopes)
			r.slots(1, 1)
			r.front(f.vip, 1, lb.LoadBalancer)
			first := opening(p, f.client, f.vip)
			if got := r.choose("node_in", first); got != f.backend.String() {
				t.Fatal(got)
			}
			r.local(1, 2)
			r.policy(1, maps.ExternalLocal|maps.HasSourceRanges, time.Hour)
			for _, generation := range []uint32{1, 2} { // something else makes it look again
				r.must(r.maps.SetBackendLife(1, maps.BackendLife{
					Generation: generation, State: maps.BackendActive, Flags: maps.BackendCluster, Port: f.backend.Port()}))
				if got := r.choose("node_in", first); got != f.backend.String() {
					t.Errorf("%s %s, generation %d: moved to %s", f.name, p, generation, got)
				}
			}
			if got := r.choose("node_in", opening(p, nth(f.client, 1), f.vip)); got != "source_denied" {
				t.Errorf("%s %s: a new client: %s", f.name, p, got)
			}
		}
	}
}

// TestSourceRanges: who may use the load balancer addresses of a service.
func TestSourceRanges(t *testing.T) {
	type allow struct {
		service uint32
		clients string
	}
	for _, c := range []struct {
		name   string
		flags  uint32
		kind   lb.Kind
		allow  map[string][]allow // by family
		denied bool
	}{
		{"no ranges", 0, lb.LoadBalancer, nil, false},
		{"none of this family is let in", maps.HasSourceRanges, lb.LoadBalancer, nil, true},
		{"the client's network", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "192.0.2.0/24"}}, "v6": {{1, "2001:db8::/64"}}}, false},
		{"the client alone", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "192.0.2.7/32"}}, "v6": {{1, "2001:db8::7/128"}}}, false},
		{"its neighbour", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "192.0.2.6/32"}}, "v6": {{1, "2001:db8::6/128"}}}, true},
		{"everybody, and a network within", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "0.0.0.0/0"}, {1, "192.0.2.0/30"}}, "v6": {{1, "::/0"}, {1, "2001:db8::/126"}}}, false},
		{"the other family", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "2001:db8::/32"}}, "v6": {{1, "0.0.0.0/0"}}}, true},
		{"another service's", maps.HasSourceRanges, lb.LoadBalancer,
			map[string][]allow{"v4": {{2, "192.0.2.0/24"}}, "v6": {{2, "2001:db8::/64"}}}, true},
		{"a NodePort", maps.HasSourceRanges, lb.NodePort, nil, false},
		{"an external address", maps.HasSourceRanges, lb.External, nil, false},
		{"a ClusterIP", maps.HasSourceRanges, lb.ClusterIP, nil, false},
		{"ranges that are not in force", 0, lb.LoadBalancer,
			map[string][]allow{"v4": {{1, "198.51.100.0/24"}}, "v6": {{1, "2001:db8:9::/48"}}}, false},
	} {
		for _, f := range families {
			for _, endpoints := range []bool{true, false} {
				r := newRig(t)
				r.usable(1, 1, f.backend, bothScopes)
				if endpoints {
					r.slots(1, 1)
				}
				r.front(f.vip, 1, c.kind)
				r.policy(1, c.flags, 0)
				for _, a := range c.allow[f.name] {
					r.must(r.maps.SetSourceRange(a.service, netip.MustParsePrefix(a.clients)))
				}
				want := f.backend.String()
				if !endpoints {
					want = "no_backend"
				}
				if c.denied {
					want = "source_denied" // before it is rejected
				}
				for _, program := range []string{"node_in", "pod_in"} { // for every source
					for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
						r.clearFlows()
						if got := r.choose(program, opening(p, f.client, f.vip)); got != want {
							t.Errorf("%s, %s %s at %s, endpoints %v: %s, want %s", c.name, f.name, p, program, endpoints, got, want)
						}
					}
				}
			}
		}
	}
}

// TestSourceRangesLive: a change is for new connections; a SYN on a closed one, and a UDP flow that must choose again,
// are new.
func TestSourceRangesLive(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.usable(1, 1, f.backend, bothScopes)
		r.slots(1, 1)
		r.front(f.vip, 1, lb.LoadBalancer)
		c := r.talk(f)
		c.open()
		udp := opening(lb.UDP, f.client, f.vip)
		if got := r.choose("node_in", udp); got != f.backend.String() {
			t.Fatal(got)
		}
		r.policy(1, maps.HasSourceRanges, 0)
		c.send(testenv.ACK, "forward")
		if got := r.choose("node_in", udp); got != f.backend.String() {
			t.Errorf("%s: a UDP flow goes to %s", f.name, got)
		}
		c.send(testenv.FIN|testenv.ACK, "forward")
		c.answer(testenv.FIN | testenv.ACK)
		c.up += 100_000
		if got := r.choose("node_in", c.segment(testenv.SYN)); got != "source_denied" {
			t.Errorf("%s: a new connection goes to %s", f.name, got)
		}
		r.usable(2, 1, f.backend2, bothScopes)
		r.slots(1, 2)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		if got := r.choose("node_in", udp); got != "source_denied" {
			t.Errorf("%s: a UDP flow without its backend goes to %s", f.name, got)
		}
	}
}

// clients of services with session affinity, as they are remembered.
func (r *rig) remembered() map[maps.AffinityKey]maps.Affinity {
	r.t.Helper()
	all := map[maps.AffinityKey]maps.Affinity{}
	r.must(r.maps.EachAffinity(func(k maps.AffinityKey, a maps.Affinity) bool {
		all[k] = a
		return true
	}))
	return all
}

// remember replaces what is remembered of every client.
func (r *rig) remember(change func(*maps.Affinity)) {
	r.t.Helper()
	for k, a := range r.remembered() {
		change(&a)
		r.must(r.maps.All()["affinity"].Put(k, a))
	}
}

const affinityTimeout = 30 * time.Second

// affine is a service with session affinity and four backends, by a ClusterIP and a NodePort.
func affine(t *testing.T, f family) *rig {
	r := newRig(t)
	for i := range uint32(4) {
		r.usable(i+1, 1, nth(f.backend, int(i)), bothScopes)
	}
	r.slots(1, 1, 2, 3, 4)
	r.front(f.vip, 1, lb.ClusterIP)
	r.front(f.other, 1, lb.NodePort)
	r.policy(1, 0, affinityTimeout)
	return r
}

// from is the client's next connection or datagram.
func from(f family, port int) netip.AddrPort {
	return netip.AddrPortFrom(f.client.Addr(), uint16(20000+port))
}

// TestAffinity: a client has one backend, by whichever port, protocol, frontend and program it comes, whether or not
// that is remembered; all clients together have all backends.
func TestAffinity(t *testing.T) {
	for _, f := range families {
		for _, forgets := range []bool{false, true} {
			r := affine(t, f)
			const clients, flows = 200, 6
			count := map[string]int{}
			for i := range clients {
				var first string
				for j := range flows {
					to, program, p := f.vip, "pod_in", lb.TCP
					if j%2 == 1 {
						to, program = f.other, "node_in"
					}
					if j%3 == 1 {
						p = lb.UDP
					}
					client := netip.AddrPortFrom(nth(f.client, i).Addr(), uint16(20000+j))
					got := r.choose(program, opening(p, client, to))
					if j == 0 {
						first = got
					}
					if got != first {
						t.Fatalf("%s: client %d, flow %d: %s, before %s", f.name, i, j, got, first)
					}
					if forgets {
						r.clearAffinity()
					}
				}
				count[first]++
			}
			for at, n := range count { // 50 each on average; 20 and 80 are five standard deviations off
				if n < 20 || n > 80 {
					t.Errorf("%s: %d of %d clients at %s", f.name, n, clients, at)
				}
			}
			if len(count) != 4 {
				t.Errorf("%s: clients at %v alone", f.name, count)
			}
			if n := len(r.remembered()); !forgets && n != clients {
				t.Errorf("%s: %d clients are remembered, want %d", f.name, n, clients)
			}
		}
	}
}

// TestAffinityOfServices: each service has its own.
func TestAffinityOfServices(t *testing.T) {
	f := families[0]
	r := affine(t, f)
	r.usable(5, 2, f.backend2, bothScopes)
	r.slots(2, 5)
	r.front(f.vip2, 2, lb.ClusterIP)
	r.policy(2, 0, affinityTimeout)
	first := r.choose("node_in", opening(lb.TCP, from(f, 0), f.vip))
	if got := r.choose("node_in", opening(lb.TCP, from(f, 1), f.vip2)); got != f.backend2.String() {
		t.Error("the other service's backend is", got)
	}
	if got := r.choose("node_in", opening(lb.TCP, from(f, 2), f.vip)); got != first {
		t.Errorf("%s, before %s", got, first)
	}
	if n := len(r.remembered()); n != 2 {
		t.Errorf("%d records, want 2", n)
	}
}

// TestAffinityRecord: the remembered backend counts, not the hash, for as long as the timeout says and the backend may
// be used; else another is chosen and remembered.
func TestAffinityRecord(t *testing.T) {
	for _, f := range families {
		life := func(state maps.BackendState, scopes uint8) func(*rig) {
			return func(r *rig) {
				r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: state, Flags: scopes, Port: f.backend.Port()}))
			}
		}
		older := func(by time.Duration) func(*rig) {
			return func(r *rig) { r.remember(func(a *maps.Affinity) { a.LastUsedNs -= uint64(by) }) }
		}
		for _, c := range []struct {
			name   string
			change func(*rig)
			stays  bool
		}{
			{"nothing", func(*rig) {}, true},
			{"weight 0", life(maps.BackendActive, bothScopes), true}, // no slot, but usable
			{"another generation", life(maps.BackendActive, maps.BackendCluster), true},
			{"drains", life(maps.BackendDraining, 0), false},
			{"drains, scopes not yet taken", life(maps.BackendDraining, bothScopes), false},
			{"removed", life(maps.BackendRemoved, 0), false},
			{"not usable in this scope", life(maps.BackendActive, maps.BackendLocal), false},
			{"id of another service", func(r *rig) { r.usable(1, 7, f.backend, bothScopes) }, false},
			{"id of another address", func(r *rig) { r.usable(1, 1, nth(f.backend, 9), bothScopes) }, false},
			{"id of another port", func(r *rig) { r.usable(1, 1, netip.AddrPortFrom(f.backend.Addr(), 9), bothScopes) }, false},
			{"record of another address", func(r *rig) { r.remember(func(a *maps.Affinity) { a.Address[15]++ }) }, false},
			{"record of no backend", func(r *rig) { r.remember(func(a *maps.Affinity) { a.Backend = 1 << 30 }) }, false},
			{"almost too old", older(affinityTimeout - 3*time.Second), true},
			{"too old", older(affinityTimeout), false},
			{"from the future", older(-time.Second), true}, // another CPU's clock
			{"forgotten", func(r *rig) { r.clearAffinity() }, false},
		} {
			t.Run(f.name+"/"+c.name, func(t *testing.T) {
				r := affine(t, f)
				r.slots(1, 1)
				if got := r.choose("node_in", opening(lb.UDP, from(f, 0), f.vip)); got != f.backend.String() {
					t.Fatal(got)
				}
				r.slots(1, 2) // what the hash says from now on
				c.change(r)
				want := f.backend.String()
				id := uint32(1)
				if !c.stays {
					want, id = nth(f.backend, 1).String(), 2
				}
				now, err := maps.Now()
				r.must(err)
				for i := range 2 {
					if got := r.choose("node_in", opening(lb.UDP, from(f, 1+i), f.other)); got != want {
						t.Errorf("flow %d: %s, want %s", i, got, want)
					}
				}
				all := r.remembered()
				key := maps.AffinityKey{Service: 1, Client: f.client.Addr().As16()}
				got := all[key]
				if len(all) != 1 || got.Backend != id || netip.AddrPortFrom(netip.AddrFrom16(got.Address).Unmap(), got.Port).String() != want || got.LastUsedNs < now {
					t.Errorf("remembered: %+v, want backend %d, used at %d or after", all, id, now)
				}
			})
		}
	}
}

// TestAffinityAndScope: the remembered backend does not override the policy Local; what is chosen instead is
// remembered, and good for both scopes.
func TestAffinityAndScope(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.usable(1, 1, f.backend, maps.BackendCluster)
		r.usable(2, 1, f.backend2, bothScopes)
		r.slots(1, 1)
		r.local(1, 2)
		r.front(f.vip, 1, lb.LoadBalancer)
		r.policy(1, maps.ExternalLocal, affinityTimeout)
		for i, c := range []struct {
			program string
			want    netip.AddrPort
		}{{"pod_in", f.backend}, {"pod_in", f.backend}, {"node_in", f.backend2}, {"node_in", f.backend2}, {"pod_in", f.backend2}} {
			if got := r.choose(c.program, opening(lb.TCP, from(f, i), f.vip)); got != c.want.String() {
				t.Errorf("%s, flow %d at %s: %s, want %s", f.name, i, c.program, got, c.want)
			}
		}
		r.clearFlows()
		r.local(1)
		r.usable(2, 1, f.backend2, maps.BackendCluster)
		if got := r.choose("node_in", opening(lb.TCP, from(f, 0), f.vip)); got != "no_local_backend" {
			t.Errorf("%s: without a local endpoint: %s", f.name, got)
		}
	}
}

// A packet that begins no flow makes no record, and none younger.
func TestAffinityOfRefused(t *testing.T) {
	for _, f := range families {
		r := affine(t, f)
		r.choose("pod_in", opening(lb.TCP, f.client, f.vip))
		r.remember(func(a *maps.Affinity) { a.LastUsedNs -= uint64(time.Second) })
		before := r.remembered()
		clash := testenv.SegmentTCP(f.client, f.other, testenv.ACK)
		if got := r.run("node_in", clash.Bytes()); got.Reason != "tuple_taken" {
			t.Errorf("%s: a segment in mid-stream that clashes: %s", f.name, got.Reason)
		}
		if diff := cmp.Diff(before, r.remembered()); diff != "" {
			t.Errorf("%s: it began no flow, and what is remembered is another (-before +after):\n%s", f.name, diff)
		}
	}
}

// TestAffinitySwitched: off, nothing is read or written; on again, what was remembered counts.
func TestAffinitySwitched(t *testing.T) {
	for _, f := range families {
		r := affine(t, f)
		r.slots(1, 1)
		r.choose("node_in", opening(lb.TCP, from(f, 0), f.vip))
		before := r.remembered()
		r.slots(1, 2)
		r.policy(1, 0, 0)
		for i := range 20 {
			if got := r.choose("node_in", opening(lb.TCP, from(f, 1+i), f.vip)); got != nth(f.backend, 1).String() {
				t.Errorf("%s: off, it goes to %s", f.name, got)
			}
		}
		r.slots(1, 1, 2, 3, 4)
		chosen := map[string]bool{}
		for i := range 50 { // all alike once in 10^29 runs
			chosen[r.choose("node_in", opening(lb.TCP, from(f, 100+i), f.vip))] = true
		}
		if len(chosen) == 1 {
			t.Errorf("%s: off, all go to %v", f.name, chosen)
		}
		if diff := cmp.Diff(before, r.remembered()); diff != "" {
			t.Errorf("%s: off, but written:\n%s", f.name, diff)
		}
		r.slots(1, 2)
		r.policy(1, 0, affinityTimeout)
		if got := r.choose("node_in", opening(lb.TCP, from(f, 200), f.vip)); got != f.backend.String() {
			t.Errorf("%s: on again, it goes to %s", f.name, got)
		}
	}
}

// TestAffinityBeginsAnew: a connection that begins anew on the tuple of a closed one, and a UDP flow whose backend
// went, choose as a new one does.
func TestAffinityBeginsAnew(t *testing.T) {
	for _, f := range families {
		r := affine(t, f)
		r.slots(1, 1)
		c := r.talk(f)
		c.open()
		r.slots(1, 2)
		c.send(testenv.FIN|testenv.ACK, "forward")
		c.answer(testenv.FIN | testenv.ACK)
		c.up += 100_000
		c.send(testenv.SYN, "new_flow") // to the same backend

		udp := opening(lb.UDP, from(f, 0), f.vip)
		if got := r.choose("node_in", udp); got != f.backend.String() {
			t.Errorf("%s: UDP goes to %s", f.name, got)
		}
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		for _, p := range []testenv.Packet{udp, opening(lb.UDP, from(f, 1), f.vip)} {
			if got := r.choose("node_in", p); got != nth(f.backend, 1).String() {
				t.Errorf("%s: without its backend UDP goes to %s", f.name, got)
			}
		}
	}
}

// TestAffinityRace: two flows of a client that begin on two CPUs at once get one backend, and so do all that follow.
func TestAffinityRace(t *testing.T) {
	for _, f := range families {
		r := affine(t, f)
		const clients = 500
		var chosen [2][clients]string
		var cpus sync.WaitGroup
		for cpu := range chosen {
			cpus.Go(func() {
				onCPU(t, cpu)
				for i := range clients {
					client := netip.AddrPortFrom(nth(f.client, i).Addr(), uint16(20000+cpu))
					_, frame := r.runOnly("node_in", opening(lb.TCP, client, f.vip).Bytes())
					if out, err := testenv.Parse(frame); err == nil {
						chosen[cpu][i] = out.Destination.String()
					}
				}
			})
		}
		cpus.Wait()
		for i := range clients {
			client := netip.AddrPortFrom(nth(f.client, i).Addr(), 20002)
			third := r.choose("node_in", opening(lb.TCP, client, f.vip))
			if chosen[0][i] != third || chosen[1][i] != third {
				t.Fatalf("%s: client %d has %s, %s and %s", f.name, i, chosen[0][i], chosen[1][i], third)
			}
		}
	}
}

// TestServicePrefixes: what becomes of packets to addresses where no frontend is.
func TestServicePrefixes(t *testing.T) {
	const noEntry = 0x80
	for _, f := range families {
		here := netip.PrefixFrom(f.vip.Addr(), f.vip.Addr().BitLen()-16)
		host := netip.PrefixFrom(f.vip.Addr(), f.vip.Addr().BitLen())
		far := netip.PrefixFrom(f.backend.Addr(), f.backend.Addr().BitLen()-8)
		var all []netip.Prefix // as many as there may be, ours the last
		for i := range maps.MaxServicePrefixes - 1 {
			all = append(all, netip.PrefixFrom(nth(f.other, i).Addr(), f.other.Addr().BitLen()))
		}
		all = append(all, here)
		for _, c := range []struct {
			name      string
			prefixes  []netip.Prefix
			elsewhere bool
			flags     uint8
			reason    string
		}{
			{"no prefixes", nil, false, noEntry, "no_service"},
			{"no prefixes, a ClusterIP of which nobody said", nil, false, maps.AddressClusterIP, "no_service"},
			{"a ClusterIP in a prefix", []netip.Prefix{far, here}, false, maps.AddressClusterIP | maps.AddressEcho, "wrong_port"},
			{"a ClusterIP in the last prefix", all, false, maps.AddressClusterIP, "wrong_port"},
			{"a ClusterIP elsewhere", []netip.Prefix{far}, true, maps.AddressClusterIP, "wrong_port"},
			{"a ClusterIP elsewhere, no prefixes", nil, true, maps.AddressClusterIP, "wrong_port"},
			{"unassigned", []netip.Prefix{far, here}, false, noEntry, "unassigned"},
			{"unassigned, a prefix of one address", []netip.Prefix{host}, false, noEntry, "unassigned"},
			{"unassigned, ClusterIPs elsewhere too", []netip.Prefix{here}, true, noEntry, "unassigned"},
			{"outside", []netip.Prefix{far}, false, noEntry, "no_service"},
			{"outside, ClusterIPs elsewhere", []netip.Prefix{far}, true, noEntry, "no_service"},
			{"a load balancer's address", []netip.Prefix{far}, true, maps.AddressEcho, "no_service"},
			{"a load balancer's address in a prefix", []netip.Prefix{here}, false, maps.AddressEcho, "no_service"},
			{"another proxy's VIP in a prefix", []netip.Prefix{here}, true, 0, "no_service"},
		} {
			for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
				t.Run(fmt.Sprintf("%s/%s/%s", f.name, p, c.name), func(t *testing.T) {
					r := newPort(t) // at a bridge's port, too
					r.must(r.maps.SetServicePrefixes(c.prefixes, c.elsewhere))
					if c.flags != noEntry {
						r.address(f.vip.Addr(), c.flags)
					}
					// A packet with a port, and one without, which is never answered.
					verdict, oddVerdict, oddReason := uint32(pass), uint32(pass), "unsupported"
					if c.reason != "no_service" {
						verdict, oddVerdict, oddReason = drop, drop, "vip_unsupported"
					}
					expect := func(program string, frame []byte) {
						t.Helper()
						if c.reason != "wrong_port" {
							r.expect(program, frame, verdict, c.reason, frame)
						} else if got := r.run(program, frame); got.Verdict != sentBack || got.Reason != c.reason {
							// TestReject compares what is sent.
							t.Errorf("%s of %s: verdict %d, reason %s", program, testenv.Describe(frame), int32(got.Verdict), got.Reason)
						}
					}
					packet := opening(p, f.client, f.vip)
					odd := with(packet, func(p *testenv.Packet) { p.Protocol = 47 })
					for _, at := range []struct {
						program string
						to      testenv.MAC
					}{{"node_in", bridgeMAC}, {"port_in", bridgeMAC}, {"port_in", otherMAC}} {
						frame, oddFrame := sentTo(at.to, packet).Bytes(), sentTo(at.to, odd).Bytes()
						expect(at.program, frame)
						r.expect(at.program, oddFrame, oddVerdict, oddReason, oddFrame)
					}
					// Another host's frame, which the cable shows us.
					foreign, oddForeign := sentTo(otherMAC, packet).Bytes(), sentTo(otherMAC, odd).Bytes()
					r.expect("node_in", foreign, pass, "no_service", foreign)
					r.expect("node_in", oddForeign, pass, "unsupported", oddForeign)
					// A routed pod's.
					r.keepMAC = false
					expect("pod_in", packet.Bytes())
					if p == lb.TCP && c.reason == "wrong_port" {
						reset := with(packet, func(p *testenv.Packet) { p.TCPFlags = testenv.RST }).Bytes()
						r.expect("pod_in", reset, drop, "not_answered", reset)
					}
					r.expect("node_out", packet.Bytes(), pass, "no_flow", packet.Bytes())
				})
			}
		}
	}
}

// TestFlowsBeforePrefixes: a packet of a living flow is that flow's, wherever its address is.
func TestFlowsBeforePrefixes(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		r.must(r.maps.SetServicePrefixes([]netip.Prefix{
			netip.PrefixFrom(f.vip.Addr(), f.vip.Addr().BitLen()-8), netip.PrefixFrom(f.client.Addr(), f.client.Addr().BitLen()-8),
		}, false))
		udp := opening(lb.UDP, f.client, f.vip)
		r.choose("node_in", udp)
		// A reply to a client in a prefix, before it is assured and then.
		reply := testenv.DatagramUDP(f.backend, f.client, "x").Bytes()
		r.expect("pod_in", reply, pass, "other_hook", reply)
		c := r.talk(f)
		c.open()
		c.answer(testenv.ACK)
		down := c.reply(testenv.ACK).Bytes()
		r.expect("pod_in", down, pass, "other_hook", down)
		stranger := testenv.DatagramUDP(f.backend2, f.client, "x").Bytes()
		r.expect("pod_in", stranger, drop, "unassigned", nil)
		// The Service goes: its connections go on, its datagrams follow the new state.
		for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
			r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr(), Port: f.vip.Port(), Protocol: p})))
		}
		r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr()})))
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		c.send(testenv.ACK, "forward")
		r.expect("node_in", udp.Bytes(), drop, "unassigned", nil)
	}
}

// TestServiceGoesInHandshake: a Service goes when its client has been answered, and before that has spoken again. To the
// client the connection is there, so it goes on; a SYN and a datagram follow the new state.
func TestServiceGoesInHandshake(t *testing.T) {
	for _, f := range families {
		for name, c := range map[string]struct {
			assigned bool // another port of the address is a Service's still
			verdict  uint32
			reason   string
		}{
			"its address too": {false, drop, "unassigned"},
			"its port":        {true, sentBack, "wrong_port"},
		} {
			for _, program := range []string{"node_in", "pod_in", "port_in"} {
				t.Run(f.name+"/"+name+"/"+program, func(t *testing.T) {
					r := newRig(t)
					r.service(f)
					r.must(r.maps.SetServicePrefixes([]netip.Prefix{netip.PrefixFrom(f.vip.Addr(), f.vip.Addr().BitLen()-8)}, false))
					udp := opening(lb.UDP, f.client, f.vip)
					r.choose(program, udp)
					c1 := r.talk(f)
					c1.send(testenv.SYN, "new_flow")
					syn := c1.segment(testenv.SYN)
					syn.Seq--
					c1.answer(testenv.SYN | testenv.ACK)
					for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
						r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr(), Port: f.vip.Port(), Protocol: p})))
					}
					if !c.assigned {
						r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr()})))
					}
					for _, p := range []testenv.Packet{udp, syn} {
						if got := r.run(program, p.Bytes()); got.Verdict != c.verdict || got.Reason != c.reason {
							t.Errorf("%s: %d, %s", testenv.Describe(p.Bytes()), int32(got.Verdict), got.Reason)
						}
					}
					ack := c1.segment(testenv.ACK)
					out := ack
					out.Destination = f.backend
					r.expect(program, ack.Bytes(), pass, "forward", out.Bytes())
					if _, in := r.flow(f.client, f.vip, lb.TCP); in != "flows" {
						t.Errorf("after the handshake the flow is in %q", in)
					}
				})
			}
		}
	}
}

// sweepAll hands every entry of both tables to the sweeper.
func (r *rig) sweepAll() {
	r.t.Helper()
	for _, in := range []maps.Table{maps.Pending, maps.Flows} {
		_, err := r.loader.Sweep(in, r.keys(in))
		r.must(err)
	}
}

// wantStats compares the statistics of service 1 and of backends, by id.
func (r *rig) wantStats(when string, service maps.ServiceStats, backends map[uint32]maps.BackendStats) {
	r.t.Helper()
	if diff := cmp.Diff(service, r.maps.ServiceStats(1)); diff != "" {
		r.t.Errorf("%s: service (-want +got)\n%s", when, diff)
	}
	got := map[uint32]maps.BackendStats{}
	for id := range r.maps.Sizes().Backends {
		if s := r.maps.BackendStats(id); s != (maps.BackendStats{}) {
			got[id] = s
		}
	}
	if diff := cmp.Diff(backends, got); diff != "" {
		r.t.Errorf("%s: backends (-want +got)\n%s", when, diff)
	}
}

// TestStatsOfRefusals: a packet that is refused is counted once, where it was to begin a flow.
func TestStatsOfRefusals(t *testing.T) {
	f := families[0]
	r := newRig(t)
	r.usable(1, 1, f.backend, maps.BackendCluster)
	r.front(f.vip, 1, lb.LoadBalancer)
	p := opening(lb.TCP, f.client, f.vip)
	r.choose("node_in", p)
	r.slots(1, 1)
	r.policy(1, maps.ExternalLocal, 0)
	r.choose("node_in", p)
	r.choose("node_in", p)
	r.policy(1, maps.ExternalLocal|maps.HasSourceRanges, 0)
	for range 3 {
		r.choose("pod_in", p)
	}
	r.choose("pod_in", with(p, func(p *testenv.Packet) { p.TCPFlags = testenv.RST })) // of no flow, and of no interest
	r.wantStats("refused", maps.ServiceStats{NoBackend: 1, NoLocalBackend: 2, SourceDenied: 3}, map[uint32]maps.BackendStats{})
}

// TestStats: flows are counted as they begin, packets and bytes by the sweeper: each once, in whichever table, however
// often it looks, and before what has counted them goes.
func TestStats(t *testing.T) {
	for _, f := range families {
		for _, sweepsBetween := range []bool{false, true} {
			r := newRig(t)
			r.usable(1, 1, f.backend, bothScopes)
			r.usable(2, 1, f.backend2, bothScopes)
			r.slots(1, 1)
			r.front(f.vip, 1, lb.ClusterIP)
			up := opening(lb.UDP, f.client, f.vip).Bytes()
			down := testenv.DatagramUDP(f.backend, f.client, "an answer").Bytes()
			var want maps.BackendStats
			step := func() {
				if sweepsBetween {
					r.sweepAll()
				}
			}
			send := func(reason string) {
				t.Helper()
				if got := r.run("node_in", up); got.Reason != reason {
					t.Errorf("%s: %s, want %s", f.name, got.Reason, reason)
				}
				if want.PacketsIn++; reason == "new_flow" {
					want.Flows++
				}
				want.BytesIn += uint64(len(up) - 14)
				step()
			}
			answer := func() {
				t.Helper()
				if got := r.run("node_out", down); got.Reason != "reply" {
					t.Errorf("%s: %s", f.name, got.Reason)
				}
				want.PacketsOut++
				want.BytesOut += uint64(len(down) - 14)
				step()
			}
			check := func(when string) {
				t.Helper()
				for range 2 {
					r.sweepAll()
					r.wantStats(f.name+", "+when, maps.ServiceStats{Flows: want.Flows, PacketsIn: want.PacketsIn, BytesIn: want.BytesIn,
						PacketsOut: want.PacketsOut, BytesOut: want.BytesOut}, map[uint32]maps.BackendStats{1: want})
				}
			}
			r.wantStats("at first", maps.ServiceStats{}, map[uint32]maps.BackendStats{})
			send("new_flow")
			send("forward")
			check("pending")
			send("forward")
			answer()
			send("forward") // noted in `pending`, and then copied
			if _, in := r.flow(f.client, f.vip, lb.UDP); in != "flows" {
				t.Fatal(in)
			}
			check("copied")
			send("forward")
			answer()
			answer()
			check("assured")
			send("forward")
			r.age(time.Hour)
			step()
			check("expired")
			if n := len(r.keys(maps.Flows)) + len(r.keys(maps.Pending)); n != 0 {
				t.Errorf("%s: %d entries are left", f.name, n)
			}

			// A flow begins anew where an expired one still is, with packets that nobody has counted.
			send("new_flow")
			send("forward")
			answer()
			send("forward")
			answer()
			r.age(time.Hour)
			send("new_flow")
			check("begun anew")

			// It moves to another backend: what is uncounted is the first one's. Not what that answers from then on to
			// one who has moved: these are its own, too.
			send("forward")
			answer()
			send("forward")
			send("forward")
			r.slots(1, 2)
			r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
			if got := r.run("node_in", up); got.Reason != "new_flow" {
				t.Error(got.Reason)
			}
			answer()
			r.sweepAll()
			second := maps.BackendStats{Flows: 1, PacketsIn: 1, BytesIn: uint64(len(up) - 14)}
			total := maps.ServiceStats{Flows: want.Flows + 1, PacketsIn: want.PacketsIn + 1, BytesIn: want.BytesIn + second.BytesIn,
				PacketsOut: want.PacketsOut, BytesOut: want.BytesOut}
			r.wantStats(f.name+", moved", total, map[uint32]maps.BackendStats{1: want, 2: second})
		}
	}
}

// TestStatsOfReturned: a connection begins anew at the address of a removed backend that is back with another id: what
// the first one carried stays its own.
func TestStatsOfReturned(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.usable(1, 1, f.backend, bothScopes)
		r.slots(1, 1)
		r.front(f.vip, 1, lb.ClusterIP)
		c := r.talk(f)
		c.open()
		c.send(testenv.FIN|testenv.ACK, "forward")
		c.answer(testenv.FIN | testenv.ACK)
		r.usable(2, 1, f.backend, bothScopes)
		r.slots(1, 2)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		c.up += 100_000
		c.send(testenv.SYN, "new_flow")
		r.sweepAll()
		first, second := r.maps.BackendStats(1), r.maps.BackendStats(2)
		if first.Flows != 1 || first.PacketsIn != 3 || first.PacketsOut != 2 || second.Flows != 1 || second.PacketsIn != 1 || second.PacketsOut != 0 {
			t.Errorf("%s: the first has %+v, the second %+v", f.name, first, second)
		}
	}
}

// TestStatsOfDirect: a connection straight to a backend is no service's.
func TestStatsOfDirect(t *testing.T) {
	f := families[0]
	r := newRig(t)
	r.service(f)
	r.identities(f)
	p := opening(lb.UDP, f.client, f.backend).Bytes()
	for range 3 {
		r.run("node_in", p)
	}
	r.sweepAll()
	r.wantStats("direct", maps.ServiceStats{}, map[uint32]maps.BackendStats{})
	// By another port, as a flow of the service has its own.
	r.clearFlows()
	toVIP := opening(lb.UDP, f.client, f.vip).Bytes()
	for _, frame := range [][]byte{toVIP, p, p} {
		r.run("node_in", frame)
	}
	if got := r.run("node_in", p); got.Reason != "forward" {
		t.Error(got.Reason)
	}
	r.sweepAll()
	one := maps.BackendStats{Flows: 1, PacketsIn: 1, BytesIn: uint64(len(toVIP) - 14)}
	r.wantStats("remapped", maps.ServiceStats{Flows: 1, PacketsIn: 1, BytesIn: one.BytesIn}, map[uint32]maps.BackendStats{1: one})
	if s := r.maps.ServiceStats(0); s != (maps.ServiceStats{}) {
		t.Errorf("no service has %+v", s)
	}
}

// TestStatsOfTwoSweepers: both count the same entries at once, and meet. Each packet is added once.
func TestStatsOfTwoSweepers(t *testing.T) {
	f := families[0]
	r := newRig(t)
	r.usable(1, 1, f.backend, bothScopes)
	r.slots(1, 1)
	r.front(f.vip, 1, lb.ClusterIP)
	const halves, rounds = 512, 100
	for i := range halves {
		r.choose("node_in", opening(lb.UDP, from(f, i), f.vip))
	}
	var orders [2][]maps.Tuple // one begins where the other ends
	all := map[maps.Tuple]maps.Flow{}
	r.must(r.maps.EachHalf(maps.Pending, func(k maps.Tuple, half maps.Flow) bool {
		if half.Role == maps.RoleForward {
			all[k] = half
			orders[0] = append(orders[0], k)
		}
		return true
	}))
	orders[1] = slices.Clone(orders[0])
	slices.Reverse(orders[1])
	pending := r.maps.All()["pending"]
	var sweepers, ready sync.WaitGroup
	var begin [2]chan struct{}
	for cpu, keys := range orders {
		begin[cpu] = make(chan struct{})
		sweepers.Go(func() {
			onCPU(t, cpu)
			for range begin[cpu] {
				if _, err := r.loader.Sweep(maps.Pending, keys); err != nil {
					t.Error(err)
				}
				ready.Done()
			}
		})
	}
	for n := range uint64(rounds) {
		for k, half := range all {
			half.Packets, half.Bytes = 5*(n+1), 700*(n+1)
			half.CountedPackets, half.CountedBytes = 5*n, 700*n
			r.must(pending.Put(k, half))
		}
		ready.Add(2)
		for _, c := range begin {
			c <- struct{}{}
		}
		ready.Wait()
	}
	for _, c := range begin {
		close(c)
	}
	sweepers.Wait()
	want := maps.BackendStats{Flows: halves, PacketsIn: 5 * halves * rounds, BytesIn: 700 * halves * rounds}
	r.wantStats("two sweepers", maps.ServiceStats{Flows: want.Flows, PacketsIn: want.PacketsIn, BytesIn: want.BytesIn}, map[uint32]maps.BackendStats{1: want})
}

// TestStatsBesideTraffic: two sweepers look while flows begin, are answered, copied and used: all packets are counted,
// once each.
func TestStatsBesideTraffic(t *testing.T) {
	f := families[0]
	r := newRig(t)
	r.usable(1, 1, f.backend, bothScopes)
	r.slots(1, 1)
	r.front(f.vip, 1, lb.ClusterIP)
	done := make(chan struct{})
	var sweepers sync.WaitGroup
	for i := range 2 {
		sweepers.Go(func() {
			onCPU(t, i)
			for {
				select {
				case <-done:
					return
				default:
				}
				for _, in := range []maps.Table{maps.Pending, maps.Flows} {
					var keys []maps.Tuple
					err := r.maps.EachHalf(in, func(k maps.Tuple, _ maps.Flow) bool {
						keys = append(keys, k)
						return true
					})
					if err == nil {
						_, err = r.loader.Sweep(in, keys)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	var want maps.BackendStats
	busy := 0
	const clients, rounds = 40, 60
	for range rounds {
		for i := range clients {
			up := opening(lb.UDP, from(f, i), f.vip).Bytes()
			if verdict, _ := r.runOnly("node_in", up); verdict == drop {
				busy++ // a sweeper had the lock
				continue
			}
			want.PacketsIn++
			want.BytesIn += uint64(len(up) - 14)
			down := testenv.DatagramUDP(f.backend, from(f, i), "an answer").Bytes()
			r.runOnly("node_out", down)
			want.PacketsOut++
			want.BytesOut += uint64(len(down) - 14)
		}
	}
	close(done)
	sweepers.Wait()
	r.sweepAll()
	want.Flows = clients
	r.wantStats("beside traffic", maps.ServiceStats{Flows: want.Flows, PacketsIn: want.PacketsIn, BytesIn: want.BytesIn,
		PacketsOut: want.PacketsOut, BytesOut: want.BytesOut}, map[uint32]maps.BackendStats{1: want})
	if busy > rounds*clients/100 {
		t.Errorf("%d packets met a held lock", busy)
	}
}

// TestVIPIsItsOwnEndpoint: a NodePort may have the number of an endpoint on this host's network. A flow that moves to
// it is no clash with what it was.
func TestVIPIsItsOwnEndpoint(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		p := testenv.DatagramUDP(f.client, f.vip, "hello")
		if got := r.choose("node_in", p); got != f.backend.String() {
			t.Fatalf("%s: it goes to %s", f.name, got)
		}
		r.backend(2, 1, f.vip, maps.BackendActive, 1)
		r.slots(1, 2)
		r.backend(1, 1, f.backend, maps.BackendRemoved, 2)
		r.expect("node_in", p.Bytes(), pass, "new_flow", p.Bytes())
		r.expect("node_in", p.Bytes(), pass, "forward", p.Bytes())
	}
}
