// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// Races between CPUs: real programs, on two CPUs at once, on the same flows. The letters are those of the
// scenarios that the rules of the flow tables were model-checked with.

// sent is a packet that a program was given, and what it made of it.
type sent struct {
	packet  testenv.Packet
	verdict uint32
	out     testenv.Packet
}

// cpu runs programs on one CPU.
type cpu struct {
	r    *rig
	sent []sent // of the flow at hand
}

func (c *cpu) run(program string, p testenv.Packet) sent {
	frame := p.Bytes()
	clear(frame[:6]) // the loopback device's address
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64)}
	verdict, err := c.r.programs[program].Run(&opts)
	if err != nil {
		panic(err)
	}
	s := sent{packet: p, verdict: verdict}
	if verdict == pass {
		if s.out, err = testenv.Parse(opts.DataOut); err != nil {
			panic(err)
		}
		if err := testenv.CheckSums(opts.DataOut); err != nil {
			c.r.t.Errorf("%s: %v", testenv.Describe(opts.DataOut), err)
		}
	}
	c.sent = append(c.sent, s)
	return s
}

// together runs what two CPUs do about each of n flows, beginning each at the same moment, and then check.
func together(t *testing.T, r *rig, n int, before func(i int), do [2]func(c *cpu, i int), check func(i int, sent []sent)) {
	t.Helper()
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	var cpus [2]*cpu
	var ready [2]atomic.Int64
	var goOn atomic.Int64
	var all sync.WaitGroup
	for side := range cpus {
		cpus[side] = &cpu{r: r}
		all.Go(func() {
			runtime.LockOSThread() // the thread ends with the goroutine, and its affinity with it
			var set unix.CPUSet
			set.Set(side)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				t.Error("pin a thread:", err)
			}
			for i := range n {
				for goOn.Load() <= int64(i) {
					runtime.Gosched()
				}
				ready[side].Store(int64(2*i + 1))
				for tries := 0; ready[1-side].Load() < int64(2*i+1); tries++ {
					if tries > 1000 {
						runtime.Gosched() // the other CPU is busy with something else
					}
				}
				do[side](cpus[side], i)
				ready[side].Store(int64(2*i + 2))
			}
		})
	}
	for i := range n {
		if before != nil {
			before(i)
		}
		goOn.Store(int64(i + 1))
		for ready[0].Load() < int64(2*i+2) || ready[1].Load() < int64(2*i+2) {
			runtime.Gosched()
		}
		check(i, append(append([]sent(nil), cpus[0].sent...), cpus[1].sent...))
		cpus[0].sent, cpus[1].sent = nil, nil
		if t.Failed() {
			goOn.Store(int64(n)) // let the others end
			for i := range n {
				ready[0].Store(int64(2*i + 2))
				ready[1].Store(int64(2*i + 2))
			}
			break
		}
	}
	all.Wait()
}

// pairsAreWhole reports every half of a living flow whose twin is missing or another's, but for reply halves
// whose flow has moved.
func (r *rig) pairsAreWhole() {
	r.t.Helper()
	now, err := maps.Now()
	r.must(err)
	halves := map[string]map[maps.Tuple]maps.Flow{"flows": {}, "pending": {}}
	for in, entries := range halves {
		var k maps.Tuple
		var f maps.Flow
		for i := r.maps.All()[in].Iterate(); i.Next(&k, &f); {
			if now-f.LastSeenNs < uint64(5*time.Second) && f.State&maps.FlowMoved == 0 {
				entries[k] = f
			}
		}
	}
	for in, entries := range halves {
		for k, f := range entries {
			twin, ok := halves["flows"][inverse(f.To)]
			if !ok {
				twin, ok = halves["pending"][inverse(f.To)]
			}
			if in == "pending" {
				if assured, there := halves["flows"][k]; there && assured.To != f.To {
					continue // the flow has moved since; this is left to expire
				}
			}
			if !ok {
				r.t.Errorf("%s: %s > %s has no twin", in, k.From(), k.To())
			} else if twin.To != inverse(k) {
				r.t.Errorf("%s: the twin of %s > %s is that of %s > %s", in, k.From(), k.To(), twin.To.From(), twin.To.To())
			}
		}
	}
}

