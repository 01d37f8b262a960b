// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
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
	pass     = math.MaxUint32 // TC_ACT_UNSPEC
	drop     = 2              // TC_ACT_SHOT
	sentBack = 7              // TC_ACT_REDIRECT
)

const silentBackend = 30 * time.Second

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
	loader   *loader.Loader
	keepMAC  bool // frames are run as they are, not as if they had been sent to this host
}

// shared are the programs of all these tests: to verify them takes longer than most tests do.
var shared = sync.OnceValues(func() (*rig, error) {
	m, err := maps.New(maps.Sizes{Frontends: 1024, Services: 16, Slots: 1024, Backends: 256, Flows: 1 << 18})
	if err != nil {
		return nil, err
	}
	l, err := loader.Load(m, loader.Config{SilentBackend: silentBackend})
	if err != nil {
		return nil, err
	}
	return &rig{maps: m, programs: l.Programs(), loader: l}, nil
})

// newRig returns the programs with empty maps.
func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads BPF programs")
	}
	s, err := shared()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	r := &rig{t: t, maps: s.maps, programs: s.programs, loader: s.loader}
	r.clearFlows()
	r.clearAffinity()
	r.setLimit(icmpLimit{})
	var keys []maps.FrontendKey
	r.must(r.maps.EachFrontend(func(k maps.FrontendKey, _ maps.Frontend) bool {
		keys = append(keys, k)
		return true
	}))
	for _, k := range keys {
		r.must(r.maps.DeleteFrontend(k))
	}
	for id := range r.maps.Sizes().Services {
		r.must(r.maps.SetServiceCluster(id, maps.SlotRange{}))
		r.must(r.maps.SetServiceLocal(id, maps.SlotRange{}))
		r.must(r.maps.SetServicePolicy(id, maps.Policy{}))
		r.must(r.maps.ClearServiceStats(id))
	}
	for id := range r.maps.Sizes().Backends {
		r.must(r.maps.SetBackend(id, maps.Backend{}))
		r.must(r.maps.ClearBackendStats(id))
	}
	type sourceRange struct {
		service uint32
		clients netip.Prefix
	}
	var ranges []sourceRange
	r.must(r.maps.EachSourceRange(func(service uint32, p netip.Prefix) bool {
		ranges = append(ranges, sourceRange{service, p})
		return true
	}))
	for _, s := range ranges {
		r.must(r.maps.DeleteSourceRange(s.service, s.clients))
	}
	r.must(r.maps.SetServicePrefixes(nil, false))
	return r
}

// clearAffinity forgets every client's backend.
func (r *rig) clearAffinity() {
	r.t.Helper()
	var keys []maps.AffinityKey
	r.must(r.maps.EachAffinity(func(k maps.AffinityKey, _ maps.Affinity) bool {
		keys = append(keys, k)
		return true
	}))
	for _, k := range keys {
		r.must(r.maps.All()["affinity"].Delete(k))
	}
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

// frontend leads a VIP to a service, for TCP and UDP, and says that the address is a ClusterIP, in no prefix.
func (r *rig) frontend(vip netip.AddrPort, service uint32) {
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
		r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: vip.Addr(), Port: vip.Port(), Protocol: p}),
			maps.FrontendOf(service, lb.ClusterIP)))
	}
	r.address(vip.Addr(), maps.AddressClusterIP)
	prefixes, _ := r.maps.ServicePrefixes()
	r.must(r.maps.SetServicePrefixes(prefixes, true))
}

// address says what is known of an address.
func (r *rig) address(a netip.Addr, flags uint8) {
	f := maps.FrontendOf(0, lb.Address)
	f.Flags = flags
	r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: a}), f))
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
	if !r.keepMAC {
		clear(in[:6]) // the loopback device's address
	}
	opts := ebpf.RunOptions{Data: in, DataOut: make([]byte, len(in)+256)}
	verdict, err := r.programs[program].Run(&opts)
	if err != nil {
		r.t.Fatalf("run %s on %s: %v", program, testenv.Describe(frame), err)
	}
	if !r.keepMAC {
		copy(opts.DataOut[:6], frame[:6])
	}
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

// tuple is a key of the flow tables.
func tuple(from, to netip.AddrPort, p lb.Protocol) maps.Tuple {
	k := maps.KeyOf(lb.VIP{Protocol: p, Addr: to.Addr()})
	return maps.Tuple{Source: from.Addr().As16(), Destination: to.Addr().As16(), SourcePort: from.Port(), DestinationPort: to.Port(), Protocol: k.Protocol}
}

// flow returns the entry of a tuple in `flows`, or else in `pending`.
func (r *rig) flow(from, to netip.AddrPort, p lb.Protocol) (f maps.Flow, in string) {
	r.t.Helper()
	key := tuple(from, to, p)
	for _, in := range []string{"flows", "pending"} {
		err := r.maps.All()[in].Lookup(key, &f)
		if err == nil {
			return f, in
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			r.t.Fatal(err)
		}
	}
	return f, ""
}

// age makes every entry older, as if the clock had been moved ahead.
func (r *rig) age(by time.Duration) {
	r.t.Helper()
	for _, in := range []string{"flows", "pending"} {
		m := r.maps.All()[in]
		entries := map[maps.Tuple]maps.Flow{}
		var k maps.Tuple
		var f maps.Flow
		for i := m.Iterate(); i.Next(&k, &f); {
			entries[k] = f
		}
		for k, f := range entries {
			f.LastSeenNs -= uint64(by)
			if f.SilentSinceMs != 0 {
				f.SilentSinceMs -= uint32(by.Milliseconds())
			}
			r.must(m.Put(k, f))
		}
	}
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
		r := newRig(t)
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
	r.t.Helper()
	for _, in := range []string{"flows", "pending"} {
		m := r.maps.All()[in]
		var keys []maps.Tuple
		var k maps.Tuple
		var f maps.Flow
		for i := m.Iterate(); i.Next(&k, &f); {
			keys = append(keys, k)
		}
		for _, k := range keys {
			r.must(m.Delete(k))
		}
	}
}

