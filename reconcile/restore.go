// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/lbagent/lbagent/balance"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// New returns a Reconciler that goes on from what the maps say. It writes nothing: all of that stays in force
// until the first Apply, which removes what is not desired (but see Hold).
//
// An agent that died leaves backends without a service and services without a frontend; a damaged map may say
// anything. What can be used is; what belongs to a service id without a name is taken for a service
// that nobody desires; what leads nowhere is removed by the first Apply.
func New(m *maps.Maps, log *slog.Logger) (*Reconciler, error) {
	sizes := m.Sizes()
	r := &Reconciler{
		maps:  m,
		sizes: sizes,
		grace: maps.Grace,

		desired: map[lb.ServiceName]lb.Service{},
		owners:  map[lb.VIP]lb.ServiceName{},
		dirty:   map[lb.ServiceName]struct{}{},
		resumed: true,
		foreign: map[netip.Addr]struct{}{},

		services:   map[lb.ServiceName]*service{},
		frontends:  map[lb.VIP]frontend{},
		vips:       map[netip.Addr]vipAt{},
		backendsAt: map[lb.VIP]int{},
		removed:    map[uint32]uint64{},
		former:     map[endpoint]uint32{},
		serviceIDs: newIDQueue(sizes.Services),
		backendIDs: newIDQueue(sizes.Backends),
		slots:      newSlotAllocator(sizes.Slots),
		maxRanges:  int(m.All()["source_ranges"].MaxEntries()),

		addresses: map[netip.Addr]struct{}{},
		unnamed:   map[uint32]struct{}{},
		direct:    map[lb.VIP]struct{}{},
		late:      late{services: map[*service]struct{}{}, bumps: map[uint32]struct{}{}},
	}
	r.prefixes, _ = m.ServicePrefixes()
	found := restored{Reconciler: r, log: log, byID: make([]*service, sizes.Services)}
	if err := found.readNames(); err != nil {
		return nil, err
	}
	found.readBackends()
	if err := found.readFrontends(); err != nil {
		return nil, err
	}
	if err := found.readSourceRanges(); err != nil {
		return nil, err
	}
	found.readSlots()
	if len(r.services) > 0 {
		log.Info("restored from the maps", "services", len(r.services), "frontends", len(r.frontends), "backends", len(r.late.bumps))
	}
	return r, nil
}

// restored is a Reconciler while it is filled from the maps, a map after the other.
type restored struct {
	*Reconciler
	log  *slog.Logger
	byID []*service // nil where an id is free, as far as is known
}

func (r *restored) readNames() error {
	return r.maps.EachServiceName(func(id uint32, n maps.ServiceName) bool {
		if id == 0 || id >= r.sizes.Services {
			r.log.Warn("a service id is out of range", "id", id)
			r.repairs = append(r.repairs, func() error { return r.maps.DeleteServiceName(id) })
			return true
		}
		name := n.LB()
		if r.services[name] != nil {
			r.log.Warn("two service ids have one name", "id", id, "name", name)
			name = unnamed(id)
		}
		r.add(id, name).named = true
		return true
	})
}

func (r *restored) add(id uint32, name lb.ServiceName) *service {
	s := &service{
		name: name, id: id, kept: true,
		backends: map[netip.AddrPort]uint32{}, frontends: map[lb.VIP]struct{}{}, ranges: map[netip.Prefix]bool{},
		keptBackends: map[netip.AddrPort]lb.Backend{},
	}
	r.services[name], r.byID[id] = s, s
	return s
}

// service returns the service of an id, nil where the id is out of range. To a nameless one something belongs
// though, so it is one; if it is held, the first Apply gives it the name that it goes by here.
func (r *restored) service(id uint32) *service {
	if id == 0 || id >= r.sizes.Services {
		return nil
	}
	if s := r.byID[id]; s != nil {
		return s
	}
	r.log.Warn("a service id in use has no name", "id", id)
	s := r.add(id, unnamed(id))
	r.dirty[s.name] = struct{}{}
	return s
}

// unnamed is a name that no Service has.
func unnamed(id uint32) lb.ServiceName { return lb.ServiceName{Name: fmt.Sprintf("(id %d)", id)} }

