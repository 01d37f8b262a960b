// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	sync2 "sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/internal/model"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
	"github.com/lbagent/lbagent/resolve"
)

// The model rung: random objects, edits and packets through resolve, Reconciler, maps and programs, against the plain
// model of package model. It is here and not beside the model because it needs a Reconciler that waits for no
// grace period, which costs more than all the rest and which nobody needs who runs one packet at a time.

var (
	modelSeed    = flag.Uint64("model.seed", 0, "seed of the model rung; 0: a new one")
	modelWorlds  = flag.Uint64("model.worlds", 1000, "how many random configurations the model rung tries")
	modelWorld   = flag.Uint64("model.world", 0, "number of the first of them")
	modelShrink  = flag.Duration("model.shrink", time.Minute, "how long the model rung looks for a smaller failure")
	modelPackets = flag.Int("model.packets", 1000, "how many packets it sends in each")
)

// TestModel is described in docs/testing.md.
func TestModel(t *testing.T) {
	needRoot(t)
	seed, worlds := *modelSeed, *modelWorlds
	if seed == 0 {
		seed = rand.Uint64() >> 1
	}
	if testing.Short() {
		worlds = 20
	}
	g := newModelRig(t)
	t.Logf("-model.seed=%d", seed)
	start, edits := time.Now(), 0
	outcomes := map[string]int{}
	for n := *modelWorld; n < *modelWorld+worlds; n++ {
		w, steps := model.Random(seed, n, *modelPackets)
		if err := g.play(w, steps, outcomes); err != nil {
			shrunk, rest := g.shrink(w, steps)
			t.Fatalf("seed %d, world %d: %v\nGo on with -model.seed=%d -model.world=%d. What is left of it fails so: %v\n%s%s",
				seed, n, err, seed, n, g.play(shrunk, rest, nil), shrunk, printed(rest))
		}
		for _, s := range steps {
			if s.Edit != nil {
				edits++
			}
		}
	}
	packets := 0
	for _, n := range outcomes {
		packets += n
	}
	t.Logf("%d packets over %d worlds and %d edits agree, in %s", packets, worlds, edits, time.Since(start).Round(time.Millisecond))
	var lines []string
	for outcome, n := range outcomes {
		lines = append(lines, fmt.Sprintf("%8d %s", n, outcome))
	}
	slices.Sort(lines)
	t.Logf("what became of them:\n%s", strings.Join(lines, "\n"))
	g.wantAll(t, outcomes, packets)
}

// wantAll holds that random worlds meet every rule: a rung that meets none agrees with everything.
func (g *modelRig) wantAll(t *testing.T, outcomes map[string]int, packets int) {
	if packets < 100000 {
		return
	}
	for _, outcome := range []string{
		"untouched (no_service)", "untouched (new_direct)", "untouched (direct)", "untouched (other_hook)",
		"translated (new_flow)", "translated (forward)", "translated (reply)",
		"rejected (no_backend)", "rejected (wrong_port)", "echoed (echo)",
		"dropped (no_local_backend)", "dropped (source_denied)", "dropped (unassigned)", "dropped (stray_rst)", "dropped (tuple_taken)",
	} {
		if outcomes[outcome] == 0 {
			t.Errorf("no packet of %d was %s", packets, outcome)
		}
	}
}

func printed(steps []model.Step) string {
	var s strings.Builder
	for i, step := range steps {
		fmt.Fprintf(&s, "# step %d: %s", i+1, step)
	}
	return s.String()
}

// ---- the real thing ----

// modelRig is the real stages, from objects to programs.
type modelRig struct {
	m        *maps.Maps
	programs map[string]*ebpf.Program
	table    *resolve.Table
	r        *Reconciler
	reasons  *ebpf.Map
	counts   []uint64 // of reasons, as of the last packet
	recent   []uint32 // reasons, the last one first
	limits   *ebpf.Map
	out      []byte
	rejects  int
	start    time.Time
}

// modelMaps are shared by all runs in this process: the verifier takes its time.
var modelMaps = sync2.OnceValues(func() (*modelRig, error) {
	m, err := maps.New(maps.Sizes{Frontends: 4096, Services: 256, Slots: 1 << 20, Backends: 4096, Flows: 1 << 17})
	if err != nil {
		return nil, err
	}
	l, err := loader.Load(m, loader.Config{SilentBackend: -1, Hairpin: loader.DefaultHairpin()})
	if err != nil {
		return nil, err
	}
	g := &modelRig{
		m: m, programs: l.Programs(), reasons: m.All()["reasons"], limits: m.All()["icmp_limits"],
		out: make([]byte, 2048), start: time.Now(),
	}
	g.counts = make([]uint64, g.reasons.MaxEntries())
	for id := range g.reasons.MaxEntries() {
		g.recent = append(g.recent, id)
	}
	return g, nil
})

