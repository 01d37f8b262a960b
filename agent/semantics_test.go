// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// The rules of docs/semantics.md, each as clients see it: an agent in the strict lab is given objects, and packets
// are sent to what they name, by TCP and UDP, in both families.
//
// There is one node. Endpoints are pods on it; of which an object says that they are on another node the agent takes
// them for that, and their packets get there all the same.

// rows is the lab, its agent and its clients, one outside and one in a pod, for one row after the other.
type rows struct {
	*site
	pod     *testenv.Host // a client in a pod of this node
	written int           // times that objects were
	// The last client port that was used. None is used twice: a flow of UDP keeps its endpoint.
	port atomic.Uint32
}

// TestSemantics has one test per row of docs/semantics.md, and its name.
func TestSemantics(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: that nobody answers is told by the clock, often")
	}
	s := newSiteLike(t, testenv.Config{Backends: 3, ClientPods: 1, ClientAddresses: 8})
	s.config.Sizes = maps.Sizes{Frontends: 4096, Services: 256, Slots: 1 << 14, Backends: 4096, Flows: 1 << 16}
	s.config.ServiceCIDRs = []string{testenv.ServiceCIDR4, testenv.ServiceCIDR6}
	s.config.ExternalIPsAllow = []string{"203.0.113.0/25", "fd00:e::/120"}
	s.echo()
	for _, h := range append(s.Backends, s.Node) {
		// A second server, at another port. The node's own listen at this one alone.
		s.serve(h, h.Name+"/second", ":7008")
	}
	s.write("node.yaml", nodeHere)
	s.start(s.config)
	s.settled(0)
	r := &rows{site: s, pod: s.ClientPods[0]}
	r.port.Store(10000)
	whole := s.t
	defer func() { s.t = whole }()
	for _, row := range slices.Concat(rowsOfObjects, rowsOfFrontends, rowsOfEndpoints, rowsOfPackets) {
		t.Run(row.name, func(t *testing.T) {
			s.t = t
			row.test(r)
			if err := s.CheckStrict(t.Context()); err != nil {
				t.Errorf("the stack saw what it should not: %v", err)
				s.reset() // so that the next row is its own
			}
		})
	}
}

// row is a rule, as docs/semantics.md names it.
type row struct {
	name string
	test func(*rows)
}

// serve has a host echo by TCP and UDP at an address, or at a port of all.
func (s *site) serve(h *testenv.Host, name, address string) {
	s.t.Helper()
	for _, serve := range []func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error){testenv.ServeEcho, testenv.ServeUDP} {
		server, err := serve(s.t.Context(), h.Namespace, name, address)
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { server.Close() })
	}
}

func (s *site) reset() {
	s.t.Helper()
	if err := s.ResetCounters(context.Background()); err != nil {
		s.t.Error(err)
	}
}

// ---- objects ----

const nodeHere = `apiVersion: v1
kind: Node
metadata: {name: node, labels: {topology.kubernetes.io/zone: here}}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "fd00:c::1"}]}
`

// service is a Service of TCP and UDP in both families. Its number is the last part of its addresses, the second
// half of its node port and its name.
type service struct {
	number int
	kind   string // "" is ClusterIP. A LoadBalancer has frontends of every kind.
	meta   string // more of metadata, "labels: {...}"
	spec   string // more of spec, in lines
	ports  string // in place of tcp and udp, each 7
	family string // "IPv4": that alone
	status string // in place of its load balancer addresses

	ends   []end   // of one slice per family
	slices []slice // in place of that
}

// slice is an EndpointSlice, in each family.
type slice struct {
	meta  string // more of metadata
	ports string // in place of tcp and udp, each 7007
	ends  []end
}

// end is an endpoint.
type end struct {
	host *testenv.Host
	more string // "nodeName: node, conditions: {ready: false}"
}

const (
	unready  = "conditions: {ready: false}"
	stopped  = "conditions: {ready: false, serving: false}"
	draining = "conditions: {ready: false, serving: true, terminating: true}"
)

// here is an endpoint on this node.
func here(h *testenv.Host, more ...string) end {
	return end{h, strings.Join(append([]string{"nodeName: node"}, more...), ", ")}
}