func inverse(t maps.Tuple) maps.Tuple {
	t.Source, t.Destination = t.Destination, t.Source
	t.SourcePort, t.DestinationPort = t.DestinationPort, t.SourcePort
	return t
}

// oneFlow reports packets of one client tuple that did not become the same.
func oneFlow(t *testing.T, all []sent, mayRemap bool) {
	t.Helper()
	became := map[[2]netip.AddrPort]testenv.Packet{}
	for _, s := range all {
		if s.verdict != pass || s.packet.Destination.Port() != 80 {
			continue // dropped, or a reply
		}
		key := [2]netip.AddrPort{s.packet.Source, s.packet.Destination}
		first, ok := became[key]
		if !ok {
			became[key] = s.out
		} else if first.Source != s.out.Source || first.Destination != s.out.Destination {
			t.Errorf("%v > %v became %v > %v and %v > %v", s.packet.Source, s.packet.Destination, first.Source, first.Destination, s.out.Source, s.out.Destination)
		}
		if !mayRemap && s.out.Source != s.packet.Source {
			t.Errorf("%v > %v is seen as %v without need", s.packet.Source, s.packet.Destination, s.out.Source)
		}
		if s.out.Destination == s.packet.Destination {
			t.Errorf("%v > %v was not translated", s.packet.Source, s.packet.Destination)
		}
	}
	seen := map[[2]netip.AddrPort]testenv.Packet{}
	for key, out := range became {
		at := [2]netip.AddrPort{out.Source, out.Destination}
		if _, twice := seen[at]; twice {
			t.Errorf("two flows are both %v > %v, one of them %v > %v", at[0], at[1], key[0], key[1])
		}
		seen[at] = out
	}
}

const races = 3000

