// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
)

// rowsOfPackets say what becomes of packets and connections, and what health checks say.
var rowsOfPackets = []row{
	{"source address", func(s *rows) {
		// answers asks each server whom it sees.
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}})
		for _, from := range append(s.outside(), s.pod) {
			for _, to := range frontendsOf(1) {
				s.answers(from, to, s.Backends[0])
			}
		}
	}},
	{"direct traffic", func(s *rows) {
		s.apply(service{number: 1, ends: []end{here(s.Backends[0])}})
		for _, from := range s.clients() {
			s.beside(from, clusterIP(1), at(s.Backends[0].IPv4.String(), s.Backends[0].IPv6.String(), 7007))
		}
	}},
	{"two VIPs, one endpoint, one client port", func(s *rows) {
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}}, service{number: 2, ends: []end{here(s.Backends[0])}})
		for _, from := range s.clients() {
			s.beside(from, clusterIP(1), clusterIP(2))
			s.beside(from, clusterIP(1), loadBalancer(1))
		}
	}},
	{"TTL", func(s *rows) {
		pod := s.Backends[0]
		s.apply(service{number: 1, ends: []end{here(pod)}})
		capture := s.capture(pod, "eth0")
		for _, from := range append(s.clients(), pod) {
			s.each(from, clusterIP(1), longEnough)
			seen := 0
			for _, p := range s.captured(capture) {
				if p.Destination.Port() != 7007 {
					continue
				}
				if seen++; p.TTL != 63 {
					s.t.Errorf("a packet from %s arrives with TTL %d", from.Name, p.TTL)
				}
			}
			if seen == 0 {
				s.t.Errorf("no packet from %s", from.Name)
			}
		}
	}},
	{"hairpin", func(s *rows) {
		b := s.Backends
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(b[0])}}, service{number: 2, ends: []end{here(b[0]), here(b[1])}})
		for _, to := range frontendsOf(1) {
			s.answers(b[0], to, b[0])
		}
		s.answers(b[0], clusterIP(2), b[0], b[1])
	}},
	{"hostNetwork", func(s *rows) {
		const ports = "{name: tcp, port: 7008}, {name: udp, port: 7008, protocol: UDP}"
		s.apply(service{number: 1, kind: "LoadBalancer", slices: []slice{{ports: ports, ends: []end{here(s.Node)}}}},
			service{number: 2, kind: "LoadBalancer", spec: externalLocal + "\n" + internalLocal, slices: []slice{{ports: ports, ends: []end{{host: s.Node}}}}})
		for _, from := range s.clients() {
			for _, to := range append(frontendsOf(1), frontendsOf(2)...) {
				s.answersBy(from, to, "node/second")
			}
		}
	}},
	{"established TCP", func(s *rows) {
		b := s.Backends
		one := func(e ...end) service { return service{number: 1, ends: e} }
		s.apply(one(here(b[0])))
		var open []*testenv.EchoConn
		for _, from := range s.clients() {
			for _, family := range []int{4, 6} {
				c, err := testenv.DialEcho(s.soon(), from.Namespace, s.source(from, family), clusterIP(1)(family))
				if err != nil {
					s.t.Fatal(err)
				}
				defer c.Close()
				open = append(open, c)
			}
		}
		for _, e := range [][]end{{here(b[0], unready), here(b[1])}, {here(b[0], draining), here(b[1])}, {here(b[1])}, {}} {
			s.apply(one(e...))
			for _, c := range open {
				if err := c.Say(s.soon(), "still here"); err != nil {
					s.t.Errorf("with endpoints %v: %v", e, err)
				}
			}
			if len(e) > 0 {
				s.answers(s.Client, clusterIP(1), b[1])
			}
		}
	}},
	{"UDP", func(s *rows) {
		b := s.Backends
		var sockets []*testenv.UDPClient
		for _, family := range []int{4, 6} {
			u, err := testenv.NewUDPClient(s.soon(), s.Client.Namespace, s.source(s.Client, family))
			if err != nil {
				s.t.Fatal(err)
			}
			defer u.Close()
			sockets = append(sockets, u)
		}
		second := slice{ports: "{name: tcp, port: 7008}, {name: udp, port: 7008, protocol: UDP}", ends: []end{here(b[0])}}
		for i, step := range []struct {
			what string
			is   service
			to   place
			want string // "" is none
		}{
			{"begins", service{ends: []end{here(b[0])}}, clusterIP(1), "backend0"},
			{"drains beside another", service{ends: []end{here(b[0], draining), here(b[1])}}, clusterIP(1), "backend0"},
			{"other weights", service{slices: []slice{{ends: []end{here(b[0]), here(b[1])},
				meta: fmt.Sprintf(`annotations: {lbagent.io/weights: "%s=0,%s=0"}`, b[0].IPv4, b[0].IPv6)}}}, clusterIP(1), "backend0"},
			{"another policy", service{spec: sticky + internalLocal, ends: []end{there(b[0]), here(b[1])}}, clusterIP(1), "backend0"},
			{"serves no more", service{ends: []end{here(b[0], stopped), here(b[1])}}, clusterIP(1), "backend1"},
			{"gone", service{ends: []end{here(b[0])}}, clusterIP(1), "backend0"},
			{"another targetPort", service{slices: []slice{second}}, clusterIP(1), "backend0/second"},
			{"no endpoint", service{ends: []end{here(b[0], stopped)}}, clusterIP(1), ""},
			{"one again", service{ends: []end{here(b[2])}}, clusterIP(1), "backend2"},
			{"a NodePort", service{kind: "NodePort", ends: []end{here(b[2])}}, nodePort(1), "backend2"},
			{"another Service's NodePort", service{number: 2, kind: "NodePort", ends: []end{here(b[1])},
				ports: "{name: tcp, port: 7, targetPort: 7007, nodePort: 30001}, {name: udp, port: 7, targetPort: 7007, nodePort: 30001, protocol: UDP}"}, nodePort(1), "backend1"},
		} {
			if step.is.number == 0 {
				step.is.number = 1
			}
			s.apply(step.is)
			for j, u := range sockets {
				to := step.to([]int{4, 6}[j])
				ctx := s.soon()
				if step.want == "" {
					ctx = s.short()
				}
				if a, err := u.Ask(ctx, to, fmt.Sprint("step ", i)); a.Server != step.want || (err == nil) != (step.want != "") {
					s.t.Errorf("%s: the next datagram to %s: %s, %v; want %s", step.what, to, a.Server, err, step.want)
				}
			}
		}
	}},
	{"options, extension headers", func(s *rows) {
		pod := s.Backends[0]
		s.apply(service{number: 1, ends: []end{here(pod)}})
		wire := s.capture(s.Client, "eth0")
		arrives := s.capture(pod, "eth0")
		for _, family := range []int{4, 6} {
			source := s.source(s.Client, family)
			u, err := testenv.NewUDPClient(s.soon(), s.Client.Namespace, source)
			if err != nil {
				s.t.Fatal(err)
			}
			defer u.Close()
			to := clusterIP(1)(family)
			p := testenv.DatagramUDP(source, to, "with more")
			p.SourceMAC, p.DestinationMAC = s.mac(s.Client, "eth0"), s.mac(s.Node, "eth0")
			if family == 4 {
				p.IPOptions = []byte{1, 1, 1, 0} // NOP, and the end
			} else {
				p.Extensions = []testenv.Extension{{Type: unix.IPPROTO_DSTOPTS, Body: make([]byte, 6)}}
			}
			if err := wire.Send(p.Bytes()); err != nil {
				s.t.Fatal(err)
			}
			if a, err := u.Receive(s.soon(), to, "with more"); err != nil || a.Server != pod.Name {
				s.t.Errorf("IPv%d: %s, %v", family, a.Server, err)
			}
			there := false
			for _, got := range s.captured(arrives) {
				there = there || got.Source == source && len(got.IPOptions) == len(p.IPOptions) && len(got.Extensions) == len(p.Extensions)
			}
			if !there {
				s.t.Errorf("IPv%d: not seen at the pod with what it had", family)
			}
		}
	}},
	{"out-of-window packets", func(s *rows) {
		s.apply(service{number: 1, ends: []end{here(s.Backends[0])}})
		wire := s.capture(s.Client, "eth0")
		for _, family := range []int{4, 6} {
			c, err := testenv.DialEcho(s.soon(), s.Client.Namespace, s.source(s.Client, family), clusterIP(1)(family))
			if err != nil {
				s.t.Fatal(err)
			}
			defer c.Close()
			p := testenv.SegmentTCP(c.Client, clusterIP(1)(family), testenv.ACK)
			p.SourceMAC, p.DestinationMAC = s.mac(s.Client, "eth0"), s.mac(s.Node, "eth0")
			for range 3 {
				p.Seq, p.Ack = p.Seq+0x3fff_ffff, p.Ack+0x3fff_ffff
				if err := wire.Send(p.Bytes()); err != nil {
					s.t.Fatal(err)
				}
			}
			if err := c.Say(s.soon(), "still here"); err != nil {
				s.t.Error(err)
			}
		}
		// The node's connection tracking has seen and dropped them, and no VIP in them.
		counters, err := s.Counters(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		if counters.Invalid == 0 || len(counters.VIP) != 0 {
			s.t.Errorf("the node's stack saw %+v", counters)
		}
		s.reset()
	}},
	{"no Service's", func(s *rows) {
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}})
		for _, family := range []int{4, 6} {
			s.serve(s.Client, "client", netip.AddrPortFrom(s.Client.Addr(family), 7009).String())
			s.serve(s.Node, "node", netip.AddrPortFrom(s.Node.Addr(family), 7009).String())
		}
		before := s.reason("new_flow")
		s.answersBy(s.Node, at(s.Client.IPv4.String(), s.Client.IPv6.String(), 7009), "client")
		s.answers(s.Client, at("192.0.2.1", "fd00:c::1", 7009), s.Node)
		s.answers(s.pod, at("192.0.2.1", "fd00:c::1", 7009), s.Node)
		s.answersBy(s.Client, at(s.Backends[1].IPv4.String(), s.Backends[1].IPv6.String(), 7008), "backend1/second")
		if after := s.reason("new_flow"); after != before {
			s.t.Errorf("%d flows began", after-before)
		}
	}},
	{"healthCheckNodePort", func(s *rows) {
		b := s.Backends
		const port = 32222
		checked := func(spec string, e ...end) service {
			return service{number: 1, kind: "LoadBalancer", spec: spec, ends: e}
		}
		local := fmt.Sprintf("%s\nhealthCheckNodePort: %d", externalLocal, port)
		for _, step := range []struct {
			is   service
			code int
			body string
		}{
			{checked(local, here(b[0]), here(b[1]), there(b[2])), 200, `"localEndpoints":4,"serviceProxyHealthy":true`},
			{checked(local, here(b[0], draining), there(b[2])), 503, `"localEndpoints":0`},
			{checked(local, here(b[0])), 200, `"service":{"namespace":"default","name":"row-1"}`},
			{checked("", here(b[0])), 0, ""},
		} {
			s.apply(step.is)
			for _, from := range s.clients() {
				for _, node := range []string{"192.0.2.1", "[fd00:c::1]"} {
					s.get(from.Namespace, fmt.Sprint(node, ":", port, "/any"), step.code, step.body)
				}
			}
		}
	}},
}

