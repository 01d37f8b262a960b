// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// The loopback device, which the programs are run at, is made a port of a bridge, or a device with a VLAN.
const loopback = 1

var (
	bridgeMAC = testenv.MAC{2, 0, 0, 0, 0, 0xb}
	otherMAC  = testenv.MAC{2, 0, 0, 0, 0, 0xc} // of whoever is behind another port
	everybody = testenv.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// newPort is newRig, at the port of a bridge.
func newPort(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.keepMAC = true
	r.must(r.maps.SetDevice(loopback, maps.Device{Bridge: 7, BridgeMac: bridgeMAC}))
	t.Cleanup(func() { r.must(r.maps.DeleteDevice(loopback)) })
	return r
}

func sentTo(to testenv.MAC, p testenv.Packet) testenv.Packet {
	p.DestinationMAC = to
	return p
}

// identities makes the backend's own address one that clients may talk to directly.
func (r *rig) identities(f family) {
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
		r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: f.backend.Addr(), Port: f.backend.Port(), Protocol: p}), maps.FrontendOf(0, lb.Identity)))
	}
}

// TestPort: a flow of a pod on a bridge whose backend is on another port: to the host's stack in both
// directions, by whatever MAC the frames come.
func TestPort(t *testing.T) {
	for _, f := range families {
		for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
			t.Run(f.name+" "+protocol.String(), func(t *testing.T) {
				r := newPort(t)
				r.service(f)
				packet := func(from, to netip.AddrPort, flags uint8, seq, ack uint32) testenv.Packet {
					if protocol == lb.UDP {
						return testenv.DatagramUDP(from, to, "hello")
					}
					p := testenv.SegmentTCP(from, to, flags)
					p.Seq, p.Ack = seq, ack
					return p
				}
				up := func(flags uint8, seq, ack uint32, reason string) {
					t.Helper()
					p := packet(f.client, f.vip, flags, seq, ack)
					out := p
					out.Destination = f.backend
					r.expect("port_in", sentTo(bridgeMAC, p).Bytes(), pass, reason, sentTo(bridgeMAC, out).Bytes())
					if reason == "new_flow" {
						reason = "forward"
					}
					// Where the gateway is somebody else.
					r.expect("port_in", sentTo(otherMAC, p).Bytes(), pass, reason, sentTo(bridgeMAC, out).Bytes())
				}
				down := func(flags uint8, seq, ack uint32) {
					t.Helper()
					p := packet(f.backend, f.client, flags, seq, ack)
					before, in := r.flow(f.backend, f.client, protocol)
					r.expect("port_in", sentTo(otherMAC, p).Bytes(), pass, "detour", sentTo(bridgeMAC, p).Bytes())
					untouched := sentTo(bridgeMAC, p).Bytes()
					r.expect("port_in", untouched, pass, "other_hook", untouched)
					if after, _ := r.flow(f.backend, f.client, protocol); after != before || in == "" {
						t.Errorf("the detour is noted: %+v, and before %+v (in %q)", after, before, in)
					}
					out := p
					out.Source = f.vip
					r.expect("pod_out", p.Bytes(), pass, "reply", out.Bytes())
				}
				toAll := sentTo(everybody, packet(f.client, f.vip, testenv.SYN, 0, 0)).Bytes()
				r.expect("port_in", toAll, pass, "not_host", toAll)
				reply := packet(f.backend, f.client, testenv.ACK, 1, 1)
				stray := sentTo(otherMAC, reply).Bytes()
				r.expect("port_in", stray, pass, "no_service", stray)

				up(testenv.SYN, 10, 0, "new_flow")
				down(testenv.SYN|testenv.ACK, 500, 11)
				up(testenv.ACK, 11, 501, "forward")
				if _, in := r.flow(f.client, f.vip, protocol); in != "flows" {
					t.Fatalf("the flow is in %q", in)
				}
				down(testenv.ACK, 501, 11)
				up(testenv.ACK, 11, 501, "forward")

				toAll = sentTo(everybody, reply).Bytes()
				r.expect("port_in", toAll, pass, "not_host", toAll)
				r.expect("pod_in", stray, pass, "not_host", stray) // a routed pod's device has no other frames
				// A bridge that is not known: the reply is switched, and translated none the less.
				r.must(r.maps.DeleteDevice(loopback))
				r.expect("port_in", stray, pass, "other_hook", stray)
				r.must(r.maps.SetDevice(loopback, maps.Device{Bridge: 7, BridgeMac: bridgeMAC}))
				r.age(25 * time.Hour)
				r.expect("port_in", stray, pass, "no_service", stray)
			})
		}
	}
}

