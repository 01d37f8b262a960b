// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// everywhere is a Service with a frontend of every kind for backends 0 and 1, and a Pod with a hostPort, backend
// 2. No object names a node: routes say that all are on this one.
func (s *site) everywhere() string {
	slice := func(family int) string {
		return fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-%[1]d, labels: {kubernetes.io/service-name: web}}
addressType: IPv%[1]d
ports: [{name: tcp, port: 7007}, {name: udp, port: 7007, protocol: UDP}]
endpoints: [{addresses: [%[2]q]}, {addresses: [%[3]q]}]
`, family, s.Backends[0].Addr(family), s.Backends[1].Addr(family))
	}
	return `apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ipFamilyPolicy: RequireDualStack
  externalIPs: [203.0.113.10, "fd00:e::10"]
  ports:
  - {name: tcp, port: 7, targetPort: 7007, nodePort: 30007}
  - {name: udp, port: 7, targetPort: 7007, nodePort: 30007, protocol: UDP}
status: {loadBalancer: {ingress: [{ip: 198.51.100.10}, {ip: "fd00:1b::10"}]}}
` + slice(4) + slice(6) + fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  containers:
  - name: c
    ports:
    - {containerPort: 7007, hostPort: 7070}
    - {containerPort: 7007, hostPort: 7070, protocol: UDP}
status: {phase: Running, podIPs: [{ip: %s}, {ip: "%s"}]}
`, s.Backends[2].IPv4, s.Backends[2].IPv6)
}

// reach asks for an answer from each of some clients, by TCP and by UDP, and returns by whom it was given.
func (s *site) reach(to netip.AddrPort) map[string]bool {
	s.t.Helper()
	answered := map[string]bool{}
	for _, from := range []*testenv.Host{s.Client, s.ClientPods[0]} {
		tcp, err := testenv.DialEcho(s.soon(), from.Namespace, netip.AddrPort{}, to)
		if err != nil {
			s.t.Errorf("%s connects to %s: %v", from.Name, to, err)
			continue
		}
		answered[tcp.Server] = true
		tcp.Close()
		udp, err := testenv.NewUDPClient(s.soon(), from.Namespace, netip.AddrPortFrom(from.Addr(familyOf(to)), 0))
		if err != nil {
			s.t.Fatal(err)
		}
		if a, err := udp.Ask(s.soon(), to, "hello"); err != nil {
			s.t.Errorf("%s asks %s: %v", from.Name, to, err)
		} else {
			answered[a.Server] = true
		}
		udp.Close()
	}
	return answered
}

// serves waits until a VIP is among the frontends, or is not.
func (s *site) serves(want bool, vip lb.VIP) {
	s.t.Helper()
	s.eventually(func(api.Status) string {
		m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
		if err != nil {
			s.t.Fatal(err)
		}
		defer m.Close()
		there := false
		if err := m.EachFrontend(func(k maps.FrontendKey, _ maps.Frontend) bool { there = there || k.VIP() == vip; return true }); err != nil {
			s.t.Fatal(err)
		}
		if there != want {
			return fmt.Sprintf("%s is a frontend: %v, want %v", vip, there, want)
		}
		return ""
	})
}

// closed waits until all ports of an address are the Services' to answer for, or are not.
func (s *site) closed(want bool, address string) {
	s.t.Helper()
	s.eventually(func(api.Status) string {
		m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
		if err != nil {
			s.t.Fatal(err)
		}
		defer m.Close()
		complaint := address + " is no Service's"
		if err := m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
			if k.VIP() == (lb.VIP{Addr: netip.MustParseAddr(address)}) {
				complaint = ""
				if closed := f.Flags&maps.AddressClusterIP != 0; closed != want {
					complaint = fmt.Sprintf("%s is closed: %v, want %v", address, closed, want)
				}
			}
			return true
		}); err != nil {
			s.t.Fatal(err)
		}
		return complaint
	})
}

// onUplink does something with an address of the node's uplink.
func (s *site) onUplink(do func(netlink.Link, *netlink.Addr) error, address string) {
	s.t.Helper()
	a, err := netlink.ParseAddr(address)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.Node.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return do(link, a)
	}); err != nil {
		s.t.Fatal(err)
	}
}

// newEverywhere is a site whose backends echo, with an agent for what everywhere says.
func newEverywhere(t *testing.T, change func(*site)) *site {
	t.Helper()
	s := newSiteLike(t, testenv.Config{Backends: 3, ClientPods: 1})
	s.echo()
	change(s)
	s.write("web.yaml", s.everywhere())
	s.start(s.config)
	s.settled(2*2*2 + 2*2)
	return s
}

