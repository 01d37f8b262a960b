// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"errors"
	"fmt"
	"log/slog"
	maps2 "maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lbagent/lbagent/balance"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

func testRig(t testing.TB, sizes maps.Sizes) *rig {
	t.Helper()
	needRoot(t)
	g, err := newRig(sizes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.m.Close() })
	return g
}

func mustParse(t testing.TB, text string) map[lb.ServiceName]lb.Service {
	t.Helper()
	all, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (g *rig) mustApply(t testing.TB) {
	t.Helper()
	if err := g.apply(); err != nil {
		t.Fatal(err)
	}
}

// sweep is a whole sweep that meets no flow, and what follows from it.
func (g *rig) sweep(t testing.TB) {
	t.Helper()
	g.r.BeginSweep()
	g.r.EndSweep(func(uint32) bool { return false })
	g.mustApply(t)
}

// wantDump compares the maps, once no flow holds a removed backend, with what is desired.
func (g *rig) wantDump(t testing.TB, desired map[lb.ServiceName]lb.Service) {
	t.Helper()
	g.sweep(t)
	if diff := cmp.Diff(g.expected(desired), g.dump()); diff != "" {
		t.Errorf("the maps are not what is desired (-desired +maps):\n%s", diff)
	}
}

const before = `
default/api/TCP IPv4
  frontend 10.96.0.1:443/TCP ClusterIP
  frontend 192.0.2.1:443/TCP hostPort
  backend 10.0.3.1:6443 active
default/gone/TCP IPv4
  frontend 10.96.0.3:80/TCP ClusterIP
  frontend 192.0.2.1:30081/TCP NodePort
  backend 10.0.2.1:80 active
  backend 10.0.2.2:80 draining
default/lb/TCP IPv4
  frontend 10.96.0.5:80/TCP ClusterIP
  frontend 198.51.100.1:80/TCP LoadBalancer
  backend 10.0.5.1:80 active cluster local
  backend 10.0.5.2:80 active
  backend 10.0.5.3:80 active local
  policy external-local affinity=10800
  sources 192.0.2.0/24 203.0.113.0/24
default/plain/TCP IPv4
  frontend 172.30.0.1:80/TCP ClusterIP
  frontend 198.51.100.2:80/TCP external
  backend 10.0.6.1:80 active cluster local weight=3
  backend 10.0.6.2:80 active
  backend 10.0.6.3:80 active weight=0
default/turn/TCP IPv4
  frontend 198.51.100.3:80/TCP LoadBalancer
  policy external-local
default/web:http/TCP IPv4
  frontend 10.96.0.2:80/TCP ClusterIP
  frontend 192.0.2.1:30080/TCP NodePort
  backend 10.0.1.1:80 active
  backend 10.0.1.2:80 active
  backend 10.0.1.3:80 draining
`

// A backend and a frontend go, one drains, one comes, a VIP moves, a service goes, one comes. Of two services all but
// the frontends and the addresses of the backends changes: policy, affinity, source ranges, weights, scopes. One gets
// its first endpoint as its policy goes.
const after = `
default/api/TCP IPv4
  frontend 10.96.0.1:443/TCP ClusterIP
  frontend 192.0.2.1:443/TCP hostPort
  frontend 192.0.2.1:30080/TCP NodePort
  backend 10.0.3.1:6443 active
default/lb/TCP IPv4
  frontend 10.96.0.5:80/TCP ClusterIP
  frontend 198.51.100.1:80/TCP LoadBalancer
  backend 10.0.5.1:80 active
  backend 10.0.5.2:80 active cluster local
  backend 10.0.5.3:80 draining
  policy affinity=60
  sources 192.0.2.0/24 198.51.100.0/25
default/new/UDP IPv4
  frontend 10.96.0.3:80/TCP ClusterIP
  frontend 10.96.0.4:80/UDP ClusterIP
  backend 10.0.4.1:80 active
default/plain/TCP IPv4
  frontend 172.30.0.1:80/TCP ClusterIP
  frontend 198.51.100.2:80/TCP external
  backend 10.0.6.1:80 active cluster local weight=5
  backend 10.0.6.2:80 active cluster local weight=0
  backend 10.0.6.3:80 active
  policy internal-local
  sources 192.0.2.0/24
default/turn/TCP IPv4
  frontend 198.51.100.3:80/TCP LoadBalancer
  backend 10.0.7.1:80 active cluster local
default/web:http/TCP IPv4
  frontend 10.96.0.2:80/TCP ClusterIP
  backend 10.0.1.1:80 draining
  backend 10.0.1.3:80 active
  backend 10.0.1.4:80 active
`

// The agent dies before each write in turn: what a packet meets is checked there by the rig. The agent that
// follows brings everything to what is desired, also where that is what it was before, and makes flows look
// again that the one before owed it to.
func TestDiesAtAnyWrite(t *testing.T) {
	for _, next := range []string{before, after} {
		for at, died := 0, true; died; at++ {
			g := testRig(t, small)
			g.desire(mustParse(t, before))
			g.mustApply(t)
			was, err := read(g.m)
			if err != nil {
				t.Fatal(err)
			}
			g.desire(mustParse(t, after))
			left := at
			g.fault = func(string) error {
				if left--; left < 0 {
					panic(errDied)
				}
				return nil
			}
			died = false
			func() {
				defer func() {
					if v := recover(); v != nil {
						if v != errDied {
							panic(v)
						}
						died = true
					}
				}()
				g.mustApply(t)
			}()
			g.fault = nil
			if err := g.restart(); err != nil {
				t.Fatal(err)
			}
			desired := mustParse(t, next)
			g.desire(desired)
			g.mustApply(t)
			g.wantDump(t, desired)
			is, err := read(g.m)
			if err != nil {
				t.Fatal(err)
			}
			for id, b := range was.backends {
				if !lostNothing(b) && is.backends[id].Life.Generation == b.Life.Generation {
					t.Errorf("died at write %d: flows of %s do not look again", at, b.Addr())
				}
			}
			if !died && at < 10 {
				t.Errorf("died at no more than %d writes", at)
			}
		}
	}
}

// lostNothing tells whether a backend of `before` lost neither its service nor a frontend nor its own place by
// `after`: 10.0.1.* lost a frontend, 10.0.2.* their service. A policy makes no flow look again.
func lostNothing(b maps.Backend) bool {
	a := b.Addr().Addr().As4()
	return a[2] != 1 && a[2] != 2
}

// Any write fails once; what a packet meets is checked by the rig. The next Apply writes the rest.
func TestFailsAtAnyWrite(t *testing.T) {
	for at, failed := 0, true; failed; at++ {
		g := testRig(t, small)
		g.desire(mustParse(t, before))
		g.mustApply(t)
		desired := mustParse(t, after)
		g.desire(desired)
		left := at
		g.fault = func(string) error {
			if left--; left == -1 {
				return errFault
			}
			return nil
		}
		failed = g.apply() != nil
		g.fault = nil
		if failed != (left < 0) {
			t.Fatalf("write %d failed and Apply did not say so", at)
		}
		if failed && g.r.Stats().Pending == 0 {
			t.Errorf("write %d failed and nothing is pending", at)
		}
		g.mustApply(t)
		g.wantDump(t, desired)
		g.mustApply(t)
		if len(g.trace) > 0 {
			t.Errorf("write %d had failed; two Applies later there are writes: %q", at, g.trace)
		}
	}
}

// Until the grace period has ended no generation changes and nothing becomes free.
func TestNothingEndsBeforeTheGracePeriod(t *testing.T) {
	g := testRig(t, small)
	g.desire(mustParse(t, before))
	g.mustApply(t)
	was, err := read(g.m)
	if err != nil {
		t.Fatal(err)
	}
	g.fault = func(write string) error {
		if write == "grace" {
			return errFault
		}
		return nil
	}
	desired := mustParse(t, after)
	g.desire(desired)
	for range 3 {
		if g.apply() == nil {
			t.Fatal("no grace period, and no error")
		}
		is, err := read(g.m)
		if err != nil {
			t.Fatal(err)
		}
		for id, b := range was.backends {
			if is.backends[id].Life.Generation != b.Life.Generation || is.backends[id].Life.State == maps.BackendRemoved {
				t.Errorf("backend %d changed from %v to %v", id, b, is.backends[id])
			}
		}
		for id, r := range was.ranges {
			if now, ok := is.ranges[id]; ok && now != r {
				for other, o := range is.ranges {
					if o.First < r.First+r.Count && r.First < o.First+o.Count {
						t.Errorf("slots of service %d were given to %d", id, other)
					}
				}
			}
		}
	}
	g.fault = nil
	g.mustApply(t)
	is, err := read(g.m)
	if err != nil {
		t.Fatal(err)
	}
	g.wantDump(t, desired)
	for id, b := range was.backends {
		if raised := is.backends[id].Life.Generation > b.Life.Generation; raised == lostNothing(b) {
			t.Errorf("backend %s: generation %d was %d", b.Addr(), is.backends[id].Life.Generation, b.Life.Generation)
		}
	}
}

// A Service that goes to another proxy, or comes from it: at no time a port is refused that one of the two serves.
func TestHandedOver(t *testing.T) {
	const service = `
default/web:http/TCP IPv4
  frontend 10.96.0.2:80/TCP ClusterIP
  frontend 198.51.100.2:80/TCP LoadBalancer
  backend 10.0.1.1:8080 active
default/web:https/TCP IPv4
  frontend 10.96.0.2:443/TCP ClusterIP
  frontend 198.51.100.2:443/TCP LoadBalancer
  backend 10.0.1.1:8443 active
`
	address := netip.MustParseAddr("10.96.0.2")
	foreign := map[netip.Addr]bool{address: true, netip.MustParseAddr("198.51.100.2"): true}
	for _, prefixes := range [][]netip.Prefix{{netip.MustParsePrefix("10.96.0.0/12")}, nil} {
		g := testRig(t, small)
		if err := g.setPrefixes(prefixes); err != nil {
			t.Fatal(err)
		}
		g.setForeign(foreign)
		g.mustApply(t)
		g.fault = func(write string) error {
			is, err := read(g.m)
			if err != nil {
				t.Fatal(err)
			}
			served := 0
			for vip := range is.frontends {
				if vip.Addr == address && vip.Port != 0 {
					served++
				}
			}
			entry, known := is.frontends[addressVIP(address)]
			if !known || served < 2 && entry.Flags&maps.AddressClusterIP != 0 {
				t.Errorf("prefixes %v, before a write of %s, after %q: %d ports of 2 are there, and the address says %+v",
					prefixes, write, g.trace, served, entry)
			}
			return nil
		}
		for range 2 {
			g.setForeign(map[netip.Addr]bool{})
			g.desire(mustParse(t, service))
			g.mustApply(t)
			g.wantDump(t, g.desired)
			g.setForeign(foreign)
			g.desire(nil)
			g.mustApply(t)
			g.wantDump(t, g.desired)
		}
	}
}

// An id that a flow may still name is reused as late as possible, with another generation.
func TestReuseOfBackendIDs(t *testing.T) {
	g := testRig(t, maps.Sizes{Frontends: 8, Services: 4, Slots: 8, Backends: 5, Flows: 8})
	for i := range 12 {
		g.desire(mustParse(t, fmt.Sprintf("default/web/TCP IPv4\n  backend 10.0.0.%d:80 active\n", i)))
		g.mustApply(t)
		c, err := read(g.m)
		if err != nil {
			t.Fatal(err)
		}
		g.sweep(t)
		for id, b := range c.backends {
			if b.Life.State != maps.BackendActive {
				continue
			}
			if want := uint32(i%4 + 1); id != want {
				t.Errorf("backend %d has id %d, want %d", i, id, want)
			}
			if want := uint32(i/4*2 + 1); b.Life.Generation != want {
				t.Errorf("backend %d has generation %d, want %d", i, b.Life.Generation, want)
			}
		}
	}
}

func setFlags(g *rig, id uint32, flags uint8) error {
	life := g.m.Backend(id).Life
	life.Flags = flags
	return g.m.SetBackendLife(id, life)
}

// Whatever the maps say, New adopts what can be used and the first Apply brings the rest in order.
func TestDamagedMaps(t *testing.T) {
	name := func(g *rig, id uint32, s string) error {
		n, err := parseName(s, "IPv4")
		if err != nil {
			return err
		}
		wire, err := maps.NameOf(n)
		if err != nil {
			return err
		}
		return g.m.SetServiceName(id, wire)
	}
	vip := func(s string) maps.FrontendKey {
		v, err := parseVIP(s)
		if err != nil {
			panic(err)
		}
		return maps.KeyOf(v)
	}
	backend := func(service uint32, addr string, state maps.BackendState) maps.Backend {
		a := netip.MustParseAddrPort(addr)
		return maps.BackendOf(service, lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: lb.TCP}, maps.BackendLife{Generation: 7, State: state, Flags: maps.BackendCluster})
	}
	address := func(a string) maps.FrontendKey { return maps.KeyOf(addressVIP(netip.MustParseAddr(a))) }
	for what, damage := range map[string]func(g *rig) error{
		"a backend of a nameless service":     func(g *rig) error { return g.m.SetBackend(20, backend(9, "10.9.9.9:1", maps.BackendActive)) },
		"a backend of no service":             func(g *rig) error { return g.m.SetBackend(20, backend(0, "10.9.9.9:1", maps.BackendDraining)) },
		"a backend of a service out of range": func(g *rig) error { return g.m.SetBackend(20, backend(1<<30, "10.9.9.9:1", maps.BackendActive)) },
		"a backend in an unknown state":       func(g *rig) error { return g.m.SetBackend(20, backend(1, "10.9.9.9:1", 99)) },
		"a backend twice":                     func(g *rig) error { return g.m.SetBackend(20, backend(1, "10.0.3.1:6443", maps.BackendActive)) },
		"a backend of another protocol": func(g *rig) error {
			b := g.m.Backend(1)
			b.Protocol = maps.KeyOf(lb.VIP{Addr: b.Addr().Addr(), Protocol: lb.UDP}).Protocol
			return g.m.SetBackend(1, b)
		},
		"a backend without a port": func(g *rig) error {
			return g.m.SetBackend(20, maps.Backend{Address: g.m.Backend(1).Address, Life: maps.BackendLife{State: maps.BackendActive}})
		},
		"an identity of no backend":              func(g *rig) error { return g.m.SetFrontend(vip("10.9.9.9:1/TCP"), maps.FrontendOf(0, lb.Identity)) },
		"an identity of a service":               func(g *rig) error { return g.m.SetFrontend(vip("10.0.3.1:6443/TCP"), maps.FrontendOf(1, lb.Identity)) },
		"an identity in the place of a frontend": func(g *rig) error { return g.m.SetFrontend(vip("10.96.0.1:443/TCP"), maps.FrontendOf(0, lb.Identity)) },
		"a frontend with the tag of another": func(g *rig) error {
			k := vip("10.96.0.1:443/TCP")
			return g.m.All()["frontends"].Put(k, maps.FrontendOf(1, lb.ClusterIP))
		},
		"a lost identity":                        func(g *rig) error { return g.m.DeleteFrontend(vip("10.0.3.1:6443/TCP")) },
		"a backend's address that leads nowhere": func(g *rig) error { return g.m.SetFrontend(vip("10.0.3.1:6443/TCP"), maps.FrontendOf(0, lb.ClusterIP)) },
		"a name without slots":                   func(g *rig) error { return name(g, 9, "default/other/TCP") },
		"a name twice":                           func(g *rig) error { return name(g, 9, "default/web:http/TCP") },
		"a name out of range":                    func(g *rig) error { return name(g, 1<<20, "default/web:http/TCP") },
		"a lost name":                            func(g *rig) error { return g.m.DeleteServiceName(1) },
		"a frontend of a nameless service":       func(g *rig) error { return g.m.SetFrontend(vip("10.9.9.9:1/TCP"), maps.FrontendOf(9, lb.External)) },
		"a frontend of no service":               func(g *rig) error { return g.m.SetFrontend(vip("10.9.9.9:1/TCP"), maps.FrontendOf(0, lb.ClusterIP)) },
		"a frontend of a service out of range":   func(g *rig) error { return g.m.SetFrontend(vip("10.9.9.9:1/TCP"), maps.FrontendOf(1<<30, lb.External)) },
		"a desired frontend that leads nowhere":  func(g *rig) error { return g.m.SetFrontend(vip("10.96.0.1:443/TCP"), maps.FrontendOf(0, lb.ClusterIP)) },
		"an address of no frontend":              func(g *rig) error { return g.m.SetFrontend(address("10.9.9.9"), maps.FrontendOf(0, lb.Address)) },
		"an address of another kind":             func(g *rig) error { return g.m.SetFrontend(address("10.96.0.1"), maps.FrontendOf(1, lb.External)) },
		"a lost address":                         func(g *rig) error { return g.m.DeleteFrontend(address("10.96.0.1")) },
		"overlapping slots":                      func(g *rig) error { return g.m.SetServiceCluster(1, g.m.Service(3).Cluster) },
		"slots out of range":                     func(g *rig) error { return g.m.SetServiceCluster(1, maps.SlotRange{First: 60, Count: 8}) },
		"slots far out of range": func(g *rig) error {
			return g.m.SetServiceCluster(1, maps.SlotRange{First: 1<<32 - 1, Count: 1<<32 - 1})
		},
		"slots of the scope Local without a policy": func(g *rig) error { return g.m.SetServiceLocal(1, maps.SlotRange{First: 40, Count: 1}) },
		"slots of both scopes that overlap":         func(g *rig) error { return g.m.SetServiceLocal(1, g.m.Service(1).Cluster) },
		"a policy without its slots": func(g *rig) error {
			return g.m.SetServicePolicy(1, maps.Policy{Flags: maps.InternalLocal | maps.HasSourceRanges})
		},
		"a policy of a nameless service": func(g *rig) error { return g.m.SetServicePolicy(9, maps.Policy{AffinityTimeoutS: 7}) },
		"a source range too many":        func(g *rig) error { return g.m.SetSourceRange(1, netip.MustParsePrefix("0.0.0.0/0")) },
		"a lost source range": func(g *rig) error {
			return errors.Join(g.m.DeleteSourceRange(3, netip.MustParsePrefix("192.0.2.0/24")), g.m.DeleteSourceRange(3, netip.MustParsePrefix("203.0.113.0/24")))
		},
		"a source range of a nameless service":       func(g *rig) error { return g.m.SetSourceRange(9, netip.MustParsePrefix("192.0.2.0/24")) },
		"a source range of a service out of range":   func(g *rig) error { return g.m.SetSourceRange(1<<30, netip.MustParsePrefix("192.0.2.0/24")) },
		"a backend that is active in no scope":       func(g *rig) error { return setFlags(g, 1, 0) },
		"a backend whose scope its slots do not say": func(g *rig) error { return setFlags(g, 1, maps.BackendLocal) },
		"an address without its flags":               func(g *rig) error { return g.m.SetFrontend(address("10.96.0.1"), maps.FrontendOf(0, lb.Address)) },
		"other prefixes":                             func(g *rig) error { return g.m.SetServicePrefixes(nil, false) },
		"slots of a nameless service":                func(g *rig) error { return g.m.SetServiceCluster(9, maps.SlotRange{First: 40, Count: 1}) },
		"slots not from the allocator":               func(g *rig) error { return g.m.SetServiceCluster(3, maps.SlotRange{First: 33, Count: 2}) },
		"a slot of another service": func(g *rig) error {
			return g.m.SetSlots(g.m.Service(1).Cluster.First, g.m.Slots(g.m.Service(3).Cluster)[:1])
		},
		"a slot with id 0":               func(g *rig) error { return g.m.SetSlots(g.m.Service(1).Cluster.First, []uint32{0}) },
		"a slot with an id out of range": func(g *rig) error { return g.m.SetSlots(g.m.Service(1).Cluster.First, []uint32{1 << 30}) },
		"a removed backend in use": func(g *rig) error {
			return g.m.SetBackendLife(1, maps.BackendLife{Generation: 3, State: maps.BackendRemoved, Port: 6443})
		},
	} {
		for _, hold := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, hold %t", what, hold), func(t *testing.T) {
				g := testRig(t, small)
				desired := mustParse(t, before)
				g.desire(desired)
				g.mustApply(t)
				g.m.Fault = nil // there is no order to check in what follows
				if err := damage(g); err != nil {
					t.Fatal(err)
				}
				g.setHold(hold)
				if err := g.restart(); err != nil {
					t.Fatal(err)
				}
				g.desire(desired)
				g.mustApply(t)
				g.setHold(false)
				g.mustApply(t)
				g.wantDump(t, desired)
			})
		}
	}
}

