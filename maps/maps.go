// SPDX-License-Identifier: Apache-2.0

// Package maps holds every BPF map of the data plane: it makes or adopts them, pins them, and gives typed
// access. It knows layouts and no meaning; package reconcile decides what is written, the programs in
// bpf/ read it. Types and names come from bpf/types.h by generation and BTF.
package maps

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	mathbits "math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/lbagent/lbagent/lb"
)

// The key and value types of the maps, as C declares them.
type (
	FrontendKey  = bpfFrontendKey
	Frontend     = bpfFrontend
	Service      = bpfService
	ServiceName  = bpfServiceName
	SlotRange    = bpfSlotRange
	Policy       = bpfServicePolicy
	Backend      = bpfBackend
	BackendLife  = bpfBackendLife
	BackendState = bpfBackendState
	AffinityKey  = bpfAffinityKey
	Affinity     = bpfAffinity
	Tuple        = bpfTuple
	Flow         = bpfFlow
	Device       = bpfDevice
	VLANKey      = bpfVlanKey
	ServiceStats = bpfServiceStats
	BackendStats = bpfBackendStats
)

// Where a flow applies, and which half of it an entry is.
const (
	AtIngress   = bpfFlowHookAT_INGRESS
	AtEgress    = bpfFlowHookAT_EGRESS
	RoleForward = bpfFlowRoleROLE_FORWARD
	RoleReply   = bpfFlowRoleROLE_REPLY
)

// The states of a backend.
const (
	BackendFree     = bpfBackendStateBACKEND_FREE
	BackendActive   = bpfBackendStateBACKEND_ACTIVE
	BackendDraining = bpfBackendStateBACKEND_DRAINING
	BackendRemoved  = bpfBackendStateBACKEND_REMOVED
)

// The flags of a frontend of kind lb.Address.
const (
	AddressClusterIP = uint8(bpfAddressFlagsADDRESS_CLUSTER_IP)
	AddressEcho      = uint8(bpfAddressFlagsADDRESS_ECHO)
)

// The flags of a service's policy.
const (
	InternalLocal   = uint32(bpfServiceFlagsSERVICE_INTERNAL_LOCAL)
	ExternalLocal   = uint32(bpfServiceFlagsSERVICE_EXTERNAL_LOCAL)
	HasSourceRanges = uint32(bpfServiceFlagsSERVICE_SOURCE_RANGES)
)

// The scopes in which new flows may choose a backend.
const (
	BackendCluster = uint8(bpfBackendFlagsBACKEND_CLUSTER)
	BackendLocal   = uint8(bpfBackendFlagsBACKEND_LOCAL)
)

// Table is one of the two tables of flows.
type Table = bpfTable

// The tables, in the order in which a walk of both misses no flow: copies go that way.
const (
	Pending = bpfTablePENDING
	Flows   = bpfTableFLOWS
)

// The flags of a flow's state.
const (
	FlowClientFIN  = uint8(bpfFlowStateFLOW_CLIENT_FIN)
	FlowBackendFIN = uint8(bpfFlowStateFLOW_BACKEND_FIN)
	FlowClientRST  = uint8(bpfFlowStateFLOW_CLIENT_RST)
	FlowBackendRST = uint8(bpfFlowStateFLOW_BACKEND_RST)
	FlowRSTAhead   = uint8(bpfFlowStateFLOW_RST_AHEAD)
	FlowMoved      = uint8(bpfFlowStateFLOW_MOVED)
)

// LayoutVersion is that of bpf/types.h; a test holds the two together.
const LayoutVersion = 4

var (
	// ErrInUse says that another agent owns the maps of a folder.
	ErrInUse = errors.New("another lbagent is running")
	// ErrLayout says that pinned maps were made by a version whose layout this one cannot adopt.
	ErrLayout = errors.New("maps of another layout")
	// ErrSize says that pinned maps have other sizes than those asked for.
	ErrSize = errors.New("maps of another size")
	// ErrNotPinned says that no agent has made maps in this folder, or that they were cleaned up.
	ErrNotPinned = errors.New("no pinned maps")
)

// Sizes are the largest numbers of entries; 0 is the default of bpf/maps.h, but for Flows in Open: there it is
// what is pinned, or else what fits the machine's memory.
type Sizes struct {
	Frontends, Services, Slots, Backends, Flows uint32
}

// DefaultSizes are those of bpf/maps.h.
func DefaultSizes() Sizes {
	spec, err := loadBpf()
	if err != nil {
		return Sizes{} // which means the same; whoever makes the maps will meet the error
	}
	size := func(name string) uint32 { return spec.Maps[name].MaxEntries }
	return Sizes{
		Frontends: size("frontends"), Services: size("services"), Slots: size("slots"),
		Backends: size("backends"), Flows: size("flows"),
	}
}

