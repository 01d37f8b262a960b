// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lbagent/lbagent/lb"
)

// labelServiceProxyName names the proxy that a Service is for, in place of the cluster's own (KEP-2447).
// k8s.io/api has no constant for it.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// wish is a frontend that a Service asks for.
type wish struct {
	frontend lb.Frontend
	port     string // name of the Service port
	field    string // that asks for it
}

// resolve says what one Service asks for, without regard to any other.
func resolve(name Name, svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) object {
	if svc == nil || !counts(svc) {
		return object{}
	}
	endpointSlices = slices.DeleteFunc(slices.Clone(endpointSlices), func(s *discoveryv1.EndpointSlice) bool {
		return ignoredByLabel(&s.ObjectMeta)
	})
	wishes, problems := clusterIPFrontends(&svc.Spec)
	problems = append(problems, notServed(svc, endpointSlices)...)

	o := object{services: map[lb.ServiceName]lb.Service{}, claims: map[lb.VIP]claim{}}
	slices.SortStableFunc(wishes, func(a, b wish) int { return a.frontend.VIP.Compare(b.frontend.VIP) })
	for _, w := range wishes {
		vip := w.frontend.VIP
		service := lb.ServiceName{
			Namespace: name.Namespace, Name: name.Name,
			Port: w.port, Protocol: vip.Protocol, Family: lb.FamilyOf(vip.Addr),
		}
		if c, ok := o.claims[vip]; ok { // the first port that asks for it has it; validation leaves no second
			if c.service != service {
				problems = append(problems, warning(w.field, "port %q asks for %s, which is that of port %q",
					w.port, vip, c.service.Port))
			}
			continue
		}
		o.claims[vip] = claim{service: service, created: svc.CreationTimestamp.Time, field: w.field}
		s, ok := o.services[service]
		if !ok {
			s = lb.Service{Name: service, Backends: backends(service, endpointSlices)}
		}
		s.Frontends = append(s.Frontends, w.frontend)
		o.services[service] = s
	}
	for i := range problems {
		problems[i].Object = objectOf(name)
	}
	o.problems = problems
	return o
}

// counts reports whether a Service is one to serve. Of what is not, nothing is in force and nothing is a
// problem: another proxy serves it, or DNS alone (headless, ExternalName).
func counts(svc *corev1.Service) bool {
	headless := svc.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(svc.Spec.ClusterIPs, corev1.ClusterIPNone)
	return !ignoredByLabel(&svc.ObjectMeta) && !headless && svc.Spec.Type != corev1.ServiceTypeExternalName
}

// ignoredByLabel reports whether a Service or an EndpointSlice says that it is for another proxy or for none.
// The presence of the label decides, an empty value too; kube-proxy selects its objects alike.
func ignoredByLabel(meta *metav1.ObjectMeta) bool {
	_, foreign := meta.Labels[labelServiceProxyName]
	_, headless := meta.Labels[corev1.IsHeadlessService]
	return foreign || headless
}

// clusterIPFrontends returns a frontend for each port at each cluster IP.
func clusterIPFrontends(spec *corev1.ServiceSpec) (wishes []wish, problems []lb.Problem) {
	ips, problems := clusterIPs(spec)
	for i := range spec.Ports {
		port := &spec.Ports[i]
		protocol := protocolOf(port.Protocol)
		number, ok := portNumber(port.Port)
		switch {
		case !ok:
			problems = append(problems, warning(fmt.Sprintf("spec.ports[%d].port", i), "%d is not a port number", port.Port))
			continue
		case !served(protocol):
			continue // notServed names it
		}
		for _, ip := range ips {
			vip := lb.VIP{Addr: ip.addr, Port: number, Protocol: protocol}
			wishes = append(wishes, wish{lb.Frontend{VIP: vip, Kind: lb.ClusterIP}, port.Name, ip.field})
		}
	}
	return wishes, problems
}

// address is an address of a Service and the field that gives it.
type address struct {
	addr  netip.Addr
	field string
}

// clusterIPs returns the cluster IPs of a Service. What is validated elsewhere (by the API server, by the
// manifest source) and wrong nevertheless is left out and named.
func clusterIPs(spec *corev1.ServiceSpec) (ips []address, problems []lb.Problem) {
	given, field := spec.ClusterIPs, func(i int) string { return fmt.Sprintf("spec.clusterIPs[%d]", i) }
	if len(given) == 0 && spec.ClusterIP != "" {
		given, field = []string{spec.ClusterIP}, func(int) string { return "spec.clusterIP" }
	}
	for i, s := range given {
		addr, ok := parseAddr(s)
		switch {
		case !ok:
			problems = append(problems, warning(field(i), "%q is not an IP address", s))
		case !hasFamily(spec, lb.FamilyOf(addr)):
			problems = append(problems, warning(field(i), "%s is %s, which spec.ipFamilies does not name: it is not served",
				s, lb.FamilyOf(addr)))
		default:
			ips = append(ips, address{addr, field(i)})
		}
	}
	switch {
	case len(given) == 0:
		problems = append(problems, notYet("spec.clusterIP",
			"allocation of addresses is not yet there: give spec.clusterIP"))
	case len(given) == 1 && dualStack(spec):
		problems = append(problems, notYet("spec.clusterIPs",
			"allocation of addresses is not yet there: give one of each family"))
	}
	return ips, problems
}

// hasFamily reports whether a Service has a family. A manifest need not name them: then its addresses say.
func hasFamily(spec *corev1.ServiceSpec, f lb.Family) bool {
	return len(spec.IPFamilies) == 0 || slices.Contains(spec.IPFamilies, corev1.IPFamily(f.String()))
}

// dualStack reports whether a Service is to have both families. PreferDualStack with one family named is
// what an API server of one family makes of it, and asks for no more.
func dualStack(spec *corev1.ServiceSpec) bool {
	policy := deref(spec.IPFamilyPolicy, corev1.IPFamilyPolicySingleStack)
	return len(spec.IPFamilies) > 1 ||
		policy == corev1.IPFamilyPolicyRequireDualStack ||
		policy == corev1.IPFamilyPolicyPreferDualStack && len(spec.IPFamilies) == 0
}

// parseAddr parses an address in a form that may go into a VIP or a backend: not v4-mapped, without a zone.
func parseAddr(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	return addr, err == nil && !addr.Is4In6() && addr.Zone() == ""
}

// protocolOf returns the protocol that the API names, TCP where it names none, and 0 for one unknown.
func protocolOf(p corev1.Protocol) lb.Protocol {
	switch p {
	case corev1.ProtocolTCP, "":
		return lb.TCP
	case corev1.ProtocolUDP:
		return lb.UDP
	case corev1.ProtocolSCTP:
		return lb.SCTP
	}
	return 0
}

// served reports whether this version serves a protocol.
func served(p lb.Protocol) bool { return p == lb.TCP || p == lb.UDP }

func portNumber(n int32) (uint16, bool) {
	return uint16(n), 0 < n && n <= math.MaxUint16
}
