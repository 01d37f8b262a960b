// SPDX-License-Identifier: Apache-2.0

// Command bench measures what the programs at the TC hooks cost a packet, beside programs that do only part
// of the work with the same functions on the same tables (bpf/reference.c). docs/performance.md says what
// its table means. It needs root and leaves nothing behind.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// sizes of the measurement.
type sizes struct {
	rounds, packets int
	flows           []uint32 // numbers of established flows, ascending powers of two
	cold            bool     // no packets before those that count
	main            uint32   // that one of them by which all else is measured
}

func main() {
	s := sizes{flows: []uint32{1, 1 << 12, 1 << 16, 1 << 19}, main: 1 << 16}
	flag.IntVar(&s.rounds, "rounds", 11, "how often each program is measured")
	flag.IntVar(&s.packets, "packets", 1<<16, "packets a measurement")
	flag.BoolVar(&s.cold, "cold", false, "measure from the first packet on: all others' packets came between")
	flag.Parse()
	if err := run(os.Stdout, s); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(w io.Writer, s sizes) error {
	b := &bench{sizes: s, w: w}
	defer b.close()
	if err := b.prepare(); err != nil {
		return err
	}
	if err := measure(b.tests, s); err != nil {
		return err
	}
	b.print()
	return nil
}

// bench is all that is measured, and the table that it becomes.
type bench struct {
	sizes
	w        io.Writer
	rigs     []*rig
	tests    []*test
	sections []section
}

type section struct {
	title string
	rows  []row
}

// row sets one test against another, its reference.
type row struct {
	name      string
	test      *test
	reference *test
	target    float64 // the highest ratio that is wanted, 0 for none
}

func (b *bench) close() {
	for _, r := range b.rigs {
		r.close()
	}
}

// add measures a test once, however many rows ask for it, and with it the walk alone.
func (b *bench) add(t test) *test {
	same := func(o *test) bool {
		return o.rig == t.rig && o.program == t.program && o.family == t.family && o.way == t.way &&
			o.flags == t.flags && o.flows == t.flows && o.cpus == t.cpus && o.same == t.same && (o.before == nil) == (t.before == nil)
	}
	if t.cpus == 0 {
		t.cpus = 1
	}
	if i := slices.IndexFunc(b.tests, same); i >= 0 {
		return b.tests[i]
	}
	t.seed = uint32(len(b.tests)) * 0x9e3779b1 // far from the others', whose new flows would be found
	b.tests = append(b.tests, &t)
	return b.tests[len(b.tests)-1]
}

func (b *bench) section(title string, rows ...row) {
	b.sections = append(b.sections, section{title, rows})
}

// prepare makes the tables and says what is measured.
func (b *bench) prepare() error {
	const ack, syn = testenv.ACK, testenv.SYN
	forward := func(t test) test { t.way, t.flags = fromClient, ack; return t }
	reply := func(t test) test { t.way, t.flags = fromBackend, ack; return t }

	var established, replies, layouts []row
	var main *rig
	for _, n := range b.flows {
		families := []family{v4}
		if n == b.main {
			families = append(families, v6)
		}
		r, err := newRig(plain, n, n > 1, families...)
		if err != nil {
			return err
		}
		b.rigs = append(b.rigs, r)
		if n == b.main {
			main = r
		}
		for _, f := range families {
			in := b.add(forward(test{rig: r, program: "pod_in", family: f, flows: n, reasons: []string{"forward"}}))
			out := b.add(reply(test{rig: r, program: "pod_out", family: f, flows: n, reasons: []string{"reply"}}))
			target := 0.0
			if n == b.main {
				target = 1.2
			}
			established = append(established, row{
				fmt.Sprintf("client, %s flows, %s", count(n), f), in,
				b.add(forward(test{rig: r, program: "rewrite", family: f, flows: n})), target,
			})
			replies = append(replies, row{
				fmt.Sprintf("reply, %s flows, %s", count(n), f), out,
				b.add(reply(test{rig: r, program: "rewrite", family: f, flows: n})), target,
			})
		}
		if n > 1 {
			for _, w := range []struct {
				name string
				of   func(test) test
			}{{"client", forward}, {"reply", reply}} {
				literal := b.add(w.of(test{rig: r, program: "on_plain", family: v4, flows: n}))
				for _, l := range []struct{ program, name string }{
					{"on_padded", "literal, padded to 104"}, {"on_compact", "ids, 56 bytes"}, {"on_small", "ids, 40 bytes"},
				} {
					layouts = append(layouts, row{
						fmt.Sprintf("%s: %s, %s flows", w.name, l.name, count(n)),
						b.add(w.of(test{rig: r, program: l.program, family: v4, flows: n})), literal, 0,
					})
				}
			}
		}
	}
	if main == nil {
		return fmt.Errorf("%d is not one of the numbers of flows %v", b.main, b.flows)
	}

	b.section("established flow / parse + lookup + rewrite", append(established, replies...)...)

	reference := func(f family) *test {
		return b.add(forward(test{rig: main, program: "rewrite", family: f, flows: b.main}))
	}
	b.section("once a second: the flow's last use is a second ago / parse + lookup + rewrite",
		row{"client, v4", b.add(forward(test{rig: main, program: "pod_in", family: v4, flows: b.main, before: main.ageFlows, after: main.fillFlows, reasons: []string{"forward"}})), reference(v4), 0})

	var none []row
	for _, f := range []family{v4, v6} {
		miss := func(program string, reasons ...string) *test {
			return b.add(test{rig: main, program: program, family: f, way: elsewhere, flags: ack, flows: b.main, reasons: reasons})
		}
		none = append(none,
			row{fmt.Sprintf("ingress, %s / flows + frontends", f), miss("pod_in", "no_service"), miss("miss_frontend"), 1.5},
			row{fmt.Sprintf("egress, %s / flows + pending", f), miss("pod_out", "no_flow"), miss("miss_pending"), 0})
	}
	b.section("packet of no service / parse + two lookups", none...)

	// Every packet is a flow of its own, so `pending` is full and turned over from the second round on.
	opened := func(f family, program string, reasons ...string) *test {
		return b.add(test{rig: main, program: program, family: f, way: fromClient, flags: syn, flows: 0, reasons: reasons})
	}
	var open []row
	for _, f := range []family{v4, v6} {
		open = append(open,
			row{fmt.Sprintf("%s / parse + lookup + rewrite", f), opened(f, "pod_in", "new_flow"), reference(f), 0},
			row{fmt.Sprintf("%s / parse + two inserts + rewrite", f), opened(f, "pod_in", "new_flow"), opened(f, "insert_two"), 0})
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return err
	}
	if len(cpus) > 1 {
		one := opened(v4, "pod_in", "new_flow")
		two := *one
		two.cpus, two.reasons = 2, []string{"new_flow", "lock_busy"}
		open = append(open, row{"two CPUs, each its own flows / one CPU", b.add(two), one, 0})
		// The second CPU finds most of them there.
		two.same, two.reasons = true, []string{"new_flow", "forward", "lock_busy", "table_full"}
		open = append(open, row{"two CPUs, the same flows / one CPU", b.add(two), one, 0})
	}
	b.section("new flow", open...)

	if err := b.variants(main, forward, opened); err != nil {
		return err
	}

	steps := []struct{ program, name string }{
		{"parse", "parse"}, {"lookup", "lookup"}, {"rewrite", "rewrite"}, {"with_copy", "copy of what it becomes"},
		{"with_alive", "clock and age"}, {"with_backend", "the backend's generation"}, {"with_note", "counts, acknowledgement"},
		{"with_reason", "reason counted"},
	}
	for _, n := range b.flows {
		if n == 1 && len(b.flows) > 2 || n > b.main {
			continue
		}
		r := b.rigs[slices.Index(b.flows, n)]
		var rows []row
		previous := b.nothing(&test{rig: r, family: v4, way: fromClient, flags: ack, flows: n})
		for _, s := range steps {
			t := b.add(forward(test{rig: r, program: s.program, family: v4, flows: n}))
			rows = append(rows, row{s.name, t, previous, 0})
			previous = t
		}
		rows = append(rows, row{"the program itself", b.add(forward(test{rig: r, program: "pod_in", family: v4, flows: n, reasons: []string{"forward"}})), previous, 0})
		b.section(fmt.Sprintf("step by step, %s flows: what each adds", count(n)), rows...)
	}
	if len(layouts) > 0 {
		b.section("layouts of a flow / literal tuple, 88 bytes", layouts...)
	}
	for _, t := range slices.Clone(b.tests) {
		b.nothing(t)
	}
	return nil
}

// variants sets what a service can be beside a plain ClusterIP, of which the main rig is full.
func (b *bench) variants(main *rig, forward func(test) test, opened func(f family, program string, reasons ...string) *test) error {
	const target = 1.5
	var established, open []row
	for _, v := range []struct {
		name, program string
		variant
	}{
		{"NodePort", "node_in", variant{kind: lb.NodePort, slots: 1}},
		{"session affinity, each client new", "pod_in", variant{kind: lb.ClusterIP, slots: 1, policy: maps.Policy{AffinityTimeoutS: 10800}}},
		{"Maglev, 251 slots", "pod_in", variant{kind: lb.ClusterIP, slots: 251}},
		{"source ranges, 4", "node_in", variant{kind: lb.LoadBalancer, slots: 1, ranges: true, policy: maps.Policy{Flags: maps.HasSourceRanges}}},
	} {
		r, err := newRig(v.variant, b.main, false, v4, v6)
		if err != nil {
			return err
		}
		b.rigs = append(b.rigs, r)
		for _, f := range []family{v4, v6} {
			name := fmt.Sprintf("%s, %s", v.name, f)
			t := test{rig: r, program: v.program, family: f, flows: b.main, reasons: []string{"forward"}}
			beside := b.add(forward(test{rig: main, program: "pod_in", family: f, flows: b.main, reasons: []string{"forward"}}))
			established = append(established, row{name, b.add(forward(t)), beside, target})
			t = test{rig: r, program: v.program, family: f, way: fromClient, flags: testenv.SYN, reasons: []string{"new_flow"}}
			open = append(open, row{name, b.add(t), opened(f, "pod_in", "new_flow"), target})
		}
	}
	b.section(fmt.Sprintf("established flow, %s flows / plain ClusterIP", count(b.main)), established...)
	b.section("new flow / plain ClusterIP", open...)
	return nil
}

// nothing returns the walk alone over the packets of a test.
func (b *bench) nothing(t *test) *test {
	return b.add(test{rig: t.rig, program: "nothing", family: t.family, way: t.way, flags: t.flags, flows: t.flows})
}

func count(n uint32) string {
	if n >= 1024 {
		return fmt.Sprintf("%dk", n/1024)
	}
	return fmt.Sprint(n)
}

// print writes the table: what the walk costs is taken from both sides of every ratio.
func (b *bench) print() {
	net := func(t *test) []float64 { return less(t.rounds, b.nothing(t).rounds) }
	fmt.Fprintf(b.w, "ns a packet, %d rounds of %d packets; ratios are of the same round. The walk over the flows (%.0f ns) is subtracted.\n",
		b.rounds, b.packets, median(b.nothing(b.tests[0]).rounds))
	for _, s := range b.sections {
		fmt.Fprintf(b.w, "\n%-44s %8s %8s   %-10s %8s %8s %7s %7s\n", s.title, "", "", "", "", "", "", "")
		fmt.Fprintf(b.w, "  %-42s %8s %8s   %8s %8s   %7s %7s\n", "", "median", "min", "ref med", "ref min", "ratio", "of min")
		steps := strings.HasPrefix(s.title, "step")
		for _, r := range s.rows {
			of, to := net(r.test), net(r.reference)
			if steps {
				added := less(of, to)
				fmt.Fprintf(b.w, "  %-42s %8.1f %8.1f   %+8.1f %+8.1f\n", r.name, median(of), slices.Min(of), median(added), slices.Min(of)-slices.Min(to))
				continue
			}
			ratio := median(ratios(of, to))
			note := ""
			if r.target != 0 {
				note = fmt.Sprintf("   target %.1f: met", r.target)
				if ratio > r.target {
					note = fmt.Sprintf("   target %.1f: missed", r.target)
				}
			}
			fmt.Fprintf(b.w, "  %-42s %8.1f %8.1f   %8.1f %8.1f   %7.2f %7.2f%s\n", r.name, median(of), slices.Min(of), median(to), slices.Min(to),
				ratio, slices.Min(of)/slices.Min(to), note)
		}
	}
	for _, t := range b.tests {
		if t.cpus == 1 {
			continue
		}
		flows := "each its own"
		if t.same {
			flows = "the same"
		}
		var all uint64
		for _, n := range t.shares {
			all += n
		}
		fmt.Fprintf(b.w, "\ntwo CPUs, %s flows, of %d packets:", flows, all)
		for _, name := range t.reasons {
			fmt.Fprintf(b.w, " %s %.2f %%", name, 100*float64(t.shares[name])/float64(all))
		}
		fmt.Fprintln(b.w)
	}
}
