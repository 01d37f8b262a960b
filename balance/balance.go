// SPDX-License-Identifier: Apache-2.0

// Package balance decides how new flows spread over the backends of a service. Every way of doing so is a
// lookup table: the kernel takes the entry at (hash % length) and has no algorithm of its own, so what
// distinguishes one way from another is only what is written into the table. The hash is keyed and takes in
// all of a flow's tuple (or, with session affinity, the client), so which entries a backend has matters to
// nobody, only how many: entries of one backend need not be spread among those of others.
package balance

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
	"slices"

	"github.com/lbagent/lbagent/lb"
)

// Scope is which backends new flows may choose.
type Scope uint8

// The scopes.
const (
	Cluster Scope = iota
	Local
)

// Has tells whether a backend is usable in the scope.
func (s Scope) Has(b lb.Backend) bool {
	if s == Local {
		return b.Local
	}
	return b.Cluster
}

// Table returns the lookup table of a service for a scope, as indices into backends, whose addresses differ.
// Backends of weight 0 are not in it. Equal backends give an equal table, after a restart and on every node, so
// a keyed hash finds the same backend again. A table without entries (nil) means that no new flow is served by
// it.
func Table(backends []lb.Backend, scope Scope, algorithm lb.Algorithm) []int {
	var usable []int
	for i, b := range backends {
		if scope.Has(b) && b.Weight > 0 {
			usable = append(usable, i)
		}
	}
	if len(usable) == 0 {
		return nil
	}
	weights := make([]int, len(usable))
	if algorithm == lb.Maglev {
		// By address, since where two backends want one entry the first has it.
		slices.SortFunc(usable, func(i, j int) int { return backends[i].Addr.Compare(backends[j].Addr) })
	}
	for i, at := range usable {
		weights[i] = int(backends[at].Weight)
	}
	if algorithm == lb.Maglev {
		return maglev(backends, usable, weights)
	}
	return plain(usable, weights)
}

// plain lists each backend as often as its weight says: where all weights are equal, once.
func plain(usable, weights []int) []int {
	divisor, sum := 0, 0
	for _, w := range weights {
		divisor, sum = gcd(divisor, w), sum+w
	}
	var table []int
	for i, n := range shares(weights, min(sum/divisor, plainMost(len(usable)))) {
		table = append(table, slices.Repeat(usable[i:i+1], n)...)
	}
	return table
}

// plainMost bounds the length of a plain table: by 4096, or, since the backend that gets least then has its share
// rounded by most, so that backends have 16 entries on average. A power of two, since the slots come in such
// blocks.
func plainMost(backends int) int { return max(4096, powerOfTwo(16*backends)) }

// shares divides a table of `total` entries, at least as many as there are weights, by the weights, which are not
// 0: each has at least one entry, and else its part of what those leave that are lifted to one, rounded by the
// largest remainder; of equal remainders the first's is the largest.
func shares(weights []int, total int) []int {
	n := make([]int, len(weights))
	left, sum := total, 0
	for _, w := range weights {
		sum += w
	}
	for lifted := true; lifted; {
		lifted = false
		for i, w := range weights {
			if n[i] == 0 && w*left < sum {
				n[i], left, sum = 1, left-1, sum-w
				lifted = true
			}
		}
	}
	var rest []int // indices of those that are divided by weight
	given := 0
	for i, w := range weights {
		if n[i] == 0 {
			n[i] = w * left / sum
			given += n[i]
			rest = append(rest, i)
		}
	}
	slices.SortStableFunc(rest, func(i, j int) int { return -cmp.Compare(weights[i]*left%sum, weights[j]*left%sum) })
	for _, i := range rest[:left-given] {
		n[i]++
	}
	return n
}

// maglev is the algorithm of "Maglev: A Fast and Reliable Software Network Load Balancer" (Eisenbud et al., NSDI
// 2016), section 3.4: each backend has an order of all entries, made of its name alone, and one after the other
// takes the first of its order that is free. So most entries stay whose they are when another backend comes or
// goes. Weights say how many turns each has; the paper's backends all have as many.
//
// The table's length is a prime by the number of backends. Where that crosses a limit, all entries are dealt anew,
// and most flows that no entry of the flow table holds go elsewhere: what Maglev promises holds between two limits.
// It is not kept as it was, since then the table would depend on what was before, and differ between nodes.
func maglev(backends []lb.Backend, usable, weights []int) []int {
	size := maglevSize(len(usable))
	orders := make([]order, len(usable))
	for i, at := range usable {
		orders[i] = orderOf(backends[at].Addr.String(), size)
	}
	table := populate(orders, shares(weights, size), size)
	for entry, i := range table {
		table[entry] = usable[i]
	}
	return table
}

// maglevSize is a prime with at least 200 entries for each backend. The paper asks for 100, so that equal shares,
// which differ by one entry, differ by one per cent at most; but with 163 for each of a hundred backends, one that
// goes still moves up to 2.6 % of the others' entries, and with 327 less than 1 %. It is just below a power of two,
// since the slots come in such blocks.
func maglevSize(backends int) int {
	size := 256
	for primeBelow(size) < 200*backends {
		size *= 2
	}
	return primeBelow(size)
}

// order is the order in which a backend takes entries: offset, offset+skip, and so on modulo the table's length,
// which is prime, so each comes once.
type order struct{ offset, skip int }

// orderOf makes an order of a backend's name, ADDRESS:PORT, by two hashes: the halves of one that is good enough
// that nobody has to think about it.
func orderOf(name string, size int) order {
	sum := sha256.Sum256([]byte(name))
	one, two := binary.BigEndian.Uint64(sum[:8]), binary.BigEndian.Uint64(sum[8:16])
	return order{offset: int(one % uint64(size)), skip: int(two%uint64(size-1)) + 1}
}

// populate deals a table of `size` entries: in turns, each takes the next of its order until it has its share.
func populate(orders []order, shares []int, size int) []int {
	table := slices.Repeat([]int{-1}, size)
	next := make([]int, len(orders))
	turns := make([]int, len(orders)) // who still has one
	for i, o := range orders {
		next[i], turns[i] = o.offset, i
	}
	left := slices.Clone(shares)
	for len(turns) > 0 {
		for _, i := range turns {
			for table[next[i]] >= 0 {
				next[i] = (next[i] + orders[i].skip) % size
			}
			table[next[i]] = i
			left[i]--
		}
		turns = slices.DeleteFunc(turns, func(i int) bool { return left[i] == 0 })
	}
	return table
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// powerOfTwo returns the least one that is not below n.
func powerOfTwo(n int) int { return 1 << bits.Len(uint(n-1)) }

func primeBelow(n int) int {
	for n--; !prime(n); n-- {
	}
	return n
}

func prime(n int) bool {
	for d := 2; d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}
