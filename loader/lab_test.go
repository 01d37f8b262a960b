// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// The data plane between real sockets, without an agent: the maps are written by hand. What an agent does
// with manifests is tested in package agent.

// lab is a testenv.Lab whose node has the programs, and a service of all backends in both families.
type lab struct {
	*testenv.Lab
	rig      *rig
	vips     map[int]netip.AddrPort // by family
	programs *loader.Loader
	devices  []loader.Device // that have programs
}

const (
	serverPort = 8080
	echoPort   = 7007

	labSilentBackend = time.Second
)

func newLab(t *testing.T, c testenv.Config) *lab {
	t.Helper()
	l := &lab{Lab: testenv.NewLab(t, c), vips: map[int]netip.AddrPort{4: ap("10.96.0.10:80"), 6: ap("[fd00:96::10]:80")}}
	m, err := maps.New(maps.Sizes{Frontends: 64, Services: 16, Slots: 1024, Backends: 256, Flows: 65536})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	l.rig = &rig{t: t, maps: m}
	id := uint32(0)
	for service, family := range map[uint32]int{1: 4, 2: 6} {
		var ids []uint32
		for _, b := range l.Backends {
			id++
			ids = append(ids, id)
			l.rig.backend(id, service, netip.AddrPortFrom(b.Addr(family), serverPort), maps.BackendActive, 1)
		}
		l.rig.slots(service, ids...)
		l.rig.frontend(l.vips[family], service)
	}
	for _, b := range l.Backends {
		for _, serve := range []func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error){testenv.ServeHTTP, testenv.ServeUDP} {
			s, err := serve(t.Context(), b.Namespace, b.Name, fmt.Sprint(":", serverPort))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
		}
	}
	if err := l.Node.Do(func() error {
		l.programs, err = loader.Load(m, loader.Config{SilentBackend: labSilentBackend})
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.programs.Close() })
		pod := loader.Pod
		if c.Bridge {
			pod = loader.Port
		}
		for role, hosts := range map[loader.Role][]*testenv.Host{loader.Node: {l.Client}, pod: append(l.Backends, l.ClientPods...)} {
			for _, host := range hosts {
				link, err := netlink.LinkByName(host.NodeDevice)
				if err != nil {
					return fmt.Errorf("device %s: %w", host.NodeDevice, err)
				}
				if role == loader.Port {
					bridge, err := netlink.LinkByIndex(link.Attrs().MasterIndex)
					if err != nil {
						return fmt.Errorf("the bridge of %s: %w", host.NodeDevice, err)
					}
					port := maps.Device{Bridge: uint32(bridge.Attrs().Index)}
					copy(port.BridgeMac[:], bridge.Attrs().HardwareAddr)
					if err := m.SetDevice(uint32(link.Attrs().Index), port); err != nil {
						return err
					}
				}
				l.devices = append(l.devices, loader.Device{Index: link.Attrs().Index, Name: host.NodeDevice, Role: role, LinkHeader: 14})
			}
		}
		return l.programs.Set(l.devices)
	}); err != nil {
		t.Fatalf("%+v", err)
	}
	l.CheckWhenDone(t) // before the programs go
	return l
}

func (l *lab) clients() []*testenv.Host { return append([]*testenv.Host{l.Client}, l.ClientPods...) }

func (l *lab) context() context.Context {
	ctx, cancel := context.WithTimeout(l.rig.t.Context(), 30*time.Second)
	l.rig.t.Cleanup(cancel)
	return ctx
}

// TestReach: each client reaches every backend through the VIP, and sees the VIP; the backend sees the client.
func TestReach(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 3, ClientPods: 1})
	for _, from := range l.clients() {
		for family, vip := range l.vips {
			seen := map[string]map[string]int{"tcp": {}, "udp": {}}
			const least, most = 10, 100 // flows
			for i := 0; i < least || i < most && (len(seen["tcp"]) < 3 || len(seen["udp"]) < 3); i++ {
				c := testenv.NewHTTPClient(from.Namespace, netip.AddrPort{})
				a, err := c.Who(l.context(), vip)
				c.Close()
				if err != nil {
					t.Fatalf("%s to %s: %v", from.Name, vip, err)
				}
				if a.Client.Addr() != from.Addr(family) {
					t.Errorf("the backend sees %s, not %s", a.Client, from.Addr(family))
				}
				seen["tcp"][a.Server]++
				u, err := testenv.DialUDP(l.context(), from.Namespace, netip.AddrPort{}, vip)
				if err != nil {
					t.Fatal(err)
				}
				a, err = u.Ask(l.context(), vip, "hello")
				u.Close()
				if err != nil {
					t.Fatalf("%s to %s: %v", from.Name, vip, err)
				}
				if a.Client.Addr() != from.Addr(family) {
					t.Errorf("the backend sees %s, not %s", a.Client, from.Addr(family))
				}
				seen["udp"][a.Server]++
			}
			for protocol, servers := range seen {
				if len(servers) != 3 {
					t.Errorf("%s of %s by %s: %d flows reached %v", protocol, vip, from.Name, most, servers)
				}
			}
		}
	}
}

