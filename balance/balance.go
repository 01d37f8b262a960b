// SPDX-License-Identifier: Apache-2.0

// Package balance decides how new flows spread over the backends of a service. Every way of doing so is a
// lookup table: the kernel takes the entry at (hash % length) and has no algorithm of its own, so what
// distinguishes one way from another is only what is written into the table. That is why this is a package
// and not a line of reconcile, though the one way there is, the plain list, is short.
package balance

import "github.com/lbagent/lbagent/lb"

// Table returns the lookup table of a service for the scope Cluster, as indices into backends: each backend
// that new flows may choose, once, in the order of backends. Equal backends give an equal table, after a
// restart too, so a keyed hash finds the same backend again. A table without entries (nil) means that new
// flows are rejected.
func Table(backends []lb.Backend) []int {
	var table []int
	for i, b := range backends {
		if b.Cluster {
			table = append(table, i)
		}
	}
	return table
}
