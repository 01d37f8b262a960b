// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

const noPorts = "allocation of ports is not yet there: give one"

// notServed names each field of a Service that asks for something which this version does not do. The
// defaults that an API server fills in ask for nothing. A feature that arrives takes its lines from here.
func notServed(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) (problems []lb.Problem) {
	spec := &svc.Spec
	for i, p := range spec.Ports {
		switch {
		case !served(protocolOf(p.Protocol)):
			problems = append(problems, notYet(fmt.Sprintf("spec.ports[%d].protocol", i), "%s is not yet served", p.Protocol))
		case hasNodePorts(spec) && p.NodePort == 0 && deref(spec.AllocateLoadBalancerNodePorts, true):
			problems = append(problems, notYet(fmt.Sprintf("spec.ports[%d].nodePort", i), noPorts))
		}
	}
	if spec.Type == corev1.ServiceTypeLoadBalancer {
		if len(svc.Status.LoadBalancer.Ingress) == 0 {
			problems = append(problems, notYet("status.loadBalancer", "allocation of addresses is not yet there: give an ingress"))
		}
		if spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && spec.HealthCheckNodePort == 0 {
			problems = append(problems, notYet("spec.healthCheckNodePort", noPorts))
		}
	}
	if len(spec.Selector) > 0 && len(endpointSlices) == 0 {
		problems = append(problems, notYet("spec.selector",
			"no EndpointSlice belongs to it; selectors are not yet evaluated"))
	}
	return problems
}