// TestFrontends: what every kind of frontend is for, clients outside and in pods get, in both families.
func TestFrontends(t *testing.T) {
	s := newEverywhere(t, func(*site) {})
	web, host := []*testenv.Host{s.Backends[0], s.Backends[1]}, []*testenv.Host{s.Backends[2]}
	for _, tt := range []struct {
		kind  string
		at    string
		hosts []*testenv.Host
	}{
		{"ClusterIP", "10.96.0.10:7", web}, {"ClusterIP", "[fd00:96::10]:7", web},
		{"NodePort", "192.0.2.1:30007", web}, {"NodePort", "[fd00:c::1]:30007", web},
		{"LoadBalancer", "198.51.100.10:7", web}, {"LoadBalancer", "[fd00:1b::10]:7", web},
		{"external", "203.0.113.10:7", web}, {"external", "[fd00:e::10]:7", web},
		{"hostPort", "192.0.2.1:7070", host}, {"hostPort", "[fd00:c::1]:7070", host},
	} {
		for server := range s.reach(netip.MustParseAddrPort(tt.at)) {
			ours := false
			for _, h := range tt.hosts {
				ours = ours || h.Name == server
			}
			if !ours {
				t.Errorf("%s %s: %s answers", tt.kind, tt.at, server)
			}
		}
	}

	views, err := api.NewClient(s.config.Socket).Services(t.Context(), "default", "web")
	if err != nil || len(views) != 4 {
		t.Fatalf("%d views, %v", len(views), err)
	}
	for _, v := range views {
		if len(v.Frontends) != 4 || len(v.Waiting) != 0 || len(v.Endpoints) != 2 || !v.Endpoints[0].Cluster.Used || !v.Endpoints[0].Local.Used {
			t.Errorf("view %+v", v)
		}
	}
	if views, err := api.NewClient(s.config.Socket).Services(t.Context(), "default", "host"); err != nil || len(views) != 4 || !views[0].Pod {
		t.Errorf("views of the Pod: %+v, %v", views, err)
	}
}

// TestNodeAddresses: NodePorts are where the node's object says, once the host has the address, and as long; an
// endpoint without a nodeName is here once a route says so.
func TestNodeAddresses(t *testing.T) {
	s := newEverywhere(t, func(*site) {})
	const added = "192.0.2.77"
	nodePort := lb.VIP{Addr: netip.MustParseAddr(added), Port: 30007, Protocol: lb.TCP}
	hostPort := lb.VIP{Addr: nodePort.Addr, Port: 7070, Protocol: lb.TCP}
	primary := lb.VIP{Addr: s.Node.IPv4, Port: 30007, Protocol: lb.TCP}
	at := func(want string) {
		t.Helper()
		s.eventually(func(status api.Status) string {
			if got := strings.Trim(fmt.Sprint(status.NodePortAddresses), "[]"); got != want {
				return fmt.Sprintf("NodePorts are at %q, want %q", got, want)
			}
			return ""
		})
	}
	at("192.0.2.1 fd00:c::1")
	s.serves(true, primary)

	// The object names an address that the host does not have.
	s.write("node.yaml", `apiVersion: v1
kind: Node
metadata: {name: node, labels: {topology.kubernetes.io/zone: here}}
status: {addresses: [{type: InternalIP, address: 192.0.2.77}, {type: ExternalIP, address: 192.0.2.1}]}
`)
	at("")
	s.serves(false, primary)
	s.eventually(func(status api.Status) string {
		for _, p := range status.Problems {
			if p.Object == "Node node" && p.Field == "status.addresses" && p.Severity == "warning" && strings.HasSuffix(p.File, "node.yaml") {
				return ""
			}
		}
		return fmt.Sprintf("the address is not warned of: %v", status.Problems)
	})

	s.onUplink(netlink.AddrAdd, added+"/24")
	at(added)
	s.serves(true, nodePort)
	s.serves(true, hostPort)
	for _, to := range []lb.VIP{nodePort, hostPort} {
		s.reach(netip.AddrPortFrom(to.Addr, to.Port))
	}
	if status := s.eventually(func(api.Status) string { return "" }); len(status.Problems) != 0 {
		t.Errorf("problems: %v", status.Problems)
	}

	s.onUplink(netlink.AddrDel, added+"/24")
	at("")
	s.serves(false, nodePort)
	s.serves(false, hostPort)
	if c, err := testenv.DialEcho(s.short(), s.Client.Namespace, netip.AddrPort{}, netip.AddrPortFrom(nodePort.Addr, nodePort.Port)); err == nil {
		t.Errorf("%s answers at an address that went", c.Server)
		c.Close()
	}

	// A cluster IP that becomes the host's own: what is not the Service's there is the host's.
	s.closed(true, "10.96.0.10")
	s.onUplink(netlink.AddrAdd, "10.96.0.10/32")
	s.closed(false, "10.96.0.10")
	s.onUplink(netlink.AddrDel, "10.96.0.10/32")
	s.closed(true, "10.96.0.10")

	// An endpoint whose route comes later.
	const pod = "10.244.1.60"
	s.write("late.yaml", `apiVersion: v1
kind: Service
metadata: {name: late}
spec: {clusterIP: 10.96.0.60, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: late, labels: {kubernetes.io/service-name: late}}
addressType: IPv4
ports: [{port: 80}]
endpoints: [{addresses: [10.244.1.60]}]
`)
	local := func(want bool) {
		t.Helper()
		deadline := time.Now().Add(15 * time.Second)
		for {
			views, err := api.NewClient(s.config.Socket).Services(t.Context(), "default", "late")
			if err != nil {
				t.Fatal(err)
			}
			if len(views) == 1 && len(views[0].Endpoints) == 1 && views[0].Endpoints[0].Local.Used == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the endpoint is not local=%v: %+v", want, views)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	local(false)
	if err := s.Node.Do(func() error {
		link, err := netlink.LinkByName(s.Backends[0].NodeDevice)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: netlink.NewIPNet(netip.MustParseAddr(pod).AsSlice())})
	}); err != nil {
		t.Fatal(err)
	}
	local(true)
}