// of returns the size that governs a map, 0 for those of fixed size.
func (s Sizes) of(name string) uint32 {
	switch name {
	case "frontends":
		return s.Frontends
	case "services", "service_names", "service_stats":
		return s.Services
	case "slots":
		return s.Slots
	case "backends", "backend_stats":
		return s.Backends
	case "flows":
		return s.Flows
	case "pending", "affinity":
		return s.Flows / 4
	}
	return 0
}

// Apply sets the sizes in a spec that declares maps of ours, a program's as well: the kernel's verifier and
// the library compare both.
func (s Sizes) Apply(spec *ebpf.CollectionSpec) {
	for name, m := range spec.Maps {
		if n := s.of(name); n != 0 {
			m.MaxEntries = n
		}
	}
}

// Maps are all maps of one agent. The zero value is of no use: see New, Open and Read.
type Maps struct {
	bpf   bpfMaps
	lock  *os.File // the pin folder, locked; nil where there is none
	sizes Sizes

	services        []byte // mappings of the arrays of these names
	slots           []byte
	backends        []byte
	servicePrefixes []byte
	serviceStats    []byte
	backendStats    []byte

	// Fault, when set, is asked before every write, with the map's name; its error is the write's. Tests
	// inject failures by it.
	Fault func(mapName string) error
}

// New makes maps that no folder holds: they are gone with Close. For tests.
func New(sizes Sizes) (*Maps, error) {
	m := &Maps{sizes: sizes}
	if err := m.load(ebpf.CollectionOptions{}); err != nil {
		return nil, err
	}
	return m, m.start(unix.PROT_READ | unix.PROT_WRITE)
}

// Open takes the folder `dir`, on a BPF file system, for one agent: it adopts the maps pinned there and
// makes and pins those that are missing. The folder stays locked until Close, or until the process ends.
//
// Returns ErrInUse if another agent has it, ErrLayout or ErrSize if maps there cannot be adopted; nothing is
// changed then.
func Open(dir string, sizes Sizes) (*Maps, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of map pins: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the folder of map pins: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", dir, ErrInUse)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := checkLayout(dir); err != nil {
		lock.Close()
		return nil, err
	}
	if sizes.Flows == 0 {
		if sizes.Flows, err = flowsOf(dir); err != nil {
			lock.Close()
			return nil, err
		}
	}
	m := &Maps{lock: lock, sizes: sizes}
	if err := m.load(ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: dir}}); err != nil {
		lock.Close()
		return nil, err
	}
	return m, m.start(unix.PROT_READ | unix.PROT_WRITE)
}

// flowsOf returns the size of the flow table where none is asked for: that of the one which is pinned, so that
// nothing is lost where the machine's memory has changed, else what fits the memory.
func flowsOf(dir string) (uint32, error) {
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(dir, "flows"), nil)
	if err == nil {
		defer pinned.Close()
		return pinned.MaxEntries(), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("open pinned map flows: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("read the size of the memory: %w", err)
	}
	return flowsFor(uint64(info.Totalram) * uint64(info.Unit)), nil
}

// flowsFor returns how many entries the flow table has on a machine with so many bytes of memory: what a
// four-hundredth of it can hold, as a power of two.
func flowsFor(memory uint64) uint32 {
	const entry, least, most = 192, 1 << 14, 1 << 22
	n := uint64(least)
	for n < most && 2*n*entry <= memory/400 {
		n *= 2
	}
	return uint32(n)
}

// Read opens the maps pinned in `dir` to read them, also while an agent runs. The result must not be written
// through. Returns ErrNotPinned if there are none, or not yet all: an agent that starts makes one after another.
func Read(dir string) (*Maps, error) {
	if _, err := os.Stat(filepath.Join(dir, "record")); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: no agent has run with it", ErrNotPinned, dir)
	}
	if err := checkLayout(dir); err != nil {
		return nil, err
	}
	m := &Maps{}
	for name, p := range m.pointers() {
		var err error
		// Not ReadOnly: the kernel maps no read-only map file into memory.
		*p, err = ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			m.Close()
			return nil, fmt.Errorf("%w in %s: %s is missing, as while the first agent starts", ErrNotPinned, dir, name)
		}
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("open pinned map %s: %w", name, err)
		}
	}
	return m, m.start(unix.PROT_READ)
}