// there is an endpoint of which the slice says that it is on another node.
func there(h *testenv.Host, more ...string) end {
	return end{h, strings.Join(append([]string{"nodeName: other"}, more...), ", ")}
}

func (s service) hasNodePort() bool { return s.kind == "NodePort" || s.kind == "LoadBalancer" }

func (s service) String() string {
	var b strings.Builder
	name := fmt.Sprint("row-", s.number)
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Service\nmetadata: {name: %s%s}\nspec:\n", name, and(s.meta))
	switch own := clusterIP(s.number); {
	case s.kind == "ExternalName":
	case s.family == "":
		fmt.Fprintf(&b, "  clusterIP: %[1]s\n  clusterIPs: [%[1]s, %[2]q]\n  ipFamilyPolicy: RequireDualStack\n", own(4).Addr(), own(6).Addr())
	default:
		fmt.Fprintf(&b, "  clusterIP: %s\n  ipFamilies: [%s]\n", own(4).Addr(), s.family)
	}
	nodePort := ""
	if s.kind != "" {
		fmt.Fprintf(&b, "  type: %s\n", s.kind)
	}
	if s.hasNodePort() {
		nodePort = fmt.Sprint(", nodePort: ", 30000+s.number)
	}
	if s.kind == "LoadBalancer" {
		// Of both families, whatever the Service has.
		fmt.Fprintf(&b, "  externalIPs: [%q, %q]\n", external(s.number)(4).Addr(), external(s.number)(6).Addr())
	}
	ports := cmp.Or(s.ports, fmt.Sprintf("{name: tcp, port: 7, targetPort: 7007%[1]s}, {name: udp, port: 7, targetPort: 7007, protocol: UDP%[1]s}", nodePort))
	fmt.Fprintf(&b, "  ports: [%s]\n", ports)
	for _, line := range strings.Split(s.spec, "\n") {
		if line != "" {
			fmt.Fprintf(&b, "  %s\n", strings.TrimSpace(line))
		}
	}
	switch at := loadBalancer(s.number); {
	case s.status != "":
		fmt.Fprintf(&b, "status: %s\n", s.status)
	case s.kind == "LoadBalancer":
		fmt.Fprintf(&b, "status: {loadBalancer: {ingress: [{ip: %s}, {ip: %q}]}}\n", at(4).Addr(), at(6).Addr())
	}
	all := s.slices
	if all == nil && s.ends != nil {
		all = []slice{{ends: s.ends}}
	}
	families := []int{4, 6}
	if s.family == "IPv4" {
		families = families[:1]
	}
	for i, slice := range all {
		b.WriteString("---\n" + slice.of(s.number, i, families...))
	}
	return b.String()
}

// of is the slices number i of a Service, in some families.
func (s slice) of(number, i int, families ...int) string {
	labels, meta := fmt.Sprint("kubernetes.io/service-name: row-", number), s.meta
	if more, found := strings.CutPrefix(meta, "labels: {"); found {
		labels, meta = labels+", "+strings.TrimSuffix(more, "}"), ""
	}
	ports := cmp.Or(s.ports, "{name: tcp, port: 7007}, {name: udp, port: 7007, protocol: UDP}")
	var all []string
	for _, f := range families {
		var ends []string
		for _, e := range s.ends {
			ends = append(ends, fmt.Sprintf("{addresses: [%q]%s}", e.host.Addr(f), and(e.more)))
		}
		all = append(all, fmt.Sprintf(`apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: row-%d-%d-%d, labels: {%s}%s}
addressType: IPv%d
ports: [%s]
endpoints: [%s]
`, number, i, f, labels, and(meta), f, ports, strings.Join(ends, ", ")))
	}
	return strings.Join(all, "---\n")
}

func and(more string) string {
	if more == "" {
		return ""
	}
	return ", " + more
}

// text is any other object, as YAML.
type text string

func (t text) String() string { return string(t) }