// The whole against a model: random services come, change and go, writes fail, agents die, restart and hold.
func TestRandom(t *testing.T) {
	rounds, steps := 10, 40
	if testing.Short() {
		rounds = 3
	}
	for seed := range uint64(rounds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			g := testRig(t, maps.Sizes{Frontends: 128, Services: 16, Slots: 1 << 15, Backends: 128, Flows: 16})
			failing := false
			g.fault = func(string) error {
				if failing && rnd.IntN(10) == 0 {
					if rnd.IntN(10) == 0 {
						panic(errDied)
					}
					return errFault
				}
				return nil
			}
			var kept held
			flows := fakeFlows{}
			restart := func(hold bool) {
				g.hold = hold
				if err := g.restart(); err != nil {
					t.Fatal(err)
				}
				kept = heldOf(t, g)
				flows.sweeping = nil
			}
			desired := map[lb.ServiceName]lb.Service{}
			for range steps {
				failing = rnd.IntN(2) == 0
				switch rnd.IntN(10) {
				case 0:
					restart(rnd.IntN(2) == 0)
				case 1:
					g.setHold(false)
				}
				desired = randomChange(rnd, desired)
				told := desired
				if g.hold && rnd.IntN(3) > 0 { // not all is known yet
					told = map[lb.ServiceName]lb.Service{}
					for name, svc := range desired {
						if rnd.IntN(2) == 0 {
							told[name] = svc
						}
					}
				}
				kept.confirm(g.desired, told)
				g.desire(told)
				randomHost(t, rnd, g)
				err := func() (err error) {
					defer func() {
						if v := recover(); v != nil {
							if v != errDied {
								panic(v)
							}
							restart(g.hold)
						}
					}()
					return g.apply()
				}()
				flows.check(t, g)
				flows.step(rnd, g)
				if g.hold {
					kept.check(t, g)
				} else {
					kept = held{}
				}
				if err == nil && !failing && !g.hold && len(flows.of) == 0 && flows.sweeping == nil {
					g.wantDump(t, told)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			failing = false
			g.setHold(false)
			g.desire(desired)
			g.mustApply(t)
			flows.check(t, g)
			g.wantDump(t, desired)
			if p := g.r.Stats(); p.Pending != 0 || p.Services != len(desired) {
				t.Errorf("in the end: %+v", p)
			}

			fresh := testRig(t, g.m.Sizes())
			fresh.m.Fault = nil
			fresh.desire(desired)
			fresh.setForeign(g.foreign)
			fresh.setHost(g.host)
			if err := fresh.setPrefixes(g.prefixes); err != nil {
				t.Fatal(err)
			}
			fresh.mustApply(t)
			if diff := cmp.Diff(fresh.dump(), g.dump()); diff != "" {
				t.Errorf("another agent would have made other maps (-fresh +these):\n%s", diff)
			}
		})
	}
}

