// SPDX-License-Identifier: Apache-2.0

package balance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/lbagent/lbagent/lb"
)

func TestTable(t *testing.T) {
	backend := func(n byte, weight uint16) lb.Backend {
		return lb.Backend{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, n}), 80), Cluster: true, Weight: weight}
	}
	var (
		a, b     = backend(1, 1), backend(2, 1)
		draining = backend(3, 1)
		here     = backend(4, 1)
	)
	draining.Cluster = false
	here.Local = true
	onlyHere := here
	onlyHere.Cluster = false
	for _, tt := range []struct {
		name     string
		backends []lb.Backend
		scope    Scope
		want     []int
	}{
		{"no backends", nil, Cluster, nil},
		{"each once, in order", []lb.Backend{a, b}, Cluster, []int{0, 1}},
		{"the order is the caller's", []lb.Backend{b, a}, Cluster, []int{0, 1}},
		{"a draining backend takes no new flow", []lb.Backend{a, draining, b}, Cluster, []int{0, 2}},
		{"only draining ones: reject", []lb.Backend{draining}, Cluster, nil},
		{"Cluster has those of this node too", []lb.Backend{a, here}, Cluster, []int{0, 1}},
		{"Local has those of this node alone", []lb.Backend{a, here}, Local, []int{1}},
		{"one that only Local falls back to", []lb.Backend{a, onlyHere}, Cluster, []int{0}},
		{"that one in Local", []lb.Backend{a, onlyHere}, Local, []int{1}},
		{"equal weights: each once", []lb.Backend{backend(1, 700), backend(2, 700)}, Cluster, []int{0, 1}},
		{"as often as the weight says", []lb.Backend{backend(1, 200), backend(2, 300)}, Cluster, []int{0, 0, 1, 1, 1}},
		{"weight 0: not at all", []lb.Backend{backend(1, 0), backend(2, 3)}, Cluster, []int{1}},
		{"all of weight 0: empty", []lb.Backend{backend(1, 0), backend(2, 0)}, Cluster, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Table(tt.backends, tt.scope, lb.Plain); !slices.Equal(got, tt.want) {
				t.Errorf("Table() = %v, want %v", got, tt.want)
			}
			usable := map[int]bool{}
			for _, i := range tt.want {
				usable[i] = true
			}
			got := map[int]bool{}
			for _, i := range Table(tt.backends, tt.scope, lb.Maglev) {
				got[i] = true
			}
			if fmt.Sprint(got) != fmt.Sprint(usable) {
				t.Errorf("Maglev has %v, want %v", got, usable)
			}
		})
	}
}

func backends(n int, weight func(i int) uint16) []lb.Backend {
	all := make([]lb.Backend, n)
	for i := range all {
		all[i] = lb.Backend{
			Addr:    netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 8080),
			Cluster: true, Weight: weight(i),
		}
	}
	return all
}

func one(int) uint16 { return 1 }

// counts returns how often each backend is in a table.
func counts(table []int, n int) []int {
	c := make([]int, n)
	for _, i := range table {
		c[i]++
	}
	return c
}

// checkShares: no backend of a weight is missing, none of weight 0 is there, the table is no longer than it may
// be, and each has its share but for rounding: less than one entry, and of the entries that went to lift others to
// one (fewer than there are backends), its part.
func checkShares(t *testing.T, all []lb.Backend, table []int, most int) {
	t.Helper()
	usable, sum := 0, 0
	for _, b := range all {
		if sum += int(b.Weight); b.Weight > 0 {
			usable++
		}
	}
	if len(table) > most || (len(table) > 0) != (usable > 0) {
		t.Fatalf("%d entries for %d backends, most are %d", len(table), usable, most)
	}
	for i, n := range counts(table, len(all)) {
		if all[i].Weight == 0 {
			if n > 0 {
				t.Errorf("backend %d of weight 0 has %d entries", i, n)
			}
			continue
		}
		share := float64(len(table)) * float64(all[i].Weight) / float64(sum)
		low, high := math.Floor(share*(1-float64(usable)/float64(len(table)))), max(1, math.Ceil(share))
		if usable == 1 || sum == usable*int(all[i].Weight) { // equal weights: nobody is lifted
			low = math.Floor(share)
		}
		if n < 1 || float64(n) < low || float64(n) > high {
			t.Errorf("backend %d of weight %d of %d has %d of %d entries, want %v to %v", i, all[i].Weight, sum, n, len(table), low, high)
		}
	}
}

