// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// The answers of the data plane, as real sockets see them.

// eachNetwork runs a test with routed and with bridged pods.
func eachNetwork(t *testing.T, test func(t *testing.T, c testenv.Config)) {
	for _, bridge := range []bool{false, true} {
		t.Run(map[bool]string{false: "routed", true: "bridged"}[bridge], func(t *testing.T) { test(t, testenv.Config{Bridge: bridge}) })
	}
}

// deserted leads another port of the VIPs to a service without endpoints.
func (l *lab) deserted() map[int]netip.AddrPort {
	at := map[int]netip.AddrPort{}
	for family, vip := range l.vips {
		at[family] = netip.AddrPortFrom(vip.Addr(), 81)
		l.rig.frontend(at[family], 9)
	}
	return at
}

// TestRefused: a client of a service without endpoints is told so at once.
func TestRefused(t *testing.T) {
	eachNetwork(t, func(t *testing.T, c testenv.Config) {
		c.Backends, c.ClientPods = 1, 1
		l := newLab(t, c)
		for _, from := range append(l.clients(), l.Backends...) {
			for family, at := range l.deserted() {
				before := l.reasons()["no_backend"]
				if conn, err := from.DialContext(l.context(), "tcp", at.String()); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("TCP, IPv%d, from %s: %v, want a refusal", family, from.Name, err)
					if err == nil {
						conn.Close()
					}
				}
				udp, err := testenv.DialUDP(l.context(), from.Namespace, netip.AddrPort{}, at)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := udp.Ask(l.context(), at, "hello"); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("UDP, IPv%d, from %s: %v, want a refusal", family, from.Name, err)
				}
				udp.Close()
				// Nobody had to send again.
				if packets := l.reasons()["no_backend"] - before; packets != 2 {
					t.Errorf("IPv%d, from %s: %d packets were refused, want 2", family, from.Name, packets)
				}
			}
		}
	})
}

// setTx has a device compute checksums, or leave that to the kernel.
func setTx(t *testing.T, h *testenv.Host, device, value string) {
	t.Helper()
	if _, err := h.Run(t.Context(), "", "ethtool", "-K", device, "tx", value); err != nil {
		t.Fatal(err)
	}
}

// finished fills in the checksum that an ICMP error quotes, as the device that is to do it would.
func finished(t *testing.T, frame []byte) []byte {
	t.Helper()
	frame = slices.Clone(frame)
	at, err := testenv.Locate(frame)
	if err != nil {
		t.Fatal(err)
	}
	quoted := at.Transport + 8
	begin, field := quoted+40, 6
	protocol := frame[quoted+6]
	if frame[quoted]>>4 == 4 {
		begin, protocol = quoted+int(frame[quoted]&15)*4, frame[quoted+9]
	}
	if protocol == testenv.TCP {
		field = 16
	}
	var sum uint32
	for b := frame[begin:at.End]; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(frame[begin+field:], ^uint16(sum))
	return frame
}

