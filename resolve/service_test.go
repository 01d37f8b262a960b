// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lbagent/lbagent/lb"
)

// tcp80 is a Service with one unnamed port, TCP 80, at the addresses given.
func tcp80(clusterIPs ...string) *corev1.Service {
	return &corev1.Service{Spec: corev1.ServiceSpec{
		ClusterIPs: clusterIPs,
		Ports:      []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 80}},
	}}
}

// with returns svc after edit.
func with(svc *corev1.Service, edit func(*corev1.Service)) *corev1.Service {
	edit(svc)
	return svc
}

func labels(l ...string) metav1.ObjectMeta {
	m := metav1.ObjectMeta{Labels: map[string]string{}}
	for i := 0; i < len(l); i += 2 {
		m.Labels[l[i]] = l[i+1]
	}
	return m
}

// frontendsOf returns the frontends of a Service that is alone, each behind the name of its service.
func frontendsOf(o object) []string {
	var all []string
	for name, s := range o.services {
		for _, f := range s.Frontends {
			all = append(all, name.String()+" "+f.Kind.String()+" "+f.VIP.String())
		}
	}
	slices.Sort(all)
	return all
}

// fieldsOf returns the severities and fields of problems.
func fieldsOf(problems []lb.Problem) []string {
	var all []string
	for _, p := range problems {
		all = append(all, p.Severity.String()+": "+p.Field)
	}
	slices.Sort(all)
	return all
}

// resolveAt resolves Service default/web on a node.
func resolveAt(h Host, svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) object {
	t := NewTable(Options{})
	t.SetHost(h)
	return t.resolve(ref{Name: defaultWeb}, input{svc: svc, slices: endpointSlices})
}

var defaultWeb = Name{"default", "web"}

func TestWhichServicesCount(t *testing.T) {
	served := []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"}
	for _, tt := range []struct {
		name string
		svc  *corev1.Service
		want []string
	}{
		{"no Service", nil, nil},
		{"ClusterIP", tcp80("10.96.0.1"), served},
		{"service-proxy-name", with(tcp80("10.96.0.1"), func(s *corev1.Service) {
			s.ObjectMeta = labels("service.kubernetes.io/service-proxy-name", "other")
		}), nil},
		{"service-proxy-name, empty", with(tcp80("10.96.0.1"), func(s *corev1.Service) {
			s.ObjectMeta = labels("service.kubernetes.io/service-proxy-name", "")
		}), nil},
		{"another label", with(tcp80("10.96.0.1"), func(s *corev1.Service) {
			s.ObjectMeta = labels("app", "web")
		}), served},
		{"headless by clusterIP", with(tcp80(), func(s *corev1.Service) { s.Spec.ClusterIP = "None" }), nil},
		{"headless by clusterIPs", tcp80("None"), nil},
		{"headless by label", with(tcp80("10.96.0.1"), func(s *corev1.Service) {
			s.ObjectMeta = labels("service.kubernetes.io/headless", "")
		}), nil},
		{"ExternalName", with(tcp80(), func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalName = "ExternalName", "web.example"
		}), nil},
		{"ExternalName, what it was before left in it", with(tcp80("10.96.0.1"), func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalName = "ExternalName", "web.example"
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}}
		}), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := resolveAt(Host{}, tt.svc, nil)
			if diff := cmp.Diff(tt.want, frontendsOf(o)); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if len(o.problems) > 0 {
				t.Errorf("problems: %v", o.problems)
			}
		})
	}
}

func TestWhichSlicesCount(t *testing.T) {
	for _, tt := range []struct {
		name string
		meta metav1.ObjectMeta
		want int
	}{
		{"no label of ours", labels("kubernetes.io/service-name", "web"), 1},
		{"service-proxy-name", labels("service.kubernetes.io/service-proxy-name", ""), 0},
		{"headless", labels("service.kubernetes.io/headless", ""), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---"))
			s.ObjectMeta = tt.meta
			o := resolveAt(Host{}, tcp80("10.96.0.1"), []*discoveryv1.EndpointSlice{s})
			for _, service := range o.services { // left without slices it is still there: it rejects
				if got := len(service.Backends); got != tt.want {
					t.Errorf("%d backends, want %d", got, tt.want)
				}
			}
			if len(o.services) != 1 {
				t.Errorf("%d services, want 1", len(o.services))
			}
		})
	}
}

