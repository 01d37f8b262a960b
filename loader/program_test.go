// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// The program rung: real programs in the real verifier, one packet at a time by BPF_PROG_TEST_RUN.

const (
	pass = math.MaxUint32 // TC_ACT_UNSPEC
	drop = 2              // TC_ACT_SHOT
)

// family is one IP family's addresses, so that every test is written once.
type family struct {
	name                  string
	client, other         netip.AddrPort // other: of no service
	vip, vip2             netip.AddrPort
	backend, backend2     netip.AddrPort
	multicast, linkLocal  netip.Addr
	extensions, ipOptions bool
}

var families = []family{
	{
		name: "v4", client: ap("192.0.2.7:40000"), other: ap("198.51.100.9:80"),
		vip: ap("10.96.0.10:80"), vip2: ap("10.96.0.11:80"), backend: ap("10.244.1.5:8080"), backend2: ap("10.244.1.6:8080"),
		multicast: netip.MustParseAddr("224.0.0.251"), ipOptions: true,
	},
	{
		name: "v6", client: ap("[2001:db8::7]:40000"), other: ap("[2001:db8:9::9]:80"),
		vip: ap("[fd00:96::10]:80"), vip2: ap("[fd00:96::11]:80"), backend: ap("[fd00:244::5]:8080"), backend2: ap("[fd00:244::6]:8080"),
		multicast: netip.MustParseAddr("ff02::fb"), linkLocal: netip.MustParseAddr("fe80::1"), extensions: true,
	},
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// rig is a set of maps and programs of the test's own, attached to nothing.
type rig struct {
	t        *testing.T
	maps     *maps.Maps
	programs map[string]*ebpf.Program
}

func newRig(t *testing.T, timeouts loader.Timeouts) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads BPF programs")
	}
	m, err := maps.New(maps.Sizes{Frontends: 64, Services: 16, Slots: 1024, Backends: 256, Flows: 65536})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	l, err := loader.Load(m, loader.Config{Timeouts: timeouts})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { l.Close() })
	return &rig{t: t, maps: m, programs: l.Programs()}
}

// backend writes a backend of a service.
func (r *rig) backend(id, service uint32, a netip.AddrPort, state maps.BackendState, generation uint32) {
	r.must(r.maps.SetBackend(id, maps.Backend{
		Address: a.Addr().As16(), Service: service,
		Life: maps.BackendLife{Generation: generation, State: state, Port: a.Port()},
	}))
}

// slots gives a service a table of backends, in a place of its own.
func (r *rig) slots(service uint32, ids ...uint32) {
	first := service * 64
	r.must(r.maps.SetSlots(first, ids))
	r.must(r.maps.SetServiceCluster(service, maps.SlotRange{First: first, Count: uint32(len(ids))}))
}

// frontend leads a VIP to a service, for TCP and UDP, and says that the address is a ClusterIP.
func (r *rig) frontend(vip netip.AddrPort, service uint32) {
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
		r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: vip.Addr(), Port: vip.Port(), Protocol: p}),
			maps.FrontendOf(service, lb.ClusterIP)))
	}
	r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: vip.Addr()}), maps.FrontendOf(0, lb.Address)))
}