// TestErrorChecksum: the checksum of an ICMP error is right whoever finishes the one that it quotes: the client
// itself, the kernel where the error leaves the node, or nobody, because it never meets a wire. So is that of
// what was to be cut in pieces.
func TestErrorChecksum(t *testing.T) {
	on := []string{"on", "off"}
	for _, client := range on {
		for _, node := range on {
			t.Run("tx of the client "+client+", of the node "+node, func(t *testing.T) {
				l := newLab(t, testenv.Config{ClientPods: 1})
				from := l.ClientPods[0]
				setTx(t, from, "eth0", client)
				setTx(t, l.Node, from.NodeDevice, node)
				capture, err := testenv.Capture(from.Namespace, "eth0")
				if err != nil {
					t.Fatal(err)
				}
				defer capture.Close()
				// find returns the error that answers, and how much it quotes.
				find := func(at netip.AddrPort, kind uint8) (f testenv.Frame, quoted int) {
					t.Helper()
					f, err := capture.Find(5*time.Second, func(f testenv.Frame) bool {
						p, err := testenv.Parse(f.Data)
						quoted = len(p.Payload)
						return err == nil && !f.Outgoing && p.Source.Addr() == at.Addr() && p.TTL == 64 && p.ICMPType == kind &&
							(p.Protocol == testenv.ICMP || p.Protocol == testenv.ICMPv6)
					})
					if err != nil {
						t.Fatal(err)
					}
					data := f.Data
					if f.Unfinished {
						data = finished(t, data)
					}
					if err := testenv.CheckSums(data); err != nil {
						t.Errorf("%v: %s", err, f)
					}
					return f, quoted
				}
				unfinished := client == "on" && node == "on"
				for family, at := range l.deserted() {
					for _, segment := range []int{0, 500} {
						conn, err := from.DialContext(l.context(), "udp", at.String())
						if err != nil {
							t.Fatal(err)
						}
						defer conn.Close()
						if segment != 0 {
							raw, err := conn.(*net.UDPConn).SyscallConn()
							if err != nil {
								t.Fatal(err)
							}
							var failed error
							if err := raw.Control(func(fd uintptr) {
								failed = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, segment)
							}); err != nil || failed != nil {
								t.Fatal(err, failed)
							}
						}
						_, err = conn.Write(bytes.Repeat([]byte("question"), 180))
						if segment != 0 && client == "off" && errors.Is(err, unix.EIO) {
							continue // such a client does not segment before 6.11
						}
						if err != nil {
							t.Fatal(err)
						}
						f, quoted := find(at, map[int]uint8{4: 3, 6: 1}[family])
						if segment == 0 && f.Unfinished != unfinished {
							t.Fatalf("the checksum is still to be finished: %v", f.Unfinished)
						}
						if quoted != map[int]int{4: 20, 6: 40}[family]+8 {
							t.Errorf("IPv%d: %d bytes are quoted: %s", family, quoted, f)
						}
						conn.SetDeadline(time.Now().Add(5 * time.Second))
						if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
							t.Errorf("IPv%d, segments of %d: %v, want a refusal", family, segment, err)
						}
					}
					// TCP, to itself: its last hop is the node.
					id := uint32(100 + family)
					l.rig.backend(id, id-96, netip.AddrPortFrom(from.Addr(family), serverPort), maps.BackendActive, 1)
					l.rig.slots(id-96, id)
					at = netip.AddrPortFrom(at.Addr(), 82)
					l.rig.frontend(at, id-96)
					ctx, cancel := context.WithCancel(l.context())
					dialed := make(chan error, 1)
					go func() {
						conn, err := dialNear(ctx, from, at)
						if err == nil {
							conn.Close()
						}
						dialed <- err
					}()
					f, quoted := find(at, map[int]uint8{4: 11, 6: 3}[family])
					cancel()
					if <-dialed == nil {
						t.Fatalf("IPv%d: a connection whose packets live one hop", family)
					}
					if f.Unfinished != unfinished {
						t.Fatalf("the checksum is still to be finished: %v", f.Unfinished)
					}
					if header := map[int]int{4: 20, 6: 40}[family]; quoted != header+40 {
						t.Errorf("IPv%d: %d bytes are quoted, want all %d of the headers: %s", family, quoted, header+40, f)
					}
				}
			})
		}
	}
}

// dialNear connects with packets that live for one hop.
func dialNear(ctx context.Context, from *testenv.Host, at netip.AddrPort) (conn net.Conn, err error) {
	err = from.Do(func() (err error) {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			e := c.Control(func(fd uintptr) {
				if at.Addr().Is4() {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1)
				} else {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1)
				}
			})
			return errors.Join(e, err)
		}}
		d.SetMultipathTCP(false)
		conn, err = d.DialContext(ctx, "tcp", at.String())
		return err
	})
	return conn, err
}