// TestPortSwitched: what changes no address stays the bridge's to carry.
func TestPortSwitched(t *testing.T) {
	for _, f := range families {
		r := newPort(t)
		r.service(f)
		r.identities(f)
		ask := sentTo(otherMAC, testenv.DatagramUDP(f.client, f.backend, "x")).Bytes()
		answer := sentTo(otherMAC, testenv.DatagramUDP(f.backend, f.client, "x")).Bytes()
		// Noted once each: at egress what is not assured yet, at ingress from then on.
		for _, want := range []string{"pending", "flows", "flows"} {
			reason := "direct"
			if want == "pending" {
				reason = "new_direct"
			}
			r.expect("port_in", ask, pass, reason, ask)
			r.expect("pod_out", ask, pass, "direct", ask)
			r.expect("port_in", answer, pass, "direct", answer)
			r.expect("pod_out", answer, pass, "direct", answer)
			if _, in := r.flow(f.client, f.backend, lb.UDP); in != want {
				t.Fatalf("%s: the direct flow is in %q, want %q", f.name, in, want)
			}
		}
		if back, _ := r.flow(f.backend, f.client, lb.UDP); back.Packets != 3 {
			t.Errorf("%s: %d answers are counted, want 3", f.name, back.Packets)
		}

		// A connection to the backend itself that is known to it by another port, as the service has this one.
		r.clearFlows()
		toVIP := sentTo(bridgeMAC, testenv.DatagramUDP(f.client, f.vip, "x"))
		if got := r.run("port_in", toVIP.Bytes()); got.Reason != "new_flow" {
			t.Fatal(got.Reason)
		}
		got := r.run("port_in", ask)
		seen, err := testenv.Parse(got.Frame)
		r.must(err)
		if got.Reason != "new_flow" || seen.Source.Port() == f.client.Port() || seen.DestinationMAC != otherMAC {
			t.Errorf("%s: %s, to %s: %s", f.name, got.Reason, seen.DestinationMAC, testenv.Describe(got.Frame))
		}
		back := sentTo(otherMAC, testenv.DatagramUDP(f.backend, seen.Source, "x"))
		r.expect("port_in", back.Bytes(), pass, "other_hook", back.Bytes())
		out := back
		out.Destination = f.client
		r.expect("pod_out", back.Bytes(), pass, "reply", out.Bytes())
	}
}

