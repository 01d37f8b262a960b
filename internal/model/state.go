// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Result is what became of a packet.
type Result struct {
	Action   Action
	From, To netip.AddrPort // of the packet as it went on, where it did
	Reason   string
}

func (r Result) String() string {
	if r.Action == Translated {
		return fmt.Sprintf("%s to %s > %s (%s)", r.Action, r.From, r.To, r.Reason)
	}
	return fmt.Sprintf("%s (%s)", r.Action, r.Reason)
}

// String is the packet in one line.
func (p Packet) String() string {
	switch p.Protocol {
	case TCP:
		flags := ""
		for _, f := range []struct {
			flag uint8
			name string
		}{{SYN, " SYN"}, {ACK, " ACK"}, {RST, " RST"}} {
			if p.Flags&f.flag != 0 {
				flags += f.name
			}
		}
		return fmt.Sprintf("%s > %s TCP%s", p.From, p.To, flags)
	case UDP:
		return fmt.Sprintf("%s > %s UDP", p.From, p.To)
	case ICMP, ICMPv6:
		return fmt.Sprintf("%s > %s echo request", p.From.Addr(), p.To.Addr())
	}
	return fmt.Sprintf("%s > %s protocol %d", p.From.Addr(), p.To.Addr(), p.Protocol)
}

// String is the expectation in one line.
func (e Expectation) String() string {
	if e.Action == Translated {
		return fmt.Sprintf("%s to one of %v %v", e.Action, e.Backends, e.Reasons)
	}
	return fmt.Sprintf("%s %v", e.Action, e.Reasons)
}

// State is what was there before a packet: flows, and who has which endpoint by affinity. Which endpoint of those
// allowed is chosen is a secret of the data plane's hash, so State learns it from what is seen, and holds the data
// plane to it from then on. The zero State is not of use: see NewState.
type State struct {
	Hairpin  [2]netip.Addr // what a pod that is its own endpoint sees as its client, IPv4 and IPv6
	flows    map[tuple]*flow
	replies  map[tuple]*flow // by what their replies are
	affinity map[client]*record
	choices  map[choice]netip.AddrPort
	backends map[vip]bool // all that ever were
}

type tuple struct {
	from, to netip.AddrPort
	protocol uint8
}

func (t tuple) inverse() tuple { return tuple{t.to, t.from, t.protocol} }

// flow is a tuple and what it has become.
type flow struct {
	t, u    tuple
	service Service
	direct  bool // straight to a backend's own address
	hairpin bool
	// broken: its endpoint or its service was away for a time, or it was reset. Whether it is the same one that is
	// back is left to the data plane.
	broken bool
	// answered: its backend has spoken. assured: and then its client again. A connection that is not assured is not
	// established.
	answered, assured bool
	moved             bool // another flow has its tuple: replies on their way are still translated
}

type client struct {
	service Service
	addr    netip.Addr
}

type record struct {
	backend netip.AddrPort
	used    time.Duration
	broken  bool // as of a flow
}

type choice struct {
	service Service
	table   string
	by      tuple // affinity: of the client's address alone
}

// NewState returns the state in which there was nothing before.
func NewState(hairpin [2]netip.Addr) *State {
	return &State{
		Hairpin: hairpin, flows: map[tuple]*flow{}, replies: map[tuple]*flow{}, affinity: map[client]*record{}, choices: map[choice]netip.AddrPort{},
		backends: map[vip]bool{},
	}
}

// Forget says that all flows have expired.
func (s *State) Forget() {
	clear(s.flows)
	clear(s.replies)
}

// Age makes what affinity remembers older.
func (s *State) Age(by time.Duration) {
	for _, r := range s.affinity {
		r.used -= by
	}
}

