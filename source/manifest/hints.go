// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// distribution turns the traffic distribution of Services into hints, as the EndpointSlice controller does in a
// cluster. It holds the slices as their files have them: those in force may have hints of its making.
type distribution struct {
	slices map[string]*discoveryv1.EndpointSlice // by name, "EndpointSlice default/web-1"
	hinted map[string]bool                       // those that are in force with hints made here
}

func newDistribution() distribution {
	return distribution{slices: map[string]*discoveryv1.EndpointSlice{}, hinted: map[string]bool{}}
}

// apply puts into changed, which is about to be in force, every slice whose hints it changes, with them. Those that
// change themselves or are of a Service that does are concerned; where a Node changes, all are looked at. get returns
// an object as it then is, nil where there is none.
func (d *distribution) apply(changed map[string]decoded, concerned map[string]bool, get func(name string) object) {
	nodes := false
	for name, c := range changed {
		switch o := c.object.(type) {
		case *discoveryv1.EndpointSlice:
			d.slices[name] = o
		case *corev1.Node:
			nodes = true
		case nil:
			nodes = nodes || isNode(name)
			delete(d.slices, name)
			delete(d.hinted, name)
		}
	}
	zone := func(nodeName string) string {
		n, _ := get(objectName(string(node), "", nodeName)).(*corev1.Node)
		if n == nil {
			return ""
		}
		return n.Labels[corev1.LabelTopologyZone]
	}
	names := maps.Keys(concerned)
	if nodes {
		names = maps.Keys(d.slices)
	}
	for name := range names {
		s := d.slices[name]
		if s == nil { // it goes
			continue
		}
		owner := objectName(string(service), s.Namespace, s.Labels[discoveryv1.LabelServiceName])
		wanted := ""
		if svc, _ := get(owner).(*corev1.Service); svc != nil && svc.Spec.TrafficDistribution != nil {
			wanted = *svc.Spec.TrafficDistribution
		}
		hints := wanted != "" && !slices.ContainsFunc(s.Endpoints, hasHints)
		if hints || d.hinted[name] {
			// Watchers may be reading the slice that is in force.
			it := s.DeepCopy()
			if hints {
				setHints(it, wanted, zone)
			}
			changed[name] = decoded{object: it, kind: endpointSlice, name: name, document: changed[name].document}
			d.hinted[name] = hints
		}
	}
}

// setHints gives each ready endpoint the hints that a traffic distribution means: to its own zone, and for
// PreferSameNode to its own node, before its zone. One whose zone or node is not known gets no such hint; then
// the proxy follows none of the kind.
func setHints(s *discoveryv1.EndpointSlice, trafficDistribution string, zone func(nodeName string) string) {
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if e.Conditions.Ready != nil && !*e.Conditions.Ready {
			continue
		}
		nodeName, hints := deref(e.NodeName), discoveryv1.EndpointHints{}
		if z := cmp.Or(deref(e.Zone), zone(nodeName)); z != "" {
			hints.ForZones = []discoveryv1.ForZone{{Name: z}}
		}
		if nodeName != "" && trafficDistribution == corev1.ServiceTrafficDistributionPreferSameNode {
			hints.ForNodes = []discoveryv1.ForNode{{Name: nodeName}}
		}
		if len(hints.ForZones)+len(hints.ForNodes) > 0 {
			e.Hints = &hints
		}
	}
}

func isNode(name string) bool { return strings.HasPrefix(name, string(node)+" ") }

func hasHints(e discoveryv1.Endpoint) bool {
	return e.Hints != nil && len(e.Hints.ForZones)+len(e.Hints.ForNodes) > 0
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}
