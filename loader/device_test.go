//go:build vmtest

// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// Devices and queues that many a developer's kernel lacks, and that Debian's have: so `make vmtest` alone builds this
// file.

// cable is a second way between the client and the node.
type cable struct {
	kind       string
	linkHeader int
	families   []int
	vlan       uint16
	// end returns one end's device, which lies on the device of the first cable.
	end func(attributes netlink.LinkAttrs, under int, from, to *testenv.Host) netlink.Link
	// join, if it is there, makes ends of two devices.
	join func(*lab) error
}

const cableName = "cable0"

func cables() []cable {
	both := []int{4, 6}
	ip := func(a netip.Addr) net.IP { return a.AsSlice() }
	return []cable{
		{kind: "VLAN", linkHeader: 14, families: both, vlan: 5, end: func(a netlink.LinkAttrs, under int, _, _ *testenv.Host) netlink.Link {
			a.ParentIndex = under
			return &netlink.Vlan{LinkAttrs: a, VlanId: 5}
		}},
		{kind: "VXLAN", linkHeader: 14, families: both, end: func(a netlink.LinkAttrs, under int, from, to *testenv.Host) netlink.Link {
			return &netlink.Vxlan{LinkAttrs: a, VxlanId: 5, Port: 4789, VtepDevIndex: under, SrcAddr: ip(from.IPv4), Group: ip(to.IPv4)}
		}},
		{kind: "Geneve", linkHeader: 14, families: both, end: func(a netlink.LinkAttrs, _ int, _, to *testenv.Host) netlink.Link {
			return &netlink.Geneve{LinkAttrs: a, ID: 5, Remote: ip(to.IPv4), Dport: 6081}
		}},
		{kind: "IPIP", families: []int{4}, end: func(a netlink.LinkAttrs, _ int, from, to *testenv.Host) netlink.Link {
			return &netlink.Iptun{LinkAttrs: a, Local: ip(from.IPv4), Remote: ip(to.IPv4)}
		}},
		{kind: "GRE", families: both, end: func(a netlink.LinkAttrs, _ int, from, to *testenv.Host) netlink.Link {
			return &netlink.Gretun{LinkAttrs: a, Local: ip(from.IPv4), Remote: ip(to.IPv4)}
		}},
		{kind: "WireGuard", families: both, end: func(a netlink.LinkAttrs, _ int, _, _ *testenv.Host) netlink.Link {
			return &netlink.Wireguard{LinkAttrs: a}
		}, join: (*lab).exchangeKeys},
		{kind: "bond", linkHeader: 14, families: both}, // both ends at once
	}
}

// TestCables: a client reaches a service through each kind of device, which has the programs of a node's.
func TestCables(t *testing.T) {
	for _, c := range cables() {
		t.Run(c.kind, func(t *testing.T) {
			l := newLab(t, testenv.Config{Backends: 1})
			nodes := map[int]netip.Addr{4: netip.MustParseAddr("192.0.2.241"), 6: netip.MustParseAddr("fd00:c::ff01")}
			clients := map[int]netip.Addr{4: netip.MustParseAddr("192.0.2.242"), 6: netip.MustParseAddr("fd00:c::ff02")}
			device := l.plug(c, nodes, clients)
			if c.vlan != 0 {
				uplink, _ := l.device(l.Client.NodeDevice)
				l.rig.must(l.rig.maps.SetVLAN(maps.VLANKey{Parent: uplink, Id: c.vlan}, uint32(device)))
			}
			l.devices = append(l.devices, loader.Device{Index: device, Name: cableName, Role: loader.Node, LinkHeader: c.linkHeader})
			l.rig.must(l.Node.Do(func() error { return l.programs.Set(l.devices) }))
			for _, family := range c.families {
				client := testenv.NewHTTPClient(l.Client.Namespace, netip.AddrPort{})
				defer client.Close()
				answer, err := client.Who(l.context(), l.vips[family])
				if err != nil {
					t.Errorf("IPv%d: %v; reasons %v", family, err, l.reasons())
				} else if answer.Client.Addr() != clients[family] {
					t.Errorf("the backend sees %s, not %s", answer.Client, clients[family])
				}
			}
		})
	}
}

