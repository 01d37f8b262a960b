// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// What the programs answer themselves: resets, port unreachable, echo replies, and what a pod says to itself.

// tick is of the programs' clock, which may be late by one.
const tick = 10 * time.Millisecond

// icmpLimit is struct icmp_limit of a CPU.
type icmpLimit struct{ LastNs, Tokens uint64 }

// setLimit says on every CPU how many ICMP errors it may send, and since when that is so.
func (r *rig) setLimit(l icmpLimit) {
	r.t.Helper()
	m := r.maps.All()["icmp_limits"]
	var all []icmpLimit
	r.must(m.Lookup(uint32(0), &all))
	for i := range all {
		all[i] = l
	}
	r.must(m.Put(uint32(0), all))
}

// answers runs a program on a packet, and compares what is sent back by the same device with `want`, to the
// addresses of the link, which are turned.
func (r *rig) answers(program string, frame []byte, reason string, want testenv.Packet) {
	r.t.Helper()
	frame = slices.Clone(frame)
	if program == "port_in" {
		copy(frame, otherMAC[:])
	} else {
		clear(frame[:6]) // the loopback device's address
	}
	out := want.Bytes()
	copy(out, frame[6:12])
	copy(out[6:], frame[:6])
	kept := r.keepMAC
	r.keepMAC = true
	got := r.run(program, frame)
	r.keepMAC = kept
	if got.Verdict != sentBack || got.Reason != reason || !bytes.Equal(got.Frame, out) {
		r.t.Errorf("%s of %s: verdict %d, reason %s\n got %s\nwant %s, %s\n%s", program, testenv.Describe(frame),
			int32(got.Verdict), got.Reason, testenv.Describe(got.Frame), testenv.Describe(out), reason, cmp.Diff(out, got.Frame))
	}
}

var ingressPrograms = []string{"pod_in", "port_in", "node_in"}

// unreachable is the error that says that nobody listens at a frame's port: it quotes the IP header and the
// transport's.
func unreachable(frame []byte) testenv.Packet {
	return icmpAbout(frame, [2]uint8{3, 3}, [2]uint8{1, 4})
}

// timeExceeded says that a frame's time is exceeded.
func timeExceeded(frame []byte) testenv.Packet {
	return icmpAbout(frame, [2]uint8{11, 0}, [2]uint8{3, 0})
}

func icmpAbout(frame []byte, v4, v6 [2]uint8) testenv.Packet {
	p, err := testenv.Parse(frame)
	if err != nil {
		panic(err)
	}
	at, _ := testenv.Locate(frame)
	header := 8
	if at.Protocol == testenv.TCP {
		header = int(frame[at.Transport+12]>>4) * 4
	}
	e := testenv.Packet{
		Source:      netip.AddrPortFrom(p.Destination.Addr(), 0),
		Destination: netip.AddrPortFrom(p.Source.Addr(), 0),
		Protocol:    testenv.ICMP, ICMPType: v4[0], ICMPCode: v4[1], DontFragment: true,
		Payload: frame[at.Network : at.Transport+header],
	}
	if p.Source.Addr().Is6() {
		e.Protocol, e.ICMPType, e.ICMPCode, e.DontFragment = testenv.ICMPv6, v6[0], v6[1], false
	}
	return e
}

// resetOf is the reset that answers a segment.
func resetOf(p testenv.Packet, seq, ack uint32, flags uint8) testenv.Packet {
	r := testenv.SegmentTCP(p.Destination, p.Source, flags)
	r.Seq, r.Ack, r.Window, r.DontFragment = seq, ack, 0, p.Source.Addr().Is4()
	return r
}

