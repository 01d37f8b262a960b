// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Smaller returns ways to make a world and its steps simpler: an object less, or a field that says nothing. Whoever
// looks for the cause of a disagreement keeps those after which it is still there.
func Smaller(w World, steps []Step) (ways []func(World, []Step) (World, []Step)) {
	add := func(way func(w *World)) {
		ways = append(ways, func(w World, steps []Step) (World, []Step) {
			w.Services, w.Slices, w.Pods = slices.Clone(w.Services), slices.Clone(w.Slices), slices.Clone(w.Pods)
			way(&w)
			return w, steps
		})
	}
	for i := len(w.Services) - 1; i >= 0; i-- {
		add(func(w *World) { w.Services = without(w.Services, i) })
	}
	for i := len(w.Slices) - 1; i >= 0; i-- {
		add(func(w *World) { w.Slices = without(w.Slices, i) })
	}
	for i := len(w.Pods) - 1; i >= 0; i-- {
		add(func(w *World) { w.Pods = without(w.Pods, i) })
	}
	add(func(w *World) { w.ExternalIPsAllow = nil })
	add(func(w *World) { w.Prefixes = nil })
	add(func(w *World) { w.Host.PodRoutes = nil })
	add(func(w *World) { w.Host.Zone = "" })
	for i := len(ownAddresses) - 1; i >= 0; i-- {
		add(func(w *World) {
			if i < len(w.Host.Addresses) {
				gone := w.Host.Addresses[i]
				w.Host.Addresses = without(w.Host.Addresses, i)
				w.Host.NodePorts = slices.DeleteFunc(slices.Clone(w.Host.NodePorts), func(a netip.Addr) bool { return a == gone })
			}
		})
		add(func(w *World) { w.Host.NodePorts = without(w.Host.NodePorts, i) })
	}

	// The objects, in the world and in the edits.
	service := func(name string, way func(*corev1.Service)) {
		ways = append(ways, func(w World, steps []Step) (World, []Step) {
			w.Services = changed(w.Services, name, way)
			return w, changedEdits(steps, name, way, func(e *Edit) **corev1.Service { return &e.Service })
		})
	}
	slice := func(name string, way func(*discoveryv1.EndpointSlice)) {
		ways = append(ways, func(w World, steps []Step) (World, []Step) {
			w.Slices = changed(w.Slices, name, way)
			return w, changedEdits(steps, name, way, func(e *Edit) **discoveryv1.EndpointSlice { return &e.Slice })
		})
	}
	names := map[string]bool{}
	for _, s := range w.Services {
		names[s.Name] = true
	}
	for _, s := range steps {
		if s.Edit != nil && s.Edit.Service != nil {
			names[s.Edit.Service.Name] = true
		}
	}
	for name := range names {
		for i := range 2 {
			service(name, func(s *corev1.Service) {
				if len(s.Spec.Ports) > 1 {
					s.Spec.Ports = without(s.Spec.Ports, i)
				}
			})
			service(name, func(s *corev1.Service) {
				if i < len(s.Spec.Ports) {
					s.Spec.Ports[i].NodePort = 0
				}
			})
		}
		for i := range len(publicPool) {
			service(name, func(s *corev1.Service) { s.Spec.ExternalIPs = without(s.Spec.ExternalIPs, i) })
			service(name, func(s *corev1.Service) {
				s.Status.LoadBalancer.Ingress = without(s.Status.LoadBalancer.Ingress, i)
			})
		}
		for i := range len(sourceRanges) {
			service(name, func(s *corev1.Service) {
				s.Spec.LoadBalancerSourceRanges = without(s.Spec.LoadBalancerSourceRanges, i)
			})
		}
		for _, way := range []func(*corev1.Service){
			func(s *corev1.Service) { s.Labels = nil },
			func(s *corev1.Service) { s.Annotations = nil },
			func(s *corev1.Service) { s.CreationTimestamp.Reset() },
			func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "" },
			func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = nil },
			func(s *corev1.Service) { s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = "", nil },
			func(s *corev1.Service) { s.Spec.Type = "ClusterIP" },
			func(s *corev1.Service) {
				if len(s.Spec.ClusterIPs) > 1 {
					s.Spec.ClusterIPs, s.Spec.IPFamilies = s.Spec.ClusterIPs[:1], s.Spec.IPFamilies[:1]
				}
			},
		} {
			service(name, way)
		}
	}
	sliceNames := map[string]bool{}
	for _, s := range w.Slices {
		sliceNames[s.Name] = true
	}
	for name := range sliceNames {
		for i := 15; i >= 0; i-- {
			slice(name, func(s *discoveryv1.EndpointSlice) { s.Endpoints = without(s.Endpoints, i) })
			slice(name, func(s *discoveryv1.EndpointSlice) {
				if i < len(s.Endpoints) {
					s.Endpoints[i].Conditions = discoveryv1.EndpointConditions{}
				}
			})
			slice(name, func(s *discoveryv1.EndpointSlice) {
				if i < len(s.Endpoints) {
					s.Endpoints[i].Hints = nil
				}
			})
		}
		for i := range 2 {
			slice(name, func(s *discoveryv1.EndpointSlice) { s.Ports = without(s.Ports, i) })
		}
		slice(name, func(s *discoveryv1.EndpointSlice) { s.Annotations = nil })
	}
	return ways
}

// named is what objects are to these two.
type named[T any] interface {
	comparable
	GetName() string
	DeepCopy() T
}

// changed returns a copy of objects in which those of a name are others.
func changed[T named[T]](all []T, name string, way func(T)) []T {
	all = slices.Clone(all)
	for i, o := range all {
		if o.GetName() == name {
			all[i] = o.DeepCopy()
			way(all[i])
		}
	}
	return all
}

// changedEdits is changed for the objects that edits put in; `of` is where an edit has one of the kind, if it has.
func changedEdits[T named[T]](steps []Step, name string, way func(T), of func(*Edit) *T) []Step {
	var none T
	steps = slices.Clone(steps)
	for i, s := range steps {
		if s.Edit == nil {
			continue
		}
		if o := *of(s.Edit); o != none && o.GetName() == name {
			e := *s.Edit
			to := of(&e)
			*to = o.DeepCopy()
			way(*to)
			steps[i].Edit = &e
		}
	}
	return steps
}

// without returns a copy without the element at i, if there is one.
func without[T any](all []T, i int) []T {
	if i >= len(all) {
		return all
	}
	return slices.Delete(slices.Clone(all), i, i+1)
}