// checkLayout returns ErrLayout unless the maps in `dir` are of our layout, or not there.
func checkLayout(dir string) error {
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(dir, "record"), &ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned map record: %w", err)
	}
	defer pinned.Close()
	value, err := pinned.LookupBytes(uint32(0))
	if err != nil {
		return fmt.Errorf("read pinned map record: %w", err)
	}
	// The layout's number is the first word of every version's record; 0 was not written yet.
	layout := binary.NativeEndian.Uint32(value)
	if layout != 0 && layout != LayoutVersion {
		return fmt.Errorf("%w in %s: they have layout %d, this version has %d; `lbagent cleanup` removes them, and with them every flow",
			ErrLayout, dir, layout, LayoutVersion)
	}
	return nil
}

func (m *Maps) load(opts ebpf.CollectionOptions) error {
	spec, err := loadBpf()
	if err != nil {
		return fmt.Errorf("read the maps' object: %w", err)
	}
	m.sizes.Apply(spec)
	if opts.Maps.PinPath != "" {
		for _, s := range spec.Maps {
			s.Pinning = ebpf.PinByName
		}
	}
	err = spec.LoadAndAssign(&m.bpf, &opts)
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("%w in %s, see --flows, --max-services, --max-frontends, --max-backends and --max-slots: %w; `lbagent cleanup` removes them, and with them every flow",
			ErrSize, opts.Maps.PinPath, err)
	}
	if err != nil {
		return fmt.Errorf("make the maps: %w", err)
	}
	return nil
}

// start maps the arrays into memory and, on the first open, writes the record.
func (m *Maps) start(prot int) error {
	err := func() error {
		for _, a := range []struct {
			m    *ebpf.Map
			into *[]byte
		}{
			{m.bpf.Services, &m.services}, {m.bpf.Slots, &m.slots}, {m.bpf.Backends, &m.backends},
			{m.bpf.ServicePrefixes, &m.servicePrefixes}, {m.bpf.ServiceStats, &m.serviceStats}, {m.bpf.BackendStats, &m.backendStats},
		} {
			var err error
			if *a.into, err = mapArray(a.m, prot); err != nil {
				return err
			}
		}
		if prot&unix.PROT_WRITE == 0 {
			return nil
		}
		var r bpfRecord
		if err := m.bpf.Record.Lookup(uint32(0), &r); err != nil {
			return fmt.Errorf("read map record: %w", err)
		}
		if r.Layout == LayoutVersion {
			return nil
		}
		r.Layout = LayoutVersion
		var key [16]byte
		rand.Read(key[:])
		r.HashKey = [2]uint64{binary.NativeEndian.Uint64(key[:8]), binary.NativeEndian.Uint64(key[8:])}
		if err := m.bpf.Record.Put(uint32(0), r); err != nil {
			return fmt.Errorf("write map record: %w", err)
		}
		return nil
	}()
	if err != nil {
		m.Close()
	}
	return err
}

func mapArray(m *ebpf.Map, prot int) ([]byte, error) {
	size := int(stride(m)) * int(m.MaxEntries())
	b, err := unix.Mmap(m.FD(), 0, size, prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s into memory: %w", m, err)
	}
	return b, nil
}

// stride is the distance of two values of an array: the kernel rounds up to 8 bytes.
func stride(m *ebpf.Map) uint32 { return (m.ValueSize() + 7) &^ 7 }

// Close lets go of the maps; those that are pinned stay.
func (m *Maps) Close() error {
	var errs []error
	for _, b := range []*[]byte{&m.services, &m.slots, &m.backends, &m.servicePrefixes, &m.serviceStats, &m.backendStats} {
		if *b != nil {
			errs = append(errs, unix.Munmap(*b))
			*b = nil
		}
	}
	for _, p := range m.pointers() {
		if *p != nil {
			errs = append(errs, (*p).Close())
			*p = nil
		}
	}
	if m.lock != nil {
		errs = append(errs, m.lock.Close())
		m.lock = nil
	}
	return errors.Join(errs...)
}

func (m *Maps) pointers() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		"frontends": &m.bpf.Frontends, "services": &m.bpf.Services, "service_names": &m.bpf.ServiceNames,
		"slots": &m.bpf.Slots, "backends": &m.bpf.Backends, "flows": &m.bpf.Flows,
		"affinity": &m.bpf.Affinity, "source_ranges": &m.bpf.SourceRanges, "service_prefixes": &m.bpf.ServicePrefixes,
		"service_stats": &m.bpf.ServiceStats, "backend_stats": &m.bpf.BackendStats, "icmp_limits": &m.bpf.IcmpLimits,
		"pending": &m.bpf.Pending, "flow_locks": &m.bpf.FlowLocks, "changes": &m.bpf.Changes,
		"devices": &m.bpf.Devices, "vlans": &m.bpf.Vlans, "reasons": &m.bpf.Reasons, "record": &m.bpf.Record,
	}
}

