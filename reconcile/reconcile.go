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
	prefixes      []netip.Prefix // where ClusterIPs are

	// What the maps say.
	services   map[lb.ServiceName]*service
	frontends  map[lb.VIP]frontend // all keys of the map, ADDRESS entries too
	identities int                 // how many of them are backends' own addresses
	clusterIPs map[netip.Addr]int  // how many frontends of kind ClusterIP an address has; never 0
	backendsAt map[lb.VIP]int      // how many backends with an id are here; never 0
	removed    map[uint32]uint64   // REMOVED backends: how many sweeps had begun before
	former     map[endpoint]uint32 // the same by what they were
	serviceIDs idQueue             // free
	backendIDs idQueue             // free
	slots      slotAllocator
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
	slots     maps.SlotRange            // in force
	damaged   bool                      // the map has something else than slots in force, which must not stay
	backends  map[netip.AddrPort]uint32 // ids of those that are not REMOVED
	frontends map[lb.VIP]struct{}       // those that lead here

	// Restored from the maps, and not confirmed since by being desired.
	kept         bool                    // the service itself
	keptBackends map[netip.AddrPort]bool // and whether new flows choose them
}

type frontend struct {
	service *service // nil: an ADDRESS or IDENTITY entry, or one that leads nowhere
	kind    lb.Kind
	kept    bool // restored from the maps, and not confirmed since by being desired
}

// endpoint is what a backend is, under whatever id.
type endpoint struct {
	service uint32
	at      lb.VIP
}

// Stats are numbers of what is in the maps, and of what is still to be done.
type Stats struct {
	Services   int
	Frontends  int // with the entries that mark an address as a ClusterIP
	Identities int // backends' own addresses that no service has for a frontend
	Backends   int // active and draining ones, and those still to be removed
	Removed    int // backends that are kept until no flow names them
	Pending    int // services, backends and their own addresses that are not yet as desired
}

// Stats returns the numbers as of now, in constant time.
func (r *Reconciler) Stats() Stats {
	return Stats{
		Services:   len(r.services),
		Frontends:  len(r.frontends) - r.identities,
		Identities: r.identities,
		Backends:   int(r.sizes.Backends) - 1 - r.backendIDs.length - len(r.removed),
		Removed:    len(r.removed),
		Pending:    len(r.dirty) + len(r.direct) + len(r.unnamed) + len(r.late.services) + len(r.late.bumps),
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

// SetForeign records which VIPs of another proxy's Services came (true) or went (false): what is sent there is
// left alone.
func (r *Reconciler) SetForeign(changed map[netip.Addr]bool) {
	for addr, there := range changed {
		if there {
			r.foreign[addr] = struct{}{}
		} else {
			delete(r.foreign, addr)
		}
		r.addresses[addr] = struct{}{}
	}
}

// SetHostAddresses records all addresses that this node has: what is sent to one of them, and not to a frontend
// there, is left alone though it is a Service's address too.
func (r *Reconciler) SetHostAddresses(all []netip.Addr) {
	before := r.hostAddresses
	r.hostAddresses = make(map[netip.Addr]struct{}, len(all))
	for _, addr := range all {
		r.hostAddresses[addr] = struct{}{}
		if _, ok := before[addr]; !ok {
			r.addresses[addr] = struct{}{}
		}
		delete(before, addr)
	}
	for addr := range before {
		r.addresses[addr] = struct{}{}
	}
}

// SetPrefixes records where ClusterIPs are. Until it is called, those of the agent before stay. It returns an
// error, and changes nothing, if there are more than maps.MaxServicePrefixes.
func (r *Reconciler) SetPrefixes(prefixes []netip.Prefix) error {
	if len(prefixes) > maps.MaxServicePrefixes {
		return fmt.Errorf("%d service prefixes are more than %d", len(prefixes), maps.MaxServicePrefixes)
	}
	r.prefixes = slices.Clone(prefixes)
	return nil
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
		if f.kept {
			r.confirm(vip)
		}
	}
}

// wanted returns the backends that a service is to have now, sorted by address, and false where there is to
// be no such service.
func (r *Reconciler) wanted(name lb.ServiceName) ([]lb.Backend, bool) {
	svc, ok := r.desired[name]
	s := r.services[name]
	if s == nil {
		return svc.Backends, ok
	}
	if len(s.keptBackends) == 0 {
		return svc.Backends, ok || s.kept
	}
	backends := slices.Clone(svc.Backends)
	for addr, cluster := range s.keptBackends {
		backends = append(backends, lb.Backend{Addr: addr, Cluster: cluster, Serving: true})
	}
	slices.SortFunc(backends, func(a, b lb.Backend) int { return a.Addr.Compare(b.Addr) })
	return backends, true
}

// Apply writes what is different, at a cost that depends on what changed and not on what there is. What
// fails is in the error, and is tried again by the next Apply; everything else is in force. So after an
// error call it again, though nothing may have changed: what a service lacks room for may have been freed.
//
// The agent may die between any two writes, since what a packet can meet is right after each:
//
//  1. New backends, and their slots, are written where no service refers to.
//  2. A service gets its name, then its new slots by one store. Those of its old slots are still there.
//  3. A frontend is written when its service has its slots. One that goes from a service to another is
//     overwritten: at any time it leads to one of them.
//  4. Frontends are deleted, then the slots of services that nothing leads to any more are taken away.
//  5. After a grace period nobody who begins a flow knows the old slots and frontends. Only now flows are
//     told to look again, by the generation of their backend: one that began meanwhile by the old slots
//     would get the new generation otherwise, and be valid for ever. Then services' ids and slots become free.
//  6. A removed backend keeps id and address, for its connections go on. A sweep that begins now and meets none
//     frees them (BeginSweep), by the first writes of an Apply.
//
// A backend's own address is IDENTITY among the frontends while the backend has an id, unless a service has a
// frontend there; from one to the other it goes by one overwrite. When it is written matters little: what a
// client does meanwhile straight to the backend, without a flow, is what it always did.
//
// Whoever starts then finds services and backends that nothing leads to, which are removed like any other
// that is not desired; New takes care of generations that a dying agent still had to raise.
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
	errs = append(errs, r.fixAddresses())
	for _, name := range names {
		failed(name, r.endService(name))
	}
	errs = append(errs, r.finish(), r.fixIdentities())
	return errors.Join(errs...)
}