// service is the usual one: a VIP, service 1, and one backend, 1.
func (r *rig) service(f family) {
	r.backend(1, 1, f.backend, maps.BackendActive, 1)
	r.slots(1, 1)
	r.frontend(f.vip, 1)
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// result is what a program did with a frame.
type result struct {
	Verdict uint32
	Reason  string
	Frame   []byte
}

// runOnly runs a program on a frame, as if it had been sent to this host, and does not look at the counters.
func (r *rig) runOnly(program string, frame []byte) (verdict uint32, out []byte) {
	r.t.Helper()
	in := slices.Clone(frame)
	clear(in[:6]) // the loopback device's address
	opts := ebpf.RunOptions{Data: in, DataOut: make([]byte, len(in)+256)}
	verdict, err := r.programs[program].Run(&opts)
	if err != nil {
		r.t.Fatalf("run %s on %s: %v", program, testenv.Describe(frame), err)
	}
	copy(opts.DataOut[:6], frame[:6])
	return verdict, opts.DataOut
}

func (r *rig) run(program string, frame []byte) result {
	r.t.Helper()
	before, err := r.maps.Reasons()
	r.must(err)
	verdict, out := r.runOnly(program, frame)
	after, err := r.maps.Reasons()
	r.must(err)
	reason := "none counted"
	for name, n := range after {
		switch n - before[name] {
		case 0:
		case 1:
			if reason != "none counted" {
				r.t.Errorf("%s counted two reasons: %s and %s", program, reason, name)
			}
			reason = name
		default:
			r.t.Errorf("%s counted %s %d times", program, name, n-before[name])
		}
	}
	return result{verdict, reason, out}
}

// expect runs a program and compares all that it did.
func (r *rig) expect(program string, frame []byte, verdict uint32, reason string, out []byte) {
	r.t.Helper()
	got := r.run(program, frame)
	if got.Verdict != verdict || got.Reason != reason {
		r.t.Errorf("%s of %s: verdict %d, reason %s; want %d, %s", program, testenv.Describe(frame), int32(got.Verdict), got.Reason, int32(verdict), reason)
	}
	if verdict == drop {
		return
	}
	if !bytes.Equal(got.Frame, out) {
		r.t.Errorf("%s of %s:\n got %s\nwant %s\n%s", program, testenv.Describe(frame),
			testenv.Describe(got.Frame), testenv.Describe(out), cmp.Diff(out, got.Frame))
	}
}

// flow returns the entry of a tuple.
func (r *rig) flow(from, to netip.AddrPort, p lb.Protocol) (maps.Flow, bool) {
	r.t.Helper()
	var found maps.Flow
	ok := false
	r.must(r.maps.EachFlow(func(t maps.Tuple, f maps.Flow) bool {
		if t.From() == from && t.To() == to && lb.Protocol(t.Protocol) == p {
			found, ok = f, true
		}
		return true
	}))
	return found, ok
}

func with(p testenv.Packet, f func(*testenv.Packet)) testenv.Packet {
	f(&p)
	return p
}

// base are the packets that mutations start from.
func base(f family, to netip.AddrPort) map[string]testenv.Packet {
	tcp := testenv.SegmentTCP(f.client, to, testenv.SYN)
	tcp.Seq, tcp.TCPOptions, tcp.Payload = 1000, []byte{2, 4, 5, 0xb4}, []byte("hello")
	return map[string]testenv.Packet{"tcp": tcp, "udp": testenv.DatagramUDP(f.client, to, "hello")}
}

// mutation is one thing that is different from a valid packet, and what must come of it.
type mutation struct {
	name   string
	only   string                // "v4", "v6", "tcp", "udp": where it applies
	packet func(*testenv.Packet) // before the lengths and sums are computed
	bytes  func([]byte) []byte   // after
	// What becomes of it when it is sent to a VIP, and when it is sent elsewhere, where it always passes
	// untouched.
	vip, elsewhere string
}

func mutations() []mutation {
	at := func(change func(frame []byte, at testenv.Offsets)) func([]byte) []byte {
		return func(frame []byte) []byte {
			o, err := testenv.Locate(frame)
			if err != nil {
				panic(err)
			}
			change(frame, o)
			return frame
		}
	}
	cut := func(to func(testenv.Offsets) int) func([]byte) []byte {
		return func(frame []byte) []byte {
			o, err := testenv.Locate(frame)
			if err != nil {
				panic(err)
			}
			return frame[:to(o)]
		}
	}
	const translated, none = "new_flow", "no_service"
	ext := func(types ...uint8) func(*testenv.Packet) {
		return func(p *testenv.Packet) {
			for _, typ := range types {
				p.Extensions = append(p.Extensions, testenv.Extension{Type: typ, Body: []byte{0, 0}})
			}
		}
	}
	ms := []mutation{
		{name: "valid", vip: translated, elsewhere: none},
		{name: "no payload", packet: func(p *testenv.Packet) { p.Payload = nil }, vip: translated, elsewhere: none},
		{name: "odd payload", packet: func(p *testenv.Packet) { p.Payload = []byte("abcd") }, vip: translated, elsewhere: none},
		{name: "padded frame", bytes: func(b []byte) []byte { return append(b, 0, 0, 0, 0, 0, 0) }, vip: translated, elsewhere: none},
		{name: "hop limit 1", packet: func(p *testenv.Packet) { p.TTL = 1 }, vip: translated, elsewhere: none},
		{name: "traffic class", packet: func(p *testenv.Packet) { p.TOS = 0xb8 }, vip: translated, elsewhere: none},

		{name: "one VLAN tag", packet: func(p *testenv.Packet) { p.VLAN = []uint16{5} }, vip: translated, elsewhere: none},
		{name: "two VLAN tags", packet: func(p *testenv.Packet) { p.VLAN = []uint16{7, 5} }, vip: translated, elsewhere: none},
		{name: "three VLAN tags", packet: func(p *testenv.Packet) { p.VLAN = []uint16{9, 7, 5} }, vip: "not_ip", elsewhere: "not_ip"},
		{name: "cut in a VLAN tag", packet: func(p *testenv.Packet) { p.VLAN = []uint16{5} },
			bytes: func(b []byte) []byte { return b[:16] }, vip: "malformed", elsewhere: "malformed"},

		// Behind a tag: BPF_PROG_TEST_RUN itself refuses an IP ethertype without a whole header (6.18).
		{name: "cut behind Ethernet", packet: func(p *testenv.Packet) { p.VLAN = []uint16{5} },
			bytes: cut(func(o testenv.Offsets) int { return o.Network }), vip: "malformed", elsewhere: "malformed"},
		{name: "cut in the IP header", packet: func(p *testenv.Packet) { p.VLAN = []uint16{5} },
			bytes: cut(func(o testenv.Offsets) int { return o.Network + 19 }), vip: "malformed", elsewhere: "malformed"},
		{name: "cut behind the IP header", bytes: cut(func(o testenv.Offsets) int { return o.Transport }), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "cut in the L4 header", bytes: cut(func(o testenv.Offsets) int { return o.Transport + 7 }), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "cut in the payload", bytes: cut(func(o testenv.Offsets) int { return o.End - 1 }), vip: "vip_malformed", elsewhere: "malformed"},

		{name: "another ethertype", bytes: func(b []byte) []byte { b[12], b[13] = 0x88, 0xcc; return b }, vip: "not_ip", elsewhere: "not_ip"},
		{name: "IP version 5", bytes: at(func(b []byte, o testenv.Offsets) { b[o.Network] = 0x55 }), vip: "malformed", elsewhere: "malformed"},
		{name: "another protocol", packet: func(p *testenv.Packet) { p.Protocol = 47 }, vip: "vip_unsupported", elsewhere: "unsupported"},
		{name: "ESP", packet: func(p *testenv.Packet) { p.Protocol = unix.IPPROTO_ESP }, vip: "vip_unsupported", elsewhere: "unsupported"},
		{name: "authentication header", packet: func(p *testenv.Packet) { p.Protocol = unix.IPPROTO_AH }, vip: "vip_unsupported", elsewhere: "unsupported"},

		{name: "header length 4 words", only: "v4", bytes: at(func(b []byte, o testenv.Offsets) { b[o.Network] = 0x44 }), vip: "malformed", elsewhere: "malformed"},
		{name: "header longer than the packet", only: "v4", bytes: at(func(b []byte, o testenv.Offsets) {
			b[o.Network] = 0x4f
			binary.BigEndian.PutUint16(b[o.Network+2:], 40)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "total length of the header alone", only: "v4", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Network+2:], 20)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "total length 0", only: "v4", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Network+2:], 0)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "total length beyond the frame", only: "v4", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Network+2:], uint16(o.End-o.Network+1))
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "one word of options", only: "v4", packet: func(p *testenv.Packet) { p.IPOptions = []byte{1, 1, 1, 0} }, vip: translated, elsewhere: none},
		{name: "ten words of options", only: "v4", packet: func(p *testenv.Packet) { p.IPOptions = bytes.Repeat([]byte{1}, 40) }, vip: translated, elsewhere: none},
		{name: "cut in the options", only: "v4", packet: func(p *testenv.Packet) { p.IPOptions = bytes.Repeat([]byte{1}, 40) },
			bytes: cut(func(o testenv.Offsets) int { return o.Transport - 1 }), vip: "vip_malformed", elsewhere: "malformed"},

		{name: "payload length 0", only: "v6", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Network+4:], 0)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "payload length beyond the frame", only: "v6", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Network+4:], uint16(o.End-o.Network-40+1))
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "no next header", only: "v6", packet: func(p *testenv.Packet) { p.Protocol = unix.IPPROTO_NONE }, vip: "vip_unsupported", elsewhere: "unsupported"},
		{name: "long destination options", only: "v6", packet: func(p *testenv.Packet) {
			p.Extensions = []testenv.Extension{{Type: unix.IPPROTO_DSTOPTS, Body: make([]byte, 254)}}
		}, vip: translated, elsewhere: none},
		{name: "headers beyond the reach", only: "v6", packet: func(p *testenv.Packet) {
			e := testenv.Extension{Type: unix.IPPROTO_DSTOPTS, Body: make([]byte, 254)}
			p.Extensions = []testenv.Extension{e, e}
		}, vip: "vip_malformed", elsewhere: "malformed"},
		{name: "eight extension headers", only: "v6", packet: ext(60, 60, 60, 60, 60, 60, 60, 60), vip: translated, elsewhere: none},
		{name: "nine extension headers", only: "v6", packet: ext(60, 60, 60, 60, 60, 60, 60, 60, 60), vip: "vip_unsupported", elsewhere: "unsupported"},
		{name: "cut in an extension header", only: "v6", packet: ext(unix.IPPROTO_DSTOPTS),
			bytes: cut(func(o testenv.Offsets) int { return o.Transport - 1 }), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "extension header longer than the packet", only: "v6", packet: ext(unix.IPPROTO_DSTOPTS), bytes: at(func(b []byte, o testenv.Offsets) {
			b[o.Network+41] = 40
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "routing header with segments left", only: "v6", packet: func(p *testenv.Packet) {
			p.Extensions = []testenv.Extension{{Type: unix.IPPROTO_ROUTING, Body: []byte{4, 1, 0, 0, 0, 0}}}
		}, vip: "vip_unsupported", elsewhere: "unsupported"},
		{name: "first fragment", packet: func(p *testenv.Packet) {
			p.Fragment = &testenv.Fragment{ID: 9, More: true}
			p.Payload = []byte("8 octets")
		}, vip: "vip_fragment", elsewhere: "fragment"},
		{name: "middle fragment", packet: func(p *testenv.Packet) {
			p.Fragment = &testenv.Fragment{ID: 9, Offset: 16, More: true}
			p.Payload = []byte("8 octets")
		}, vip: "vip_fragment", elsewhere: "fragment"},
		{name: "last fragment", packet: func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 9, Offset: 16} }, vip: "vip_fragment", elsewhere: "fragment"},
		{name: "atomic fragment", only: "v6", packet: func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 9} }, vip: translated, elsewhere: none},

		{name: "data offset 4 words", only: "tcp", bytes: at(func(b []byte, o testenv.Offsets) { b[o.Transport+12] = 0x40 }), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "data offset beyond the packet", only: "tcp", bytes: at(func(b []byte, o testenv.Offsets) { b[o.Transport+12] = 0xf0 }), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "reset", only: "tcp", packet: func(p *testenv.Packet) { p.TCPFlags = testenv.RST }, vip: "stray_rst", elsewhere: none},
		{name: "in mid-stream", only: "tcp", packet: func(p *testenv.Packet) { p.TCPFlags = testenv.ACK }, vip: translated, elsewhere: none},
		{name: "wrong checksum", bytes: at(func(b []byte, o testenv.Offsets) { b[o.End-1] ^= 0xff }), vip: translated, elsewhere: none},
		{name: "UDP length 7", only: "udp", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Transport+4:], 7)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "UDP length 0", only: "udp", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Transport+4:], 0)
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "UDP length beyond the packet", only: "udp", bytes: at(func(b []byte, o testenv.Offsets) {
			binary.BigEndian.PutUint16(b[o.Transport+4:], uint16(o.End-o.Transport+1))
		}), vip: "vip_malformed", elsewhere: "malformed"},
		{name: "no UDP checksum", only: "udp", packet: func(p *testenv.Packet) { p.NoChecksum = true }, vip: translated, elsewhere: none},
	}
	// Every order of the extension headers that may stand before TCP and UDP.
	orders := permutations([]uint8{unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT})
	for _, order := range orders {
		ms = append(ms, mutation{name: fmt.Sprint("extension headers ", order), only: "v6", packet: func(p *testenv.Packet) {
			p.Fragment = &testenv.Fragment{ID: 9} // atomic
			ext(order...)(p)
		}, vip: translated, elsewhere: none})
	}
	return ms
}