// TestReject: what is sent to a service without endpoints is answered, at every ingress hook, by the right bytes.
func TestReject(t *testing.T) {
	const syn, ack, fin, psh, rst = testenv.SYN, testenv.ACK, testenv.FIN, testenv.PSH, testenv.RST
	for _, f := range families {
		r := newPort(t)
		r.frontend(f.vip, 1)
		for _, program := range ingressPrograms {
			for _, c := range []struct {
				name     string
				flags    uint8
				payload  string
				seq, ack uint32 // of the segment
				want     uint8  // flags of the reset
				wantSeq  uint32
				wantAck  uint32
			}{
				{"SYN", syn, "", 1000, 0, rst | ack, 0, 1001},
				{"SYN with data", syn, "hello", 1000, 0, rst | ack, 0, 1006},
				{"SYN at the end of the numbers", syn, "hello", 1<<32 - 2, 0, rst | ack, 0, 4},
				{"ACK", ack, "", 1000, 5000, rst, 5000, 0},
				{"data", ack | psh, "hello", 1000, 5000, rst, 5000, 0},
				{"FIN", fin | ack, "", 1000, 5000, rst, 5000, 0},
				{"FIN with data, no ACK", fin, "hello", 1000, 5000, rst | ack, 0, 1006},
				{"SYN and ACK", syn | ack, "", 1000, 5000, rst, 5000, 0},
				{"no flag", 0, "abc", 1000, 5000, rst | ack, 0, 1003},
			} {
				t.Run(f.name+"/"+program+"/"+c.name, func(t *testing.T) {
					r.t = t
					p := testenv.SegmentTCP(f.client, f.vip, c.flags)
					p.Seq, p.Ack, p.Payload = c.seq, c.ack, []byte(c.payload)
					p.TCPOptions = []byte{2, 4, 5, 0xb4}
					r.answers(program, p.Bytes(), "no_backend", resetOf(p, c.wantSeq, c.wantAck, c.want))
				})
			}
			for _, c := range []struct {
				name, only string
				change     func(*testenv.Packet)
			}{
				{"", "", func(*testenv.Packet) {}},
				{"no payload", "", func(p *testenv.Packet) { p.Payload = nil }},
				{"a large payload", "", func(p *testenv.Packet) { p.Payload = make([]byte, 1400) }},
				{"an odd payload", "", func(p *testenv.Packet) { p.Payload = []byte{1, 2, 3} }},
				{"no checksum", "", func(p *testenv.Packet) { p.NoChecksum = true }},
				{"of another class, at its last hop", "", func(p *testenv.Packet) { p.TOS, p.TTL, p.ID = 0xb8, 1, 77 }},
				{"IP options", "v4", func(p *testenv.Packet) { p.IPOptions = bytes.Repeat([]byte{1}, 40) }},
				{"extension headers", "v6", func(p *testenv.Packet) {
					p.Extensions = []testenv.Extension{{Type: unix.IPPROTO_HOPOPTS}, {Type: unix.IPPROTO_DSTOPTS, Body: make([]byte, 254)}}
				}},
			} {
				if c.only != "" && c.only != f.name {
					continue
				}
				t.Run(f.name+"/"+program+"/UDP "+c.name, func(t *testing.T) {
					r.t = t
					r.setLimit(icmpLimit{})
					p := with(testenv.DatagramUDP(f.client, f.vip, "hello"), c.change)
					frame := p.Bytes()
					r.answers(program, frame, "no_backend", unreachable(frame))
					// Of a padded frame, no more.
					r.answers(program, append(frame, 0, 0, 0, 0, 0), "no_backend", unreachable(frame))
				})
			}
		}
	}
}

// nobodies are sources that no answer may be sent to.
func nobodies(f family) map[string]netip.Addr {
	if f.name == "v4" {
		return map[string]netip.Addr{
			"multicast": f.multicast, "broadcast": netip.MustParseAddr("255.255.255.255"), "unspecified": netip.MustParseAddr("0.0.0.0"),
			"this network": netip.MustParseAddr("0.1.2.3"), "loopback": netip.MustParseAddr("127.3.2.1"),
		}
	}
	return map[string]netip.Addr{"multicast": f.multicast, "unspecified": netip.IPv6Unspecified(), "loopback": netip.IPv6Loopback()}
}

// nobody is one of them.
func nobody(f family) netip.AddrPort {
	return netip.AddrPortFrom(nobodies(f)["loopback"], f.client.Port())
}

