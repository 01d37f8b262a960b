// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The address plan. Nothing of it leaves the namespaces.
//
//	                   IPv4                       IPv6
//	outside network    192.0.2.0/24               fd00:c::/64
//	  node             192.0.2.1                  fd00:c::1
//	  client           192.0.2.2, .3, ...         fd00:c::2, ::3, ...
//	pods               10.244.0.0/16              fd00:244::/32
//	  of the node      10.244.1.0/24              fd00:244:1::/64
//	  backends         10.244.1.11, .12, ...      fd00:244:1::11, ::12, ...
//	  client pods      10.244.1.101, .102, ...    fd00:244:1::101, ::102, ...
//	  cni0, of Bridge  10.244.1.1                 fd00:244:1::1
//	services           10.96.0.0/16               fd00:96::/112
//	load balancers     198.51.100.0/24            fd00:1b::/112
//	external           203.0.113.0/24             fd00:e::/112
//
// The last three are nobody's addresses: the client has its default route by the node, and so have the pods.
const (
	PodCIDR4            = "10.244.0.0/16"
	PodCIDR6            = "fd00:244::/32"
	ServiceCIDR4        = "10.96.0.0/16"
	ServiceCIDR6        = "fd00:96::/112"
	LoadBalancerCIDR4   = "198.51.100.0/24"
	LoadBalancerCIDR6   = "fd00:1b::/112"
	ExternalCIDR4       = "203.0.113.0/24"
	ExternalCIDR6       = "fd00:e::/112"
	outsideCIDR4        = "192.0.2.0/24"
	outsideCIDR6        = "fd00:c::/64"
	nodeAddress4        = "192.0.2.1"
	nodeAddress6        = "fd00:c::1"
	gateway4            = "169.254.1.1"               // of every pod, answered for by proxy ARP
	gateway6            = "fe80::ecee:eeff:feee:eeee" // of every pod, from gatewayMAC
	bridgeAddress4      = "10.244.1.1"                // gateway of every pod of a bridge
	bridgeAddress6      = "fd00:244:1::1"             //
	bridgePrefix4       = 24                          // length
	bridgePrefix6       = 64                          //
	bridge              = "cni0"                      //
	uplink              = "eth0"                      // as is the device of a client and of a pod
	maxClients, maxPods = 200, 89
)

// gatewayMAC is that of the node's side of every pod's link, as Calico has it.
func gatewayMAC() net.HardwareAddr { return net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee} }

// Config says what a Lab is like. The zero Config is a client, a node and no pods, under strict rules.
type Config struct {
	ClientAddresses int // of the outside client, in each family; 0 is 1
	Backends        int // pods that the rules let others connect to
	ClientPods      int // pods that nobody may connect to

	// Bridge has the pods hang on a bridge of the node, in one network with it, as the bridge CNI makes them.
	// BridgeNetfilter has the node's rules see what the bridge carries from pod to pod
	// (bridge-nf-call-iptables, bridge-nf-call-ip6tables).
	Bridge, BridgeNetfilter bool

	ReversePath  ReversePath // rp_filter of the node
	NoRules      bool        // no rule set on the node, so no connection tracking
	Masquerade   bool        // the node masquerades what pods send outside, as CNIs do
	MasqueradeTo string      // a range of ports for it, "10000-29999"; "": the kernel's choice

	// Segmentation is generic receive offload, generic and TCP segmentation offload, TxChecksum is that of
	// senders: of every device of the lab, on both ends. Without TxChecksum no sender segments, whatever
	// Segmentation says.
	Segmentation, TxChecksum Offload
}

// ReversePath is what a node does about a packet whose source it would not reach by the same device.
type ReversePath int

// The values of rp_filter.
const (
	ReversePathStrict ReversePath = iota // rp_filter=1
	ReversePathOff                       // rp_filter=0
	ReversePathLoose                     // rp_filter=2
)

func (r ReversePath) sysctl() string { return [...]string{"1", "0", "2"}[r] }

// Offload is a setting of a device.
type Offload int