// readBackends restores ids, generations and states. Which removed ones flows still name the next sweep tells.
func (r *restored) readBackends() {
	for id := uint32(1); id < r.sizes.Backends; id++ {
		b := r.maps.Backend(id)
		var s *service
		switch b.Life.State {
		case maps.BackendFree:
			r.backendIDs.push(id)
			continue
		case maps.BackendRemoved:
			r.ref(b.VIP())
			r.keep(id, b)
			continue
		case maps.BackendActive, maps.BackendDraining:
			s = r.service(b.Service)
		}
		r.ref(b.VIP())
		if s != nil && s.backends[b.Addr()] == 0 && (b.VIP().Protocol == s.name.Protocol || !s.named) {
			s.backends[b.Addr()] = id
			s.keptBackends[b.Addr()] = lb.Backend{ // of weight 0, unless readSlots finds it in some
				Addr:    b.Addr(),
				Cluster: b.Life.Flags&maps.BackendCluster != 0,
				Local:   b.Life.Flags&maps.BackendLocal != 0,
			}
			// The agent that wrote it may have died between the removal of a frontend and the end of
			// the grace period, and nobody knows of which.
			r.late.bumps[id] = struct{}{}
			continue
		}
		r.log.Warn("a backend belongs nowhere", "id", id, "service", b.Service, "address", b.Addr())
		r.repairs = append(r.repairs, func() error { return r.removeBackend(id) })
	}
}

func (r *restored) readFrontends() error {
	return r.maps.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
		vip := k.VIP()
		kind := lb.Kind(f.Kind)
		if f.KeyTag != k.Tag() {
			r.log.Warn("a frontend has the tag of another", "frontend", vip)
			r.repairs = append(r.repairs, func() error {
				f, there := r.frontends[vip]
				if !there {
					return nil
				}
				return r.putFrontend(vip, f)
			})
		}
		if vip == addressVIP(vip.Addr) {
			r.remember(vip, frontend{kind: kind, flags: f.Flags, kept: true})
			r.addresses[vip.Addr] = struct{}{}
			return true
		}
		if kind == lb.Identity && f.Service == 0 {
			r.remember(vip, frontend{kind: kind})
			r.direct[vip] = struct{}{}
			return true
		}
		if s := r.service(f.Service); s != nil && kind != lb.Identity {
			r.remember(vip, frontend{service: s, kind: kind, kept: true})
			return true
		}
		r.log.Warn("a frontend leads nowhere", "frontend", vip, "service", f.Service)
		r.remember(vip, frontend{})
		r.direct[vip] = struct{}{} // which deletes what is nobody's
		return true
	})
}

// readSourceRanges restores which source ranges there are. Those of a service that is no more make it one that
// nobody desires.
func (r *restored) readSourceRanges() error {
	return r.maps.EachSourceRange(func(id uint32, p netip.Prefix) bool {
		s := r.service(id)
		if s == nil {
			r.log.Warn("a source range belongs to no service", "id", id, "range", p)
			r.repairs = append(r.repairs, func() error { return r.maps.DeleteSourceRange(id, p) })
			return true
		}
		s.ranges[p] = r.maps.Service(id).Policy.Flags&maps.HasSourceRanges != 0
		r.ranges++
		return true
	})
}

// readSlots restores which slots are taken, and by that which backends new flows choose. Slots and ids that
// the agent before let go of are free at once: a new process takes longer to get here than a packet to pass.
func (r *restored) readSlots() {
	for id := uint32(1); id < r.sizes.Services; id++ {
		is := r.maps.Service(id)
		s := r.byID[id]
		if is != (maps.Service{}) {
			s = r.service(id)
			r.readScope(s, balance.Cluster, is.Cluster)
			r.readScope(s, balance.Local, is.Local)
		}
		if s == nil {
			r.serviceIDs.push(id)
			continue
		}
		r.countUsable(s, 1)
		choose := func(id uint32) {
			b := s.keptBackends[r.maps.Backend(id).Addr()]
			b.Weight = 1
			s.keptBackends[b.Addr] = b
		}
		for _, slots := range s.slots {
			for _, b := range r.maps.Slots(slots) {
				choose(b)
			}
		}
		if s.damaged {
			for _, b := range s.backends {
				choose(b)
			}
		}
	}
}

func (r *restored) readScope(s *service, scope balance.Scope, slots maps.SlotRange) {
	switch {
	case slots == (maps.SlotRange{}):
	case r.sound(s, slots) && r.slots.take(slots):
		s.slots[scope] = slots
	default:
		r.log.Warn("a service has slots that cannot be its", "service", s.name, "first", slots.First, "count", slots.Count)
		s.damaged = true
		r.dirty[s.name] = struct{}{} // now, though it may be held
	}
}

// sound tells whether a range lies in the map and names backends of the service only.
func (r *restored) sound(s *service, slots maps.SlotRange) bool {
	if slots.Count == 0 || uint64(slots.First)+uint64(slots.Count) > uint64(r.sizes.Slots) {
		return false
	}
	for _, id := range r.maps.Slots(slots) {
		if id == 0 || id >= r.sizes.Backends {
			return false
		}
		b := r.maps.Backend(id)
		if s.backends[b.Addr()] != id || b.Life.State != maps.BackendActive {
			return false
		}
	}
	return true
}