// TestNotAnswered: what must not be answered, or cannot be, is dropped for that reason, and costs no other its
// answer.
func TestNotAnswered(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.frontend(f.vip, 1)
		r.address(f.vip.Addr(), maps.AddressClusterIP)
		limit := func() icmpLimit {
			t.Helper()
			var all []icmpLimit
			r.must(r.maps.All()["icmp_limits"].Lookup(uint32(0), &all))
			return all[0]
		}
		before := limit()
		for name, source := range nobodies(f) {
			from := netip.AddrPortFrom(source, 40000)
			for _, p := range []testenv.Packet{
				testenv.SegmentTCP(from, f.vip, testenv.SYN), testenv.DatagramUDP(from, f.vip, "hello"), echo(from, f.vip, "hello"),
			} {
				t.Run(fmt.Sprintf("%s/%s source/protocol %d", f.name, name, p.Protocol), func(t *testing.T) {
					r.t = t
					r.address(f.vip.Addr(), maps.AddressClusterIP)
					r.expect("pod_in", p.Bytes(), drop, "not_answered", nil)
					if p.Protocol != testenv.TCP && p.Protocol != testenv.UDP {
						r.address(f.vip.Addr(), maps.AddressEcho)
						r.expect("pod_in", p.Bytes(), drop, "not_answered", nil)
					}
				})
			}
		}
		r.t = t
		r.address(f.vip.Addr(), maps.AddressClusterIP)
		// Hosts, though they may look like none of them.
		near := []string{"128.0.0.1", "223.255.255.255", "126.255.255.255", "1.0.0.0", "240.0.0.1", "10.255.255.255", "255.255.255.254"}
		if f.name == "v6" {
			near = []string{"::2", "::1:0", "1::", "fe80::1", "feff::1"}
		}
		for _, source := range near {
			p := testenv.SegmentTCP(netip.AddrPortFrom(netip.MustParseAddr(source), 40000), f.vip, testenv.SYN)
			r.answers("pod_in", p.Bytes(), "no_backend", resetOf(p, 0, 1, testenv.RST|testenv.ACK))
		}

		segment := testenv.SegmentTCP(f.client, f.vip, testenv.SYN)
		segment.IPOptions = []byte{1, 1, 1, 0}
		if f.name == "v6" {
			segment.Extensions = []testenv.Extension{{Type: unix.IPPROTO_DSTOPTS}}
		}
		r.expect("pod_in", segment.Bytes(), drop, "not_answered", nil)
		reset := testenv.SegmentTCP(f.client, f.vip, testenv.RST)
		r.expect("pod_in", reset.Bytes(), drop, "stray_rst", nil)
		if after := limit(); after != before {
			t.Errorf("%s: what is not answered is counted: %v, %v", f.name, before, after)
		}
		tagged := testenv.DatagramUDP(f.client, f.vip, "hello")
		tagged.VLAN = []uint16{5} // inside the frame: the kernel makes no room behind it
		r.expect("pod_in", tagged.Bytes(), drop, "not_answered", nil)
		for _, fragment := range testenv.DatagramUDP(f.client, f.vip, "more than eight octets").Fragments(7, 16) {
			r.expect("pod_in", fragment, drop, "vip_fragment", nil)
		}
	}
}

// TestICMPLimit: a CPU sends 50 ICMP errors at once and 1,000 a second, however many are due.
func TestICMPLimit(t *testing.T) {
	// The limit is each CPU's own.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	one.Set(0)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	defer unix.SchedSetaffinity(0, &all)
	for _, f := range families {
		r := newRig(t)
		r.frontend(f.vip, 1)
		r.address(f.vip.Addr(), maps.AddressEcho)
		udp := testenv.DatagramUDP(f.client, f.vip, "hello").Bytes()
		// flood returns how many of `packets` are answered before the first that is not, and how many in all.
		flood := func(packets int) (first, total int) {
			limited := false
			for range packets {
				if verdict, _ := r.runOnly("pod_in", udp); verdict == sentBack {
					total++
				} else {
					limited = true
				}
				if !limited {
					first++
				}
			}
			return first, total
		}
		// check floods after it has been idle, with some tokens left from before.
		check := func(what string, idle time.Duration, left uint64, tokens int) {
			t.Helper()
			const packets = 3000
			start := time.Now()
			r.setLimit(icmpLimit{LastNs: monotonic(t) - uint64(idle), Tokens: left})
			first, total := flood(packets)
			took := time.Since(start)
			most := min(50, tokens+int((idle+tick)/time.Millisecond)) + int((took+tick)/time.Millisecond)
			if first < tokens || total > most {
				t.Errorf("%s, %s: %d errors, then %d of %d in %v; want at least %d, then at most %d", f.name, what, first, total, packets, took, tokens, most)
			}
		}
		check("a full bucket", 0, 50, 50)
		// Resets and echo replies are not limited, nor do they take from it.
		r.setLimit(emptied(t))
		if got := r.run("pod_in", udp); got.Verdict != drop || got.Reason != "reject_limited" {
			t.Errorf("%s: an empty bucket: %d, %s", f.name, got.Verdict, got.Reason)
		}
		for range 100 {
			p := testenv.SegmentTCP(f.client, f.vip, testenv.SYN)
			r.answers("pod_in", p.Bytes(), "no_backend", resetOf(p, 0, 1, testenv.RST|testenv.ACK))
			ping := echo(f.client, f.vip, "hello")
			r.answers("pod_in", ping.Bytes(), "echo", replyOf(ping))
		}
		check("after 20 ms", 20*time.Millisecond, 0, 20-int(tick/time.Millisecond))
		check("after an hour", time.Hour, 7, 50)
	}
}

func monotonic(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano())
}

// emptied is the state of a CPU that may send nothing for a while.
func emptied(t *testing.T) icmpLimit {
	t.Helper()
	return icmpLimit{LastNs: monotonic(t) + uint64(time.Minute)}
}

// echo is an echo request.
func echo(from, to netip.AddrPort, payload string) testenv.Packet {
	p := testenv.Packet{
		Source: netip.AddrPortFrom(from.Addr(), 0), Destination: netip.AddrPortFrom(to.Addr(), 0),
		Protocol: testenv.ICMP, ICMPType: 8, ICMPRest: 0x12340007, Payload: []byte(payload), ID: 9,
	}
	if to.Addr().Is6() {
		p.Protocol, p.ICMPType, p.ID = testenv.ICMPv6, 128, 0
	}
	return p
}

