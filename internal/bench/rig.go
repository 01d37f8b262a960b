// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

const (
	frontends = 5000 // of each family
	services  = 1024 // those of them that have flows, each with one backend
	vipPort   = 80
	podPort   = 8080
)

// Last words of the addresses; a family's other words are the same for all, so that the walk of
// bpf/reference.c has one word to write.
const (
	clients   = 100<<24 | 64<<16
	newcomers = 100<<24 | 96<<16 // who have no flow yet
	vips      = 10<<24 | 96<<16
	backends  = 10<<24 | 244<<16
	foreign   = 198<<24 | 51<<16 | 100<<8
)

type family int

const (
	v4 family = 4
	v6 family = 6
)

func (f family) String() string { return fmt.Sprintf("v%d", int(f)) }

func (f family) addr(word uint32) netip.Addr {
	a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, word)))
	if f == v4 {
		return a
	}
	b := a.As16()
	b[0], b[1], b[10], b[11] = 0xfd, 0, 0, 0
	return netip.AddrFrom16(b)
}

// id is that of a service, and of its one backend; id 0 is none.
func (f family) id(service uint32) uint32 {
	if f == v6 {
		service += frontends
	}
	return service + 1
}

// flow returns who speaks in flow i, as walk in bpf/reference.c makes them.
func (f family) flow(i uint32) (client, vip, backend netip.AddrPort) {
	s := i & (services - 1)
	return netip.AddrPortFrom(f.addr(clients+i>>15), uint16(0x8000|i&0x7fff)),
		netip.AddrPortFrom(f.addr(vips+s), vipPort), netip.AddrPortFrom(f.addr(backends+s), podPort)
}

// way is what a packet is: of whom, to whom.
type way int

const (
	fromClient way = iota
	fromBackend
	elsewhere // from a client to no service
)

// frame returns a packet of a way, with the walk over the flows in its payload.
func (f family) frame(w way, flows, seed uint32, flags uint8) ([]byte, error) {
	client, vip, backend := f.flow(0)
	walk := referenceWalk{State: seed, Mask: flows - 1, Client: clients, Peer: vips, Peers: services - 1, PeerPort: vipPort}
	p := testenv.SegmentTCP(client, vip, flags)
	if flows == 0 {
		walk.Client = newcomers
	}
	switch w {
	case fromBackend:
		p = testenv.SegmentTCP(backend, client, flags)
		walk.Peer, walk.PeerPort, walk.Reply = backends, podPort, 1
	case elsewhere:
		walk.Peer = foreign
	}
	p.Payload = make([]byte, binary.Size(walk))
	b := p.Bytes()
	if _, err := binary.Encode(b[len(b)-len(p.Payload):], binary.NativeEndian, walk); err != nil {
		return nil, fmt.Errorf("write the walk into the packet: %w", err)
	}
	clear(b[:6]) // to the loopback device, where BPF_PROG_TEST_RUN has packets come from
	return b, nil
}

// variant is how the services of a rig are other than plain ClusterIPs with one slot.
type variant struct {
	kind   lb.Kind
	policy maps.Policy
	slots  uint32 // of each service that has flows
	ranges bool   // every client is in one of the services' source ranges
}

var plain = variant{kind: lb.ClusterIP, slots: 1}

// rig is a set of maps with a number of established flows in it, and the programs that share them.
type rig struct {
	variant
	flows     uint32
	families  []family
	maps      *maps.Maps
	loader    *loader.Loader
	reference *ebpf.Collection
	programs  map[string]*ebpf.Program
	walks     map[string]*ebpf.Collection // by the program that they call
}

