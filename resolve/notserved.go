// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// notServed names each field of a Service that asks for something which this version does not do. The
// defaults that an API server fills in ask for nothing. A feature that arrives takes its lines from here.
func notServed(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) (problems []lb.Problem) {
	for i, p := range svc.Spec.Ports {
		if !served(protocolOf(p.Protocol)) {
			problems = append(problems, notYet(fmt.Sprintf("spec.ports[%d].protocol", i), "%s is not yet served", p.Protocol))
		}
	}
	if len(svc.Spec.Selector) > 0 && len(endpointSlices) == 0 {
		problems = append(problems, notYet("spec.selector",
			"no EndpointSlice belongs to it; selectors are not yet evaluated"))
	}
	return problems
}