func permutations(of []uint8) [][]uint8 {
	if len(of) == 0 {
		return [][]uint8{nil}
	}
	var all [][]uint8
	for i, first := range of {
		rest := append(slices.Clone(of[:i]), of[i+1:]...)
		for _, p := range permutations(rest) {
			all = append(all, append([]uint8{first}, p...))
		}
	}
	return all
}

// TestMutations sends single-field mutations of valid packets to a VIP and elsewhere.
func TestMutations(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		r.service(f)
		for _, m := range mutations() {
			for protocol := range base(f, f.vip) {
				if m.only != "" && m.only != f.name && m.only != protocol {
					continue
				}
				t.Run(f.name+"/"+protocol+"/"+m.name, func(t *testing.T) {
					r.t = t
					build := func(to netip.AddrPort) []byte {
						p := base(f, to)[protocol]
						if m.packet != nil {
							m.packet(&p)
						}
						b := p.Bytes()
						if m.bytes != nil {
							b = m.bytes(b)
						}
						return b
					}
					elsewhere := build(f.other)
					r.expect("node_in", elsewhere, pass, m.elsewhere, elsewhere)
					r.expect("pod_in", elsewhere, pass, m.elsewhere, elsewhere)

					r.clearFlows()
					frame := build(f.vip)
					switch {
					case m.vip == "new_flow":
						// The same packet, sent to the backend from the start, but for a wrong sum,
						// which stays as wrong as it was.
						r.expect("node_in", frame, pass, "new_flow", build(f.backend))
						r.expect("pod_in", frame, pass, "forward", build(f.backend))
					case m.vip == m.elsewhere:
						r.expect("node_in", frame, pass, m.vip, frame)
					default:
						r.expect("node_in", frame, drop, m.vip, nil)
						r.expect("pod_in", frame, drop, m.vip, nil)
					}
				})
			}
		}
	}
}