// apply puts objects in the place of those of the step before, and waits until they are in force: until the agent knows
// of a last object, which comes with them, and has written all that it knows.
func (s *rows) apply(objects ...fmt.Stringer) {
	s.t.Helper()
	s.written++
	mark := fmt.Sprint("zz-", s.written) // the last of a kind to come
	var all []string
	for _, o := range objects {
		all = append(all, o.String())
		if o, ok := o.(service); ok && o.hasNodePort() {
			if err := s.AddNodePorts(s.t.Context(), uint16(30000+o.number)); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	s.write("rows.yaml", strings.Join(append(all, fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {clusterIP: 10.96.255.1, ports: [{port: 1}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{port: 1}]
endpoints: [{addresses: [10.244.9.9]}]
`, mark)), "---\n"))
	var complaint string
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		client := api.NewClient(s.config.Socket)
		views, err1 := client.Services(s.t.Context(), "default", mark)
		status, err2 := client.Status(s.t.Context())
		if err := errors.Join(err1, err2); err != nil {
			complaint = err.Error()
			continue
		}
		if len(views) == 1 && len(views[0].Endpoints) == 1 && status.Apply.Pending == 0 && status.Apply.LastError == "" {
			return
		}
		complaint = fmt.Sprint(status.Problems, *status.Apply)
	}
	s.t.Fatalf("the objects are not in force: %s", complaint)
}

// ---- places ----

// place is where a frontend is, in a family.
type place func(family int) netip.AddrPort

func at(ipv4, ipv6 string, port int) place {
	return func(family int) netip.AddrPort {
		if family == 4 {
			return netip.AddrPortFrom(netip.MustParseAddr(ipv4), uint16(port))
		}
		return netip.AddrPortFrom(netip.MustParseAddr(ipv6), uint16(port))
	}
}

func clusterIP(n int) place { return at(fmt.Sprint("10.96.0.", n), fmt.Sprint("fd00:96::", n), 7) }
func loadBalancer(n int) place {
	return at(fmt.Sprint("198.51.100.", n), fmt.Sprint("fd00:1b::", n), 7)
}
func external(n int) place { return at(fmt.Sprint("203.0.113.", n), fmt.Sprint("fd00:e::", n), 7) }
func nodePort(n int) place { return at("192.0.2.1", "fd00:c::1", 30000+n) }

func (p place) port(port uint16) place {
	return func(family int) netip.AddrPort { return netip.AddrPortFrom(p(family).Addr(), port) }
}

// only is a place in one family.
func (p place) only(family int) place {
	return func(f int) netip.AddrPort {
		if f != family {
			return netip.AddrPort{}
		}
		return p(f)
	}
}

func frontendsOf(n int) []place {
	return []place{clusterIP(n), nodePort(n), loadBalancer(n), external(n)}
}

// ---- probes ----

// probe is one try by one protocol: who answers, or why nobody does.
type probe struct {
	tcp bool
	to  netip.AddrPort
	testenv.Answer
	err error
}

func (p probe) String() string {
	return map[bool]string{true: "TCP", false: "UDP"}[p.tcp] + " to " + p.to.String()
}

const (
	longEnough = 5 * time.Second       // for an answer
	patience   = 60 * time.Millisecond // for none
)

// source is an address of a host with a port that has not been used.
func (s *rows) source(from *testenv.Host, family int) netip.AddrPort {
	return netip.AddrPortFrom(from.Addr(family), uint16(s.port.Add(1)))
}

// probe tries once.
func (s *rows) probe(from *testenv.Host, tcp bool, to netip.AddrPort, patience time.Duration) probe {
	source := s.source(from, familyOf(to))
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	p := probe{tcp: tcp, to: to}
	if tcp {
		c, err := testenv.DialEcho(ctx, from.Namespace, source, to)
		if p.err = err; err == nil {
			p.Answer = c.Answer
			p.err = c.Say(ctx, "hello")
			c.Close()
		}
		return p
	}
	c, err := testenv.DialUDP(ctx, from.Namespace, source, to)
	if p.err = err; err == nil {
		p.Answer, p.err = c.Ask(ctx, to, "hello")
		c.Close()
	}
	return p
}

// each tries each protocol in each family of a place at once, and returns what became of it.
func (s *rows) each(from *testenv.Host, to place, patience time.Duration) []probe {
	var all [4]probe
	var wg sync.WaitGroup
	for i := range all {
		family := []int{4, 6}[i/2]
		if to(family).IsValid() {
			wg.Go(func() { all[i] = s.probe(from, i%2 == 0, to(family), patience) })
		}
	}
	wg.Wait()
	return slices.DeleteFunc(all[:], func(p probe) bool { return !p.to.IsValid() })
}

// answers: these servers answer, each of them, and nobody else; and they see whose question it is.
func (s *rows) answers(from *testenv.Host, to place, servers ...*testenv.Host) {
	s.t.Helper()
	var names []string
	for _, h := range servers {
		names = append(names, h.Name)
	}
	s.answersBy(from, to, names...)
}

func (s *rows) answersBy(from *testenv.Host, to place, servers ...string) {
	s.t.Helper()
	const least, most = 12, 100 // tries
	for _, family := range []int{4, 6} {
		if !to(family).IsValid() {
			continue
		}
		for _, tcp := range []bool{true, false} {
			missing := map[string]bool{}
			for _, name := range servers {
				missing[name] = true
			}
			for try := 0; try < least || try < most && len(missing) > 0; try++ {
				p := s.probe(from, tcp, to(family), longEnough)
				if p.err != nil {
					s.t.Errorf("%s from %s: %v", p, from.Name, p.err)
					return
				}
				if !slices.Contains(servers, p.Server) {
					s.t.Errorf("%s from %s: %s answers, want %s", p, from.Name, p.Server, servers)
					return
				}
				want := from.Addr(family)
				if p.Server == from.Name && from != s.Client {
					want = loader.DefaultHairpin()[family/6]
				}
				if p.Client.Addr() != want {
					s.t.Errorf("%s from %s: %s sees %s", p, from.Name, p.Server, p.Client)
					return
				}
				delete(missing, p.Server)
			}
			if len(missing) > 0 {
				s.t.Errorf("%s to %s from %s: never answered by %v", map[bool]string{true: "TCP", false: "UDP"}[tcp], to(family), from.Name, missing)
			}
		}
	}
}

// refused: the client is told at once that nobody serves there.
func (s *rows) refused(from *testenv.Host, to place) {
	s.t.Helper()
	for _, p := range s.each(from, to, 900*time.Millisecond) { // before a SYN is sent again
		if !errors.Is(p.err, unix.ECONNREFUSED) {
			s.t.Errorf("%s from %s: %s, %v; want a refusal", p, from.Name, p.Server, p.err)
		}
	}
}

// dropped: nobody answers, and the packets are counted by this reason.
func (s *rows) dropped(from *testenv.Host, to place, reason string) {
	s.t.Helper()
	before := s.reason(reason)
	tries := s.each(from, to, patience)
	for _, p := range tries {
		if !timedOut(p.err) {
			s.t.Errorf("%s from %s: %s, %v; want no answer", p, from.Name, p.Server, p.err)
		}
	}
	if counted := s.reason(reason) - before; counted < uint64(len(tries)) {
		s.t.Errorf("%d packets of %v are counted as %s, want %d", counted, tries, reason, len(tries))
	}
}

func timedOut(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// untouched: the packets reach the node's stack as they are; here its rules drop and count them.
func (s *rows) untouched(from *testenv.Host, to place) {
	s.t.Helper()
	before, err := s.VIPPackets(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	tries := s.each(from, to, patience)
	for _, p := range tries {
		if !timedOut(p.err) {
			s.t.Errorf("%s from %s: %s, %v; want no answer", p, from.Name, p.Server, p.err)
		}
	}
	after, err := s.VIPPackets(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	if after-before < uint64(len(tries)) {
		s.t.Errorf("%d packets of %v reached the node's stack, want %d", after-before, tries, len(tries))
	}
	s.reset()
}

// reason is how many packets had a verdict for this reason.
func (s *rows) reason(name string) uint64 {
	s.t.Helper()
	m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	reasons, err := m.Reasons()
	if err != nil {
		s.t.Fatal(err)
	}
	count, ok := reasons[name]
	if !ok {
		s.t.Fatalf("%s is no reason", name)
	}
	return count
}

// clients are one outside and one in a pod.
func (s *rows) clients() []*testenv.Host { return []*testenv.Host{s.Client, s.pod} }