// writeService writes backends, slots and name of a service that is desired, and switches it to them.
// What could run out is looked at before the first write: then the service stays what it was, frontends
// included. Keys of frontends that it will need are added to reserved.
func (r *Reconciler) writeService(name lb.ServiceName, reserved map[lb.VIP]struct{}) error {
	s := r.services[name]
	backends, ok := r.wanted(name)
	if !ok {
		return nil
	}
	wireName, err := maps.NameOf(name)
	if err != nil {
		return err
	}
	if s == nil {
		s = &service{name: name, id: r.serviceIDs.oldest(), backends: map[netip.AddrPort]uint32{}, frontends: map[lb.VIP]struct{}{}}
		if s.id == 0 {
			return fmt.Errorf("all %d service ids are taken (--max-services)", r.sizes.Services-1)
		}
	}
	created := 0
	for _, b := range backends {
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
	keys, own := r.newKeys(name, backends, reserved)
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
	table := balance.Table(backends)
	var slots maps.SlotRange
	same := !s.damaged && r.inForce(s, backends, table)
	if !same && len(table) > 0 {
		if slots, ok = r.slots.alloc(uint32(len(table))); !ok {
			return fmt.Errorf("no range of %d slots is free (--max-slots)", len(table))
		}
	}

	if r.services[name] == nil {
		r.serviceIDs.remove(s.id)
		r.services[name] = s
	}
	if err := r.writeBackends(s, backends); err != nil {
		r.free(slots)
		return err
	}
	if !same {
		if err := r.switchSlots(s, slots, backends, table, wireName); err != nil {
			r.free(slots)
			return err
		}
	} else if !s.named {
		if err := r.writeName(s, wireName); err != nil {
			return err
		}
	}
	if !r.settled(s, backends) {
		r.late.services[s] = struct{}{}
	}
	return nil
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
			if f.Kind == lb.ClusterIP {
				need(addressVIP(f.VIP.Addr))
			}
		}
	}
	slices.SortFunc(keys, lb.VIP.Compare)
	keys = slices.Compact(keys)
	for _, b := range backends {
		if vip := ownVIP(name, b.Addr); r.backendsAt[vip] == 0 && !slices.Contains(keys, vip) {
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

// inForce tells whether the slots of a service are what a table says already.
func (r *Reconciler) inForce(s *service, backends []lb.Backend, table []int) bool {
	if int(s.slots.Count) != len(table) {
		return false
	}
	for i, id := range r.maps.Slots(s.slots) {
		if s.backends[backends[table[i]].Addr] != id {
			return false
		}
	}
	return true
}

// writeBackends makes every backend that is desired exist, and those active that are to be: all that has to
// be before slots can name them.
func (r *Reconciler) writeBackends(s *service, backends []lb.Backend) error {
	for _, b := range backends {
		id, ok := s.backends[b.Addr]
		if !ok {
			if err := r.addBackend(s, b); err != nil {
				return err
			}
		} else if life := r.maps.Backend(id).Life; b.Cluster && life.State != maps.BackendActive {
			life.State = maps.BackendActive
			if err := r.maps.SetBackendLife(id, life); err != nil {
				return err
			}
		}
	}
	return nil
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
	}
	life := r.maps.Backend(id).Life
	life.Generation++
	life.State = stateOf(b)
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

func stateOf(b lb.Backend) maps.BackendState {
	if b.Cluster {
		return maps.BackendActive
	}
	return maps.BackendDraining
}

// switchSlots fills a range, and makes it the service's.
func (r *Reconciler) switchSlots(s *service, slots maps.SlotRange, backends []lb.Backend, table []int, name maps.ServiceName) error {
	if len(table) > 0 {
		ids := make([]uint32, len(table))
		for i, at := range table {
			ids[i] = s.backends[backends[at].Addr]
		}
		if err := r.maps.SetSlots(slots.First, ids); err != nil {
			return err
		}
	}
	if !s.named {
		if err := r.writeName(s, name); err != nil {
			return err
		}
	}
	return r.setCluster(s, slots)
}

func (r *Reconciler) writeName(s *service, name maps.ServiceName) error {
	err := r.maps.SetServiceName(s.id, name)
	s.named = err == nil
	return err
}

// setCluster is the switch. The range from before is freed after the grace period.
func (r *Reconciler) setCluster(s *service, slots maps.SlotRange) error {
	if err := r.maps.SetServiceCluster(s.id, slots); err != nil {
		return err
	}
	if s.slots.Count > 0 {
		r.late.ranges = append(r.late.ranges, s.slots)
	}
	s.slots, s.damaged = slots, false
	return nil
}

func (r *Reconciler) free(slots maps.SlotRange) {
	if slots.Count > 0 {
		r.slots.release(slots)
	}
}

// settled tells whether no backend of a service has to go, or to change to the state that is desired.
func (r *Reconciler) settled(s *service, backends []lb.Backend) bool {
	if len(s.backends) != len(backends) {
		return false
	}
	for _, b := range backends {
		if id, ok := s.backends[b.Addr]; !ok || r.maps.Backend(id).Life.State != stateOf(b) {
			return false
		}
	}
	return true
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
		if address := addressVIP(f.VIP.Addr); f.Kind == lb.ClusterIP && r.frontends[address].kind != lb.Address {
			r.addresses[f.VIP.Addr] = struct{}{} // it goes again if the frontend cannot be written
			if err := r.putFrontend(address, frontend{kind: lb.Address}); err != nil {
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
		errs = append(errs, r.deleteFrontend(vip))
	}
	return errors.Join(errs...)
}

// putFrontend writes a frontend, in the place of any that is there.
func (r *Reconciler) putFrontend(vip lb.VIP, f frontend) error {
	id := uint32(0)
	if f.service != nil {
		id = f.service.id
	}
	if err := r.maps.SetFrontend(maps.KeyOf(vip), maps.FrontendOf(id, f.kind)); err != nil {
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
		if f.kind == lb.ClusterIP {
			r.clusterIPs[vip.Addr]++
		}
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
	if f.kind == lb.ClusterIP {
		if r.clusterIPs[vip.Addr]--; r.clusterIPs[vip.Addr] == 0 {
			delete(r.clusterIPs, vip.Addr)
			r.addresses[vip.Addr] = struct{}{}
		}
	}
}

// addressVIP is the key that marks an address as a ClusterIP.
func addressVIP(addr netip.Addr) lb.VIP { return lb.VIP{Addr: addr} }

// fixAddresses makes addresses marked that are ClusterIPs, and no others.
func (r *Reconciler) fixAddresses() error {
	var errs []error
	for _, addr := range sorted(r.addresses, netip.Addr.Compare) {
		var err error
		vip := addressVIP(addr)
		f, marked := r.frontends[vip]
		switch want := r.clusterIPs[addr] > 0; {
		case want && f.kind != lb.Address:
			err = r.putFrontend(vip, frontend{kind: lb.Address})
		case !want && marked:
			err = r.deleteFrontend(vip)
		}
		if err == nil {
			delete(r.addresses, addr)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
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
	if s.slots.Count > 0 || s.damaged {
		if err := r.setCluster(s, maps.SlotRange{}); err != nil {
			return err
		}
	}
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

// settle gives the backends of a service the state that is desired, but for those that its slots still name
// since it could not be switched, and ends a service that is not desired.
func (r *Reconciler) settle(s *service) error {
	backends, stays := r.wanted(s.name)
	want := make(map[netip.AddrPort]maps.BackendState, len(backends))
	for _, b := range backends {
		want[b.Addr] = stateOf(b)
	}
	inForce := map[uint32]struct{}{}
	for _, id := range r.maps.Slots(s.slots) {
		inForce[id] = struct{}{}
	}
	var errs []error
	for _, addr := range sorted(s.backends, netip.AddrPort.Compare) {
		id := s.backends[addr]
		if _, ok := inForce[id]; ok {
			continue
		}
		state, ok := want[addr]
		if !ok {
			err := r.removeBackend(id)
			if err == nil {
				delete(s.backends, addr)
			}
			errs = append(errs, err)
		} else if life := r.maps.Backend(id).Life; life.State != state {
			life.State = state
			errs = append(errs, r.maps.SetBackendLife(id, life))
		}
	}
	if err := errors.Join(errs...); err != nil || stays || len(s.backends)+len(s.frontends) > 0 || s.damaged {
		return err
	}
	if err := r.maps.DeleteServiceName(s.id); err != nil {
		return err
	}
	delete(r.services, s.name)
	r.serviceIDs.push(s.id)
	return nil
}

// removeBackend makes the flows of a backend look again and not find it. Its id is kept until none names it.
func (r *Reconciler) removeBackend(id uint32) error {
	b := r.maps.Backend(id)
	b.Life.Generation++
	b.Life.State = maps.BackendRemoved
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