// TestPing: a VIP with endpoints answers, one without says that there is none.
func TestPing(t *testing.T) {
	eachNetwork(t, func(t *testing.T, c testenv.Config) {
		c.Backends, c.ClientPods, c.TxChecksum = 1, 1, testenv.OffloadOff
		l := newLab(t, c)
		for _, from := range append(l.clients(), l.Backends...) {
			for family, vip := range l.vips {
				replied, refused := byte(0), byte(3)
				if family == 6 {
					replied, refused = 129, 1
				}
				for _, payload := range []string{"hello", string(make([]byte, 1400))} {
					l.rig.address(vip.Addr(), maps.AddressClusterIP|maps.AddressEcho)
					got, err := testenv.Ping(l.context(), from.Namespace, vip.Addr(), payload)
					if err != nil || got[0] != replied || string(got[8:]) != payload || binary.BigEndian.Uint32(got[4:]) != testenv.PingID {
						t.Errorf("%s to %s: % x, %v", from.Name, vip.Addr(), got[:min(len(got), 32)], err)
					}
					l.rig.address(vip.Addr(), maps.AddressClusterIP)
					got, err = testenv.Ping(l.context(), from.Namespace, vip.Addr(), payload)
					if err != nil || got[0] != refused {
						t.Errorf("%s to %s, without endpoints: % x, %v", from.Name, vip.Addr(), got[:min(len(got), 32)], err)
					}
				}
			}
		}
	})
}

// TestPodToItself: a pod that is the one endpoint of its Service reaches itself by it, and directly; so do many of
// several endpoints, each sometimes.
func TestPodToItself(t *testing.T) {
	transfer := int64(8 << 20)
	const turns = 40
	if testing.Short() {
		transfer = 1 << 20
	}
	eachNetwork(t, func(t *testing.T, c testenv.Config) {
		for _, offload := range []testenv.Offload{testenv.OffloadOn, testenv.OffloadOff} {
			t.Run(fmt.Sprintf("offloads %v", offload == testenv.OffloadOn), func(t *testing.T) {
				c.Backends, c.ClientPods, c.Segmentation, c.TxChecksum = 2, 1, offload, offload
				l := newLab(t, c)
				pod := l.Backends[0]
				for family, both := range l.vips {
					vip := netip.AddrPortFrom(both.Addr(), 82)
					id := uint32(100 + family)
					l.rig.backend(id, id-96, netip.AddrPortFrom(pod.Addr(family), serverPort), maps.BackendActive, 1)
					l.rig.slots(id-96, id)
					l.rig.frontend(vip, id-96)
					for _, b := range l.Backends {
						l.rig.identity(netip.AddrPortFrom(b.Addr(family), serverPort))
					}
					hairpin := loader.DefaultHairpin()[family/6]

					client := testenv.NewHTTPClient(pod.Namespace, netip.AddrPort{})
					a, err := client.Who(l.context(), vip)
					if err != nil || a.Server != pod.Name || a.Client.Addr() != hairpin {
						t.Fatalf("%s to itself by %s: %+v, %v", pod.Name, vip, a, err)
					}
					if err := client.Transfer(l.context(), vip, transfer); err != nil {
						t.Error(err)
					}
					client.Close()
					// Directly, from a port that a hairpin flow has as well.
					udp, err := testenv.NewUDPClient(l.context(), pod.Namespace, netip.AddrPortFrom(pod.Addr(family), 40000))
					if err != nil {
						t.Fatal(err)
					}
					own := netip.AddrPortFrom(pod.Addr(family), serverPort)
					for i := range turns {
						payload := strings.Repeat(fmt.Sprint(i%10), 1300)
						if a, err := udp.Ask(l.context(), vip, payload); err != nil || a.Server != pod.Name || a.Client.Addr() != hairpin {
							t.Fatalf("UDP of %s to itself by %s: %+v, %v", pod.Name, vip, a.Client, err)
						}
						if a, err := udp.Ask(l.context(), own, "direct"); err != nil || a.Client.Addr() != pod.Addr(family) {
							t.Fatalf("UDP of %s to itself directly: %+v, %v", pod.Name, a, err)
						}
						// Two endpoints, from the same port.
						a, err := udp.Ask(l.context(), both, "which?")
						want := hairpin
						if a.Server != pod.Name {
							want = pod.Addr(family)
						}
						if err != nil || a.Client.Addr() != want {
							t.Fatalf("UDP of %s to %s: %+v, %v", pod.Name, both, a, err)
						}
					}
					udp.Close()
					seen := map[string]int{}
					for range turns {
						client := testenv.NewHTTPClient(pod.Namespace, netip.AddrPort{})
						a, err := client.Who(l.context(), both)
						client.Close()
						want := hairpin
						if a.Server != pod.Name {
							want = pod.Addr(family)
						}
						if err != nil || a.Client.Addr() != want {
							t.Fatalf("%s to %s: %+v, %v", pod.Name, both, a, err)
						}
						seen[a.Server]++
					}
					if len(seen) != 2 {
						t.Errorf("%d connections of %s to %s reached %v", turns, pod.Name, both, seen)
					}
					for _, from := range l.clients() {
						client := testenv.NewHTTPClient(from.Namespace, netip.AddrPort{})
						if a, err := client.Who(l.context(), vip); err != nil || a.Server != pod.Name || a.Client.Addr() != from.Addr(family) {
							t.Errorf("%s to %s: %+v, %v", from.Name, vip, a, err)
						}
						client.Close()
					}
				}
			})
		}
	})
}

