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

func TestAlgorithmAnnotation(t *testing.T) {
	for _, tt := range []struct {
		value   *string
		want    lb.Algorithm
		problem string
	}{
		{nil, lb.Plain, ""},
		{new("plain"), lb.Plain, ""},
		{new("maglev"), lb.Maglev, ""},
		{new("Maglev"), lb.Plain, `"Maglev" is neither "plain" nor "maglev"; "plain" is in force`},
		{new(""), lb.Plain, `"" is neither "plain" nor "maglev"; "plain" is in force`},
	} {
		svc := tcp80("10.96.0.1")
		if tt.value != nil {
			svc.Annotations = map[string]string{"lbagent.io/algorithm": *tt.value}
		}
		o := resolveAt(Host{}, svc, nil)
		for _, s := range o.services {
			if s.Algorithm != tt.want {
				t.Errorf("%s: %s, want %s", deref(tt.value, "none"), s.Algorithm, tt.want)
			}
		}
		var want []lb.Problem
		if tt.problem != "" {
			want = []lb.Problem{{Object: "Service default/web", Field: "metadata.annotations[lbagent.io/algorithm]",
				Message: tt.problem, Severity: lb.Warning}}
		}
		if diff := cmp.Diff(want, o.problems); diff != "" {
			t.Errorf("%s: problems (-want +got):\n%s", deref(tt.value, "none"), diff)
		}
	}
}

func TestWeightsAnnotation(t *testing.T) {
	const field = "metadata.annotations[lbagent.io/weights]"
	for _, tt := range []struct {
		text     string
		want     string // weights of 10.0.0.1 to 10.0.0.3
		problems []string
	}{
		{"", "1 1 1", nil},
		{"10.0.0.1=5", "5 1 1", nil},
		{" 10.0.0.1 = 5 ,\n10.0.0.2=0,", "5 0 1", nil},
		{"10.0.0.1=1000,10.0.0.2=1001", "1000 1 1", []string{`"10.0.0.2=1001": a weight is a number from 0 to 1000; 1 is in force`}},
		{"10.0.0.1=-1", "1 1 1", []string{`"10.0.0.1=-1": a weight is a number from 0 to 1000; 1 is in force`}},
		{"10.0.0.1=2.5", "1 1 1", []string{`"10.0.0.1=2.5": a weight is a number from 0 to 1000; 1 is in force`}},
		{"10.0.0.1", "1 1 1", []string{`"10.0.0.1" is not ADDRESS=WEIGHT; it is left out`}},
		{"web=1", "1 1 1", []string{`"web=1" is not ADDRESS=WEIGHT; it is left out`}},
		{"10.0.0.1=2,10.0.0.1=3,10.0.0.3=4", "2 1 4", []string{`"10.0.0.1=3": 10.0.0.1 has a weight already, 2, which is in force`}},
		{"10.0.0.9=2", "1 1 1", []string{"10.0.0.9 is the address of no endpoint of this slice; its weight is for nothing"}},
	} {
		s := sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---"), endpointOf("10.0.0.2", "---"), endpointOf("10.0.0.3", "---"))
		s.Namespace, s.Name = "default", "web-1"
		s.Annotations = map[string]string{"lbagent.io/weights": tt.text}
		o := resolveAt(Host{}, tcp80("10.96.0.1"), []*discoveryv1.EndpointSlice{s})
		var got []string
		for _, s := range o.services {
			for _, b := range s.Backends {
				got = append(got, fmt.Sprint(b.Weight))
				if !b.Cluster {
					t.Errorf("%q: %s is not usable: a weight of 0 does not make it so", tt.text, b.Addr)
				}
			}
		}
		if got := strings.Join(got, " "); got != tt.want {
			t.Errorf("%q: weights %s, want %s", tt.text, got, tt.want)
		}
		var want []lb.Problem
		for _, message := range tt.problems {
			want = append(want, lb.Problem{Object: "EndpointSlice default/web-1", Field: field, Message: message, Severity: lb.Warning})
		}
		if diff := cmp.Diff(want, o.problems); diff != "" {
			t.Errorf("%q: problems (-want +got):\n%s", tt.text, diff)
		}
	}
}

// TestWeightOfOneInTwoSlices: what is said goes before what is not, and the more usable entry before both.
func TestWeightOfOneInTwoSlices(t *testing.T) {
	slice := func(cond, weights string) *discoveryv1.EndpointSlice {
		s := sliceOf("IPv4", portOf("http", "TCP", 8080), endpointOf("10.0.0.1", cond))
		if weights != "" {
			s.Annotations = map[string]string{weightsAnnotation: "10.0.0.1=" + weights}
		}
		return s
	}
	for _, tt := range []struct {
		name       string
		one, other *discoveryv1.EndpointSlice
		want       uint16
	}{
		{"said by one", slice("yyn", "0"), slice("yyn", ""), 0},
		{"the greater", slice("yyn", "3"), slice("yyn", "7"), 7},
		{"that of the more usable", slice("yyn", "3"), slice("nyy", "7"), 3},
		{"said by none", slice("yyn", ""), slice("yyn", ""), 1},
	} {
		for _, order := range [][]*discoveryv1.EndpointSlice{{tt.one, tt.other}, {tt.other, tt.one}} {
			if got := backendsOf(web, order); len(got) != 1 || got[0].Weight != tt.want {
				t.Errorf("%s: %+v, want weight %d", tt.name, got, tt.want)
			}
		}
	}
}