// Edited says that the world has become another one; it has to be called for the first one, too.
func (s *State) Edited(w World) {
	w.addBackends(s.backends)
	type place struct {
		service Service
		at      netip.AddrPort
	}
	here, force := map[place]bool{}, map[Service]bool{}
	inForce := func(service Service) bool {
		is, known := force[service]
		if !known {
			is = w.inForce(service)
			force[service] = is
		}
		return is
	}
	away := func(service Service, at netip.AddrPort) bool {
		stays, known := here[place{service, at}]
		if !known {
			stays = w.keeps(service, at) && inForce(service)
			here[place{service, at}] = stays
		}
		return !stays
	}
	for _, f := range s.flows {
		f.broken = f.broken || !f.direct && away(f.service, f.u.to)
	}
	for c, r := range s.affinity {
		r.broken = r.broken || away(c.service, r.backend)
	}
	for c := range s.choices { // with affinity a service's identity counts, and one that was away has lost it
		if !inForce(c.service) {
			delete(s.choices, c)
		}
	}
}

// affinitySlack is how near to its timeout a record may be either.
const affinitySlack = 15 * time.Second

// Packet compares what became of a packet at ingress with what must, and remembers it.
func (s *State) Packet(w World, p Packet, from Side, now time.Duration, got Result) error {
	t := tuple{p.From, p.To, p.Protocol}
	if p.Protocol != TCP && p.Protocol != UDP {
		return s.fresh(w, p, from, now, got)
	}
	if f := s.flows[t]; f != nil {
		return s.known(f, w, p, from, now, got)
	}
	r := s.replies[t]
	switch {
	case r == nil:
		return s.fresh(w, p, from, now, got)
	case r.hairpin:
		r.answered = true
		return s.compare(got, Expectation{Action: Translated, Reasons: []string{"reply", "forward"}}, got.From == r.t.to && got.To == r.t.from)
	}
	// The reply of a flow goes to the stack as it is: it is translated behind it.
	err := s.compare(got, Expectation{Action: Untouched, Reasons: []string{"other_hook", "direct", "no_service"}}, true)
	if err != nil && r.moved {
		return s.fresh(w, p, from, now, got)
	}
	return err
}

// asItIs is what becomes of a packet of a flow that changes nothing.
var asItIs = Expectation{Action: Untouched, Reasons: []string{"direct", "new_direct", "no_service", "forward", "new_flow", "reply"}}

// known is a packet of a flow.
func (s *State) known(f *flow, w World, p Packet, from Side, now time.Duration, got Result) error {
	keep := Expectation{Action: Translated, Reasons: []string{"forward"}, Backends: []netip.AddrPort{f.u.to}}
	if f.broken {
		keep.Reasons = append(keep.Reasons, "new_flow")
	}
	same := got.From == f.u.from && got.To == f.u.to
	if f.u == f.t { // a direct one, or that of a VIP which is its own endpoint
		keep, same = asItIs, true
		if got.From == p.From && got.To == p.To {
			got.Action = Untouched
		}
	}
	c, ok := w.holder(vip{p.To, p.Protocol})
	// "established TCP": keeps flowing, whatever becomes of its endpoint. Design: SYNs look again as UDP does; what is
	// in `pending` is looked for where there is a frontend.
	if f.direct || p.Protocol == TCP && p.Flags&SYN == 0 {
		err := s.compare(got, keep, same)
		if err != nil && !ok && (!f.assured || f.broken || f.direct) {
			return s.fresh(w, p, from, now, got)
		}
		f.spoken(p)
		return err
	}
	// "UDP": endpoint gone or no longer serving, zero endpoints, Service, NodePort or targetPort changed: the very next
	// packet follows the new state. An endpoint that drains keeps its flows; edits of policy, affinity or weights move
	// none.
	stays := ok && c.name(family(p.To.Addr())) == f.service && w.keeps(f.service, f.u.to)
	if !stays {
		return s.fresh(w, p, from, now, got)
	}
	err := s.compare(got, keep, same)
	if err != nil && f.broken {
		return s.fresh(w, p, from, now, got)
	}
	f.spoken(p)
	return err
}

// spoken notes a packet of the client.
func (f *flow) spoken(p Packet) {
	if p.Flags&RST != 0 {
		f.broken = true
	} else if f.answered && (p.Protocol == UDP || p.Flags&ACK != 0) {
		f.assured = true
	}
}