// All returns every map by its name, for a loader to give to its programs. They stay ours to close.
func (m *Maps) All() map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	for name, p := range m.pointers() {
		all[name] = *p
	}
	return all
}

// Sizes returns the sizes that the maps were opened with, to be applied to the specs of programs.
func (m *Maps) Sizes() Sizes {
	return Sizes{
		Frontends: m.bpf.Frontends.MaxEntries(), Services: m.bpf.Services.MaxEntries(),
		Slots: m.bpf.Slots.MaxEntries(), Backends: m.bpf.Backends.MaxEntries(), Flows: m.bpf.Flows.MaxEntries(),
	}
}

// HashKey is the key of the selection hash.
func (m *Maps) HashKey() ([2]uint64, error) {
	var r bpfRecord
	if err := m.bpf.Record.Lookup(uint32(0), &r); err != nil {
		return [2]uint64{}, fmt.Errorf("read map record: %w", err)
	}
	return r.HashKey, nil
}

// Grace returns once no program can still use what it read before the call: an RCU grace period, waited for
// by membarrier (4.3). The expedited forms of that call do not wait for RCU.
func Grace() error {
	const cmdGlobal = 1 // MEMBARRIER_CMD_GLOBAL
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, cmdGlobal, 0, 0); errno != 0 {
		return fmt.Errorf("wait for a grace period: %w", errno)
	}
	return nil
}

// Now is the clock of Flow.LastSeenNs, in nanoseconds.
func Now() (uint64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &t); err != nil {
		return 0, fmt.Errorf("read the monotonic clock: %w", err)
	}
	return uint64(t.Nano()), nil
}

func (m *Maps) fault(name string) error {
	if m.Fault == nil {
		return nil
	}
	return m.Fault(name)
}

// put writes an element of a hash.
func (m *Maps) put(name string, to *ebpf.Map, key, value any) error {
	if err := m.fault(name); err != nil {
		return err
	}
	return to.Put(key, value)
}