// beside: one client port has two connections, to two places that lead to one endpoint.
func (s *rows) beside(from *testenv.Host, places ...place) {
	s.t.Helper()
	for _, family := range []int{4, 6} {
		source := s.source(from, family)
		u, err := testenv.NewUDPClient(s.soon(), from.Namespace, source)
		if err != nil {
			s.t.Fatal(err)
		}
		defer u.Close()
		var open []*testenv.EchoConn
		for _, to := range places {
			c, err := testenv.DialEcho(s.soon(), from.Namespace, source, to(family))
			if err != nil {
				s.t.Errorf("connect %s to %s: %v", source, to(family), err)
				continue
			}
			defer c.Close()
			open = append(open, c)
		}
		for round := range 3 {
			for i, to := range places {
				if _, err := u.Ask(s.soon(), to(family), fmt.Sprint(round, i)); err != nil {
					s.t.Errorf("ask %s from %s: %v", to(family), source, err)
				}
			}
			for _, c := range open {
				if err := c.Say(s.soon(), fmt.Sprint(round)); err != nil {
					s.t.Errorf("%s to %s: %v", source, c.RemoteAddr(), err)
				}
			}
		}
	}
}

// capture sees and sends the frames of a device until the row ends.
func (s *rows) capture(h *testenv.Host, device string) *testenv.PacketSocket {
	s.t.Helper()
	c, err := testenv.Capture(h.Namespace, device)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// captured returns the packets that have come to the device.
func (s *rows) captured(c *testenv.PacketSocket) []testenv.Packet {
	s.t.Helper()
	frames, err := c.All()
	if err != nil {
		s.t.Fatal(err)
	}
	var all []testenv.Packet
	for _, f := range frames {
		if p, err := testenv.Parse(f.Data); err == nil && !f.Outgoing {
			all = append(all, p)
		}
	}
	return all
}

// mac is that of a device.
func (s *rows) mac(h *testenv.Host, device string) testenv.MAC {
	s.t.Helper()
	mac, err := h.MAC(device)
	if err != nil {
		s.t.Fatal(err)
	}
	return mac
}