// Where there is never room for all, packets meet nothing wrong either, and nothing is lost for ever: once
// everything went, what fits into new maps fits into these.
func TestRandomFull(t *testing.T) {
	sizes := maps.Sizes{Frontends: 14, Services: 5, Slots: 12, Backends: 12, Flows: 16}
	full := 0
	for seed := range uint64(5) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		g := testRig(t, sizes)
		failing := true
		g.fault = func(string) error {
			if failing && rnd.IntN(20) == 0 {
				return errFault
			}
			return nil
		}
		desired := map[lb.ServiceName]lb.Service{}
		for range 50 {
			desired = randomChange(rnd, desired)
			g.desire(desired)
			if err := g.apply(); err != nil && strings.Contains(err.Error(), "(--max-") {
				full++
			}
			if rnd.IntN(2) == 0 {
				g.r.BeginSweep()
				g.r.EndSweep(func(uint32) bool { return false })
			}
		}
		failing = false
		g.desire(nil)
		g.mustApply(t)
		g.wantDump(t, nil)
		for {
			if desired = randomChange(rnd, desired); testFits(t, sizes, desired) {
				break
			}
		}
		g.desire(desired)
		g.mustApply(t)
		g.wantDump(t, desired)
	}
	if full < 25 {
		t.Errorf("there was no room only %d times", full)
	}
}