// TestNotOurs: what is no service's passes byte for byte, whatever it is.
func TestNotOurs(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		arp := make([]byte, 60)
		arp[12], arp[13] = 0x08, 0x06
		r.expect("node_in", arp, pass, "not_ip", arp)
		for protocol, p := range base(f, netip.AddrPortFrom(f.multicast, 5353)) {
			b := p.Bytes()
			r.expect("node_in", b, pass, "multicast", b)
			for name, p := range map[string]testenv.Packet{
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

// TestLinkLocalClient: one whose address is of the link alone gets its answers from the VIP like any other. Its
// backend is the node itself, for the stack routes no such packet.
func TestLinkLocalClient(t *testing.T) {
	for _, f := range families {
		if !f.linkLocal.IsValid() {
			continue
		}
		r := newRig(t)
		r.service(f)
		f.client = netip.AddrPortFrom(f.linkLocal, f.client.Port())
		for protocol, p := range base(f, f.vip) {
			out := p
			out.Destination = f.backend
			r.expect("node_in", p.Bytes(), pass, "new_flow", out.Bytes())
			reply := base(f, f.client)[protocol]
			reply.Source = f.backend
			reply.TCPFlags |= testenv.ACK
			out = reply
			out.Source = f.vip
			r.expect("node_out", reply.Bytes(), pass, "reply", out.Bytes())
		}
	}
}

// TestMappedAddressOnTheWire: ::ffff:10.96.0.10 in an IPv6 packet is not 10.96.0.10.
func TestMappedAddressOnTheWire(t *testing.T) {
	r := newRig(t)
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
		r := newRig(t)
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
			r.expect("pod_in", reply(f.backend), pass, "no_service", reply(f.backend))
			r.expect("pod_out", reply(f.backend), pass, "reply", reply(f.vip))
			r.expect("node_out", reply(f.backend), pass, "reply", reply(f.vip))
			r.run("pod_in", with(p, func(p *testenv.Packet) { p.TCPFlags, p.Ack = testenv.ACK, 1<<20 }).Bytes()) // now assured
			r.expect("pod_in", reply(f.backend), pass, "other_hook", reply(f.backend))
			r.expect("pod_out", reply(f.backend), pass, "reply", reply(f.vip))
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

// TestDirectFragments: fragments of a connection straight to a backend are the stack's to carry.
func TestDirectFragments(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.identity(f.backend)
		up := testenv.DatagramUDP(f.client, f.backend, "hello")
		r.expect("node_in", up.Bytes(), pass, "new_direct", up.Bytes())
		down := testenv.DatagramUDP(f.backend, f.client, "8 octets")
		first := with(down, func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 3, More: true} })
		r.expect("node_out", first.Bytes(), pass, "direct", first.Bytes())
		r.run("node_in", up.Bytes())
		r.expect("node_out", first.Bytes(), pass, "direct", first.Bytes())
	}
}

// TestNoBackend: what a service without endpoints does, and that nothing of it is remembered.
func TestNoBackend(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.frontend(f.vip, 1)
		for _, p := range base(f, f.vip) {
			if got := r.run("pod_in", p.Bytes()); got.Verdict != sentBack || got.Reason != "no_backend" {
				t.Errorf("%s: %d, %s", testenv.Describe(p.Bytes()), int32(got.Verdict), got.Reason)
			}
		}
		r.service(f)
		for _, p := range base(f, f.vip) {
			out := p
			out.Destination = f.backend
			r.expect("pod_in", p.Bytes(), pass, "new_flow", out.Bytes())
		}
	}
}

// talk is one connection between a client and a backend, packet by packet, with sequence numbers.
type talk struct {
	r            *rig
	client, vip  netip.AddrPort
	at           netip.AddrPort // the backend, and the port by which it knows the client
	as           netip.AddrPort
	up, down     uint32 // the next sequence numbers
	upAck, dnAck uint32 // what each side has acknowledged of the other's
}

func (r *rig) talk(f family) *talk {
	return &talk{r: r, client: f.client, vip: f.vip, at: f.backend, as: f.client, up: 1000, down: 5000}
}

// segment is the client's next segment.
func (c *talk) segment(flags uint8) testenv.Packet {
	p := testenv.SegmentTCP(c.client, c.vip, flags)
	p.Seq, p.Ack = c.up, c.upAck
	return p
}

// reply is the backend's next segment.
func (c *talk) reply(flags uint8) testenv.Packet {
	p := testenv.SegmentTCP(c.at, c.as, flags)
	p.Seq, p.Ack = c.down, c.dnAck
	return p
}

// send takes a segment of the client to the backend; it must be translated, and for this reason.
func (c *talk) send(flags uint8, reason string) {
	c.r.t.Helper()
	p := c.segment(flags)
	out := p
	out.Source, out.Destination = c.as, c.at
	c.r.expect("node_in", p.Bytes(), pass, reason, out.Bytes())
	if flags&(testenv.SYN|testenv.FIN) != 0 {
		c.up++
	}
	c.dnAck = c.up
}

// answer takes a segment of the backend to the client.
func (c *talk) answer(flags uint8) {
	c.r.t.Helper()
	p := c.reply(flags)
	out := p
	out.Source, out.Destination = c.vip, c.client
	c.r.expect("node_out", p.Bytes(), pass, "reply", out.Bytes())
	if flags&(testenv.SYN|testenv.FIN) != 0 {
		c.down++
	}
	c.upAck = c.down
}

// open is the handshake.
func (c *talk) open() {
	c.r.t.Helper()
	c.send(testenv.SYN, "new_flow")
	c.answer(testenv.SYN | testenv.ACK)
	c.send(testenv.ACK, "forward")
	if _, in := c.r.flow(c.client, c.vip, lb.TCP); in != "flows" {
		c.r.t.Errorf("after the handshake the flow is in %q", in)
	}
}

// TestAssured: a flow goes to `flows` when the client has spoken again after the backend's answer, not before.
func TestAssured(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		where := func(p lb.Protocol, want string) {
			t.Helper()
			for _, half := range []maps.Tuple{tuple(f.client, f.vip, p), tuple(f.backend, f.client, p)} {
				if _, in := r.flow(half.From(), half.To(), p); in != want {
					t.Errorf("%s %s: %s > %s is in %q, want %q", f.name, p, half.From(), half.To(), in, want)
				}
			}
		}
		c := r.talk(f)
		c.send(testenv.SYN, "new_flow")
		where(lb.TCP, "pending")
		c.up--
		c.send(testenv.SYN, "forward") // sent again
		where(lb.TCP, "pending")
		stray := c.segment(testenv.ACK) // guessed
		stray.Ack = c.down - 7
		r.run("node_in", stray.Bytes())
		where(lb.TCP, "pending")
		c.answer(testenv.SYN | testenv.ACK)
		where(lb.TCP, "pending")
		stray.Ack = c.down - 1 // the SYN is not acknowledged
		r.run("node_in", stray.Bytes())
		where(lb.TCP, "pending")
		c.send(testenv.ACK, "forward")
		where(lb.TCP, "flows")
		c.answer(testenv.ACK)
		c.send(testenv.ACK, "forward")

		up := testenv.DatagramUDP(f.client, f.vip, "question")
		down := testenv.DatagramUDP(f.backend, f.client, "answer")
		for range 3 {
			r.run("node_in", up.Bytes()) // a flood of one
		}
		where(lb.UDP, "pending")
		r.run("node_out", down.Bytes())
		r.run("node_out", down.Bytes())
		where(lb.UDP, "pending") // one question, one answer
		r.run("node_in", up.Bytes())
		where(lb.UDP, "flows")
		r.expect("node_out", down.Bytes(), pass, "reply", with(down, func(p *testenv.Packet) { p.Source = f.vip }).Bytes())
	}
}