// replyOf is the reply to an echo request.
func replyOf(p testenv.Packet) testenv.Packet {
	p.Source, p.Destination, p.TTL = p.Destination, p.Source, 64
	p.ICMPType = map[uint8]uint8{testenv.ICMP: 0, testenv.ICMPv6: 129}[p.Protocol]
	return p
}

// TestEcho: echo requests to a VIP are answered while it has endpoints; to a ClusterIP without, rejected; to what
// is also somebody else's, left alone.
func TestEcho(t *testing.T) {
	const clusterIP, echoed = maps.AddressClusterIP, maps.AddressEcho
	for _, f := range families {
		r := newPort(t)
		r.service(f)
		for _, program := range ingressPrograms {
			for _, payload := range []string{"", "a", "hello, there", string(make([]byte, 1400))} {
				p := echo(f.client, f.vip, payload)
				p.TTL, p.TOS = 3, 0xb8
				for _, flags := range []uint8{echoed, echoed | clusterIP} {
					r.address(f.vip.Addr(), flags)
					r.answers(program, p.Bytes(), "echo", replyOf(p))
				}
				r.setLimit(icmpLimit{})
				r.address(f.vip.Addr(), clusterIP)
				r.answers(program, p.Bytes(), "no_backend", unreachable(p.Bytes()))
				if program != "port_in" {
					r.keepMAC = false
					r.address(f.vip.Addr(), 0)
					r.expect(program, p.Bytes(), pass, "unsupported", p.Bytes())
					r.keepMAC = true
				}
			}
		}
		// A wrong checksum stays as wrong as it was, so that whoever asked throws the reply away.
		r.address(f.vip.Addr(), echoed)
		p := echo(f.client, f.vip, "hello")
		frame, want := p.Bytes(), replyOf(p).Bytes()
		clear(frame[:6])
		at, err := testenv.Locate(frame)
		r.must(err)
		frame[at.End-1] ^= 0x40
		want[at.End-1] ^= 0x40
		got := r.run("pod_in", frame)
		copy(got.Frame, want[:12])
		if got.Reason != "echo" || !bytes.Equal(got.Frame, want) {
			t.Errorf("%s: a wrong sum: %s, %s", f.name, got.Reason, testenv.Describe(got.Frame))
		}

		// Not to others: where the switch has sent it to all ports.
		foreign := sentTo(otherMAC, p).Bytes()
		r.expect("node_in", foreign, pass, "unsupported", foreign)
	}
}

// TestNotEcho: ICMP to a ClusterIP that is no plain echo request is dropped, whether requests are answered or not.
func TestNotEcho(t *testing.T) {
	for _, f := range families {
		plain := echo(f.client, f.vip, "sixteen octets..")
		quoted := testenv.DatagramUDP(f.vip, f.client, "x").Bytes()
		for name, c := range map[string]struct {
			only   string
			change func(*testenv.Packet)
			reason string
		}{
			"a reply":             {"", func(p *testenv.Packet) { p.ICMPType = replyOf(*p).ICMPType }, "vip_unsupported"},
			"an error":            {"", func(p *testenv.Packet) { p.ICMPType, p.Payload = unreachable(quoted).ICMPType, quoted[14:] }, "vip_unsupported"},
			"ICMP of IPv6":        {"v4", func(p *testenv.Packet) { p.ICMPType = 128 }, "vip_unsupported"},
			"ICMP of IPv4":        {"v6", func(p *testenv.Packet) { p.ICMPType = 8 }, "vip_unsupported"},
			"the other protocol":  {"", func(p *testenv.Packet) { p.Protocol ^= testenv.ICMP ^ testenv.ICMPv6 }, "vip_unsupported"},
			"a timestamp request": {"v4", func(p *testenv.Packet) { p.ICMPType = 13 }, "vip_unsupported"},
			"options":             {"v4", func(p *testenv.Packet) { p.IPOptions = []byte{1, 1, 1, 0} }, "vip_unsupported"},
			"extension headers":   {"v6", func(p *testenv.Packet) { p.Extensions = []testenv.Extension{{Type: unix.IPPROTO_DSTOPTS}} }, "vip_unsupported"},
			"first fragment":      {"v4", func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 1, More: true} }, "vip_unsupported"},
			"later fragment":      {"", func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 1, Offset: 8} }, "vip_fragment"},
		} {
			if c.only != "" && c.only != f.name {
				continue
			}
			t.Run(f.name+"/"+name, func(t *testing.T) {
				r := newRig(t)
				r.service(f)
				frame := with(plain, c.change).Bytes()
				for _, flags := range []uint8{maps.AddressClusterIP, maps.AddressClusterIP | maps.AddressEcho} {
					r.address(f.vip.Addr(), flags)
					r.expect("pod_in", frame, drop, c.reason, nil)
				}
			})
		}
		t.Run(f.name+"/cut", func(t *testing.T) {
			r := newRig(t)
			r.service(f)
			r.address(f.vip.Addr(), maps.AddressClusterIP|maps.AddressEcho)
			p := plain
			p.Payload = nil
			frame := p.Bytes()
			at, err := testenv.Locate(frame)
			r.must(err)
			// The frame goes on, the packet does not.
			if f.name == "v4" {
				binary.BigEndian.PutUint16(frame[at.Network+2:], 20+7)
			} else {
				binary.BigEndian.PutUint16(frame[at.Network+4:], 7)
			}
			r.expect("pod_in", frame, drop, "vip_unsupported", nil)
		})
	}
}