// clearFlows forgets every flow, so that a case begins anew.
func (r *rig) clearFlows() {
	flows := r.maps.All()["flows"]
	var keys []maps.Tuple
	r.must(r.maps.EachFlow(func(t maps.Tuple, _ maps.Flow) bool {
		keys = append(keys, t)
		return true
	}))
	for _, k := range keys {
		r.must(flows.Delete(k))
	}
}

// TestNotOurs: what is no service's passes byte for byte, whatever it is.
func TestNotOurs(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		r.service(f)
		arp := make([]byte, 60)
		arp[12], arp[13] = 0x08, 0x06
		r.expect("node_in", arp, pass, "not_ip", arp)
		for protocol, p := range base(f, netip.AddrPortFrom(f.multicast, 5353)) {
			b := p.Bytes()
			r.expect("node_in", b, pass, "multicast", b)
			for name, p := range map[string]testenv.Packet{
				"another port":                   base(f, netip.AddrPortFrom(f.vip.Addr(), 81))[protocol],
				"a backend's own address":        base(f, f.backend)[protocol],
				"the next address":               base(f, netip.AddrPortFrom(f.vip.Addr().Next().Next(), 80))[protocol],
				"from the VIP":                   with(base(f, f.client)[protocol], func(p *testenv.Packet) { p.Source = f.vip }),
				"from a backend without a flow":  with(base(f, f.client)[protocol], func(p *testenv.Packet) { p.Source = f.backend }),
				"to a VIP, but the other family": base(families[0], families[0].other)[protocol],
			} {
				b := p.Bytes()
				r.expect("node_in", b, pass, "no_service", b)
				r.expect("node_out", b, pass, "no_flow", b)
				if t.Failed() {
					t.Fatal(f.name, protocol, name)
				}
			}
		}
		if f.linkLocal.IsValid() {
			b := base(f, netip.AddrPortFrom(f.linkLocal, 80))["tcp"].Bytes()
			r.expect("node_in", b, pass, "multicast", b)
		}
		// Not to this host, by its MAC address.
		frame := base(f, f.vip)["tcp"].Bytes()
		opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame))}
		verdict, err := r.programs["node_in"].Run(&opts)
		r.must(err)
		if verdict != pass || !bytes.Equal(opts.DataOut, frame) {
			t.Errorf("a frame for another host: verdict %d, %s", verdict, testenv.Describe(opts.DataOut))
		}
	}
}

