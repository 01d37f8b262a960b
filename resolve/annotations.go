// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lbagent/lbagent/lb"
)

// The annotations that say what Kubernetes has no field for.
const (
	// algorithmAnnotation of a Service is how its new flows are spread: "plain" or "maglev".
	algorithmAnnotation = "lbagent.io/algorithm"
	// weightsAnnotation of an EndpointSlice is the weights of its endpoints, "ADDRESS=WEIGHT,...", 0 to 1000.
	// Those that it does not name have 1.
	weightsAnnotation = "lbagent.io/weights"
)

func annotationField(name string) string { return "metadata.annotations[" + name + "]" }

// algorithmOf returns the algorithm that the annotations of a Service ask for.
func algorithmOf(meta *metav1.ObjectMeta) (lb.Algorithm, []lb.Problem) {
	switch s, ok := meta.Annotations[algorithmAnnotation]; {
	case !ok, s == lb.Plain.String():
		return lb.Plain, nil
	case s == lb.Maglev.String():
		return lb.Maglev, nil
	default:
		return lb.Plain, []lb.Problem{warning(annotationField(algorithmAnnotation),
			"%q is neither %q nor %q; %[2]q is in force", s, lb.Plain, lb.Maglev)}
	}
}

// weighted is an EndpointSlice and the weights that its annotation says.
type weighted struct {
	*discoveryv1.EndpointSlice
	weights map[netip.Addr]uint16
}

func (s *weighted) weight(a netip.Addr) int {
	if w, ok := s.weights[a]; ok {
		return int(w)
	}
	return noWeight
}

// weightedSlices reads the weights of slices, and names what is wrong with them.
func weightedSlices(endpointSlices []*discoveryv1.EndpointSlice) (all []weighted, problems []lb.Problem) {
	for _, s := range endpointSlices {
		text, ok := s.Annotations[weightsAnnotation]
		if !ok {
			all = append(all, weighted{s, nil})
			continue
		}
		weights, wrong := parseWeights(text)
		known := map[netip.Addr]bool{}
		for i := range s.Endpoints {
			if a, ok := firstAddress(&s.Endpoints[i]); ok {
				known[a] = true
			}
		}
		for _, a := range weights.order {
			if !known[a] {
				wrong = append(wrong, fmt.Sprintf("%s is the address of no endpoint of this slice; its weight is for nothing", a))
			}
		}
		for _, message := range wrong {
			p := warning(annotationField(weightsAnnotation), "%s", message)
			p.Object = fmt.Sprintf("EndpointSlice %s/%s", s.Namespace, s.Name)
			problems = append(problems, p)
		}
		all = append(all, weighted{s, weights.of})
	}
	return all, problems
}

// weights are addresses in the order of the text, and the weight of each.
type weights struct {
	order []netip.Addr
	of    map[netip.Addr]uint16
}

// parseWeights reads the value of weightsAnnotation. An entry that is wrong is left out and said to be so.
func parseWeights(text string) (w weights, wrong []string) {
	w.of = map[netip.Addr]uint16{}
	for entry := range strings.SplitSeq(text, ",") {
		entry = strings.TrimSpace(entry)
		if entry == "" { // a comma at the end, as a list of many lines has
			continue
		}
		a, n, ok := strings.Cut(entry, "=")
		addr, isAddr := parseAddr(strings.TrimSpace(a))
		weight, err := strconv.ParseUint(strings.TrimSpace(n), 10, 16)
		switch _, twice := w.of[addr]; {
		case !ok || !isAddr:
			wrong = append(wrong, fmt.Sprintf("%q is not ADDRESS=WEIGHT; it is left out", entry))
		case err != nil || weight > lb.MaxWeight:
			wrong = append(wrong, fmt.Sprintf("%q: a weight is a number from 0 to %d; 1 is in force", entry, lb.MaxWeight))
		case twice:
			wrong = append(wrong, fmt.Sprintf("%q: %s has a weight already, %d, which is in force", entry, addr, w.of[addr]))
		default:
			w.order = append(w.order, addr)
			w.of[addr] = uint16(weight)
		}
	}
	return w, wrong
}