// TestGeneration: UDP packets and SYNs of a backend whose generation changed look again; other TCP goes on.
func TestGeneration(t *testing.T) {
	for _, f := range families {
		udp := testenv.DatagramUDP(f.client, f.vip, "hello")
		to := func(p testenv.Packet, a netip.AddrPort) []byte {
			p.Destination = a
			return p.Bytes()
		}
		for _, assured := range []bool{true, false} {
			begin := func(t *testing.T) (*rig, *talk) {
				r := newRig(t)
				r.service(f)
				r.backend(2, 1, f.backend2, maps.BackendActive, 1)
				c := r.talk(f)
				r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend))
				if assured {
					r.run("node_out", testenv.DatagramUDP(f.backend, f.client, "x").Bytes())
					r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend))
					c.open()
				} else {
					c.send(testenv.SYN, "new_flow")
				}
				return r, c
			}
			life := func(state maps.BackendState, generation uint32) maps.BackendLife {
				return maps.BackendLife{Generation: generation, State: state, Port: f.backend.Port()}
			}
			syn := func(r *rig, c *talk, at netip.AddrPort) {
				t.Helper()
				p := c.segment(testenv.SYN)
				r.expect("node_in", p.Bytes(), pass, "new_flow", to(p, at))
			}
			for name, test := range map[string]func(t *testing.T){
				"removed": func(t *testing.T) {
					r, c := begin(t)
					r.slots(1, 2)
					r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend)) // until the generation says so
					r.must(r.maps.SetBackendLife(1, life(maps.BackendRemoved, 2)))
					r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
					r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend2))
					c.send(testenv.ACK, "forward") // an established connection goes on
					syn(r, c, f.backend2)
					// The new flow's replies are translated, and those that were on their way.
					for _, b := range []netip.AddrPort{f.backend, f.backend2} {
						reply := testenv.DatagramUDP(b, f.client, "x")
						want := reply
						want.Source = f.vip
						r.expect("node_out", reply.Bytes(), pass, "reply", want.Bytes())
					}
				},
				"refreshed": func(t *testing.T) {
					r, _ := begin(t)
					r.must(r.maps.SetBackendLife(1, life(maps.BackendActive, 2)))
					r.slots(1, 2) // what would be chosen now
					r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend))
					if flow, _ := r.flow(f.client, f.vip, lb.UDP); flow.Generation != 2 {
						t.Errorf("the flow's generation is %d, want 2", flow.Generation)
					}
				},
				"draining": func(t *testing.T) {
					r, _ := begin(t)
					r.slots(1, 2)
					r.must(r.maps.SetBackendLife(1, life(maps.BackendDraining, 2)))
					r.expect("node_in", udp.Bytes(), pass, "forward", to(udp, f.backend))
				},
				"id of another service": func(t *testing.T) {
					r, c := begin(t)
					r.slots(1, 2)
					r.backend(1, 7, f.backend, maps.BackendActive, 2) // the id is another's now, at the same address
					r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
					c.send(testenv.ACK, "forward")
				},
				"id of another address": func(t *testing.T) {
					r, c := begin(t)
					r.slots(1, 2)
					r.backend(1, 1, f.other, maps.BackendActive, 2)
					r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2))
					c.send(testenv.ACK, "forward")
				},
				"no endpoint left": func(t *testing.T) {
					r, _ := begin(t)
					r.slots(1)
					r.must(r.maps.SetBackendLife(1, life(maps.BackendRemoved, 2)))
					if got := r.run("node_in", udp.Bytes()); got.Verdict != sentBack || got.Reason != "no_backend" {
						t.Errorf("%d, %s", int32(got.Verdict), got.Reason)
					}
					r.slots(1, 2)
					r.expect("node_in", udp.Bytes(), pass, "new_flow", to(udp, f.backend2)) // nothing negative is remembered
				},
				"frontend removed": func(t *testing.T) {
					r, c := begin(t)
					for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
						r.must(r.maps.DeleteFrontend(maps.KeyOf(lb.VIP{Addr: f.vip.Addr(), Port: f.vip.Port(), Protocol: p})))
					}
					r.must(r.maps.SetBackendLife(1, life(maps.BackendActive, 2)))
					if got := r.run("node_in", udp.Bytes()); got.Verdict != sentBack || got.Reason != "wrong_port" {
						t.Errorf("%d, %s", int32(got.Verdict), got.Reason)
					}
					c.send(testenv.ACK, "forward")
				},
			} {
				t.Run(fmt.Sprintf("%s/assured %v/%s", f.name, assured, name), test)
			}
		}
	}
}

// TestBackendReturns: an endpoint that was removed and is back has another id at the same address, as has that of a
// Service made anew. A flow that begins again there is the new id's.
func TestBackendReturns(t *testing.T) {
	for _, f := range families {
		returns := func(r *rig) {
			r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
			r.backend(2, 1, f.backend, maps.BackendActive, 1)
			r.slots(1, 2)
		}
		t.Run(f.name+"/udp", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			up := testenv.DatagramUDP(f.client, f.vip, "hello")
			out := up
			out.Destination = f.backend
			r.expect("node_in", up.Bytes(), pass, "new_flow", out.Bytes())
			returns(r)
			r.expect("node_in", up.Bytes(), pass, "new_flow", out.Bytes())
			r.expect("node_in", up.Bytes(), pass, "forward", out.Bytes())
			if flow, _ := r.flow(f.client, f.vip, lb.UDP); flow.Backend != 2 {
				t.Errorf("the flow names backend %d, want 2", flow.Backend)
			}
		})
		t.Run(f.name+"/tcp", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			c := r.talk(f)
			c.open()
			c.send(testenv.RST, "forward")
			returns(r)
			c.up = 90000
			c.open()
			for range 2 { // and the backend takes its time
				p := c.segment(testenv.ACK | testenv.PSH)
				p.Payload = []byte("data")
				out := p
				out.Destination = c.at
				r.expect("node_in", p.Bytes(), pass, "forward", out.Bytes())
				r.age(silentBackend + time.Second)
			}
		})
	}
}