// remove deletes an element of a hash; that there is none is no error.
func (m *Maps) remove(name string, from *ebpf.Map, key any) error {
	if err := m.fault(name); err != nil {
		return err
	}
	if err := from.Delete(key); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// SetFrontend writes one frontend, with the tag of its key.
func (m *Maps) SetFrontend(k FrontendKey, f Frontend) error {
	f.KeyTag = k.Tag()
	if err := m.put("frontends", m.bpf.Frontends, k, f); err != nil {
		return fmt.Errorf("write frontend %s: %w", k.VIP(), err)
	}
	return nil
}

// DeleteFrontend removes one frontend; that there is none is no error.
func (m *Maps) DeleteFrontend(k FrontendKey) error {
	if err := m.remove("frontends", m.bpf.Frontends, k); err != nil {
		return fmt.Errorf("delete frontend %s: %w", k.VIP(), err)
	}
	return nil
}

// EachFrontend calls yield for every frontend, in no order, until it returns false.
func (m *Maps) EachFrontend(yield func(FrontendKey, Frontend) bool) error {
	return each(m.bpf.Frontends, yield)
}

// SetServiceName gives a service id its name.
func (m *Maps) SetServiceName(id uint32, n ServiceName) error {
	if err := m.put("service_names", m.bpf.ServiceNames, id, n); err != nil {
		return fmt.Errorf("write name of service %d: %w", id, err)
	}
	return nil
}

// DeleteServiceName takes the name of a service id away; that it has none is no error.
func (m *Maps) DeleteServiceName(id uint32) error {
	if err := m.remove("service_names", m.bpf.ServiceNames, id); err != nil {
		return fmt.Errorf("delete name of service %d: %w", id, err)
	}
	return nil
}

// EachServiceName calls yield for every named service id, in no order, until it returns false.
func (m *Maps) EachServiceName(yield func(uint32, ServiceName) bool) error {
	return each(m.bpf.ServiceNames, yield)
}

// Service returns the slot ranges and the policy of a service.
func (m *Maps) Service(id uint32) Service {
	var s Service
	load := func(offset uintptr) uint64 { return atomic.LoadUint64(m.word(m.services, m.bpf.Services, id, offset)) }
	cluster, local, policy := load(unsafe.Offsetof(s.Cluster)), load(unsafe.Offsetof(s.Local)), load(unsafe.Offsetof(s.Policy))
	s.Cluster, s.Local = *(*SlotRange)(unsafe.Pointer(&cluster)), *(*SlotRange)(unsafe.Pointer(&local))
	s.Policy = *(*Policy)(unsafe.Pointer(&policy))
	return s
}

// SetServiceCluster switches the scope Cluster of a service to another range of slots: one store, so no packet
// sees half of it.
func (m *Maps) SetServiceCluster(id uint32, r SlotRange) error {
	return m.setService(id, unsafe.Offsetof(Service{}.Cluster), *(*uint64)(unsafe.Pointer(&r)))
}

// SetServiceLocal is SetServiceCluster for the scope Local.
func (m *Maps) SetServiceLocal(id uint32, r SlotRange) error {
	return m.setService(id, unsafe.Offsetof(Service{}.Local), *(*uint64)(unsafe.Pointer(&r)))
}

// SetServicePolicy switches a service to another policy, by one store.
func (m *Maps) SetServicePolicy(id uint32, p Policy) error {
	return m.setService(id, unsafe.Offsetof(Service{}.Policy), *(*uint64)(unsafe.Pointer(&p)))
}

func (m *Maps) setService(id uint32, offset uintptr, word uint64) error {
	if err := m.fault("services"); err != nil {
		return fmt.Errorf("write service %d: %w", id, err)
	}
	atomic.StoreUint64(m.word(m.services, m.bpf.Services, id, offset), word)
	return nil
}

// ServiceStats returns the statistics of a service id.
func (m *Maps) ServiceStats(id uint32) (s ServiceStats) {
	m.copyStats(unsafe.Slice((*uint64)(unsafe.Pointer(&s)), unsafe.Sizeof(s)/8), m.serviceStats, m.bpf.ServiceStats, id)
	return s
}

// BackendStats returns the statistics of a backend id.
func (m *Maps) BackendStats(id uint32) (s BackendStats) {
	m.copyStats(unsafe.Slice((*uint64)(unsafe.Pointer(&s)), unsafe.Sizeof(s)/8), m.backendStats, m.bpf.BackendStats, id)
	return s
}

// copyStats loads words that programs add to.
func (m *Maps) copyStats(to []uint64, b []byte, a *ebpf.Map, id uint32) {
	for i := range to {
		to[i] = atomic.LoadUint64(m.word(b, a, id, uintptr(i)*8))
	}
}

// ClearServiceStats sets the statistics of a service id to 0, for its new owner.
func (m *Maps) ClearServiceStats(id uint32) error {
	return m.clearStats("service_stats", m.serviceStats, m.bpf.ServiceStats, id)
}

// ClearBackendStats is ClearServiceStats for a backend id.
func (m *Maps) ClearBackendStats(id uint32) error {
	return m.clearStats("backend_stats", m.backendStats, m.bpf.BackendStats, id)
}

func (m *Maps) clearStats(name string, b []byte, a *ebpf.Map, id uint32) error {
	if err := m.fault(name); err != nil {
		return fmt.Errorf("clear %s of %d: %w", name, id, err)
	}
	for i := range a.ValueSize() / 8 {
		atomic.StoreUint64(m.word(b, a, id, uintptr(i)*8), 0)
	}
	return nil
}

// SetSourceRange lets clients of a prefix use the load balancer addresses of a service.
func (m *Maps) SetSourceRange(service uint32, p netip.Prefix) error {
	if err := m.put("source_ranges", m.bpf.SourceRanges, sourceRangeOf(service, p), uint8(1)); err != nil {
		return fmt.Errorf("write source range %s of service %d: %w", p, service, err)
	}
	return nil
}

// DeleteSourceRange takes that back; that it was not said is no error.
func (m *Maps) DeleteSourceRange(service uint32, p netip.Prefix) error {
	if err := m.remove("source_ranges", m.bpf.SourceRanges, sourceRangeOf(service, p)); err != nil {
		return fmt.Errorf("delete source range %s of service %d: %w", p, service, err)
	}
	return nil
}

// EachSourceRange calls yield for every source range, in no order, until it returns false.
func (m *Maps) EachSourceRange(yield func(service uint32, p netip.Prefix) bool) error {
	var k bpfSourceRange
	var v uint8
	all := m.bpf.SourceRanges.Iterate() // not in batches: an LPM trie has them since 6.6 or so
	for all.Next(&k, &v) {
		addr, bits := netip.AddrFrom16(k.Address), int(k.PrefixLength)-32
		if addr.Is4In6() && bits >= 96 {
			addr, bits = addr.Unmap(), bits-96
		}
		if !yield(k.Service, netip.PrefixFrom(addr, bits)) {
			return nil
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read map source_ranges: %w", err)
	}
	return nil
}

func sourceRangeOf(service uint32, p netip.Prefix) bpfSourceRange {
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return bpfSourceRange{PrefixLength: uint32(32 + bits), Service: service, Address: p.Addr().As16()}
}

// MaxServicePrefixes is how many prefixes SetServicePrefixes takes.
const MaxServicePrefixes = len(bpfServicePrefixes{}.List)

// SetServicePrefixes says where ClusterIPs are, and whether there are some elsewhere. What stays in its place in the
// list is not touched. A prefix that comes or goes is four words, and the programs take no lock for it: a packet that
// is no service's may in that moment be judged by none, or by a mixture of the old one and the new one.
func (m *Maps) SetServicePrefixes(prefixes []netip.Prefix, elsewhere bool) error {
	if len(prefixes) > MaxServicePrefixes {
		return fmt.Errorf("write service prefixes: %d are more than %d", len(prefixes), MaxServicePrefixes)
	}
	if err := m.fault("service_prefixes"); err != nil {
		return fmt.Errorf("write service prefixes: %w", err)
	}
	want := bpfServicePrefixes{Count: uint32(len(prefixes))}
	if elsewhere {
		want.Elsewhere = 1
	}
	for i, p := range prefixes {
		want.List[i] = prefixOf(p)
	}
	word := func(offset uintptr) *uint64 {
		return m.word(m.servicePrefixes, m.bpf.ServicePrefixes, 0, offset)
	}
	for i, p := range want.List {
		at := unsafe.Offsetof(want.List) + uintptr(i)*unsafe.Sizeof(p)
		now, next := (*[4]uint64)(unsafe.Pointer(word(at))), *(*[4]uint64)(unsafe.Pointer(&p))
		if *now == next {
			continue
		}
		// Mask first when it goes and last when it comes: where there is no mask, there is no prefix.
		for _, step := range []struct {
			word  int
			value uint64
		}{{2, 0}, {3, 0}, {0, next[0]}, {1, next[1]}, {3, next[3]}, {2, next[2]}} {
			atomic.StoreUint64(&now[step.word], step.value)
		}
	}
	tail := unsafe.Offsetof(want.Count)
	atomic.StoreUint64(word(tail), *(*uint64)(unsafe.Pointer(&want.Count)))
	return nil
}

// ServicePrefixes returns what SetServicePrefixes has said.
func (m *Maps) ServicePrefixes() (prefixes []netip.Prefix, elsewhere bool) {
	all := (*bpfServicePrefixes)(unsafe.Pointer(unsafe.SliceData(m.servicePrefixes)))
	for _, p := range all.List[:min(int(all.Count), len(all.List))] {
		bits := 0
		for _, b := range p.Mask {
			bits += mathbits.OnesCount8(b)
		}
		addr := netip.AddrFrom16(p.Address)
		if addr.Is4In6() && bits >= 96 {
			addr, bits = addr.Unmap(), bits-96
		}
		prefixes = append(prefixes, netip.PrefixFrom(addr, bits))
	}
	return prefixes, all.Elsewhere != 0
}

func prefixOf(p netip.Prefix) (to bpfPrefix) {
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	to.Address = p.Addr().As16()
	for i := range bits {
		to.Mask[i/8] |= 0x80 >> (i % 8)
	}
	return to
}

// EachAffinity calls yield for every client's remembered backend, in no order, until it returns false.
func (m *Maps) EachAffinity(yield func(AffinityKey, Affinity) bool) error {
	return each(m.bpf.Affinity, yield)
}

// Slots returns the backend ids in a range, which must lie in the map.
func (m *Maps) Slots(r SlotRange) []uint32 {
	ids := make([]uint32, r.Count)
	for i := range ids {
		ids[i] = binary.NativeEndian.Uint32(m.slots[m.slot(r.First+uint32(i)):])
	}
	return ids
}

// SetSlots writes backend ids into a range that no service refers to.
func (m *Maps) SetSlots(first uint32, ids []uint32) error {
	if err := m.fault("slots"); err != nil {
		return fmt.Errorf("write slots from %d: %w", first, err)
	}
	for i, id := range ids {
		binary.NativeEndian.PutUint32(m.slots[m.slot(first+uint32(i)):], id)
	}
	return nil
}

func (m *Maps) slot(i uint32) int { return int(i) * int(stride(m.bpf.Slots)) }

// Backend returns a backend.
func (m *Maps) Backend(id uint32) Backend {
	var b Backend
	at := int(id) * int(stride(m.bpf.Backends))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&b)), unsafe.Sizeof(b)), m.backends[at:])
	return b
}

