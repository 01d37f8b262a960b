// SPDX-License-Identifier: Apache-2.0

// Package reconcile makes the maps say what is desired: it gives services and backends their ids and ranges
// of slots, writes what is different in an order in which no packet meets half a change, and finds
// everything again in the maps after a restart. The maps are the state; what is kept beside them here is
// how to find one's way in them.
package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/lbagent/lbagent/balance"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// Reconciler writes the services of one node into its maps. It is the only one that writes there, and it is
// not safe for concurrent use: one goroutine makes all calls.
type Reconciler struct {
	maps  *maps.Maps
	sizes maps.Sizes
	grace func() error // maps.Grace, but for tests

	// What is desired.
	desired map[lb.ServiceName]lb.Service
	owners  map[lb.VIP]lb.ServiceName   // who of desired has a VIP
	dirty   map[lb.ServiceName]struct{} // those whose part of the maps may be another than what is desired
	hold    bool                        // keep what was restored and is not confirmed
	resumed bool                        // there may be such

	foreign       map[netip.Addr]struct{} // VIPs of another proxy
	hostAddresses map[netip.Addr]struct{}
	prefixes      []netip.Prefix // where ClusterIPs are, sorted

	// What the maps say.
	services   map[lb.ServiceName]*service
	frontends  map[lb.VIP]frontend  // all keys of the map, ADDRESS entries too
	identities int                  // how many of them are backends' own addresses
	vips       map[netip.Addr]vipAt // addresses that services are known by
	elsewhere  int                  // how many of them are ClusterIPs outside of prefixes
	backendsAt map[lb.VIP]int       // how many backends with an id are here; never 0
	removed    map[uint32]uint64    // REMOVED backends: how many sweeps had begun before
	former     map[endpoint]uint32  // the same by what they were
	serviceIDs idQueue              // free
	backendIDs idQueue              // free
	slots      slotAllocator
	ranges     int    // source ranges
	maxRanges  int    // how many the map has room for
	sweeps     uint64 // begun so far

	// What is still to be done. All of it stays until it is done, however many Applies that takes.
	addresses map[netip.Addr]struct{} // whose ADDRESS entry may be wrong
	unnamed   map[uint32]struct{}     // of removed, those that no flow names
	direct    map[lb.VIP]struct{}     // that may be IDENTITY and should not, or the reverse
	late      late
	repairs   []func() error // of what no agent of ours leaves behind
}

// late is what has to wait until no program can still use what it read before the switch of this Apply.
type late struct {
	ranges   []maps.SlotRange      // to be freed
	services map[*service]struct{} // whose backends are to get their states, or which are to end
	bumps    map[uint32]struct{}   // backends whose flows are to look again
}

// service is a service that has an id.
type service struct {
	name      lb.ServiceName
	id        uint32
	named     bool                      // service_names has it
	slots     [2]maps.SlotRange         // in force, by scope
	damaged   bool                      // the map has something else than slots in force, which must not stay
	backends  map[netip.AddrPort]uint32 // ids of those that are not REMOVED
	frontends map[lb.VIP]struct{}       // those that lead here
	ranges    map[netip.Prefix]bool     // source ranges in the map, and whether they are in force or have to go

	// Restored from the maps, and not confirmed since by being desired.
	kept         bool // the service itself
	keptBackends map[netip.AddrPort]lb.Backend
}

type frontend struct {
	service *service // nil: an ADDRESS or IDENTITY entry, or one that leads nowhere
	kind    lb.Kind
	flags   uint8 // of an ADDRESS entry
	kept    bool  // restored from the maps, and not confirmed since by being desired
}

// vipAt counts the frontends at an address that make it known as some Service's: of kinds ClusterIP, LoadBalancer
// and external. An address of a node's ports is the node's.
type vipAt struct {
	frontends  int // never 0
	clusterIPs int
	usable     int // that lead to services with slots in scope Cluster
}

var scopes = [2]balance.Scope{balance.Cluster, balance.Local}

// localPolicy are the flags of a policy by which flows choose in the scope Local.
const localPolicy = maps.InternalLocal | maps.ExternalLocal

// endpoint is what a backend is, under whatever id.
type endpoint struct {
	service uint32
	at      lb.VIP
}

// Stats are numbers of what is in the maps, and of what is still to be done.
type Stats struct {
	Services   int
	Frontends  int // with the entries of addresses
	Identities int // backends' own addresses that no service has for a frontend
	Backends   int // active and draining ones, and those still to be removed
	Removed    int // backends that are kept until no flow names them
	Pending    int // services, backends, addresses and prefixes that are not yet as desired
}

// Stats returns the numbers as of now, in constant time.
func (r *Reconciler) Stats() Stats {
	prefixes := 0
	if !r.prefixesWritten() {
		prefixes = 1
	}
	return Stats{
		Services:   len(r.services),
		Frontends:  len(r.frontends) - r.identities,
		Identities: r.identities,
		Backends:   int(r.sizes.Backends) - 1 - r.backendIDs.length - len(r.removed),
		Removed:    len(r.removed),
		Pending:    len(r.dirty) + len(r.direct) + len(r.unnamed) + len(r.late.services) + len(r.late.bumps) + len(r.addresses) + prefixes,
	}
}

// Set records that services are to become others, or to go; Apply writes it. No service is both changed and
// removed, and of all that are desired after a Set no two have the same VIP. The services are kept and must
// not be written to.
func (r *Reconciler) Set(changed map[lb.ServiceName]lb.Service, removed []lb.ServiceName) {
	for _, name := range removed {
		before, ok := r.desired[name]
		if !ok {
			continue
		}
		r.disown(before)
		delete(r.desired, name)
		r.dirty[name] = struct{}{}
		if s := r.services[name]; s != nil {
			s.keptBackends = nil
			for vip := range s.frontends {
				r.confirm(vip)
			}
		}
	}
	for name := range changed {
		r.disown(r.desired[name])
	}
	for name, svc := range changed {
		r.desired[name] = svc
		r.dirty[name] = struct{}{}
		for _, f := range svc.Frontends {
			r.own(f.VIP, name)
		}
		if s := r.services[name]; s != nil {
			s.kept = false
			for _, b := range svc.Backends {
				delete(s.keptBackends, b.Addr)
			}
		}
	}
}

