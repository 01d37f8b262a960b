// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
)

// rowsOfFrontends say where a Service is reached.
var rowsOfFrontends = []row{
	{"ClusterIP", func(s *rows) {
		s.apply(service{number: 1, ends: []end{here(s.Backends[0]), there(s.Backends[1])}})
		for _, from := range append(s.clients(), s.Backends[2]) {
			s.answers(from, clusterIP(1), s.Backends[0], s.Backends[1])
		}
	}},
	{"NodePort", func(s *rows) {
		s.apply(service{number: 1, kind: "NodePort", ends: []end{here(s.Backends[0])}})
		for _, from := range s.clients() {
			s.answers(from, nodePort(1), s.Backends[0])
			s.answers(from, clusterIP(1), s.Backends[0])
		}
		// Another address of the node is not the primary one.
		const other4, other6 = "192.0.2.77", "fd00:c::77"
		for _, prefix := range []string{other4 + "/24", other6 + "/64"} {
			s.onUplink(addressAdd, prefix)
			defer s.onUplink(netlink.AddrDel, prefix)
		}
		s.serve(s.Node, "node", other4+":30001")
		s.serve(s.Node, "node", "["+other6+"]:30001")
		for _, from := range s.clients() {
			s.answers(from, at(other4, other6, 30001), s.Node)
		}
	}},
	{"LoadBalancer", func(s *rows) {
		vip := service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])},
			status: `{loadBalancer: {ingress: [{ip: 198.51.100.1, ipMode: VIP}, {ip: "fd00:1b::1"}]}}`}
		proxy := service{number: 2, kind: "LoadBalancer", ends: []end{here(s.Backends[1])},
			status: `{loadBalancer: {ingress: [{ip: 198.51.100.2, ipMode: Proxy}, {ip: "fd00:1b::2", ipMode: Proxy}, {hostname: lb.example.com}]}}`}
		s.apply(vip, proxy)
		for _, from := range s.clients() {
			s.answers(from, loadBalancer(1), s.Backends[0])
			s.untouched(from, loadBalancer(2))
			s.answers(from, clusterIP(2), s.Backends[1])
		}
	}},
	{"externalIPs", func(s *rows) {
		s.apply(service{number: 1, ends: []end{here(s.Backends[0])},
			spec: `externalIPs: [203.0.113.1, "fd00:e::1", 203.0.113.200, "fd00:e::200"]`})
		for _, from := range s.clients() {
			s.answers(from, external(1), s.Backends[0])
			s.untouched(from, external(200)) // outside --external-ips-allow
		}
	}},
	{"hostPort", func(s *rows) {
		b := s.Backends
		for _, prefix := range []string{"203.0.113.77/32", "fd00:e::77/128"} {
			s.onUplink(addressAdd, prefix)
			defer s.onUplink(netlink.AddrDel, prefix)
		}
		// One port, and four who want it: at a Service's own address, at one of the node's, at any of them, at the
		// primary ones.
		exact := service{number: 2, ends: []end{here(b[0])}, spec: `externalIPs: [203.0.113.77, "fd00:e::77"]`,
			ports: "{name: tcp, port: 30001, targetPort: 7007}, {name: udp, port: 30001, targetPort: 7007, protocol: UDP}"}
		node := service{number: 1, kind: "NodePort", ends: []end{here(b[0])}}
		one, any := hostPort(b[2], 30001, "192.0.2.1"), hostPort(b[1], 30001, "")
		s.apply(node, exact, any, one)
		for _, from := range s.clients() {
			s.answers(from, at("203.0.113.77", "fd00:e::77", 30001), b[0])
			s.answers(from, nodePort(1).only(4), b[2])
			s.answers(from, nodePort(1).only(6), b[1])
			s.answers(from, clusterIP(1), b[0])
		}
		s.apply(node, any)
		for _, from := range s.clients() {
			s.answers(from, at("203.0.113.77", "fd00:e::77", 30001), b[1])
			s.answers(from, nodePort(1), b[1])
		}
		s.apply(node)
		for _, from := range s.clients() {
			s.answers(from, nodePort(1), b[0])
		}
	}},
	{"no node port", func(s *rows) {
		without := service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])},
			spec:  "allocateLoadBalancerNodePorts: false",
			ports: "{name: tcp, port: 7, targetPort: 7007}, {name: udp, port: 7, targetPort: 7007, protocol: UDP}"}
		s.apply(without)
		for _, from := range s.clients() {
			for _, to := range []place{clusterIP(1), loadBalancer(1), external(1)} {
				s.answers(from, to, s.Backends[0])
			}
			s.untouched(from, nodePort(1))
		}
	}},
	{"other port", func(s *rows) {
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{here(s.Backends[0])}})
		for _, from := range s.clients() {
			s.refused(from, clusterIP(1).port(9))
			s.untouched(from, loadBalancer(1).port(9))
			s.untouched(from, external(1).port(9))
			s.dropped(from, clusterIP(99), "unassigned")
		}
	}},
	{"VIP that the node has too", func(s *rows) {
		s.apply(service{number: 1, ends: []end{here(s.Backends[0])}},
			service{number: 2, kind: "LoadBalancer", ends: []end{here(s.Backends[1])},
				status: `{loadBalancer: {ingress: [{ip: 192.0.2.78}, {ip: "fd00:c::78"}]}}`})
		for _, from := range s.clients() {
			s.refused(from, clusterIP(1).port(99))
		}
		for _, prefix := range []string{"10.96.0.1/32", "fd00:96::1/128", "192.0.2.78/24", "fd00:c::78/64"} {
			s.onUplink(addressAdd, prefix)
			defer s.onUplink(netlink.AddrDel, prefix)
		}
		s.serve(s.Node, "node", "192.0.2.78:99")
		s.serve(s.Node, "node", "[fd00:c::78]:99")
		s.closed(false, "10.96.0.1")
		s.closed(false, "fd00:96::1")
		own := at("192.0.2.78", "fd00:c::78", 7)
		for _, from := range s.clients() {
			s.answers(from, clusterIP(1), s.Backends[0])
			s.untouched(from, clusterIP(1).port(99))
			s.answers(from, own, s.Backends[1])
			s.answers(from, own.port(99), s.Node)
		}
	}},
	{"ICMP echo", func(s *rows) {
		s.apply(service{number: 1, kind: "LoadBalancer", ends: []end{there(s.Backends[0])}},
			service{number: 2, ends: []end{here(s.Backends[0], unready)}})
		for _, from := range s.clients() {
			for _, family := range []int{4, 6} {
				reply, unreachable := byte(0), byte(3)
				if family == 6 {
					reply, unreachable = 129, 1
				}
				for _, to := range []place{clusterIP(1), loadBalancer(1), external(1)} {
					s.pings(from, to(family).Addr(), reply)
				}
				s.pings(from, clusterIP(2)(family).Addr(), unreachable)
			}
		}
	}},
}