// TestTwoServicesOfItself: UDP from one port by two Services to the same pod, which is the client itself.
func TestTwoServicesOfItself(t *testing.T) {
	eachNetwork(t, func(t *testing.T, c testenv.Config) {
		c.Backends = 1
		l := newLab(t, c)
		pod := l.Backends[0]
		for family, vip := range l.vips {
			second := netip.AddrPortFrom(vip.Addr(), 83)
			id := uint32(100 + family)
			l.rig.backend(id, id-96, netip.AddrPortFrom(pod.Addr(family), serverPort), maps.BackendActive, 1)
			l.rig.slots(id-96, id)
			l.rig.frontend(second, id-96)
			udp, err := testenv.NewUDPClient(l.context(), pod.Namespace, netip.AddrPortFrom(pod.Addr(family), 41000))
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			for range 10 {
				first, err := udp.Ask(l.context(), vip, "first")
				if err != nil {
					t.Fatal(err)
				}
				other, err := udp.Ask(l.context(), second, "second")
				if err != nil {
					t.Fatal(err)
				}
				if first.Client.Port() != 41000 || other.Client.Port() == 41000 || first.Client.Addr() != other.Client.Addr() {
					t.Errorf("IPv%d: the pod knows itself as %s and %s", family, first.Client, other.Client)
				}
			}
		}
	})
}