// The settings. As of Linux 6.18 the kernel's own are: receive offload off, all else on.
const (
	OffloadDefault Offload = iota
	OffloadOn
	OffloadOff
)

func (o Offload) ethtool() string { return [...]string{"", "on", "off"}[o] }

// Host is a namespace with addresses: the client, the node or a pod.
type Host struct {
	*Namespace
	IPv4, IPv6 netip.Addr
	NodeDevice string // of a pod and of the client: the node's side of its link
}

// Addr returns the address of a family, 4 or 6.
func (h *Host) Addr(family int) netip.Addr {
	if family == 6 {
		return h.IPv6
	}
	return h.IPv4
}

// Lab is one node with routed pods, and a client outside:
//
//	client eth0 ---- eth0 node veth0, veth1, ... ---- eth0 pod
//
// The node forwards and is the client's and the pods' gateway; the client is the node's. A pod's link is made
// as Calico makes it: /32 and /128 routes on the node, no bridge, proxy ARP for the pod's gateway. With
// Config.Bridge veth0, veth1, ... are ports of the bridge cni0, and pods reach each other by it.
type Lab struct {
	Config     Config
	Client     *Host
	Node       *Host
	Backends   []*Host // on veth0, veth1, ...
	ClientPods []*Host // on those that follow

	closers []func() error // of what is open, run from the last
}

// OpenLab builds a lab. When that fails half-way, it has undone what it had built.
func OpenLab(ctx context.Context, c Config) (*Lab, error) {
	l := &Lab{Config: c}
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("build the lab: %w", err), l.Close())
	}
	return l, nil
}

// Close lets go of the namespaces, which end, with their devices, soon after: the kernel is not waited for.
// Servers and processes in them are their owners' to end before.
func (l *Lab) Close() error {
	var errs []error
	for _, close := range slices.Backward(l.closers) {
		errs = append(errs, close())
	}
	l.closers = nil
	return errors.Join(errs...)
}

// Hosts returns all hosts: node, client, backends, client pods.
func (l *Lab) Hosts() []*Host {
	return slices.Concat([]*Host{l.Node, l.Client}, l.Backends, l.ClientPods)
}

func (l *Lab) build(ctx context.Context) (err error) {
	c := l.Config
	if c.ClientAddresses > maxClients || c.Backends > maxPods || c.ClientPods > maxPods {
		return fmt.Errorf("the address plan has room for %d clients and %d pods of a kind", maxClients, maxPods)
	}
	if l.Node, err = l.host("node", netip.MustParseAddr(nodeAddress4), netip.MustParseAddr(nodeAddress6)); err != nil {
		return err
	}
	// Before the first device, which then starts with these values.
	if err := l.Node.sysctls([][2]string{
		{"net.ipv4.ip_forward", "1"},
		{"net.ipv6.conf.all.forwarding", "1"},
		{"net.ipv6.conf.default.forwarding", "1"},
		{"net.ipv4.conf.all.rp_filter", c.ReversePath.sysctl()},
		{"net.ipv4.conf.default.rp_filter", c.ReversePath.sysctl()},
		{"net.ipv4.conf.lo.rp_filter", c.ReversePath.sysctl()},
	}); err != nil {
		return err
	}
	if err := l.addClient(); err != nil {
		return fmt.Errorf("add the client: %w", err)
	}
	if c.Bridge {
		if err := l.addBridge(); err != nil {
			return fmt.Errorf("add the bridge: %w", err)
		}
	}
	for i := range c.Backends {
		pod, err := l.addPod(fmt.Sprintf("backend%d", i), i, 11+i)
		if err != nil {
			return fmt.Errorf("add backend %d: %w", i, err)
		}
		l.Backends = append(l.Backends, pod)
	}
	for i := range c.ClientPods {
		pod, err := l.addPod(fmt.Sprintf("clientpod%d", i), c.Backends+i, 101+i)
		if err != nil {
			return fmt.Errorf("add client pod %d: %w", i, err)
		}
		l.ClientPods = append(l.ClientPods, pod)
	}
	if err := l.setOffloads(ctx); err != nil {
		return err
	}
	return l.loadRules(ctx)
}

