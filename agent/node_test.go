// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// The node rung: what clients see when manifests change, through a real agent in the strict lab.

// endpoint is one line of an EndpointSlice.
type endpoint struct {
	host       *testenv.Host
	conditions string // YAML, such as "{ready: false}"; "" for none
}

// talk is a Service of TCP and UDP in both families, with these endpoints.
func (s *site) talk(name string, number int, created string, endpoints ...endpoint) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: default, creationTimestamp: %[3]s}
spec:
  clusterIP: 10.96.0.%[2]d
  clusterIPs: [10.96.0.%[2]d, "fd00:96::%[2]d"]
  ipFamilyPolicy: RequireDualStack
  ports:
  - {name: tcp, port: 7, targetPort: 7007}
  - {name: udp, port: 7, targetPort: 7007, protocol: UDP}
`, name, number, created)
	for _, family := range []int{4, 6} {
		fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s-%d, namespace: default, labels: {kubernetes.io/service-name: %s}}
addressType: IPv%d
ports: [{name: tcp, port: 7007}, {name: udp, port: 7007, protocol: UDP}]
endpoints:
`, name, family, name, family)
		for _, e := range endpoints {
			fmt.Fprintf(&b, "- addresses: [%q]\n", e.host.Addr(family))
			if e.conditions != "" {
				fmt.Fprintf(&b, "  conditions: %s\n", e.conditions)
			}
		}
		if len(endpoints) == 0 {
			b.WriteString("  []\n")
		}
	}
	return b.String()
}

const (
	older = `"2024-01-01T00:00:00Z"`
	newer = `"2025-01-01T00:00:00Z"`
)

func talkVIP(number, family int) netip.AddrPort {
	if family == 6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[fd00:96::%d]:7", number))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("10.96.0.%d:7", number))
}

// newTalk is a site whose backends echo, with an agent that runs.
func newTalk(t *testing.T, manifest func(*site) string) *site {
	t.Helper()
	s := newSite(t)
	s.echo()
	s.write("talk.yaml", manifest(s))
	s.start(s.config)
	s.inForce(manifest(s))
	return s
}

// echo has every backend echo, by TCP and UDP.
func (s *site) echo() {
	s.t.Helper()
	for _, b := range s.Backends {
		for _, serve := range []func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error){testenv.ServeEcho, testenv.ServeUDP} {
			server, err := serve(s.t.Context(), b.Namespace, b.Name, ":7007")
			if err != nil {
				s.t.Fatal(err)
			}
			s.t.Cleanup(func() { server.Close() })
		}
	}
}

