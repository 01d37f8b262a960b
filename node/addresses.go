// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// OwnAddresses returns the addresses that are this host's, sorted, each once. Not among them: loopback and
// link-local ones, which mean something else on every host, and those that IPv6 has not yet found unique.
func (s Snapshot) OwnAddresses() []netip.Addr {
	var own []netip.Addr
	for _, a := range s.Addresses {
		if a.own() {
			own = append(own, a.Prefix.Addr())
		}
	}
	slices.SortFunc(own, netip.Addr.Compare)
	return slices.Compact(own)
}

func (a Address) own() bool {
	addr := a.Prefix.Addr()
	return !a.Tentative && !addr.IsLoopback() && !addr.IsLinkLocalUnicast()
}

// PodRoutes returns where the pods of this host are: the destinations, sorted, that are routed to a device of
// a pod or to a bridge that pods hang on. A default route says nothing of where a pod is. It is never nil.
func PodRoutes(s Snapshot, cfg Config) []netip.Prefix {
	c := classify(s, cfg)
	routes := []netip.Prefix{}
	for _, r := range s.Routes {
		to := r.Destination
		if (c.pod[r.Device] || c.podPorts[r.Device]) && to.Bits() > 0 && !to.Addr().IsLinkLocalUnicast() && !to.Addr().IsMulticast() {
			routes = append(routes, to)
		}
	}
	slices.SortFunc(routes, netip.Prefix.Compare)
	return slices.Compact(routes)
}

// NodePorts says at which of the host's addresses NodePorts are served; it is the value of
// --nodeport-addresses.
type NodePorts struct {
	Primary bool // one address of each family: that of the node
	// Localhost is for the loopback addresses, which are no packet's and so no business of [NodePortAddresses].
	Localhost bool
	All       bool
	Prefixes  []netip.Prefix
}

// ParseNodePorts reads a list of primary, localhost, all and CIDRs.
func ParseNodePorts(list []string) (NodePorts, error) {
	var n NodePorts
	for _, word := range list {
		switch word = strings.TrimSpace(word); word {
		case "primary":
			n.Primary = true
		case "localhost":
			n.Localhost = true
		case "all":
			n.All = true
		default:
			p, err := netip.ParsePrefix(word)
			if err != nil || p.Addr().Is4In6() {
				return NodePorts{}, fmt.Errorf("%q is none of primary, localhost, all and a CIDR such as 192.0.2.0/24", word)
			}
			n.Prefixes = append(n.Prefixes, p.Masked())
		}
	}
	return n, nil
}

// NodePortAddresses returns those of the host's own addresses at which NodePorts are served, sorted. nodeAddresses
// are those that the Node object has as the node's, one of a family at most; where it has none, those of the
// devices with a default route are meant. An address that this host does not have is another's to answer.
//
// CIDRs of one family only leave the other family open, as with kube-proxy: all of its addresses count.
// Beside `primary`, which names addresses of both, they do not.
func NodePortAddresses(s Snapshot, cfg NodePorts, nodeAddresses []netip.Addr) []netip.Addr {
	var primary []netip.Addr
	if cfg.Primary {
		if primary = nodeAddresses; len(primary) == 0 {
			primary = defaultAddresses(s)
		}
	}
	open := func(netip.Addr) bool { return false }
	if len(cfg.Prefixes) > 0 && !cfg.Primary {
		open = func(a netip.Addr) bool {
			return !slices.ContainsFunc(cfg.Prefixes, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() })
		}
	}
	return slices.DeleteFunc(s.OwnAddresses(), func(a netip.Addr) bool {
		in := slices.ContainsFunc(cfg.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
		return !cfg.All && !in && !slices.Contains(primary, a) && !open(a)
	})
}

// defaultAddresses returns for each family the address of the device with the default route: of the main table
// if that has one, with the lowest metric, and of a device with such an address.
func defaultAddresses(s Snapshot) []netip.Addr {
	var routes []Route
	for _, r := range s.Routes {
		if r.Destination.Bits() == 0 {
			routes = append(routes, r)
		}
	}
	elsewhere := func(r Route) int {
		if r.Table == unix.RT_TABLE_MAIN {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(routes, func(a, b Route) int {
		return cmp.Or(elsewhere(a)-elsewhere(b), cmp.Compare(a.Metric, b.Metric))
	})
	var found [2]netip.Addr // IPv4, IPv6
	for _, r := range routes {
		is4 := r.Destination.Addr().Is4()
		i := 1
		if is4 {
			i = 0
		}
		if !found[i].IsValid() {
			found[i] = s.addressOf(r.Device, is4)
		}
	}
	return slices.DeleteFunc(found[:], func(a netip.Addr) bool { return !a.IsValid() })
}

// addressOf returns the address that a device would be known by in a family: the first that is neither secondary
// nor deprecated, or else any of its own.
func (s Snapshot) addressOf(device int, is4 bool) (best netip.Addr) {
	for _, a := range s.Addresses {
		addr := a.Prefix.Addr()
		if a.Device != device || addr.Is4() != is4 || !a.own() {
			continue
		}
		if !a.Secondary && !a.Deprecated {
			return addr
		}
		if !best.IsValid() {
			best = addr
		}
	}
	return best
}