// TestUplinkIsPort: the cable of a bridge that pods hang on.
func TestUplinkIsPort(t *testing.T) {
	for _, f := range families {
		r := newPort(t)
		r.service(f)
		p, reply := testenv.DatagramUDP(f.client, f.vip, "x"), testenv.DatagramUDP(f.backend, f.client, "x")
		// The switch outside has sent it to all: it is another node's, which may have the same VIP.
		others := sentTo(otherMAC, p).Bytes()
		r.expect("node_in", others, pass, "no_service", others)
		out := p
		out.Destination = f.backend
		r.expect("node_in", sentTo(bridgeMAC, p).Bytes(), pass, "new_flow", sentTo(bridgeMAC, out).Bytes())
		r.expect("node_in", others, pass, "no_service", others)
		// A backend on another node, in the same network.
		r.expect("node_in", sentTo(otherMAC, reply).Bytes(), pass, "detour", sentTo(bridgeMAC, reply).Bytes())
		r.expect("node_in", sentTo(bridgeMAC, reply).Bytes(), pass, "no_service", sentTo(bridgeMAC, reply).Bytes())
		// Assured, as the client speaks again.
		r.run("node_out", reply.Bytes())
		r.expect("node_in", sentTo(bridgeMAC, p).Bytes(), pass, "forward", sentTo(bridgeMAC, out).Bytes())
		r.expect("node_in", others, pass, "not_host", others)
		r.expect("node_in", sentTo(otherMAC, reply).Bytes(), pass, "detour", sentTo(bridgeMAC, reply).Bytes())
		fragment := sentTo(otherMAC, p)
		fragment.Fragment = &testenv.Fragment{ID: 7, More: true}
		fragment.Payload = make([]byte, 64)
		r.expect("node_in", fragment.Bytes(), pass, "fragment", fragment.Bytes())
		fragment.DestinationMAC = bridgeMAC
		r.expect("node_in", fragment.Bytes(), drop, "vip_fragment", nil)

		r.must(r.maps.DeleteDevice(loopback))
		mine := sentTo(bridgeMAC, p).Bytes()
		r.expect("node_in", mine, pass, "not_host", mine)
	}
}

// TestUplinkIsPortDirect: a client behind the cable has talked straight to a backend through this host and does so past
// it now. What it sends is the bridge's to carry, though its address has become a Service's.
func TestUplinkIsPortDirect(t *testing.T) {
	for _, f := range families {
		for name, ids := range map[string][]uint32{"another backend": {2}, "no backend": nil} {
			t.Run(f.name+"/"+name, func(t *testing.T) {
				r := newPort(t)
				r.identity(f.backend)
				segment := func(to testenv.MAC, flags uint8, seq, ack uint32) []byte {
					p := testenv.SegmentTCP(f.client, f.backend, flags)
					p.Seq, p.Ack = seq, ack
					return sentTo(to, p).Bytes()
				}
				r.run("node_in", segment(bridgeMAC, testenv.SYN, 1000, 0))
				answer := testenv.SegmentTCP(f.backend, f.client, testenv.SYN|testenv.ACK)
				answer.Seq, answer.Ack = 5000, 1001
				r.run("node_out", answer.Bytes())
				r.run("node_in", segment(bridgeMAC, testenv.ACK, 1001, 5001))
				r.run("node_in", segment(bridgeMAC, testenv.RST, 1001, 0))
				if flow, in := r.flow(f.client, f.backend, lb.TCP); in != "flows" || flow.State == 0 {
					t.Fatalf("the flow is in %q, state %d; want flows, closing", in, flow.State)
				}
				r.backend(2, 1, f.backend2, maps.BackendActive, 1)
				r.slots(1, ids...)
				r.frontend(f.backend, 1)
				syn := segment(otherMAC, testenv.SYN, 9000, 0)
				r.expect("node_in", syn, pass, "no_service", syn)
			})
		}
	}
}

