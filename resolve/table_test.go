// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
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
			fmt.Fprintf(&b, "  backend %s%s\n", be.Addr, map[bool]string{false: " keeps its flows"}[be.Cluster])
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
func at(svc *corev1.Service, second int) *corev1.Service {
	svc.CreationTimestamp = metav1.Time{}
	if second > 0 {
		svc.CreationTimestamp = metav1.NewTime(time.Date(2024, 1, 1, 0, 0, second, 0, time.UTC))
	}
	return svc
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
			}), "+default/b/TCP IPv4, -default/a/TCP IPv4", ""},
			{"a", svc(1), "+default/a/TCP IPv4, -default/b/TCP IPv4", "b"},
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
			table := NewTable()
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
	table := NewTable()
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
		{"another endpoint", dual(), slice(endpointOf("10.0.0.1", "yyn"), endpointOf("10.0.0.2", "yyn")), "+default/web/TCP IPv4"},
		{"no endpoint", dual(), nil, "+default/web/TCP IPv4"},
		{"one family less", tcp80("10.96.0.1"), first, "-default/web/TCP IPv6"},
		{"another address", tcp80("10.96.0.1", "fd00:96::2"), first, "+default/web/TCP IPv6"},
		{"another problem only", with(dual(), func(s *corev1.Service) { s.Spec.HealthCheckNodePort = 1 }), first, ""},
		{"the Service goes", nil, first, "-default/web/TCP IPv4, -default/web/TCP IPv6"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable()
			table.Update(defaultWeb, dual(), first)
			if got := table.Update(defaultWeb, tt.svc, tt.slices).text(); got != tt.want {
				t.Errorf("change %q, want %q", got, tt.want)
			}
		})
	}
}

func TestUpdateOfTheMissing(t *testing.T) {
	if got := NewTable().Update(defaultWeb, nil, nil).text(); got != "" {
		t.Errorf("change %q", got)
	}
}

// TestTableForgets says that a Table is empty once all that was in it has gone.
func TestTableForgets(t *testing.T) {
	table := NewTable()
	for _, name := range []string{"a", "b", "c"} {
		table.Update(Name{"default", name}, tcp80("10.96.0.1"), nil)
	}
	table.Update(Name{"default", "d"}, tcp80(), nil) // a problem and nothing else
	for _, name := range []string{"b", "a", "d", "c"} {
		table.Update(Name{"default", name}, nil, nil)
	}
	if n := len(table.objects) + len(table.problems) + len(table.claims) + len(table.contested) + len(table.inForce); n > 0 {
		t.Errorf("left behind: %+v", table)
	}
}

// BenchmarkUpdate changes one Service among few and among many: the cost must not differ by their number.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("among %d", n), func(b *testing.B) {
			table := NewTable()
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

// TestTableInAnyOrder plays random sequences; FuzzTable looks for worse ones.
func TestTableInAnyOrder(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		script := make([]byte, 200)
		for i := range script {
			script[i] = byte(random.Uint32())
		}
		play(t, script)
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte("a few services that come, change and go"))
	f.Fuzz(play)
}