func testFits(t *testing.T, sizes maps.Sizes, desired map[lb.ServiceName]lb.Service) bool {
	fresh := testRig(t, sizes)
	fresh.desire(desired)
	return fresh.apply() == nil
}

// fakeFlows are flows of backends that were active once.
type fakeFlows struct {
	of       map[uint32]maps.Backend
	sweeping map[uint32]bool // what a sweep that has begun will meet; nil: none has
}

// step ends some flows and begins others, and sweeps.
func (f *fakeFlows) step(rnd *rand.Rand, g *rig) {
	before := maps2.Clone(f.of)
	f.of = map[uint32]maps.Backend{}
	if rnd.IntN(4) > 0 {
		for id, b := range before {
			if rnd.IntN(3) > 0 {
				f.of[id] = b
			}
		}
		for id, b := range g.m.EachBackend() {
			if b.Life.State == maps.BackendActive && rnd.IntN(4) == 0 {
				f.of[id] = b
			}
		}
	}
	switch {
	case rnd.IntN(2) == 0:
	case f.sweeping == nil:
		g.r.BeginSweep()
		f.sweeping = map[uint32]bool{}
		for id := range f.of {
			f.sweeping[id] = true
		}
	default:
		// Flows that began meanwhile may have been missed.
		g.r.EndSweep(func(id uint32) bool { return f.sweeping[id] })
		f.sweeping = nil
	}
}