// fresh is a packet that begins a flow, or would if there were somebody for it.
func (s *State) fresh(w World, p Packet, from Side, now time.Duration, got Result) error {
	e := w.Judge(p, from)
	t := tuple{p.From, p.To, p.Protocol}
	who := client{e.Service, p.From.Addr()}
	r := s.affinity[who]
	certain := r == nil // that nothing is remembered
	var errs []string
	// "sessionAffinity: ClientIP": the remembered endpoint must still be usable in the scope, else choose again. Does not
	// override Local or topology.
	if r != nil && e.Affinity > 0 && slices.Contains(e.Usable, r.backend) && now-r.used < e.Affinity+affinitySlack {
		has := e
		has.Action, has.Reasons, has.Backends = Translated, []string{"new_flow"}, []netip.AddrPort{r.backend}
		err := s.begun(w, p, has, now, got)
		if err == nil || !r.broken && now-r.used < e.Affinity-affinitySlack {
			return err
		}
		errs = append(errs, err.Error())
	} else if r != nil && e.Affinity > 0 {
		certain = true
	}
	if err := s.begun(w, p, e, now, got); err != nil {
		return fmt.Errorf("%s", strings.Join(append(errs, err.Error()), "\nor: "))
	}
	// The keyed hash: the same choice for the same tuple, while nothing has changed. With affinity, of the client's
	// address.
	if got.Action == Translated && e.Action == Translated && (certain || e.Affinity == 0) {
		key := choice{e.Service, e.Table, t}
		if e.Affinity > 0 {
			key.table, key.by = "by client "+key.table, tuple{from: netip.AddrPortFrom(p.From.Addr(), 0)}
		}
		if before, ok := s.choices[key]; ok && before != got.To {
			return fmt.Errorf("%s is chosen, and for the same packet it was %s", got.To, before)
		}
		s.choices[key] = got.To
	}
	return nil
}

// begun compares what became of a packet without a flow, and notes the flow that it has begun.
func (s *State) begun(w World, p Packet, e Expectation, now time.Duration, got Result) error {
	t := tuple{p.From, p.To, p.Protocol}
	u := t
	hairpin := false
	if e.Action == Translated && got.Reason == "new_direct" && slices.Contains(e.Backends, p.To) {
		got = Result{Action: Translated, From: p.From, To: p.To, Reason: "new_flow"} // a VIP that is its own endpoint
	}
	isSYN := p.Protocol == UDP || p.Flags&(SYN|ACK|RST) == SYN
	switch {
	case e.Action == Translated:
		u.to = got.To
		// "hairpin": a pod that is its own endpoint reaches itself through its Service, and sees an address of ours.
		if hairpin = got.To.Addr() == p.From.Addr(); hairpin {
			u.from = netip.AddrPortFrom(s.Hairpin[index(p.From.Addr())], p.From.Port())
		}
	case e.Action == Untouched && got.Action != Untouched && (p.Protocol == TCP || p.Protocol == UDP):
		// "direct traffic": both connections work, the newcomer's source port may be remapped.
		if !s.backends[vip{p.To, p.Protocol}] {
			return s.compare(got, e, true)
		}
		if p.Flags&RST != 0 && got.Action == Dropped && got.Reason == "stray_rst" {
			return nil
		}
	case e.Action == Untouched:
		if err := s.compare(got, e, true); err != nil {
			return err
		}
		if got.Reason != "new_direct" {
			return nil
		}
		if clash, maybe := s.clash(t, t); clash && !maybe {
			return fmt.Errorf("untouched, though another flow looks the same to the backend")
		}
		s.note(&flow{t: t, u: t, direct: true})
		return nil
	default:
		return s.compare(got, e, true)
	}
	// A segment in mid-stream cannot be given another port.
	if got.Action == Dropped && got.Reason == "tuple_taken" && !isSYN {
		backends := e.Backends
		if e.Action == Untouched {
			backends = []netip.AddrPort{p.To}
		}
		for _, b := range backends {
			u.to = b
			u.from = p.From
			if b.Addr() == p.From.Addr() && e.Action == Translated {
				u.from = netip.AddrPortFrom(s.Hairpin[index(p.From.Addr())], p.From.Port())
			}
			if clash, _ := s.clash(t, u); clash {
				return nil
			}
		}
	}
	clash, maybe := s.clash(t, u)
	reasons := e
	if e.Action == Untouched { // remapped
		reasons = Expectation{Action: Translated, Reasons: []string{"new_flow"}, Backends: []netip.AddrPort{p.To}}
	}
	fits := slices.Contains(reasons.Backends, got.To) && got.From.Addr() == u.from.Addr()
	if got.From.Port() == u.from.Port() {
		fits = fits && (!clash || maybe)
	} else {
		fits = fits && clash && isSYN
	}
	if err := s.compare(got, reasons, fits); err != nil {
		if clash {
			return fmt.Errorf("%w; another flow looks the same to the backend", err)
		}
		return err
	}
	u.from = got.From
	s.note(&flow{t: t, u: u, service: e.Service, hairpin: hairpin, direct: e.Action == Untouched})
	if e.Affinity > 0 {
		s.affinity[client{e.Service, p.From.Addr()}] = &record{backend: got.To, used: now}
	}
	return nil
}