// TestMappedAddressOnTheWire: ::ffff:10.96.0.10 in an IPv6 packet is not 10.96.0.10.
func TestMappedAddressOnTheWire(t *testing.T) {
	r := newRig(t, loader.Timeouts{})
	v4, v6 := families[0], families[1]
	r.service(v4)
	mapped := func(a netip.AddrPort) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
	}
	for _, p := range []testenv.Packet{
		testenv.SegmentTCP(mapped(v4.client), mapped(v4.vip), testenv.SYN),
		testenv.DatagramUDP(mapped(v4.client), mapped(v4.vip), "x"),
	} {
		b := p.Bytes()
		r.expect("node_in", b, pass, "mapped_address", b)
		r.expect("node_out", b, pass, "mapped_address", b)
	}
	for _, mix := range [][2]netip.AddrPort{{v6.client, mapped(v4.vip)}, {mapped(v4.client), v6.vip}} {
		b := testenv.DatagramUDP(v6.client, v6.vip, "x").Bytes()
		copy(b[22:38], mix[0].Addr().AsSlice())
		copy(b[38:54], mix[1].Addr().AsSlice())
		if mix[0].Addr().Is4In6() {
			a := mix[0].Addr().As16()
			copy(b[22:38], a[:])
		}
		if mix[1].Addr().Is4In6() {
			a := mix[1].Addr().As16()
			copy(b[38:54], a[:])
		}
		r.expect("node_in", b, pass, "mapped_address", b)
	}
}

// TestReply: what comes back has the VIP as its source, at egress and nowhere else.
func TestReply(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		r.service(f)
		for protocol, p := range base(f, f.vip) {
			reply := func(from netip.AddrPort) []byte {
				q := base(f, f.client)[protocol]
				q.Source = from
				q.TCPFlags |= testenv.ACK
				return q.Bytes()
			}
			p.Protocol = map[string]uint8{"tcp": testenv.TCP, "udp": testenv.UDP}[protocol]
			out := p
			out.Destination = f.backend
			r.expect("pod_in", p.Bytes(), pass, "new_flow", out.Bytes())
			// Into the stack, on its way to the backend: nothing to do.
			r.expect("pod_out", out.Bytes(), pass, "no_flow", out.Bytes())
			// Back: not before the stack, but behind it.
			r.expect("pod_in", reply(f.backend), pass, "other_hook", reply(f.backend))
			r.expect("pod_out", reply(f.backend), pass, "reply", reply(f.vip))
			r.expect("node_out", reply(f.backend), pass, "reply", reply(f.vip))
			// The client's own tuple at egress: another hook.
			r.expect("node_out", p.Bytes(), pass, "other_hook", p.Bytes())
			// A first fragment of a reply cannot be followed by its others yet.
			fragment := base(f, f.client)[protocol]
			fragment.Source, fragment.Payload = f.backend, []byte("8 octets")
			fragment.Fragment = &testenv.Fragment{ID: 3, More: true}
			r.expect("pod_out", fragment.Bytes(), drop, "reply_fragment", nil)
			fragment.Fragment = &testenv.Fragment{ID: 3, Offset: 16}
			r.expect("pod_out", fragment.Bytes(), pass, "fragment", fragment.Bytes())
		}
	}
}

