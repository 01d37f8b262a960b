// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/lbagent/lbagent/lb"
)

// PortRange is where the node ports of Services may be, First and Last among them; it is the value of
// --nodeport-range.
type PortRange struct{ First, Last uint16 }

// DefaultNodePorts is the range that an API server has where it is not told another.
var DefaultNodePorts = PortRange{30000, 32767}

// ParsePortRange reads a range such as "30000-32767".
func ParsePortRange(text string) (PortRange, error) {
	first, last, ok := strings.Cut(text, "-")
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if !ok || errA != nil || errB != nil || a == 0 || a > b {
		return PortRange{}, fmt.Errorf("%q is no range of ports such as %s", text, DefaultNodePorts)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// check names the node ports of the objects of a file that are outside, as an API server does of a Service that
// gives them.
func (r PortRange) check(path string, objects []decoded) (problems []lb.Problem) {
	for _, d := range objects {
		svc, ok := d.object.(*corev1.Service)
		if !ok {
			continue
		}
		outside := func(field string, port int32) {
			if port != 0 && (port < int32(r.First) || port > int32(r.Last)) {
				problems = append(problems, lb.Problem{
					File: path, Document: d.document, Object: d.name, Field: field,
					Message: fmt.Sprintf("Invalid value: %d: provided port is not in the valid range: %s", port, r),
				})
			}
		}
		for i, p := range svc.Spec.Ports {
			outside(fmt.Sprintf("spec.ports[%d].nodePort", i), p.NodePort)
		}
		outside("spec.healthCheckNodePort", svc.Spec.HealthCheckNodePort)
	}
	return problems
}