// redirect is what a router says to `to` about a frame that it has sent.
func redirect(t *testing.T, f family, to netip.Addr, frame []byte) testenv.Packet {
	t.Helper()
	router := f.other.Addr()
	if f.name == "v4" {
		p, err := testenv.ErrorICMP(router, to, 5, 1, 0x0af40105, frame)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	at, err := testenv.Locate(frame)
	if err != nil {
		t.Fatal(err)
	}
	quoted := frame[at.Network:at.End]
	quoted = append(slices.Clone(quoted), make([]byte, -len(quoted)&7)...)
	target := f.backend.Addr().As16()
	payload := slices.Concat(target[:], target[:],
		[]byte{2, 1, 2, 0, 0, 0, 0, 5}, // the target's link-layer address
		[]byte{4, byte(1 + len(quoted)/8), 0, 0, 0, 0, 0, 0}, quoted)
	return testenv.Packet{
		Source: netip.AddrPortFrom(router, 0), Destination: netip.AddrPortFrom(to, 0),
		Protocol: testenv.ICMPv6, ICMPType: 137, Payload: payload,
	}
}

// TestRedirect: those about a translated flow go no further; every other one does, and every other ICMP error.
func TestRedirect(t *testing.T) {
	for _, f := range families {
		for protocol, p := range map[string]testenv.Packet{
			"udp": testenv.DatagramUDP(f.client, f.vip, "hello"), "tcp": testenv.SegmentTCP(f.client, f.vip, testenv.SYN),
		} {
			for _, program := range []string{"pod_out", "node_out"} {
				r := newRig(t)
				r.service(f)
				r.identities(f)
				forward := p
				forward.Destination = f.backend
				back := p
				back.Source, back.Destination = f.backend, f.client
				toClient := redirect(t, f, f.client.Addr(), forward.Bytes())
				toBackend := redirect(t, f, f.backend.Addr(), back.Bytes())
				passes := func(what string, p testenv.Packet) {
					t.Helper()
					if got := r.run(program, p.Bytes()); got.Verdict != pass || got.Reason != "unsupported" {
						t.Errorf("%s %s, %s: %s, verdict %d", f.name, protocol, what, got.Reason, int32(got.Verdict))
					}
				}
				drops := func(what string, p testenv.Packet) {
					t.Helper()
					if got := r.run(program, p.Bytes()); got.Verdict != drop || got.Reason != "redirect" {
						t.Errorf("%s %s, %s: %s, verdict %d", f.name, protocol, what, got.Reason, int32(got.Verdict))
					}
				}
				passes("without a flow", toClient)
				r.run("pod_in", p.Bytes())
				drops("to the client", toClient)
				drops("to the backend", toBackend)
				elsewhere := forward
				elsewhere.Source = netip.AddrPortFrom(f.client.Addr(), 40001)
				passes("about another port", redirect(t, f, f.client.Addr(), elsewhere.Bytes()))
				// What it quotes says how far it is to the ports.
				if f.ipOptions {
					options := forward
					options.IPOptions = []byte{1, 1, 1, 1}
					drops("with IP options", redirect(t, f, f.client.Addr(), options.Bytes()))
				}
				other := toClient
				if other.ICMPType = 3; f.name == "v6" {
					other.ICMPType = 1
				}
				passes("another type", other)
				cut := toClient
				cut.Payload = cut.Payload[:len(cut.Payload)-len(forward.Bytes())+14]
				passes("quoting nothing", cut)
				ping := testenv.Packet{Source: toClient.Source, Destination: toClient.Destination, Protocol: toClient.Protocol, ICMPType: toClient.ICMPType}
				passes("without a body", ping)
				r.age(25 * time.Hour)
				passes("about a flow that is over", toClient)

				r.clearFlows()
				r.run("pod_in", forward.Bytes())
				passes("about a direct connection", toClient)
			}
		}
	}
}

// TestVLANDevice: a frame of a VLAN that has its own device is that device's; one of another VLAN is the parent's.
func TestVLANDevice(t *testing.T) {
	for _, f := range families {
		r := newRig(t)
		r.service(f)
		key := maps.VLANKey{Parent: loopback, Id: 5}
		r.must(r.maps.SetVLAN(key, 9))
		t.Cleanup(func() { r.must(r.maps.DeleteVLAN(key)) })
		up, down := testenv.DatagramUDP(f.client, f.vip, "x"), testenv.DatagramUDP(f.backend, f.client, "x")
		translated, reply := up, down
		translated.Destination, reply.Source = f.backend, f.vip
		for _, tags := range []struct {
			tags   []uint16
			theirs bool
		}{{nil, false}, {[]uint16{5}, true}, {[]uint16{6}, false}, {[]uint16{5, 6}, true}, {[]uint16{6, 5}, false}, {[]uint16{0xe005}, true}} {
			r.clearFlows()
			tagged := func(p testenv.Packet) []byte {
				p.VLAN = tags.tags
				return p.Bytes()
			}
			if tags.theirs {
				for _, program := range []string{"node_in", "pod_in", "port_in", "node_out", "pod_out"} {
					r.expect(program, tagged(up), pass, "other_device", tagged(up))
				}
				continue
			}
			r.expect("node_in", tagged(up), pass, "new_flow", tagged(translated))
			r.expect("node_out", tagged(down), pass, "reply", tagged(reply))
		}
		fragment := up
		fragment.VLAN, fragment.Fragment, fragment.Payload = []uint16{5}, &testenv.Fragment{ID: 7, More: true}, make([]byte, 64)
		r.expect("node_in", fragment.Bytes(), pass, "other_device", fragment.Bytes())
		gre := testenv.Packet{Source: up.Source, Destination: up.Destination, Protocol: unix.IPPROTO_GRE, VLAN: []uint16{5}}
		r.expect("node_in", gre.Bytes(), pass, "other_device", gre.Bytes())
	}
}

// TestSameBridge: client and backend on two ports of a bridge, between real sockets. The stack routes both
// directions and sees one connection, and nobody is told of a shorter way.
func TestSameBridge(t *testing.T) {
	size := int64(64 << 20)
	if testing.Short() {
		size = 4 << 20
	}
	for _, seen := range []bool{false, true} {
		t.Run(fmt.Sprint("bridge-nf-call-iptables ", seen), func(t *testing.T) {
			l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1, Bridge: true, BridgeNetfilter: seen})
			backend := l.Backends[0]
			for _, from := range []*testenv.Host{l.ClientPods[0], l.Client} { // the second comes by the uplink
				for family, vip := range l.vips {
					at := netip.AddrPortFrom(backend.Addr(family), serverPort)
					tcp := netip.AddrPortFrom(from.Addr(family), 41000)
					client := testenv.NewHTTPClient(from.Namespace, tcp)
					start := time.Now()
					if err := client.Transfer(l.context(), vip, size); err != nil {
						t.Fatalf("%s to %s: %v; reasons %v", from.Name, vip, err, l.reasons())
					}
					t.Logf("%s to %s: %d MiB each way in %v", from.Name, vip, size>>20, time.Since(start).Round(time.Millisecond))
					if got := l.conntrack("tcp", tcp, at); got != "ESTABLISHED" {
						t.Errorf("%s to %s: the node's conntrack says %q", from.Name, vip, got)
					}
					client.Close()

					udp, err := testenv.DialUDP(l.context(), from.Namespace, netip.AddrPortFrom(from.Addr(family), 42000), vip)
					l.rig.must(err)
					for _, text := range []string{"one", "two", strings.Repeat("three", 250)} {
						if a, err := udp.Ask(l.context(), vip, text); err != nil || a.Client.Addr() != from.Addr(family) {
							t.Errorf("%s asked %s: %v, %+v", from.Name, vip, err, a)
						}
					}
					udp.Close()
					if got := l.conntrack("udp", netip.AddrPortFrom(from.Addr(family), 42000), at); got != "answered" {
						t.Errorf("%s to %s: the node's conntrack says %q of UDP", from.Name, vip, got)
					}
				}
			}
			for _, h := range []*testenv.Host{l.ClientPods[0], backend} {
				if got := l.redirects(h); got != 0 {
					t.Errorf("%s has had %d ICMP redirects", h.Name, got)
				}
			}
			if counts := l.reasons(); counts["detour"] == 0 || counts["redirect"] == 0 {
				t.Errorf("nothing is tested: %v", counts)
			}
		})
	}
}