// plug makes the cable, with the client's way to the VIPs through it, and returns the node's end.
func (l *lab) plug(c cable, nodes, clients map[int]netip.Addr) (device int) {
	t := l.rig.t
	t.Helper()
	attributes := netlink.NewLinkAttrs()
	attributes.Name = cableName
	try := func(host *testenv.Host, f func() error) {
		t.Helper()
		if err := host.Do(f); errors.Is(err, unix.EOPNOTSUPP) {
			t.Skipf("this kernel has no %s devices", c.kind)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	add := func(from, to *testenv.Host, under string) func() error {
		return func() error {
			parent, err := netlink.LinkByName(under)
			if err != nil {
				return err
			}
			return netlink.LinkAdd(c.end(attributes, parent.Attrs().Index, from, to))
		}
	}
	if c.end == nil {
		try(l.Node, func() error { return l.bond(attributes) })
	} else {
		try(l.Node, add(l.Node, l.Client, l.Client.NodeDevice))
		try(l.Client, add(l.Client, l.Node, "eth0"))
	}
	if c.join != nil {
		l.rig.must(c.join(l))
	}
	up := func(own map[int]netip.Addr) (link netlink.Link, err error) {
		if link, err = netlink.LinkByName(cableName); err != nil {
			return nil, err
		}
		for _, family := range c.families {
			a := &netlink.Addr{IPNet: &net.IPNet{IP: own[family].AsSlice(), Mask: net.CIDRMask(30, 32)}}
			if family == 6 {
				a.Mask, a.Flags = net.CIDRMask(126, 128), unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, a); err != nil {
				return nil, err
			}
		}
		return link, netlink.LinkSetUp(link)
	}
	try(l.Node, func() error {
		link, err := up(nodes)
		if err == nil {
			device = link.Attrs().Index
		}
		return err
	})
	try(l.Client, func() error {
		link, err := up(clients)
		if err != nil {
			return err
		}
		for _, family := range c.families {
			if err := netlink.RouteReplace(&netlink.Route{
				LinkIndex: link.Attrs().Index, Dst: netlink.NewIPNet(l.vips[family].Addr().AsSlice()),
				Gw: nodes[family].AsSlice(), Src: clients[family].AsSlice(),
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return device
}

// bond makes a bond of one veth device, whose peer is the client's end.
func (l *lab) bond(attributes netlink.LinkAttrs) error {
	b := netlink.NewLinkBond(attributes)
	b.Mode = netlink.BOND_MODE_ACTIVE_BACKUP
	if err := netlink.LinkAdd(b); err != nil {
		return err
	}
	client, err := os.Open(l.Client.Path())
	if err != nil {
		return err
	}
	defer client.Close()
	a := netlink.NewLinkAttrs()
	a.Name = "slave0"
	veth := netlink.NewVeth(a)
	veth.PeerName, veth.PeerNamespace = cableName, netlink.NsFd(client.Fd())
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetMaster(veth, b), netlink.LinkSetUp(veth))
}

// exchangeKeys makes the two WireGuard devices peers, which may send each other everything.
func (l *lab) exchangeKeys() error {
	const port = 51820
	key := map[*testenv.Host]*ecdh.PrivateKey{}
	for _, host := range []*testenv.Host{l.Node, l.Client} {
		var err error
		if key[host], err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return err
		}
	}
	set := func(host, peer *testenv.Host) error {
		_, err := host.Run(l.context(), base64.StdEncoding.EncodeToString(key[host].Bytes()),
			"wg", "set", cableName, "listen-port", fmt.Sprint(port), "private-key", "/dev/stdin",
			"peer", base64.StdEncoding.EncodeToString(key[peer].PublicKey().Bytes()),
			"allowed-ips", "0.0.0.0/0,::/0", "endpoint", fmt.Sprintf("%s:%d", peer.IPv4, port))
		return err
	}
	return errors.Join(set(l.Node, l.Client), set(l.Client, l.Node))
}

// TestBadNetwork: connections through a service stay whole where the network between client and node delays, loses,
// doubles and reorders packets both ways, and no packet of theirs gets past the programs untranslated.
func TestBadNetwork(t *testing.T) {
	// Without segmentation a loss is that of one packet, not of a large part of the transfer.
	l := newLab(t, testenv.Config{Backends: 2, Segmentation: testenv.OffloadOff})
	for _, b := range l.Backends {
		server, err := testenv.ServeEcho(t.Context(), b.Namespace, b.Name, fmt.Sprint(":", echoPort))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
	}
	ends := map[*testenv.Host]string{l.Node: l.Client.NodeDevice, l.Client: "eth0"}
	for host, device := range ends {
		err := host.Do(func() error {
			link, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			return netlink.QdiscReplace(netlink.NewNetem(
				netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)},
				netlink.NetemQdiscAttrs{Latency: 5000, Jitter: 1000, Limit: 10000, Loss: 2, Duplicate: 5, ReorderProb: 25, Gap: 1}))
		})
		if errors.Is(err, unix.ENOENT) {
			t.Skip("this kernel has no netem")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for _, family := range []int{4, 6} {
		client := testenv.NewHTTPClient(l.Client.Namespace, netip.AddrPort{})
		if err := client.Transfer(l.context(), l.vips[family], 1<<20); err != nil {
			t.Errorf("IPv%d: %v; reasons %v", family, err, l.reasons())
		}
		client.Close()
		// The service moves to the other backend after each connection's beginning: it stays where it began.
		vip, service := netip.AddrPortFrom(l.vips[family].Addr(), 7), uint32(family)
		ids := []uint32{service * 10, service*10 + 1}
		for i, id := range ids {
			l.rig.backend(id, service, netip.AddrPortFrom(l.Backends[i].Addr(family), echoPort), maps.BackendActive, 1)
		}
		l.rig.frontend(vip, service)
		for i := range 20 {
			l.rig.slots(service, ids[i%2])
			c, err := testenv.DialEcho(l.context(), l.Client.Namespace, netip.AddrPort{}, vip)
			if err != nil {
				t.Errorf("IPv%d: %v; reasons %v", family, err, l.reasons())
				continue
			}
			l.rig.slots(service, ids[(i+1)%2])
			for range 5 {
				if err := c.Say(l.context(), "still there?"); err != nil {
					t.Errorf("IPv%d: %v; reasons %v", family, err, l.reasons())
					break
				}
			}
			c.Close()
		}
	}
}
