// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lbagent/lbagent/lb"
)

// labelServiceProxyName names the proxy that a Service is for, in place of the cluster's own (KEP-2447).
// k8s.io/api has no constant for it.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// maxAffinitySeconds is how long the API lets a client keep its endpoint at most; k8s.io/api has no constant.
const maxAffinitySeconds = 86400

// resolveService says what one Service asks for, without regard to any other. Of what is not for us to serve
// nothing is in force and nothing is a problem: another proxy serves it, or DNS alone (headless, ExternalName).
func resolveService(name Name, svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice, options *Options, host *reader) object {
	switch {
	case svc == nil, svc.Spec.Type == corev1.ServiceTypeExternalName, headless(&svc.Spec):
		return object{}
	case !ours(&svc.ObjectMeta, options):
		return object{foreign: foreignIPs(svc)}
	}
	spec := &svc.Spec
	endpointSlices = ourSlices(endpointSlices, options)
	counted, problems := weightedSlices(endpointSlices)
	ranges, closed, wrong := sourceRanges(spec)
	problems = append(problems, wrong...)
	wishes, wrong := frontends(svc, closed, options, host)
	problems = append(problems, wrong...)
	whole, wrong := policies(svc)
	problems = append(problems, wrong...)
	problems = append(problems, notServed(svc, endpointSlices)...)

	o := object{check: healthCheck(name, spec, counted, whole.ExternalLocal, host)}
	o.services, o.claims, wrong = services(lb.ServiceName{Namespace: name.Namespace, Name: name.Name}, svc.CreationTimestamp.Time, wishes)
	o.problems = append(problems, wrong...)
	for service, s := range o.services {
		s.Algorithm, s.Affinity = whole.Algorithm, whole.Affinity
		s.InternalLocal, s.ExternalLocal = whole.InternalLocal, whole.ExternalLocal
		s.Backends = backends(service, counted, s.InternalLocal || s.ExternalLocal, host)
		if s.Has(lb.LoadBalancer) {
			s.SourceRanges = ranges[service.Family]
		}
		o.services[service] = s
	}
	return o
}

// services sorts the wishes of one object into services, each with its frontends, and claims their VIPs. object
// is the name of a service as far as it is the object's.
func services(object lb.ServiceName, created time.Time, wishes []wish) (map[lb.ServiceName]lb.Service, map[lb.VIP]claim, []lb.Problem) {
	all, claims, problems := map[lb.ServiceName]lb.Service{}, map[lb.VIP]claim{}, []lb.Problem(nil)
	slices.SortStableFunc(wishes, wish.compare)
	for _, w := range wishes {
		vip, service := w.frontend.VIP, object
		service.Port, service.Protocol, service.Family = w.port, vip.Protocol, lb.FamilyOf(vip.Addr)
		if c, ok := claims[vip]; ok { // one address given twice, or two ports that are one
			if c.service != service {
				problems = append(problems, warning(w.field, "port %q asks for %s, which is that of port %q",
					w.port, vip, c.service.Port))
			}
			continue
		}
		claims[vip] = claim{class: w.class, created: created, service: service, field: w.field}
		s := all[service]
		s.Name, s.Frontends = service, append(s.Frontends, w.frontend)
		all[service] = s
	}
	return all, claims, problems
}

// headless reports whether a Service has no cluster IP by its own will: DNS alone serves it.
func headless(spec *corev1.ServiceSpec) bool {
	return spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(spec.ClusterIPs, corev1.ClusterIPNone)
}

// ours reports whether a Service is for us, by its labels. The presence of the label headless decides, an empty
// value too. As for the name of the proxy: without one of our own, none must be there, not even an empty one;
// kube-proxy selects its objects alike.
func ours(meta *metav1.ObjectMeta, options *Options) bool {
	proxy, named := meta.Labels[labelServiceProxyName]
	_, headless := meta.Labels[corev1.IsHeadlessService]
	return !headless && named == (options.ProxyName != "") && proxy == options.ProxyName
}

// ourSlices returns the slices that count. One without the name of a proxy belongs to whoever has its Service,
// also where we have a name: the controller copies the label to the slices a moment later, and by hand it is
// soon forgotten.
func ourSlices(endpointSlices []*discoveryv1.EndpointSlice, options *Options) []*discoveryv1.EndpointSlice {
	return slices.DeleteFunc(slices.Clone(endpointSlices), func(s *discoveryv1.EndpointSlice) bool {
		proxy, named := s.Labels[labelServiceProxyName]
		_, headless := s.Labels[corev1.IsHeadlessService]
		return headless || named && (options.ProxyName == "" || proxy != options.ProxyName)
	})
}