// TestCableOnBridge: the uplink is a port of the pods' bridge, which has the node's addresses.
func TestCableOnBridge(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1, Bridge: true})
	index, mac := l.device("cni0")
	cable, _ := l.device("eth0")
	l.rig.must(l.rig.maps.SetDevice(cable, maps.Device{Bridge: index, BridgeMac: mac}))
	l.rig.must(l.Node.Do(func() error {
		eth0, err1 := netlink.LinkByName("eth0")
		cni0, err2 := netlink.LinkByName("cni0")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		for _, family := range []int{4, 6} {
			bits := map[int]int{4: 24, 6: 64}[family]
			address := func(flags int) *netlink.Addr {
				a, err := netlink.ParseAddr(netip.PrefixFrom(l.Node.Addr(family), bits).String())
				l.rig.must(err)
				a.Flags = flags
				return a
			}
			if err := errors.Join(netlink.AddrDel(eth0, address(0)), netlink.AddrAdd(cni0, address(unix.IFA_F_NODAD))); err != nil {
				return err
			}
		}
		return netlink.LinkSetMaster(eth0, cni0)
	}))
	for _, from := range []*testenv.Host{l.Client, l.ClientPods[0]} {
		for family, vip := range l.vips {
			client := testenv.NewHTTPClient(from.Namespace, netip.AddrPortFrom(from.Addr(family), 41000))
			if err := client.Transfer(l.context(), vip, 4<<20); err != nil {
				t.Fatalf("%s to %s: %v; reasons %v", from.Name, vip, err, l.reasons())
			}
			if got := l.conntrack("tcp", netip.AddrPortFrom(from.Addr(family), 41000), netip.AddrPortFrom(l.Backends[0].Addr(family), serverPort)); got != "ESTABLISHED" {
				t.Errorf("%s to %s: the node's conntrack says %q", from.Name, vip, got)
			}
			client.Close()
		}
		if got := l.redirects(from); got != 0 {
			t.Errorf("%s has had %d ICMP redirects", from.Name, got)
		}
	}
}

