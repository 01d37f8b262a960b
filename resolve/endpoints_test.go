// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

var compareValues = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

// web is the service that these tests find the endpoints of.
var web = lb.ServiceName{Namespace: "default", Name: "web", Port: "http", Protocol: lb.TCP, Family: lb.IPv4}

// conditions are those of an endpoint: a letter for each of ready, serving and terminating; y for true, n for
// false, - for nil.
func conditions(s string) discoveryv1.EndpointConditions {
	value := func(c byte) *bool {
		switch c {
		case 'y', 'n':
			return new(c == 'y')
		}
		return nil
	}
	return discoveryv1.EndpointConditions{Ready: value(s[0]), Serving: value(s[1]), Terminating: value(s[2])}
}

func endpointOf(addr, cond string) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{Addresses: []string{addr}, Conditions: conditions(cond)}
}

func portOf(name string, protocol corev1.Protocol, number int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number}
}

func sliceOf(family discoveryv1.AddressType, port discoveryv1.EndpointPort, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{AddressType: family, Ports: []discoveryv1.EndpointPort{port}, Endpoints: endpoints}
}

func backend(addr string, cluster bool) lb.Backend {
	return lb.Backend{Addr: netip.MustParseAddrPort(addr), Cluster: cluster, Weight: 1}
}

// backendsOf returns the backends of a service without policies, on a node of which nothing is known.
func backendsOf(service lb.ServiceName, endpointSlices []*discoveryv1.EndpointSlice) []lb.Backend {
	counted, _ := weightedSlices(endpointSlices)
	return backends(service, counted, false, &reader{node: &node{}})
}

func TestNilConditions(t *testing.T) {
	const isNil, yes, no = "-", "y", "n"
	for _, tt := range []struct {
		ready, serving, terminating string
		want                        usability
	}{
		{isNil, isNil, isNil, ready},
		{yes, isNil, isNil, ready},
		{yes, yes, no, ready},
		{isNil, no, isNil, ready},
		{yes, no, no, ready},  // publishNotReadyAddresses
		{yes, no, yes, ready}, // publishNotReadyAddresses, the pod terminating
		{no, yes, yes, draining},
		{no, isNil, yes, draining},
		{no, yes, isNil, keeping},
		{no, isNil, isNil, keeping},
		{no, yes, no, keeping},
		{no, no, no, useless},
		{no, no, yes, useless},
		{no, no, isNil, useless},
	} {
		c := conditions(tt.ready + tt.serving + tt.terminating)
		if got := usabilityOf(&c); got != tt.want {
			t.Errorf("ready %s, serving %s, terminating %s: usability %d, want %d",
				tt.ready, tt.serving, tt.terminating, got, tt.want)
		}
	}
}

