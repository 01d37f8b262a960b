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
