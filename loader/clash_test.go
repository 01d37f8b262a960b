// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// identity says that an address and port are a backend's own.
func (r *rig) identity(a netip.AddrPort) {
	r.t.Helper()
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
		r.must(r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: p}), maps.FrontendOf(0, lb.Identity)))
	}
}

// TestClashes: one client port, two services with one endpoint, or a service and its endpoint directly, whichever
// comes first: both connections exchange data to the end, in the strict lab.
func TestClashes(t *testing.T) {
	l := newLab(t, testenv.Config{Backends: 1, ClientPods: 1})
	backend := l.Backends[0]
	for _, serve := range []func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error){testenv.ServeEcho, testenv.ServeUDP} {
		server, err := serve(t.Context(), backend.Namespace, backend.Name, fmt.Sprint(":", echoPort))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
	}
	// Two services with one endpoint, of each family.
	vips := map[int][2]netip.AddrPort{4: {ap("10.96.0.20:7"), ap("10.96.0.21:7")}, 6: {ap("[fd00:96::20]:7"), ap("[fd00:96::21]:7")}}
	id := uint32(100)
	for family, pair := range vips {
		at := netip.AddrPortFrom(backend.Addr(family), echoPort)
		l.rig.identity(at)
		for _, vip := range pair {
			id++
			l.rig.backend(id, id-96, at, maps.BackendActive, 1)
			l.rig.slots(id-96, id)
			l.rig.frontend(vip, id-96)
		}
	}
	port := uint16(45000)
	for family, pair := range vips {
		direct := netip.AddrPortFrom(backend.Addr(family), echoPort)
		for name, order := range map[string][2]netip.AddrPort{
			"VIP first": {pair[0], direct}, "direct first": {direct, pair[0]}, "two VIPs": pair,
		} {
			for _, from := range l.clients() {
				port++
				source := netip.AddrPortFrom(from.Addr(family), port)
				t.Run(fmt.Sprintf("%s/v%d/TCP/%s", name, family, from.Name), func(t *testing.T) {
					var connections []*testenv.EchoConn
					for i, to := range order {
						c, err := testenv.DialEcho(l.context(), from.Namespace, source, to)
						if err != nil {
							t.Fatalf("connect to %s: %v", to, err)
						}
						defer c.Close()
						if remapped := c.Client.Port() != port; remapped != (i == 1) {
							t.Errorf("the backend sees connection %d from %s", i, c.Client)
						}
						connections = append(connections, c)
					}
					for round := range 50 {
						for i, c := range connections {
							if err := c.Say(l.context(), fmt.Sprint("round ", round, " of ", i)); err != nil {
								t.Fatalf("connection to %s: %v", order[i], err)
							}
						}
					}
				})
				t.Run(fmt.Sprintf("%s/v%d/UDP/%s", name, family, from.Name), func(t *testing.T) {
					u, err := testenv.NewUDPClient(l.context(), from.Namespace, source)
					if err != nil {
						t.Fatal(err)
					}
					defer u.Close()
					for round := range 20 {
						for i, to := range order {
							a, err := u.Ask(l.context(), to, fmt.Sprint("round ", round, " of ", i))
							if err != nil {
								t.Fatalf("ask %s: %v", to, err)
							}
							if remapped := a.Client.Port() != port; remapped != (i == 1) {
								t.Errorf("the backend sees flow %d from %s", i, a.Client)
							}
						}
					}
				})
			}
		}
	}
}

// TestGossip: two pods that talk to each other through each other's Service from one fixed UDP port, both
// directions at once.
func TestGossip(t *testing.T) {
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprint("v", family), func(t *testing.T) {
			l := newLab(t, testenv.Config{Backends: 2})
			const port, questions = 7946, 40
			vip := map[int][2]netip.AddrPort{4: {ap("10.96.0.30:7946"), ap("10.96.0.31:7946")}, 6: {ap("[fd00:96::30]:7946"), ap("[fd00:96::31]:7946")}}[family]
			var sockets [2]net.PacketConn
			for side, pod := range l.Backends {
				at := netip.AddrPortFrom(pod.Addr(family), port)
				id := uint32(100 + side)
				l.rig.identity(at)
				l.rig.backend(id, id-96, at, maps.BackendActive, 1)
				l.rig.slots(id-96, id)
				l.rig.frontend(vip[side], id-96)
				var err error
				if sockets[side], err = pod.ListenPacket(t.Context(), "udp", at.String()); err != nil {
					t.Fatal(err)
				}
				defer sockets[side].Close()
			}
			var all, answered sync.WaitGroup
			answered.Add(len(sockets))
			for side, socket := range sockets {
				peer := vip[1-side]
				answers := make(chan string, questions)
				all.Go(func() { // answers whoever asks
					defer close(answers)
					buffer := make([]byte, 2048)
					socket.SetReadDeadline(time.Now().Add(30 * time.Second))
					for len(answers) < questions {
						n, from, err := socket.ReadFrom(buffer)
						if err != nil {
							t.Errorf("side %d has %d answers of %d: %v", side, len(answers), questions, err)
							break
						}
						switch text := string(buffer[:n]); text[0] {
						case '?':
							if _, err := socket.WriteTo([]byte("!"+text[1:]), from); err != nil {
								t.Error(err)
							}
						case '!':
							if got := from.(*net.UDPAddr).AddrPort(); netip.AddrPortFrom(got.Addr().Unmap(), got.Port()) != peer {
								t.Errorf("side %d: an answer from %s, not from %s", side, got, peer)
							}
							answers <- text
						}
					}
					answered.Done()
					for { // the other side may still ask
						n, from, err := socket.ReadFrom(buffer)
						if err != nil {
							return
						}
						if buffer[0] == '?' {
							buffer[0] = '!'
							socket.WriteTo(buffer[:n], from)
						}
					}
				})
				all.Go(func() {
					for i := range questions {
						if _, err := socket.WriteTo([]byte(fmt.Sprint("?", i)), net.UDPAddrFromAddrPort(peer)); err != nil {
							t.Error(err)
						}
						time.Sleep(time.Millisecond)
					}
				})
			}
			answered.Wait()
			for _, socket := range sockets {
				socket.Close()
			}
			all.Wait()
		})
	}
}