// TestMovedBack: a flow that leads to another backend and, soon, back to the first is assured like any other,
// though its old reply half is still in `flows`.
func TestMovedBack(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		r.backend(2, 1, f.backend2, maps.BackendActive, 1)
		up := testenv.DatagramUDP(f.client, f.vip, "hello")
		talk := func(at netip.AddrPort, reason string) {
			t.Helper()
			out := up
			out.Destination = at
			r.expect("node_in", up.Bytes(), pass, reason, out.Bytes())
			down := testenv.DatagramUDP(at, f.client, "answer")
			r.expect("node_out", down.Bytes(), pass, "reply", with(down, func(p *testenv.Packet) { p.Source = f.vip }).Bytes())
			r.expect("node_in", up.Bytes(), pass, "forward", out.Bytes())
			for _, half := range [][2]netip.AddrPort{{f.client, f.vip}, {at, f.client}} {
				if flow, in := r.flow(half[0], half[1], lb.UDP); in != "flows" || flow.State != 0 {
					t.Errorf("%s: %v is in %q, state %d; want flows, 0", f.name, half, in, flow.State)
				}
			}
		}
		talk(f.backend, "new_flow")
		r.slots(1, 2)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		talk(f.backend2, "new_flow")
		r.slots(1, 1)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 3, State: maps.BackendActive, Port: f.backend.Port()}))
		r.must(r.maps.SetBackendLife(2, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		talk(f.backend, "new_flow")
	}
}

// TestMovedExpires: a backend that a flow has left may go on sending for as long as it likes; the old reply half
// expires, also while the new flow is not assured.
func TestMovedExpires(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		r.backend(2, 1, f.backend2, maps.BackendActive, 1)
		up, down := testenv.DatagramUDP(f.client, f.vip, "hello"), testenv.DatagramUDP(f.backend, f.client, "stream")
		out := with(down, func(p *testenv.Packet) { p.Source = f.vip })
		r.run("node_in", up.Bytes())
		r.run("node_out", down.Bytes())
		r.run("node_in", up.Bytes())
		r.slots(1, 2)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		r.run("node_in", up.Bytes())
		for range 4 { // 8 of its 10 seconds
			r.age(2 * time.Second)
			r.expect("node_out", down.Bytes(), pass, "reply", out.Bytes())
		}
		r.age(3 * time.Second)
		r.expect("node_out", down.Bytes(), pass, "no_flow", down.Bytes())
	}
}

// TestPortReuse: a SYN on a connection that has ended, or whose entry is past its timeout though still in the
// table, selects anew.
func TestPortReuse(t *testing.T) {
	for _, f := range families {
		for _, end := range []struct {
			name string
			do   func(c *talk)
			anew bool
		}{
			{"open", func(c *talk) {}, false},
			{"RST of the client", func(c *talk) { c.send(testenv.RST, "forward") }, true},
			{"RST of the backend", func(c *talk) { c.answer(testenv.RST) }, true},
			{"RST of the backend, its data in flight", func(c *talk) {
				c.send(testenv.RST, "forward")
				c.answer(testenv.ACK)
			}, true},
			{"FIN of the client", func(c *talk) { c.send(testenv.FIN|testenv.ACK, "forward") }, false},
			{"FIN of the backend", func(c *talk) { c.answer(testenv.FIN | testenv.ACK) }, false},
			{"FIN of both", func(c *talk) {
				c.send(testenv.FIN|testenv.ACK, "forward")
				c.answer(testenv.FIN | testenv.ACK)
				c.send(testenv.ACK, "forward")
			}, true},
			{"RST that was no end", func(c *talk) {
				c.answer(testenv.RST)
				c.answer(testenv.ACK)
			}, false},
			{"RST behind the window", func(c *talk) {
				c.down -= 9
				c.answer(testenv.RST)
				c.down += 9
			}, false},
			{"RST ahead of the window", func(c *talk) {
				c.down += 9
				c.answer(testenv.RST)
				c.down -= 9
			}, false},
			{"FIN behind the window", func(c *talk) {
				c.send(testenv.FIN|testenv.ACK, "forward")
				c.down -= 9
				c.answer(testenv.FIN | testenv.ACK)
			}, false},
			{"past the timeout", func(c *talk) { c.r.age(24*time.Hour + time.Second) }, true},
		} {
			t.Run(f.name+"/"+end.name, func(t *testing.T) {
				r := newRig(t)
				r.service(f)
				r.backend(2, 1, f.backend2, maps.BackendActive, 1)
				c := r.talk(f)
				c.open()
				r.slots(1, 2) // what a new choice will be
				end.do(c)
				if _, in := r.flow(f.client, f.vip, lb.TCP); in != "flows" {
					t.Fatalf("the old entry is in %q; it should be in the way", in)
				}
				c.up = 90000
				if end.anew {
					c.at = f.backend2
					c.open()
				} else {
					c.send(testenv.SYN, "forward")
				}
			})
		}
		t.Run(f.name+"/the same backend again", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			c := r.talk(f)
			c.open()
			c.send(testenv.RST, "forward")
			c.up = 90000
			c.open()
		})
	}
}

// TestReopenLostReply: a SYN begins a connection that has ended anew, whose reply half the LRU has taken, and which
// another service's connection may have by now.
func TestReopenLostReply(t *testing.T) {
	for _, f := range families {
		for _, taken := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/taken %v", f.name, taken), func(t *testing.T) {
				r := newRig(t)
				r.service(f)
				c := r.talk(f)
				c.open()
				c.send(testenv.RST, "forward")
				for _, in := range []string{"flows", "pending"} {
					r.must(r.maps.All()[in].Delete(tuple(f.backend, f.client, lb.TCP)))
				}
				if !taken {
					c.up = 90000
					c.open()
					return
				}
				r.backend(2, 2, f.backend, maps.BackendActive, 1)
				r.slots(2, 2)
				r.frontend(f.vip2, 2)
				other := r.talk(f)
				other.vip = f.vip2
				other.open()
				got := r.run("node_in", c.segment(testenv.SYN).Bytes())
				seen, err := testenv.Parse(got.Frame)
				r.must(err)
				if got.Reason != "new_flow" || seen.Destination != f.backend || seen.Source.Port() == f.client.Port() {
					t.Fatalf("%s: %s; want another source port", got.Reason, testenv.Describe(got.Frame))
				}
				c.as = seen.Source
				c.up++
				c.dnAck = c.up
				c.answer(testenv.SYN | testenv.ACK)
				c.send(testenv.ACK, "forward")
				other.answer(testenv.ACK)
				other.send(testenv.ACK, "forward")
			})
		}
	}
}