// inForce waits until an agent has put a file's latest content in force: until the slots of both protocols name the
// addresses in it, and nothing is left to do. Status says so only of before the writes that are under way.
func (s *site) inForce(manifest string) {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
		missing := fmt.Sprint(err)
		if err == nil {
			missing = ""
			active, chosen := map[lb.VIP]bool{}, map[lb.VIP]bool{}
			for id, b := range m.EachBackend() {
				if b.Life.State == maps.BackendActive {
					active[b.VIP()] = true
					chosen[b.VIP()] = slices.Contains(m.Slots(m.Service(b.Service).Cluster), id)
				}
			}
			for _, h := range s.Backends {
				for _, family := range []int{4, 6} {
					a := h.Addr(family).String()
					line, rest, _ := strings.Cut(manifest, fmt.Sprintf("%q]\n", a))
					want := line != manifest && !strings.HasPrefix(rest, "  conditions")
					for _, p := range []lb.Protocol{lb.TCP, lb.UDP} {
						at := lb.VIP{Addr: h.Addr(family), Port: 7007, Protocol: p}
						if active[at] != want || chosen[at] != want {
							missing = fmt.Sprintf("backend %s active: %v, chosen: %v, want %v", at, active[at], chosen[at], want)
						}
					}
				}
			}
			m.Close()
		}
		status, err := api.NewClient(s.config.Socket).Status(s.t.Context())
		if err != nil {
			missing = err.Error()
		} else if status.Apply.Pending > 0 || status.Apply.LastApply.IsZero() || len(status.Programs) == 0 {
			missing = "the agent is at work"
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not in force: %s", missing)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// change writes a manifest and waits until it is in force.
func (s *site) change(manifest string) {
	s.t.Helper()
	s.write("talk.yaml", manifest)
	s.inForce(manifest)
}

func (s *site) soon() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	s.t.Cleanup(cancel)
	return ctx
}

// dial connects by TCP from a fixed port and says something.
func (s *site) dial(port uint16, vip netip.AddrPort) *testenv.EchoConn {
	s.t.Helper()
	source := netip.AddrPortFrom(s.Client.Addr(familyOf(vip)), port)
	c, err := testenv.DialEcho(s.soon(), s.Client.Namespace, source, vip)
	if err != nil {
		s.t.Fatalf("connect to %s: %v", vip, err)
	}
	if err := c.Say(s.soon(), "hello"); err != nil {
		s.t.Fatalf("talk to %s: %v", vip, err)
	}
	return c
}

func familyOf(a netip.AddrPort) int {
	if a.Addr().Is4() {
		return 4
	}
	return 6
}

// TestBackendRemovedUnderUDP: the very next datagram of a socket with a fixed port reaches another backend, over
// and over, while TCP connections stay where they are.
func TestBackendRemovedUnderUDP(t *testing.T) {
	all := func(s *site) []endpoint {
		return []endpoint{{host: s.Backends[0]}, {host: s.Backends[1]}, {host: s.Backends[2]}}
	}
	s := newTalk(t, func(s *site) string { return s.talk("talk", 20, older, all(s)...) })
	type client struct {
		*testenv.UDPClient
		vip  netip.AddrPort
		last string
	}
	var clients []*client
	var connections []*testenv.EchoConn
	for _, family := range []int{4, 6} {
		vip := talkVIP(20, family)
		for i := range uint16(6) {
			u, err := testenv.NewUDPClient(s.soon(), s.Client.Namespace, netip.AddrPortFrom(s.Client.Addr(family), 41000+i))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { u.Close() })
			clients = append(clients, &client{UDPClient: u, vip: vip})
			c := s.dial(42000+i, vip)
			t.Cleanup(func() { c.Close() })
			connections = append(connections, c)
		}
	}
	ask := func(round string, gone *testenv.Host) (moved int) {
		t.Helper()
		for i, c := range clients {
			a, err := c.Ask(s.soon(), c.vip, fmt.Sprint(round, i))
			if err != nil {
				t.Errorf("%s: the next datagram of %s to %s: %v", round, c.LocalAddr(), c.vip, err)
				continue
			}
			if gone != nil && a.Server == gone.Name {
				t.Errorf("%s: a datagram of %s reached %s, which is gone", round, c.LocalAddr(), a.Server)
			}
			if c.last != "" && c.last != a.Server {
				if gone == nil || c.last != gone.Name {
					t.Errorf("%s: %s was moved from %s, which is still there", round, c.LocalAddr(), c.last)
				}
				moved++
			}
			c.last = a.Server
		}
		for _, c := range connections {
			if err := c.Say(s.soon(), round); err != nil {
				t.Errorf("%s: connection to %s: %v", round, c.Server, err)
			}
		}
		return moved
	}
	ask("begin", nil)
	ask("again", nil) // now answered and spoken again
	moved := 0
	for round := range 3 {
		gone := s.Backends[round]
		var left []endpoint
		for _, e := range all(s) {
			if e.host != gone {
				left = append(left, e)
			}
		}
		s.change(s.talk("talk", 20, older, left...))
		moved += ask(fmt.Sprint("without ", gone.Name), gone)
		s.change(s.talk("talk", 20, older, all(s)...))
		ask(fmt.Sprint("with ", gone.Name), nil)
	}
	if moved == 0 {
		t.Error("no client was on a backend that went")
	}

	// No endpoint at all, then one: nothing negative is remembered.
	s.change(s.talk("talk", 20, older))
	for _, c := range clients[:1] {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if a, err := c.Ask(ctx, c.vip, "nobody"); err == nil {
			t.Errorf("without an endpoint %s answers", a.Server)
		}
		cancel()
	}
	s.change(s.talk("talk", 20, older, endpoint{host: s.Backends[1]}))
	for i, c := range clients {
		if a, err := c.Ask(s.soon(), c.vip, fmt.Sprint("one", i)); err != nil || a.Server != s.Backends[1].Name {
			t.Errorf("with one endpoint: %v, %v", a.Server, err)
		}
	}
}