// TestBridgedDirect: what pods on a bridge say to each other without a service is carried as it is, with
// programs on the ports, and has no part in a flow; where it has, as with a backend's own address, too.
func TestBridgedDirect(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1, Bridge: true})
	from, to := l.ClientPods[0], l.Backends[0]
	capture, err := testenv.Capture(from.Namespace, "eth0")
	l.rig.must(err)
	defer capture.Close()
	for _, identity := range []bool{false, true} {
		for _, version := range []int{4, 6} {
			at := netip.AddrPortFrom(to.Addr(version), serverPort)
			if identity {
				l.rig.identities(family{backend: at})
			}
			client := testenv.NewHTTPClient(from.Namespace, netip.AddrPort{})
			if err := client.Transfer(l.context(), at, 1<<20); err != nil {
				t.Error(err)
			}
			client.Close()
			if _, err := capture.Find(5*time.Second, func(f testenv.Frame) bool {
				p, err := testenv.Parse(f.Data)
				return err == nil && !f.Outgoing && p.Source == at && p.TTL == 64
			}); err != nil {
				t.Errorf("identity %v, IPv%d: no answer was switched: %v", identity, version, err)
			}
		}
	}
	counts := l.reasons()
	if counts["detour"] != 0 || counts["forward"] != 0 || counts["direct"] == 0 {
		t.Errorf("reasons: %v", counts)
	}
}

