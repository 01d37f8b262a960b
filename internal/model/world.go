// SPDX-License-Identifier: Apache-2.0

// Package model is a second opinion of what a Service means: a slow and plain function from Kubernetes objects
// and a packet to what the data plane must do, written from the rules alone and knowing nothing of how
// lbagent goes about it. It has no table, no id and no map. The model rung (TestModel of package reconcile) holds
// the real stages and the real programs against it. For tests.
package model

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Host is the node on which packets are judged.
type Host struct {
	Name, Zone string
	Addresses  []netip.Addr   // its own
	NodePorts  []netip.Addr   // those of its own at which NodePorts are served; hostPorts are at each
	PodRoutes  []netip.Prefix // where its pods are; nil: only a nodeName says so
}

// World is all that decides about a packet, but for what was there before it: see State.
type World struct {
	Host             Host
	Prefixes         []netip.Prefix // where ClusterIPs are
	ExternalIPsAllow []netip.Prefix // nil: everywhere
	ProxyName        string
	Services         []*corev1.Service
	Slices           []*discoveryv1.EndpointSlice
	Pods             []*corev1.Pod
}

// Edit puts one thing in the place of what was there under its name, or removes it: exactly one field is set.
type Edit struct {
	Host     *Host
	Prefixes *[]netip.Prefix
	Service  *corev1.Service
	Slice    *discoveryv1.EndpointSlice
	Pod      *corev1.Pod
	// Gone says that the object of this name goes; its other fields mean nothing.
	Gone bool
}

// Apply returns the world after an edit. The one before stays as it is; the two share objects.
func (w World) Apply(e Edit) World {
	switch {
	case e.Host != nil:
		w.Host = *e.Host
	case e.Prefixes != nil:
		w.Prefixes = *e.Prefixes
	case e.Service != nil:
		w.Services = replace(w.Services, e.Service, e.Gone)
	case e.Slice != nil:
		w.Slices = replace(w.Slices, e.Slice, e.Gone)
	case e.Pod != nil:
		w.Pods = replace(w.Pods, e.Pod, e.Gone)
	}
	return w
}

func replace[T metav1.Object](all []T, object T, gone bool) []T {
	all = slices.DeleteFunc(slices.Clone(all), func(o T) bool {
		return o.GetNamespace() == object.GetNamespace() && o.GetName() == object.GetName()
	})
	if gone {
		return all
	}
	return append(all, object)
}

// String is the world as manifests, with the host as comments before them.
func (w World) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "# host %s\n# service prefixes %v, external IPs allowed %v, proxy name %q\n", w.Host, w.Prefixes, w.ExternalIPsAllow, w.ProxyName)
	for _, o := range w.Services {
		s.WriteString(manifest(o, "v1", "Service"))
	}
	for _, o := range w.Slices {
		s.WriteString(manifest(o, "discovery.k8s.io/v1", "EndpointSlice"))
	}
	for _, o := range w.Pods {
		s.WriteString(manifest(o, "v1", "Pod"))
	}
	return s.String()
}

// String is the host in one line.
func (h Host) String() string {
	routes := "no pod routes"
	if h.PodRoutes != nil {
		routes = fmt.Sprintf("pods at %v", h.PodRoutes)
	}
	return fmt.Sprintf("%s in zone %q, addresses %v, node ports at %v, %s", h.Name, h.Zone, h.Addresses, h.NodePorts, routes)
}

// String is the edit as a person would describe it.
func (e Edit) String() string {
	object := func(kind, version string, o metav1.Object) string {
		if e.Gone {
			return fmt.Sprintf("%s %s/%s goes\n", kind, o.GetNamespace(), o.GetName())
		}
		return manifest(o, version, kind)
	}
	switch {
	case e.Host != nil:
		return fmt.Sprintf("host %s\n", *e.Host)
	case e.Prefixes != nil:
		return fmt.Sprintf("service prefixes %v\n", *e.Prefixes)
	case e.Service != nil:
		return object("Service", "v1", e.Service)
	case e.Slice != nil:
		return object("EndpointSlice", "discovery.k8s.io/v1", e.Slice)
	case e.Pod != nil:
		return object("Pod", "v1", e.Pod)
	}
	return "nothing\n"
}

func manifest(o any, version, kind string) string {
	b, err := yaml.Marshal(o)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("---\napiVersion: %s\nkind: %s\n%s", version, kind, b)
}