func TestClusterIPs(t *testing.T) {
	for _, tt := range []struct {
		name     string
		svc      *corev1.Service
		want     []string
		problems []string
	}{
		{
			name: "clusterIP alone",
			svc:  with(tcp80(), func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.1" }),
			want: []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
		}, {
			name: "clusterIP and clusterIPs",
			svc:  with(tcp80("10.96.0.1"), func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.1" }),
			want: []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
		}, {
			name: "IPv6",
			svc:  tcp80("fd00:96::1"),
			want: []string{"default/web/TCP IPv6 ClusterIP [fd00:96::1]:80/TCP"},
		}, {
			name: "dual-stack",
			svc: with(tcp80("10.96.0.1", "fd00:96::1"), func(s *corev1.Service) {
				s.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
			}),
			want: []string{
				"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP",
				"default/web/TCP IPv6 ClusterIP [fd00:96::1]:80/TCP",
			},
		}, {
			name: "a family not in ipFamilies",
			svc: with(tcp80("10.96.0.1", "fd00:96::1"), func(s *corev1.Service) {
				s.Spec.IPFamilies = []corev1.IPFamily{"IPv4"}
			}),
			want:     []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"warning: spec.clusterIPs[1]"},
		}, {
			name:     "none",
			svc:      tcp80(),
			problems: []string{"not yet: spec.clusterIP"},
		}, {
			name: "one of two families",
			svc: with(tcp80("10.96.0.1"), func(s *corev1.Service) {
				s.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
			}),
			want:     []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"not yet: spec.clusterIPs"},
		}, {
			name: "RequireDualStack",
			svc: with(tcp80("10.96.0.1"), func(s *corev1.Service) {
				s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
			}),
			want:     []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"not yet: spec.clusterIPs"},
		}, {
			name: "PreferDualStack",
			svc: with(tcp80("10.96.0.1"), func(s *corev1.Service) {
				s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
			}),
			want:     []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"not yet: spec.clusterIPs"},
		}, {
			name: "PreferDualStack, as a cluster of one family has it",
			svc: with(tcp80("10.96.0.1"), func(s *corev1.Service) {
				s.Spec.IPFamilies = []corev1.IPFamily{"IPv4"}
				s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
			}),
			want: []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
		}, {
			name:     "no address",
			svc:      with(tcp80(), func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.256" }),
			problems: []string{"warning: spec.clusterIP"},
		}, {
			name:     "v4-mapped",
			svc:      tcp80("::ffff:10.96.0.1"),
			problems: []string{"warning: spec.clusterIPs[0]"},
		}, {
			name: "the same twice",
			svc:  tcp80("10.96.0.1", "10.96.0.1"),
			want: []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := resolveAt(Host{}, tt.svc, nil)
			if diff := cmp.Diff(tt.want, frontendsOf(o)); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestServicePorts(t *testing.T) {
	for _, tt := range []struct {
		name     string
		ports    []corev1.ServicePort
		want     []string
		problems []string
	}{
		{
			name:  "same number, two protocols",
			ports: []corev1.ServicePort{{Name: "dns", Protocol: "UDP", Port: 53}, {Name: "dns-tcp", Protocol: "TCP", Port: 53}},
			want: []string{
				"default/web:dns-tcp/TCP IPv4 ClusterIP 10.96.0.1:53/TCP",
				"default/web:dns/UDP IPv4 ClusterIP 10.96.0.1:53/UDP",
			},
		}, {
			name:  "no protocol is TCP",
			ports: []corev1.ServicePort{{Port: 80}},
			want:  []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
		}, {
			name:     "SCTP beside others",
			ports:    []corev1.ServicePort{{Name: "a", Protocol: "SCTP", Port: 80}, {Name: "b", Port: 80}},
			want:     []string{"default/web:b/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"not yet: spec.ports[0].protocol"},
		}, {
			name:     "no port number",
			ports:    []corev1.ServicePort{{Name: "a", Port: 65536}, {Name: "b", Port: 0}},
			problems: []string{"warning: spec.ports[0].port", "warning: spec.ports[1].port"},
		}, {
			name:     "two ports of one number and protocol: the first",
			ports:    []corev1.ServicePort{{Name: "b", Port: 80}, {Name: "a", Port: 80}},
			want:     []string{"default/web:b/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"},
			problems: []string{"warning: spec.clusterIPs[0]"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := tcp80("10.96.0.1")
			svc.Spec.Ports = tt.ports
			o := resolveAt(Host{}, svc, nil)
			if diff := cmp.Diff(tt.want, frontendsOf(o)); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// TestNotYetServed has a case for each field that is accepted and not served: it is named, and the cluster
// IP is served all the same. A feature that arrives takes its cases from here.
func TestNotYetServed(t *testing.T) {
	for _, tt := range []struct {
		name   string
		edit   func(*corev1.Service)
		slices []*discoveryv1.EndpointSlice
		want   []string
	}{
		{"nothing", func(*corev1.Service) {}, nil, nil},
		{"defaults of an API server", func(s *corev1.Service) {
			s.Spec.Type = "ClusterIP"
			s.Spec.SessionAffinity = "None"
			s.Spec.IPFamilies = []corev1.IPFamily{"IPv4"}
			s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
			s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
		}, nil, nil},
		{"SCTP", func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "sctp", Protocol: "SCTP", Port: 80})
		}, nil, []string{"not yet: spec.ports[1].protocol"}},
		{"no node port", func(s *corev1.Service) { s.Spec.Type = "NodePort" }, nil, []string{"not yet: spec.ports[0].nodePort"}},
		{"no load balancer address", func(s *corev1.Service) {
			s.Spec.Type, s.Spec.AllocateLoadBalancerNodePorts, s.Spec.ExternalTrafficPolicy = "LoadBalancer", new(false), "Local"
		}, nil, []string{"not yet: spec.healthCheckNodePort", "not yet: status.loadBalancer"}},
		{"selector without a slice", func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": "web"} },
			nil, []string{"not yet: spec.selector"}},
		{"selector with a slice", func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": "web"} },
			[]*discoveryv1.EndpointSlice{{}}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := resolveAt(Host{}, with(tcp80("10.96.0.1"), tt.edit), tt.slices)
			want := []string{"default/web/TCP IPv4 ClusterIP 10.96.0.1:80/TCP"}
			if diff := cmp.Diff(want, frontendsOf(o)); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			for _, p := range o.problems {
				if p.Object != "Service default/web" || p.Message == "" {
					t.Errorf("problem without object or message: %+v", p)
				}
			}
		})
	}
}

func TestDualStackEndpoints(t *testing.T) {
	o := resolveAt(Host{}, tcp80("10.96.0.1", "fd00:96::1"), []*discoveryv1.EndpointSlice{
		sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---")),
		sliceOf("IPv6", portOf("", "TCP", 8080), endpointOf("fd00::1", "---"), endpointOf("fd00::2", "---")),
	})
	want := map[lb.Family]int{lb.IPv4: 1, lb.IPv6: 2}
	got := map[lb.Family]int{}
	for name, s := range o.services {
		got[name.Family] = len(s.Backends)
	}
	if !maps.Equal(got, want) {
		t.Errorf("backends of each family: %v, want %v", got, want)
	}
}

func TestPolicies(t *testing.T) {
	for _, tt := range []struct {
		name               string
		edit               func(*corev1.ServiceSpec)
		internal, external bool
	}{
		{"none said", func(*corev1.ServiceSpec) {}, false, false},
		{"Cluster", func(s *corev1.ServiceSpec) {
			s.Type, s.ExternalTrafficPolicy = "NodePort", "Cluster"
			s.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
		}, false, false},
		{"internal", func(s *corev1.ServiceSpec) {
			s.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
		}, true, false},
		{"external, NodePort", func(s *corev1.ServiceSpec) { s.Type, s.ExternalTrafficPolicy = "NodePort", "Local" }, false, true},
		{"external, LoadBalancer", func(s *corev1.ServiceSpec) { s.Type, s.ExternalTrafficPolicy = "LoadBalancer", "Local" }, false, true},
		{"external, ClusterIP with external addresses", func(s *corev1.ServiceSpec) {
			s.ExternalIPs, s.ExternalTrafficPolicy = []string{"192.0.2.1"}, "Local"
		}, false, true},
		{"external, ClusterIP without: left from another type", func(s *corev1.ServiceSpec) {
			s.Type, s.ExternalTrafficPolicy = "ClusterIP", "Local"
		}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := tcp80("10.96.0.1")
			tt.edit(&svc.Spec)
			slice := sliceOf("IPv4", portOf("", "TCP", 8080), endpointOn("here", "10.0.0.1", "---"), endpointOn("there", "10.0.0.2", "---"))
			o := resolveAt(Host{Name: "here"}, svc, []*discoveryv1.EndpointSlice{slice})
			if len(o.services) != 1 {
				t.Fatalf("%d services", len(o.services))
			}
			for _, s := range o.services {
				if s.InternalLocal != tt.internal || s.ExternalLocal != tt.external {
					t.Errorf("internal %t, external %t; want %t, %t", s.InternalLocal, s.ExternalLocal, tt.internal, tt.external)
				}
				one, other := backend("10.0.0.1:8080", true), backend("10.0.0.2:8080", true)
				one.Local = tt.internal || tt.external // without a policy nobody is told where it is
				if diff := cmp.Diff([]lb.Backend{one, other}, s.Backends, compareValues); diff != "" {
					t.Errorf("backends (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestHealthCheckNodePort(t *testing.T) {
	local := func(edit ...func(*corev1.Service)) *corev1.Service {
		svc := tcp80("10.96.0.1", "fd00:96::1")
		svc.Spec.Type, svc.Spec.ExternalTrafficPolicy, svc.Spec.HealthCheckNodePort = "LoadBalancer", "Local", 32000
		svc.Spec.Ports = []corev1.ServicePort{{Name: "a", Port: 80}, {Name: "b", Port: 81}, {Name: "c", Port: 82, Protocol: "SCTP"}}
		for _, e := range edit {
			e(svc)
		}
		return svc
	}
	slice := func(family discoveryv1.AddressType, name string, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
		return sliceOf(family, portOf(name, "TCP", 8080), endpoints...)
	}
	some := []*discoveryv1.EndpointSlice{slice("IPv4", "a", endpointOn("here", "10.0.0.1", "---"))}
	weightless := some[0].DeepCopy()
	weightless.Annotations = map[string]string{weightsAnnotation: "10.0.0.1=0"}
	for _, tt := range []struct {
		name   string
		svc    *corev1.Service
		slices []*discoveryv1.EndpointSlice
		want   int // -1: no health check
	}{
		{"none", local(), nil, 0},
		{"one", local(), some, 1},
		{"a NodePort", local(func(s *corev1.Service) { s.Spec.Type = "NodePort" }), some, -1},
		{"policy Cluster", local(func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Cluster" }), some, -1},
		{"no port", local(func(s *corev1.Service) { s.Spec.HealthCheckNodePort = 0 }), some, -1},
		{"no address yet", local(func(s *corev1.Service) { s.Spec.ClusterIPs = nil }), some, 1},
		{"another proxy's", local(func(s *corev1.Service) { s.Labels = map[string]string{labelServiceProxyName: ""} }), some, -1},
		{"gone", nil, some, -1},
		{"distinct addresses, over ports and families", local(), []*discoveryv1.EndpointSlice{
			slice("IPv4", "a", endpointOn("here", "10.0.0.1", "---"), endpointOn("here", "10.0.0.2", "---")),
			slice("IPv4", "b", endpointOn("here", "10.0.0.1", "---")),
			slice("IPv6", "b", endpointOn("here", "fd00::1", "---")),
		}, 3},
		{"ready ones alone, on this node", local(), []*discoveryv1.EndpointSlice{slice("IPv4", "a",
			endpointOn("here", "10.0.0.1", "nyy"), endpointOn("there", "10.0.0.2", "---"), endpointOn("here", "10.0.0.3", "nyn"))}, 0},
		{"none of weight 0, which takes no new client", local(), []*discoveryv1.EndpointSlice{weightless, slice("IPv4", "b",
			endpointOn("here", "10.0.0.2", "---"))}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable(Options{})
			table.Update(defaultWeb, local(), nil)
			table.SetHost(Host{Name: "here"})
			table.Update(defaultWeb, tt.svc, tt.slices)
			want := []lb.HealthCheck{{Namespace: "default", Name: "web", Port: 32000, LocalEndpoints: tt.want}}
			if tt.want < 0 {
				want = nil
			}
			if diff := cmp.Diff(want, table.HealthChecks()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestSlicesOfAProxyWithAName: a slice of another's name does not count, one without any does.
func TestSlicesOfAProxyWithAName(t *testing.T) {
	for _, tt := range []struct {
		labels []string
		want   int
	}{
		{nil, 1},
		{[]string{labelServiceProxyName, "us"}, 1},
		{[]string{labelServiceProxyName, "them"}, 0},
		{[]string{labelServiceProxyName, ""}, 0},
		{[]string{"service.kubernetes.io/headless", ""}, 0},
	} {
		s := sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---"))
		s.ObjectMeta = labels(tt.labels...)
		if got := len(ourSlices([]*discoveryv1.EndpointSlice{s}, &Options{ProxyName: "us"})); got != tt.want {
			t.Errorf("%q: %d slices, want %d", tt.labels, got, tt.want)
		}
	}
}