// TestAnswersNoLinkHeader: answers leave by a device whose frames begin with the IP header.
func TestAnswersNoLinkHeader(t *testing.T) {
	for _, f := range families {
		h := newHost(t)
		r := &rig{t: t, maps: h.maps}
		r.frontend(f.vip, 1)
		hairpin := netip.AddrPortFrom(hairpinOf(f), f.client.Port())
		own := netip.AddrPortFrom(f.client.Addr(), 8080)
		r.backend(2, 2, own, maps.BackendActive, 1)
		r.slots(2, 2)
		r.frontend(f.vip2, 2)
		r.address(f.vip.Addr(), maps.AddressClusterIP|maps.AddressEcho)
		tun := &netlink.Tuntap{
			LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: true,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE, Queues: 1,
		}
		h.do(func() error {
			if err := netlink.LinkAdd(tun); err != nil {
				return fmt.Errorf("make a tun device: %w", err)
			}
			return netlink.LinkSetUp(tun)
		})
		wire := tun.Fds[0]
		defer wire.Close()
		l := h.load(false)
		h.set(l, loader.Device{Index: tun.Index, Name: "tun0", Role: loader.Node, LinkHeader: 0})
		datagram := testenv.DatagramUDP(f.client, f.vip, "hello")
		segment := testenv.SegmentTCP(f.client, f.vip, testenv.SYN)
		request := echo(f.client, f.vip, "hello")
		toItself := testenv.DatagramUDP(f.client, f.vip2, "hello")
		turned := toItself
		turned.Source, turned.Destination, turned.TTL = hairpin, own, 63
		dying := toItself
		dying.TTL = 1
		for _, c := range []struct{ in, out testenv.Packet }{
			{datagram, unreachable(datagram.Bytes())},
			{segment, resetOf(segment, 0, 1, testenv.RST|testenv.ACK)},
			{request, replyOf(request)},
			{toItself, turned},
			{dying, timeExceeded(dying.Bytes())},
		} {
			if _, err := wire.Write(c.in.Bytes()[14:]); err != nil {
				t.Fatal(err)
			}
			want := c.out.Bytes()[14:]
			if got, err := nextFrom(wire, c.out.Source.Addr()); err != nil || !bytes.Equal(got, want) {
				frame := append(c.out.Bytes()[:14], got...)
				t.Errorf("%s is answered by %s, want %s: %v", testenv.Describe(c.in.Bytes()), testenv.Describe(frame), testenv.Describe(c.out.Bytes()), err)
			}
		}
		if _, in := r.flow(own, hairpin, lb.UDP); in != "pending" {
			t.Errorf("%s: the reply half is in %q", f.name, in)
		}
	}
}

// nextFrom reads the next IP packet of a source from a tun device, past the kernel's own talk.
func nextFrom(wire *os.File, source netip.Addr) ([]byte, error) {
	buffer := make([]byte, 2048)
	for {
		wire.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := wire.Read(buffer)
		if err != nil {
			return nil, err
		}
		at, size := 12, 4
		if buffer[0]>>4 == 6 {
			at, size = 8, 16
		}
		if bytes.Equal(buffer[at:at+size], source.AsSlice()) {
			return slices.Clone(buffer[:n]), nil
		}
	}
}

// TestAnswersTagged: the answer to a tagged frame bears the tag, and goes to the MAC address that asked.
func TestAnswersTagged(t *testing.T) {
	l := newLab(t, testenv.Config{})
	wire, err := testenv.Capture(l.Client.Namespace, "eth0")
	l.rig.must(err)
	defer wire.Close()
	_, mac := l.device(l.Client.NodeDevice)
	own := testenv.MAC{2, 0, 0, 0, 0, 0xc}
	for family, at := range l.deserted() {
		l.rig.address(at.Addr(), maps.AddressEcho)
		client := netip.AddrPortFrom(l.Client.Addr(family), 40000)
		datagram, segment, request := testenv.DatagramUDP(client, at, "x"), testenv.SegmentTCP(client, at, testenv.SYN), echo(client, at, "x")
		for _, c := range []struct{ in, out testenv.Packet }{
			{datagram, unreachable(datagram.Bytes())},
			{segment, resetOf(segment, 0, 1, testenv.RST|testenv.ACK)},
			{request, replyOf(request)},
		} {
			c.in.VLAN, c.out.VLAN = []uint16{6}, []uint16{6}
			c.in.SourceMAC, c.in.DestinationMAC = own, mac
			c.out.SourceMAC, c.out.DestinationMAC = mac, own
			l.rig.must(wire.Send(c.in.Bytes()))
			if _, err := wire.Find(5*time.Second, func(f testenv.Frame) bool { return bytes.Equal(f.Data, c.out.Bytes()) }); err != nil {
				t.Errorf("%s: %v, want %s", testenv.Describe(c.in.Bytes()), err, testenv.Describe(c.out.Bytes()))
			}
		}
	}
}