// policies returns what a Service says of all its ports alike, as a service without a name.
func policies(svc *corev1.Service) (lb.Service, []lb.Problem) {
	spec := &svc.Spec
	algorithm, problems := algorithmOf(&svc.ObjectMeta)
	affinity, wrong := affinityOf(spec)
	return lb.Service{
		Algorithm:     algorithm,
		Affinity:      affinity,
		InternalLocal: deref(spec.InternalTrafficPolicy, "") == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal: externallyAccessible(spec) && spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,
	}, append(problems, wrong...)
}

// externallyAccessible reports whether a Service has frontends that an external policy is about.
func externallyAccessible(spec *corev1.ServiceSpec) bool {
	return hasNodePorts(spec) || len(spec.ExternalIPs) > 0
}

// affinityOf returns how long a client keeps its endpoint, 0 where it does not.
func affinityOf(spec *corev1.ServiceSpec) (time.Duration, []lb.Problem) {
	if spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0, nil
	}
	seconds := corev1.DefaultClientIPServiceAffinitySeconds
	var problems []lb.Problem
	if c := spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		if given := *c.ClientIP.TimeoutSeconds; 0 < given && given <= maxAffinitySeconds {
			seconds = given
		} else {
			problems = append(problems, warning("spec.sessionAffinityConfig.clientIP.timeoutSeconds",
				"%d is not from 1 to %d; %d is in force", given, maxAffinitySeconds, seconds))
		}
	}
	return time.Duration(seconds) * time.Second, problems
}

// sourceRanges returns the clients that may use the load balancer addresses of a Service, of each family. A
// family without a range is open, as with kube-proxy; but not for want of one that can be read: kube-proxy
// passes over what is no CIDR, and so opens what was meant to be closed. Here such an entry lets nobody in, and
// the families without any other are closed.
func sourceRanges(spec *corev1.ServiceSpec) (ranges map[lb.Family][]netip.Prefix, closed func(lb.Family) bool, problems []lb.Problem) {
	ranges = map[lb.Family][]netip.Prefix{}
	closed = func(f lb.Family) bool { return len(problems) > 0 && len(ranges[f]) == 0 }
	if spec.Type != corev1.ServiceTypeLoadBalancer {
		return ranges, closed, nil
	}
	for i, s := range spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil || p.Addr().Is4In6() {
			problems = append(problems, warning(fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i),
				"%q is not a CIDR; it lets nobody in, and load balancer addresses of a family without another range are not served", s))
			continue
		}
		f := lb.FamilyOf(p.Addr())
		ranges[f] = append(ranges[f], p.Masked())
	}
	for f, list := range ranges {
		ranges[f] = sortedSet(list, netip.Prefix.Compare)
	}
	return ranges, closed, problems
}

// healthCheck returns what a load balancer that asks for the local endpoints of a Service is told, nil where
// none is to ask. Ready ones alone count, and not those of weight 0: a load balancer is to turn away from a node
// where they drain, or where what it sends would be dropped.
func healthCheck(name Name, spec *corev1.ServiceSpec, endpointSlices []weighted, externalLocal bool, host *reader) *lb.HealthCheck {
	port, ok := portNumber(spec.HealthCheckNodePort)
	if !ok || spec.Type != corev1.ServiceTypeLoadBalancer || !externalLocal {
		return nil
	}
	local := map[netip.Addr]struct{}{}
	for i := range spec.Ports {
		service := lb.ServiceName{Port: spec.Ports[i].Name, Protocol: protocolOf(spec.Ports[i].Protocol)}
		for _, service.Family = range []lb.Family{lb.IPv4, lb.IPv6} {
			if !hasFamily(spec, service.Family) {
				continue
			}
			for _, e := range chosen(service, endpointSlices, true, host) {
				if e.use == ready && e.local == "" && e.share() > 0 {
					local[e.addr.Addr()] = struct{}{}
				}
			}
		}
	}
	return &lb.HealthCheck{Namespace: name.Namespace, Name: name.Name, Port: port, LocalEndpoints: len(local)}
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