func (s *State) note(f *flow) {
	if before := s.flows[f.t]; before != nil && before.u != f.u {
		before.moved = true
	}
	s.flows[f.t] = f
	s.replies[f.u.inverse()] = f
}

// clash is the row "two VIPs, one endpoint, one client port": it tells whether another flow looks like this one to
// its backend; maybe: or has, until a moment ago.
func (s *State) clash(t, u tuple) (clash, maybe bool) {
	other := s.replies[u.inverse()]
	if other != nil && other.t == t && !other.moved {
		other = nil
	}
	switch {
	case other != nil && other.t != t && !other.moved, u != t && s.flows[u] != nil:
		return true, false
	case u != t && s.replies[u] != nil:
		return true, s.replies[u].moved
	}
	return other != nil, true
}

// ReplyTo returns what comes back where a packet went: the reply of its flow's backend, if it has one. hairpin: it comes
// back by the ingress.
func (s *State) ReplyTo(p Packet) (reply Packet, hairpin bool) {
	f := s.flows[tuple{p.From, p.To, p.Protocol}]
	if f == nil {
		return Packet{From: p.To, To: p.From, Protocol: p.Protocol, Flags: ACK}, false
	}
	return Packet{From: f.u.to, To: f.u.from, Protocol: p.Protocol, Flags: ACK}, f.hairpin
}

// Egress compares what became of a packet at egress with what must.
func (s *State) Egress(p Packet, got Result) error {
	t := tuple{p.From, p.To, p.Protocol}
	f := s.replies[t]
	switch {
	case f == nil && s.flows[t] != nil, f != nil && f.hairpin:
		return s.compare(got, Expectation{Action: Untouched, Reasons: []string{"other_hook", "direct"}}, true)
	case f == nil:
		return s.compare(got, Expectation{Action: Untouched, Reasons: []string{"no_flow"}}, true)
	case f.moved && got.Action == Untouched:
		return nil
	}
	f.answered = true
	if f.u == f.t {
		if got.From == p.From && got.To == p.To {
			got.Action = Untouched
		}
		return s.compare(got, asItIs, true)
	}
	return s.compare(got, Expectation{Action: Translated, Reasons: []string{"reply"}, Backends: []netip.AddrPort{f.t.from}}, got.From == f.t.to && got.To == f.t.from)
}

func (s *State) compare(got Result, want Expectation, fits bool) error {
	if got.Action == want.Action && slices.Contains(want.Reasons, got.Reason) && (got.Action != Translated || fits) {
		return nil
	}
	return fmt.Errorf("%s; want %s", got, want)
}

// addBackends adds all endpoints, whatever they are good for.
func (w World) addBackends(to map[vip]bool) {
	for _, slice := range w.Slices {
		for _, p := range slice.Ports {
			for _, e := range slice.Endpoints {
				at := netip.AddrPortFrom(netip.MustParseAddr(e.Addresses[0]), uint16(deref(p.Port, 0)))
				to[vip{at, protocolOf(deref(p.Protocol, ""))}] = true
			}
		}
	}
	for _, p := range w.Pods {
		for _, ip := range podIPs(p) {
			for _, c := range p.Spec.Containers {
				for _, port := range c.Ports {
					if a, err := netip.ParseAddr(ip); err == nil {
						to[vip{netip.AddrPortFrom(a, uint16(port.ContainerPort)), protocolOf(port.Protocol)}] = true
					}
				}
			}
		}
	}
}

func index(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
