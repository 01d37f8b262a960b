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

// Why an endpoint is not chosen in a scope.
const (
	notReady            = "not ready"
	notReadyNotServing  = "not ready and not serving"
	terminating         = "terminating, and ready ones exist"
	terminatingNotReady = "terminating, not serving"
	hintedToNode        = "hinted to another node"
	hintedToZone        = "hinted to another zone"
	elsewhere           = "on another node"
	nowhere             = "not known to be on this node"
	weightless          = "weight 0"
)

// endpoint is one entry of an EndpointSlice at one of its ports, and what becomes of it.
type endpoint struct {
	addr        netip.AddrPort
	use         usability
	terminating bool
	node, zone  string
	nodes       []discoveryv1.ForNode // that it is hinted to
	zones       []discoveryv1.ForZone // likewise
	weight      int                   // noWeight where nothing says it

	cluster, local string // why new flows of the scope do not choose it; "": they do
}

// noWeight is less than any weight that is said.
const noWeight = -1

func (e *endpoint) share() uint16 {
	if e.weight == noWeight {
		return 1
	}
	return uint16(e.weight)
}

// backends returns the endpoints of a service that are of use. The order of the slices and of what is in them
// has no effect. Without local, for a service without a policy Local, none is Local, and it does not matter
// which node they are on.
func backends(service lb.ServiceName, endpointSlices []weighted, local bool, host *reader) []lb.Backend {
	var list []lb.Backend
	for _, e := range chosen(service, endpointSlices, local, host) {
		if e.use == useless {
			continue
		}
		list = append(list, lb.Backend{
			Addr:    e.addr,
			Cluster: e.cluster == "",
			Local:   local && e.local == "",
			Weight:  e.share(),
		})
	}
	return list
}

// viewEndpoints returns all endpoints of a service, for people.
func viewEndpoints(service lb.ServiceName, endpointSlices []*discoveryv1.EndpointSlice, options *Options, n *node) []lb.Endpoint {
	counted, _ := weightedSlices(ourSlices(endpointSlices, options))
	var list []lb.Endpoint
	for _, e := range chosen(service, counted, true, &reader{node: n}) {
		v := lb.Endpoint{
			Addr: e.addr, Node: e.node, Zone: e.zone, Weight: e.share(),
			Cluster: e.cluster, Local: e.local,
		}
		if v.Node == "" && n.has(e.addr.Addr()) {
			v.Node = n.name
		}
		if v.Weight == 0 {
			v.Cluster = cmp.Or(v.Cluster, weightless)
			v.Local = cmp.Or(v.Local, weightless)
		}
		list = append(list, v)
	}
	return list
}

// chosen returns the endpoints of a service, sorted by address, with what becomes of them in the scope
// Cluster, and if asked for in the scope Local: the scopes choose independently of each other.
func chosen(service lb.ServiceName, endpointSlices []weighted, local bool, host *reader) []endpoint {
	var all []endpoint
	for i := range endpointSlices {
		all = appendEndpoints(all, service, &endpointSlices[i])
	}
	all = distinct(all)
	chooseCluster(all, host)
	if local {
		chooseLocal(all, host)
	}
	return all
}

// chooseCluster chooses among all endpoints: the ready ones, of these those that hints bring to this node,
// and where none is ready those that drain.
func chooseCluster(all []endpoint, host *reader) {
	noneReady := !slices.ContainsFunc(all, func(e endpoint) bool { return e.use == ready })
	hinted := hints(all, host)
	for i := range all {
		e := &all[i]
		e.cluster = cmp.Or(unusable(e, noneReady), hinted(e))
	}
}

// chooseLocal chooses among the endpoints on this node: the ready ones, and where none of them is those that
// drain. Hints have no say.
func chooseLocal(all []endpoint, host *reader) {
	noneReady := true
	for i := range all {
		e := &all[i]
		switch {
		case host.isHere(e.node, e.addr.Addr()):
			e.local = ""
			noneReady = noneReady && e.use != ready
		case e.node != "":
			e.local = elsewhere
		default:
			e.local = nowhere
		}
	}
	for i := range all {
		if e := &all[i]; e.local == "" {
			e.local = unusable(e, noneReady)
		}
	}
}

