// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// notServed names each field of a Service that asks for something which this version does not do. The
// defaults that an API server fills in ask for nothing. A feature that arrives takes its lines from here.
func notServed(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) []lb.Problem {
	return slices.Concat(
		typeNotServed(svc),
		portsNotServed(svc.Spec.Ports),
		policyNotServed(&svc.Spec),
		endpointsNotServed(&svc.Spec, endpointSlices),
	)
}

func typeNotServed(svc *corev1.Service) (problems []lb.Problem) {
	spec := &svc.Spec
	if spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer {
		problems = append(problems, notYet("spec.type", "%s is not yet served, its cluster IP is", spec.Type))
	}
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		for i, in := range svc.Status.LoadBalancer.Ingress {
			// With ipMode Proxy, or a hostname only, there is nothing to do here (KEP-1860).
			if in.IP != "" && deref(in.IPMode, corev1.LoadBalancerIPModeVIP) == corev1.LoadBalancerIPModeVIP {
				problems = append(problems, notYet(fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i),
					"load balancer addresses are not yet served"))
			}
		}
	}
	if len(spec.LoadBalancerSourceRanges) > 0 {
		problems = append(problems, notYet("spec.loadBalancerSourceRanges", "source ranges are not yet enforced"))
	}
	if spec.HealthCheckNodePort != 0 {
		problems = append(problems, notYet("spec.healthCheckNodePort", "health checks are not yet answered"))
	}
	if len(spec.ExternalIPs) > 0 {
		problems = append(problems, notYet("spec.externalIPs", "external addresses are not yet served"))
	}
	return problems
}

func portsNotServed(ports []corev1.ServicePort) (problems []lb.Problem) {
	for i, p := range ports {
		if !served(protocolOf(p.Protocol)) {
			problems = append(problems, notYet(fmt.Sprintf("spec.ports[%d].protocol", i), "%s is not yet served", p.Protocol))
		}
		if p.NodePort != 0 {
			problems = append(problems, notYet(fmt.Sprintf("spec.ports[%d].nodePort", i), "node ports are not yet served"))
		}
	}
	return problems
}

func policyNotServed(spec *corev1.ServiceSpec) (problems []lb.Problem) {
	if spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		problems = append(problems, notYet("spec.sessionAffinity", "ClientIP is not yet observed: as None"))
	}
	if deref(spec.InternalTrafficPolicy, "") == corev1.ServiceInternalTrafficPolicyLocal {
		problems = append(problems, notYet("spec.internalTrafficPolicy", "Local is not yet observed: as Cluster"))
	}
	if spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		problems = append(problems, notYet("spec.externalTrafficPolicy", "Local is not yet observed"))
	}
	if d := deref(spec.TrafficDistribution, ""); d != "" {
		problems = append(problems, notYet("spec.trafficDistribution", "%s is not yet observed: traffic goes to all endpoints", d))
	}
	return problems
}

func endpointsNotServed(spec *corev1.ServiceSpec, endpointSlices []*discoveryv1.EndpointSlice) (problems []lb.Problem) {
	if len(spec.Selector) > 0 && len(endpointSlices) == 0 {
		problems = append(problems, notYet("spec.selector",
			"no EndpointSlice belongs to it; selectors are not yet evaluated"))
	}
	hinted := slices.DeleteFunc(slices.Clone(endpointSlices), func(s *discoveryv1.EndpointSlice) bool {
		return !slices.ContainsFunc(s.Endpoints, hasHints)
	})
	if len(hinted) > 0 { // one problem for them all: a large Service has many slices
		first := slices.MinFunc(hinted, func(a, b *discoveryv1.EndpointSlice) int { return strings.Compare(a.Name, b.Name) })
		problems = append(problems, notYet("", "EndpointSlice %s: endpoints[%d].hints: hints are not yet followed: traffic goes to all endpoints",
			first.Name, slices.IndexFunc(first.Endpoints, hasHints)))
	}
	return problems
}

func hasHints(e discoveryv1.Endpoint) bool {
	return e.Hints != nil && len(e.Hints.ForZones)+len(e.Hints.ForNodes) > 0
}
