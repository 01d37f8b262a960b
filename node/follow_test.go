// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// namespace moves the test into a network namespace of its own and returns a handle to change it with. The
// thread is never unlocked: it goes with the test's goroutine, and the namespace with it.
func namespace(t *testing.T) *netlink.Handle {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: following the network is not tested, for it needs root to make network namespaces")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare network namespace: %v", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// run runs a follower until the test ends.
func run(t *testing.T, f *Follower) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		f.Close()
	})
}

func openFollower(t *testing.T) *Follower {
	t.Helper()
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	run(t, f)
	return f
}

// converge waits until the follower knows what a fresh listing says, and returns it.
func converge(t *testing.T, f *Follower, after string) Snapshot {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		want, err := List()
		if err != nil {
			t.Fatalf("after %s: %v", after, err)
		}
		diff := cmp.Diff(want, f.Snapshot(), values)
		if diff == "" {
			return want
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s, -listed +followed:\n%s", after, diff)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func veth(name, peer string) *netlink.Veth {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return &netlink.Veth{LinkAttrs: attrs, PeerName: peer}
}

func byName(s Snapshot, name string) Device {
	i := slices.IndexFunc(s.Devices, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return Device{}
	}
	return s.Devices[i]
}

// routes returns the routes of a snapshot as text, without those of IPv6's link-local scope.
func routes(s Snapshot) []string {
	var lines []string
	for _, r := range s.Routes {
		if r.Destination.Addr().IsLinkLocalUnicast() {
			continue
		}
		d, _ := s.Device(r.Device)
		line := fmt.Sprintf("%s dev %s", r.Destination, d.Name)
		if r.Gateway.IsValid() {
			line += " via " + r.Gateway.String()
		}
		if r.Table != unix.RT_TABLE_MAIN {
			line += fmt.Sprintf(" table %d", r.Table)
		}
		lines = append(lines, line)
	}
	return lines
}

// addresses returns the global addresses of a device as text.
func addresses(s Snapshot, device string) []string {
	var lines []string
	for _, a := range s.Addresses {
		if a.Device == byName(s, device).Index && !a.Prefix.Addr().IsLinkLocalUnicast() {
			lines = append(lines, a.Prefix.String())
		}
	}
	return lines
}

// Each step changes the namespace; then the follower must know what a fresh listing says, and that must be
// what is meant.
func TestFollow(t *testing.T) {
	h := namespace(t)
	must(t, h.LinkAdd(veth("up0", "up1")))
	f := openFollower(t)

	link := func(name string) netlink.Link {
		l, err := h.LinkByName(name)
		must(t, err)
		return l
	}
	address := func(s string, flags int) *netlink.Addr {
		a, err := netlink.ParseAddr(s)
		must(t, err)
		a.Flags = flags
		return a
	}
	prefix := func(s string) *net.IPNet {
		_, p, err := net.ParseCIDR(s)
		must(t, err)
		return p
	}
	via := func(destination, gateway string) *netlink.Route {
		return &netlink.Route{Dst: prefix(destination), Gw: net.ParseIP(gateway)}
	}
	attrs := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return a
	}
	both := func(devices ...string) func() {
		return func() {
			for _, d := range devices {
				must(t, h.LinkSetUp(link(d)))
			}
		}
	}

	var was Snapshot // before the step
	steps := []struct {
		name  string
		do    func()
		check func(s Snapshot) (want, got any) // nil for the comparison with the listing alone
	}{
		{"devices that were there before", func() {}, func(s Snapshot) (any, any) {
			d := byName(s, "up0")
			return Device{Index: d.Index, Name: "up0", Kind: "veth", LinkHeader: 14, MAC: d.MAC}, d
		}},
		{"devices set up", both("lo", "up0", "up1"), func(s Snapshot) (any, any) {
			return true, byName(s, "up0").Up && byName(s, "lo").Up && byName(s, "lo").Loopback
		}},
		{"addresses", func() {
			must(t, h.AddrAdd(link("up0"), address("192.0.2.1/24", 0)))
			must(t, h.AddrAdd(link("up0"), address("192.0.2.2/24", 0)))
			must(t, h.AddrAdd(link("up0"), address("2001:db8::1/64", unix.IFA_F_NODAD)))
		}, func(s Snapshot) (any, any) {
			for _, a := range s.Addresses {
				if a.Secondary != (a.Prefix.Addr() == netip.MustParseAddr("192.0.2.2")) {
					t.Errorf("%s: secondary is %v", a.Prefix, a.Secondary)
				}
			}
			return []string{"192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64"}, addresses(s, "up0")
		}},
		{"an address with a peer", func() {
			a := address("10.5.0.1/32", 0)
			a.Peer = prefix("10.6.0.0/24")
			must(t, h.AddrAdd(link("up1"), a))
		}, func(s Snapshot) (any, any) { return []string{"10.5.0.1/32"}, addresses(s, "up1") }},
		{"routes", func() {
			must(t, h.RouteAdd(via("0.0.0.0/0", "192.0.2.254")))
			must(t, h.RouteAdd(via("::/0", "2001:db8::fe")))
			table := via("10.1.0.0/16", "192.0.2.9")
			table.Table = 1000
			must(t, h.RouteAdd(table))
			must(t, h.RouteAdd(&netlink.Route{Dst: prefix("10.3.0.0/16"), Type: unix.RTN_BLACKHOLE}))
		}, func(s Snapshot) (any, any) {
			return []string{"0.0.0.0/0 dev up0 via 192.0.2.254", "10.6.0.0/24 dev up1", "192.0.2.0/24 dev up0",
				"::/0 dev up0 via 2001:db8::fe", "2001:db8::/64 dev up0", "10.1.0.0/16 dev up0 via 192.0.2.9 table 1000"}, routes(s)
		}},
		{"a route replaced", func() { must(t, h.RouteReplace(via("0.0.0.0/0", "192.0.2.253"))) }, func(s Snapshot) (any, any) {
			return "0.0.0.0/0 dev up0 via 192.0.2.253", routes(s)[0]
		}},
		{"a route replaced by a blackhole", func() {
			must(t, h.RouteReplace(&netlink.Route{Dst: prefix("0.0.0.0/0"), Type: unix.RTN_BLACKHOLE}))
		}, func(s Snapshot) (any, any) { return "10.6.0.0/24 dev up1", routes(s)[0] }},
		{"multipath routes", func() {
			must(t, h.RouteReplace(&netlink.Route{Dst: prefix("0.0.0.0/0"), MultiPath: []*netlink.NexthopInfo{
				{Gw: net.ParseIP("192.0.2.7")}, {LinkIndex: link("up1").Attrs().Index, Gw: net.ParseIP("10.6.0.7")}}}))
			must(t, h.RouteAppend(via("::/0", "2001:db8::fd")))
		}, func(s Snapshot) (any, any) {
			r := routes(s)
			return []string{"0.0.0.0/0 dev up1 via 10.6.0.7", "0.0.0.0/0 dev up0 via 192.0.2.7",
				"::/0 dev up0 via 2001:db8::fd", "::/0 dev up0 via 2001:db8::fe"}, append(r[:2:2], r[4:6]...)
		}},
		{"a multipath route replaced, and one hop of another removed", func() {
			must(t, h.RouteReplace(&netlink.Route{Dst: prefix("0.0.0.0/0"), MultiPath: []*netlink.NexthopInfo{
				{Gw: net.ParseIP("192.0.2.8")}, {LinkIndex: link("up1").Attrs().Index, Gw: net.ParseIP("10.6.0.7")}}}))
			must(t, h.RouteDel(via("::/0", "2001:db8::fe")))
		}, func(s Snapshot) (any, any) {
			r := routes(s)
			return []string{"0.0.0.0/0 dev up1 via 10.6.0.7", "0.0.0.0/0 dev up0 via 192.0.2.8",
				"::/0 dev up0 via 2001:db8::fd"}, append(r[:2:2], r[4])
		}},
		{"a device set down", func() { must(t, h.LinkSetDown(link("up0"))) }, func(s Snapshot) (any, any) {
			return []string{"0.0.0.0/0 dev up1 via 10.6.0.7", "10.6.0.0/24 dev up1"}, routes(s)
		}},
		{"and up again: the hop is back, the other static routes are not", both("up0"), func(s Snapshot) (any, any) {
			return []string{"0.0.0.0/0 dev up1 via 10.6.0.7", "0.0.0.0/0 dev up0 via 192.0.2.8", "10.6.0.0/24 dev up1",
				"192.0.2.0/24 dev up0"}, routes(s)
		}},
		{"the last IPv4 address removed", func() {
			must(t, h.RouteAdd(via("10.9.0.0/16", "10.6.0.9")))
			must(t, h.RouteAdd(&netlink.Route{Dst: prefix("10.10.0.0/16"), LinkIndex: link("up0").Attrs().Index,
				Src: net.ParseIP("10.5.0.1")}))
			converge(t, f, "routes by up1")
			a := address("10.5.0.1/32", 0)
			a.Peer = prefix("10.6.0.0/24")
			must(t, h.AddrDel(link("up1"), a))
		}, func(s Snapshot) (any, any) {
			return []string{"0.0.0.0/0 dev up0 via 192.0.2.8", "192.0.2.0/24 dev up0"}, slices.DeleteFunc(routes(s),
				func(r string) bool { return r == "0.0.0.0/0 dev up1 via 10.6.0.7" }) // a dead hop
		}},
		{"a bridge and its port", func() {
			must(t, h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("cni0")}))
			must(t, h.LinkAdd(veth("pod0", "pod1")))
			must(t, h.LinkSetMaster(link("pod0"), link("cni0")))
			both("cni0", "pod0")()
		}, func(s Snapshot) (any, any) {
			bridge, _ := s.Bridge(byName(s, "pod0"))
			return "cni0 bridge", bridge.Name + " " + bridge.Kind
		}},
		{"the bridge's own MAC changed", func() {
			must(t, h.LinkSetHardwareAddr(link("cni0"), net.HardwareAddr{2, 0, 0, 0, 0, 9}))
		}, func(s Snapshot) (any, any) { return [6]byte{2, 0, 0, 0, 0, 9}, byName(s, "cni0").MAC }},
		{"the port released", func() { must(t, h.LinkSetNoMaster(link("pod0"))) }, func(s Snapshot) (any, any) {
			_, ok := s.Bridge(byName(s, "pod0"))
			return "pod0 false", fmt.Sprint(byName(s, "pod0").Name, " ", ok)
		}},
		{"the bridge deleted under its port", func() {
			must(t, h.LinkSetMaster(link("pod0"), link("cni0")))
			must(t, h.LinkDel(link("cni0")))
		}, func(s Snapshot) (any, any) { return 0, byName(s, "pod0").Master }},
		{"a device renamed", func() {
			must(t, h.LinkSetDown(link("pod0")))
			must(t, h.LinkSetName(link("pod0"), "pod9"))
		}, func(s Snapshot) (any, any) {
			return byName(was, "pod0").Index, byName(s, "pod9").Index
		}},
		{"devices of other kinds", func() {
			must(t, h.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs("vx0"), VxlanId: 7, Port: 4789}))
			must(t, h.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs("tun0"), Mode: netlink.TUNTAP_MODE_TUN}))
		}, func(s Snapshot) (any, any) {
			vx, tun := byName(s, "vx0"), byName(s, "tun0")
			return "vxlan 14, tun 0", fmt.Sprintf("%s %d, %s %d", vx.Kind, vx.LinkHeader, tun.Kind, tun.LinkHeader)
		}},
		{"devices deleted", func() {
			for _, name := range []string{"up0", "pod9", "vx0", "tun0"} {
				must(t, h.LinkDel(link(name)))
			}
		}, func(s Snapshot) (any, any) {
			return "1 devices, 0 routes, lo [127.0.0.1/8 ::1/128]",
				fmt.Sprintf("%d devices, %d routes, lo %v", len(s.Devices), len(s.Routes), addresses(s, "lo"))
		}},
	}
	for _, step := range steps {
		step.do()
		s := converge(t, f, step.name)
		if want, got := step.check(s); !cmp.Equal(want, got, values) {
			t.Errorf("%s: -want +got:\n%s", step.name, cmp.Diff(want, got, values))
		}
		was = s
	}
}