// hairpinOf is what a pod sees as its client.
func hairpinOf(f family) netip.Addr {
	h := loader.DefaultHairpin()
	if f.name == "v4" {
		return h[0]
	}
	return h[1]
}

// hairpin is a conversation of a pod with itself, packet by packet, through one program.
type hairpin struct {
	*rig
	f        family
	program  string
	protocol lb.Protocol
	vip      netip.AddrPort
	backend  netip.AddrPort // the client's own address
	as       netip.AddrPort // by which the pod knows itself
}

func newHairpin(t *testing.T, f family, program string, p lb.Protocol) *hairpin {
	r := newPort(t)
	h := &hairpin{r, f, program, p, f.vip, netip.AddrPortFrom(f.client.Addr(), 8080), netip.AddrPortFrom(hairpinOf(f), f.client.Port())}
	r.backend(1, 1, h.backend, maps.BackendActive, 1)
	r.slots(1, 1)
	r.frontend(f.vip, 1)
	r.identity(h.backend)
	return h
}

func (h *hairpin) packet(from, to netip.AddrPort, flags uint8, seq, ack uint32) testenv.Packet {
	p := testenv.DatagramUDP(from, to, "hello")
	if h.protocol == lb.TCP {
		p = testenv.SegmentTCP(from, to, flags)
		p.Seq, p.Ack, p.Payload = seq, ack, []byte("hello")
		if flags&testenv.SYN != 0 {
			p.Payload = nil
		}
	}
	p.TTL = 64
	return p
}

// passes takes what is sent back past the device's egress program, which leaves it alone.
func (h *hairpin) passes(p testenv.Packet) {
	h.t.Helper()
	h.expect("pod_out", p.Bytes(), pass, "no_flow", p.Bytes())
}

func (h *hairpin) up(flags uint8, seq, ack uint32, reason string) {
	h.t.Helper()
	p := h.packet(h.f.client, h.vip, flags, seq, ack)
	out := p
	out.Source, out.Destination, out.TTL = h.as, h.backend, 63
	h.answers(h.program, p.Bytes(), reason, out)
	h.passes(out)
}

func (h *hairpin) down(flags uint8, seq, ack uint32) {
	h.t.Helper()
	p := h.packet(h.backend, h.as, flags, seq, ack)
	out := p
	out.Source, out.Destination, out.TTL = h.vip, h.f.client, 63
	h.answers(h.program, p.Bytes(), "reply", out)
	h.passes(out)
}

// in checks where the flow is and at which hook its halves apply.
func (h *hairpin) in(table string) {
	h.t.Helper()
	for _, key := range [][2]netip.AddrPort{{h.f.client, h.vip}, {h.backend, h.as}} {
		flow, in := h.flow(key[0], key[1], h.protocol)
		if in != table || flow.Hook != maps.AtIngress {
			h.t.Errorf("%s > %s is in %q, at hook %d; want %q", key[0], key[1], in, flow.Hook, table)
		}
	}
}

const (
	syn    = testenv.SYN
	synAck = testenv.SYN | testenv.ACK
	ack    = testenv.ACK
	finAck = testenv.FIN | testenv.ACK
)

// open is the handshake.
func (h *hairpin) open() {
	h.t.Helper()
	h.up(syn, 1000, 0, "new_flow")
	h.in("pending")
	h.down(synAck, 5000, 1001)
	h.up(ack, 1001, 5001, "forward")
	h.in("flows")
	h.down(ack, 5001, 1006)
}

func eachHairpin(t *testing.T, test func(t *testing.T, h *hairpin)) {
	for _, f := range families {
		for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
			for _, program := range ingressPrograms {
				t.Run(f.name+"/"+p.String()+"/"+program, func(t *testing.T) { test(t, newHairpin(t, f, program, p)) })
			}
		}
	}
}