func TestRaces(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: races need many tries, at speed")
	}
	f := families[0]
	backendN := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 2, byte(i)}), 8080)
	}
	// Each flow has a client of its own, so that no other is remapped to its port.
	client := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 40000)
	}
	// A service of eight backends whose table is another half of them every time it is asked.
	flipping := func(r *rig) func() {
		for id := range uint32(8) {
			r.backend(id+1, 1, backendN(int(id)), maps.BackendActive, 1)
		}
		r.must(r.maps.SetSlots(64, []uint32{1, 2, 3, 4}))
		r.must(r.maps.SetSlots(128, []uint32{5, 6, 7, 8}))
		r.frontend(f.vip, 1)
		other := false
		return func() {
			other = !other
			first := uint32(64)
			if other {
				first = 128
			}
			r.must(r.maps.SetServiceCluster(1, maps.SlotRange{First: first, Count: 4}))
		}
	}
	syn := func(i int) testenv.Packet {
		p := testenv.SegmentTCP(client(i), f.vip, testenv.SYN)
		p.Seq = 1000
		return p
	}
	ack := func(i int) testenv.Packet {
		p := testenv.SegmentTCP(client(i), f.vip, testenv.ACK)
		p.Seq, p.Ack = 1001, 5001
		return p
	}
	synAck := func(to testenv.Packet) testenv.Packet {
		p := testenv.SegmentTCP(to.Destination, to.Source, testenv.SYN|testenv.ACK)
		p.Seq, p.Ack = 5000, 1001
		return p
	}
	busy := func(r *rig) uint64 {
		counts, err := r.maps.Reasons()
		r.must(err)
		return counts["lock_busy"]
	}
	end := func(t *testing.T, r *rig, before uint64) {
		t.Helper()
		r.pairsAreWhole()
		t.Logf("%d flows, a lock was busy %d times", races, busy(r)-before)
	}

	// The same SYN on both CPUs, the answer crossing the second, both CPUs carrying what follows; the table
	// flips meanwhile.
	t.Run("a, h", func(t *testing.T) {
		r := newRig(t)
		flip := flipping(r)
		flip()
		was := busy(r)
		var made atomic.Pointer[testenv.Packet]
		together(t, r, races, func(int) { made.Store(nil) }, [2]func(*cpu, int){
			func(c *cpu, i int) {
				s := c.run("node_in", syn(i))
				if s.verdict == pass {
					made.Store(&s.out)
				}
				c.run("node_in", syn(i))
				c.run("node_in", ack(i))
			},
			func(c *cpu, i int) {
				flip()
				c.run("node_in", syn(i))
				for range 1000 {
					if out := made.Load(); out != nil {
						c.run("node_out", synAck(*out))
						break
					}
				}
				c.run("node_in", ack(i))
				c.run("node_in", ack(i))
			},
		}, func(i int, all []sent) {
			oneFlow(t, all, false)
			// Whatever came too late or found the lock busy comes again.
			c := &cpu{r: r}
			if again := c.run("node_in", syn(i)); again.verdict == pass {
				c.run("node_out", synAck(again.out))
				c.run("node_in", ack(i))
			}
			oneFlow(t, append(all, c.sent...), false)
		})
		assured := 0
		r.must(r.maps.EachFlow(func(_ maps.Tuple, _ maps.Flow, in bool) bool {
			if in {
				assured++
			}
			return true
		}))
		if assured != 2*races {
			t.Errorf("%d halves are assured, of %d flows", assured, races)
		}
		end(t, r, was)
	})

	// Two services with one endpoint, or a service and the endpoint itself, from one client port.
	for name, protocol := range map[string]uint8{"b, TCP": testenv.TCP, "b, UDP": testenv.UDP, "i, TCP": testenv.TCP} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			r.backend(2, 2, f.backend, maps.BackendActive, 1)
			r.slots(2, 2)
			r.frontend(f.vip2, 2)
			for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
				r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: f.backend.Addr(), Port: f.backend.Port(), Protocol: p}), maps.FrontendOf(0, lb.Identity)))
			}
			first := func(i int, to netip.AddrPort) testenv.Packet {
				p := testenv.SegmentTCP(client(i), to, testenv.SYN)
				p.Protocol = protocol
				return p
			}
			was := busy(r)
			direct := name[0] == 'i'
			together(t, r, races, nil, [2]func(*cpu, int){
				func(c *cpu, i int) {
					c.run("node_in", first(i, f.vip))
					c.run("node_in", first(i, f.vip))
				},
				func(c *cpu, i int) {
					c.run("node_in", first(i, f.vip2))
					if direct {
						c.run("node_in", first(i, f.backend))
					}
					c.run("node_in", first(i, f.vip2))
				},
			}, func(i int, all []sent) {
				oneFlow(t, all, true)
				// The direct one too is told from both.
				ports := map[netip.AddrPort]netip.AddrPort{}
				for _, s := range all {
					if s.verdict == pass {
						if to, taken := ports[s.out.Source]; taken && to != s.packet.Destination {
							t.Errorf("%v and %v are both seen as %v", to, s.packet.Destination, s.out.Source)
						}
						ports[s.out.Source] = s.packet.Destination
					}
				}
			})
			end(t, r, was)
		})
	}

	// As a, b: what is in the way has expired.
	t.Run("c, k", func(t *testing.T) {
		r := newRig(t)
		r.service(f)
		r.backend(2, 2, f.backend, maps.BackendActive, 1)
		r.slots(2, 2)
		r.frontend(f.vip2, 2)
		was := busy(r)
		now, err := maps.Now()
		r.must(err)
		old := now - uint64(time.Hour)
		pending := r.maps.All()["pending"]
		together(t, r, races, func(i int) {
			key, to := tuple(client(i), f.vip, lb.TCP), tuple(client(i), f.backend, lb.TCP)
			r.must(pending.Put(key, maps.Flow{To: to, Hook: 1, Role: 1, Backend: 1, Generation: 1, LastSeenNs: old}))
			r.must(pending.Put(inverse(to), maps.Flow{To: inverse(key), Hook: 2, Role: 2, Backend: 1, LastSeenNs: old}))
		}, [2]func(*cpu, int){
			func(c *cpu, i int) {
				c.run("node_in", syn(i))
				c.run("node_in", syn(i))
			},
			func(c *cpu, i int) {
				p := syn(i)
				p.Destination = f.vip2
				c.run("node_in", p)
				c.run("node_in", p)
			},
		}, func(i int, all []sent) { oneFlow(t, all, true) })
		end(t, r, was)
	})

	// Two pods that talk to each other through each other's Service from one fixed port.
	t.Run("d", func(t *testing.T) {
		r := newRig(t)
		was := busy(r)
		const port = 80 // the clients' and the services'
		pod := func(i, side int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(10 + side), byte(i % 250)}), port)
		}
		vip := func(side int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 1, byte(side)}), port)
		}
		for side := range 2 {
			r.frontend(vip(side), uint32(side+1))
		}
		say := func(c *cpu, i, from int) sent {
			return c.run("pod_in", testenv.DatagramUDP(pod(i, from), vip(1-from), "gossip"))
		}
		together(t, r, races, func(i int) {
			r.clearFlows()
			for side := range 2 {
				r.backend(uint32(side+1), uint32(side+1), pod(i, side), maps.BackendActive, uint32(i+1))
				r.slots(uint32(side+1), uint32(side+1))
				r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: pod(i, side).Addr(), Port: port, Protocol: lb.UDP}), maps.FrontendOf(0, lb.Identity)))
			}
		}, [2]func(*cpu, int){
			func(c *cpu, i int) { say(c, i, 0); say(c, i, 0) },
			func(c *cpu, i int) { say(c, i, 1); say(c, i, 1) },
		}, func(i int, all []sent) {
			for _, s := range all {
				if s.verdict != pass {
					continue
				}
				// What arrives is answered, and the answer comes back from the VIP.
				answer := testenv.DatagramUDP(s.out.Destination, s.out.Source, "answer")
				c := &cpu{r: r}
				in := c.run("pod_in", answer)
				out := c.run("pod_out", in.out)
				if out.verdict != pass || out.out.Source != s.packet.Destination || out.out.Destination != s.packet.Source {
					t.Errorf("%v > %v became %v > %v; its answer %v > %v", s.packet.Source, s.packet.Destination,
						s.out.Source, s.out.Destination, out.out.Source, out.out.Destination)
				}
			}
		})
		t.Logf("a lock was busy %d times", busy(r)-was)
	})

	// A connection that has ended, and a SYN from the same port on both CPUs while the table flips.
	t.Run("e, k", func(t *testing.T) {
		r := newRig(t)
		flip := flipping(r)
		flip()
		was := busy(r)
		together(t, r, races, func(i int) {
			c := &cpu{r: r}
			first := c.run("node_in", syn(i))
			c.run("node_out", synAck(first.out))
			c.run("node_in", ack(i))
			rst := ack(i)
			rst.TCPFlags = testenv.RST
			c.run("node_in", rst)
		}, [2]func(*cpu, int){
			func(c *cpu, i int) { c.run("node_in", syn(i)); c.run("node_in", syn(i)) },
			func(c *cpu, i int) { flip(); c.run("node_in", syn(i)); c.run("node_in", syn(i)) },
		}, func(i int, all []sent) { oneFlow(t, all, false) })
		end(t, r, was)
	})

	// A UDP flow of a backend that goes: datagrams on both CPUs find the next one, and agree.
	t.Run("f, k", func(t *testing.T) {
		r := newRig(t)
		r.frontend(f.vip, 1)
		was := busy(r)
		question := func(i int) testenv.Packet { return testenv.DatagramUDP(client(i), f.vip, "x") }
		generation := uint32(1)
		together(t, r, races, func(i int) {
			generation += 2
			r.backend(1, 1, f.backend, maps.BackendActive, generation)
			r.backend(2, 1, f.backend2, maps.BackendActive, generation)
			r.slots(1, 1)
			c := &cpu{r: r}
			c.run("node_in", question(i))
			c.run("node_out", testenv.DatagramUDP(f.backend, client(i), "y"))
			c.run("node_in", question(i))
			r.slots(1, 2)
			r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: generation + 1, State: maps.BackendRemoved, Port: 8080}))
		}, [2]func(*cpu, int){
			func(c *cpu, i int) { c.run("node_in", question(i)); c.run("node_in", question(i)) },
			func(c *cpu, i int) {
				c.run("node_in", question(i))
				late := c.run("node_out", testenv.DatagramUDP(f.backend, client(i), "late"))
				if late.verdict != pass || late.out.Source != f.vip {
					t.Errorf("an answer on its way came from %v", late.out.Source)
				}
				c.run("node_in", question(i))
			},
		}, func(i int, all []sent) {
			oneFlow(t, all, false)
			for _, s := range all {
				if s.packet.Destination == f.vip && s.verdict == pass && s.out.Destination != f.backend2 {
					t.Errorf("a datagram reached %v, which is gone", s.out.Destination)
				}
			}
		})
		end(t, r, was)
	})
}

