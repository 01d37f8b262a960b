// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// TestTableInAnyOrder plays random sequences; FuzzTable looks for worse ones.
func TestTableInAnyOrder(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		script := make([]byte, 400)
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

var playOptions = Options{ExternalIPsAllow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}

// play changes a few Services and Pods that fight for a few VIPs, and the node, then holds the outcome against
// a fresh Table given what there is at the end in another order, and against the rule of who holds a VIP.
func play(t *testing.T, data []byte) {
	s := script(data)
	table, state, foreign := NewTable(playOptions), follower{}, map[netip.Addr]bool{}
	inputs := map[ref]input{}
	var host Host
	for len(s) > 0 {
		var change Change
		switch s.next(6) {
		case 0:
			host = s.host()
			change = table.SetHost(host)
		case 1:
			r := ref{s.name(), true}
			inputs[r] = input{pod: s.pod()}
			change = table.UpdatePod(r.Name, inputs[r].pod)
		default:
			r := ref{Name: s.name()}
			svc, endpointSlices := s.service()
			inputs[r] = input{svc: svc, slices: endpointSlices}
			change = table.Update(r.Name, svc, endpointSlices)
		}
		checkChange(t, state, foreign, change)
	}

	fresh, want, wantForeign := NewTable(playOptions), follower{}, map[netip.Addr]bool{}
	for r, in := range inputs { // in the order of the map: another one every time
		change := fresh.update(map[ref]input{r: {in.svc, reversed(in.slices), in.pod}})
		checkChange(t, want, wantForeign, change)
	}
	checkChange(t, want, wantForeign, fresh.SetHost(host))
	for _, d := range []struct{ what, diff string }{
		{"against a fresh table", gocmp.Diff(want.text(), state.text())},
		{"against its own state", gocmp.Diff(follower(table.inForce).text(), state.text())},
		{"problems", gocmp.Diff(problemText(fresh.Problems()), problemText(table.Problems()))},
		{"health checks", gocmp.Diff(fresh.HealthChecks(), table.HealthChecks())},
		{"foreign", gocmp.Diff(fmt.Sprint(wantForeign), fmt.Sprint(foreign))},
		{"views", gocmp.Diff(viewText(fresh), viewText(table))},
		{"who holds what", gocmp.Diff(byTheRule(fresh), state.holders())},
	} {
		if d.diff != "" {
			t.Fatalf("%s (-want +played):\n%s", d.what, d.diff)
		}
	}
}

// reversed returns slices in another order, and so what is in them.
func reversed(endpointSlices []*discoveryv1.EndpointSlice) (all []*discoveryv1.EndpointSlice) {
	for _, s := range slices.Backward(endpointSlices) {
		s = s.DeepCopy()
		slices.Reverse(s.Endpoints)
		all = append(all, s)
	}
	return all
}

// checkChange applies a Change, and says whether it is one that makes sense.
func checkChange(t *testing.T, state follower, foreign map[netip.Addr]bool, change Change) {
	for _, removed := range change.Removed {
		if _, ok := change.Changed[removed]; ok {
			t.Fatalf("both changed and removed: %s", removed)
		}
		if _, ok := state[removed]; !ok {
			t.Fatalf("removed and was not there: %s", removed)
		}
	}
	for name, s := range change.Changed {
		if old, ok := state[name]; ok && gocmp.Equal(follower{name: old}.text(), follower{name: s}.text()) {
			t.Fatalf("changed and is as before: %s", name)
		}
	}
	for addr, came := range change.Foreign {
		if foreign[addr] == came {
			t.Fatalf("foreign %s: %t, as before", addr, came)
		}
		put(foreign, addr, true, came)
	}
	state.apply(change)
}

// byTheRule says who holds each VIP by going through all that is asked for, the most exact and oldest first.
func byTheRule(t *Table) map[string]string {
	var all []claim
	vips := map[claim][]lb.VIP{}
	for _, o := range t.objects {
		for vip, c := range o.claims {
			all = append(all, c)
			vips[c] = append(vips[c], vip)
		}
	}
	slices.SortFunc(all, func(a, b claim) int {
		age := func(c claim) int64 {
			if !c.created.IsZero() {
				return c.created.Unix()
			}
			return 1 << 62
		}
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(age(a), age(b)),
			cmp.Compare(refOf(a.service).Name.String(), refOf(b.service).Name.String()), a.service.Compare(b.service))
	})
	holders := map[string]string{}
	for _, c := range all {
		for _, vip := range vips[c] {
			if _, taken := holders[vip.String()]; !taken {
				holders[vip.String()] = c.service.String()
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

// viewText is the views of all names that a script uses.
func viewText(t *Table) string {
	text := ""
	for i := range playNames {
		text += viewsText(t.View(Name{"default", string(rune('a' + i))}))
	}
	return text
}

const playNames = 5

// script is bytes that decisions are made of.
type script []byte

// next returns a number below n, 0 at the end of the script.
func (s *script) next(n int) int {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return int(b) % n
}

func (s *script) yes() bool { return s.next(2) == 1 }

// pick returns one of several.
func pick[T any](s *script, of ...T) T { return of[s.next(len(of))] }

func (s *script) name() Name { return Name{"default", string(rune('a' + s.next(playNames)))} }

func (s *script) host() Host {
	h := Host{Name: pick(s, "", "n1", "n2"), Zone: pick(s, "", "z1", "z2")}
	for _, addr := range []string{"192.0.2.1", "192.0.2.2", "2001:db8::1"} {
		if s.yes() {
			h.Addresses = append(h.Addresses, netip.MustParseAddr(addr))
		}
		if s.yes() {
			h.NodePorts = append(h.NodePorts, netip.MustParseAddr(addr))
		}
	}
	for _, route := range []string{"10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/30", "fd00::1/128", "fd00::/64"} {
		if s.yes() {
			h.PodRoutes = append(h.PodRoutes, netip.MustParsePrefix(route))
		}
	}
	return h
}

// pod makes a Pod, or none, which deletes it.
func (s *script) pod() *corev1.Pod {
	if s.next(4) == 0 {
		return nil
	}
	pod := podWith(corev1.ContainerPort{
		HostPort: pick[int32](s, 80, 81, 30080), ContainerPort: 8080,
		Protocol: pick(s, corev1.ProtocolTCP, corev1.ProtocolUDP),
		HostIP:   pick(s, "", "192.0.2.1", "0.0.0.0", "::", "127.0.0.1"),
	})
	pod.CreationTimestamp = second(s.next(4))
	pod.Spec.NodeName = pick(s, "", "n1", "n2")
	pod.Spec.HostNetwork = s.next(8) == 7
	pod.Status.PodIPs = []corev1.PodIP{{IP: pick(s, "10.0.0.1", "10.0.0.2", "192.0.2.2")}, {IP: "fd00::1"}}[:1+s.next(2)]
	return pod
}

// service makes a Service and its slices, or none, which deletes it.
func (s *script) service() (*corev1.Service, []*discoveryv1.EndpointSlice) {
	if s.next(4) == 0 {
		return nil, nil
	}
	svc := &corev1.Service{}
	svc.CreationTimestamp = second(s.next(4))
	spec := &svc.Spec
	spec.Type = pick(s, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer)
	if s.next(6) == 5 {
		svc.Labels = map[string]string{labelServiceProxyName: ""}
	}
	for range s.next(3) {
		spec.ClusterIPs = append(spec.ClusterIPs, pick(s, "10.96.0.1", "10.96.0.2", "fd00:96::1", "None"))
	}
	if s.yes() {
		spec.ExternalIPs = []string{pick(s, "192.0.2.1", "192.0.2.9", "198.51.100.1", "10.96.0.1")}
	}
	if s.yes() {
		svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: pick(s, "192.0.2.1", "192.0.2.9", "2001:db8::1")}}
		spec.LoadBalancerSourceRanges = [][]string{nil, {"10.0.0.0/8"}, {"10.0.0.0/8", "bad"}}[s.next(3)]
	}
	if s.yes() {
		spec.ExternalTrafficPolicy = "Local"
		spec.HealthCheckNodePort = int32(s.next(2) * 32000)
	}
	if s.yes() {
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
	}
	for range s.next(4) {
		spec.Ports = append(spec.Ports, corev1.ServicePort{
			Name:     pick(s, "", "x"),
			Protocol: pick(s, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP),
			Port:     pick[int32](s, 80, 81),
			NodePort: pick[int32](s, 0, 30080, 81),
		})
	}
	var all []*discoveryv1.EndpointSlice
	for range s.next(3) {
		family := pick(s, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6)
		slice := sliceOf(family, portOf(pick(s, "", "x"), pick(s, corev1.ProtocolTCP, corev1.ProtocolUDP), 8080))
		if s.yes() {
			slice.Annotations = map[string]string{weightsAnnotation: pick(s, "10.0.0.1=5", "10.0.0.2=0,fd00::1=7", "bad")}
		}
		for range s.next(3) {
			addr := map[discoveryv1.AddressType][]string{
				"IPv4": {"10.0.0.1", "10.0.0.2"}, "IPv6": {"fd00::1", "fd00::2"},
			}[family][s.next(2)]
			e := endpointOf(addr, pick(s, "yyn", "nyy", "nnn", "---"))
			if s.yes() {
				e.NodeName = new(pick(s, "n1", "n2"))
			}
			if s.yes() {
				e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: pick(s, "z1", "z2")}}}
			}
			if s.yes() {
				e.Hints = &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: pick(s, "n1", "n2")}}}
			}
			slice.Endpoints = append(slice.Endpoints, e)
		}
		all = append(all, slice)
	}
	return svc, all
}