// unusable says why an endpoint is not usable in a scope, "" where it is.
func unusable(e *endpoint, noneReady bool) string {
	switch {
	case e.use == ready, e.use == draining && noneReady:
		return ""
	case e.use == draining:
		return terminating
	case e.use == keeping:
		return notReady
	case e.terminating:
		return terminatingNotReady
	}
	return notReadyNotServing
}

// hints says what the hints of the ready endpoints mean for one of them here: why it is not chosen, "" where
// it is. They mean something only where all have them and some bring to this node, by more than endpoints of
// weight 0; a hint to the node goes before one to its zone. Where none is ready they mean nothing.
func hints(all []endpoint, host *reader) func(*endpoint) string {
	forNode := func(e *endpoint) bool {
		return slices.ContainsFunc(e.nodes, func(h discoveryv1.ForNode) bool { return h.Name == host.name() })
	}
	forZone := func(e *endpoint) bool {
		return slices.ContainsFunc(e.zones, func(h discoveryv1.ForZone) bool { return h.Name == host.zone() })
	}
	nodes, zones, toNode, toZone := true, true, false, false
	for i := range all {
		if e := &all[i]; e.use == ready {
			nodes, zones = nodes && len(e.nodes) > 0, zones && len(e.zones) > 0
			takes := e.share() > 0 // one that takes nobody brings nobody
			toNode, toZone = toNode || takes && forNode(e), toZone || takes && forZone(e)
		}
	}
	switch {
	case nodes && toNode && host.name() != "":
		return func(e *endpoint) string { return unless(forNode(e), hintedToNode) }
	case zones && toZone && host.zone() != "":
		return func(e *endpoint) string { return unless(forZone(e), hintedToZone) }
	}
	return func(*endpoint) string { return "" }
}

func unless(ok bool, reason string) string {
	if ok {
		return ""
	}
	return reason
}

// appendEndpoints appends the endpoints of a slice at the ports that belong to a service. Addresses beyond an
// endpoint's first have no meaning (API doc of Endpoint.addresses). One that is not of the slice's family,
// or no IP address, is left out; who delivers the slice has validated it.
func appendEndpoints(all []endpoint, service lb.ServiceName, s *weighted) []endpoint {
	if string(s.AddressType) != service.Family.String() {
		return all
	}
	for i := range s.Ports {
		number, ok := endpointPort(&s.Ports[i], service)
		if !ok {
			continue
		}
		for j := range s.Endpoints {
			e := &s.Endpoints[j]
			addr, ok := firstAddress(e)
			if !ok || lb.FamilyOf(addr) != service.Family {
				continue
			}
			it := endpoint{
				addr: netip.AddrPortFrom(addr, number),
				use:  usabilityOf(&e.Conditions), terminating: deref(e.Conditions.Terminating, false),
				node: deref(e.NodeName, ""), zone: deref(e.Zone, ""),
				weight: s.weight(addr),
			}
			if e.Hints != nil {
				it.nodes, it.zones = e.Hints.ForNodes, e.Hints.ForZones
			}
			all = append(all, it)
		}
	}
	return all
}

func firstAddress(e *discoveryv1.Endpoint) (netip.Addr, bool) {
	if len(e.Addresses) == 0 {
		return netip.Addr{}, false
	}
	return parseAddr(e.Addresses[0])
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
// slices while the controller moves it, with conditions of different age. A weight that is said beats none.
func distinct(all []endpoint) []endpoint {
	slices.SortFunc(all, func(a, b endpoint) int {
		return cmp.Or(
			a.addr.Compare(b.addr), cmp.Compare(b.use, a.use), cmp.Compare(b.weight, a.weight),
			// The rest is for an order that is always the same.
			lb.CompareBool(a.terminating, b.terminating), cmp.Compare(a.node, b.node), cmp.Compare(a.zone, b.zone),
			slices.CompareFunc(a.nodes, b.nodes, func(a, b discoveryv1.ForNode) int { return cmp.Compare(a.Name, b.Name) }),
			slices.CompareFunc(a.zones, b.zones, func(a, b discoveryv1.ForZone) int { return cmp.Compare(a.Name, b.Name) }))
	})
	return slices.CompactFunc(all, func(a, b endpoint) bool { return a.addr == b.addr })
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