func newModelRig(t *testing.T) *modelRig {
	t.Helper()
	g, err := modelMaps()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	return g
}

// clear empties all maps and starts the stages anew.
func (g *modelRig) clear(w model.World) error {
	var errs []error
	must := func(err error) { errs = append(errs, err) }
	var frontends []maps.FrontendKey
	must(g.m.EachFrontend(func(k maps.FrontendKey, _ maps.Frontend) bool { frontends = append(frontends, k); return true }))
	for _, k := range frontends {
		must(g.m.DeleteFrontend(k))
	}
	var names []uint32
	must(g.m.EachServiceName(func(id uint32, _ maps.ServiceName) bool { names = append(names, id); return true }))
	for _, id := range names {
		must(g.m.DeleteServiceName(id))
	}
	type source struct {
		service uint32
		p       netip.Prefix
	}
	var sources []source
	must(g.m.EachSourceRange(func(service uint32, p netip.Prefix) bool { sources = append(sources, source{service, p}); return true }))
	for _, s := range sources {
		must(g.m.DeleteSourceRange(s.service, s.p))
	}
	for id := range g.m.Sizes().Services {
		must(g.m.SetServicePolicy(id, maps.Policy{}))
		must(g.m.SetServiceCluster(id, maps.SlotRange{}))
		must(g.m.SetServiceLocal(id, maps.SlotRange{}))
	}
	for id := range g.m.Sizes().Backends {
		must(g.m.SetBackend(id, maps.Backend{}))
	}
	must(g.forget())
	must(emptied[maps.AffinityKey, maps.Affinity](g.m.All()["affinity"]))
	g.table = resolve.NewTable(resolve.Options{ExternalIPsAllow: w.ExternalIPsAllow, ProxyName: w.ProxyName})
	must(g.restart())
	return errors.Join(errs...)
}

// forget is what the passing of a day does to flows.
func (g *modelRig) forget() error {
	return errors.Join(emptied[maps.Tuple, maps.Flow](g.m.All()["flows"]), emptied[maps.Tuple, maps.Flow](g.m.All()["pending"]))
}

func emptied[K, V any](m *ebpf.Map) error {
	var keys []K
	if err := entries(m, func(k K, _ V) { keys = append(keys, k) }); err != nil || len(keys) == 0 {
		return err
	}
	_, err := m.BatchDelete(keys, nil)
	return err
}

