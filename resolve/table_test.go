// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lbagent/lbagent/lb"
)

// follower applies Changes in their order and holds what they add up to.
type follower map[lb.ServiceName]lb.Service

func (f follower) apply(c Change) {
	for _, name := range c.Removed {
		delete(f, name)
	}
	maps.Copy(f, c.Changed)
}

// text is services as a human would write them.
func (f follower) text() string {
	var b strings.Builder
	for _, name := range slices.SortedFunc(maps.Keys(f), lb.ServiceName.Compare) {
		fmt.Fprintln(&b, name)
		for _, fe := range f[name].Frontends {
			fmt.Fprintf(&b, "  frontend %s %s\n", fe.VIP, fe.Kind)
		}
		for _, be := range f[name].Backends {
			fmt.Fprintf(&b, "  backend %s%s%s\n", be.Addr, scopeText(be), map[bool]string{true: fmt.Sprintf(" weight %d", be.Weight)}[be.Weight != 1])
		}
		b.WriteString(policyText(f[name]))
	}
	return b.String()
}

func scopeText(b lb.Backend) string {
	return map[[2]bool]string{
		{true, true}:   " also Local",
		{false, true}:  " Local only",
		{false, false}: " keeps its flows",
	}[[2]bool{b.Cluster, b.Local}]
}

// policyText is what a service says that is not the default.
func policyText(s lb.Service) string {
	var b strings.Builder
	for _, line := range []struct {
		is   bool
		text string
	}{
		{s.Algorithm != lb.Plain, s.Algorithm.String()},
		{s.InternalLocal, "internal policy Local"},
		{s.ExternalLocal, "external policy Local"},
		{s.Affinity != 0, "affinity " + s.Affinity.String()},
		{s.SourceRanges != nil, fmt.Sprint("sources ", s.SourceRanges)},
	} {
		if line.is {
			fmt.Fprintf(&b, "  %s\n", line.text)
		}
	}
	return b.String()
}