// host makes a namespace that the lab owns.
func (l *Lab) host(name string, ipv4, ipv6 netip.Addr) (*Host, error) {
	n, err := NewNamespace(name)
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, n.Close)
	return &Host{Namespace: n, IPv4: ipv4, IPv6: ipv6}, nil
}

func (l *Lab) addClient() (err error) {
	ipv4, ipv6 := l.Node.IPv4.Next(), l.Node.IPv6.Next()
	if l.Client, err = l.host("client", ipv4, ipv6); err != nil {
		return err
	}
	l.Client.NodeDevice = uplink
	if err := l.connect(l.Client, nil); err != nil {
		return err
	}
	if err := l.Node.addAddresses(uplink, withBits(l.Node.IPv4, 24), withBits(l.Node.IPv6, 64)); err != nil {
		return err
	}
	for range max(1, l.Config.ClientAddresses) {
		if err := l.Client.addAddresses(uplink, withBits(ipv4, 24), withBits(ipv6, 64)); err != nil {
			return err
		}
		ipv4, ipv6 = ipv4.Next(), ipv6.Next()
	}
	return errors.Join(
		l.Node.addRoute(uplink, netip.Prefix{}, l.Client.IPv4),
		l.Node.addRoute(uplink, netip.Prefix{}, l.Client.IPv6),
		l.Client.addRoute(uplink, netip.Prefix{}, l.Node.IPv4),
		l.Client.addRoute(uplink, netip.Prefix{}, l.Node.IPv6))
}

func (l *Lab) addBridge() error {
	attributes := netlink.NewLinkAttrs()
	// Given, it stays when ports come and go; the bridge CNI does so as well.
	attributes.Name, attributes.HardwareAddr = bridge, net.HardwareAddr{0x02, 0, 0, 0, 0, 0xb0}
	if err := l.Node.links.LinkAdd(&netlink.Bridge{LinkAttrs: attributes}); err != nil {
		return err
	}
	if err := l.Node.setUp(bridge); err != nil {
		return err
	}
	on := "0"
	if l.Config.BridgeNetfilter {
		on = "1"
	}
	return errors.Join(
		l.Node.sysctls([][2]string{{"net.bridge.bridge-nf-call-iptables", on}, {"net.bridge.bridge-nf-call-ip6tables", on}}),
		l.Node.addAddresses(bridge, withBits(netip.MustParseAddr(bridgeAddress4), bridgePrefix4),
			withBits(netip.MustParseAddr(bridgeAddress6), bridgePrefix6)))
}

// join makes a pod's link a port of the bridge.
func (l *Lab) join(p *Host) error {
	master, err := l.Node.links.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find %s: %w", bridge, err)
	}
	port, err := l.Node.links.LinkByName(p.NodeDevice)
	if err == nil {
		err = l.Node.links.LinkSetMaster(port, master)
	}
	if err != nil {
		return fmt.Errorf("make %s a port of %s: %w", p.NodeDevice, bridge, err)
	}
	return errors.Join(
		p.addAddresses(uplink, withBits(p.IPv4, bridgePrefix4), withBits(p.IPv6, bridgePrefix6)),
		p.addRoute(uplink, netip.Prefix{}, netip.MustParseAddr(bridgeAddress4)),
		p.addRoute(uplink, netip.Prefix{}, netip.MustParseAddr(bridgeAddress6)))
}