// SetBackend writes a backend that no slot refers to.
func (m *Maps) SetBackend(id uint32, b Backend) error {
	if err := m.fault("backends"); err != nil {
		return fmt.Errorf("write backend %d: %w", id, err)
	}
	at := int(id) * int(stride(m.bpf.Backends))
	copy(m.backends[at:], unsafe.Slice((*byte)(unsafe.Pointer(&b)), unsafe.Sizeof(b)))
	return nil
}

// SetBackendLife changes generation and state of a backend together, by one store.
func (m *Maps) SetBackendLife(id uint32, l BackendLife) error {
	if err := m.fault("backends"); err != nil {
		return fmt.Errorf("write backend %d: %w", id, err)
	}
	atomic.StoreUint64(m.word(m.backends, m.bpf.Backends, id, unsafe.Offsetof(Backend{}.Life)),
		lifeWord(l))
	return nil
}

// lifeWord is the u64 that a BackendLife is in memory.
func lifeWord(l BackendLife) (w uint64) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&w)), 8), unsafe.Slice((*byte)(unsafe.Pointer(&l)), 8))
	return w
}

// EachBackend yields every backend that has an id, by id: removed ones too, while some flow may name them.
func (m *Maps) EachBackend() iter.Seq2[uint32, Backend] {
	return func(yield func(uint32, Backend) bool) {
		for id := range m.bpf.Backends.MaxEntries() {
			if b := m.Backend(id); b.Life.State != BackendFree && !yield(id, b) {
				return
			}
		}
	}
}