// disown takes the VIPs of a service, as it was desired, away from it.
func (r *Reconciler) disown(before lb.Service) {
	for _, f := range before.Frontends {
		if r.owners[f.VIP] == before.Name {
			delete(r.owners, f.VIP)
			r.confirm(f.VIP)
		}
	}
}

func (r *Reconciler) own(vip lb.VIP, name lb.ServiceName) {
	r.owners[vip] = name
	r.confirm(vip)
}

// confirm makes a frontend follow what is desired, and has a look taken at whom it leads to now: that may be
// another service than the one that had or gets it.
func (r *Reconciler) confirm(vip lb.VIP) {
	f, ok := r.frontends[vip]
	if !ok || f.service == nil {
		return
	}
	f.kept = false
	r.frontends[vip] = f
	r.dirty[f.service.name] = struct{}{}
}

// SetForeign records which VIPs of another proxy's Services came (true) or went (false): what is sent there, and
// not to a frontend of ours, is left alone. Where a Service of ours has the address too, it decides.
func (r *Reconciler) SetForeign(changed map[netip.Addr]bool) {
	for addr, there := range changed {
		if there {
			r.foreign[addr] = struct{}{}
		} else {
			delete(r.foreign, addr)
		}
		r.confirmAddress(addr)
	}
}

// SetHostAddresses records all addresses that this node has: what is sent to one of them, and not to a frontend
// there, is left alone though it is a Service's address too, or in a prefix. It comes before the first Apply.
func (r *Reconciler) SetHostAddresses(all []netip.Addr) {
	before := r.hostAddresses
	r.hostAddresses = make(map[netip.Addr]struct{}, len(all))
	for _, addr := range all {
		r.hostAddresses[addr] = struct{}{}
		if _, ok := before[addr]; !ok {
			r.addresses[addr] = struct{}{}
		}
	}
	for addr := range before {
		if _, ok := r.hostAddresses[addr]; !ok {
			r.addresses[addr] = struct{}{}
		}
	}
}

// SetPrefixes records where ClusterIPs are. Until it is called, what the maps say of that stays. It returns an error,
// and changes nothing, if there are more than maps.MaxServicePrefixes.
func (r *Reconciler) SetPrefixes(all []netip.Prefix) error {
	sorted := make([]netip.Prefix, 0, len(all))
	for _, p := range all {
		sorted = append(sorted, p.Masked())
	}
	slices.SortFunc(sorted, netip.Prefix.Compare)
	sorted = slices.Compact(sorted)
	if len(sorted) > maps.MaxServicePrefixes {
		return fmt.Errorf("%d service prefixes are more than %d", len(sorted), maps.MaxServicePrefixes)
	}
	r.prefixes, r.elsewhere = sorted, 0
	for addr, at := range r.vips {
		if at.clusterIPs > 0 && !within(sorted, addr) {
			r.elsewhere++
		}
	}
	r.confirmOwn()
	return nil
}

// confirmOwn has a look taken at the node's own addresses: of those, prefixes decide.
func (r *Reconciler) confirmOwn() {
	for addr := range r.hostAddresses {
		r.addresses[addr] = struct{}{}
	}
}

// spared tells whether an address has an entry for no Service's sake: it is another proxy's, or the node's own and in
// a prefix, those that are still in force among them.
func (r *Reconciler) spared(addr netip.Addr) bool {
	if _, foreign := r.foreign[addr]; foreign {
		return true
	}
	if _, own := r.hostAddresses[addr]; !own {
		return false
	}
	inForce, _ := r.maps.ServicePrefixes()
	return within(r.prefixes, addr) || within(inForce, addr)
}