// check: a backend with a flow keeps its id, its address and its identity.
func (f *fakeFlows) check(t *testing.T, g *rig) {
	t.Helper()
	c, err := read(g.m)
	if err != nil {
		t.Fatal(err)
	}
	for id, was := range f.of {
		is, there := c.backends[id]
		if !there || is.VIP() != was.VIP() {
			t.Errorf("backend %d was %s, and is %s, there %v, though a flow names it", id, was.VIP(), is.VIP(), there)
		}
		_, there = c.frontends[is.VIP()]
		_, due := g.r.direct[is.VIP()] // it could not be written yet
		if !there && !due && is.Life.State == maps.BackendRemoved {
			t.Errorf("backend %d, %s, has a flow and no identity", id, is.VIP())
		}
	}
}

// held is what a restart found, and must stay while it is held.
type held struct {
	frontends map[lb.VIP]lb.ServiceName
	chosen    map[string]lb.ServiceName // backends in slots of the scope Cluster, "SERVICE ADDRESS"
}

func heldOf(t *testing.T, g *rig) held {
	c, err := read(g.m)
	if err != nil {
		t.Fatal(err)
	}
	h := held{map[lb.VIP]lb.ServiceName{}, map[string]lb.ServiceName{}}
	for vip, f := range c.frontends {
		if name, ok := c.names[f.Service]; ok {
			h.frontends[vip] = name
		}
	}
	for of, ids := range c.slots {
		for _, b := range ids {
			if of.scope == balance.Local {
				continue // the policy that needs them may go though the backend is held
			}
			h.chosen[c.names[of.service].String()+" "+c.backends[b].Addr().String()] = c.names[of.service]
		}
	}
	return h
}