// TestHairpin: a pod that is its own endpoint, there and back, from the first packet to the last.
func TestHairpin(t *testing.T) {
	eachHairpin(t, func(t *testing.T, h *hairpin) {
		h.open()
		// What is older than a second is noted in both halves.
		h.age(2 * time.Second)
		h.up(ack, 1006, 5006, "forward")
		h.age(2 * time.Second)
		h.down(ack, 5006, 1011)
		h.in("flows")

		// Another generation, the same backend: a reply asks nobody, the client's next packet refreshes it.
		h.must(h.maps.SetBackendLife(1, maps.BackendLife{Generation: 2, State: maps.BackendDraining, Port: h.backend.Port()}))
		h.down(ack, 5011, 1011)
		h.up(ack, 1011, 5016, "forward")
		// A removed one.
		h.slots(1)
		h.must(h.maps.SetBackendLife(1, maps.BackendLife{Generation: 3, State: maps.BackendRemoved, Port: h.backend.Port()}))
		h.down(ack, 5016, 1016)
		if h.protocol == lb.TCP {
			h.up(ack, 1016, 5021, "forward")
			h.age(silentBackend - 10*time.Second)
			h.down(ack, 5021, 1021)
			h.age(20 * time.Second)
			h.up(ack, 1021, 5026, "forward")
			h.age(silentBackend + time.Second)
			p := h.packet(h.f.client, h.vip, ack, 1026, 5026)
			h.answers(h.program, p.Bytes(), "silent_backend", resetOf(p, 5026, 0, testenv.RST))
		} else {
			p := h.packet(h.f.client, h.vip, 0, 0, 0).Bytes()
			h.answers(h.program, p, "no_backend", unreachable(p))
		}
		h.age(25 * time.Hour)
		expired := len(h.keys(maps.Flows))
		h.wantSwept("after a day", len(h.keys(maps.Pending)), expired)
		if expired != 2 {
			t.Errorf("%d halves were in `flows`", expired)
		}
		late := h.packet(h.backend, h.as, ack, 1, 1)
		h.keepMAC = false
		h.expect("pod_in", late.Bytes(), drop, "no_hairpin", nil)
	})
}

// TestHairpinTTL: its last hop is here.
func TestHairpinTTL(t *testing.T) {
	eachHairpin(t, func(t *testing.T, h *hairpin) {
		dying := func(p testenv.Packet, ttl uint8) {
			t.Helper()
			p.TTL = ttl
			frame := p.Bytes()
			if ttl == 0 { // which Bytes takes for 64
				at := map[string]int{"v4": 14 + 8, "v6": 14 + 7}[h.f.name]
				frame[at] = 0
			}
			h.answers(h.program, frame, "time_exceeded", timeExceeded(frame))
		}
		dying(h.packet(h.f.client, h.vip, syn, 1000, 0), 1)
		h.up(syn, 1000, 0, "forward") // the flow was begun, and is its retransmission's
		dying(h.packet(h.backend, h.as, synAck, 5000, 1001), 1)
		h.down(synAck, 5000, 1001)
		h.up(ack, 1001, 5001, "forward")
		h.in("flows")
		dying(h.packet(h.f.client, h.vip, ack, 1006, 5001), 1)
		dying(h.packet(h.backend, h.as, ack, 5001, 1006), 1)
		if h.f.name == "v6" {
			dying(h.packet(h.f.client, h.vip, ack, 1006, 5001), 0)
		}
		p := h.packet(h.f.client, h.vip, ack, 1006, 5001)
		p.TTL = 2
		out := p
		out.Source, out.Destination, out.TTL = h.as, h.backend, 1
		h.answers(h.program, p.Bytes(), "forward", out)

		h.setLimit(emptied(t))
		p.TTL = 1
		frame := p.Bytes()
		clear(frame[:6])
		if got := h.run("pod_in", frame); got.Verdict != drop || got.Reason != "reject_limited" {
			t.Errorf("beyond the limit: %d, %s", got.Verdict, got.Reason)
		}
		if h.program != "pod_in" || h.protocol != lb.UDP {
			return
		}
		// Every word that begins with a TTL, so that the sum's carry is met.
		for ttl := 2; ttl < 256; ttl++ {
			for _, id := range []uint16{0, 0x1234, uint16(ttl) * 257} {
				p.TTL, p.ID = uint8(ttl), id
				out.TTL, out.ID = uint8(ttl-1), id
				h.answers(h.program, p.Bytes(), "forward", out)
			}
		}
	})
}

// TestHairpinEnds: FIN and RST end a hairpin flow, and a SYN begins it anew.
func TestHairpinEnds(t *testing.T) {
	for _, f := range families {
		h := newHairpin(t, f, "pod_in", lb.TCP)
		again := func() {
			t.Helper()
			h.up(syn, 1000, 0, "new_flow")
			h.down(synAck, 5000, 1001)
			h.up(ack, 1001, 5001, "forward")
			h.down(ack, 5001, 1006)
			h.in("flows")
		}
		h.open()
		h.up(finAck, 1006, 5006, "forward")
		h.down(finAck, 5006, 1012)
		h.age(50 * time.Second)
		again()
		h.down(testenv.RST|testenv.ACK, 5001, 1006)
		again()
		h.down(finAck, 5006, 1006)
		h.up(finAck, 1006, 5012, "forward")
		h.age(61 * time.Second)
		if got := h.run("pod_out", h.packet(h.backend, h.as, ack, 1, 1).Bytes()); got.Reason != "no_flow" {
			t.Errorf("%s: an ended flow at egress: %s", f.name, got.Reason)
		}
		again()
	}
}