// within tells whether an address is in one of the prefixes.
func within(prefixes []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// confirmAddress is confirm for the ADDRESS entry of an address.
func (r *Reconciler) confirmAddress(addr netip.Addr) {
	if f, ok := r.frontends[addressVIP(addr)]; ok {
		f.kept = false
		r.frontends[addressVIP(addr)] = f
	}
	r.addresses[addr] = struct{}{}
}

// Hold(true) says that there are sources which could not read all of what they have since the agent started,
// so that what is in the maps may be desired though nobody says so. Until Hold(false), services, frontends
// and backends that were found in the maps stay beside what is desired. Each stays only until it is desired
// once, or its VIP by another service; from then on it goes when it is desired no more. After the first
// Apply without hold nothing is left that could be held.
func (r *Reconciler) Hold(hold bool) { r.hold = hold }

// BeginSweep says that a walk of the flow tables begins. Until EndSweep no other may begin.
func (r *Reconciler) BeginSweep() { r.sweeps++ }

// EndSweep says that the walk is over, and which backends the living flows name that it has met. Of the others,
// those that were removed before it began are named by none: the next Apply frees their ids. It returns how
// many there are.
func (r *Reconciler) EndSweep(named func(id uint32) bool) int {
	for id, before := range r.removed {
		if before < r.sweeps && !named(id) {
			r.unnamed[id] = struct{}{}
		}
	}
	return len(r.unnamed)
}

// freeBackends frees the ids of removed backends that no flow names.
func (r *Reconciler) freeBackends() error {
	var errs []error
	for _, id := range sorted(r.unnamed, cmp.Compare[uint32]) {
		b := r.maps.Backend(id)
		b.Life.State = maps.BackendFree
		if err := r.maps.SetBackendLife(id, b.Life); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(r.unnamed, id)
		delete(r.removed, id)
		if was := (endpoint{b.Service, b.VIP()}); r.former[was] == id {
			delete(r.former, was)
		}
		r.unref(b.VIP())
		r.backendIDs.push(id)
	}
	return errors.Join(errs...)
}

// release gives up what was restored and nobody desired.
func (r *Reconciler) release() {
	if !r.resumed {
		return
	}
	r.resumed = false
	for name, s := range r.services {
		if s.kept || len(s.keptBackends) > 0 {
			s.kept, s.keptBackends = false, nil
			r.dirty[name] = struct{}{}
		}
	}
	for vip, f := range r.frontends {
		switch {
		case f.kept && f.kind == lb.Address:
			r.confirmAddress(vip.Addr)
		case f.kept:
			r.confirm(vip)
		}
	}
}

// wanted returns what a service is to be now, and false where there is to be no such service. What was restored and
// is not confirmed is as the maps have it; how many slots a kept backend has beside confirmed ones, they do not
// tell, so that is as if all weights were 1.
func (r *Reconciler) wanted(name lb.ServiceName) (lb.Service, bool) {
	svc, ok := r.desired[name]
	s := r.services[name]
	if s == nil {
		return svc, ok
	}
	if s.kept {
		policy := r.maps.Service(s.id).Policy
		svc = lb.Service{
			Name:          name,
			InternalLocal: policy.Flags&maps.InternalLocal != 0,
			ExternalLocal: policy.Flags&maps.ExternalLocal != 0,
			Affinity:      time.Duration(policy.AffinityTimeoutS) * time.Second,
		}
		if policy.Flags&maps.HasSourceRanges != 0 {
			svc.SourceRanges = sorted(s.ranges, netip.Prefix.Compare)
		}
	}
	if len(s.keptBackends) > 0 {
		svc.Backends = slices.Clone(svc.Backends)
		for _, b := range s.keptBackends {
			svc.Backends = append(svc.Backends, b)
		}
		slices.SortFunc(svc.Backends, func(a, b lb.Backend) int { return a.Addr.Compare(b.Addr) })
	}
	if r.guarded(s) {
		svc.SourceRanges = []netip.Prefix{}
		for _, p := range sorted(s.ranges, netip.Prefix.Compare) {
			if s.ranges[p] {
				svc.SourceRanges = append(svc.SourceRanges, p)
			}
		}
	}
	return svc, ok || s.kept || len(s.keptBackends) > 0
}

// guarded tells whether source ranges stay in force though the service that is desired has none: it has no load
// balancer address any more, and so none to guard, but one still leads to it, which would be open to all.
func (r *Reconciler) guarded(s *service) bool {
	svc := r.desired[s.name]
	return !s.kept && svc.SourceRanges == nil && r.maps.Service(s.id).Policy.Flags&maps.HasSourceRanges != 0 && r.balances(s) &&
		!svc.Has(lb.LoadBalancer)
}

// balances tells whether an address of a load balancer leads to a service.
func (r *Reconciler) balances(s *service) bool {
	for vip := range s.frontends {
		if r.frontends[vip].kind == lb.LoadBalancer {
			return true
		}
	}
	return false
}

// policyOf returns the policy of a service as the maps have it.
func policyOf(svc lb.Service) maps.Policy {
	p := maps.Policy{AffinityTimeoutS: uint32(svc.Affinity / time.Second)}
	if svc.InternalLocal {
		p.Flags |= maps.InternalLocal
	}
	if svc.ExternalLocal {
		p.Flags |= maps.ExternalLocal
	}
	if svc.SourceRanges != nil {
		p.Flags |= maps.HasSourceRanges
	}
	return p
}

// tableOf returns the slots that a service is to have in a scope, as indices into its backends.
func tableOf(svc lb.Service, scope balance.Scope) []int {
	if scope == balance.Local && policyOf(svc).Flags&localPolicy == 0 {
		return nil
	}
	return balance.Table(svc.Backends, scope, svc.Algorithm)
}

// Apply writes what is different, at a cost that depends on what changed and not on what there is. What
// fails is in the error, and is tried again by the next Apply; everything else is in force. So after an
// error call it again, though nothing may have changed: what a service lacks room for may have been freed.
//
// The agent may die between any two writes, since what a packet can meet is right after each:
//
//  1. New backends, and the scopes in which backends become usable, are written before slots name them; new slots
//     where no service refers to. A client that session affinity brings may come to such a backend some writes
//     before the slots do.
//  2. A service gets its name, then source ranges in addition to those that it has: they let in who was let in
//     before, or is to be. Only now a policy may say that there are any. Where the last address that they guard goes,
//     it goes on saying so until the grace period has ended.
//  3. The slots of each scope, and the policy, are replaced by one store each (newSlots and switchService say in
//     which order). What they replace is still there: slots, source ranges, and backends usable in all scopes of
//     before and after. No flow has to look again: a policy, an algorithm and weights are about new ones.
//  4. A frontend is written when its service has its slots, and after the entry of its address, which says what
//     becomes of its other ports (of an address that another proxy had, or is to have, nothing as long as some
//     of the frontends are there); and before that entry makes a ClusterIP, it is said that there are some outside of
//     the prefixes, if there are, or nobody would look for it. A frontend that goes from a service to another is
//     overwritten: at any time it leads to one of them.
//  5. Frontends are deleted, then the entries of addresses that nothing is left at, then the slots of services that
//     nothing leads to any more are taken away. Prefixes are written once all addresses have their entries: what is
//     sent to an address in a prefix without one is dropped.
//  6. After a grace period nobody who begins a flow knows the old slots, policies and frontends. Only now flows are
//     told to look again, by the generation of their backend: one that began meanwhile by the old slots
//     would get the new generation otherwise, and be valid for ever. Then go source ranges, scopes of backends, slots
//     of the scope Local without a policy that needs them; and services' ids and slots become free.
//  7. A removed backend keeps id and address, for its connections go on. A sweep that begins now and meets none
//     frees them (BeginSweep), by the first writes of an Apply.
//
// A backend's own address is IDENTITY among the frontends while the backend has an id, unless a service has a
// frontend there; from one to the other it goes by one overwrite. When it is written matters little: what a
// client does meanwhile straight to the backend, without a flow, is what it always did.
//
// Whoever starts then finds services and backends that nothing leads to, which are removed like any other
// that is not desired, and source ranges and slots that no policy needs, which go when their service is written;
// New takes care of generations that a dying agent still had to raise.
func (r *Reconciler) Apply() error {
	if !r.hold {
		r.release()
	}
	names := sorted(r.dirty, lb.ServiceName.Compare)
	r.dirty = map[lb.ServiceName]struct{}{} // a map never shrinks, and this one held everything once

	errs := []error{r.freeBackends()}
	failed := func(name lb.ServiceName, err error) bool {
		if err != nil {
			r.dirty[name] = struct{}{}
			errs = append(errs, fmt.Errorf("service %s: %w", name, err))
		}
		return err != nil
	}
	reserved := map[lb.VIP]struct{}{}
	for vip := range r.direct { // what an earlier Apply could not write
		if _, there := r.frontends[vip]; !there && r.backendsAt[vip] > 0 {
			reserved[vip] = struct{}{}
		}
	}
	for addr := range r.addresses {
		if _, there := r.frontends[addressVIP(addr)]; !there && r.spared(addr) {
			reserved[addressVIP(addr)] = struct{}{}
		}
	}
	names = slices.DeleteFunc(names, func(name lb.ServiceName) bool {
		err := r.writeService(name, reserved)
		if s := r.services[name]; err != nil && s != nil {
			r.late.services[s] = struct{}{} // what an earlier Apply left may be what it lacks now
		}
		return failed(name, err)
	})
	for _, name := range names {
		failed(name, r.writeFrontends(name))
	}
	for _, name := range names {
		failed(name, r.deleteFrontends(name))
	}
	errs = append(errs, r.fixAddresses(), r.fixPrefixes())
	for _, name := range names {
		failed(name, r.endService(name))
	}
	errs = append(errs, r.finish(), r.fixIdentities())
	return errors.Join(errs...)
}

// writeService writes backends, slots, name, source ranges and policy of a service that is desired, and switches it
// to them. What could run out is looked at before the first write: then the service stays what it was, frontends
// included. Keys of frontends that it will need are added to reserved.
func (r *Reconciler) writeService(name lb.ServiceName, reserved map[lb.VIP]struct{}) error {
	s := r.services[name]
	svc, ok := r.wanted(name)
	if !ok {
		return nil
	}
	wireName, err := maps.NameOf(name)
	if err != nil {
		return err
	}
	if s == nil {
		s = &service{
			name: name, id: r.serviceIDs.oldest(), backends: map[netip.AddrPort]uint32{},
			frontends: map[lb.VIP]struct{}{}, ranges: map[netip.Prefix]bool{},
		}
		if s.id == 0 {
			return fmt.Errorf("all %d service ids are taken (--max-services)", r.sizes.Services-1)
		}
	}
	created := 0
	for _, b := range svc.Backends {
		_, there := s.backends[b.Addr]
		_, kept := r.former[endpoint{s.id, ownVIP(name, b.Addr)}]
		if !there && !kept {
			created++
		}
	}
	if free := r.backendIDs.length; created > free {
		kept := ""
		if len(r.removed) > 0 {
			kept = fmt.Sprintf(", %d are kept for connections to removed backends", len(r.removed))
		}
		return fmt.Errorf("%d more backends, and %d of %d ids are free%s (--max-backends)", created, free, r.sizes.Backends-1, kept)
	}
	if more, free := r.newRanges(s, svc), r.maxRanges-r.ranges; more > free {
		return fmt.Errorf("%d more source ranges, and %d of %d are free", more, free, r.maxRanges)
	}
	keys, own := r.newKeys(name, svc.Backends, reserved)
	for _, vip := range keys {
		reserved[vip] = struct{}{}
	}
	if free := int(r.sizes.Frontends) - len(r.frontends) - len(reserved); free < 0 && len(keys) > 0 {
		for _, vip := range keys {
			delete(reserved, vip)
		}
		return fmt.Errorf("%d more frontends and %d more addresses of backends, and %d of %d are free (--max-frontends)",
			len(keys)-own, own, free+len(keys), r.sizes.Frontends)
	}
	next, err := r.newSlots(s, svc)
	if err != nil {
		return err
	}

	if r.services[name] == nil {
		if err := r.clearStats(s.id); err != nil {
			r.free(next)
			return err
		}
		r.serviceIDs.remove(s.id)
		r.services[name] = s
	}
	if err := r.switchService(s, svc, wireName, next); err != nil {
		r.free(next)
		return err
	}
	if !r.settled(s, svc) {
		r.late.services[s] = struct{}{}
	}
	return nil
}

// clearStats makes the statistics of a service id those of its new owner. No program adds to them any more: the
// id was freed after a grace period.
func (r *Reconciler) clearStats(id uint32) error {
	if r.maps.ServiceStats(id) == (maps.ServiceStats{}) {
		return nil
	}
	return r.maps.ClearServiceStats(id)
}

// nextSlots are the slots that a service is to be switched to in one scope.
type nextSlots struct {
	scope balance.Scope
	table []int          // indices into its backends
	slots maps.SlotRange // for the table; taken
}

// newSlots takes slots for those scopes of a service whose table is another than the one in force. They are in the
// order in which the service is to be switched to them, so that at no time a flow of the scope Local is dropped for
// want of a backend which before or after is served, or refused: that depends on whether there are slots in the
// scope Cluster.
//
// Slots of the scope Local that no policy needs stay until the grace period has ended. Those of a service that is
// kept are right, unless they are damaged.
func (r *Reconciler) newSlots(s *service, svc lb.Service) ([]*nextSlots, error) {
	var all []*nextSlots
	for _, scope := range scopes {
		table := tableOf(svc, scope)
		idle := scope == balance.Local && policyOf(svc).Flags&localPolicy == 0
		if !s.damaged && (s.kept || idle || r.inForce(s, scope, svc.Backends, table)) {
			continue
		}
		next := &nextSlots{scope: scope, table: table}
		if len(table) > 0 {
			var ok bool
			if next.slots, ok = r.slots.alloc(uint32(len(table))); !ok {
				r.free(all)
				return nil, fmt.Errorf("no range of %d slots is free (--max-slots)", len(table))
			}
		}
		all = append(all, next)
	}
	if len(all) == 2 && len(all[1].table) > 0 {
		slices.Reverse(all)
	}
	return all, nil
}

// free gives back slots that no service was switched to.
func (r *Reconciler) free(next []*nextSlots) {
	for _, n := range next {
		if n.slots.Count > 0 {
			r.slots.release(n.slots)
		}
	}
}

// switchService writes a service: first what nothing refers to, then the slots and the policy. A policy that needs
// slots of the scope Local comes after them, and one that does not before, since those slots are not followed up
// then. In between a packet finds new endpoints with the old policy, or the reverse, as if they had changed one
// after the other.
func (r *Reconciler) switchService(s *service, svc lb.Service, name maps.ServiceName, next []*nextSlots) error {
	if err := r.writeBackends(s, svc.Backends); err != nil {
		return err
	}
	for _, n := range next {
		ids := make([]uint32, len(n.table))
		for i, at := range n.table {
			ids[i] = s.backends[svc.Backends[at].Addr]
		}
		if len(ids) == 0 {
			continue
		}
		if err := r.maps.SetSlots(n.slots.First, ids); err != nil {
			return err
		}
	}
	if !s.named {
		if err := r.maps.SetServiceName(s.id, name); err != nil {
			return err
		}
		s.named = true
	}
	if err := r.writeRanges(s, svc); err != nil {
		return err
	}
	policy := policyOf(svc)
	if policy.Flags&localPolicy == 0 {
		if err := r.setPolicy(s, policy, svc.SourceRanges); err != nil {
			return err
		}
	}
	for _, n := range next {
		if err := r.setSlots(s, n.scope, n.slots); err != nil {
			return err
		}
		n.slots = maps.SlotRange{} // it is the service's
	}
	s.damaged = false
	return r.setPolicy(s, policy, svc.SourceRanges)
}

// setPolicy is the switch of a policy, and with it of the source ranges that are in force; the others have to go.
func (r *Reconciler) setPolicy(s *service, policy maps.Policy, ranges []netip.Prefix) error {
	if r.maps.Service(s.id).Policy != policy {
		if err := r.maps.SetServicePolicy(s.id, policy); err != nil {
			return err
		}
	}
	r.confirmRanges(s, ranges)
	return nil
}

// newRanges returns how many source ranges a service needs that the map does not have.
func (r *Reconciler) newRanges(s *service, svc lb.Service) int {
	n := 0
	for _, p := range svc.SourceRanges {
		if _, there := s.ranges[p]; !there {
			n++
		}
	}
	return n
}

// writeRanges adds the source ranges of a service. Where it has some in force, clients of both are let in until those
// that go are deleted: none is refused that was not before, and is not after.
func (r *Reconciler) writeRanges(s *service, svc lb.Service) error {
	for _, p := range svc.SourceRanges {
		if _, there := s.ranges[p]; there {
			continue
		}
		if err := r.maps.SetSourceRange(s.id, p); err != nil {
			return err
		}
		s.ranges[p] = false // until the switch
		r.ranges++
	}
	return nil
}

// confirmRanges notes which source ranges of a service are in force.
func (r *Reconciler) confirmRanges(s *service, inForce []netip.Prefix) {
	for p := range s.ranges {
		s.ranges[p] = false
	}
	for _, p := range inForce {
		s.ranges[p] = true
	}
}

// deleteRanges deletes the source ranges of a service that have to go.
func (r *Reconciler) deleteRanges(s *service) error {
	var errs []error
	for _, p := range sorted(s.ranges, netip.Prefix.Compare) {
		if s.ranges[p] {
			continue
		}
		if err := r.maps.DeleteSourceRange(s.id, p); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(s.ranges, p)
		r.ranges--
	}
	return errors.Join(errs...)
}

// newKeys returns the keys of frontends that a service needs, the map does not have, and nobody reserved; `own`
// of them are for addresses of its backends.
func (r *Reconciler) newKeys(name lb.ServiceName, backends []lb.Backend, reserved map[lb.VIP]struct{}) (keys []lb.VIP, own int) {
	need := func(vip lb.VIP) {
		_, there := r.frontends[vip]
		_, soon := reserved[vip]
		if !there && !soon {
			keys = append(keys, vip)
		}
	}
	for _, f := range r.desired[name].Frontends {
		if r.owners[f.VIP] == name {
			need(f.VIP)
			if makesKnown(f.Kind) {
				need(addressVIP(f.VIP.Addr))
			}
		}
	}
	slices.SortFunc(keys, lb.VIP.Compare)
	keys = slices.Compact(keys)
	frontends := keys
	for _, b := range backends { // no two of them have one address
		vip := ownVIP(name, b.Addr)
		if _, among := slices.BinarySearchFunc(frontends, vip, lb.VIP.Compare); r.backendsAt[vip] == 0 && !among {
			before := len(keys)
			need(vip)
			own += len(keys) - before
		}
	}
	return keys, own
}

// ownVIP is where a backend of a service is reached without the service.
func ownVIP(name lb.ServiceName, addr netip.AddrPort) lb.VIP {
	return lb.VIP{Addr: addr.Addr(), Port: addr.Port(), Protocol: name.Protocol}
}

// inForce tells whether the slots of a service in a scope are what a table says already.
func (r *Reconciler) inForce(s *service, scope balance.Scope, backends []lb.Backend, table []int) bool {
	if int(s.slots[scope].Count) != len(table) {
		return false
	}
	for i, id := range r.maps.Slots(s.slots[scope]) {
		if s.backends[backends[table[i]].Addr] != id {
			return false
		}
	}
	return true
}

// writeBackends makes every backend that is desired exist, and usable in each scope in which it is to be: all that
// has to be before slots can name them.
func (r *Reconciler) writeBackends(s *service, backends []lb.Backend) error {
	for _, b := range backends {
		id, ok := s.backends[b.Addr]
		if !ok {
			if err := r.addBackend(s, b); err != nil {
				return err
			}
			continue
		}
		life := r.maps.Backend(id).Life
		if more := withFlags(life, life.Flags|flagsOf(b)); more.Flags != 0 && more != life {
			if err := r.maps.SetBackendLife(id, more); err != nil {
				return err
			}
		}
	}
	return nil
}

// flagsOf returns the scopes in which a backend is to be usable.
func flagsOf(b lb.Backend) (flags uint8) {
	if b.Cluster {
		flags |= maps.BackendCluster
	}
	if b.Local {
		flags |= maps.BackendLocal
	}
	return flags
}

// withFlags returns the life of a backend that is usable in these scopes: in none, it drains.
func withFlags(life maps.BackendLife, flags uint8) maps.BackendLife {
	life.Flags, life.State = flags, maps.BackendActive
	if flags == 0 {
		life.State = maps.BackendDraining
	}
	return life
}

// addBackend gives a backend an id: the one that it had, if that is kept. In any case flows that name the id look
// again, and find whether they belong here. Address and service are written while the backend is FREE, so that no
// flow that names it, as none should, is compared with half of them.
func (r *Reconciler) addBackend(s *service, b lb.Backend) error {
	is := endpoint{s.id, ownVIP(s.name, b.Addr)}
	id, kept := r.former[is]
	if !kept {
		id = r.backendIDs.oldest()
		if err := r.maps.SetBackend(id, maps.BackendOf(s.id, is.at, r.maps.Backend(id).Life)); err != nil {
			return err
		}
		if r.maps.BackendStats(id) != (maps.BackendStats{}) {
			if err := r.maps.ClearBackendStats(id); err != nil {
				return err
			}
		}
	}
	life := withFlags(r.maps.Backend(id).Life, flagsOf(b))
	life.Generation++
	if err := r.maps.SetBackendLife(id, life); err != nil {
		return err
	}
	if kept {
		delete(r.former, is)
		delete(r.removed, id)
		delete(r.unnamed, id)
	} else {
		r.backendIDs.remove(id)
		r.ref(is.at)
	}
	s.backends[b.Addr] = id
	return nil
}

// ref notes that a backend here has an id, unref that it has one no more. Only damaged maps have one at the key
// of an ADDRESS entry.
func (r *Reconciler) ref(at lb.VIP) {
	if at == addressVIP(at.Addr) {
		return
	}
	r.backendsAt[at]++
	r.direct[at] = struct{}{}
}

func (r *Reconciler) unref(at lb.VIP) {
	if at == addressVIP(at.Addr) {
		return
	}
	r.direct[at] = struct{}{}
	if r.backendsAt[at]--; r.backendsAt[at] == 0 {
		delete(r.backendsAt, at)
	}
}

// setSlots is the switch of a scope. The range from before is freed after the grace period.
func (r *Reconciler) setSlots(s *service, scope balance.Scope, slots maps.SlotRange) error {
	set := r.maps.SetServiceCluster
	if scope == balance.Local {
		set = r.maps.SetServiceLocal
	}
	if err := set(s.id, slots); err != nil {
		return err
	}
	if before := s.slots[scope]; before.Count > 0 {
		r.late.ranges = append(r.late.ranges, before)
	}
	if scope == balance.Cluster {
		r.countUsable(s, -1)
	}
	s.slots[scope] = slots
	if scope == balance.Cluster {
		r.countUsable(s, 1)
	}
	return nil
}

// countUsable adds a service that has slots to the usable ones at its addresses, or takes it away.
func (r *Reconciler) countUsable(s *service, n int) {
	if s.slots[balance.Cluster].Count == 0 {
		return
	}
	for vip := range s.frontends {
		if makesKnown(r.frontends[vip].kind) {
			at := r.vips[vip.Addr]
			at.usable += n
			r.vips[vip.Addr] = at
			r.addresses[vip.Addr] = struct{}{}
		}
	}
}

// settled tells whether nothing of a service has to go after the grace period: no backend, no scope in which one is
// usable, no slots of the scope Local, no source range.
func (r *Reconciler) settled(s *service, svc lb.Service) bool {
	if len(s.backends) != len(svc.Backends) || !r.localIdle(s) || r.guarded(s) {
		return false
	}
	for _, b := range svc.Backends {
		id, ok := s.backends[b.Addr]
		if life := r.maps.Backend(id).Life; !ok || life != withFlags(life, flagsOf(b)) {
			return false
		}
	}
	for _, inForce := range s.ranges {
		if !inForce {
			return false
		}
	}
	return true
}

// localIdle tells whether a service has slots in the scope Local only if its policy needs them.
func (r *Reconciler) localIdle(s *service) bool {
	is := r.maps.Service(s.id)
	return is.Policy.Flags&localPolicy != 0 || is.Local == maps.SlotRange{}
}

// writeFrontends writes those frontends of a service that are not as desired.
func (r *Reconciler) writeFrontends(name lb.ServiceName) error {
	var errs []error
	s := r.services[name]
	for _, f := range r.desired[name].Frontends {
		is := r.frontends[f.VIP]
		if r.owners[f.VIP] != name || is.service == s && is.kind == f.Kind {
			continue
		}
		if makesKnown(f.Kind) {
			r.addresses[f.VIP.Addr] = struct{}{} // it goes again if the frontend cannot be written
			at := r.vips[f.VIP.Addr]
			at.count(s, f.Kind, 1)
			// One that another proxy had says more once all frontends are there: until then nothing is refused.
			write := r.writeAddress
			if is, there := r.frontends[addressVIP(f.VIP.Addr)]; there && is.flags == 0 {
				write = r.sayElsewhere
			}
			if err := write(f.VIP.Addr, at); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, r.putFrontend(f.VIP, frontend{service: s, kind: f.Kind}))
	}
	return errors.Join(errs...)
}

// deleteFrontends deletes those frontends that lead to a service and shall not.
func (r *Reconciler) deleteFrontends(name lb.ServiceName) error {
	s := r.services[name]
	if s == nil {
		return nil
	}
	_, stays := r.wanted(name)
	var gone []lb.VIP
	for vip := range s.frontends {
		owner, owned := r.owners[vip]
		switch {
		case owned && owner == name:
		case owned && stays: // its new owner could not take it yet, and will overwrite it when it can
		case !owned && r.frontends[vip].kept:
		default:
			gone = append(gone, vip) // even an owned one: its owner may lack just the ids that end here
		}
	}
	slices.SortFunc(gone, lb.VIP.Compare)
	var errs []error
	for _, vip := range gone {
		errs = append(errs, r.yieldAddress(vip.Addr), r.deleteFrontend(vip))
	}
	return errors.Join(errs...)
}

// putFrontend writes a frontend, in the place of any that is there.
func (r *Reconciler) putFrontend(vip lb.VIP, f frontend) error {
	id := uint32(0)
	if f.service != nil {
		id = f.service.id
	}
	value := maps.FrontendOf(id, f.kind)
	value.Flags = f.flags
	if err := r.maps.SetFrontend(maps.KeyOf(vip), value); err != nil {
		return err
	}
	r.forget(vip, f.service)
	r.remember(vip, f)
	return nil
}

// deleteFrontend deletes a frontend, or overwrites it where it is a backend's own address too.
func (r *Reconciler) deleteFrontend(vip lb.VIP) error {
	if r.backendsAt[vip] > 0 {
		return r.putFrontend(vip, frontend{kind: lb.Identity})
	}
	if err := r.maps.DeleteFrontend(maps.KeyOf(vip)); err != nil {
		return err
	}
	r.forget(vip, nil)
	return nil
}

// remember notes a frontend that the map has now.
func (r *Reconciler) remember(vip lb.VIP, f frontend) {
	r.frontends[vip] = f
	if f.kind == lb.Identity {
		r.identities++
	}
	if f.service != nil {
		f.service.frontends[vip] = struct{}{}
		r.countVIP(vip.Addr, f, 1)
	}
}

// forget notes that a frontend leads to another service now, or to none. Flows that came by it have to look
// again, and nobody knows which backends they have.
func (r *Reconciler) forget(vip lb.VIP, now *service) {
	f := r.frontends[vip]
	delete(r.frontends, vip)
	if f.kind == lb.Identity {
		r.identities--
	}
	if f.service == nil {
		return
	}
	delete(f.service.frontends, vip)
	if f.service != now {
		for _, id := range f.service.backends {
			r.late.bumps[id] = struct{}{}
		}
	}
	r.countVIP(vip.Addr, f, -1)
}

// makesKnown tells whether a frontend of this kind makes its address known as some Service's.
func makesKnown(k lb.Kind) bool { return k == lb.ClusterIP || k == lb.LoadBalancer || k == lb.External }

// count adds frontends of a kind that makes an address known, all leading to a service.
func (v *vipAt) count(s *service, k lb.Kind, n int) {
	v.frontends += n
	if k == lb.ClusterIP {
		v.clusterIPs += n
	}
	if s.slots[balance.Cluster].Count > 0 {
		v.usable += n
	}
}

// countVIP notes that an address has a frontend more or less.
func (r *Reconciler) countVIP(addr netip.Addr, f frontend, n int) {
	if !makesKnown(f.kind) {
		return
	}
	before := r.vips[addr]
	at := before
	at.count(f.service, f.kind, n)
	if r.vips[addr] = at; at.frontends == 0 {
		delete(r.vips, addr)
	}
	if (before.clusterIPs > 0) != (at.clusterIPs > 0) && !within(r.prefixes, addr) {
		r.elsewhere += n
	}
	r.addresses[addr] = struct{}{}
}

// addressVIP is the key of an address's own entry.
func addressVIP(addr netip.Addr) lb.VIP { return lb.VIP{Addr: addr} }

// yieldAddress has what is sent to other ports of an address left alone, before frontends there go, if another proxy
// has the address now: it takes these ports. fixAddresses looks at the entry again.
func (r *Reconciler) yieldAddress(addr netip.Addr) error {
	_, foreign := r.foreign[addr]
	if f, there := r.frontends[addressVIP(addr)]; !foreign || !there || f.flags == 0 {
		return nil
	}
	r.addresses[addr] = struct{}{}
	return r.putFrontend(addressVIP(addr), frontend{kind: lb.Address})
}

// sayElsewhere says that there are ClusterIPs outside of the prefixes, if an address is one.
func (r *Reconciler) sayElsewhere(addr netip.Addr, at vipAt) error {
	prefixes, elsewhere := r.maps.ServicePrefixes()
	if at.clusterIPs == 0 || elsewhere || within(prefixes, addr) {
		return nil
	}
	return r.maps.SetServicePrefixes(prefixes, true)
}

// writeAddress makes the entry of an address say what is there. That it is a ClusterIP the programs see only where
// they look for one: so it is in a prefix, or they are told first that some are elsewhere.
func (r *Reconciler) writeAddress(addr netip.Addr, at vipAt) error {
	want := frontend{kind: lb.Address}
	if _, own := r.hostAddresses[addr]; !own {
		if at.clusterIPs > 0 {
			want.flags |= maps.AddressClusterIP
		}
		if at.usable > 0 {
			want.flags |= maps.AddressEcho
		}
	}
	if err := r.sayElsewhere(addr, at); err != nil {
		return err
	}
	vip := addressVIP(addr)
	is, there := r.frontends[vip]
	if there && is.kind == want.kind && is.flags == want.flags {
		r.frontends[vip] = want
		return nil
	}
	if !there && len(r.frontends) >= int(r.sizes.Frontends) {
		return fmt.Errorf("address %s: all %d frontends are taken (--max-frontends)", addr, r.sizes.Frontends)
	}
	return r.putFrontend(vip, want)
}

// fixAddresses makes those addresses known that are some Service's, or spared, and no others.
func (r *Reconciler) fixAddresses() error {
	var errs []error
	for _, addr := range sorted(r.addresses, netip.Addr.Compare) {
		var err error
		at, ours := r.vips[addr]
		f, there := r.frontends[addressVIP(addr)]
		switch {
		case ours || r.spared(addr):
			err = r.writeAddress(addr, at)
		case there && !f.kept:
			err = r.deleteFrontend(addressVIP(addr))
		}
		if err == nil {
			delete(r.addresses, addr)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// prefixesWritten tells whether the map has the prefixes that are desired, and says rightly whether there are
// ClusterIPs elsewhere.
func (r *Reconciler) prefixesWritten() bool {
	prefixes, elsewhere := r.maps.ServicePrefixes()
	return slices.Equal(prefixes, r.prefixes) && elsewhere == (r.elsewhere > 0)
}

// fixPrefixes writes the prefixes. All addresses have their entries before, since what is sent to one in a prefix
// that has none is dropped; and that there are ClusterIPs elsewhere is said before a prefix goes that has them. The
// node's own addresses that were in it lose theirs after it.
func (r *Reconciler) fixPrefixes() error {
	if r.prefixesWritten() || len(r.addresses) > 0 {
		return nil
	}
	before, elsewhere := r.maps.ServicePrefixes()
	if !elsewhere && r.elsewhere > 0 {
		if err := r.maps.SetServicePrefixes(before, true); err != nil {
			return err
		}
	}
	if r.prefixesWritten() {
		return nil
	}
	if err := r.maps.SetServicePrefixes(r.prefixes, r.elsewhere > 0); err != nil {
		return err
	}
	r.confirmOwn()
	return r.fixAddresses()
}

// fixIdentities makes those addresses of backends known as such that no service has a frontend at.
func (r *Reconciler) fixIdentities() error {
	var errs []error
	for _, vip := range sorted(r.direct, lb.VIP.Compare) {
		var err error
		f, there := r.frontends[vip]
		switch want := r.backendsAt[vip] > 0; {
		case f.service != nil:
		case want && f.kind != lb.Identity:
			if !there && len(r.frontends) >= int(r.sizes.Frontends) {
				err = fmt.Errorf("backend %s: all %d frontends are taken (--max-frontends)", vip, r.sizes.Frontends)
			} else {
				err = r.putFrontend(vip, frontend{kind: lb.Identity})
			}
		case !want && there:
			err = r.deleteFrontend(vip)
		}
		if err == nil {
			delete(r.direct, vip)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// endService takes the slots of a service that is not desired, once no frontend leads to it.
func (r *Reconciler) endService(name lb.ServiceName) error {
	s := r.services[name]
	if s == nil {
		return nil
	}
	if _, stays := r.wanted(name); stays {
		return nil
	}
	if len(s.frontends) > 0 {
		r.dirty[name] = struct{}{} // the reason is among the errors
		return nil
	}
	for _, scope := range scopes { // Cluster first: from then on what still comes is refused, not dropped
		if s.slots[scope].Count > 0 || s.damaged {
			if err := r.setSlots(s, scope, maps.SlotRange{}); err != nil {
				return err
			}
		}
	}
	s.damaged = false
	r.confirmRanges(s, nil)
	r.late.services[s] = struct{}{}
	return nil
}

// finish does what has to wait for a grace period, if there is any.
func (r *Reconciler) finish() error {
	if len(r.late.ranges)+len(r.late.services)+len(r.late.bumps)+len(r.repairs) == 0 {
		return nil
	}
	if err := r.grace(); err != nil {
		return err
	}
	for _, slots := range r.late.ranges {
		r.slots.release(slots)
	}
	r.late.ranges = nil
	var errs []error
	for _, s := range sorted(r.late.services, func(a, b *service) int { return cmp.Compare(a.id, b.id) }) {
		if err := r.settle(s); err != nil {
			errs = append(errs, fmt.Errorf("service %s: %w", s.name, err))
			continue
		}
		delete(r.late.services, s)
	}
	for _, id := range sorted(r.late.bumps, cmp.Compare[uint32]) {
		life := r.maps.Backend(id).Life
		life.Generation++
		if err := r.maps.SetBackendLife(id, life); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(r.late.bumps, id)
	}
	r.repairs = slices.DeleteFunc(r.repairs, func(repair func() error) bool {
		err := repair()
		errs = append(errs, err)
		return err == nil
	})
	return errors.Join(errs...)
}

// settle takes away what a service is not to have any more: slots of the scope Local that no policy needs, source
// ranges, backends, and scopes in which backends were usable, but for what its slots still name since it could not
// be switched. It ends a service that is not desired.
func (r *Reconciler) settle(s *service) error {
	svc, stays := r.wanted(s.name)
	var errs []error
	if !r.localIdle(s) {
		// Nobody has read them since the policy went off, so they are free at once.
		if err := r.maps.SetServiceLocal(s.id, maps.SlotRange{}); err != nil {
			errs = append(errs, err)
		} else if local := s.slots[balance.Local]; local.Count > 0 {
			r.slots.release(local)
			s.slots[balance.Local] = maps.SlotRange{}
		}
	}
	if policy := r.maps.Service(s.id).Policy; stays && svc.SourceRanges == nil && policy.Flags&maps.HasSourceRanges != 0 && !r.balances(s) {
		policy.Flags &^= maps.HasSourceRanges // what they guarded is gone
		errs = append(errs, r.setPolicy(s, policy, nil))
	}
	errs = append(errs, r.deleteRanges(s), r.settleBackends(s, svc.Backends))
	if err := errors.Join(errs...); err != nil || stays || len(s.backends)+len(s.frontends) > 0 || s.damaged {
		return err
	}
	if err := r.setPolicy(s, maps.Policy{}, nil); err != nil {
		return err
	}
	if err := r.maps.DeleteServiceName(s.id); err != nil {
		return err
	}
	delete(r.services, s.name)
	r.serviceIDs.push(s.id)
	return nil
}

func (r *Reconciler) settleBackends(s *service, backends []lb.Backend) error {
	want := make(map[netip.AddrPort]uint8, len(backends))
	for _, b := range backends {
		want[b.Addr] = flagsOf(b)
	}
	inForce := map[uint32]uint8{}
	for scope, flag := range map[balance.Scope]uint8{balance.Cluster: maps.BackendCluster, balance.Local: maps.BackendLocal} {
		for _, id := range r.maps.Slots(s.slots[scope]) {
			inForce[id] |= flag
		}
	}
	var errs []error
	for _, addr := range sorted(s.backends, netip.AddrPort.Compare) {
		id := s.backends[addr]
		flags, ok := want[addr]
		if flags |= inForce[id]; !ok && flags == 0 {
			err := r.removeBackend(id)
			if err == nil {
				delete(s.backends, addr)
			}
			errs = append(errs, err)
			continue
		}
		life := r.maps.Backend(id).Life
		if less := withFlags(life, life.Flags&flags); less != life {
			errs = append(errs, r.maps.SetBackendLife(id, less))
		}
	}
	return errors.Join(errs...)
}

// removeBackend makes the flows of a backend look again and not find it. Its id is kept until none names it.
func (r *Reconciler) removeBackend(id uint32) error {
	b := r.maps.Backend(id)
	b.Life.Generation++
	b.Life.State, b.Life.Flags = maps.BackendRemoved, 0
	if err := r.maps.SetBackendLife(id, b.Life); err != nil {
		return err
	}
	delete(r.late.bumps, id)
	r.keep(id, b)
	return nil
}

// keep notes a REMOVED backend.
func (r *Reconciler) keep(id uint32, b maps.Backend) {
	r.removed[id] = r.sweeps
	r.former[endpoint{b.Service, b.VIP()}] = id
}

// sorted returns the keys of a map in order, so that the same changes are the same writes.
func sorted[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compare)
	return keys
}