// TestTimeouts: how long an entry of each state lives.
func TestTimeouts(t *testing.T) {
	const moment = 3 * time.Second
	for _, f := range families {
		for _, state := range []struct {
			name  string
			reach func(c *talk)
			lives time.Duration
		}{
			{"not answered", func(c *talk) { c.send(testenv.SYN, "new_flow") }, time.Minute},
			{"answered", func(c *talk) {
				c.send(testenv.SYN, "new_flow")
				c.answer(testenv.SYN | testenv.ACK)
			}, time.Minute},
			{"refused", func(c *talk) {
				c.send(testenv.SYN, "new_flow")
				c.answer(testenv.RST | testenv.ACK)
			}, 10 * time.Second},
			{"established", func(c *talk) { c.open() }, 24 * time.Hour},
			{"half closed", func(c *talk) {
				c.open()
				c.answer(testenv.FIN | testenv.ACK)
			}, time.Hour},
			{"closed", func(c *talk) {
				c.open()
				c.answer(testenv.FIN | testenv.ACK)
				c.send(testenv.FIN|testenv.ACK, "forward")
			}, time.Minute},
			{"reset", func(c *talk) {
				c.open()
				c.answer(testenv.RST)
			}, 10 * time.Second},
			{"reset ahead of the window", func(c *talk) {
				c.open()
				c.down += 9
				c.answer(testenv.RST)
				c.down -= 9
			}, time.Hour},
			{"reset behind the window", func(c *talk) {
				c.open()
				c.down -= 9
				c.answer(testenv.RST)
				c.down += 9
			}, 24 * time.Hour},
		} {
			t.Run(f.name+"/"+state.name, func(t *testing.T) {
				r := newRig(t)
				r.service(f)
				c := r.talk(f)
				state.reach(c)
				for _, after := range []struct {
					by   time.Duration
					want string
				}{{state.lives - moment, "reply"}, {2 * moment, "no_flow"}} {
					r.age(after.by)
					// Asked of egress by a reset, which makes nothing younger that it finds dead; what it
					// finds alive is put back.
					before := map[string]maps.Flow{}
					for _, in := range []string{"flows", "pending"} {
						var flow maps.Flow
						if r.maps.All()[in].Lookup(tuple(f.backend, f.client, lb.TCP), &flow) == nil {
							before[in] = flow
						}
					}
					if got := r.run("node_out", c.reply(testenv.ACK).Bytes()).Reason; got != after.want {
						t.Errorf("after %v: %s, want %s", after.by, got, after.want)
					}
					for in, flow := range before {
						r.must(r.maps.All()[in].Put(tuple(f.backend, f.client, lb.TCP), flow))
					}
				}
			})
		}
	}
}

// TestClash: two flows that would be one at the backend: the newcomer is known to it by another port, and both
// are translated to their ends.
func TestClash(t *testing.T) {
	for _, f := range families {
		second := map[string]struct {
			to       netip.AddrPort
			identity bool
		}{"two VIPs": {f.vip2, false}, "direct": {f.backend, true}}
		for name, other := range second {
			for _, otherFirst := range []bool{false, true} {
				for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
					t.Run(fmt.Sprintf("%s/%s/other first %v/%s", f.name, name, otherFirst, protocol), func(t *testing.T) {
						r := newRig(t)
						r.service(f)
						r.backend(2, 2, f.backend, maps.BackendActive, 1)
						r.slots(2, 2)
						r.frontend(f.vip2, 2)
						for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
							r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: f.backend.Addr(), Port: f.backend.Port(), Protocol: p}),
								maps.FrontendOf(0, lb.Identity)))
						}
						order := []netip.AddrPort{f.vip, other.to}
						if otherFirst {
							order = []netip.AddrPort{other.to, f.vip}
						}
						// How the backend sees each.
						as := map[netip.AddrPort]netip.AddrPort{}
						for round := range 3 {
							for i, to := range order {
								up := testenv.DatagramUDP(f.client, to, "x")
								if protocol == lb.TCP {
									up = testenv.SegmentTCP(f.client, to, testenv.SYN)
									if round > 0 {
										up.TCPFlags, up.Seq, up.Ack = testenv.ACK, 1, 1001
									}
								}
								got := r.run("node_in", up.Bytes())
								seen, err := testenv.Parse(got.Frame)
								r.must(err)
								if got.Verdict != pass || seen.Destination != f.backend || testenv.CheckSums(got.Frame) != nil {
									t.Fatalf("%s: %s, %s", testenv.Describe(up.Bytes()), got.Reason, testenv.Describe(got.Frame))
								}
								if round == 0 {
									as[to] = seen.Source
									if first := i == 0; first != (seen.Source == f.client) {
										t.Errorf("flow %d is seen as %s", i, seen.Source)
									}
								} else if as[to] != seen.Source {
									t.Errorf("%s was seen as %s, then as %s", to, as[to], seen.Source)
								}
								// On through the stack: egress to the backend does nothing more.
								if out := r.run("pod_out", got.Frame); !bytes.Equal(out.Frame, got.Frame) {
									t.Errorf("egress made %s of %s", testenv.Describe(out.Frame), testenv.Describe(got.Frame))
								}
							}
							for _, to := range order {
								down := testenv.DatagramUDP(f.backend, as[to], "x")
								if protocol == lb.TCP {
									down = testenv.SegmentTCP(f.backend, as[to], testenv.SYN|testenv.ACK)
									down.Seq, down.Ack = 1000, 1
									if round > 0 {
										down.TCPFlags, down.Seq = testenv.ACK, 1001
									}
								}
								in := r.run("pod_in", down.Bytes())
								if in.Verdict != pass || !bytes.Equal(in.Frame, down.Bytes()) {
									t.Errorf("before the stack: %s of %s", testenv.Describe(in.Frame), testenv.Describe(down.Bytes()))
								}
								want := down
								want.Source, want.Destination = to, f.client
								out := r.run("node_out", down.Bytes())
								if out.Verdict != pass || !bytes.Equal(out.Frame, want.Bytes()) {
									t.Errorf("reply of %s (%s): %s, want %s", to, out.Reason, testenv.Describe(out.Frame), testenv.Describe(want.Bytes()))
								}
							}
						}
						for _, to := range order {
							if _, in := r.flow(f.client, to, protocol); in != "flows" {
								t.Errorf("the flow to %s is in %q", to, in)
							}
						}
					})
				}
			}
		}
	}
}