func TestUsableEndpoints(t *testing.T) {
	const isReady, isDraining, isKeeping, isUseless = "yyn", "nyy", "nyn", "nnn"
	for _, tt := range []struct {
		name      string
		endpoints []discoveryv1.Endpoint
		want      []lb.Backend
	}{
		{"none", nil, nil},
		{"the ready ones, in the order of their addresses",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.10", isReady), endpointOf("10.0.0.9", isReady)},
			[]lb.Backend{backend("10.0.0.9:8080", true), backend("10.0.0.10:8080", true)}},
		{"one that drains keeps its flows",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.1", isDraining), endpointOf("10.0.0.2", isReady)},
			[]lb.Backend{backend("10.0.0.1:8080", false), backend("10.0.0.2:8080", true)}},
		{"none ready: those that drain",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.1", isDraining), endpointOf("10.0.0.2", isUseless)},
			[]lb.Backend{backend("10.0.0.1:8080", true)}},
		{"none ready: not those that only keep their flows",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.1", isKeeping), endpointOf("10.0.0.2", isDraining)},
			[]lb.Backend{backend("10.0.0.1:8080", false), backend("10.0.0.2:8080", true)}},
		{"publishNotReadyAddresses",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.1", "ynn")},
			[]lb.Backend{backend("10.0.0.1:8080", true)}},
		{"neither ready nor serving",
			[]discoveryv1.Endpoint{endpointOf("10.0.0.1", isUseless)}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			slices := []*discoveryv1.EndpointSlice{
				sliceOf("IPv4", portOf("http", "TCP", 8080), tt.endpoints...),
			}
			if diff := cmp.Diff(tt.want, backendsOf(web, slices), compareValues); diff != "" {
				t.Errorf("backends (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSameAddressTwice(t *testing.T) {
	for _, tt := range []struct {
		name, one, other string
		want             []lb.Backend
	}{
		{"equal", "yyn", "yyn", []lb.Backend{backend("10.0.0.1:8080", true)}},
		{"ready beats draining", "yyn", "nyy", []lb.Backend{backend("10.0.0.1:8080", true)}},
		{"ready beats useless", "yyn", "nnn", []lb.Backend{backend("10.0.0.1:8080", true)}},
		{"draining beats useless", "nyy", "nnn", []lb.Backend{backend("10.0.0.1:8080", true)}},
		{"draining beats keeping", "nyy", "nyn", []lb.Backend{backend("10.0.0.1:8080", true)}},
		{"keeping beats useless", "nyn", "nnn", []lb.Backend{backend("10.0.0.1:8080", false)}},
		{"both useless", "nnn", "nny", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, order := range [][2]string{{tt.one, tt.other}, {tt.other, tt.one}} {
				slices := []*discoveryv1.EndpointSlice{
					sliceOf("IPv4", portOf("http", "TCP", 8080), endpointOf("10.0.0.1", order[0])),
					sliceOf("IPv4", portOf("http", "TCP", 8080), endpointOf("10.0.0.1", order[1])),
				}
				if diff := cmp.Diff(tt.want, backendsOf(web, slices), compareValues); diff != "" {
					t.Errorf("%q (-want +got):\n%s", order, diff)
				}
			}
		})
	}
	t.Run("another port is another backend", func(t *testing.T) {
		want := []lb.Backend{backend("10.0.0.1:8080", true), backend("10.0.0.1:8081", true)}
		slices := []*discoveryv1.EndpointSlice{
			sliceOf("IPv4", portOf("http", "TCP", 8081), endpointOf("10.0.0.1", "---")),
			sliceOf("IPv4", portOf("http", "TCP", 8080), endpointOf("10.0.0.1", "---")),
		}
		if diff := cmp.Diff(want, backendsOf(web, slices), compareValues); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestPortsByNameAndProtocol(t *testing.T) {
	unnamed := web
	unnamed.Port = ""
	for _, tt := range []struct {
		name    string
		service lb.ServiceName
		port    discoveryv1.EndpointPort
		want    string // the backend, "" for none
	}{
		{"same name and protocol; the number is the target's", web, portOf("http", "TCP", 8080), "10.0.0.1:8080"},
		{"other name", web, portOf("https", "TCP", 8080), ""},
		{"other protocol", web, portOf("http", "UDP", 8080), ""},
		{"unnamed is not any name", web, portOf("", "TCP", 8080), ""},
		{"named is not unnamed", unnamed, portOf("http", "TCP", 8080), ""},
		{"both unnamed", unnamed, portOf("", "TCP", 8080), "10.0.0.1:8080"},
		{"no name is the name of none", unnamed, discoveryv1.EndpointPort{Protocol: new(corev1.ProtocolTCP), Port: new(int32(8080))}, "10.0.0.1:8080"},
		{"no protocol is TCP", web, discoveryv1.EndpointPort{Name: new("http"), Port: new(int32(8080))}, "10.0.0.1:8080"},
		{"no number", web, discoveryv1.EndpointPort{Name: new("http"), Protocol: new(corev1.ProtocolTCP)}, ""},
		{"number 0", web, portOf("http", "TCP", 0), ""},
		{"highest number", web, portOf("http", "TCP", 65535), "10.0.0.1:65535"},
		{"no port number", web, portOf("http", "TCP", 65536), ""},
		{"negative number", web, portOf("http", "TCP", -1), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var want []lb.Backend
			if tt.want != "" {
				want = []lb.Backend{backend(tt.want, true)}
			}
			slices := []*discoveryv1.EndpointSlice{sliceOf("IPv4", tt.port, endpointOf("10.0.0.1", "---"))}
			if diff := cmp.Diff(want, backendsOf(tt.service, slices), compareValues); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	t.Run("a named targetPort differs between endpoints", func(t *testing.T) {
		want := []lb.Backend{backend("10.0.0.1:8080", true), backend("10.0.0.2:9090", true)}
		slices := []*discoveryv1.EndpointSlice{
			sliceOf("IPv4", portOf("http", "TCP", 8080), endpointOf("10.0.0.1", "---")),
			sliceOf("IPv4", portOf("http", "TCP", 9090), endpointOf("10.0.0.2", "---")),
		}
		if diff := cmp.Diff(want, backendsOf(web, slices), compareValues); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestEndpointsOfOwnFamily(t *testing.T) {
	for _, tt := range []struct {
		name        string
		family      lb.Family
		addressType discoveryv1.AddressType
		addresses   []string
		want        string // the backend, "" for none
	}{
		{"IPv4", lb.IPv4, "IPv4", []string{"10.0.0.1"}, "10.0.0.1:8080"},
		{"IPv6", lb.IPv6, "IPv6", []string{"fd00::1"}, "[fd00::1]:8080"},
		{"a slice of the other family", lb.IPv4, "IPv6", []string{"fd00::1"}, ""},
		{"a slice of names", lb.IPv4, "FQDN", []string{"web.example"}, ""},
		{"an address that is not of its slice's family", lb.IPv6, "IPv6", []string{"10.0.0.1"}, ""},
		{"v4-mapped, in a slice of IPv6", lb.IPv6, "IPv6", []string{"::ffff:10.0.0.1"}, ""},
		{"v4-mapped, in a slice of IPv4", lb.IPv4, "IPv4", []string{"::ffff:10.0.0.1"}, ""},
		{"a zone", lb.IPv6, "IPv6", []string{"fe80::1%eth0"}, ""},
		{"no address", lb.IPv4, "IPv4", []string{"10.0.0.256"}, ""},
		{"only the first address has a meaning", lb.IPv4, "IPv4", []string{"10.0.0.2", "10.0.0.1"}, "10.0.0.2:8080"},
		{"no addresses", lb.IPv4, "IPv4", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var want []lb.Backend
			if tt.want != "" {
				want = []lb.Backend{backend(tt.want, true)}
			}
			service := web
			service.Family = tt.family
			slices := []*discoveryv1.EndpointSlice{
				sliceOf(tt.addressType, portOf("http", "TCP", 8080), discoveryv1.Endpoint{Addresses: tt.addresses}),
			}
			if diff := cmp.Diff(want, backendsOf(service, slices), compareValues); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// endpointOn is an endpoint on a node; "" for one that does not say.
func endpointOn(nodeName, addr, cond string) discoveryv1.Endpoint {
	e := endpointOf(addr, cond)
	if nodeName != "" {
		e.NodeName = &nodeName
	}
	return e
}

// hintedTo returns an endpoint with hints: "z:a n:n1" to zone a and node n1.
func hintedTo(hints string, e discoveryv1.Endpoint) discoveryv1.Endpoint {
	e.Hints = &discoveryv1.EndpointHints{}
	for hint := range strings.FieldsSeq(hints) {
		if name, ok := strings.CutPrefix(hint, "z:"); ok {
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: name})
		} else {
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: strings.TrimPrefix(hint, "n:")})
		}
	}
	return e
}

// TestTopologyOfWeightless: the hint of an endpoint that takes nobody, the first here, does not turn clients away from
// those that do.
func TestTopologyOfWeightless(t *testing.T) {
	n := nodeOf(Host{Name: "n1", Zone: "a"})
	for _, tt := range []struct {
		name  string
		hints []string
		want  []string // why not, in the scope Cluster
	}{
		{"to this zone, alone", []string{"z:a", "z:b"}, []string{"weight 0", ""}},
		{"to this zone, beside another", []string{"z:a", "z:a", "z:b"}, []string{"weight 0", "", "hinted to another zone"}},
		{"to this node: by zone", []string{"n:n1 z:b", "n:n2 z:a"}, []string{"hinted to another zone", ""}},
		{"none: all", []string{"", "z:a", "z:b"}, []string{"weight 0", "", ""}},
	} {
		slice := sliceOf("IPv4", portOf("http", "TCP", 8080))
		slice.Annotations = map[string]string{weightsAnnotation: "10.0.0.1=0"}
		for i, h := range tt.hints {
			slice.Endpoints = append(slice.Endpoints, hintedTo(h, endpointOn("n1", fmt.Sprintf("10.0.0.%d", i+1), "yyn")))
		}
		var got []string
		for _, e := range viewEndpoints(web, []*discoveryv1.EndpointSlice{slice}, &Options{}, &n) {
			got = append(got, e.Cluster)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// chosenText says what becomes of the endpoints 10.0.0.x: "1: yes | on another node".
func chosenText(n *node, endpoints []discoveryv1.Endpoint) []string {
	slice := sliceOf("IPv4", portOf("http", "TCP", 8080), endpoints...)
	var all []string
	for _, e := range viewEndpoints(web, []*discoveryv1.EndpointSlice{slice}, &Options{}, n) {
		last := e.Addr.Addr().As4()[3]
		all = append(all, fmt.Sprintf("%d: %s | %s", last, orYes(e.Cluster), orYes(e.Local)))
	}
	return all
}

func orYes(reason string) string {
	if reason == "" {
		return "yes"
	}
	return reason
}

// TestScopes: Cluster and Local fall back independently of each other, and say why.
func TestScopes(t *testing.T) {
	const isReady, isDraining, isKeeping, isUseless = "yyn", "nyy", "nyn", "nnn"
	here, there := func(addr, cond string) discoveryv1.Endpoint { return endpointOn("here", addr, cond) },
		func(addr, cond string) discoveryv1.Endpoint { return endpointOn("there", addr, cond) }
	n := nodeOf(Host{Name: "here", Addresses: addrs("10.0.0.8"), PodRoutes: prefixes("10.0.0.9/32")})
	cluster := nodeOf(Host{Name: "here", Addresses: addrs("10.0.0.8")})
	nameless := nodeOf(Host{})
	for _, tt := range []struct {
		name      string
		node      *node
		endpoints []discoveryv1.Endpoint
		want      []string
	}{
		{"ready ones", &n, []discoveryv1.Endpoint{here("10.0.0.1", isReady), there("10.0.0.2", isReady)},
			[]string{"1: yes | yes", "2: yes | on another node"}},
		{"ready elsewhere, draining here", &n, []discoveryv1.Endpoint{here("10.0.0.1", isDraining), there("10.0.0.2", isReady)},
			[]string{"1: terminating, and ready ones exist | yes", "2: yes | on another node"}},
		{"ready here, draining elsewhere", &n, []discoveryv1.Endpoint{here("10.0.0.1", isReady), there("10.0.0.2", isDraining)},
			[]string{"1: yes | yes", "2: terminating, and ready ones exist | on another node"}},
		{"ready and draining here", &n, []discoveryv1.Endpoint{here("10.0.0.1", isReady), here("10.0.0.2", isDraining)},
			[]string{"1: yes | yes", "2: terminating, and ready ones exist | terminating, and ready ones exist"}},
		{"draining everywhere", &n, []discoveryv1.Endpoint{here("10.0.0.1", isDraining), there("10.0.0.2", isDraining)},
			[]string{"1: yes | yes", "2: yes | on another node"}},
		{"of no use", &n, []discoveryv1.Endpoint{here("10.0.0.1", isKeeping), here("10.0.0.2", isUseless), here("10.0.0.3", "nny")},
			[]string{"1: not ready | not ready", "2: not ready and not serving | not ready and not serving",
				"3: terminating, not serving | terminating, not serving"}},
		{"no nodeName: by address", &n,
			[]discoveryv1.Endpoint{endpointOf("10.0.0.7", isReady), endpointOf("10.0.0.8", isReady), endpointOf("10.0.0.9", isReady)},
			[]string{"7: yes | not known to be on this node", "8: yes | yes", "9: yes | yes"}},
		{"no nodeName in a cluster: elsewhere", &cluster, []discoveryv1.Endpoint{endpointOf("10.0.0.8", isReady)},
			[]string{"8: yes | not known to be on this node"}},
		{"a nodeName goes before the address", &n, []discoveryv1.Endpoint{there("10.0.0.9", isReady)},
			[]string{"9: yes | on another node"}},
		{"the name of this node is not known", &nameless, []discoveryv1.Endpoint{endpointOf("10.0.0.1", isReady), here("10.0.0.2", isReady)},
			[]string{"1: yes | not known to be on this node", "2: yes | on another node"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, chosenText(tt.node, tt.endpoints)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestTopology: the hints of all ready endpoints together decide, in the scope Cluster alone.
func TestTopology(t *testing.T) {
	const isReady, isDraining, isUseless = "yyn", "nyy", "nnn"
	const otherNode, otherZone = "hinted to another node", "hinted to another zone"
	in := func(zone string) Host { return Host{Name: "n1", Zone: zone} }
	endpoints := func(hints ...string) (all []discoveryv1.Endpoint) { // "ready z:a"
		for i, h := range hints {
			state, hint, _ := strings.Cut(h, " ")
			cond := map[string]string{"ready": isReady, "draining": isDraining, "useless": isUseless}[state]
			all = append(all, hintedTo(hint, endpointOn("n1", fmt.Sprintf("10.0.0.%d", i+1), cond)))
		}
		return all
	}
	for _, tt := range []struct {
		name      string
		host      Host
		endpoints []discoveryv1.Endpoint
		want      []string // why not, in the scope Cluster
	}{
		{"no hints", in("a"), endpoints("ready", "ready"), []string{"", ""}},
		{"this zone", in("a"), endpoints("ready z:a", "ready z:b", "ready z:b z:a"), []string{"", otherZone, ""}},
		{"no hint to this zone: all", in("c"), endpoints("ready z:a", "ready z:b"), []string{"", ""}},
		{"one without a zone hint: all", in("a"), endpoints("ready z:a", "ready"), []string{"", ""}},
		{"one without, not ready: no matter", in("a"), endpoints("ready z:a", "useless", "draining", "ready z:b"),
			[]string{"", "not ready and not serving", "terminating, and ready ones exist", otherZone}},
		{"the only hint to this zone is of one not ready: all", in("a"), endpoints("ready z:b", "useless z:a", "draining z:a"),
			[]string{"", "not ready and not serving", "terminating, and ready ones exist"}},
		{"no zone of this node: all", in(""), endpoints("ready z:a", "ready z:"), []string{"", ""}},
		{"this node", in("a"), endpoints("ready n:n1", "ready n:n2", "ready n:n2 n:n1"), []string{"", otherNode, ""}},
		{"node before zone", in("a"), endpoints("ready n:n1 z:b", "ready n:n2 z:a"), []string{"", otherNode}},
		{"no hint to this node: by zone", in("a"), endpoints("ready n:n2 z:a", "ready n:n3 z:b"), []string{"", otherZone}},
		{"one without a node hint: by zone", in("a"), endpoints("ready n:n1 z:b", "ready z:a"), []string{otherZone, ""}},
		{"no name of this node: by zone", Host{Zone: "a"}, endpoints("ready n: z:a", "ready n:n2 z:b"), []string{"", otherZone}},
		{"neither: all", in("c"), endpoints("ready n:n2 z:a", "ready n:n3 z:b"), []string{"", ""}},
		{"none ready: hints are off", in("a"), endpoints("draining z:a", "draining z:b"), []string{"", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := nodeOf(tt.host)
			slice := []*discoveryv1.EndpointSlice{sliceOf("IPv4", portOf("http", "TCP", 8080), tt.endpoints...)}
			var got []string
			for i, e := range viewEndpoints(web, slice, &Options{}, &n) {
				got = append(got, e.Cluster)
				if strings.HasPrefix(e.Local, "hinted") {
					t.Errorf("hints have a say in the scope Local: endpoint %d", i)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