// addressAdd adds an address that can be used at once.
func addressAdd(link netlink.Link, a *netlink.Addr) error {
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, a)
}

// hostPort is a Pod of a host that has a port of the node for its 7007.
func hostPort(h *testenv.Host, port int, ip string) text {
	more := ""
	if ip != "" {
		more = fmt.Sprintf(", hostIP: %q", ip)
	}
	return text(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: node
  containers:
  - name: c
    ports: [{containerPort: 7007, hostPort: %[2]d%[3]s}, {containerPort: 7007, hostPort: %[2]d, protocol: UDP%[3]s}]
status: {phase: Running, conditions: [{type: Ready, status: "False"}], podIPs: [{ip: %[4]s}, {ip: %[5]q}]}
`, h.Name, port, more, h.IPv4, h.IPv6))
}

// pings: an echo request is answered by an ICMP message of this type.
func (s *rows) pings(from *testenv.Host, to netip.Addr, want byte) {
	s.t.Helper()
	if got, err := testenv.Ping(s.soon(), from.Namespace, to, "hello"); err != nil || got[0] != want {
		s.t.Errorf("%s pings %s: % x, %v; want type %d", from.Name, to, got[:min(len(got), 8)], err, want)
	}
}

// TestNodePortsAtAll: with `all`, NodePorts are at each address of the node, added later too.
func TestNodePortsAtAll(t *testing.T) {
	s := newEverywhere(t, func(s *site) { s.config.NodePortAddresses = []string{"all"} })
	s.onUplink(addressAdd, "192.0.2.77/24")
	s.onUplink(addressAdd, "fd00:c::77/64")
	for _, to := range []netip.AddrPort{netip.MustParseAddrPort("192.0.2.77:30007"), netip.MustParseAddrPort("[fd00:c::77]:30007")} {
		s.serves(true, lb.VIP{Addr: to.Addr(), Port: to.Port(), Protocol: lb.UDP})
		for server := range s.reach(to) {
			if server != s.Backends[0].Name && server != s.Backends[1].Name {
				t.Errorf("%s: %s answers", to, server)
			}
		}
	}
}