func entries[K, V any](m *ebpf.Map, each func(K, V)) error {
	const chunk = 4096
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, chunk), make([]V, chunk)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			each(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// restart goes on with a Reconciler that knows what the maps say.
func (g *modelRig) restart() (err error) {
	g.r, err = New(g.m, slog.New(slog.DiscardHandler))
	if err == nil {
		g.r.grace = func() error { return nil }
	}
	return err
}

// begin brings the whole world, in a random order.
func (g *modelRig) begin(w model.World, r *rand.Rand) error {
	if err := g.clear(w); err != nil {
		return err
	}
	edits := []model.Edit{{Host: &w.Host}, {Prefixes: &w.Prefixes}}
	for _, s := range w.Services {
		edits = append(edits, model.Edit{Service: s})
	}
	for _, p := range w.Pods {
		edits = append(edits, model.Edit{Pod: p})
	}
	r.Shuffle(len(edits), func(i, j int) { edits[i], edits[j] = edits[j], edits[i] })
	for _, e := range edits {
		if err := g.edit(w, e); err != nil {
			return err
		}
	}
	return g.r.Apply()
}

// edit brings what an edit, after which the world is w, changes.
func (g *modelRig) edit(w model.World, e model.Edit) error {
	var c resolve.Change
	name := resolve.Name{}
	switch {
	case e.Host != nil:
		h := e.Host
		c = g.table.SetHost(resolve.Host{Name: h.Name, Zone: h.Zone, Addresses: h.Addresses, NodePorts: h.NodePorts, PodRoutes: h.PodRoutes})
		g.r.SetHostAddresses(h.Addresses)
	case e.Prefixes != nil:
		if err := g.r.SetPrefixes(*e.Prefixes); err != nil {
			return err
		}
	case e.Pod != nil:
		pod := e.Pod
		if e.Gone {
			pod = nil
		}
		c = g.table.UpdatePod(resolve.Name{Namespace: e.Pod.Namespace, Name: e.Pod.Name}, pod)
	case e.Service != nil:
		name = resolve.Name{Namespace: e.Service.Namespace, Name: e.Service.Name}
	case e.Slice != nil:
		name = resolve.Name{Namespace: e.Slice.Namespace, Name: e.Slice.Labels[discoveryv1.LabelServiceName]}
	}
	if name != (resolve.Name{}) {
		var service *corev1.Service
		for _, s := range w.Services {
			if s.Namespace == name.Namespace && s.Name == name.Name {
				service = s
			}
		}
		its := slices.DeleteFunc(slices.Clone(w.Slices), func(s *discoveryv1.EndpointSlice) bool {
			return s.Namespace != name.Namespace || s.Labels[discoveryv1.LabelServiceName] != name.Name
		})
		c = g.table.Update(name, service, its)
	}
	g.r.SetForeign(c.Foreign)
	g.r.Set(c.Changed, c.Removed)
	return nil
}

// ---- one world ----

// play brings a world and does what happens in it, and returns the first disagreement.
func (g *modelRig) play(w model.World, steps []model.Step, outcomes map[string]int) error {
	r := rand.New(rand.NewPCG(1, uint64(len(steps))))
	if err := g.begin(w, r); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	state := model.NewState(loader.DefaultHairpin())
	state.Edited(w)
	for i, s := range steps {
		if err := g.step(&w, state, s, outcomes); err != nil {
			return fmt.Errorf("step %d, %s%w", i+1, s, err)
		}
	}
	return g.sameAsFresh(w, r)
}

func (g *modelRig) step(w *model.World, state *model.State, s model.Step, outcomes map[string]int) error {
	var err error
	switch {
	case s.Edit != nil:
		*w = w.Apply(*s.Edit)
		if err := errors.Join(g.edit(*w, *s.Edit), g.r.Apply()); err != nil {
			return err
		}
		state.Edited(*w)
	case s.Restart:
		before := g.r
		if err := g.restart(); err != nil {
			return err
		}
		g.r.SetHostAddresses(w.Host.Addresses)
		g.r.SetForeign(foreign(before))
		if err := g.r.SetPrefixes(w.Prefixes); err != nil {
			return err
		}
		g.r.Set(before.desired, nil)
		return g.r.Apply()
	case s.Sweep:
		return g.sweep()
	case s.Forget:
		state.Forget()
		return g.forget()
	case s.Age > 0:
		state.Age(s.Age)
		return g.ageAffinity(s.Age)
	case s.Reply:
		reply, hairpin := state.ReplyTo(*s.Packet)
		var got model.Result
		if hairpin || s.Way < 2 { // at ingress, too, for it passes both
			if got, err = g.run("pod_in", reply); err == nil {
				err = state.Packet(*w, reply, model.Pod, time.Since(g.start), got)
			}
		} else if got, err = g.run([]string{"pod_out", "node_out"}[s.Way%2], reply); err == nil {
			err = state.Egress(reply, got)
		}
		count(outcomes, got)
	case s.Packet != nil:
		program := "node_in"
		if s.From == model.Pod {
			program = []string{"pod_in", "port_in"}[s.Way%2]
		}
		var got model.Result
		if got, err = g.run(program, *s.Packet); err == nil {
			err = state.Packet(*w, *s.Packet, s.From, time.Since(g.start), got)
		}
		count(outcomes, got)
	}
	return err
}

// sweep frees the backends that no flow names.
func (g *modelRig) sweep() error {
	named := map[uint32]bool{}
	note := func(_ maps.Tuple, f maps.Flow) { named[f.Backend] = true }
	g.r.BeginSweep()
	err := errors.Join(entries(g.m.All()["flows"], note), entries(g.m.All()["pending"], note))
	g.r.EndSweep(func(id uint32) bool { return named[id] })
	return errors.Join(err, g.r.Apply())
}

func foreign(r *Reconciler) map[netip.Addr]bool {
	all := map[netip.Addr]bool{}
	for a := range r.foreign {
		all[a] = true
	}
	return all
}

func count(outcomes map[string]int, got model.Result) {
	if outcomes != nil {
		outcomes[fmt.Sprintf("%s (%s)", got.Action, got.Reason)]++
	}
}

func (g *modelRig) ageAffinity(by time.Duration) error {
	m := g.m.All()["affinity"]
	all := map[maps.AffinityKey]maps.Affinity{}
	err := entries(m, func(k maps.AffinityKey, a maps.Affinity) { all[k] = a })
	for k, a := range all {
		a.LastUsedNs -= uint64(by)
		err = errors.Join(err, m.Put(k, a))
	}
	return err
}

// sameAsFresh holds that the maps say what they would if only the world as it is now had ever been.
func (g *modelRig) sameAsFresh(w model.World, r *rand.Rand) error {
	if name, err := g.reason(); name != "none" || err != nil {
		return fmt.Errorf("a packet was counted twice, also as %s (%v)", name, err)
	}
	edited, err := g.dump()
	if err != nil {
		return err
	}
	if err := g.begin(w, r); err != nil {
		return fmt.Errorf("begin anew: %w", err)
	}
	fresh, err := g.dump()
	if err == nil && edited != fresh {
		err = fmt.Errorf("after all edits the maps are not as after a fresh start (-fresh +edited):\n%s", cmp.Diff(fresh, edited))
	}
	return err
}

// dump is the maps once no flow holds a removed backend.
func (g *modelRig) dump() (string, error) {
	g.r.BeginSweep()
	g.r.EndSweep(func(uint32) bool { return false })
	if err := g.r.Apply(); err != nil {
		return "", err
	}
	c, err := read(g.m)
	return c.String(), errors.Join(err, c.check())
}

// ---- one packet ----

const (
	modelPass     = math.MaxUint32 // TC_ACT_UNSPEC
	modelDrop     = 2              // TC_ACT_SHOT
	modelSentBack = 7              // TC_ACT_REDIRECT
)

func frameOf(p model.Packet) testenv.Packet {
	f := testenv.Packet{Source: p.From, Destination: p.To, Protocol: p.Protocol, TTL: 64, Payload: []byte("payload")}
	switch p.Protocol {
	case model.TCP:
		f.TCPFlags, f.Seq, f.Ack, f.Window = p.Flags, 1000, 2000, 65535
	case model.ICMP:
		f.ICMPType, f.ICMPRest = 8, 0x12340001
	case model.ICMPv6:
		f.ICMPType, f.ICMPRest = 128, 0x12340001
	}
	return f
}

// run sends a packet through a program and reads what became of it, every byte.
func (g *modelRig) run(program string, p model.Packet) (model.Result, error) {
	if g.rejects > 4 { // the limit is no rule of Services
		g.rejects = 0
		if err := g.limits.Put(uint32(0), make([]limit, ebpf.MustPossibleCPU())); err != nil {
			return model.Result{}, err
		}
	}
	in := frameOf(p).Bytes()
	if program != "port_in" || p.From.Port()%2 == 0 { // at the port of a bridge, frames for any host are looked at
		clear(in[:6]) // the address of the loopback device, by which a test's packets come
	}
	opts := ebpf.RunOptions{Data: in, DataOut: g.out}
	verdict, err := g.programs[program].Run(&opts)
	if err != nil {
		return model.Result{}, err
	}
	out := opts.DataOut
	got := model.Result{}
	if got.Reason, err = g.reason(); err != nil {
		return got, err
	}
	switch verdict {
	case modelDrop:
		got.Action = model.Dropped
		return got, nil
	case modelPass:
		if bytes.Equal(in[14:], out[14:]) && !slices.Contains([]string{"new_flow", "forward", "reply"}, got.Reason) {
			got.Action = model.Untouched
			return got, nil
		}
	case modelSentBack:
	default:
		return got, fmt.Errorf("verdict %d (%s)", int32(verdict), got.Reason)
	}
	to, err := testenv.Parse(out)
	if err == nil {
		err = testenv.CheckSums(out)
	}
	if err != nil {
		return got, fmt.Errorf("it became (%s) %s: %w", got.Reason, testenv.Describe(out), err)
	}
	got.From, got.To = to.Source, to.Destination
	back := to.Source.Addr() == p.To.Addr() && to.Destination.Addr() == p.From.Addr()
	switch {
	case verdict == modelSentBack && back && (p.Protocol == model.ICMP || p.Protocol == model.ICMPv6) && to.ICMPType != 3 && to.ICMPType != 1:
		got.Action = model.Echoed
		want := frameOf(model.Packet{From: p.To, To: p.From, Protocol: p.Protocol})
		want.ICMPType = map[uint8]uint8{model.ICMP: 0, model.ICMPv6: 129}[p.Protocol]
		err = same(want, out, "echo reply")
	case verdict == modelSentBack && back:
		got.Action = model.Rejected
		g.rejects++
		err = rejection(p, in, to)
	default:
		got.Action = model.Translated
		want := frameOf(model.Packet{From: to.Source, To: to.Destination, Protocol: p.Protocol, Flags: p.Flags})
		if verdict == modelSentBack {
			want.TTL--
		}
		err = same(want, out, "translated packet")
	}
	return got, err
}

// same compares all that is behind the Ethernet header.
func same(want testenv.Packet, got []byte, what string) error {
	if w := want.Bytes(); !bytes.Equal(w[14:], got[14:]) {
		return fmt.Errorf("the %s is %s; want %s\n%s", what, testenv.Describe(got), testenv.Describe(w), cmp.Diff(w[14:], got[14:]))
	}
	return nil
}

// rejection holds that a packet is what refuses p: a reset, or port unreachable, which quotes it.
func rejection(p model.Packet, in []byte, got testenv.Packet) error {
	if p.Protocol == model.TCP {
		fits := got.Protocol == model.TCP && got.Source == p.To && got.Destination == p.From
		if p.Flags&model.ACK != 0 {
			fits = fits && got.TCPFlags == model.RST && got.Seq == 2000
		} else {
			segment := uint32(len("payload"))
			if p.Flags&model.SYN != 0 {
				segment++
			}
			fits = fits && got.TCPFlags == model.RST|model.ACK && got.Ack == 1000+segment
		}
		if !fits {
			return fmt.Errorf("it is refused by %s, which is no such reset", testenv.Describe(got.Bytes()))
		}
		return nil
	}
	kind, code := uint8(3), uint8(3)
	if p.From.Addr().Is6() {
		kind, code = 1, 4
	}
	if got.ICMPType != kind || got.ICMPCode != code || len(got.Payload) < 28 || !bytes.HasPrefix(in[14:], got.Payload) {
		return fmt.Errorf("it is refused by %s, which is no port unreachable about it", testenv.Describe(got.Bytes()))
	}
	return nil
}

type limit struct{ LastNs, Tokens uint64 } // how many ICMP errors a CPU may send

// reason returns the one that has been counted since the last packet.
func (g *modelRig) reason() (string, error) {
	var cpus []uint64
	for i, id := range g.recent {
		if err := g.reasons.Lookup(id, &cpus); err != nil {
			return "", err
		}
		n := uint64(0)
		for _, c := range cpus {
			n += c
		}
		if n == g.counts[id] {
			continue
		}
		if n != g.counts[id]+1 {
			return "", fmt.Errorf("reason %s is counted %d times", maps.EnumName("reason", uint64(id)), n-g.counts[id])
		}
		g.counts[id] = n
		copy(g.recent[1:i+1], g.recent[:i])
		g.recent[0] = id
		return reasonNames()[id], nil
	}
	return "none", nil
}

var reasonNames = sync2.OnceValue(func() (names []string) {
	for id := range 256 {
		names = append(names, maps.EnumName("reason", uint64(id)))
	}
	return names
})

// ---- shrinking ----

// shrink returns the least of a world and its steps that it finds and that still fails.
func (g *modelRig) shrink(w model.World, steps []model.Step) (model.World, []model.Step) {
	fails := func(w model.World, steps []model.Step) bool { return g.play(w, steps, nil) != nil }
	deadline := time.Now().Add(*modelShrink)
	for smaller := true; smaller && time.Now().Before(deadline); {
		smaller = false
		for size := len(steps); size > 0; size /= 2 {
			for at := len(steps) - size; at >= 0 && time.Now().Before(deadline); at -= size {
				if less := slices.Delete(slices.Clone(steps), at, at+size); fails(w, less) {
					steps, smaller = less, true
					at = min(at, len(steps))
				}
			}
		}
		for _, less := range model.Smaller(w, steps) {
			if time.Now().After(deadline) {
				break
			}
			ww, ss := less(w, steps)
			if len(ww.String())+len(printed(ss)) < len(w.String())+len(printed(steps)) && fails(ww, ss) {
				w, steps, smaller = ww, ss, true
			}
		}
	}
	return w, steps
}
