// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	maps2 "maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

var update = flag.Bool("update", false, "rewrite what the scripts in testdata expect")

var small = maps.Sizes{Frontends: 64, Services: 16, Slots: 64, Backends: 32, Flows: 64}

var (
	errFault = errors.New("injected fault")
	errDied  = errors.New("the agent died") // a panic's value
)

// rig is an agent's life: a Reconciler on maps that outlive it. Before every write it is checked that a
// packet would meet nothing wrong if the agent died now.
type rig struct {
	m        *maps.Maps
	r        *Reconciler
	desired  map[lb.ServiceName]lb.Service
	foreign  map[netip.Addr]bool // what SetForeign was told
	host     []netip.Addr
	settled  []netip.Addr // those of host that were when an Apply did all
	prefixes []netip.Prefix
	hold     bool
	trace    []string // maps written to, and grace
	// What may be in force: what was desired at the last Apply that did all, and since. nil where things are held.
	versions map[lb.ServiceName][]lb.Service
	fault    func(write string) error // asked before each of the trace
}

func newRig(sizes maps.Sizes) (*rig, error) {
	m, err := maps.New(sizes)
	if err != nil {
		return nil, err
	}
	g := &rig{m: m, prefixes: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}}
	m.Fault = func(name string) error {
		c, err := read(g.m)
		if err := errors.Join(err, c.check(), c.checkVersions(g.versions), c.checkOwn(g.settled)); err != nil {
			panic(fmt.Sprintf("before write %d, after %q: %v\n%s", len(g.trace), g.trace, err, c))
		}
		return g.note(name)
	}
	return g, g.restart()
}

func (g *rig) note(what string) error {
	g.trace = append(g.trace, what)
	if g.fault != nil {
		return g.fault(what)
	}
	return nil
}