// word returns the address of an aligned u64 of an array's element.
func (m *Maps) word(b []byte, a *ebpf.Map, id uint32, offset uintptr) *uint64 {
	at := int(id)*int(stride(a)) + int(offset)
	return (*uint64)(unsafe.Pointer(&b[at : at+8][0]))
}

// EachFlow calls yield for every half of a flow, living or not, in no order, until it returns false. A half
// that is in both tables is yielded once, as assured. Entries that are made meanwhile may be missing.
func (m *Maps) EachFlow(yield func(t Tuple, f Flow, assured bool) bool) error {
	assured := map[Tuple]bool{}
	more := true
	err := each(m.bpf.Flows, func(t Tuple, f Flow) bool {
		assured[t] = true
		more = yield(t, f, true)
		return more
	})
	if err != nil || !more {
		return err
	}
	return each(m.bpf.Pending, func(t Tuple, f Flow) bool {
		return assured[t] || yield(t, f, false)
	})
}

// EachHalf calls yield for every entry of one table, living or not, in no order, until it returns false. One that
// is there all the while is not missed.
func (m *Maps) EachHalf(in Table, yield func(Tuple, Flow) bool) error {
	if in == Pending {
		return each(m.bpf.Pending, yield)
	}
	return each(m.bpf.Flows, yield)
}

// SetDevice says which bridge a device is a port of.
func (m *Maps) SetDevice(index uint32, d Device) error {
	if err := m.put("devices", m.bpf.Devices, index, d); err != nil {
		return fmt.Errorf("write device %d: %w", index, err)
	}
	return nil
}

// DeleteDevice says that a device is no port of a bridge; that nothing was said is no error.
func (m *Maps) DeleteDevice(index uint32) error {
	if err := m.remove("devices", m.bpf.Devices, index); err != nil {
		return fmt.Errorf("delete device %d: %w", index, err)
	}
	return nil
}

// EachDevice calls yield for every port of a bridge, in no order, until it returns false.
func (m *Maps) EachDevice(yield func(index uint32, d Device) bool) error {
	return each(m.bpf.Devices, yield)
}

// SetVLAN says which device a VLAN of another has.
func (m *Maps) SetVLAN(k VLANKey, index uint32) error {
	if err := m.put("vlans", m.bpf.Vlans, k, index); err != nil {
		return fmt.Errorf("write VLAN %d of device %d: %w", k.Id, k.Parent, err)
	}
	return nil
}

// DeleteVLAN says that a VLAN has no device; that nothing was said is no error.
func (m *Maps) DeleteVLAN(k VLANKey) error {
	if err := m.remove("vlans", m.bpf.Vlans, k); err != nil {
		return fmt.Errorf("delete VLAN %d of device %d: %w", k.Id, k.Parent, err)
	}
	return nil
}

// EachVLAN calls yield for every VLAN that has a device, in no order, until it returns false.
func (m *Maps) EachVLAN(yield func(k VLANKey, index uint32) bool) error {
	return each(m.bpf.Vlans, yield)
}

// Reasons returns how many packets left the programs for each reason, by the reason's name.
func (m *Maps) Reasons() (map[string]uint64, error) {
	counts := map[string]uint64{}
	for i := range m.bpf.Reasons.MaxEntries() {
		var cpus []uint64
		if err := m.bpf.Reasons.Lookup(i, &cpus); err != nil {
			return nil, fmt.Errorf("read map reasons: %w", err)
		}
		for _, n := range cpus {
			counts[EnumName("reason", uint64(i))] += n
		}
	}
	return counts, nil
}