// confirm gives up what follows what is desired from now on.
func (h held) confirm(before, now map[lb.ServiceName]lb.Service) {
	for name := range before {
		if _, ok := now[name]; !ok {
			for vip, owner := range h.frontends {
				if owner == name {
					delete(h.frontends, vip)
				}
			}
			for b, owner := range h.chosen {
				if owner == name {
					delete(h.chosen, b)
				}
			}
		}
	}
	for name, svc := range now {
		for _, f := range svc.Frontends {
			delete(h.frontends, f.VIP)
		}
		for _, b := range svc.Backends {
			delete(h.chosen, name.String()+" "+b.Addr.String())
		}
	}
}

func (h held) check(t *testing.T, g *rig) {
	t.Helper()
	is := heldOf(t, g)
	for vip, name := range h.frontends {
		if is.frontends[vip] != name {
			t.Errorf("frontend %s was held by %s, and leads to %q", vip, name, is.frontends[vip])
		}
	}
	for b := range h.chosen {
		if _, ok := is.chosen[b]; !ok {
			t.Errorf("backend %s was held, and is not chosen", b)
		}
	}
}

// randomChange returns services of which some differ from those before; no two have one VIP.
func randomChange(rnd *rand.Rand, before map[lb.ServiceName]lb.Service) map[lb.ServiceName]lb.Service {
	names := make([]lb.ServiceName, 6)
	for i := range names {
		names[i] = lb.ServiceName{Namespace: "default", Name: fmt.Sprint("s", i), Protocol: lb.TCP, Family: lb.IPv4}
	}
	after := map[lb.ServiceName]lb.Service{}
	taken := map[lb.VIP]bool{}
	for _, i := range rnd.Perm(len(names)) {
		name := names[i]
		svc, ok := before[name]
		switch rnd.IntN(8) {
		case 0:
			continue // goes
		case 1, 2, 3:
			svc, ok = randomService(rnd, name), true
		}
		if !ok {
			continue
		}
		svc.Frontends = slices.DeleteFunc(slices.Clone(svc.Frontends), func(f lb.Frontend) bool { return taken[f.VIP] })
		for _, f := range svc.Frontends {
			taken[f.VIP] = true
		}
		after[name] = svc
	}
	return after
}

func randomService(rnd *rand.Rand, name lb.ServiceName) lb.Service {
	svc := lb.Service{Name: name}
	for i := range 8 {
		if rnd.IntN(3) == 0 {
			addr := netip.AddrFrom4([4]byte{10, 96, 0, byte(i / 2)})
			svc.Frontends = append(svc.Frontends, lb.Frontend{
				VIP:  lb.VIP{Addr: addr, Port: uint16(80 + i%2), Protocol: lb.TCP},
				Kind: []lb.Kind{lb.ClusterIP, lb.NodePort, lb.LoadBalancer, lb.External}[rnd.IntN(4)],
			})
		}
	}
	// A frontend where backends are, as a hostPort of a pod of the host's own network has.
	if rnd.IntN(3) == 0 {
		addr := netip.AddrFrom4([4]byte{10, 0, '0' + byte(rnd.IntN(6)), byte(rnd.IntN(5))})
		svc.Frontends = append(svc.Frontends, lb.Frontend{VIP: lb.VIP{Addr: addr, Port: 80, Protocol: lb.TCP}, Kind: lb.HostPort})
		slices.SortFunc(svc.Frontends, func(a, b lb.Frontend) int { return a.VIP.Compare(b.VIP) })
	}
	for i := range 5 {
		if rnd.IntN(2) == 0 {
			svc.Backends = append(svc.Backends, lb.Backend{
				Addr:    netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, name.Name[1], byte(i)}), 80),
				Cluster: rnd.IntN(3) > 0, Local: rnd.IntN(3) == 0,
				Weight: []uint16{0, 1, 1, 1, 2, 3}[rnd.IntN(6)],
			})
		}
	}
	if rnd.IntN(8) == 0 {
		svc.Algorithm = lb.Maglev
	}
	svc.InternalLocal, svc.ExternalLocal = rnd.IntN(4) == 0, rnd.IntN(3) == 0
	svc.Affinity = []time.Duration{0, 60 * time.Second, 10800 * time.Second}[rnd.IntN(3)]
	if rnd.IntN(2) == 0 {
		svc.SourceRanges = []netip.Prefix{}
		for _, p := range []string{"192.0.2.0/24", "198.51.100.0/24", "198.51.100.0/25", "203.0.113.0/24"} {
			if rnd.IntN(2) == 0 {
				svc.SourceRanges = append(svc.SourceRanges, netip.MustParsePrefix(p))
			}
		}
	}
	return svc
}

// randomHost tells an agent of other foreign VIPs, host addresses and prefixes, now and then.
func randomHost(t *testing.T, rnd *rand.Rand, g *rig) {
	t.Helper()
	some := func() []netip.Addr { // among them ClusterIPs of randomService
		var all []netip.Addr
		for i := range 6 {
			if rnd.IntN(4) == 0 {
				all = append(all, netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}))
			}
		}
		return all
	}
	switch rnd.IntN(6) {
	case 0:
		foreign := map[netip.Addr]bool{}
		for _, addr := range some() {
			foreign[addr] = true
		}
		g.setForeign(foreign)
	case 1:
		g.setHost(some())
	case 2:
		var all []netip.Prefix
		for _, p := range []string{"10.96.0.0/31", "10.96.0.0/12", "10.96.0.2/32"} {
			if rnd.IntN(2) == 0 {
				all = append(all, netip.MustParsePrefix(p))
			}
		}
		slices.SortFunc(all, netip.Prefix.Compare)
		if err := g.setPrefixes(all); err != nil {
			t.Fatal(err)
		}
	}
}