// restart makes another agent on the same maps. What is desired it has to be told anew, and what is foreign; what
// the host is, it finds out.
func (g *rig) restart() error {
	r, err := New(g.m, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	r.grace = func() error { return g.note("grace") }
	g.r, g.desired, g.foreign = r, map[lb.ServiceName]lb.Service{}, map[netip.Addr]bool{}
	g.setHold(g.hold)
	g.r.SetHostAddresses(g.host)
	return g.r.SetPrefixes(g.prefixes)
}

func (g *rig) setHost(all []netip.Addr) {
	g.host = all
	g.settled = slices.DeleteFunc(g.settled, func(addr netip.Addr) bool { return !slices.Contains(all, addr) })
	g.r.SetHostAddresses(all)
}

func (g *rig) setPrefixes(all []netip.Prefix) error {
	g.prefixes = all
	return g.r.SetPrefixes(all)
}

// setForeign makes these addresses all that are foreign.
func (g *rig) setForeign(all map[netip.Addr]bool) {
	changed := maps2.Clone(all)
	for addr := range g.foreign {
		if !all[addr] {
			changed[addr] = false
		}
	}
	g.r.SetForeign(changed)
	g.foreign = all
}

// expected is what the maps have to say of these services beside what else the agent was told.
func (g *rig) expected(services map[lb.ServiceName]lb.Service) string {
	return expected(input{services, g.foreign, g.host, g.prefixes})
}

// desire makes these services all that is desired.
func (g *rig) desire(all map[lb.ServiceName]lb.Service) {
	var removed []lb.ServiceName
	changed := map[lb.ServiceName]lb.Service{}
	for name := range g.desired {
		if _, ok := all[name]; !ok {
			removed = append(removed, name)
		}
	}
	for name, svc := range all {
		is, ok := g.desired[name]
		if !ok || !reflect.DeepEqual(is, svc) {
			changed[name] = svc
		}
	}
	g.r.Set(changed, removed)
	g.desired = all
	if g.versions != nil {
		for name, svc := range changed {
			g.versions[name] = append(g.versions[name], svc)
		}
	}
}

func (g *rig) apply() error {
	g.trace = nil
	err := g.r.Apply()
	c, readErr := read(g.m)
	if bad := errors.Join(readErr, c.check(), c.checkVersions(g.versions), c.checkOwn(g.settled)); bad != nil {
		panic(fmt.Sprintf("after %q: %v\n%s", g.trace, bad, c))
	}
	graces := 0
	for _, what := range g.trace {
		if what == "grace" {
			graces++
		}
	}
	if err == nil {
		g.settled = slices.Clone(g.host)
	}
	if err == nil && !g.hold {
		g.versions = map[lb.ServiceName][]lb.Service{}
		for name, svc := range g.desired {
			g.versions[name] = []lb.Service{svc}
		}
	}
	if graces > 1 {
		panic(fmt.Sprintf("%d grace periods: %q", graces, g.trace))
	}
	return err
}

// writes is the trace of the last Apply, a line for writes to the same map in a row.
func (g *rig) writes() string {
	var text strings.Builder
	for i := 0; i < len(g.trace); {
		n := 1
		for i+n < len(g.trace) && g.trace[i+n] == g.trace[i] {
			n++
		}
		text.WriteString(g.trace[i])
		if n > 1 {
			fmt.Fprintf(&text, " x%d", n)
		}
		text.WriteString("\n")
		i += n
	}
	return text.String()
}

func (g *rig) dump() string {
	c, err := read(g.m)
	if err != nil {
		return err.Error()
	}
	return c.String()
}

// TestScripts runs the scripts in testdata: desired services in, writes and maps out. Their commands:
//
//	maps KEY=SIZE...   begin with maps of these sizes
//	desire FILE...     nothing is desired but what is in these files; ACTIVE backends are usable for new flows
//	foreign ADDRESS... these are another proxy's VIPs, and no others
//	host ADDRESS...    these are the node's own addresses, and no others
//	prefixes CIDR...   ClusterIPs are in these
//	hold, release      keep what was restored, or not
//	fail MAP...        fail all writes to these maps; grace too
//	apply              apply, and print which maps were written to
//	restart            another agent on the same maps, to which nothing is desired yet
//	sweep-begin        a walk of the flow tables begins
//	sweep-end ID...    it is over, and has met flows of the backends with these ids
//	dump               print what the maps say
//	ids                print ids, states and generations of all backends
func TestScripts(t *testing.T) {
	needRoot(t)
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			g, err := newRig(small)
			if err != nil {
				return err
			}
			env.Values[rigKey{}] = &g
			env.Defer(func() { g.m.Close() })
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"maps": func(ts *testscript.TestScript, _ bool, args []string) {
				sizes := small
				for _, arg := range args {
					key, value, _ := strings.Cut(arg, "=")
					n, err := strconv.ParseUint(value, 10, 32)
					ts.Check(err)
					*map[string]*uint32{"frontends": &sizes.Frontends, "services": &sizes.Services, "slots": &sizes.Slots, "backends": &sizes.Backends}[key] = uint32(n)
				}
				g, err := newRig(sizes)
				ts.Check(err)
				at := ts.Value(rigKey{}).(**rig)
				ts.Check((*at).m.Close())
				*at = g
			},
			"desire": func(ts *testscript.TestScript, _ bool, files []string) {
				var text strings.Builder
				for _, file := range files {
					text.WriteString(ts.ReadFile(file))
				}
				all, err := parse(text.String())
				ts.Check(err)
				rigOf(ts).desire(all)
			},
			"foreign": func(ts *testscript.TestScript, _ bool, args []string) {
				all := map[netip.Addr]bool{}
				for _, addr := range addresses(ts, args) {
					all[addr] = true
				}
				rigOf(ts).setForeign(all)
			},
			"host": func(ts *testscript.TestScript, _ bool, args []string) { rigOf(ts).setHost(addresses(ts, args)) },
			"prefixes": func(ts *testscript.TestScript, _ bool, args []string) {
				all, err := parsePrefixes(args)
				ts.Check(err)
				ts.Check(rigOf(ts).setPrefixes(all))
			},
			"hold":    func(ts *testscript.TestScript, _ bool, _ []string) { rigOf(ts).setHold(true) },
			"release": func(ts *testscript.TestScript, _ bool, _ []string) { rigOf(ts).setHold(false) },
			"fail": func(ts *testscript.TestScript, _ bool, names []string) {
				rigOf(ts).fault = func(write string) error {
					if slices.Contains(names, write) {
						return errFault
					}
					return nil
				}
			},
			"apply": func(ts *testscript.TestScript, neg bool, _ []string) {
				g := rigOf(ts)
				err := g.apply()
				fmt.Fprint(ts.Stdout(), g.writes())
				if err != nil {
					fmt.Fprintln(ts.Stdout(), err)
				}
				if neg != (err != nil) {
					ts.Fatalf("apply: %v", err)
				}
			},
			"sweep-begin": func(ts *testscript.TestScript, _ bool, _ []string) { rigOf(ts).r.BeginSweep() },
			"sweep-end": func(ts *testscript.TestScript, _ bool, args []string) {
				named := map[uint32]bool{}
				for _, arg := range args {
					id, err := strconv.ParseUint(arg, 10, 32)
					ts.Check(err)
					named[uint32(id)] = true
				}
				rigOf(ts).r.EndSweep(func(id uint32) bool { return named[id] })
			},
			"restart": func(ts *testscript.TestScript, _ bool, _ []string) { ts.Check(rigOf(ts).restart()) },
			"dump":    func(ts *testscript.TestScript, _ bool, _ []string) { fmt.Fprint(ts.Stdout(), rigOf(ts).dump()) },
			"ids": func(ts *testscript.TestScript, _ bool, _ []string) {
				text := ""
				for id, b := range rigOf(ts).m.EachBackend() {
					text += fmt.Sprintf("%d %s %s generation %d\n", id, b.Addr(), state(b), b.Life.Generation)
				}
				fmt.Fprint(ts.Stdout(), cmp.Or(text, "none\n"))
			},
		},
	})
}

func (g *rig) setHold(hold bool) {
	g.hold = hold
	g.r.Hold(hold)
	if hold {
		g.versions = nil
	}
}

func addresses(ts *testscript.TestScript, args []string) []netip.Addr {
	var all []netip.Addr
	for _, arg := range args {
		addr, err := netip.ParseAddr(arg)
		ts.Check(err)
		all = append(all, addr)
	}
	return all
}

type rigKey struct{}

func rigOf(ts *testscript.TestScript) *rig { return *ts.Value(rigKey{}).(**rig) }
