// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

func slicesSorted(f follower) []lb.ServiceName {
	return slices.SortedFunc(maps.Keys(f), lb.ServiceName.Compare)
}

// TestSetHostCosts says which objects a change of the node has resolved again: those that depend on what
// differs, and no others.
func TestSetHostCosts(t *testing.T) {
	nodeless := []*discoveryv1.EndpointSlice{sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---"))}
	named := []*discoveryv1.EndpointSlice{sliceOf("IPv4", portOf("", "TCP", 8080), endpointOn("n1", "10.0.0.1", "---"))}
	hinted := []*discoveryv1.EndpointSlice{sliceOf("IPv4", portOf("", "TCP", 8080), hintedTo("z:a", endpointOf("10.0.0.1", "---")))}
	local := func() *corev1.Service {
		return with(tcp80(), func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal) })
	}
	nodePort := func() *corev1.Service {
		return with(tcp80(), func(s *corev1.Service) { s.Spec.Type, s.Spec.Ports[0].NodePort = "NodePort", 30080 })
	}
	port := corev1.ContainerPort{ContainerPort: 8080, HostPort: 80}
	unnamedPod, namedPod, otherPod := podWith(port), podWith(port), podWith(port)
	unnamedPod.Status.PodIPs[0].IP = "10.0.0.7"
	namedPod.Spec.NodeName, otherPod.Spec.NodeName = "n1", "n2"

	before := Host{Name: "n1", Zone: "a", Addresses: addrs("192.0.2.1"), NodePorts: addrs("192.0.2.1"), PodRoutes: prefixes("10.0.0.7/32")}
	table := NewTable(Options{})
	for i, o := range []struct {
		name   string
		svc    *corev1.Service
		slices []*discoveryv1.EndpointSlice
	}{
		{"plain", tcp80(), nodeless}, {"hinted", tcp80(), hinted}, {"nodePort", nodePort(), nodeless},
		{"localNodeless", local(), nodeless}, {"localNamed", local(), named},
	} {
		o.svc.Spec.ClusterIPs = []string{fmt.Sprintf("10.96.0.%d", i+1)}
		table.Update(Name{"", o.name}, o.svc, o.slices)
	}
	for name, pod := range map[string]*corev1.Pod{"unnamedPod": unnamedPod, "namedPod": namedPod, "otherPod": otherPod} {
		table.UpdatePod(Name{"", name}, pod)
	}
	table.SetHost(before)
	if len(table.node.ranges) > 0 {
		t.Errorf("the route of one pod is a range: %v", table.node.ranges) // then each that comes looks at all addresses
	}
	for _, tt := range []struct {
		name string
		edit func(*Host)
		want string
	}{
		{"nothing", func(*Host) {}, ""},
		{"another order", func(h *Host) { h.Addresses, h.PodRoutes = slices.Repeat(h.Addresses, 2), slices.Repeat(h.PodRoutes, 2) }, ""},
		{"its name", func(h *Host) { h.Name = "n2" }, "hinted localNamed namedPod otherPod"},
		{"its zone", func(h *Host) { h.Zone = "b" }, "hinted localNamed namedPod otherPod"},
		{"an address for node ports", func(h *Host) { h.NodePorts = addrs("192.0.2.1", "192.0.2.2") }, "nodePort"},
		{"an address", func(h *Host) { h.Addresses = addrs("192.0.2.1", "192.0.2.2") }, "namedPod unnamedPod"},
		{"an address that is an endpoint", func(h *Host) { h.Addresses = addrs("10.0.0.1", "192.0.2.1") }, "localNodeless namedPod unnamedPod"},
		{"the route of an endpoint comes", func(h *Host) { h.PodRoutes = prefixes("10.0.0.7/32", "10.0.0.1/32") }, "localNodeless"},
		{"a route that is nobody's", func(h *Host) { h.PodRoutes = prefixes("10.0.0.7/32", "10.0.0.3/32") }, ""},
		{"the route of a Pod goes", func(h *Host) { h.PodRoutes = prefixes() }, "unnamedPod"},
		{"a range comes", func(h *Host) { h.PodRoutes = prefixes("10.0.0.7/32", "10.0.0.0/29") }, "localNodeless"},
		{"a range in place of an address", func(h *Host) { h.PodRoutes = prefixes("10.0.0.6/31") }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, to := nodeOf(before), before
			tt.edit(&to)
			after := nodeOf(to)
			var got []string
			for r := range table.askers.concerned(&from, &after) {
				got = append(got, r.Name.Name)
			}
			slices.Sort(got)
			if got := strings.Join(got, " "); got != tt.want {
				t.Errorf("resolved again: %q, want %q", got, tt.want)
			}
		})
	}
}

// BenchmarkPodRoute has one pod route come and go among few services with policies and among many: the cost
// must not differ by their number.
func BenchmarkPodRoute(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("among %d", n), func(b *testing.B) {
			table := NewTable(Options{})
			addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}) }
			for i := range n {
				svc := with(tcp80(fmt.Sprintf("172.16.%d.%d", i>>8, i&255)), func(s *corev1.Service) {
					s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
				})
				table.Update(Name{"default", fmt.Sprint(i)}, svc, []*discoveryv1.EndpointSlice{
					sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf(addr(i).String(), "---")),
				})
			}
			with, without := Host{PodRoutes: []netip.Prefix{netip.PrefixFrom(addr(1), 32)}}, Host{PodRoutes: []netip.Prefix{}}
			for b.Loop() {
				table.SetHost(with)
				table.SetHost(without)
			}
		})
	}
}