// What did not change costs no write, however much of it there is.
func TestUnaffectedServicesAreNotWritten(t *testing.T) {
	g := testRig(t, small)
	g.desire(mustParse(t, before))
	g.mustApply(t)
	desired := mustParse(t, strings.Replace(before, "backend 10.0.3.1:6443 active", "backend 10.0.3.2:6443 active", 1))
	g.desire(desired)
	g.mustApply(t)
	// the new backend (address, then life), its slot, the switch, the end of the old one, the new one's identity
	if want := []string{"backends", "backends", "slots", "services", "grace", "backends", "frontends"}; !slices.Equal(g.trace, want) {
		t.Errorf("writes %q, want %q", g.trace, want)
	}
	g.r.Set(desired, []lb.ServiceName{{Name: "never there"}})
	g.mustApply(t)
	if len(g.trace) > 0 {
		t.Errorf("the same again is written: %q", g.trace)
	}
}

// The kernel's grace period, and the numbers.
func TestStats(t *testing.T) {
	g := testRig(t, small)
	g.r.grace = maps.Grace
	g.desire(mustParse(t, before))
	// six services and the prefixes
	if got, want := g.r.Stats(), (Stats{Pending: 7}); got != want {
		t.Errorf("before Apply %+v, want %+v", got, want)
	}
	g.mustApply(t)
	if got, want := g.r.Stats(), (Stats{Services: 6, Frontends: 19, Identities: 12, Backends: 12}); got != want {
		t.Errorf("after Apply %+v, want %+v", got, want)
	}
	g.desire(nil)
	g.mustApply(t)
	if got, want := g.r.Stats(), (Stats{Identities: 12, Removed: 12}); got != want {
		t.Errorf("nothing desired %+v, want %+v", got, want)
	}
	g.sweep(t)
	if got, want := g.r.Stats(), (Stats{}); got != want {
		t.Errorf("in the end %+v, want %+v", got, want)
	}
}

// What was counted for an id is not its next owner's, and stays while it has the same.
func TestStatsOfAnID(t *testing.T) {
	g := testRig(t, maps.Sizes{Frontends: 8, Services: 2, Slots: 8, Backends: 2, Flows: 8})
	count := func() {
		t.Helper()
		for name, value := range map[string]any{"service_stats": maps.ServiceStats{Flows: 7}, "backend_stats": maps.BackendStats{Flows: 7}} {
			if err := g.m.All()[name].Put(uint32(1), value); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(what string, service, backend uint64) {
		t.Helper()
		if s, b := g.m.ServiceStats(1).Flows, g.m.BackendStats(1).Flows; s != service || b != backend {
			t.Errorf("%s: %d flows of the service, %d of the backend, want %d and %d", what, s, b, service, backend)
		}
	}
	one := "default/one/TCP IPv4\n  backend 10.0.0.1:80 active\n"
	g.desire(mustParse(t, one))
	g.mustApply(t)
	count()
	g.desire(mustParse(t, "default/one/TCP IPv4\n"))
	g.mustApply(t)
	want("the backend is removed", 7, 7)
	g.desire(mustParse(t, one))
	g.mustApply(t)
	want("it comes back", 7, 7)
	g.desire(mustParse(t, "default/one/TCP IPv4\n"))
	g.mustApply(t)
	g.sweep(t)
	g.desire(mustParse(t, "default/one/TCP IPv4\n  backend 10.0.0.2:80 active\n"))
	g.mustApply(t)
	want("another backend", 7, 0)
	g.desire(nil)
	g.mustApply(t)
	g.desire(mustParse(t, "default/two/TCP IPv4\n"))
	g.mustApply(t)
	want("another service", 0, 0)
}

// A service that needs more source ranges than there is room for stays what it was, until others leave room.
func TestSourceRangesFull(t *testing.T) {
	g := testRig(t, small)
	if g.r.maxRanges != 65536 {
		t.Errorf("room for %d source ranges", g.r.maxRanges)
	}
	g.r.maxRanges = 3
	const was = "default/a/TCP IPv4\n  frontend 198.51.100.1:80/TCP LoadBalancer\n  sources 10.0.0.0/8\ndefault/b/TCP IPv4\n  sources 10.0.0.0/8\n"
	g.desire(mustParse(t, was))
	g.mustApply(t)
	more := strings.Replace(was, "sources 10.0.0.0/8", "sources 192.0.2.0/25 192.0.2.128/25\n  policy internal-local", 1)
	g.desire(mustParse(t, more))
	if err := g.apply(); err == nil || !strings.Contains(err.Error(), "service default/a/TCP IPv4: 2 more source ranges, and 1 of 3 are free") {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff(g.expected(mustParse(t, was)), g.dump()); diff != "" {
		t.Errorf("it is not what it was (-was +maps):\n%s", diff)
	}
	less := strings.Replace(more, "default/b/TCP IPv4\n  sources 10.0.0.0/8\n", "", 1)
	g.desire(mustParse(t, less))
	if g.apply() == nil { // what leaves room does so after the grace period
		t.Error("there was room for 4")
	}
	g.mustApply(t)
	g.wantDump(t, mustParse(t, less))
}

// More prefixes than the map has room for are refused, and those from before stay.
func TestPrefixesFull(t *testing.T) {
	g := testRig(t, small)
	g.mustApply(t)
	var many []netip.Prefix
	for i := range maps.MaxServicePrefixes + 1 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16))
	}
	if err := g.r.SetPrefixes(many); err == nil || err.Error() != "17 service prefixes are more than 16" {
		t.Errorf("error %v", err)
	}
	if err := g.r.SetPrefixes(append(many[:16], netip.MustParsePrefix("10.3.9.9/16"))); err != nil { // one is there already
		t.Error(err)
	}
	g.mustApply(t)
	if got, _ := g.m.ServicePrefixes(); !slices.Equal(got, many[:16]) {
		t.Errorf("prefixes %v", got)
	}
}