// FuzzAnnotations: whatever they say, what is in force is in range, and what is not as it was said is named.
func FuzzAnnotations(f *testing.F) {
	f.Add("maglev", "10.0.0.1=5,fd00::1=0")
	f.Add("", "10.0.0.1=1001,=,10.0.0.1=1,10.0.0.1=2")
	f.Fuzz(func(t *testing.T, algorithm, text string) {
		svc := tcp80("10.96.0.1")
		svc.Annotations = map[string]string{algorithmAnnotation: algorithm}
		if a, problems := algorithmOf(&svc.ObjectMeta); (a.String() == algorithm) != (len(problems) == 0) {
			t.Errorf("%q: %s, problems %v", algorithm, a, problems)
		}
		w, wrong := parseWeights(text)
		if len(w.order) != len(w.of) {
			t.Errorf("%q: %v, %v", text, w.order, w.of)
		}
		entries := 0
		for entry := range strings.SplitSeq(text, ",") {
			if strings.TrimSpace(entry) != "" {
				entries++
			}
		}
		if entries != len(w.of)+len(wrong) {
			t.Errorf("%q: %d entries, %d weights and %d problems", text, entries, len(w.of), len(wrong))
		}
		var again []string
		for _, a := range w.order {
			if w.of[a] > lb.MaxWeight || a.Is4In6() || a.Zone() != "" {
				t.Errorf("%q: %s=%d", text, a, w.of[a])
			}
			again = append(again, fmt.Sprintf("%s=%d", a, w.of[a]))
		}
		second, wrong := parseWeights(strings.Join(again, ","))
		if diff := cmp.Diff(w.of, second.of, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" || len(wrong) > 0 {
			t.Errorf("%q: written and read again: %v, %s", text, wrong, diff)
		}
	})
}

func TestAffinity(t *testing.T) {
	timeout := func(seconds int32) *corev1.SessionAffinityConfig {
		return &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	for _, tt := range []struct {
		name     string
		affinity corev1.ServiceAffinity
		config   *corev1.SessionAffinityConfig
		want     string
		problems []string
	}{
		{"none said", "", nil, "0s", nil},
		{"None", "None", nil, "0s", nil},
		{"None, with a timeout", "None", timeout(10), "0s", nil},
		{"ClientIP", "ClientIP", nil, "3h0m0s", nil},
		{"an empty config", "ClientIP", &corev1.SessionAffinityConfig{}, "3h0m0s", nil},
		{"shortest", "ClientIP", timeout(1), "1s", nil},
		{"longest", "ClientIP", timeout(86400), "24h0m0s", nil},
		{"too short", "ClientIP", timeout(0), "3h0m0s", []string{"warning: spec.sessionAffinityConfig.clientIP.timeoutSeconds"}},
		{"too long", "ClientIP", timeout(86401), "3h0m0s", []string{"warning: spec.sessionAffinityConfig.clientIP.timeoutSeconds"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := resolveAt(Host{}, with(tcp80("10.96.0.1"), func(s *corev1.Service) {
				s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = tt.affinity, tt.config
			}), nil)
			for _, s := range o.services {
				if got := s.Affinity.String(); got != tt.want {
					t.Errorf("affinity %s, want %s", got, tt.want)
				}
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSourceRanges(t *testing.T) {
	const wrong = "warning: spec.loadBalancerSourceRanges[0]"
	for _, tt := range []struct {
		name     string
		typ      corev1.ServiceType
		ranges   []string
		v4, v6   string // the ranges of the service of each family, "closed" where its load balancer address is not served
		problems []string
	}{
		{"none", "LoadBalancer", nil, "[]", "[]", nil},
		{"one family: the other is open", "LoadBalancer", []string{"192.0.2.0/24"}, "[192.0.2.0/24]", "[]", nil},
		{"masked, once each, spaces trimmed, sorted", "LoadBalancer",
			[]string{"198.51.100.0/24", " 192.0.2.7/24 ", "192.0.2.0/24", "2001:db8::1/32"},
			"[192.0.2.0/24 198.51.100.0/24]", "[2001:db8::/32]", nil},
		{"another type", "NodePort", []string{"192.0.2.0/24"}, "no LoadBalancer", "no LoadBalancer", nil},
		{"no CIDR: nobody", "LoadBalancer", []string{"192.0.2.0"}, "closed", "closed", []string{wrong}},
		{"no CIDR beside one", "LoadBalancer", []string{"x", "192.0.2.0/24"}, "[192.0.2.0/24]", "closed", []string{wrong}},
		{"v4-mapped", "LoadBalancer", []string{"::ffff:192.0.2.0/120"}, "closed", "closed", []string{wrong}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := tcp80("10.96.0.1", "fd00:96::1")
			svc.Spec.Type, svc.Spec.LoadBalancerSourceRanges, svc.Spec.Ports[0].NodePort = tt.typ, tt.ranges, 30080
			svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}, {IP: "2001:db8::1"}}
			o := resolveAt(Host{}, svc, nil)
			for family, want := range map[lb.Family]string{lb.IPv4: tt.v4, lb.IPv6: tt.v6} {
				s := o.services[lb.ServiceName{Namespace: "default", Name: "web", Protocol: lb.TCP, Family: family}]
				got := fmt.Sprint(s.SourceRanges)
				if len(s.Frontends) == 1 { // the cluster IP
					got = "closed"
					if tt.typ != "LoadBalancer" {
						got = "no LoadBalancer"
					}
				}
				if got != want {
					t.Errorf("%s: %s, want %s", family, got, want)
				}
			}
			if diff := cmp.Diff(tt.problems, fieldsOf(o.problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}