// TestSilentBackend: a connection to a removed backend lives as long as the backend answers; when a segment has
// been left unanswered for the timeout, the client's next packet is answered with a reset.
func TestSilentBackend(t *testing.T) {
	for _, f := range families {
		const moment = 10 * time.Second
		begin := func(t *testing.T) *talk {
			r := newRig(t)
			r.service(f)
			c := r.talk(f)
			c.open()
			r.slots(1)
			r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
			return c
		}
		data := func(c *talk) {
			t.Helper()
			p := c.segment(testenv.ACK | testenv.PSH)
			p.Payload = []byte("data")
			out := p
			out.Destination = c.at
			c.r.expect("node_in", p.Bytes(), pass, "forward", out.Bytes())
			c.up += 4
		}
		reset := func(c *talk, p testenv.Packet, seq, ack uint32, flags uint8) {
			t.Helper()
			want := testenv.SegmentTCP(c.vip, c.client, flags)
			want.SourceMAC, want.DestinationMAC = testenv.MAC{2, 0, 0, 0, 0, 2}, testenv.MAC{2, 0, 0, 0, 0, 1}
			want.Seq, want.Ack, want.Window, want.DontFragment = seq, ack, 0, f.name == "v4"
			out := want.Bytes()
			got := c.r.run("node_in", p.Bytes())
			// The harness gives both addresses of the Ethernet header a part: see runOnly.
			copy(got.Frame[:12], out[:12])
			if got.Verdict != sentBack || got.Reason != "silent_backend" || !bytes.Equal(got.Frame, out) {
				t.Errorf("%d, %s: %s, want %s", got.Verdict, got.Reason, testenv.Describe(got.Frame), testenv.Describe(out))
			}
		}
		t.Run(f.name+"/silent", func(t *testing.T) {
			c := begin(t)
			data(c)
			c.r.age(silentBackend - moment)
			c.up -= 4
			data(c) // sent again
			c.r.age(2 * moment)
			c.up -= 4
			again := c.segment(testenv.ACK | testenv.PSH)
			again.Payload, again.TCPOptions = []byte("data"), []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
			reset(c, again, c.upAck, 0, testenv.RST)
			// It is over: a SYN begins anew, where it can.
			c.r.backend(2, 1, f.backend2, maps.BackendActive, 1)
			c.r.slots(1, 2)
			c.up, c.at = 90000, f.backend2
			c.open()
		})
		t.Run(f.name+"/answers", func(t *testing.T) {
			c := begin(t)
			for range 3 {
				data(c)
				c.r.age(silentBackend - moment)
				c.dnAck = c.up
				c.answer(testenv.ACK)
				c.r.age(time.Hour) // of idleness
			}
			c.send(testenv.ACK, "forward")
			c.r.age(time.Hour)
			c.send(testenv.ACK, "forward") // nothing waits for an answer
		})
		t.Run(f.name+"/the backend speaks of something else", func(t *testing.T) {
			c := begin(t)
			data(c)
			c.r.age(silentBackend - moment)
			c.answer(testenv.ACK)
			c.r.age(2 * moment)
			data(c)
		})
		t.Run(f.name+"/the client gives up", func(t *testing.T) {
			c := begin(t)
			data(c)
			c.r.age(silentBackend + moment)
			c.send(testenv.RST|testenv.ACK, "forward") // a reset is answered by none
		})
		t.Run(f.name+"/a FIN is left unanswered", func(t *testing.T) {
			c := begin(t)
			c.send(testenv.FIN|testenv.ACK, "forward")
			c.r.age(silentBackend + moment)
			reset(c, c.segment(testenv.ACK), c.upAck, 0, testenv.RST)
		})
		t.Run(f.name+"/not removed", func(t *testing.T) {
			c := begin(t)
			c.r.must(c.r.maps.SetBackendLife(1, maps.BackendLife{Generation: 3, State: maps.BackendDraining, Port: f.backend.Port()}))
			data(c)
			c.r.age(time.Hour)
			data(c)
		})
	}
}

// TestSilentClocks: the segment that is left unanswered was noted by a CPU whose clock was read later.
func TestSilentClocks(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		c := r.talk(f)
		c.open()
		r.slots(1)
		r.must(r.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: f.backend.Port()}))
		key := tuple(f.client, f.vip, lb.TCP)
		data := func() {
			t.Helper()
			p := c.segment(testenv.ACK | testenv.PSH)
			p.Payload = []byte("data")
			out := p
			out.Destination = c.at
			r.expect("node_in", p.Bytes(), pass, "forward", out.Bytes())
		}
		data()
		flow, in := r.flow(f.client, f.vip, lb.TCP)
		var now unix.Timespec
		r.must(unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
		flow.SilentSinceMs = uint32(now.Nano()/1e6+1000) | 1
		r.must(r.maps.All()[in].Put(key, flow))
		data()
	}
}

// TestLostHalf: the LRU takes one half of a flow; the next packet of the other brings it back.
func TestLostHalf(t *testing.T) {
	for _, f := range families {
		for _, lost := range []string{"forward", "reply"} {
			t.Run(f.name+"/"+lost, func(t *testing.T) {
				r := newRig(t)
				r.service(f)
				c := r.talk(f)
				c.open()
				r.age(2 * time.Second) // of silence
				key := tuple(f.client, f.vip, lb.TCP)
				if lost == "reply" {
					key = tuple(f.backend, f.client, lb.TCP)
				}
				for _, in := range []string{"flows", "pending"} {
					err := r.maps.All()[in].Delete(key)
					if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
						t.Fatal(err)
					}
				}
				r.slots(1) // nothing can be chosen anew
				if lost == "reply" {
					c.send(testenv.ACK, "forward")
				} else {
					c.answer(testenv.ACK)
				}
				if _, in := r.flow(key.From(), key.To(), lb.TCP); in != "flows" {
					t.Errorf("the lost half is in %q", in)
				}
				c.answer(testenv.ACK)
				c.send(testenv.ACK, "forward")
			})
		}
		// The half that is lost is the one that the next packet needs.
		t.Run(f.name+"/forward, and the client speaks first", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			c := r.talk(f)
			c.open()
			for _, in := range []string{"flows", "pending"} {
				r.must(r.maps.All()[in].Delete(tuple(f.client, f.vip, lb.TCP)))
			}
			c.send(testenv.ACK, "new_flow") // chosen for like a new one: the hash finds the same backend
			c.answer(testenv.ACK)
			c.send(testenv.ACK, "forward")
		})
		t.Run(f.name+"/reply, and the backend speaks first", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			c := r.talk(f)
			c.open()
			r.age(2 * time.Second)
			for _, in := range []string{"flows", "pending"} {
				r.must(r.maps.All()[in].Delete(tuple(f.backend, f.client, lb.TCP)))
			}
			lost := c.reply(testenv.ACK)
			r.expect("node_out", lost.Bytes(), pass, "no_flow", lost.Bytes()) // its client's stack resets nothing it does not know
			c.send(testenv.ACK, "forward")
			c.answer(testenv.ACK)
		})
	}
}

// TestSelection: a tuple's choice is stable, and all choices together are even.
func TestSelection(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
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
		// Chi-square with 6 degrees of freedom: 45 is exceeded once in 20 million runs.
		expected, chi := float64(clients)/backends, 0.0
		for _, n := range chosen {
			chi += (float64(n) - expected) * (float64(n) - expected) / expected
		}
		if len(chosen) != backends || chi > 45 {
			t.Errorf("%s: %d clients over %d backends, chi-square %.1f: %v", f.name, clients, len(chosen), chi, chosen)
		}
	}
}