// TestHairpinLostHalf: the table loses one half of a hairpin flow; the other brings it back as it was.
func TestHairpinLostHalf(t *testing.T) {
	eachHairpin(t, func(t *testing.T, h *hairpin) {
		for _, lost := range []string{"forward", "reply"} {
			h.clearFlows()
			h.open()
			key := tuple(h.f.client, h.vip, h.protocol)
			if lost == "reply" {
				key = tuple(h.backend, h.as, h.protocol)
			}
			for _, in := range []string{"flows", "pending"} {
				h.must(h.maps.All()[in].Delete(key))
			}
			h.age(2 * time.Second)
			if lost == "reply" {
				h.up(ack, 1006, 5006, "forward")
				h.down(ack, 5006, 1011)
			} else {
				h.down(ack, 5006, 1006)
				h.up(ack, 1006, 5011, "forward")
			}
			h.in("flows")
			h.up(ack, 1011, 5011, "forward")
			h.down(ack, 5011, 1016)
		}
		// Before it is assured: the flow is begun again and finds its reply half.
		h.clearFlows()
		h.up(syn, 1000, 0, "new_flow")
		h.must(h.maps.All()["pending"].Delete(tuple(h.f.client, h.vip, h.protocol)))
		h.up(syn, 1000, 0, "new_flow")
		h.down(synAck, 5000, 1001)
		h.up(ack, 1001, 5001, "forward")
		h.in("flows")
		h.down(ack, 5001, 1006)
	})
}

// TestHairpinRace: two CPUs begin a hairpin flow at once. Neither passes a packet to the stack, and its answer comes
// back.
func TestHairpinRace(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: races need many tries, at speed")
	}
	for _, f := range families {
		h := newHairpin(t, f, "pod_in", lb.TCP)
		h.keepMAC = false
		client := func(i int) netip.AddrPort { return netip.AddrPortFrom(f.client.Addr(), uint16(10000+i)) }
		begin := func(c *cpu, i int) {
			p := testenv.SegmentTCP(client(i), f.vip, testenv.SYN)
			c.run("pod_in", p)
			c.run("pod_in", p)
		}
		together(t, h.rig, races, func(int) {}, [2]func(*cpu, int){begin, begin}, func(i int, all []sent) {
			for _, s := range all {
				if s.verdict == pass {
					t.Errorf("%s is passed as %s", testenv.Describe(s.packet.Bytes()), testenv.Describe(s.out.Bytes()))
				}
			}
			c := &cpu{r: h.rig}
			if s := c.run("pod_in", testenv.SegmentTCP(h.backend, netip.AddrPortFrom(h.as.Addr(), client(i).Port()), testenv.SYN|testenv.ACK)); s.verdict != sentBack {
				t.Errorf("an answer is not sent back: %d", int32(s.verdict))
			}
		})
	}
}

// TestHairpinClash: a pod speaks to itself by two Services from one port; each answer finds its way.
func TestHairpinClash(t *testing.T) {
	eachHairpin(t, func(t *testing.T, h *hairpin) {
		h.open()
		h.backend2At(h.backend)
		other := *h
		other.vip = h.f.vip2
		p := other.packet(h.f.client, other.vip, syn, 1000, 0)
		frame := p.Bytes()
		clear(frame[:6])
		got := h.run("pod_in", frame)
		seen, err := testenv.Parse(got.Frame)
		h.must(err)
		if got.Reason != "new_flow" || seen.Source.Addr() != h.as.Addr() || seen.Source.Port() == h.as.Port() || seen.Destination != h.backend {
			t.Fatalf("%s: %s", got.Reason, testenv.Describe(got.Frame))
		}
		other.as = seen.Source
		other.up(syn, 1000, 0, "forward")
		other.down(synAck, 5000, 1001)
		other.up(ack, 1001, 5001, "forward")
		other.in("flows")
		other.down(ack, 5001, 1006)
		h.up(ack, 1006, 5006, "forward")
		h.down(ack, 5006, 1011)
		h.in("flows")
	})
}

// backend2At makes vip2 a second service with a backend there.
func (h *hairpin) backend2At(at netip.AddrPort) {
	h.backendOf(2, 2, at)
	h.slots(2, 2)
	h.frontend(h.f.vip2, 2)
}

func (h *hairpin) backendOf(id, service uint32, at netip.AddrPort) {
	h.rig.backend(id, service, at, maps.BackendActive, 1)
}