// addPod adds a pod whose link is number `device` of the node; its addresses end in `number`, which the IPv6
// one writes in decimal too.
func (l *Lab) addPod(name string, device, number int) (*Host, error) {
	p, err := l.host(name, netip.MustParseAddr(fmt.Sprintf("10.244.1.%d", number)),
		netip.MustParseAddr(fmt.Sprintf("fd00:244:1::%d", number)))
	if err != nil {
		return nil, err
	}
	p.NodeDevice = fmt.Sprintf("veth%d", device)
	if l.Config.Bridge {
		if err := l.connect(p, nil); err != nil {
			return nil, err
		}
		return p, l.join(p)
	}
	if err := l.connect(p, gatewayMAC()); err != nil {
		return nil, err
	}
	via4, via6 := netip.MustParseAddr(gateway4), netip.MustParseAddr(gateway6)
	if err := p.addAddresses(uplink, withBits(p.IPv4, 32), withBits(p.IPv6, 128)); err != nil {
		return nil, err
	}
	return p, errors.Join(
		l.Node.sysctls([][2]string{
			{"net.ipv4.conf." + p.NodeDevice + ".proxy_arp", "1"},
			{"net.ipv4.neigh." + p.NodeDevice + ".proxy_delay", "0"}, // else an answer waits up to 0.8 s
		}),
		l.Node.addRoute(p.NodeDevice, withBits(p.IPv4, 32), netip.Addr{}),
		l.Node.addRoute(p.NodeDevice, withBits(p.IPv6, 128), netip.Addr{}),
		p.addRoute(uplink, withBits(via4, 32), netip.Addr{}),
		p.addRoute(uplink, netip.Prefix{}, via4),
		p.addRoute(uplink, netip.Prefix{}, via6))
}

// connect makes the link between the node and a host, both ends up.
func (l *Lab) connect(h *Host, nodeMAC net.HardwareAddr) error {
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.HardwareAddr = h.NodeDevice, nodeMAC
	veth := netlink.NewVeth(attributes)
	veth.PeerName = uplink
	veth.PeerNamespace = netlink.NsFd(h.file.Fd())
	if err := l.Node.links.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth %s: %w", h.NodeDevice, err)
	}
	return errors.Join(h.setUp(uplink), l.Node.setUp(h.NodeDevice))
}

func (n *Namespace) setUp(device string) error {
	link, err := n.links.LinkByName(device)
	if err == nil {
		err = n.links.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set %s up in %s: %w", device, n.Name, err)
	}
	return nil
}

func (n *Namespace) addAddresses(device string, prefixes ...netip.Prefix) error {
	link, err := n.links.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", device, n.Name, err)
	}
	for _, p := range prefixes {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := n.links.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add %v to %s in %s: %w", p, device, n.Name, err)
		}
	}
	return nil
}

// addRoute adds a route; the zero prefix is the default route, the zero gateway none.
func (n *Namespace) addRoute(device string, to netip.Prefix, via netip.Addr) error {
	link, err := n.links.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", device, n.Name, err)
	}
	r := &netlink.Route{LinkIndex: link.Attrs().Index}
	if to.IsValid() {
		r.Dst = ipNet(to)
	}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := n.links.RouteAdd(r); err != nil {
		return fmt.Errorf("add the route to %v via %v by %s in %s: %w", to, via, device, n.Name, err)
	}
	return nil
}

// setOffloads runs ethtool, for each device whose setting is not the kernel's. Without checksums a sender
// cannot segment, so they are set first.
func (l *Lab) setOffloads(ctx context.Context) error {
	segmentation, checksum := l.Config.Segmentation.ethtool(), l.Config.TxChecksum.ethtool()
	var args []string
	if checksum != "" {
		args = append(args, "tx", checksum)
	}
	if segmentation != "" {
		args = append(args, "gro", segmentation, "gso", segmentation)
		if cmp.Or(checksum, "on") == "on" {
			args = append(args, "tso", segmentation)
		}
	}
	if args == nil {
		return nil
	}
	for _, h := range l.Hosts()[1:] {
		for _, end := range []struct {
			n      *Namespace
			device string
		}{{h.Namespace, uplink}, {l.Node.Namespace, h.NodeDevice}} {
			if _, err := end.n.Run(ctx, "", "ethtool", append([]string{"-K", end.device}, args...)...); err != nil {
				return err
			}
		}
	}
	return nil
}

func withBits(a netip.Addr, bits int) netip.Prefix { return netip.PrefixFrom(a, bits) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
