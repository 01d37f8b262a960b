// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/lbagent/lbagent/lb"
)

// wish is a frontend that an object asks for.
type wish struct {
	frontend lb.Frontend
	class    class
	port     string // name of the Service port, or the hostPort
	field    string // that asks for it
}

// compare sorts wishes by VIP, and those for one VIP by class.
func (w wish) compare(o wish) int {
	return cmp.Or(w.frontend.VIP.Compare(o.frontend.VIP), cmp.Compare(w.class, o.class))
}

// address is an address of a Service, and what asks for it.
type address struct {
	addr  netip.Addr
	kind  lb.Kind
	field string
}

// frontends returns what a Service asks for: each port at each of its addresses, and its node port at each
// address of the node that is for them.
func frontends(svc *corev1.Service, closed func(lb.Family) bool, options *Options, host *reader) ([]wish, []lb.Problem) {
	spec := &svc.Spec
	cluster, problems := clusterIPs(spec)
	balancer, wrong := loadBalancerIPs(svc, closed)
	problems = append(problems, wrong...)
	external, wrong := externalIPs(spec, options.ExternalIPsAllow)
	problems = append(problems, wrong...)
	own := slices.Concat(cluster, balancer, external) // in this order, for one that is given twice

	var wishes []wish
	for i := range spec.Ports {
		port := &spec.Ports[i]
		protocol := protocolOf(port.Protocol)
		if !served(protocol) {
			continue // notServed names it
		}
		ask := func(addr netip.Addr, number uint16, kind lb.Kind, class class, field string) {
			vip := lb.VIP{Addr: addr, Port: number, Protocol: protocol}
			wishes = append(wishes, wish{lb.Frontend{VIP: vip, Kind: kind}, class, port.Name, field})
		}
		if number, ok := portNumber(port.Port); !ok {
			problems = append(problems, warning(fmt.Sprintf("spec.ports[%d].port", i), "%d is not a port number", port.Port))
		} else {
			for _, a := range own {
				ask(a.addr, number, a.kind, exact, a.field)
			}
		}
		if port.NodePort == 0 || !hasNodePorts(spec) {
			continue
		}
		field := fmt.Sprintf("spec.ports[%d].nodePort", i)
		number, ok := portNumber(port.NodePort)
		if !ok {
			problems = append(problems, warning(field, "%d is not a port number", port.NodePort))
			continue
		}
		for _, addr := range host.nodePorts() {
			if hasFamily(spec, lb.FamilyOf(addr)) {
				ask(addr, number, lb.NodePort, nodePort, field)
			}
		}
	}
	return wishes, problems
}

// hasNodePorts reports whether the node ports of a Service mean something. One that has become a ClusterIP may
// still name them.
func hasNodePorts(spec *corev1.ServiceSpec) bool {
	return spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer
}