// TestEndpointsFlip: a service's table is replaced as fast as one CPU can while the other looks it up. No packet
// reaches a backend of neither table, which would be another service's.
func TestEndpointsFlip(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: races need many tries, at speed")
	}
	r := newRig(t)
	f := families[0]
	at := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 3, byte(i)}), 8080)
	}
	// The two tables lie between those of other services, and have other lengths.
	for id := range 40 {
		service := uint32(9)
		if id >= 10 && id < 13 || id >= 20 && id < 27 {
			service = 1
		}
		r.backend(uint32(id+1), service, at(id), maps.BackendActive, 1)
		r.must(r.maps.SetSlots(uint32(id), []uint32{uint32(id + 1)}))
	}
	ranges := [2]maps.SlotRange{{First: 10, Count: 3}, {First: 20, Count: 7}}
	r.must(r.maps.SetServiceCluster(1, ranges[0]))
	r.frontend(f.vip, 1)
	var stop atomic.Bool
	var flips atomic.Int64
	var flipper sync.WaitGroup
	flipper.Go(func() {
		for !stop.Load() {
			r.maps.SetServiceCluster(1, ranges[flips.Add(1)%2])
		}
	})
	start, seen := time.Now(), map[netip.AddrPort]int{}
	c := &cpu{r: r}
	const packets = 30000
	for i := range packets {
		p := testenv.DatagramUDP(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 14), 7}), uint16(1024+i&0x3fff)), f.vip, "x")
		seen[c.run("node_in", p).out.Destination]++
		c.sent = nil
	}
	took := time.Since(start)
	stop.Store(true)
	flipper.Wait()
	for to, n := range seen {
		if last := int(to.Addr().As4()[3]); last < 10 || last >= 13 && last < 20 || last >= 27 {
			t.Errorf("%d packets reached %v", n, to)
		}
	}
	if len(seen) != 10 {
		t.Errorf("%d packets reached %d backends of 10", packets, len(seen))
	}
	rate := float64(flips.Load()) / took.Seconds()
	if rate < 10000 {
		t.Errorf("%.0f flips a second are too few to prove anything", rate)
	}
	t.Logf("%d packets, %.0f flips a second", packets, rate)
}
