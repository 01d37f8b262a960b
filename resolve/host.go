// SPDX-License-Identifier: Apache-2.0

package resolve

import (
	"maps"
	"net/netip"
	"slices"
)

// Host is what is to be known of this node.
type Host struct {
	Name, Zone string
	// Addresses are all of its own, but for loopback and link-local ones. hostPorts are served at each.
	Addresses []netip.Addr
	// NodePorts are the addresses where NodePorts are served.
	NodePorts []netip.Addr
	// PodRoutes are where this node's pods are: they place endpoints and Pods without a nodeName, and
	// Addresses do so too. nil: what has no nodeName is elsewhere, as in a cluster.
	PodRoutes []netip.Prefix
}

// node is a Host in the form that questions are asked in.
type node struct {
	name, zone string
	addresses  []netip.Addr // sorted, none twice
	nodePorts  []netip.Addr // likewise

	// here covers the addresses that are on this node without any nodeName saying so: single ones by
	// themselves, for there are many and they come and go, and the rest.
	here   map[netip.Addr]struct{}
	ranges []netip.Prefix // masked, sorted, none twice
}

func nodeOf(h Host) node {
	n := node{
		name: h.Name, zone: h.Zone,
		addresses: sortedSet(h.Addresses, netip.Addr.Compare),
		nodePorts: sortedSet(h.NodePorts, netip.Addr.Compare),
		here:      map[netip.Addr]struct{}{},
	}
	if h.PodRoutes == nil {
		return n
	}
	for _, a := range n.addresses {
		n.here[a] = struct{}{}
	}
	for _, p := range h.PodRoutes {
		if p.IsSingleIP() {
			n.here[p.Addr()] = struct{}{}
		} else {
			n.ranges = append(n.ranges, p.Masked())
		}
	}
	n.ranges = sortedSet(n.ranges, netip.Prefix.Compare)
	return n
}

func sortedSet[T comparable](list []T, compare func(a, b T) int) []T {
	return slices.Compact(slices.SortedFunc(slices.Values(list), compare))
}

// has reports whether an address is on this node, for want of a nodeName that says.
func (n *node) has(a netip.Addr) bool {
	_, ok := n.here[a]
	return ok || slices.ContainsFunc(n.ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// reader answers questions about the node, and notes them: an object is resolved again when an answer that it
// was given may have changed, and never for anything else.
type reader struct {
	node  *node
	asked questions
}

// questions are what was asked of a reader.
type questions struct {
	place     bool // its name or its zone
	addresses bool
	nodePorts bool
	has       map[netip.Addr]struct{} // whether these addresses are on it
}

func (q *questions) none() bool {
	return !q.place && !q.addresses && !q.nodePorts && len(q.has) == 0
}

func (r *reader) name() string {
	r.asked.place = true
	return r.node.name
}

func (r *reader) zone() string {
	r.asked.place = true
	return r.node.zone
}

func (r *reader) addresses() []netip.Addr {
	r.asked.addresses = true
	return r.node.addresses
}

func (r *reader) nodePorts() []netip.Addr {
	r.asked.nodePorts = true
	return r.node.nodePorts
}

// isHere reports whether an address is on this node: its nodeName says, and the address where there is none.
func (r *reader) isHere(nodeName string, a netip.Addr) bool {
	if nodeName != "" {
		return nodeName == r.name()
	}
	if r.asked.has == nil {
		r.asked.has = map[netip.Addr]struct{}{}
	}
	r.asked.has[a] = struct{}{}
	return r.node.has(a)
}

// askers is who asked what: the objects to resolve again when an answer changes.
type askers struct {
	place, addresses, nodePorts map[ref]struct{}
	has                         map[netip.Addr]map[ref]struct{}
}

func newAskers() askers {
	return askers{
		place: map[ref]struct{}{}, addresses: map[ref]struct{}{}, nodePorts: map[ref]struct{}{},
		has: map[netip.Addr]map[ref]struct{}{},
	}
}

// replace puts the questions of an object in place of those that it asked before.
func (s *askers) replace(r ref, before, after questions) {
	put(s.place, r, struct{}{}, after.place)
	put(s.addresses, r, struct{}{}, after.addresses)
	put(s.nodePorts, r, struct{}{}, after.nodePorts)
	for a := range before.has {
		if _, still := after.has[a]; !still {
			delete(s.has[a], r)
			put(s.has, a, s.has[a], len(s.has[a]) > 0)
		}
	}
	for a := range after.has {
		if s.has[a] == nil {
			s.has[a] = map[ref]struct{}{}
		}
		s.has[a][r] = struct{}{}
	}
}

// concerned returns the objects that may have been given another answer by after than by before. A single
// address that comes or goes costs what asked about it; a range, the addresses asked about.
func (s *askers) concerned(before, after *node) map[ref]struct{} {
	all := map[ref]struct{}{}
	if before.name != after.name || before.zone != after.zone {
		maps.Copy(all, s.place)
	}
	if !slices.Equal(before.addresses, after.addresses) {
		maps.Copy(all, s.addresses)
	}
	if !slices.Equal(before.nodePorts, after.nodePorts) {
		maps.Copy(all, s.nodePorts)
	}
	if !slices.Equal(before.ranges, after.ranges) {
		for a, refs := range s.has {
			if before.has(a) != after.has(a) {
				maps.Copy(all, refs)
			}
		}
		return all
	}
	for _, pair := range [2][2]*node{{before, after}, {after, before}} {
		for a := range pair[0].here {
			if _, both := pair[1].here[a]; !both {
				maps.Copy(all, s.has[a])
			}
		}
	}
	return all
}