// text is a Change in a line: + a service changed or new, - one removed.
func (c Change) text() string {
	var all []string
	for name := range c.Changed {
		all = append(all, "+"+name.String())
	}
	for _, name := range c.Removed {
		all = append(all, "-"+name.String())
	}
	for addr, came := range c.Foreign {
		all = append(all, map[bool]string{true: "+foreign ", false: "-foreign "}[came]+addr.String())
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func problemText(problems []lb.Problem) string {
	var b strings.Builder
	for _, p := range problems {
		fmt.Fprintf(&b, "%s: %s\n", p.Severity, p.Error())
	}
	return b.String()
}

// at sets the age of a Service, in seconds after an arbitrary time; 0 is none.
func at(svc *corev1.Service, n int) *corev1.Service {
	svc.CreationTimestamp = second(n)
	return svc
}

func second(n int) metav1.Time {
	if n == 0 {
		return metav1.Time{}
	}
	return metav1.NewTime(time.Date(2024, 1, 1, 0, 0, n, 0, time.UTC))
}

// viewsText is views as a human would write them.
func viewsText(views []lb.View) string {
	var b strings.Builder
	for _, v := range views {
		b.WriteString(follower{v.Service.Name: v.Service}.text())
		for _, e := range v.Endpoints {
			fmt.Fprintf(&b, "  endpoint %s node %q zone %q weight %d: Cluster: %s; Local: %s\n", e.Addr, e.Node, e.Zone, e.Weight,
				cmp.Or(e.Cluster, "yes"), cmp.Or(e.Local, "yes"))
		}
		for _, w := range v.Waiting {
			fmt.Fprintf(&b, "  waits for %s %s of %s\n", w.Frontend.VIP, w.Frontend.Kind, w.Holder)
		}
	}
	return b.String()
}

func TestTwoServicesOneVIP(t *testing.T) {
	const vip = "10.96.0.1"
	svc := func(second int) *corev1.Service { return at(tcp80(vip), second) }
	type step struct {
		name   string          // of the Service, in namespace default
		svc    *corev1.Service // nil to delete it
		change string
		waits  string // the Services that are warned, in order
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"the older keeps it, the younger takes over", []step{
			{"b", svc(1), "+default/b/TCP IPv4", ""},
			{"a", svc(2), "", "a"},
			{"b", nil, "+default/a/TCP IPv4, -default/b/TCP IPv4", ""},
		}},
		{"the older comes later", []step{
			{"a", svc(2), "+default/a/TCP IPv4", ""},
			{"b", svc(1), "+default/b/TCP IPv4, -default/a/TCP IPv4", "a"},
			{"b", nil, "+default/a/TCP IPv4, -default/b/TCP IPv4", ""},
		}},
		{"of one age: by name", []step{
			{"b", svc(1), "+default/b/TCP IPv4", ""},
			{"a", svc(1), "+default/a/TCP IPv4, -default/b/TCP IPv4", "b"},
		}},
		{"without an age: the youngest", []step{
			{"a", svc(0), "+default/a/TCP IPv4", ""},
			{"b", svc(9), "+default/b/TCP IPv4, -default/a/TCP IPv4", "a"},
			{"c", svc(0), "", "a c"},
			{"b", nil, "+default/a/TCP IPv4, -default/b/TCP IPv4", "c"},
		}},
		{"one that waits goes: nobody notices", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", svc(2), "", "b"},
			{"c", svc(3), "", "b c"},
			{"b", nil, "", "c"},
			{"a", nil, "+default/c/TCP IPv4, -default/a/TCP IPv4", ""},
		}},
		{"the holder moves to another address", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", svc(2), "", "b"},
			{"a", at(tcp80("10.96.0.2"), 1), "+default/a/TCP IPv4, +default/b/TCP IPv4", ""},
			{"a", svc(1), "+default/a/TCP IPv4, -default/b/TCP IPv4", "b"},
		}},
		{"the holder becomes one that is not ours", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", svc(2), "", "b"},
			{"a", with(svc(1), func(s *corev1.Service) {
				s.Labels = map[string]string{labelServiceProxyName: ""}
			}), "+default/b/TCP IPv4, +foreign 10.96.0.1, -default/a/TCP IPv4", ""},
			{"a", svc(1), "+default/a/TCP IPv4, -default/b/TCP IPv4, -foreign 10.96.0.1", "b"},
		}},
		{"ages change", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", svc(2), "", "b"},
			{"a", svc(3), "+default/b/TCP IPv4, -default/a/TCP IPv4", "a"},
		}},
		{"the rest of the loser works", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", at(tcp80(vip, "fd00:96::1"), 2), "+default/b/TCP IPv6", "b"},
			{"a", nil, "+default/b/TCP IPv4, -default/a/TCP IPv4", ""},
		}},
		{"another port or protocol is no conflict", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", with(svc(2), func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 }), "+default/b/TCP IPv4", ""},
			{"c", with(svc(3), func(s *corev1.Service) { s.Spec.Ports[0].Protocol = "UDP" }), "+default/c/UDP IPv4", ""},
		}},
		{"the port of the holder gets another name", []step{
			{"a", svc(1), "+default/a/TCP IPv4", ""},
			{"b", svc(2), "", "b"},
			{"a", with(svc(1), func(s *corev1.Service) { s.Spec.Ports[0].Name = "http" }),
				"+default/a:http/TCP IPv4, -default/a/TCP IPv4", "b"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable(Options{})
			for i, s := range tt.steps {
				change := table.Update(Name{"default", s.name}, s.svc, nil)
				if got := change.text(); got != s.change {
					t.Errorf("step %d: change %q, want %q", i, got, s.change)
				}
				var waits []string
				for _, p := range table.Problems() {
					if p.Severity != lb.Warning || !strings.Contains(p.Message, "10.96.0.1:80/TCP is held by Service default/") {
						t.Errorf("step %d: unexpected problem %v", i, p)
					}
					waits = append(waits, strings.TrimPrefix(p.Object, "Service default/"))
				}
				if got := strings.Join(waits, " "); got != s.waits {
					t.Errorf("step %d: %q wait, want %q", i, got, s.waits)
				}
			}
		})
	}
}