// A name that no map can hold fails alone.
func TestNameTooLong(t *testing.T) {
	g := testRig(t, small)
	desired := mustParse(t, before+"default/"+strings.Repeat("x", 256)+"/TCP IPv4\n  frontend 10.96.0.9:80/TCP ClusterIP\n")
	g.desire(desired)
	err := g.apply()
	if err == nil || !strings.Contains(err.Error(), "longer than 255 bytes") {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff(g.expected(mustParse(t, before)), g.dump()); diff != "" {
		t.Errorf("the rest is not what is desired (-desired +maps):\n%s", diff)
	}
}

func TestSlotAllocator(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		size := uint32(100 + rnd.IntN(100))
		a := newSlotAllocator(size)
		var live []maps.SlotRange
		owner := make([]int, size)
		for i := 1; i <= 500; i++ {
			if len(live) > 0 && rnd.IntN(2) == 0 {
				at := rnd.IntN(len(live))
				for s := range live[at].Count {
					owner[live[at].First+s] = 0
				}
				a.release(live[at])
				live = slices.Delete(live, at, at+1)
				continue
			}
			r, ok := a.alloc(uint32(1 + rnd.IntN(20)))
			if !ok {
				continue
			}
			for s := range r.Count {
				if owner[r.First+s] != 0 {
					t.Fatalf("seed %d: slot %d is handed out twice", seed, r.First+s)
				}
				owner[r.First+s] = i
			}
			live = append(live, r)
		}
		// Another allocator learns the same from the ranges alone, in any order.
		b := newSlotAllocator(size)
		for _, i := range rnd.Perm(len(live)) {
			if !b.take(live[i]) {
				t.Fatalf("seed %d: %v cannot be taken", seed, live[i])
			}
			if b.take(live[i]) {
				t.Fatalf("seed %d: %v can be taken twice", seed, live[i])
			}
		}
		if len(a.at) != len(b.at) {
			t.Errorf("seed %d: %d free blocks, %d after a restart", seed, len(a.at), len(b.at))
		}
		for first, block := range a.at {
			if b.at[first].order != block.order {
				t.Errorf("seed %d: block %d differs after a restart", seed, first)
			}
		}
		for _, r := range live {
			a.release(r)
		}
		if want := newSlotAllocator(size); len(a.at) != len(want.at) {
			t.Errorf("seed %d: all is free in %d blocks, want %d", seed, len(a.at), len(want.at))
		}
	}
}

func TestSlotRangesThatCannotBeTaken(t *testing.T) {
	a := newSlotAllocator(48) // 32 and 16
	for _, r := range []maps.SlotRange{{First: 0, Count: 0}, {First: 1, Count: 2}, {First: 0, Count: 33}, {First: 48, Count: 1}, {First: 32, Count: 17}, {First: 0, Count: 1<<32 - 1}} {
		if a.take(r) {
			t.Errorf("%v was taken", r)
		}
	}
	if _, ok := a.alloc(33); ok {
		t.Error("33 slots from a block of 32")
	}
}

func TestIDQueue(t *testing.T) {
	q := newIDQueue(5)
	for id := range uint32(4) {
		q.push(id + 1)
	}
	q.remove(2)
	q.remove(1)
	q.push(1)
	var got []uint32
	for q.length > 0 {
		got = append(got, q.oldest())
		q.remove(q.oldest())
	}
	if want := []uint32{3, 4, 1}; !slices.Equal(got, want) || q.oldest() != 0 {
		t.Errorf("ids %v, want %v, then 0", got, want)
	}
}

// One backend of one service changes, among 10,000 services of 4 backends.
func BenchmarkApply(b *testing.B) {
	needRoot(b)
	m, err := maps.New(maps.Sizes{Flows: 16})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	r, err := New(m, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	r.grace = func() error { return nil } // milliseconds, whatever there is to do
	all := map[lb.ServiceName]lb.Service{}
	service := func(i, change int) lb.Service {
		svc := lb.Service{
			Name:      lb.ServiceName{Namespace: "default", Name: fmt.Sprint("s", i), Protocol: lb.TCP, Family: lb.IPv4},
			Frontends: []lb.Frontend{{VIP: lb.VIP{Addr: netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), Port: 80, Protocol: lb.TCP}, Kind: lb.ClusterIP}},
		}
		for j := range 4 {
			svc.Backends = append(svc.Backends, lb.Backend{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)}), uint16(80+change%2)), Cluster: true, Weight: 1})
		}
		return svc
	}
	for i := range 10_000 {
		svc := service(i, 0)
		all[svc.Name] = svc
	}
	r.Set(all, nil)
	if err := r.Apply(); err != nil {
		b.Fatal(err)
	}
	change := 0
	for b.Loop() {
		change++
		svc := service(4711, change)
		r.Set(map[lb.ServiceName]lb.Service{svc.Name: svc}, nil)
		if err := r.Apply(); err != nil {
			b.Fatal(err)
		}
	}
}