// TestTransfer: bulk through a VIP, under each pair of settings that change how packets look or who may
// refuse them. Six rows cover all pairs of five settings.
func TestTransfer(t *testing.T) {
	size := int64(64 << 20)
	if testing.Short() {
		size = 1 << 20
	}
	on, off := testenv.OffloadOn, testenv.OffloadOff
	strict, none := testenv.ReversePathStrict, testenv.ReversePathOff
	for _, c := range []testenv.Config{
		{Segmentation: on, TxChecksum: on, ReversePath: strict, NoRules: false, Masquerade: true},
		{Segmentation: on, TxChecksum: off, ReversePath: none, NoRules: true, Masquerade: false},
		{Segmentation: off, TxChecksum: on, ReversePath: none, NoRules: false, Masquerade: false},
		{Segmentation: off, TxChecksum: off, ReversePath: strict, NoRules: true, Masquerade: true},
		{Segmentation: on, TxChecksum: off, ReversePath: none, NoRules: false, Masquerade: true},
		{Segmentation: off, TxChecksum: on, ReversePath: strict, NoRules: true, Masquerade: false},
	} {
		c.Backends, c.ClientPods = 1, 1
		t.Run(fmt.Sprintf("segmentation %v, checksum %v, rp_filter %v, rules %v, masquerade %v",
			c.Segmentation == on, c.TxChecksum == on, c.ReversePath == strict, !c.NoRules, c.Masquerade), func(t *testing.T) {
			l := newLab(t, c)
			for _, from := range l.clients() {
				for _, family := range []int{4, 6} {
					client := testenv.NewHTTPClient(from.Namespace, netip.AddrPort{})
					start := time.Now()
					if err := client.Transfer(l.context(), l.vips[family], size); err != nil {
						t.Errorf("%s to %s: %v", from.Name, l.vips[family], err)
					}
					t.Logf("%s to %s: %d MiB each way in %v", from.Name, l.vips[family], size>>20, time.Since(start).Round(time.Millisecond))
					client.Close()
				}
			}
		})
	}
}

// TestHeadersOutOfReach: a packet socket gives the kernel a large frame of which hardly more than the
// Ethernet header can be read directly, as some devices do.
func TestHeadersOutOfReach(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1})
	backend := l.Backends[0]
	for _, at := range []struct {
		host   *testenv.Host
		device string
	}{{l.Client, "eth0"}, {l.Node, l.Client.NodeDevice}, {backend, "eth0"}, {l.Node, backend.NodeDevice}} {
		if err := at.host.Do(func() error {
			link, err := netlink.LinkByName(at.device)
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, 9000)
		}); err != nil {
			t.Fatal(err)
		}
	}
	to, err := l.Node.MAC(l.Client.NodeDevice)
	if err != nil {
		t.Fatal(err)
	}
	capture, err := testenv.Capture(backend.Namespace, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer capture.Close()
	sender, err := testenv.Capture(l.Client.Namespace, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	for family, vip := range l.vips {
		p := testenv.DatagramUDP(netip.AddrPortFrom(l.Client.Addr(family), 40000), vip, string(make([]byte, 6000)))
		p.DestinationMAC = to
		if err := sender.Send(p.Bytes()); err != nil {
			t.Fatal(err)
		}
		want := netip.AddrPortFrom(backend.Addr(family), serverPort)
		if _, err := capture.Find(30*time.Second, func(f testenv.Frame) bool {
			got, err := testenv.Parse(f.Data)
			return err == nil && got.Destination == want && len(got.Payload) == 6000 && testenv.CheckSums(f.Data) == nil
		}); err != nil {
			counts, _ := l.rig.maps.Reasons()
			t.Errorf("IPv%d: %v; reasons %v", family, err, counts)
		}
	}
}

// TestReset: the client of a removed backend that has fallen silent is told so by a reset that its stack
// believes, whoever was to finish the segment's checksum; one whose backend answers is not.
func TestReset(t *testing.T) {
	for _, offload := range []testenv.Offload{testenv.OffloadOn, testenv.OffloadOff} {
		t.Run(fmt.Sprintf("offloads %v", offload == testenv.OffloadOn), func(t *testing.T) {
			l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1, TxChecksum: offload, Segmentation: offload})
			backend := l.Backends[0]
			server, err := testenv.ServeEcho(t.Context(), backend.Namespace, backend.Name, fmt.Sprint(":", echoPort))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { server.Close() })
			lives := map[uint32]maps.BackendLife{}
			for id, family := range map[uint32]int{101: 4, 102: 6} {
				service := id - 98 // 3 and 4
				l.rig.backend(id, service, netip.AddrPortFrom(backend.Addr(family), echoPort), maps.BackendActive, 1)
				l.rig.slots(service, id)
				l.rig.frontend(netip.AddrPortFrom(l.vips[family].Addr(), 7), service)
				lives[id] = maps.BackendLife{Generation: 2, State: maps.BackendRemoved, Port: echoPort}
			}
			type connection struct {
				*testenv.EchoConn
				from   *testenv.Host
				family int
			}
			var connections []connection
			for _, from := range l.clients() {
				for _, family := range []int{4, 6} {
					c, err := testenv.DialEcho(l.context(), from.Namespace, netip.AddrPort{}, netip.AddrPortFrom(l.vips[family].Addr(), 7))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					connections = append(connections, connection{c, from, family})
				}
			}
			for id, life := range lives {
				l.rig.slots(id - 98)
				l.rig.must(l.rig.maps.SetBackendLife(id, life))
			}
			// Removed, but it answers.
			for range 3 {
				time.Sleep(labSilentBackend / 2)
				for _, c := range connections {
					if err := c.Say(l.context(), "still there?"); err != nil {
						t.Errorf("%s, IPv%d: %v", c.from.Name, c.family, err)
					}
				}
			}
			time.Sleep(2 * labSilentBackend) // idle for longer than a silent backend may be
			for _, c := range connections {
				if err := c.Say(l.context(), "still there?"); err != nil {
					t.Errorf("%s, IPv%d, after a pause: %v", c.from.Name, c.family, err)
				}
			}
			// Silent.
			if err := backend.Do(func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return netlink.LinkSetDown(link)
			}); err != nil {
				t.Fatal(err)
			}
			var all sync.WaitGroup
			for _, c := range connections {
				all.Go(func() {
					start := time.Now()
					err := c.Say(l.context(), "and now?")
					took := time.Since(start)
					if !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("%s, IPv%d: %v after %v, want a reset", c.from.Name, c.family, err, took)
					}
					// Of the retransmissions after 200, 400, ... ms one comes within twice the timeout, or later where all is slow.
					// The programs' clock is late by up to a tick when the first one goes.
					if took < labSilentBackend-tick || took > 10*labSilentBackend {
						t.Errorf("%s, IPv%d: the reset came after %v", c.from.Name, c.family, took)
					}
				})
			}
			all.Wait()
		})
	}
}