// play runs updates and deletes of a few Services that fight for a few VIPs, then holds the outcome against
// a fresh Table given the final objects, and against the rule itself.
func play(t *testing.T, script []byte) {
	table, state := NewTable(), follower{}
	objects := map[Name]*corev1.Service{}
	endpointSlices := map[Name][]*discoveryv1.EndpointSlice{}
	for len(script) > 0 {
		var name Name
		name, script = playName(script)
		svc, s := playService(&script)
		var change Change
		if svc == nil {
			delete(objects, name)
			change = table.Update(name, nil, nil)
		} else {
			objects[name], endpointSlices[name] = svc, s
			change = table.Update(name, svc, s)
		}
		for _, removed := range change.Removed {
			if _, ok := change.Changed[removed]; ok {
				t.Fatalf("both changed and removed: %s", removed)
			}
			if _, ok := state[removed]; !ok {
				t.Fatalf("removed and was not there: %s", removed)
			}
		}
		for name, s := range change.Changed {
			if old, ok := state[name]; ok && equal(old, s) {
				t.Fatalf("changed and is as before: %s", name)
			}
		}
		state.apply(change)
	}

	fresh, want := NewTable(), follower{}
	for name, svc := range objects {
		want.apply(fresh.Update(name, svc, endpointSlices[name]))
	}
	if diff := gocmp.Diff(want.text(), state.text()); diff != "" {
		t.Fatalf("against a fresh table (-fresh +played):\n%s", diff)
	}
	if diff := gocmp.Diff(follower(table.inForce).text(), state.text()); diff != "" {
		t.Fatalf("against its own state (-own +changes):\n%s", diff)
	}
	if diff := gocmp.Diff(problemText(fresh.Problems()), problemText(table.Problems())); diff != "" {
		t.Fatalf("problems (-fresh +played):\n%s", diff)
	}
	if diff := gocmp.Diff(byTheRule(objects), state.holders()); diff != "" {
		t.Fatalf("who holds what (-rule +played):\n%s", diff)
	}
}

// byTheRule says who holds each VIP by going through all Services, the oldest first.
func byTheRule(objects map[Name]*corev1.Service) map[string]string {
	names := slices.SortedFunc(maps.Keys(objects), func(a, b Name) int {
		age := func(n Name) int64 {
			if at := objects[n].CreationTimestamp; !at.IsZero() {
				return at.Unix()
			}
			return 1 << 62
		}
		return cmp.Or(cmp.Compare(age(a), age(b)), cmp.Compare(a.String(), b.String()))
	})
	holders := map[string]string{}
	for _, name := range names {
		for _, s := range resolve(name, objects[name], nil).services {
			for _, f := range s.Frontends {
				if _, taken := holders[f.VIP.String()]; !taken {
					holders[f.VIP.String()] = s.Name.String()
				}
			}
		}
	}
	return holders
}

func (f follower) holders() map[string]string {
	holders := map[string]string{}
	for name, s := range f {
		for _, fe := range s.Frontends {
			holders[fe.VIP.String()] += name.String() // two of them would show
		}
	}
	return holders
}

func playName(script []byte) (Name, []byte) {
	return Name{"default", string('a' + rune(script[0]%5))}, script[1:]
}

// playService makes a Service and its slices of the next bytes, or none, which deletes it.
func playService(script *[]byte) (*corev1.Service, []*discoveryv1.EndpointSlice) {
	next := func(n int) int {
		if len(*script) == 0 {
			return 0
		}
		b := (*script)[0]
		*script = (*script)[1:]
		return int(b) % n
	}
	if next(4) == 0 {
		return nil, nil
	}
	svc := at(&corev1.Service{}, next(4))
	for range next(3) {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, []string{"10.96.0.1", "10.96.0.2", "fd00:96::1", "None"}[next(4)])
	}
	for range next(4) {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{
			Name:     []string{"", "x"}[next(2)],
			Protocol: []corev1.Protocol{"TCP", "UDP", "SCTP"}[next(3)],
			Port:     []int32{80, 81}[next(2)],
		})
	}
	var all []*discoveryv1.EndpointSlice
	for range next(3) {
		family := []discoveryv1.AddressType{"IPv4", "IPv6"}[next(2)]
		s := sliceOf(family, portOf([]string{"", "x"}[next(2)], []corev1.Protocol{"TCP", "UDP"}[next(2)], 8080))
		for range next(3) {
			addr := map[discoveryv1.AddressType][]string{
				"IPv4": {"10.0.0.1", "10.0.0.2"}, "IPv6": {"fd00::1", "fd00::2"},
			}[family][next(2)]
			s.Endpoints = append(s.Endpoints, endpointOf(addr, []string{"yyn", "nyy", "nnn", "---"}[next(4)]))
		}
		all = append(all, s)
	}
	return svc, all
}