// TestClientPortReused: a connection from a port whose last connection has ended, or has been silent for longer
// than its entry lives, selects anew, though the old entry is still in the table.
func TestClientPortReused(t *testing.T) {
	s := newTalk(t, func(s *site) string { return s.talk("talk", 20, older, endpoint{host: s.Backends[0]}) })
	for _, end := range []struct {
		name string
		end  func(c *testenv.EchoConn)
		anew bool
	}{
		{"FIN", func(c *testenv.EchoConn) {
			if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			// The server closes its side then; its FIN ends the stream.
			if n, err := c.Conn.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("after the FIN: %d bytes, %v", n, err)
			}
			c.Close()
		}, true},
		{"RST", func(c *testenv.EchoConn) {
			if err := c.Reset(); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"silence, within the timeout", func(c *testenv.EchoConn) { vanish(t, c) }, false},
		{"silence, past the timeout", func(c *testenv.EchoConn) {
			vanish(t, c)
			s.ageFlows(25 * time.Hour)
		}, true},
	} {
		for _, family := range []int{4, 6} {
			t.Run(fmt.Sprintf("%s/v%d", end.name, family), func(t *testing.T) {
				s.t = t
				vip := talkVIP(20, family)
				const port = 43000
				s.change(s.talk("talk", 20, older, endpoint{host: s.Backends[0]}))
				first := s.dial(port, vip)
				if first.Server != s.Backends[0].Name {
					t.Fatalf("connected to %s", first.Server)
				}
				// The first backend keeps what it has and gets nothing new, so its generation stays and
				// only the entry's end can be the reason for another choice.
				s.change(s.talk("talk", 20, older, endpoint{s.Backends[0], "{ready: false, serving: true, terminating: true}"}, endpoint{host: s.Backends[1]}))
				end.end(first)
				time.Sleep(20 * time.Millisecond) // for the last segments
				if !s.hasFlow(s.Client.Addr(family), port) {
					t.Fatal("the old entry is gone; it should be in the way")
				}
				capture, err := testenv.Capture(s.Backends[0].Namespace, "eth0")
				if err != nil {
					t.Fatal(err)
				}
				defer capture.Close()
				second := s.dial(port, vip)
				if second.Server != s.Backends[1].Name {
					t.Errorf("the next connection reached %s, want %s", second.Server, s.Backends[1].Name)
				}
				// Within the timeout its SYN goes where the entry says, to a socket that is still open
				// there; the answer makes the client reset that, and then it selects anew too.
				frames, err := capture.All()
				if err != nil {
					t.Fatal(err)
				}
				old := false
				for _, f := range frames {
					p, err := testenv.Parse(f.Data)
					old = old || err == nil && p.Source.Port() == port && p.TCPFlags == testenv.SYN
				}
				if old == end.anew {
					t.Errorf("a SYN at the old backend: %v", old)
				}
				if err := second.Reset(); err != nil {
					t.Error(err)
				}
				time.Sleep(20 * time.Millisecond)
				s.ageFlows(48 * time.Hour)
			})
		}
	}
}

// vanish closes a connection so that nothing is sent: as if the client's machine had lost its power.
func vanish(t *testing.T, c *testenv.EchoConn) {
	t.Helper()
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
	}); e != nil || err != nil {
		t.Fatal("repair mode:", e, err)
	}
	c.Conn.Close()
}

// flowTables opens the pinned flow tables.
func (s *site) flowTables() []*ebpf.Map {
	s.t.Helper()
	var tables []*ebpf.Map
	for _, name := range []string{"flows", "pending"} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.config.BPFRoot, "maps", name), nil)
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { m.Close() })
		tables = append(tables, m)
	}
	return tables
}

// ageFlows makes every entry older, as if the clock had been moved ahead.
func (s *site) ageFlows(by time.Duration) {
	s.t.Helper()
	for _, m := range s.flowTables() {
		entries := map[maps.Tuple]maps.Flow{}
		var k maps.Tuple
		var f maps.Flow
		for i := m.Iterate(); i.Next(&k, &f); {
			entries[k] = f
		}
		for k, f := range entries {
			f.LastSeenNs -= uint64(by)
			if err := m.Put(k, f); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

func (s *site) hasFlow(client netip.Addr, port uint16) bool {
	s.t.Helper()
	for _, m := range s.flowTables() {
		var k maps.Tuple
		var f maps.Flow
		for i := m.Iterate(); i.Next(&k, &f); {
			if k.From() == netip.AddrPortFrom(client, port) {
				return true
			}
		}
	}
	return false
}

// TestTwoServicesOneVIP: the older keeps it, whichever is read first; the other is named, and has it when the
// older goes.
func TestTwoServicesOneVIP(t *testing.T) {
	s := newTalk(t, func(s *site) string { return s.talk("talk", 20, newer, endpoint{host: s.Backends[0]}) })
	who := func() string {
		t.Helper()
		c := s.dial(0, talkVIP(20, 6))
		defer c.Close()
		return c.Server
	}
	if got := who(); got != s.Backends[0].Name {
		t.Errorf("alone: %s", got)
	}
	// It moves to the older one, and back; UDP and new connections with it.
	s.write("elder.yaml", s.talk("elder", 20, older, endpoint{host: s.Backends[1]}))
	status := s.eventually(func(status api.Status) string {
		if len(status.Problems) == 0 || status.Apply.Pending > 0 {
			return "no problem"
		}
		return ""
	})
	for _, p := range status.Problems {
		if p.Object != "Service default/talk" || !strings.HasSuffix(p.File, "talk.yaml") || p.Field == "" ||
			!strings.Contains(p.Message, "default/elder") || p.Severity != "warning" {
			t.Errorf("problem %+v", p)
		}
	}
	if got := who(); got != s.Backends[1].Name {
		t.Errorf("beside the older: %s", got)
	}
	s.write("elder.yaml", s.talk("elder", 21, older, endpoint{host: s.Backends[1]}))
	s.eventually(func(status api.Status) string {
		if len(status.Problems) > 0 || status.Apply.Pending > 0 {
			return "still a problem"
		}
		return ""
	})
	if got := who(); got != s.Backends[0].Name {
		t.Errorf("after the older has another: %s", got)
	}
}

// TestServiceWithoutSlices: no error; it has no endpoints, until it has.
func TestServiceWithoutSlices(t *testing.T) {
	s := newTalk(t, func(s *site) string {
		service, _, _ := strings.Cut(s.talk("talk", 20, older), "---\n")
		return service
	})
	status := s.eventually(func(status api.Status) string { return "" })
	if len(status.Problems) != 0 {
		t.Errorf("problems: %+v", status.Problems)
	}
	if c, err := testenv.DialEcho(s.short(), s.Client.Namespace, netip.AddrPort{}, talkVIP(20, 4)); err == nil {
		t.Errorf("%s answers", c.Server)
		c.Close()
	}
	s.change(s.talk("talk", 20, older, endpoint{host: s.Backends[2]}))
	c := s.dial(0, talkVIP(20, 4))
	defer c.Close()
}

func (s *site) short() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), 300*time.Millisecond)
	s.t.Cleanup(cancel)
	return ctx
}