// each reads a hash in batches (5.6). An element that moves meanwhile is seen once, twice or not at all.
func each[K, V any](m *ebpf.Map, yield func(K, V) bool) error {
	const chunk = 1024 // far more than the kernel ever keeps in one bucket
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, chunk), make([]V, chunk)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read map %s: %w", m, err)
		}
		for i := range n {
			if !yield(keys[i], values[i]) {
				return nil
			}
		}
		if err != nil {
			return nil
		}
	}
}

// KeyOf returns the key of a VIP.
func KeyOf(v lb.VIP) FrontendKey {
	return FrontendKey{Address: v.Addr.As16(), Port: v.Port, Protocol: bpfProtocol(v.Protocol)}
}

// VIP returns what a key stands for.
func (k bpfFrontendKey) VIP() lb.VIP {
	return lb.VIP{Addr: netip.AddrFrom16(k.Address).Unmap(), Port: k.Port, Protocol: lb.Protocol(k.Protocol)}
}

// Tag folds a key into 16 bits, as key_tag of bpf/service.h does. A frontend with another tag than its key's is
// absent for the programs.
func (k bpfFrontendKey) Tag() uint16 {
	var h uint32
	for _, word := range *(*[unsafe.Sizeof(k) / 4]uint32)(unsafe.Pointer(&k)) {
		h = (h ^ word) * 0x9e3779b1
	}
	return max(uint16(h>>16), 1)
}

// FrontendOf returns the value of a frontend of a service, without the tag of its key.
func FrontendOf(service uint32, k lb.Kind) Frontend {
	return Frontend{Service: service, Kind: bpfFrontendKind(k)}
}

// NameOf returns how the maps write a service's name. A part that is longer than an API server lets it be is an
// error.
func NameOf(n lb.ServiceName) (ServiceName, error) {
	s := ServiceName{Protocol: bpfProtocol(n.Protocol), Family: uint8(n.Family)}
	if n.Pod {
		s.Pod = 1
	}
	for _, part := range []struct {
		to   []int8
		from string
	}{{s.Namespace[:], n.Namespace}, {s.Name[:], n.Name}, {s.Port[:], n.Port}} {
		if len(part.from) >= len(part.to) {
			return s, fmt.Errorf("name %q is longer than %d bytes", part.from, len(part.to)-1)
		}
		for i, c := range []byte(part.from) {
			part.to[i] = int8(c)
		}
	}
	return s, nil
}

// LB returns the service's name as the rest of lbagent writes it.
func (n bpfServiceName) LB() lb.ServiceName {
	return lb.ServiceName{
		Namespace: text(n.Namespace[:]), Name: text(n.Name[:]), Port: text(n.Port[:]),
		Protocol: lb.Protocol(n.Protocol), Family: lb.Family(n.Family), Pod: n.Pod != 0,
	}
}

func text(c []int8) string {
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(c))), len(c))
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(bytes.ToValidUTF8(before, []byte("\ufffd"))) // a damaged map may say anything
}

// Addr returns where a backend is.
func (b bpfBackend) Addr() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(b.Address).Unmap(), b.Life.Port)
}

// VIP returns the key by which a packet straight to a backend is looked up.
func (b bpfBackend) VIP() lb.VIP {
	return lb.VIP{Addr: b.Addr().Addr(), Port: b.Life.Port, Protocol: lb.Protocol(b.Protocol)}
}

// BackendOf returns a backend of a service as it is written, with address and protocol of an identity.
func BackendOf(service uint32, at lb.VIP, l BackendLife) Backend {
	l.Port = at.Port
	return Backend{Address: at.Addr.As16(), Protocol: bpfProtocol(at.Protocol), Service: service, Life: l}
}

// From returns where a packet of this tuple comes from.
func (t bpfTuple) From() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.Source).Unmap(), t.SourcePort)
}

// To returns where a packet of this tuple goes.
func (t bpfTuple) To() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.Destination).Unmap(), t.DestinationPort)
}

// enums is what BTF knows of our enumerations, read once.
var enums = sync.OnceValues(func() (*btf.Spec, error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	return spec.Types, nil
})

// EnumName returns the name that C gives a value of an enumeration, in lower case and without the prefix
// that all its names share: EnumName("reason", 18) is "no_backend". A value without a name is its number.
func EnumName(enum string, value uint64) string {
	types, err := enums()
	var e *btf.Enum
	if err == nil {
		err = types.TypeByName(enum, &e)
	}
	if err == nil {
		for _, v := range e.Values {
			if v.Value == value {
				_, name, _ := strings.Cut(v.Name, "_")
				return strings.ToLower(name)
			}
		}
	}
	return fmt.Sprint(value)
}