// TestLostHalfOfConnection: the table loses one half of an established connection. Whoever speaks first after a
// second of silence, it goes on.
func TestLostHalfOfConnection(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1})
	for family, vip := range l.vips {
		backend := netip.AddrPortFrom(l.Backends[0].Addr(family), echoPort)
		vip = netip.AddrPortFrom(vip.Addr(), 7)
		listener, err := l.Backends[0].Listen(t.Context(), "tcp", backend.String())
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		id := uint32(100 + family)
		l.rig.identity(backend)
		l.rig.backend(id, id-98, backend, maps.BackendActive, 1)
		l.rig.slots(id-98, id)
		l.rig.frontend(vip, id-98)
		for _, lost := range []string{"forward", "reply"} {
			for _, first := range []string{"client", "backend"} {
				for _, tables := range [][]string{{"flows"}, {"flows", "pending"}} {
					t.Run(fmt.Sprintf("v%d/%s lost from %v/%s first", family, lost, tables, first), func(t *testing.T) {
						client, err := l.Client.DialContext(l.context(), "tcp", vip.String())
						if err != nil {
							t.Fatal(err)
						}
						defer client.Close()
						server, err := listener.Accept()
						if err != nil {
							t.Fatal(err)
						}
						defer server.Close()
						say := func(from, to net.Conn, text string) {
							t.Helper()
							from.SetDeadline(time.Now().Add(30 * time.Second))
							to.SetDeadline(time.Now().Add(30 * time.Second))
							if _, err := io.WriteString(from, text); err != nil {
								t.Fatal(err)
							}
							got := make([]byte, len(text))
							if _, err := io.ReadFull(to, got); err != nil || string(got) != text {
								t.Fatalf("%q came as %q: %v", text, got, err)
							}
						}
						say(client, server, "hello")
						say(server, client, "welcome")
						time.Sleep(1100 * time.Millisecond)
						from := netip.MustParseAddrPort(client.LocalAddr().String())
						key := tuple(from, vip, lb.TCP)
						if lost == "reply" {
							key = tuple(backend, from, lb.TCP)
						}
						for _, in := range tables {
							l.rig.must(l.rig.maps.All()[in].Delete(key))
						}
						switch {
						case first == "client":
							say(client, server, "first")
						case lost == "reply" && len(tables) == 2:
							// Nothing knows the VIP of what the backend says, until the client speaks; then
							// it is sent again. What the client's stack says to the backend's own address
							// meanwhile must not end the connection there.
							if _, err := io.WriteString(server, "first"); err != nil {
								t.Fatal(err)
							}
							time.Sleep(50 * time.Millisecond)
							say(client, server, "are you there?")
							got := make([]byte, 5)
							client.SetDeadline(time.Now().Add(30 * time.Second))
							if _, err := io.ReadFull(client, got); err != nil || string(got) != "first" {
								t.Fatalf("%q came: %v", got, err)
							}
						default:
							say(server, client, "first")
						}
						say(client, server, "and on")
						say(server, client, "and on")
						if _, in := l.rig.flow(key.From(), key.To(), lb.TCP); in != "flows" {
							t.Errorf("the half that was lost is in %q", in)
						}
					})
				}
			}
		}
	}
}