// removedOf returns the removed backends of a host, and whether their own addresses are among the frontends.
func (s *site) removedOf(h *testenv.Host) map[lb.VIP]bool {
	s.t.Helper()
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	named := map[lb.VIP]bool{}
	err = m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
		named[k.VIP()] = lb.Kind(f.Kind) == lb.Identity
		return true
	})
	if err != nil {
		s.t.Fatal(err)
	}
	removed := map[lb.VIP]bool{}
	for _, b := range m.EachBackend() {
		if a := b.Addr().Addr(); b.Life.State == maps.BackendRemoved && (a == h.IPv4 || a == h.IPv6) {
			removed[b.VIP()] = named[b.VIP()]
		}
	}
	return removed
}

// wantRemoved waits until so many backends of a host are removed and not free.
func (s *site) wantRemoved(when string, h *testenv.Host, want int) {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		removed := s.removedOf(h)
		for vip, named := range removed {
			if !named {
				s.t.Fatalf("%s: the removed backend %s has lost its identity", when, vip)
			}
		}
		if len(removed) == want {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: %d removed backends of %s are kept, want %d: %v", when, len(removed), h.Name, want, removed)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestRemovedBackendKept: a removed backend with a living connection keeps its id and its identity, over sweeps and
// a restart; those without one, and it when that has ended, become free.
func TestRemovedBackendKept(t *testing.T) {
	with := func(hosts ...int) func(*site) string {
		return func(s *site) string {
			var endpoints []endpoint
			for _, i := range hosts {
				endpoints = append(endpoints, endpoint{host: s.Backends[i]})
			}
			return s.talk("talk", 20, older, endpoints...)
		}
	}
	s := newTalk(t, with(0))
	s.last.terminate()
	s.config.SweepInterval = 100 * time.Millisecond
	s.start(s.config)
	s.inForce(with(0)(s))
	gone, passing := s.Backends[0], s.Backends[2]
	var connections []*testenv.EchoConn
	for _, family := range []int{4, 6} {
		connections = append(connections, s.dial(0, talkVIP(20, family)))
	}
	say := func(when string) {
		t.Helper()
		for _, c := range connections {
			if err := c.Say(s.soon(), when); err != nil || c.Server != gone.Name {
				t.Errorf("%s: connection to %s: %v", when, c.Server, err)
			}
		}
	}
	// That one more backend comes, goes and is free shows that sweeps have begun and ended since.
	pass := func(when string) {
		t.Helper()
		s.change(with(1, 2)(s))
		s.change(with(1)(s))
		s.wantRemoved(when, passing, 0)
		s.wantRemoved(when, gone, len(connections))
		say(when)
	}
	s.change(with(1)(s))
	s.wantRemoved("removed", gone, len(connections)) // those of UDP are free
	pass("removed")
	s.last.terminate()
	s.start(s.config)
	s.inForce(with(1)(s))
	pass("after a restart")

	for _, c := range connections {
		if err := c.Reset(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond) // for the last segments
	s.ageFlows(48 * time.Hour)
	s.wantRemoved("ended", gone, 0)
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	halves := 0
	for _, in := range []maps.Table{maps.Pending, maps.Flows} {
		if err := m.EachHalf(in, func(maps.Tuple, maps.Flow) bool { halves++; return true }); err != nil {
			t.Fatal(err)
		}
	}
	if halves != 0 {
		t.Errorf("%d halves of flows are left", halves)
	}
}