// newRig makes tables twice as large as what they hold. With layouts, the flows are in the tables of the
// other layouts as well.
func newRig(v variant, flows uint32, layouts bool, families ...family) (*rig, error) {
	r := &rig{variant: v, flows: flows, families: families, walks: map[string]*ebpf.Collection{}}
	err := func() (err error) {
		entries := max(4*flows*uint32(len(families)), 1<<14)
		r.maps, err = maps.New(maps.Sizes{
			Frontends: 4 * frontends, Services: 2*frontends + 1, Slots: (2*frontends + 1) * v.slots, Backends: 2*frontends + 1, Flows: entries,
		})
		if err != nil {
			return err
		}
		if r.loader, err = loader.Load(r.maps, loader.Config{}); err != nil {
			return err
		}
		spec, err := r.spec()
		if err != nil {
			return err
		}
		spec.Maps["entries"].MaxEntries = entries / 4 // as `pending`
		if layouts {
			for _, name := range []string{"padded", "compact", "small"} {
				spec.Maps[name].MaxEntries = entries
			}
		}
		delete(spec.Programs, "walk_v4")
		delete(spec.Programs, "walk_v6")
		r.reference, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: r.maps.All()})
		if err != nil {
			return fmt.Errorf("load the reference programs: %w", err)
		}
		r.programs = r.loader.Programs()
		for name, p := range r.reference.Programs {
			r.programs[name] = p
		}
		if err := r.fillServices(); err != nil {
			return err
		}
		if err := r.fillFlows(); err != nil {
			return err
		}
		if layouts {
			return r.fillLayouts()
		}
		return nil
	}()
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *rig) close() error {
	var errs []error
	for _, w := range r.walks {
		w.Close()
	}
	if r.reference != nil {
		r.reference.Close()
	}
	if r.loader != nil {
		errs = append(errs, r.loader.Close())
	}
	if r.maps != nil {
		errs = append(errs, r.maps.Close())
	}
	return errors.Join(errs...)
}

func (r *rig) spec() (*ebpf.CollectionSpec, error) {
	spec, err := loadReference()
	if err != nil {
		return nil, fmt.Errorf("read the reference programs' object: %w", err)
	}
	r.maps.Sizes().Apply(spec)
	delete(spec.Variables, "walk_type") // a type's name, no constant
	return spec, r.loader.Configure(spec)
}

// walk returns the program that makes packets and calls `target` with each.
func (r *rig) walk(f family, target string) (*ebpf.Program, error) {
	name := "walk_" + f.String()
	if w := r.walks[target]; w != nil {
		return w.Programs[name], nil
	}
	spec, err := loadReference()
	if err != nil {
		return nil, fmt.Errorf("read the reference programs' object: %w", err)
	}
	clear(spec.Variables) // it has none
	for other := range spec.Programs {
		if other != "walk_v4" && other != "walk_v6" {
			delete(spec.Programs, other)
		}
	}
	for other := range spec.Maps {
		if other != "targets" {
			delete(spec.Maps, other)
		}
	}
	w, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load the walk: %w", err)
	}
	r.walks[target] = w
	program := r.programs[target]
	if program == nil {
		return nil, fmt.Errorf("no program %s", target)
	}
	if err := w.Maps["targets"].Put(uint32(0), program); err != nil {
		return nil, fmt.Errorf("make %s a target: %w", target, err)
	}
	return w.Programs[name], nil
}