// clusterIPs returns the cluster IPs of a Service. What is validated elsewhere (by the API server, by the
// manifest source) and wrong nevertheless is left out and named.
func clusterIPs(spec *corev1.ServiceSpec) (ips []address, problems []lb.Problem) {
	given, field := givenClusterIPs(spec)
	for i, s := range given {
		ips, problems = appendAddress(ips, problems, spec, s, lb.ClusterIP, field(i))
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

// givenClusterIPs returns the cluster IPs as they are written, and where.
func givenClusterIPs(spec *corev1.ServiceSpec) ([]string, func(int) string) {
	if len(spec.ClusterIPs) == 0 && spec.ClusterIP != "" {
		return []string{spec.ClusterIP}, func(int) string { return "spec.clusterIP" }
	}
	return spec.ClusterIPs, func(i int) string { return fmt.Sprintf("spec.clusterIPs[%d]", i) }
}

// loadBalancerIPs returns the addresses that a load balancer gave to a Service, but for those that are its own
// business: with ipMode Proxy, or with a hostname only (KEP-1860). What the status says of a Service that is no
// LoadBalancer any more counts for nothing.
//
// closed are the families of which nobody may come in.
func loadBalancerIPs(svc *corev1.Service, closed func(lb.Family) bool) (ips []address, problems []lb.Problem) {
	for i, s := range virtualIPs(svc) {
		if s == "" {
			continue
		}
		if addr, ok := parseAddr(s); ok && closed(lb.FamilyOf(addr)) {
			continue // sourceRanges names it
		}
		ips, problems = appendAddress(ips, problems, &svc.Spec, s, lb.LoadBalancer,
			fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i))
	}
	return ips, problems
}

// virtualIPs returns for each ingress of a load balancer the address that is served here, "" for none.
func virtualIPs(svc *corev1.Service) []string {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	ips := make([]string, len(svc.Status.LoadBalancer.Ingress))
	for i, in := range svc.Status.LoadBalancer.Ingress {
		if deref(in.IPMode, corev1.LoadBalancerIPModeVIP) == corev1.LoadBalancerIPModeVIP {
			ips[i] = in.IP
		}
	}
	return ips
}

// externalIPs returns the external addresses of a Service that are allowed.
func externalIPs(spec *corev1.ServiceSpec, allow []netip.Prefix) (ips []address, problems []lb.Problem) {
	for i, s := range spec.ExternalIPs {
		field := fmt.Sprintf("spec.externalIPs[%d]", i)
		addr, ok := parseAddr(s)
		if ok && allow != nil && !slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			problems = append(problems, warning(field, "%s is in no prefix of --external-ips-allow: it is not served", s))
			continue
		}
		ips, problems = appendAddress(ips, problems, spec, s, lb.External, field)
	}
	return ips, problems
}

// appendAddress appends an address, or names what keeps it from being served.
func appendAddress(ips []address, problems []lb.Problem, spec *corev1.ServiceSpec, s string, kind lb.Kind, field string) ([]address, []lb.Problem) {
	addr, ok := parseAddr(s)
	switch {
	case !ok:
		problems = append(problems, warning(field, "%q is not an IP address", s))
	case !hasFamily(spec, lb.FamilyOf(addr)):
		problems = append(problems, warning(field, "%s is %s, which spec.ipFamilies does not name: it is not served",
			s, lb.FamilyOf(addr)))
	default:
		ips = append(ips, address{addr, kind, field})
	}
	return ips, problems
}

// hasFamily reports whether a Service has a family. A manifest need not name them: then its cluster IPs say, and
// where it has none yet, nothing speaks against either.
func hasFamily(spec *corev1.ServiceSpec, f lb.Family) bool {
	if len(spec.IPFamilies) > 0 {
		return slices.Contains(spec.IPFamilies, corev1.IPFamily(f.String()))
	}
	given, _ := givenClusterIPs(spec)
	return len(given) == 0 || slices.ContainsFunc(given, func(s string) bool {
		addr, ok := parseAddr(s)
		return ok && lb.FamilyOf(addr) == f
	})
}

// dualStack reports whether a Service is to have both families. PreferDualStack with one family named is
// what an API server of one family makes of it, and asks for no more.
func dualStack(spec *corev1.ServiceSpec) bool {
	policy := deref(spec.IPFamilyPolicy, corev1.IPFamilyPolicySingleStack)
	return len(spec.IPFamilies) > 1 ||
		policy == corev1.IPFamilyPolicyRequireDualStack ||
		policy == corev1.IPFamilyPolicyPreferDualStack && len(spec.IPFamilies) == 0
}

// foreignIPs returns the addresses of a Service that somebody else serves.
func foreignIPs(svc *corev1.Service) map[netip.Addr]struct{} {
	clusterIPs, _ := givenClusterIPs(&svc.Spec)
	addrs := map[netip.Addr]struct{}{}
	for _, s := range slices.Concat(clusterIPs, virtualIPs(svc), svc.Spec.ExternalIPs) {
		if addr, ok := parseAddr(s); ok {
			addrs[addr] = struct{}{}
		}
	}
	return addrs
}