// TestEndpointsGone: what a service without endpoints does, and that nothing of it is remembered.
func TestNoBackend(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		r.frontend(f.vip, 1)
		for _, p := range base(f, f.vip) {
			r.expect("pod_in", p.Bytes(), drop, "no_backend", nil)
		}
		r.service(f)
		for _, p := range base(f, f.vip) {
			out := p
			out.Destination = f.backend
			r.expect("pod_in", p.Bytes(), pass, "new_flow", out.Bytes())
		}
	}
}

// TestGeneration: UDP packets and SYNs of a backend whose generation changed look again; other TCP goes on.
func TestGeneration(t *testing.T) {
	for _, f := range families {
		to := func(p testenv.Packet, a netip.AddrPort) []byte {
			p.Destination = a
			return p.Bytes()
		}
		udp := base(f, f.vip)["udp"]
		syn := base(f, f.vip)["tcp"]
		ack := with(syn, func(p *testenv.Packet) { p.TCPFlags = testenv.ACK })
		begin := func() *rig {
			r := newRig(t, loader.Timeouts{})
			r.service(f)
			r.backend(2, 1, f.backend2, maps.BackendActive, 1)
			r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend))
			r.expect("node_in", syn.Bytes(), pass, "new_flow", to(syn, f.backend))
			r.expect("node_in", ack.Bytes(), pass, "forward", to(ack, f.backend))
			return r
		}
		life := func(state maps.BackendState, generation uint32) maps.BackendLife {
			return maps.BackendLife{Generation: generation, State: state, Port: f.backend.Port()}
		}
		t.Run(f.name+"/removed", func(t *testing.T) {
			r := begin()
			r.slots(1, 2)
			r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend)) // until the generation says so
			r.must(r.maps.SetBackendLife(1, life(maps.BackendRemoved, 2)))
			r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
			r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend2))
			r.expect("node_in", ack.Bytes(), pass, "forward", to(ack, f.backend)) // an established connection goes on
			r.expect("node_in", syn.Bytes(), pass, "new_flow", to(syn, f.backend2))
			// The new flow's replies are translated, and those that were on their way.
			for _, b := range []netip.AddrPort{f.backend, f.backend2} {
				reply := testenv.DatagramUDP(b, f.client, "x")
				want := reply
				want.Source = f.vip
				r.expect("node_out", reply.Bytes(), pass, "reply", want.Bytes())
			}
		})
		t.Run(f.name+"/refreshed", func(t *testing.T) {
			r := begin()
			r.must(r.maps.SetBackendLife(1, life(maps.BackendActive, 2)))
			r.slots(1, 2) // what would be chosen now
			r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend))
			if flow, _ := r.flow(f.client, f.vip, lb.UDP); flow.Generation != 2 {
				t.Errorf("the flow's generation is %d, want 2", flow.Generation)
			}
		})
		t.Run(f.name+"/draining", func(t *testing.T) {
			r := begin()
			r.slots(1, 2)
			r.must(r.maps.SetBackendLife(1, life(maps.BackendDraining, 2)))
			r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend))
		})
		t.Run(f.name+"/id of another service", func(t *testing.T) {
			r := begin()
			r.slots(1, 2)
			r.backend(1, 7, f.backend, maps.BackendActive, 2) // the id is another's now, at the same address
			r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
			r.expect("node_in", ack.Bytes(), pass, "forward", to(ack, f.backend))
		})
		t.Run(f.name+"/id of another address", func(t *testing.T) {
			r := begin()
			r.slots(1, 2)
			r.backend(1, 1, f.other, maps.BackendActive, 2)
			r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
			r.expect("node_in", ack.Bytes(), pass, "forward", to(ack, f.backend))
		})
		t.Run(f.name+"/no endpoint left", func(t *testing.T) {
			r := begin()
			r.slots(1)
			r.must(r.maps.SetBackendLife(1, life(maps.BackendRemoved, 2)))
			r.expect("node_in", udp.Bytes(), drop, "no_backend", nil)
			r.slots(1, 2)
			r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2)) // nothing negative is remembered
		})
		t.Run(f.name+"/frontend removed", func(t *testing.T) {
			r := begin()
			for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
				r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr(), Port: f.vip.Port(), Protocol: p})))
			}
			r.must(r.maps.SetBackendLife(1, life(maps.BackendActive, 2)))
			r.expect("node_in", udp.Bytes(), pass, "no_service", udp.Bytes())
			r.expect("node_in", ack.Bytes(), pass, "forward", to(ack, f.backend))
		})
	}
}

