// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// usability is how much an endpoint is good for, the better the greater.
type usability uint8

const (
	// useless: neither ready nor serving. It is no backend, as if it were not listed.
	useless usability = iota
	// keeping: serving, but neither ready nor terminating. No controller writes this; whoever does by hand
	// takes an endpoint out of use without breaking what it does. So it keeps its flows, and gets no new
	// one, not for want of a better endpoint either.
	keeping
	// draining: serving and terminating. It keeps its flows, and gets new ones only where no endpoint is
	// ready (KEP-1669).
	draining
	// ready, terminating or not: with publishNotReadyAddresses the two go together, and without serving.
	ready
)

// endpoint is one entry of an EndpointSlice at one of its ports.
type endpoint struct {
	addr netip.AddrPort
	use  usability
}

// backends returns the endpoints of a service. The order of the slices and of what is in them has no effect.
func backends(service lb.ServiceName, endpointSlices []*discoveryv1.EndpointSlice) []lb.Backend {
	var all []endpoint
	for _, s := range endpointSlices {
		if string(s.AddressType) == service.Family.String() {
			all = appendEndpoints(all, service, s)
		}
	}
	all = distinct(all)
	noneReady := !slices.ContainsFunc(all, func(e endpoint) bool { return e.use == ready })
	var list []lb.Backend
	for _, e := range all {
		if e.use == useless {
			continue
		}
		list = append(list, lb.Backend{
			Addr:    e.addr,
			Cluster: e.use == ready || noneReady && e.use == draining,
			Serving: true,
		})
	}
	return list
}

// appendEndpoints appends the endpoints of a slice at the ports that belong to a service. Addresses beyond an
// endpoint's first have no meaning (API doc of Endpoint.addresses). One that is not of the slice's family,
// or no IP address, is left out; who delivers the slice has validated it.
func appendEndpoints(all []endpoint, service lb.ServiceName, s *discoveryv1.EndpointSlice) []endpoint {
	for i := range s.Ports {
		number, ok := endpointPort(&s.Ports[i], service)
		if !ok {
			continue
		}
		for j := range s.Endpoints {
			e := &s.Endpoints[j]
			if len(e.Addresses) == 0 {
				continue
			}
			if addr, ok := parseAddr(e.Addresses[0]); ok && lb.FamilyOf(addr) == service.Family {
				all = append(all, endpoint{netip.AddrPortFrom(addr, number), usabilityOf(&e.Conditions)})
			}
		}
	}
	return all
}

// endpointPort returns the number of a slice's port if it belongs to the service: if it has its name and
// protocol. The number plays no part: it is the target port. A port without a number means nothing to a proxy.
func endpointPort(p *discoveryv1.EndpointPort, service lb.ServiceName) (uint16, bool) {
	if deref(p.Name, "") != service.Port || protocolOf(deref(p.Protocol, corev1.ProtocolTCP)) != service.Protocol {
		return 0, false
	}
	return portNumber(deref(p.Port, 0))
}

// usabilityOf weighs conditions. What is not said means ready, serving and not terminating (API doc of
// EndpointConditions), each by itself: of `ready: false` alone, serving is still true.
func usabilityOf(c *discoveryv1.EndpointConditions) usability {
	switch {
	case deref(c.Ready, true):
		return ready
	case !deref(c.Serving, true):
		return useless
	case deref(c.Terminating, false):
		return draining
	}
	return keeping
}

// distinct sorts endpoints by address. Of those of one address the most usable stays: a pod may stand in two
// slices while the controller moves it, with conditions of different age.
func distinct(all []endpoint) []endpoint {
	slices.SortFunc(all, func(a, b endpoint) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(b.use, a.use))
	})
	return slices.CompactFunc(all, func(a, b endpoint) bool { return a.addr == b.addr })
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