// TestCounts: a flow counts its packets and the bytes of IP.
func TestCounts(t *testing.T) {
	f := families[0]
	r := newRig(t)
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

// TestFrontendTag: a program finds what Go has tagged, and takes an element with another key's tag for none.
func TestFrontendTag(t *testing.T) {
	r := newRig(t)
	rnd := rand.New(rand.NewPCG(1, 5))
	random := func(n int) netip.AddrPort {
		a := make([]byte, n)
		for i := range a {
			a[i] = byte(rnd.Uint32())
		}
		if a[0] = 10; n == 16 {
			a[0] = 0xfd
		}
		addr, _ := netip.AddrFromSlice(a)
		return netip.AddrPortFrom(addr, uint16(rnd.Uint32()))
	}
	frontends := r.maps.All()["frontends"]
	for i := range 2000 {
		f := families[i%2]
		vip := random(f.vip.Addr().BitLen() / 8)
		p, packet := lb.TCP, testenv.SegmentTCP(nobody(f), vip, testenv.SYN)
		if i%3 == 0 {
			p, packet = lb.UDP, testenv.DatagramUDP(nobody(f), vip, "x")
		}
		key := maps.KeyOf(lb.VIP{Addr: vip.Addr(), Port: vip.Port(), Protocol: p})
		r.must(r.maps.SetFrontend(key, maps.FrontendOf(1, lb.ClusterIP))) // which has no backend
		r.expect("node_in", packet.Bytes(), drop, "not_answered", nil)
		var value maps.Frontend
		r.must(frontends.Lookup(key, &value))
		value.KeyTag ^= 1 << (i % 16)
		r.must(frontends.Put(key, value))
		r.expect("node_in", packet.Bytes(), pass, "no_service", packet.Bytes())
		r.must(r.maps.DeleteFrontend(key))
	}
}

// TestFrontendsReused: two million lookups of a frontend that is deleted and inserted beside others in batches,
// so that their elements are reused under the reader. It finds its own service or none.
func TestFrontendsReused(t *testing.T) {
	r := newRig(t)
	f := families[0]
	const lookups, others = 2_000_000, 40
	packet := testenv.DatagramUDP(nobody(f), f.vip, "x").Bytes() // not answered, so it stays as it is
	clear(packet[:6])
	// The packet's service has no backend, all others have one: any packet that gets one is wrong.
	r.backend(1, 2, f.backend, maps.BackendActive, 1)
	r.slots(2, 1)
	key := maps.KeyOf(lb.VIP{Addr: f.vip.Addr(), Port: f.vip.Port(), Protocol: lb.UDP})
	own := maps.FrontendOf(1, lb.ClusterIP)
	own.KeyTag = key.Tag()
	keys, values := []maps.FrontendKey{key}, []maps.Frontend{own}
	for port := uint16(1000); len(keys) < others; port++ {
		k := maps.KeyOf(lb.VIP{Addr: f.vip2.Addr(), Port: port, Protocol: lb.UDP})
		if k.Tag() == key.Tag() {
			continue // one in 65,535 cannot be told apart
		}
		v := maps.FrontendOf(2, lb.ClusterIP)
		v.KeyTag = k.Tag()
		keys, values = append(keys, k), append(values, v)
	}

	var writers sync.WaitGroup
	done := make(chan struct{})
	writers.Go(func() {
		onCPU(t, 1)
		frontends := r.maps.All()["frontends"]
		for round := 0; ; round++ {
			select {
			case <-done:
				return
			default:
			}
			// Each time in another order, so that an element goes from key to key.
			at := round % len(keys)
			k := append(slices.Clone(keys[at:]), keys[:at]...)
			v := append(slices.Clone(values[at:]), values[:at]...)
			if _, err := frontends.BatchUpdate(k, v, nil); err != nil {
				t.Error(err)
				return
			}
			if _, err := frontends.BatchDelete(k, nil); err != nil {
				t.Error(err)
				return
			}
		}
	})
	before, err := r.maps.Reasons()
	r.must(err)
	ran := make(chan error)
	go func() {
		onCPU(t, 0)
		_, err := r.programs["node_in"].Run(&ebpf.RunOptions{Data: packet, Repeat: lookups})
		ran <- err
	}()
	r.must(<-ran)
	close(done)
	writers.Wait()
	after, err := r.maps.Reasons()
	r.must(err)
	counts := map[string]uint64{}
	for name, n := range after {
		if n -= before[name]; n > 0 {
			counts[name] = n
		}
	}
	if counts["not_answered"]+counts["no_service"] != lookups {
		t.Errorf("a packet met another service: %v", counts)
	}
	if counts["not_answered"] < lookups/100 || counts["no_service"] < lookups/100 {
		t.Errorf("hardly any race: %v", counts)
	}
}

// onCPU keeps the calling goroutine, which must end soon, on a CPU: the thread ends with it.
func onCPU(t *testing.T, cpu int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu % runtime.NumCPU())
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Error("pin to a CPU:", err)
	}
}

// keys returns the keys of a table.
func (r *rig) keys(in maps.Table) (keys []maps.Tuple) {
	r.t.Helper()
	r.must(r.maps.EachHalf(in, func(k maps.Tuple, _ maps.Flow) bool {
		keys = append(keys, k)
		return true
	}))
	return keys
}

// wantSwept sweeps both tables as a whole and compares how many entries went.
func (r *rig) wantSwept(when string, pending, flows int) {
	r.t.Helper()
	for _, table := range []struct {
		in   maps.Table
		want int
	}{{maps.Pending, pending}, {maps.Flows, flows}} {
		before := len(r.keys(table.in))
		removed, err := r.loader.Sweep(table.in, r.keys(table.in))
		r.must(err)
		if gone := before - len(r.keys(table.in)); removed != table.want || gone != table.want {
			r.t.Errorf("%s, table %d: %d removed, %d gone of %d; want %d", when, table.in, removed, gone, before, table.want)
		}
	}
}

// TestSweep: what has expired goes, in whichever table, and nothing else.
func TestSweep(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		r.wantSwept("empty", 0, 0)
		c := r.talk(f)
		c.open()
		r.run("node_in", testenv.DatagramUDP(f.client, f.vip, "x").Bytes())
		r.wantSwept("all alive", 0, 0)
		r.age(40 * time.Second) // UDP without an answer lives 30
		r.wantSwept("after 40 s", 2, 0)
		r.age(30 * time.Second) // what was copied lives 60
		r.wantSwept("after 70 s", 2, 0)
		c.answer(testenv.ACK)
		c.send(testenv.ACK, "forward")
		r.age(24*time.Hour + time.Second)
		r.wantSwept("after a day", 0, 2)

		// More than a step has room for, and keys that are not there.
		const clients = 50
		for i := range uint16(clients) {
			r.run("node_in", testenv.DatagramUDP(netip.AddrPortFrom(f.client.Addr(), 20000+i), f.vip, "x").Bytes())
		}
		keys := r.keys(maps.Pending)
		removed, err := r.loader.Sweep(maps.Flows, keys)
		r.must(err)
		r.age(time.Minute)
		if removed != 0 || len(keys) != 2*clients {
			t.Errorf("%d of %d removed from the other table", removed, len(keys))
		}
		r.wantSwept("many", 2*clients, 0)
	}
}