// TestPortReuse: a SYN on a connection that has ended, or whose entry is past its timeout though still in the
// table, selects anew.
func TestPortReuse(t *testing.T) {
	short := loader.DefaultTimeouts()
	short.TCPEstablished = 50 * time.Millisecond
	for _, f := range families {
		syn := base(f, f.vip)["tcp"]
		flags := func(set uint8) testenv.Packet {
			return with(syn, func(p *testenv.Packet) { p.TCPFlags = set })
		}
		back := func(set uint8) []byte {
			p := testenv.SegmentTCP(f.backend, f.client, set)
			return p.Bytes()
		}
		for _, end := range []struct {
			name     string
			timeouts loader.Timeouts
			do       func(r *rig)
			anew     bool
		}{
			{"open", loader.Timeouts{}, func(r *rig) {}, false},
			{"RST of the client", loader.Timeouts{}, func(r *rig) { r.run("node_in", flags(testenv.RST).Bytes()) }, true},
			{"RST of the backend", loader.Timeouts{}, func(r *rig) { r.run("node_out", back(testenv.RST)) }, true},
			{"FIN of the client", loader.Timeouts{}, func(r *rig) { r.run("node_in", flags(testenv.FIN|testenv.ACK).Bytes()) }, false},
			{"FIN of the backend", loader.Timeouts{}, func(r *rig) { r.run("node_out", back(testenv.FIN|testenv.ACK)) }, false},
			{"FIN of both", loader.Timeouts{}, func(r *rig) {
				r.run("node_in", flags(testenv.FIN|testenv.ACK).Bytes())
				r.run("node_out", back(testenv.FIN|testenv.ACK))
			}, true},
			{"RST that was no end", loader.Timeouts{}, func(r *rig) {
				r.run("node_out", back(testenv.RST))
				r.run("node_out", back(testenv.ACK))
			}, false},
			{"past the timeout", short, func(r *rig) { time.Sleep(80 * time.Millisecond) }, true},
		} {
			t.Run(f.name+"/"+end.name, func(t *testing.T) {
				r := newRig(t, end.timeouts)
				r.service(f)
				r.backend(2, 1, f.backend2, maps.BackendActive, 1)
				first, second := syn, syn
				first.Destination, second.Destination = f.backend, f.backend2
				r.expect("node_in", syn.Bytes(), pass, "new_flow", first.Bytes())
				r.run("node_out", back(testenv.SYN|testenv.ACK))
				r.run("node_in", flags(testenv.ACK).Bytes())
				r.slots(1, 2) // what a new choice will be
				end.do(r)
				if _, there := r.flow(f.client, f.vip, lb.TCP); !there {
					t.Fatal("the old entry is gone; it should be in the way")
				}
				if end.anew {
					r.expect("node_in", syn.Bytes(), pass, "new_flow", second.Bytes())
				} else {
					r.expect("node_in", syn.Bytes(), pass, "forward", first.Bytes())
				}
			})
		}
	}
}

