// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/lbagent/lbagent/lb"
)

func addrs(list ...string) (all []netip.Addr) {
	for _, a := range list {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

func prefixes(list ...string) []netip.Prefix {
	all := []netip.Prefix{} // not nil: that means something else
	for _, p := range list {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

// shortFrontends are the frontends of the services of an object, sorted: "NodePort 192.0.2.1:30080/TCP".
func shortFrontends(o object) (all []string) {
	for _, s := range o.services {
		for _, f := range s.Frontends {
			all = append(all, f.Kind.String()+" "+f.VIP.String())
		}
	}
	slices.Sort(all)
	return all
}

// nodePort30080 is a Service of a type with a node port, of both families.
func nodePort30080(typ corev1.ServiceType) *corev1.Service {
	return with(tcp80("10.96.0.1", "fd00:96::1"), func(s *corev1.Service) {
		s.Spec.Type = typ
		s.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
		s.Spec.Ports[0].NodePort = 30080
	})
}

func TestNodePorts(t *testing.T) {
	host := Host{NodePorts: addrs("192.0.2.1", "192.0.2.2", "2001:db8::1"), Addresses: addrs("192.0.2.7")}
	all := []string{"NodePort 192.0.2.1:30080/TCP", "NodePort 192.0.2.2:30080/TCP", "NodePort [2001:db8::1]:30080/TCP"}
	for _, tt := range []struct {
		name string
		svc  *corev1.Service
		host Host
		want []string // beside the cluster IPs
	}{
		{"NodePort", nodePort30080("NodePort"), host, all},
		{"LoadBalancer", nodePort30080("LoadBalancer"), host, all},
		{"no address for them", nodePort30080("NodePort"), Host{Addresses: host.Addresses}, nil},
		{"ClusterIP that was a NodePort", nodePort30080("ClusterIP"), host, nil},
		{"allocateLoadBalancerNodePorts: false", with(nodePort30080("LoadBalancer"), func(s *corev1.Service) {
			s.Spec.Ports[0].NodePort = 0
		}), host, nil},
		{"a family not in ipFamilies", with(nodePort30080("NodePort"), func(s *corev1.Service) {
			s.Spec.IPFamilies, s.Spec.ClusterIPs = []corev1.IPFamily{"IPv6"}, []string{"fd00:96::1"}
		}), host, all[2:]},
		{"no ipFamilies: those of the cluster IPs", with(nodePort30080("NodePort"), func(s *corev1.Service) {
			s.Spec.IPFamilies, s.Spec.ClusterIPs = nil, []string{"10.96.0.1"}
		}), host, all[:2]},
		{"SCTP", with(nodePort30080("NodePort"), func(s *corev1.Service) { s.Spec.Ports[0].Protocol = "SCTP" }), host, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := slices.DeleteFunc(shortFrontends(resolveAt(tt.host, tt.svc, nil)), func(s string) bool {
				return s == "ClusterIP 10.96.0.1:80/TCP" || s == "ClusterIP [fd00:96::1]:80/TCP"
			})
			if diff := cmp.Diff(tt.want, got, equateEmpty); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
		})
	}
}

var equateEmpty = cmp.Transformer("nil", func(s []string) []string { return append([]string{}, s...) })

func TestLoadBalancerAddresses(t *testing.T) {
	type ingress = corev1.LoadBalancerIngress
	vip, proxy := corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy
	for _, tt := range []struct {
		name     string
		typ      corev1.ServiceType
		ingress  ingress
		want     []string
		problems []string
	}{
		{"no ipMode", "LoadBalancer", ingress{IP: "192.0.2.1"}, []string{"LoadBalancer 192.0.2.1:80/TCP"}, nil},
		{"ipMode VIP", "LoadBalancer", ingress{IP: "192.0.2.1", IPMode: &vip}, []string{"LoadBalancer 192.0.2.1:80/TCP"}, nil},
		{"ipMode Proxy", "LoadBalancer", ingress{IP: "192.0.2.1", IPMode: &proxy}, nil, nil},
		{"hostname only", "LoadBalancer", ingress{Hostname: "web.example"}, nil, nil},
		{"errors of its ports", "LoadBalancer", ingress{IP: "192.0.2.1", Ports: []corev1.PortStatus{{Error: new("x")}}},
			[]string{"LoadBalancer 192.0.2.1:80/TCP"}, nil},
		{"another type", "NodePort", ingress{IP: "192.0.2.1"}, nil, nil},
		{"a family not in ipFamilies", "LoadBalancer", ingress{IP: "2001:db8::1"}, nil,
			[]string{"warning: status.loadBalancer.ingress[0].ip"}},
		{"no address", "LoadBalancer", ingress{IP: "x"}, nil, []string{"warning: status.loadBalancer.ingress[0].ip"}},
		{"the cluster IP again", "LoadBalancer", ingress{IP: "10.96.0.1"}, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := tcp80("10.96.0.1")
			svc.Spec.Type, svc.Spec.Ports[0].NodePort = tt.typ, 30080
			svc.Status.LoadBalancer.Ingress = []ingress{tt.ingress}
			o := resolveAt(Host{}, svc, nil)
			want := append([]string{"ClusterIP 10.96.0.1:80/TCP"}, tt.want...)
			if diff := cmp.Diff(want, shortFrontends(o)); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExternalIPs(t *testing.T) {
	for _, tt := range []struct {
		name     string
		allow    []netip.Prefix
		ip       string
		want     []string
		problems []string
	}{
		{"no limit", nil, "192.0.2.1", []string{"external 192.0.2.1:80/TCP"}, nil},
		{"inside", prefixes("192.0.2.0/24"), "192.0.2.1", []string{"external 192.0.2.1:80/TCP"}, nil},
		{"outside", prefixes("192.0.2.0/24"), "198.51.100.1", nil, []string{"warning: spec.externalIPs[0]"}},
		{"none are allowed", prefixes(), "192.0.2.1", nil, []string{"warning: spec.externalIPs[0]"}},
		{"a family not in ipFamilies", nil, "2001:db8::1", nil, []string{"warning: spec.externalIPs[0]"}},
		{"no address", prefixes("192.0.2.0/24"), "x", nil, []string{"warning: spec.externalIPs[0]"}},
	} {
		for _, typ := range []corev1.ServiceType{"ClusterIP", "NodePort", "LoadBalancer"} { // of every type
			t.Run(tt.name+", "+string(typ), func(t *testing.T) {
				table := NewTable(Options{ExternalIPsAllow: tt.allow})
				svc := tcp80("10.96.0.1")
				svc.Spec.Type, svc.Spec.ExternalIPs, svc.Spec.Ports[0].NodePort = typ, []string{tt.ip}, 30080
				svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{Hostname: "web.example"}}
				table.Update(defaultWeb, svc, nil)
				want := append([]string{"ClusterIP 10.96.0.1:80/TCP"}, tt.want...)
				if diff := cmp.Diff(want, shortFrontends(table.objects[ref{Name: defaultWeb}])); diff != "" {
					t.Errorf("frontends (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tt.problems, fieldsOf(table.Problems())); diff != "" {
					t.Errorf("problems (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestOneAddressGivenTwice: within one Service ClusterIP goes before LoadBalancer before external before node
// port, and nobody is warned.
func TestOneAddressGivenTwice(t *testing.T) {
	const addr = "192.0.2.1"
	given := []struct {
		kind lb.Kind
		give func(*corev1.Service)
	}{
		{lb.ClusterIP, func(s *corev1.Service) { s.Spec.ClusterIPs = []string{addr} }},
		{lb.LoadBalancer, func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: addr}}
		}},
		{lb.External, func(s *corev1.Service) { s.Spec.ExternalIPs = []string{addr} }},
		{lb.NodePort, func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 80 }},
	}
	for i, first := range given {
		for _, second := range given[i+1:] {
			t.Run(fmt.Sprintf("%s and %s", first.kind, second.kind), func(t *testing.T) {
				svc := tcp80("10.96.0.1")
				svc.Spec.Type, svc.Spec.AllocateLoadBalancerNodePorts = "LoadBalancer", new(false)
				svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{Hostname: "web.example"}}
				second.give(svc)
				first.give(svc)
				o := resolveAt(Host{NodePorts: addrs(addr)}, svc, nil)
				want := first.kind.String() + " 192.0.2.1:80/TCP"
				if got := shortFrontends(o); !slices.Contains(got, want) || slices.Contains(got, second.kind.String()+" 192.0.2.1:80/TCP") {
					t.Errorf("frontends %q, want %q", got, want)
				}
				if len(o.problems) > 0 {
					t.Errorf("problems: %v", o.problems)
				}
			})
		}
	}
}

// TestForeign: the addresses of Services that are not ours, as they come and go.
func TestForeign(t *testing.T) {
	labelled := func(label string, svc *corev1.Service) *corev1.Service {
		svc.Labels = map[string]string{label: ""}
		return svc
	}
	everything := func() *corev1.Service {
		svc := tcp80("10.96.0.1", "fd00:96::1")
		svc.Spec.Type = "LoadBalancer"
		svc.Spec.ExternalIPs = []string{"192.0.2.1"}
		svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.2"}}
		return svc
	}
	table := NewTable(Options{})
	for i, step := range []struct {
		name string
		svc  *corev1.Service
		want string
	}{
		{"a", labelled(labelServiceProxyName, everything()),
			"+foreign 10.96.0.1, +foreign 192.0.2.1, +foreign 192.0.2.2, +foreign fd00:96::1"},
		{"b", labelled("service.kubernetes.io/headless", tcp80("10.96.0.1", "10.96.0.2")), "+foreign 10.96.0.2"},
		{"a", labelled(labelServiceProxyName, tcp80("fd00:96::1")), "-foreign 192.0.2.1, -foreign 192.0.2.2"},
		{"b", tcp80("10.96.0.1"), "+default/b/TCP IPv4, -foreign 10.96.0.1, -foreign 10.96.0.2"},
		{"c", labelled(labelServiceProxyName, tcp80("10.96.0.1")), "+foreign 10.96.0.1"}, // ours as well
		{"c", labelled(labelServiceProxyName, tcp80("None")), "-foreign 10.96.0.1"},
		{"a", nil, "-foreign fd00:96::1"},
	} {
		if got := table.Update(Name{"default", step.name}, step.svc, nil).text(); got != step.want {
			t.Errorf("step %d: change %q, want %q", i, got, step.want)
		}
	}
}

func TestProxyName(t *testing.T) {
	const label = labelServiceProxyName
	for _, tt := range []struct {
		own    string // Options.ProxyName
		labels []string
		want   bool
	}{
		{"", nil, true},
		{"", []string{label, ""}, false},
		{"", []string{label, "us"}, false},
		{"us", []string{label, "us"}, true},
		{"us", []string{label, "them"}, false},
		{"us", []string{label, ""}, false},
		{"us", nil, false},
		{"us", []string{label, "us", "service.kubernetes.io/headless", ""}, false},
	} {
		meta := labels(tt.labels...)
		if got := ours(&meta, &Options{ProxyName: tt.own}); got != tt.want {
			t.Errorf("proxy %q, labels %q: ours %t, want %t", tt.own, tt.labels, got, tt.want)
		}
	}
}