func (r *rig) fillServices() error {
	var prefixes []netip.Prefix
	for _, f := range []family{v4, v6} {
		prefixes = append(prefixes, netip.PrefixFrom(f.addr(vips), f.addr(vips).BitLen()-20))
	}
	if err := r.maps.SetServicePrefixes(prefixes, false); err != nil {
		return err
	}
	for _, f := range []family{v4, v6} {
		for s := range uint32(frontends) {
			id := f.id(s)
			if err := errors.Join(
				r.maps.SetBackend(id, maps.Backend{
					Address: f.addr(backends + s).As16(), Service: id,
					Life: maps.BackendLife{Generation: 1, State: maps.BackendActive, Flags: maps.BackendCluster, Port: podPort},
				}),
				r.maps.SetSlots(id*r.slots, slices.Repeat([]uint32{id}, int(r.slots))),
				r.maps.SetServiceCluster(id, maps.SlotRange{First: id * r.slots, Count: r.slots}),
				r.maps.SetServicePolicy(id, r.policy),
				r.maps.SetFrontend(maps.KeyOf(lb.VIP{Addr: f.addr(vips + s), Port: vipPort, Protocol: lb.TCP}),
					maps.FrontendOf(id, r.kind)),
			); err != nil {
				return err
			}
			if r.ranges && s < services {
				// The one that has all clients, and others around it.
				for _, bits := range []int{8, 9, 10, 11} {
					if f == v6 {
						bits += 96
					}
					if err := r.maps.SetSourceRange(id, netip.PrefixFrom(f.addr(clients), bits)); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

func tuple(from, to netip.AddrPort) maps.Tuple {
	return maps.Tuple{
		Source: from.Addr().As16(), Destination: to.Addr().As16(), SourcePort: from.Port(), DestinationPort: to.Port(),
		Protocol: maps.KeyOf(lb.VIP{Addr: to.Addr(), Protocol: lb.TCP}).Protocol,
	}
}

// halves calls yield with chunks of keys and values of both halves of every flow, as flow_assure would have
// left them; service has the number of each half's service. A flow's last use is `ago`.
func (r *rig) halves(ago time.Duration, yield func(keys []maps.Tuple, values []maps.Flow, service []uint32) error) error {
	const chunk = 4096
	now, err := maps.Now()
	if err != nil {
		return err
	}
	var keys []maps.Tuple
	var values []maps.Flow
	var service []uint32
	flush := func() error {
		defer func() { keys, values, service = keys[:0], values[:0], service[:0] }()
		return yield(keys, values, service)
	}
	for _, f := range r.families {
		for i := range r.flows {
			client, vip, backend := f.flow(i)
			id := f.id(i & (services - 1))
			half := maps.Flow{Backend: id, Generation: 1, LastSeenNs: now - uint64(ago)}
			forward, reply := half, half
			forward.To, forward.Hook, forward.Role = tuple(client, backend), maps.AtIngress, maps.RoleForward
			reply.To, reply.Hook, reply.Role = tuple(vip, client), maps.AtEgress, maps.RoleReply
			keys = append(keys, tuple(client, vip), tuple(backend, client))
			values = append(values, forward, reply)
			service = append(service, id, id)
			if len(keys) < chunk {
				continue
			}
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// fresh is a last use that stays less than a second ago for as long as anything here is measured.
const fresh = -time.Hour

func (r *rig) fillFlows() error {
	return r.halves(fresh, func(keys []maps.Tuple, values []maps.Flow, _ []uint32) error {
		return put(r.maps.All()["flows"], keys, values)
	})
}

// ageFlows makes the last use of every flow two seconds ago.
func (r *rig) ageFlows() error {
	return r.halves(2*time.Second, func(keys []maps.Tuple, values []maps.Flow, _ []uint32) error {
		return put(r.maps.All()["flows"], keys, values)
	})
}

func put[V any](m *ebpf.Map, keys []maps.Tuple, values []V) error {
	if len(keys) == 0 {
		return nil
	}
	if _, err := m.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("fill map %s: %w", m, err)
	}
	return nil
}

// paddedFlow is a flow in map `padded`.
type paddedFlow struct {
	maps.Flow
	_ [2]uint64
}

func (r *rig) fillLayouts() error {
	m := r.reference.Maps
	for _, f := range r.families {
		for s := range uint32(services) {
			v := referenceVip{Address: f.addr(vips + s).As16(), Port: vipPort}
			if err := m["vips"].Put(f.id(s), v); err != nil {
				return fmt.Errorf("fill map vips: %w", err)
			}
		}
	}
	return r.halves(fresh, func(keys []maps.Tuple, values []maps.Flow, service []uint32) error {
		padded := make([]paddedFlow, len(keys))
		compact := make([]referenceFlowCompact, len(keys))
		small := make([]referenceFlowSmall, len(keys))
		for i, v := range values {
			port := v.To.SourcePort
			if v.Role == maps.RoleReply {
				port = v.To.DestinationPort
			}
			padded[i].Flow = v
			compact[i] = referenceFlowCompact{Hook: uint8(v.Hook), Role: uint8(v.Role), Backend: v.Backend, Generation: v.Generation, Vip: service[i], Port: port}
			small[i] = referenceFlowSmall{Hook: uint8(v.Hook), Role: uint8(v.Role), Backend: v.Backend, Generation: v.Generation, Vip: service[i], Port: port}
		}
		return errors.Join(put(m["padded"], keys, padded), put(m["compact"], keys, compact), put(m["small"], keys, small))
	})
}