// TestSweepTakenTwin: a half whose twin's key has become another flow's goes, but not the reply half of a flow
// that leads elsewhere on purpose.
func TestSweepTakenTwin(t *testing.T) {
	for _, f := range families {
		for _, in := range []string{"flows", "pending"} {
			r := newRig(t)
			r.service(f)
			table := r.maps.All()[in]
			forward, reply := tuple(f.client, f.vip, lb.TCP), tuple(f.backend, f.client, lb.TCP)
			half := func(of maps.Tuple) (h maps.Flow) {
				t.Helper()
				r.must(table.Lookup(of, &h))
				return h
			}
			begin := func() {
				r.clearFlows()
				c := r.talk(f)
				c.open()
				if in == "flows" {
					for _, k := range r.keys(maps.Pending) {
						r.must(r.maps.All()["pending"].Delete(k))
					}
				} else {
					for _, k := range r.keys(maps.Flows) {
						r.must(r.maps.All()["flows"].Delete(k))
					}
				}
			}
			swept := func(when string, want int) {
				t.Helper()
				if in == "flows" {
					r.wantSwept(in+", "+when, 0, want)
				} else {
					r.wantSwept(in+", "+when, want, 0)
				}
			}
			for _, k := range []maps.Tuple{forward, reply} {
				begin()
				other := half(k)
				other.To.SourcePort++ // another flow's
				r.must(table.Put(k, other))
				// Both halves are without a twin of theirs: the changed one has none, the other has another's.
				swept("a twin of another flow", 1)
				half(k)

				begin()
				other.Hook = 0 // claimed, not in force
				r.must(table.Put(k, other))
				swept("a claim", 0)
			}
			begin()
			moved := half(forward)
			moved.To.Destination = f.backend2.Addr().As16()
			r.must(table.Put(forward, moved))
			old := half(reply)
			old.State |= maps.FlowMoved
			r.must(table.Put(reply, old))
			swept("moved", 0)
			r.age(11 * time.Second)
			swept("moved, expired", 1)
		}
	}
}

// TestSweepBusy: an entry whose flow another CPU is changing stays.
func TestSweepBusy(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		r.talk(f).open()
		r.age(48 * time.Hour)
		locks := r.maps.All()["flow_locks"]
		set := func(value uint32) {
			for i := range locks.MaxEntries() {
				r.must(locks.Put(i, value))
			}
		}
		set(1)
		r.wantSwept("busy", 0, 0)
		set(0)
		r.wantSwept("free again", 2, 2)
		for i := range locks.MaxEntries() {
			var value uint32
			if r.must(locks.Lookup(i, &value)); value != 0 {
				t.Fatalf("lock %d is held", i)
			}
		}
	}
}

// TestSweepBesideTraffic: flows expire all the time and are swept while packets begin them anew. Each packet is
// translated as ever, but for those that meet a busy lock, and no lock stays held.
func TestSweepBesideTraffic(t *testing.T) {
	r := newRig(t)
	const short = time.Millisecond // less than a tick of the clock
	l, err := loader.Load(r.maps, loader.Config{Timeouts: loader.Timeouts{
		TCPPending: short, TCPEstablished: short, TCPHalfClosed: short, TCPClosed: short, Reset: short, UDPPending: short, UDP: short,
	}})
	r.must(err)
	defer l.Close()
	r.programs = l.Programs()
	f := families[0]
	r.service(f)
	before, err := r.maps.Reasons()
	r.must(err)

	var sweeper sync.WaitGroup
	done := make(chan struct{})
	swept := 0
	sweeper.Go(func() {
		onCPU(t, 1)
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
				n, sweepErr := l.Sweep(in, keys)
				if err := errors.Join(err, sweepErr); err != nil {
					t.Error(err)
					return
				}
				swept += n
			}
		}
	})
	const clients, packets = 8, 30000
	var up, want [clients][]byte
	for i := range uint16(clients) {
		p := testenv.DatagramUDP(netip.AddrPortFrom(f.client.Addr(), 30000+i), f.vip, "x")
		up[i] = p.Bytes()
		p.Destination = f.backend
		want[i] = p.Bytes()
	}
	dropped := uint64(0)
	for i := range packets {
		verdict, out := r.runOnly("node_in", up[i%clients])
		if verdict == drop {
			dropped++
		} else if !bytes.Equal(out, want[i%clients]) {
			t.Errorf("packet %d became %s", i, testenv.Describe(out))
			break
		}
	}
	close(done)
	sweeper.Wait()
	after, err := r.maps.Reasons()
	r.must(err)
	if busy := after["lock_busy"] - before["lock_busy"]; busy != dropped || busy > packets/100 {
		t.Errorf("%d packets dropped, %d of them at busy locks", dropped, busy)
	}
	if swept < clients {
		t.Errorf("only %d entries were swept", swept)
	}
	locks := r.maps.All()["flow_locks"]
	for i := range locks.MaxEntries() {
		var value uint32
		if r.must(locks.Lookup(i, &value)); value != 0 {
			t.Errorf("lock %d is held", i)
		}
	}
}

// TestPhase holds what flow_timeout_ns of bpf/flow.h says, a row to a line of it.
func TestPhase(t *testing.T) {
	timeouts := loader.DefaultTimeouts()
	both := maps.FlowClientFIN | maps.FlowBackendFIN
	for _, c := range []struct {
		state    uint8
		in       maps.Table
		protocol lb.Protocol
		want     string
		timeout  time.Duration
	}{
		{0, maps.Pending, lb.TCP, "pending", timeouts.TCPPending},
		{0, maps.Flows, lb.TCP, "established", timeouts.TCPEstablished},
		{maps.FlowClientFIN, maps.Flows, lb.TCP, "half-closed", timeouts.TCPHalfClosed},
		{maps.FlowBackendFIN, maps.Flows, lb.TCP, "half-closed", timeouts.TCPHalfClosed},
		{maps.FlowRSTAhead, maps.Flows, lb.TCP, "half-closed", timeouts.TCPHalfClosed},
		{maps.FlowClientFIN, maps.Pending, lb.TCP, "pending", timeouts.TCPPending},
		{both, maps.Flows, lb.TCP, "closed", timeouts.TCPClosed},
		{both, maps.Pending, lb.TCP, "closed", timeouts.TCPClosed},
		{both | maps.FlowClientRST, maps.Flows, lb.TCP, "reset", timeouts.Reset},
		{maps.FlowBackendRST, maps.Pending, lb.TCP, "reset", timeouts.Reset},
		{0, maps.Pending, lb.UDP, "pending", timeouts.UDPPending},
		{0, maps.Flows, lb.UDP, "assured", timeouts.UDP},
		{maps.FlowMoved, maps.Flows, lb.UDP, "reset", timeouts.Reset},
	} {
		if state, timeout := timeouts.Phase(c.state, uint8(c.protocol), c.in); state != c.want || timeout != c.timeout {
			t.Errorf("%s in state %d: %s, %v; want %s, %v", c.protocol, c.state, state, timeout, c.want, c.timeout)
		}
	}
}