// TestTimeouts: how long an entry of each state lives, by what flow_timeout_ns says of it.
func TestTimeouts(t *testing.T) {
	f := families[0]
	const tick = 100 * time.Millisecond
	long := time.Hour
	for _, c := range []struct {
		name     string
		protocol string
		shorten  func(*loader.Timeouts)
		packets  func(r *rig, client, back func(flags uint8))
		dies     bool
	}{
		{"TCP without an answer", "tcp", func(t *loader.Timeouts) { t.TCPNew = tick }, func(r *rig, c, b func(uint8)) {}, true},
		{"TCP answered", "tcp", func(t *loader.Timeouts) { t.TCPNew = tick }, func(r *rig, c, b func(uint8)) { b(testenv.SYN | testenv.ACK) }, false},
		{"TCP half closed", "tcp", func(t *loader.Timeouts) { t.TCPHalfClosed = tick }, func(r *rig, c, b func(uint8)) {
			b(testenv.SYN | testenv.ACK)
			b(testenv.FIN | testenv.ACK)
		}, true},
		{"TCP closed", "tcp", func(t *loader.Timeouts) { t.TCPClosed = tick }, func(r *rig, c, b func(uint8)) {
			b(testenv.SYN | testenv.ACK)
			b(testenv.FIN | testenv.ACK)
			c(testenv.FIN | testenv.ACK)
		}, true},
		{"TCP reset", "tcp", func(t *loader.Timeouts) { t.Reset = tick }, func(r *rig, c, b func(uint8)) { b(testenv.RST) }, true},
		{"UDP without an answer", "udp", func(t *loader.Timeouts) { t.UDPNew = tick }, func(r *rig, c, b func(uint8)) {}, true},
		{"UDP answered, short for the unanswered", "udp", func(t *loader.Timeouts) { t.UDPNew = tick }, func(r *rig, c, b func(uint8)) { b(0) }, false},
		{"UDP answered", "udp", func(t *loader.Timeouts) { t.UDP = tick }, func(r *rig, c, b func(uint8)) { b(0) }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			timeouts := loader.Timeouts{TCPNew: long, TCPEstablished: long, TCPHalfClosed: long, TCPClosed: long, Reset: long, UDPNew: long, UDP: long}
			c.shorten(&timeouts)
			r := newRig(t, timeouts)
			r.service(f)
			first := base(f, f.vip)[c.protocol]
			r.run("node_in", first.Bytes())
			c.packets(r, func(flags uint8) {
				r.run("node_in", with(first, func(p *testenv.Packet) { p.TCPFlags = flags }).Bytes())
			}, func(flags uint8) {
				p := testenv.SegmentTCP(f.backend, f.client, flags)
				if c.protocol == "udp" {
					p = testenv.DatagramUDP(f.backend, f.client, "x")
				}
				r.run("node_out", p.Bytes())
			})
			time.Sleep(tick + 20*time.Millisecond)
			reply := testenv.DatagramUDP(f.backend, f.client, "x")
			if c.protocol == "tcp" {
				reply = testenv.SegmentTCP(f.backend, f.client, testenv.ACK)
			}
			want := "reply"
			if c.dies {
				want = "no_flow"
			}
			if got := r.run("node_out", reply.Bytes()).Reason; got != want {
				t.Errorf("the reply half: %s, want %s", got, want)
			}
		})
	}
}

// TestTupleTaken: two flows must not become one at the backend.
func TestTupleTaken(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		r.service(f)
		r.backend(2, 2, f.backend, maps.BackendActive, 1)
		r.slots(2, 2)
		r.frontend(f.vip2, 2)
		for protocol, p := range base(f, f.vip) {
			out := p
			out.Destination = f.backend
			r.expect("node_in", p.Bytes(), pass, "new_flow", out.Bytes())
			r.expect("node_in", base(f, f.vip2)[protocol].Bytes(), drop, "tuple_taken", nil)
			r.expect("node_in", p.Bytes(), pass, "forward", out.Bytes()) // the first is as it was
		}
	}
}

// TestSelection: a tuple's choice is stable, and all choices together are even.
func TestSelection(t *testing.T) {
	for _, f := range families {
		r := newRig(t, loader.Timeouts{})
		const backends, clients = 7, 4000
		var ids []uint32
		for i := range uint32(backends) {
			a := f.backend.Addr().As16()
			a[15] = byte(100 + i)
			r.backend(i+1, 1, netip.AddrPortFrom(netip.AddrFrom16(a).Unmap(), 8080), maps.BackendActive, 1)
			ids = append(ids, i+1)
		}
		r.slots(1, ids...)
		r.frontend(f.vip, 1)
		chosen := map[netip.AddrPort]int{}
		var before []netip.AddrPort
		for round := range 2 {
			for i := range clients {
				p := testenv.DatagramUDP(netip.AddrPortFrom(f.client.Addr(), uint16(1024+i)), f.vip, "x")
				_, frame := r.runOnly("node_in", p.Bytes())
				out, err := testenv.Parse(frame)
				r.must(err)
				if round == 0 {
					chosen[out.Destination]++
					before = append(before, out.Destination)
				} else if before[i] != out.Destination {
					t.Fatalf("%s: client %d chose %s, then %s", f.name, i, before[i], out.Destination)
				}
			}
			r.clearFlows()
		}
		// Chi-square with 6 degrees of freedom: 27.9 is exceeded once in 10,000 runs.
		expected, chi := float64(clients)/backends, 0.0
		for _, n := range chosen {
			chi += (float64(n) - expected) * (float64(n) - expected) / expected
		}
		if len(chosen) != backends || chi > 27.9 {
			t.Errorf("%s: %d clients over %d backends, chi-square %.1f: %v", f.name, clients, len(chosen), chi, chosen)
		}
	}
}

// TestCounts: a flow counts its packets and the bytes of IP.
func TestCounts(t *testing.T) {
	f := families[0]
	r := newRig(t, loader.Timeouts{})
	r.service(f)
	p := base(f, f.vip)["udp"].Bytes()
	for range 3 {
		r.run("node_in", append(p, 0, 0, 0)) // the frame's padding does not count
	}
	flow, _ := r.flow(f.client, f.vip, lb.UDP)
	if flow.Packets != 3 || flow.Bytes != uint64(3*(len(p)-14)) {
		t.Errorf("%d packets, %d bytes; want 3 and %d", flow.Packets, flow.Bytes, 3*(len(p)-14))
	}
}