// TestTagBeside: the kernel takes the tag out of a frame before the programs see it.
func TestTagBeside(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1})
	sender, err := testenv.Capture(l.Client.Namespace, "eth0")
	l.rig.must(err)
	defer sender.Close()
	uplink, mac := l.device(l.Client.NodeDevice)
	l.rig.must(l.rig.maps.SetVLAN(maps.VLANKey{Parent: uplink, Id: 5}, 99))
	for family, vip := range l.vips {
		for tag, reason := range map[uint16]string{5: "other_device", 6: "new_flow"} {
			before := l.reasons()[reason]
			p := sentTo(mac, testenv.DatagramUDP(netip.AddrPortFrom(l.Client.Addr(family), 40000+tag), vip, "x"))
			p.VLAN = []uint16{tag}
			l.rig.must(sender.Send(p.Bytes()))
			l.soon(func() string {
				if l.reasons()[reason] != before+1 {
					return fmt.Sprintf("IPv%d, VLAN %d: not %s: %v", family, tag, reason, l.reasons())
				}
				return ""
			})
		}
	}
}

// soon waits until `what` has nothing to complain of.
func (l *lab) soon(what func() string) {
	l.rig.t.Helper()
	var complaint string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if complaint = what(); complaint == "" {
			return
		}
	}
	l.rig.t.Fatal(complaint)
}

func (l *lab) reasons() map[string]uint64 {
	l.rig.t.Helper()
	counts, err := l.rig.maps.Reasons()
	l.rig.must(err)
	for name, n := range counts {
		if n == 0 {
			delete(counts, name)
		}
	}
	return counts
}

// device returns index and MAC address of a device of the node.
func (l *lab) device(name string) (index uint32, mac testenv.MAC) {
	l.rig.t.Helper()
	l.rig.must(l.Node.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			index = uint32(link.Attrs().Index)
			copy(mac[:], link.Attrs().HardwareAddr)
		}
		return err
	}))
	return index, mac
}

// conntrack returns what the node's connection tracking says of a connection: of TCP its state, of UDP whether
// it was answered; "" if it has none.
func (l *lab) conntrack(protocol string, from, to netip.AddrPort) string {
	l.rig.t.Helper()
	var table []byte
	l.rig.must(l.Node.Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/nf_conntrack")
		return err
	}))
	for line := range strings.Lines(string(table)) {
		// ipv4 2 tcp 6 86399 ESTABLISHED src=10.244.1.101 dst=10.244.1.11 sport=41000 dport=8080 src=...
		words := strings.Fields(line)
		first := map[string]string{} // the first of each key is the direction of the first packet
		for _, w := range words {
			if key, value, ok := strings.Cut(w, "="); ok && first[key] == "" {
				first[key] = value
			}
		}
		source, err1 := netip.ParseAddr(first["src"])
		destination, err2 := netip.ParseAddr(first["dst"])
		l.rig.must(errors.Join(err1, err2))
		if len(words) < 6 || words[2] != protocol || source != from.Addr() || destination != to.Addr() ||
			first["sport"] != strconv.Itoa(int(from.Port())) || first["dport"] != strconv.Itoa(int(to.Port())) {
			continue
		}
		switch {
		case protocol == "tcp":
			return words[5]
		case slices.Contains(words, "[UNREPLIED]"):
			return "not answered"
		}
		return "answered"
	}
	return ""
}

// redirects returns how many ICMP and ICMPv6 redirects have come to a host's stack.
func (l *lab) redirects(h *testenv.Host) (total int) {
	l.rig.t.Helper()
	var found int
	l.rig.must(h.Do(func() error {
		for file, name := range map[string]string{"snmp": "InRedirects", "snmp6": "Icmp6InRedirects"} {
			content, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			var names []string
			for line := range strings.Lines(string(content)) {
				words := strings.Fields(line)
				if len(words) == 2 && words[0] == name { // snmp6: a name and its value
					n, _ := strconv.Atoi(words[1])
					total, found = total+n, found+1
				}
				// snmp: a line of names, and a line of values
				if i := slices.Index(names, name); i > 0 && len(words) == len(names) {
					n, _ := strconv.Atoi(words[i])
					total, found = total+n, found+1
				}
				names = words
			}
		}
		return nil
	}))
	if found != 2 {
		l.rig.t.Errorf("%d counters of redirects in %s, want 2", found, h.Name)
	}
	return total
}