func TestNext(t *testing.T) {
	h := namespace(t)
	f := openFollower(t)
	next := func(timeout time.Duration) (Snapshot, error) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		return f.Next(ctx)
	}
	s, err := next(30 * time.Second)
	if err != nil || len(s.Devices) != 1 {
		t.Fatalf("the first call: %v, %v", s, err)
	}
	if s, err := next(50 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("without a change: %v, %v", s, err)
	}
	for i := range 5 {
		must(t, h.LinkAdd(veth(fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i))))
	}
	converge(t, f, "five devices")
	// The last token may come just after what it stands for is seen.
	for calls := 1; ; calls++ {
		if s, err = next(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		if len(s.Devices) == 11 {
			break
		}
		if calls == 10 {
			t.Fatalf("after %d calls %d devices are known", calls, len(s.Devices))
		}
	}
}

func TestFollowManyDevices(t *testing.T) {
	h := namespace(t)
	f := openFollower(t)
	for i := range 200 {
		must(t, h.LinkAdd(veth(fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i))))
		link, err := h.LinkByName(fmt.Sprintf("a%d", i))
		must(t, err)
		must(t, h.LinkSetUp(link))
		must(t, h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: net.IPv4(10, 244, byte(i), 1).To4(), Mask: net.CIDRMask(32, 32)}}))
		if i%2 == 1 { // every other goes at once
			must(t, h.LinkDel(link))
		}
	}
	if s := converge(t, f, "the devices came"); len(s.Devices) != 201 || len(routes(s)) != 100 {
		t.Errorf("%d devices and %d routes are there", len(s.Devices), len(routes(s)))
	}
	for i := 0; i < 200; i += 2 {
		must(t, h.LinkDel(veth(fmt.Sprintf("a%d", i), "")))
	}
	if s := converge(t, f, "the devices went"); len(s.Devices) != 1 || len(s.Routes) != 0 {
		t.Errorf("%d devices and %d routes are left", len(s.Devices), len(s.Routes))
	}
	// Indices may be used again: nothing unseen is to be left of the devices either.
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.tables.hops) != 0 || len(f.tables.addresses) != 0 {
		t.Errorf("kept: %v, %v", f.tables.hops, f.tables.addresses)
	}
}

// The queue is full of news of devices that came; that they went is lost.
func TestFollowOverrun(t *testing.T) {
	h := namespace(t)
	f, err := open(16 << 10)
	must(t, err)
	for i := range 20 {
		must(t, h.LinkAdd(veth(fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i))))
	}
	for i := range 20 {
		must(t, h.LinkDel(veth(fmt.Sprintf("a%d", i), "")))
	}
	overrun := false
	must(t, f.raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(poll, 0)
		overrun = err == nil && poll[0].Revents&unix.POLLERR != 0
	}))
	if !overrun {
		t.Fatal("no message was lost, so nothing is tested")
	}
	run(t, f)
	if s := converge(t, f, "the devices went"); len(s.Devices) != 1 {
		t.Errorf("%d devices are left", len(s.Devices))
	}
	must(t, h.LinkAdd(veth("a", "b")))
	if s := converge(t, f, "a device came"); len(s.Devices) != 3 {
		t.Errorf("%d devices are known", len(s.Devices))
	}
}

// A context that has ended before Run begins ends it, and Close leaves nothing behind.
func TestRunEnds(t *testing.T) {
	namespace(t)
	f, err := Open()
	must(t, err)
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
}
