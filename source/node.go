// SPDX-License-Identifier: Apache-2.0

package source

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// ZoneOf returns the zone that a node's object names, "" if it names none or there is no object.
func ZoneOf(n *corev1.Node) string {
	if n == nil {
		return ""
	}
	return n.Labels[corev1.LabelTopologyZone]
}

// AddressesOf returns the addresses that a node is known by, one of each family at most, IPv4 first: the first
// InternalIP of the family that its object has, else the first ExternalIP.
func AddressesOf(n *corev1.Node) []netip.Addr {
	if n == nil {
		return nil
	}
	var found []netip.Addr
	for _, is4 := range []bool{true, false} {
		if a, ok := addressOf(n, is4); ok {
			found = append(found, a)
		}
	}
	return found
}

func addressOf(n *corev1.Node, is4 bool) (netip.Addr, bool) {
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == kind && addr.Is4() == is4 {
				return addr, true
			}
		}
	}
	return netip.Addr{}, false
}

// toBeDeleted is the taint by which the cluster autoscaler says that it is about to remove a node.
const toBeDeleted = "ToBeDeletedByClusterAutoscaler"

// Eligible reports whether a node is to get traffic from outside: not one that is being deleted or is about to be.
// One without an object is.
func Eligible(n *corev1.Node) bool {
	return n == nil || n.DeletionTimestamp == nil &&
		!slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == toBeDeleted })
}