var weightings = map[string]func(i int) uint16{
	"equal":          one,
	"1, 2, 3":        func(i int) uint16 { return uint16(i%3 + 1) },
	"primes":         func(i int) uint16 { return []uint16{997, 991, 983, 977}[i%4] },
	"one is greater": func(i int) uint16 { return uint16(1 + 999*max(0, 1-i)) },
	"one is less":    func(i int) uint16 { return uint16(1 + 996*min(1, i)) },
	"some have none": func(i int) uint16 { return uint16(i % 2 * 5) },
}

// Entries are divided by the largest remainder, after those have one each that would have none.
func TestRemainders(t *testing.T) {
	for _, tt := range []struct {
		weights []int
		total   int
		want    []int
	}{
		{[]int{1, 2, 4}, 10, []int{1, 3, 6}}, // 1.4, 2.9, 5.7
		{[]int{1, 1, 1}, 5, []int{2, 2, 1}},
		{[]int{1, 1000, 1000}, 5, []int{1, 2, 2}},
		{[]int{1000, 1, 400}, 3, []int{1, 1, 1}},
		{[]int{100, 90, 1, 900}, 10, []int{1, 1, 1, 7}}, // the second has less than one once the third is lifted
	} {
		if got := shares(tt.weights, tt.total); !slices.Equal(got, tt.want) {
			t.Errorf("%d by %v: %v, want %v", tt.total, tt.weights, got, tt.want)
		}
	}
}

func TestShares(t *testing.T) {
	for what, weight := range weightings {
		for _, n := range []int{1, 2, 3, 10, 100, 1000} {
			all := backends(n, weight)
			t.Run(fmt.Sprintf("%d, %s", n, what), func(t *testing.T) {
				checkShares(t, all, Table(all, Cluster, lb.Plain), plainMost(n))
				checkShares(t, all, Table(all, Cluster, lb.Maglev), maglevSize(n))
			})
		}
	}
}

// Flows spread as the weights say. The flows are drawn as the kernel's hash draws them; the statistic over n-1
// degrees of freedom is normal with mean n-1 and variance 2(n-1) for this many backends, and eight standard
// deviations are not met by chance. A table whose shares were off by a tenth would have 20,000*0.01 more, which is
// more than that.
func TestSpread(t *testing.T) {
	const n, flows = 50, 20_000
	for what, weight := range map[string]func(int) uint16{"equal": one, "1, 2, 3": weightings["1, 2, 3"]} {
		for _, algorithm := range []lb.Algorithm{lb.Plain, lb.Maglev} {
			all := backends(n, weight)
			table := Table(all, Cluster, algorithm)
			rnd := rand.New(rand.NewPCG(1, 2))
			got := make([]int, n)
			for range flows {
				got[table[rnd.Uint32()%uint32(len(table))]]++
			}
			sum := 0
			for _, b := range all {
				sum += int(b.Weight)
			}
			chi2 := 0.0
			for i, g := range got {
				want := float64(flows) * float64(all[i].Weight) / float64(sum)
				chi2 += (float64(g) - want) * (float64(g) - want) / want
			}
			if limit := n - 1 + 8*math.Sqrt(2*(n-1)); chi2 > limit {
				t.Errorf("%s, %s: chi-square %.0f, at most %.0f by chance", algorithm, what, chi2, limit)
			}
		}
	}
}

// names are the addresses that a table leads to: what it is, but for the order of the backends.
func names(table []int, all []lb.Backend) []netip.AddrPort {
	addrs := make([]netip.AddrPort, len(table))
	for i, at := range table {
		addrs[i] = all[at].Addr
	}
	return addrs
}

// The same backends in another order are the same Maglev table; those that are not usable change nothing.
func TestMaglevIsOfTheBackendsAlone(t *testing.T) {
	all := backends(30, weightings["primes"])
	want := names(Table(all, Cluster, lb.Maglev), all)
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 5 {
		other := append(slices.Clone(all), lb.Backend{Addr: netip.MustParseAddrPort("10.9.9.9:1"), Weight: 5})
		rnd.Shuffle(len(other), func(i, j int) { other[i], other[j] = other[j], other[i] })
		if !slices.Equal(names(Table(other, Cluster, lb.Maglev), other), want) {
			t.Error("another order of backends has another table")
		}
	}
}

// What the tables of two nodes, or of two versions, must agree on: the orders, so the names' hashes.
func TestMaglevOrdersNeverChange(t *testing.T) {
	for name, want := range map[string]order{
		"10.0.0.1:80":      {59505, 43152},
		"[fd00:244::1]:80": {31001, 30384},
	} {
		if got := orderOf(name, 65521); got != want {
			t.Errorf("%s: %v, was always %v", name, got, want)
		}
	}
}