// TestHairpinAmongOthers: of two endpoints one is the client itself. What goes to the other goes by the stack, as
// does another client's.
func TestHairpinAmongOthers(t *testing.T) {
	for _, f := range families {
		h := newHairpin(t, f, "pod_in", lb.UDP)
		h.backendOf(2, 1, f.backend)
		h.slots(1, 1, 2)
		h.keepMAC = false
		seen := map[string]int{}
		for port := range uint16(64) {
			client := netip.AddrPortFrom(f.client.Addr(), 50000+port)
			p := testenv.DatagramUDP(client, f.vip, "hello")
			got := h.run("pod_in", p.Bytes())
			out, err := testenv.Parse(got.Frame)
			h.must(err)
			switch {
			case out.Destination == f.backend && out.Source == client && got.Verdict == pass && out.TTL == 64:
				seen["other"]++
				back := testenv.DatagramUDP(f.backend, client, "hello").Bytes()
				h.expect("pod_in", back, pass, "no_service", back)
			case out.Destination == h.backend && out.Source == netip.AddrPortFrom(h.as.Addr(), client.Port()) && got.Verdict == sentBack && out.TTL == 63:
				seen["itself"]++
			default:
				t.Errorf("%s: %d, %s", f.name, int32(got.Verdict), testenv.Describe(got.Frame))
			}
		}
		if seen["other"] < 8 || seen["itself"] < 8 {
			t.Errorf("%s: of 64 flows %v", f.name, seen)
		}
		// A client that has the hairpin address of its own making is like any other.
		h.clearFlows()
		h.slots(1, 2)
		p := testenv.DatagramUDP(h.as, f.vip, "hello")
		out := p
		out.Destination = f.backend
		h.expect("node_in", p.Bytes(), pass, "new_flow", out.Bytes())
		back := testenv.DatagramUDP(f.backend, h.as, "hello")
		h.expect("pod_in", back.Bytes(), pass, "other_hook", back.Bytes())
	}
}

// TestHairpinClaim: an answer that comes while another CPU makes its flow anew, and has the reply half claimed and no
// more, does not reach the host's stack.
func TestHairpinClaim(t *testing.T) {
	eachHairpin(t, func(t *testing.T, h *hairpin) {
		h.up(syn, 1000, 0, "new_flow")
		key := tuple(h.backend, h.as, h.protocol)
		var half maps.Flow
		h.must(h.maps.All()["pending"].Lookup(key, &half))
		half.Hook = 0
		h.must(h.maps.All()["pending"].Put(key, half))
		p := h.packet(h.backend, h.as, synAck, 5000, 1001)
		h.keepMAC = false
		h.expect(h.program, p.Bytes(), drop, "no_hairpin", nil)
	})
}

// TestHairpinAddress: what is sent to the hairpin address and is no answer goes nowhere; another node's is passed by.
func TestHairpinAddress(t *testing.T) {
	for _, f := range families {
		r := newPort(t)
		to := netip.AddrPortFrom(hairpinOf(f), 40000)
		other := netip.AddrPortFrom(hairpinOf(families[0]).Next(), 40000)
		if f.name == "v6" {
			other = netip.AddrPortFrom(hairpinOf(f).Next(), 40000)
		}
		for _, c := range []struct {
			p      testenv.Packet
			reason string
			passed string
		}{
			{testenv.SegmentTCP(f.client, to, testenv.ACK), "no_hairpin", "no_service"},
			{testenv.SegmentTCP(f.client, to, testenv.RST), "no_hairpin", "no_service"},
			{testenv.DatagramUDP(f.client, to, "hello"), "no_hairpin", "no_service"},
			{echo(f.client, to, "hello"), "vip_unsupported", "unsupported"},
			{with(testenv.DatagramUDP(f.client, to, "hello"), func(p *testenv.Packet) { p.Fragment = &testenv.Fragment{ID: 3, Offset: 8} }), "vip_fragment", "fragment"},
		} {
			r.keepMAC = false
			for _, program := range []string{"pod_in", "node_in"} {
				r.expect(program, c.p.Bytes(), drop, c.reason, nil)
				p := c.p
				p.Destination = netip.AddrPortFrom(other.Addr(), c.p.Destination.Port())
				r.expect(program, p.Bytes(), pass, c.passed, p.Bytes())
			}
			r.keepMAC = true
			r.expect("port_in", sentTo(otherMAC, c.p).Bytes(), drop, c.reason, nil)
			foreign := sentTo(otherMAC, c.p).Bytes()
			r.expect("node_in", foreign, pass, c.passed, foreign)
			r.keepMAC = false
			r.expect("pod_out", c.p.Bytes(), pass, map[bool]string{true: "no_flow", false: c.passed}[c.passed == "no_service"], c.p.Bytes())
		}
	}
}