func TestTwoServicesOneVIPNamesTheHolder(t *testing.T) {
	table := NewTable(Options{})
	table.Update(Name{"default", "a"}, at(tcp80("10.96.0.1"), 1), nil)
	table.Update(Name{"other", "b"}, at(tcp80("fd00:96::1", "10.96.0.1"), 2), nil)
	want := []lb.Problem{{
		Object:   "Service other/b",
		Field:    "spec.clusterIPs[1]",
		Message:  "10.96.0.1:80/TCP is held by Service default/a; it is served here once that one lets go of it",
		Severity: lb.Warning,
	}}
	if diff := gocmp.Diff(want, table.Problems()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

// TestChangesAreMinimal says of updates what they change, and so, too, that the rest does not.
func TestChangesAreMinimal(t *testing.T) {
	slice := func(endpoints ...discoveryv1.Endpoint) []*discoveryv1.EndpointSlice {
		return []*discoveryv1.EndpointSlice{sliceOf("IPv4", portOf("", "TCP", 8080), endpoints...)}
	}
	dual := func() *corev1.Service { return tcp80("10.96.0.1", "fd00:96::1") }
	first := slice(endpointOf("10.0.0.1", "yyn"))
	for _, tt := range []struct {
		name   string
		svc    *corev1.Service
		slices []*discoveryv1.EndpointSlice
		want   string
	}{
		{"nothing", dual(), slice(endpointOf("10.0.0.1", "yyn")), ""},
		{"nil for what it means", dual(), slice(endpointOf("10.0.0.1", "---")), ""},
		{"an annotation", with(dual(), func(s *corev1.Service) { s.Annotations = map[string]string{"a": "b"} }), first, ""},
		{"the same in two slices", dual(), append(slice(endpointOf("10.0.0.1", "yyn")), first...), ""},
		{"an endpoint that counts for nothing", dual(), slice(endpointOf("10.0.0.1", "yyn"), endpointOf("10.0.0.2", "nnn")), ""},
		{"affinity", with(dual(), func(s *corev1.Service) { s.Spec.SessionAffinity = "ClientIP" }), first,
			"+default/web/TCP IPv4, +default/web/TCP IPv6"},
		{"algorithm", with(dual(), func(s *corev1.Service) {
			s.Annotations = map[string]string{"lbagent.io/algorithm": "maglev"}
		}), first, "+default/web/TCP IPv4, +default/web/TCP IPv6"},
		{"internal policy", with(dual(), func(s *corev1.Service) {
			s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
		}), first, "+default/web/TCP IPv4, +default/web/TCP IPv6"},
		{"external policy of no frontend", with(dual(), func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Local" }), first, ""},
		{"external policy", with(dual(), func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy = "NodePort", "Local"
		}), first, "+default/web/TCP IPv4, +default/web/TCP IPv6"},
		{"source ranges of no frontend", with(dual(), func(s *corev1.Service) {
			s.Spec.Type, s.Spec.LoadBalancerSourceRanges = "LoadBalancer", []string{"192.0.2.0/24"}
		}), first, ""},
		{"another endpoint", dual(), slice(endpointOf("10.0.0.1", "yyn"), endpointOf("10.0.0.2", "yyn")), "+default/web/TCP IPv4"},
		{"no endpoint", dual(), nil, "+default/web/TCP IPv4"},
		{"one family less", tcp80("10.96.0.1"), first, "-default/web/TCP IPv6"},
		{"another address", tcp80("10.96.0.1", "fd00:96::2"), first, "+default/web/TCP IPv6"},
		{"another problem only", with(dual(), func(s *corev1.Service) {
			s.Annotations = map[string]string{"lbagent.io/algorithm": "best"}
		}), first, ""},
		{"the Service goes", nil, first, "-default/web/TCP IPv4, -default/web/TCP IPv6"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable(Options{})
			table.Update(defaultWeb, dual(), first)
			if got := table.Update(defaultWeb, tt.svc, tt.slices).text(); got != tt.want {
				t.Errorf("change %q, want %q", got, tt.want)
			}
		})
	}
}

func TestUpdateOfTheMissing(t *testing.T) {
	if got := NewTable(Options{}).Update(defaultWeb, nil, nil).text(); got != "" {
		t.Errorf("change %q", got)
	}
}

// TestTableForgets says that a Table is empty once all that was in it has gone.
func TestTableForgets(t *testing.T) {
	table := NewTable(Options{})
	for _, name := range []string{"a", "b", "c"} {
		table.Update(Name{"default", name}, tcp80("10.96.0.1"), nil)
	}
	table.Update(Name{"default", "d"}, tcp80(), nil) // a problem and nothing else
	table.SetHost(Host{PodRoutes: prefixes("10.0.0.1/32")})
	local := at(nodePort30080("LoadBalancer"), 1)
	local.Spec.ExternalTrafficPolicy, local.Spec.HealthCheckNodePort = "Local", 32000
	table.Update(Name{"default", "e"}, local, []*discoveryv1.EndpointSlice{
		sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.0.0.1", "---")),
	})
	table.Update(Name{"default", "f"}, with(tcp80("10.96.0.9"), func(s *corev1.Service) {
		s.Labels = map[string]string{labelServiceProxyName: ""}
	}), nil)
	table.UpdatePod(Name{"default", "a"}, podWith(corev1.ContainerPort{HostPort: 80, ContainerPort: 80}))
	table.UpdatePod(Name{"default", "b"}, podWith(corev1.ContainerPort{ContainerPort: 80})) // of no interest
	if _, kept := table.objects[ref{Name{"default", "b"}, true}]; kept {
		t.Error("a Pod without hostPorts is kept")
	}
	for _, name := range []string{"b", "a", "d", "c", "e", "f"} {
		table.Update(Name{"default", name}, nil, nil)
		table.UpdatePod(Name{"default", name}, nil)
	}
	if n := len(table.objects) + len(table.problems) + len(table.claims) + len(table.contested) + len(table.inForce) +
		len(table.checks) + len(table.foreign) + len(table.askers.place) + len(table.askers.addresses) +
		len(table.askers.nodePorts) + len(table.askers.has); n > 0 {
		t.Errorf("left behind: %+v", table)
	}
}

// TestEveryFieldCounts: two services that differ in one field are not equal.
func TestEveryFieldCounts(t *testing.T) {
	one := reflect.TypeFor[lb.Service]()
	for i := range one.NumField() {
		other := lb.Service{}
		switch field := reflect.ValueOf(&other).Elem().Field(i); field.Kind() {
		case reflect.Bool:
			field.SetBool(true)
		case reflect.Uint8:
			field.SetUint(1)
		case reflect.Int64:
			field.SetInt(1)
		case reflect.Slice:
			field.Set(reflect.MakeSlice(field.Type(), 1, 1))
		case reflect.Struct:
			field.Field(0).SetString("x")
		default:
			t.Fatalf("field %s: what is another value?", one.Field(i).Name)
		}
		if equal(lb.Service{}, other) {
			t.Errorf("field %s does not count", one.Field(i).Name)
		}
	}
}

// BenchmarkUpdate changes one Service among few and among many: the cost must not differ by their number.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("among %d", n), func(b *testing.B) {
			table := NewTable(Options{})
			for i := range n {
				vip := fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)
				table.Update(Name{"default", fmt.Sprint(i)}, tcp80(vip), nil)
			}
			svc := tcp80("10.0.0.1") // that of Service 1, so that there is a conflict too
			slice := sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.1.0.1", "---"))
			few, many := []*discoveryv1.EndpointSlice{slice}, []*discoveryv1.EndpointSlice{slice,
				sliceOf("IPv4", portOf("", "TCP", 8080), endpointOf("10.1.0.2", "---"))}
			for b.Loop() {
				table.Update(Name{"default", "0"}, svc, few)
				table.Update(Name{"default", "0"}, svc, many)
				table.Update(Name{"default", "0"}, nil, nil)
			}
		})
	}
}
