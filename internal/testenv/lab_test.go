// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// childMode has the test binary build a lab, say so and wait to be killed.
const childMode = "TESTENV_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childMode) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func child() error {
	l, err := OpenLab(context.Background(), Config{Backends: 1})
	if err != nil {
		return err
	}
	p, err := l.Node.Start(exec.Command("sleep", "1000"))
	if err != nil {
		return err
	}
	fmt.Println(p.PID(), l.Node.Path())
	select {}
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// serve starts all kinds of servers on a host: HTTP on port 80, TCP echo on 7, UDP on 53.
func serve(t *testing.T, h *Host) {
	t.Helper()
	for port, start := range map[string]func(context.Context, *Namespace, string, string) (*Server, error){
		":80": ServeHTTP, ":7": ServeEcho, ":53": ServeUDP,
	} {
		s, err := start(t.Context(), h.Namespace, h.Name, port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// reach has a host talk to each of the servers of another by its address.
func reach(t *testing.T, from, to *Host, family int) {
	t.Helper()
	ctx := timeout(t, 5*time.Second)
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(to.Addr(family), port) }
	check := func(what string, a Answer, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s from %s to %s: %v", what, from.Name, to.Name, err)
		} else if a.Server != to.Name || a.Client.Addr() != from.Addr(family) {
			t.Errorf("%s from %s to %s: %s answered %v", what, from.Name, to.Name, a.Server, a.Client)
		}
	}
	c := NewHTTPClient(from.Namespace, netip.AddrPort{})
	defer c.Close()
	a, err := c.Who(ctx, at(80))
	check("HTTP", a, err)

	source := netip.AddrPortFrom(from.Addr(family), 40000)
	e, err := DialEcho(ctx, from.Namespace, source, at(7))
	if err == nil {
		check("TCP", e.Answer, e.Say(ctx, "hello"))
		if e.Client != source {
			t.Errorf("TCP from %v came from %v", source, e.Client)
		}
		e.Reset()
	} else {
		check("TCP", Answer{}, err)
	}

	bound, err := NewUDPClient(ctx, from.Namespace, source)
	if err != nil {
		t.Fatal(err)
	}
	a, err = bound.Ask(ctx, at(53), "hello")
	check("UDP", a, err)
	bound.Close()
	connected, err := DialUDP(ctx, from.Namespace, source, at(53))
	if err != nil {
		t.Fatal(err)
	}
	a, err = connected.Ask(ctx, at(53), "hello")
	check("connected UDP", a, err)
	if a.Client != source || connected.LocalAddr() != source {
		t.Errorf("UDP from %v came from %v", source, a.Client)
	}
	connected.Close()
}

// TestDirect: without an agent, all that the rules allow works, at once and without a packet that should not
// be, under each setting.
func TestDirect(t *testing.T) {
	for name, c := range map[string]Config{
		"strict":                  {},
		"loose":                   {ReversePath: ReversePathLoose},
		"no rp_filter":            {ReversePath: ReversePathOff},
		"no rules":                {NoRules: true},
		"masquerade":              {Masquerade: true},
		"masquerade to few ports": {Masquerade: true, MasqueradeTo: "10000-29999"},
		"offloads on":             {Segmentation: OffloadOn, TxChecksum: OffloadOn},
		"no segmentation":         {Segmentation: OffloadOff},
		"no checksum":             {TxChecksum: OffloadOff},
		"no offloads":             {Segmentation: OffloadOff, TxChecksum: OffloadOff},
		"receive offload alone":   {Segmentation: OffloadOn, TxChecksum: OffloadOff},
	} {
		t.Run(name, func(t *testing.T) {
			c.Backends, c.ClientPods = 2, 1
			l := NewLab(t, c)
			l.CheckWhenDone(t)
			for _, b := range l.Backends {
				serve(t, b)
			}
			serve(t, l.Node)
			for _, family := range []int{4, 6} {
				for _, from := range []*Host{l.Client, l.ClientPods[0], l.Node, l.Backends[0]} {
					for _, to := range l.Backends {
						if from != to {
							reach(t, from, to, family)
						}
					}
				}
				reach(t, l.Client, l.Node, family)
				reach(t, l.ClientPods[0], l.Node, family)
				for _, from := range []*Host{l.Client, l.ClientPods[0]} {
					http := NewHTTPClient(from.Namespace, netip.AddrPort{})
					if err := http.Transfer(timeout(t, 20*time.Second), netip.AddrPortFrom(l.Backends[1].Addr(family), 80), 4<<20); err != nil {
						t.Error(err)
					}
					http.Close()
				}
			}
		})
	}
}

// TestBridge: pods of a bridge reach what the rules allow; each other past the stack, whose rules see it
// nevertheless if BridgeNetfilter says so.
func TestBridge(t *testing.T) {
	for name, c := range map[string]Config{
		"unseen": {Bridge: true, TxChecksum: OffloadOff},
		"seen":   {Bridge: true, BridgeNetfilter: true, Masquerade: true, Segmentation: OffloadOn},
	} {
		t.Run(name, func(t *testing.T) {
			c.Backends, c.ClientPods = 2, 2
			l := NewLab(t, c)
			l.CheckWhenDone(t)
			for _, h := range append(l.Backends, l.ClientPods[1]) {
				serve(t, h)
			}
			capture, err := Capture(l.Backends[1].Namespace, "eth0")
			if err != nil {
				t.Fatal(err)
			}
			defer capture.Close()
			for _, family := range []int{4, 6} {
				for _, from := range []*Host{l.Client, l.ClientPods[0], l.Backends[0]} {
					reach(t, from, l.Backends[1], family)
				}
				// What the rules refuse.
				before, err := l.Counters(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				to := netip.AddrPortFrom(l.ClientPods[1].Addr(family), 7)
				e, err := DialEcho(timeout(t, 300*time.Millisecond), l.ClientPods[0].Namespace, netip.AddrPort{}, to)
				if err == nil {
					e.Reset()
				}
				after, countErr := l.Counters(t.Context())
				if refused := after.Refused - before.Refused; countErr != nil || (err != nil) != c.BridgeNetfilter || (refused != 0) != c.BridgeNetfilter {
					t.Errorf("from pod to pod on the bridge: %v; the rules refused %d packets (%v)", err, refused, countErr)
				}
			}
			frames, err := capture.All()
			if err != nil {
				t.Fatal(err)
			}
			ttls := map[netip.Addr]uint8{}
			for _, f := range frames {
				if p, err := Parse(f.Data); err == nil && !f.Outgoing && p.Protocol == TCP {
					ttls[p.Source.Addr()] = p.TTL
				}
			}
			for _, family := range []int{4, 6} {
				for from, want := range map[*Host]uint8{l.Client: 63, l.ClientPods[0]: 64, l.Backends[0]: 64} {
					if got := ttls[from.Addr(family)]; got != want {
						t.Errorf("packets of %s come with TTL %d, want %d", from.Name, got, want)
					}
				}
			}
		})
	}
}

func TestMasquerade(t *testing.T) {
	l := NewLab(t, Config{ClientPods: 1, Masquerade: true, MasqueradeTo: "10000-10009"})
	l.CheckWhenDone(t)
	serve(t, l.Client)
	for _, family := range []int{4, 6} {
		c, err := DialUDP(t.Context(), l.ClientPods[0].Namespace, netip.AddrPort{}, netip.AddrPortFrom(l.Client.Addr(family), 53))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		a, err := c.Ask(timeout(t, 5*time.Second), netip.AddrPortFrom(l.Client.Addr(family), 53), "hello")
		if err != nil {
			t.Fatal(err)
		}
		if a.Client.Addr() != l.Node.Addr(family) || a.Client.Port() < 10000 || a.Client.Port() > 10009 {
			t.Errorf("came from %v, want the node's address and a port of 10000-10009", a.Client)
		}
	}
}

// TestRefused: a client pod is nobody's to connect to.
func TestRefused(t *testing.T) {
	l := NewLab(t, Config{Backends: 1, ClientPods: 1})
	l.CheckWhenDone(t)
	serve(t, l.ClientPods[0])
	for i, family := range []int{4, 6} {
		ctx := timeout(t, 200*time.Millisecond)
		if c, err := DialEcho(ctx, l.Client.Namespace, netip.AddrPort{}, netip.AddrPortFrom(l.ClientPods[0].Addr(family), 7)); err == nil {
			c.Close()
			t.Errorf("the client may connect to a client pod")
		}
		c, err := l.Counters(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if c.Refused < uint64(i+1) {
			t.Errorf("%+v counts no refused packet of IPv%d", c, family)
		}
	}
}

// TestStrict: each thing that must not be is counted as what it is, once for each packet.
func TestStrict(t *testing.T) {
	l := NewLab(t, Config{ClientAddresses: 2, Backends: 1})
	l.CheckWhenDone(t)
	serve(t, l.Backends[0])
	serve(t, l.Node)
	if err := l.AddVIPs(t.Context(), netip.MustParsePrefix("203.0.114.7/32"), netip.MustParsePrefix("fd00:f::/64")); err != nil {
		t.Fatal(err)
	}
	if err := l.AddNodePorts(t.Context(), 30080, 30443); err != nil {
		t.Fatal(err)
	}
	send := func(from *Host, source, to string) {
		t.Helper()
		c, err := NewUDPClient(t.Context(), from.Namespace, netip.MustParseAddrPort(source))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Send(netip.MustParseAddrPort(to), "x"); err != nil && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
	}
	raw := func(from *Host, p Packet) {
		t.Helper()
		s, err := Capture(from.Namespace, uplink)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p.SourceMAC, p.DestinationMAC = macs(t, l, from)
		if err := s.Send(p.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	backend := netip.AddrPortFrom(l.Backends[0].IPv4, 7)
	for name, test := range map[string]struct {
		do   func()
		want Counters
	}{
		"to a ClusterIP":      {func() { send(l.Client, "0.0.0.0:0", "10.96.0.1:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to a ClusterIP v6":   {func() { send(l.Client, "[::]:0", "[fd00:96::1]:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to an LB address":    {func() { send(l.Backends[0], "0.0.0.0:0", "198.51.100.1:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to an external one":  {func() { send(l.Backends[0], "[::]:0", "[fd00:e::1]:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to an added one":     {func() { send(l.Client, "192.0.2.3:0", "203.0.114.7:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to an added one v6":  {func() { send(l.Client, "[fd00:c::3]:0", "[fd00:f::7]:53") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to a NodePort":       {func() { send(l.Client, "0.0.0.0:0", "192.0.2.1:30080") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"to a NodePort v6":    {func() { send(l.Client, "[::]:0", "[fd00:c::1]:30443") }, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"from a NodePort":     {func() { send(l.Node, "192.0.2.1:30080", "192.0.2.2:53") }, Counters{VIP: map[string]uint64{"output": 1}}},
		"node to a ClusterIP": {func() { send(l.Node, "0.0.0.0:0", "10.96.0.1:53") }, Counters{VIP: map[string]uint64{"output": 1}}},
		"from a ClusterIP": {func() {
			raw(l.Backends[0], DatagramUDP(netip.MustParseAddrPort("10.96.0.1:53"), netip.AddrPortFrom(l.Client.IPv4, 53), "x"))
		}, Counters{VIP: map[string]uint64{"prerouting": 1}}},
		"TCP from nowhere": {func() {
			raw(l.Client, SegmentTCP(netip.AddrPortFrom(l.Client.IPv4, 9), backend, ACK))
		}, Counters{VIP: map[string]uint64{}, Invalid: 1}},
		"to a pod from nobody": {func() {
			raw(l.Client, DatagramUDP(netip.MustParseAddrPort("192.0.3.1:53"), backend, "x"))
		}, Counters{VIP: map[string]uint64{}, Refused: 1}},
	} {
		if err := l.ResetCounters(t.Context()); err != nil {
			t.Fatal(err)
		}
		test.do()
		var got Counters
		for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
			var err error
			if got, err = l.Counters(t.Context()); err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(got) == fmt.Sprint(test.want) || time.Now().After(end) {
				break
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
		err := l.CheckStrict(t.Context())
		if wrong := len(got.VIP) != 0 || got.Invalid != 0; wrong != (err != nil) {
			t.Errorf("%s: %+v, but CheckStrict says %v", name, got, err)
		}
	}
	vips, err1 := l.VIPPackets(t.Context())
	invalid, err2 := l.InvalidPackets(t.Context())
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if vips+invalid > 1 {
		t.Errorf("%d packets with a VIP and %d invalid ones of the last test", vips, invalid)
	}
	if err := l.ResetCounters(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestReversePath sends a packet with another's address, from the client and from a pod. On a device without
// an address, as the node's side of a pod's link is, rp_filter=2 does the same as 1.
func TestReversePath(t *testing.T) {
	for setting, passes := range map[ReversePath]struct{ client, pod bool }{
		ReversePathStrict: {false, false},
		ReversePathOff:    {true, true},
		ReversePathLoose:  {true, false},
	} {
		l := NewLab(t, Config{Backends: 3, ReversePath: setting, NoRules: true})
		l.CheckWhenDone(t)
		seen, err := Capture(l.Backends[1].Namespace, uplink)
		if err != nil {
			t.Fatal(err)
		}
		defer seen.Close()
		for name, test := range map[string]struct {
			from   *Host
			source *Host
			passes bool
		}{
			"client": {l.Client, l.Backends[2], passes.client},
			"pod":    {l.Backends[0], l.Client, passes.pod},
		} {
			s, err := Capture(test.from.Namespace, uplink)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			p := DatagramUDP(netip.AddrPortFrom(test.source.IPv4, 53), netip.AddrPortFrom(l.Backends[1].IPv4, 53), name)
			p.SourceMAC, p.DestinationMAC = macs(t, l, test.from)
			if err := s.Send(p.Bytes()); err != nil {
				t.Fatal(err)
			}
			_, err = seen.Find(100*time.Millisecond, func(f Frame) bool {
				got, err := Parse(f.Data)
				return err == nil && string(got.Payload) == name
			})
			if test.passes != (err == nil) {
				t.Errorf("rp_filter=%s, from the %s: %v", setting.sysctl(), name, err)
			}
		}
	}
}

// macs returns the Ethernet addresses of a frame from a host to the node.
func macs(t *testing.T, l *Lab, from *Host) (source, destination MAC) {
	t.Helper()
	read := func(n *Namespace, device string) (m MAC) {
		link, err := n.links.LinkByName(device)
		if err != nil {
			t.Fatal(err)
		}
		copy(m[:], link.Attrs().HardwareAddr)
		return m
	}
	return read(from.Namespace, uplink), read(l.Node.Namespace, from.NodeDevice)
}

func TestChecksumErrors(t *testing.T) {
	l, err := openLabAsRoot(t, Config{Backends: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serve(t, l.Backends[0])
	s, err := Capture(l.Client.Namespace, uplink)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i, family := range []int{4, 6} {
		p := DatagramUDP(netip.AddrPortFrom(l.Client.Addr(family), 53), netip.AddrPortFrom(l.Backends[0].Addr(family), 53), "xyz")
		p.SourceMAC, p.DestinationMAC = macs(t, l, l.Client)
		frame := p.Bytes()
		frame[len(frame)-1]++
		if err := s.Send(frame); err != nil {
			t.Fatal(err)
		}
		var got uint64
		// The first packet waits for the pod's neighbour entry. Connection tracking of the node, which sees
		// the wrong checksum too, calls such a packet invalid; without it the pod's stack would count it.
		for range 100 {
			c, err := l.Counters(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got = c.Invalid; got > uint64(i) {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if got != uint64(i+1) {
			t.Errorf("IPv%d: %d packets with a wrong checksum, want %d", family, got, i+1)
		}
	}
	if err := l.CheckStrict(t.Context()); err == nil {
		t.Error("CheckStrict knows of no wrong checksum")
	}
}

// TestChecksumErrorsOfAHost has the stack that a packet is for find the wrong checksum.
func TestChecksumErrorsOfAHost(t *testing.T) {
	l, err := openLabAsRoot(t, Config{Backends: 1, NoRules: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serve(t, l.Backends[0])
	reach(t, l.Client, l.Backends[0], 4)
	reach(t, l.Client, l.Backends[0], 6)
	s, err := Capture(l.Client.Namespace, uplink)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := uint64(0)
	for _, family := range []int{4, 6} {
		for _, p := range []Packet{
			DatagramUDP(netip.AddrPortFrom(l.Client.Addr(family), 53), netip.AddrPortFrom(l.Backends[0].Addr(family), 53), "xyz"),
			SegmentTCP(netip.AddrPortFrom(l.Client.Addr(family), 53), netip.AddrPortFrom(l.Backends[0].Addr(family), 80), SYN),
		} {
			p.SourceMAC, p.DestinationMAC = macs(t, l, l.Client)
			frame := p.Bytes()
			frame[len(frame)-1]++
			if err := s.Send(frame); err != nil {
				t.Fatal(err)
			}
			want++
		}
	}
	time.Sleep(10 * time.Millisecond)
	got, err := l.Backends[0].ChecksumErrors()
	if err != nil || got != want {
		t.Errorf("got %d, %v, want %d", got, err, want)
	}
}

func openLabAsRoot(t *testing.T, c Config) (*Lab, error) {
	RequireRoot(t)
	return OpenLab(t.Context(), c)
}

// TestCapture sees both directions of a connection, and says which checksums are not there yet.
func TestCapture(t *testing.T) {
	for _, offload := range []Offload{OffloadOn, OffloadOff} {
		l := NewLab(t, Config{Backends: 1, TxChecksum: offload})
		l.CheckWhenDone(t)
		serve(t, l.Backends[0])
		s, err := Capture(l.Client.Namespace, uplink)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		reach(t, l.Client, l.Backends[0], 4)
		reach(t, l.Client, l.Backends[0], 6)
		frames, err := s.All()
		if err != nil {
			t.Fatal(err)
		}
		in, out, unfinished := 0, 0, 0
		for _, f := range frames {
			if _, err := Locate(f.Data); errors.Is(err, errNotIP) {
				continue
			}
			if f.Outgoing {
				out++
			} else {
				in++
			}
			if f.Unfinished {
				unfinished++
			} else if err := CheckSums(f.Data); err != nil {
				t.Errorf("%v: %v", f, err)
			}
		}
		if in < 10 || out < 10 || (unfinished > 0) != (offload == OffloadOn) {
			t.Errorf("tx-checksum %s: %d frames in, %d out, %d unfinished", offload.ethtool(), in, out, unfinished)
		}
		if _, err := s.Find(time.Millisecond, func(Frame) bool { return false }); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	}
}

// TestOffloads looks at the size of frames: more than the link takes are several segments in one.
func TestOffloads(t *testing.T) {
	const full = 14 + 1500
	for name, test := range map[string]struct {
		c             Config
		sends, merges bool // several segments in one
	}{
		"default":         {Config{}, true, true},
		"on":              {Config{Segmentation: OffloadOn, TxChecksum: OffloadOn}, true, true},
		"no segmentation": {Config{Segmentation: OffloadOff}, false, false},
		"no checksum":     {Config{TxChecksum: OffloadOff}, false, false},
		"receive alone":   {Config{Segmentation: OffloadOn, TxChecksum: OffloadOff}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			test.c.Backends = 1
			l := NewLab(t, test.c)
			l.CheckWhenDone(t)
			serve(t, l.Backends[0])
			s, err := Capture(l.Client.Namespace, uplink)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			c := NewHTTPClient(l.Client.Namespace, netip.AddrPort{})
			defer c.Close()
			if err := c.Transfer(timeout(t, 10*time.Second), netip.AddrPortFrom(l.Backends[0].IPv6, 80), 2<<20); err != nil {
				t.Fatal(err)
			}
			frames, err := s.All()
			if err != nil {
				t.Fatal(err)
			}
			var sent, received int
			for _, f := range frames {
				if f.Outgoing {
					sent = max(sent, len(f.Data))
				} else {
					received = max(received, len(f.Data))
				}
			}
			if sent > full != test.sends || received > full != test.merges {
				t.Errorf("sent up to %d bytes at once, received up to %d", sent, received)
			}
		})
	}
}

// onlyLoopback waits until a namespace has no device but lo: the others were links to namespaces that are gone.
func onlyLoopback(t *testing.T, namespace *os.File) {
	t.Helper()
	n := &Namespace{Name: "watched", file: namespace}
	var devices []net.Interface
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err := n.Do(func() (err error) {
			devices, err = net.Interfaces()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if len(devices) == 1 {
			return
		}
	}
	t.Errorf("devices are left: %v", devices)
}

func TestCloseLeavesNothing(t *testing.T) {
	before := openFiles(t)
	l, err := openLabAsRoot(t, Config{Backends: 2, ClientPods: 1})
	if err != nil {
		t.Fatal(err)
	}
	node, err := os.Open(l.Node.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	onlyLoopback(t, node)
	if err := l.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
	if err := l.Node.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	node.Close()
	if after := openFiles(t); after > before {
		t.Errorf("%d files open, %d before", after, before)
	}
}

// TestFailureLeavesNothing has the lab fail at its last step, when all else is there.
func TestFailureLeavesNothing(t *testing.T) {
	RequireRoot(t)
	before := openFiles(t)
	l := &Lab{Config: Config{Backends: 2, Masquerade: true, MasqueradeTo: "nonsense"}}
	if err := l.build(t.Context()); err == nil || !strings.Contains(err.Error(), "nft -f -") {
		t.Fatalf("build: %v", err)
	}
	node, err := os.Open(l.Node.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	onlyLoopback(t, node)
	node.Close()

	if l, err := OpenLab(t.Context(), Config{Backends: 1, Masquerade: true, MasqueradeTo: "nonsense"}); err == nil || l != nil {
		t.Errorf("OpenLab returned %v, %v", l, err)
	}
	if l, err := OpenLab(t.Context(), Config{Backends: 1000}); err == nil || l != nil {
		t.Errorf("OpenLab returned %v, %v", l, err)
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d files open, %d before", after, before)
	}
}

func openFiles(t *testing.T) int {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// TestKillLeavesNothing kills a process that has a lab, with a child in it.
func TestKillLeavesNothing(t *testing.T) {
	RequireRoot(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childMode+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var pid int
	var path string
	if _, err := fmt.Fscan(bufio.NewReader(out), &pid, &path); err != nil {
		t.Fatal(err)
	}
	node, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	onlyLoopback(t, node)
	for end := time.Now().Add(5 * time.Second); running(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the child %d of the killed process goes on", pid)
		}
	}
}

// running is false for a zombie, which is its new parent's to reap.
func running(pid int) bool {
	stat, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "stat"))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestProcess(t *testing.T) {
	RequireRoot(t)
	n, err := NewNamespace("process")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()

	out, err := n.Run(t.Context(), "", "readlink", "/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.Readlink(n.Path())
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != want {
		t.Errorf("the child is in %s, want %s", got, want)
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if home == want {
		t.Error("so is this process")
	}

	if _, err := n.Run(t.Context(), "", "sh", "-c", "echo what is wrong >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "what is wrong") {
		t.Errorf("got %v", err)
	}
	if _, err := n.Start(exec.Command("/nonexistent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}

	p, err := n.Start(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(5 * time.Second); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("Stop: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("Close after the end: %v", err)
	}

	stubborn := exec.Command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
	ready, err := stubborn.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p, err = n.Start(stubborn); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(ready, make([]byte, 5))
	if err := p.Stop(20 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Errorf("Stop of a stubborn child: %v", err)
	}
	<-p.Done()
	if err := p.Signal(syscall.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal after the end: %v", err)
	}
}

// TestProcessOutlivesThreads: a child is not killed because some thread of this process ends.
func TestProcessOutlivesThreads(t *testing.T) {
	RequireRoot(t)
	n, err := NewNamespace("threads")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	p, err := n.Start(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// Together they take every thread that is free.
	var locked, ended sync.WaitGroup
	for range 50 {
		locked.Add(1)
		ended.Go(func() {
			runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
			locked.Done()
			locked.Wait()
		})
	}
	ended.Wait()
	time.Sleep(20 * time.Millisecond)
	if !running(p.PID()) {
		t.Error("the child was killed")
	}
}

func TestDo(t *testing.T) {
	RequireRoot(t)
	n, err := NewNamespace("do")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	wrong := errors.New("wrong")
	if err := n.Do(func() error { return wrong }); err != wrong {
		t.Errorf("got %v", err)
	}
	if err := n.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("a function that did not return is taken for done")
	}
	if err := n.Sysctl("net.ipv4.no_such", "1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	home, _ := os.Readlink("/proc/self/ns/net")
	for range 20 {
		n.Do(func() error { return nil })
		if here, _ := os.Readlink("/proc/thread-self/ns/net"); here != home {
			t.Fatalf("a thread was left in %s", here)
		}
	}
}

func BenchmarkLab(b *testing.B) {
	RequireRoot(b)
	for b.Loop() {
		l, err := OpenLab(b.Context(), Config{Backends: 4, ClientPods: 1})
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