// TestPrefixes: with CIDRs of one family for NodePorts any address inside counts, and all of the other family;
// external addresses are held to those allowed; the programs know where cluster IPs are.
func TestPrefixes(t *testing.T) {
	s := newEverywhere(t, func(s *site) {
		s.config.NodePortAddresses = []string{"192.0.2.64/26"}
		s.config.ExternalIPsAllow = []string{testenv.ExternalCIDR4}
		s.config.ServiceCIDRs = []string{testenv.ServiceCIDR4, testenv.ServiceCIDR6}
	})
	at := func(address string) lb.VIP {
		return lb.VIP{Addr: netip.MustParseAddr(address), Port: 30007, Protocol: lb.UDP}
	}
	s.serves(true, at("fd00:c::1"))
	s.serves(false, at("192.0.2.1"))
	s.onUplink(netlink.AddrAdd, "192.0.2.77/24")
	s.serves(true, at("192.0.2.77"))
	s.reach(netip.MustParseAddrPort("192.0.2.77:30007"))
	s.serves(false, at("192.0.2.1"))

	s.serves(true, lb.VIP{Addr: netip.MustParseAddr("203.0.113.10"), Port: 7, Protocol: lb.TCP})
	s.serves(false, lb.VIP{Addr: netip.MustParseAddr("fd00:e::10"), Port: 7, Protocol: lb.TCP})
	s.eventually(func(status api.Status) string {
		if len(status.Problems) != 1 || status.Problems[0].Field != "spec.externalIPs[1]" {
			return fmt.Sprintf("problems: %v", status.Problems)
		}
		return ""
	})
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if prefixes, elsewhere := m.ServicePrefixes(); fmt.Sprint(prefixes) != "[10.96.0.0/16 fd00:96::/112]" || elsewhere {
		t.Errorf("service prefixes %v, elsewhere %v", prefixes, elsewhere)
	}
}

// A prefix of cluster IPs that holds pods is a mistake, since what is sent to them is dropped there; one that holds
// the node's own addresses does no harm.
func TestPrefixWithPods(t *testing.T) {
	var pods netip.Prefix
	s := newEverywhere(t, func(s *site) {
		pods = netip.PrefixFrom(s.Backends[0].IPv4, 24).Masked()
		s.config.ServiceCIDRs = []string{testenv.ServiceCIDR4, testenv.ServiceCIDR6, pods.String(), "192.0.2.0/24"}
	})
	s.eventually(func(status api.Status) string {
		if len(status.Problems) == 1 {
			p := status.Problems[0]
			if p.Field == "--service-cluster-ip-range" && p.Severity == "warning" && strings.HasPrefix(p.Message, pods.String()+" overlaps ") {
				return ""
			}
		}
		return fmt.Sprintf("problems: %v", status.Problems)
	})
	s.closed(false, "192.0.2.1")
}