// The example of the paper (table 1): three backends and seven entries, then without B1.
func TestMaglevOfThePaper(t *testing.T) {
	b0, b1, b2 := order{3, 4}, order{0, 2}, order{3, 1}
	if got, want := populate([]order{b0, b1, b2}, shares([]int{1, 1, 1}, 7), 7), []int{1, 0, 1, 0, 2, 2, 0}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got, want := populate([]order{b0, b2}, shares([]int{1, 1}, 7), 7), []int{0, 0, 0, 0, 1, 1, 1}; !slices.Equal(got, want) {
		t.Errorf("without B1 %v, want %v", got, want)
	}
}

// published is the paper's pseudocode (figure "Populate"), to hold ours against where all weights are equal.
func published(orders []order, size int) []int {
	next := make([]int, len(orders))
	entry := slices.Repeat([]int{-1}, size)
	for n := 0; ; {
		for i, o := range orders {
			c := (o.offset + next[i]*o.skip) % size
			for entry[c] >= 0 {
				next[i]++
				c = (o.offset + next[i]*o.skip) % size
			}
			entry[c] = i
			next[i]++
			if n++; n == size {
				return entry
			}
		}
	}
}

func TestMaglevIsThePublishedOne(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 100, 1000} {
		all := backends(n, func(int) uint16 { return 7 })
		table := Table(all, Cluster, lb.Maglev)
		orders := make([]order, n)
		for i, b := range all {
			orders[i] = orderOf(b.Addr.String(), len(table))
		}
		if !slices.Equal(table, published(orders, len(table))) {
			t.Errorf("%d backends: the table is another", n)
		}
	}
}

// One of 100 backends goes: its entries go to others, and of the others' entries few change hands. With the weights
// equal each of the hundred is taken out in turn. It comes back: the table is what it was.
func TestMaglevDisruption(t *testing.T) {
	for what, weight := range weightings {
		const n = 100
		all := backends(n, weight)
		full := names(Table(all, Cluster, lb.Maglev), all)
		worst, total := 0.0, 0.0
		for gone := range n {
			rest := slices.Delete(slices.Clone(all), gone, gone+1)
			without := names(Table(rest, Cluster, lb.Maglev), rest)
			if len(without) != len(full) {
				t.Fatalf("%s: the table's length changed from %d to %d", what, len(full), len(without))
			}
			moved, others := 0, 0
			for i, was := range full {
				if was != all[gone].Addr {
					others++
					if without[i] != was {
						moved++
					}
				}
			}
			share := float64(moved) / float64(others)
			worst, total = max(worst, share), total+share
			back := slices.Insert(slices.Clone(rest), gone, all[gone])
			if gone%10 == 0 && !slices.Equal(names(Table(back, Cluster, lb.Maglev), back), full) {
				t.Errorf("%s: backend %d came back and the table is another", what, gone)
			}
		}
		t.Logf("%s: of the others' entries move %.2f %% on average, %.2f %% at worst", what, 100*total/n, 100*worst)
		if worst > 0.02 {
			t.Errorf("%s: %.2f %% of the others' entries move", what, 100*worst)
		}
	}
}

func TestMaglevSize(t *testing.T) {
	for n, want := range map[int]int{1: 251, 2: 509, 3: 1021, 5: 1021, 6: 2039, 20: 4093, 21: 8191, 327: 65521, 328: 131071, 5000: 1048573} {
		if got := maglevSize(n); got != want || got < 200*n {
			t.Errorf("%d backends: %d entries, want %d", n, got, want)
		}
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte{1, 0, 1, 0}, true)
	f.Add([]byte{0xe8, 3, 1, 0, 1, 0}, false)
	f.Add([]byte{0, 0}, true)
	f.Fuzz(func(t *testing.T, weights []byte, maglev bool) {
		all := backends(min(len(weights)/2, 300), func(i int) uint16 {
			return (uint16(weights[2*i]) | uint16(weights[2*i+1])<<8) % (lb.MaxWeight + 1)
		})
		if maglev {
			checkShares(t, all, Table(all, Cluster, lb.Maglev), maglevSize(len(all)))
		} else {
			checkShares(t, all, Table(all, Cluster, lb.Plain), plainMost(len(all)))
		}
	})
}

// A Maglev table of a thousand backends, which is made anew whenever one of them changes.
func BenchmarkMaglev(b *testing.B) {
	all := backends(1000, weightings["one is greater"])
	for b.Loop() {
		Table(all, Cluster, lb.Maglev)
	}
}
