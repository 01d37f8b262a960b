// SPDX-License-Identifier: Apache-2.0

// Package loader loads the programs of bpf/ against the maps of package maps, attaches them to the devices
// it is given, pins what holds them there, replaces them on an upgrade and takes them away. It never looks
// into a map.
package loader

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lbagent/lbagent/maps"
)

// Role says which programs a device gets.
type Role uint8

// The roles.
const (
	Node Role = iota // node_in and node_out: a device by which the node speaks to others
	Pod              // pod_in and pod_out: the host side of a routed pod
	Port             // port_in and pod_out: the host side of a pod on a bridge
)

func (r Role) String() string {
	switch r {
	case Pod:
		return "pod"
	case Port:
		return "port"
	}
	return "node"
}

// Device is a device to attach to.
type Device struct {
	Index      int
	Name       string
	Role       Role
	LinkHeader int // bytes before the IP header: 14, or 0 for devices such as WireGuard and tun
}

// Config is what an operator or a test chooses. The zero value of each field is its default.
type Config struct {
	// LinkDir is the folder of link pins, on a BPF file system. Empty: the programs stay attached only
	// while the Loader is open.
	LinkDir string
	// Timeouts is DefaultTimeouts() where it is zero.
	Timeouts Timeouts
	// SilentBackend is how long a removed backend may leave a segment unanswered before its client's next
	// packet is answered with a TCP reset; negative: for ever.
	SilentBackend time.Duration
	// Hairpin is what a pod that is its own endpoint sees as its client, IPv4 and IPv6.
	Hairpin [2]netip.Addr
	// Clsact attaches by clsact filters even where the kernel has tcx, for tests.
	Clsact bool
}

// DefaultHairpin are the addresses of --hairpin-addresses: of the link alone, and of a ULA prefix.
func DefaultHairpin() [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr("169.254.77.1"), netip.MustParseAddr("fd77::1")}
}

// Loader holds loaded programs and what attaches them. Its methods must not be called concurrently (but see
// Sweep), and all from the network namespace of the devices.
type Loader struct {
	maps     *maps.Maps
	config   Config
	features Features
	byHeader map[int]*tcPrograms // by length of the link header
	sweeper  *sweepPrograms
	hooks    map[hook]attachment
	clsact   bool // the kernel has no tcx, or is not to use it
	adopted  bool
}

// Features is what running them has shown of this kernel.
type Features struct {
	TCX      bool `json:"tcx"`      // tcx links (6.6); else clsact filters
	CsumIPv6 bool `json:"csumIPv6"` // BPF_F_IPV6 of bpf_l4_csum_replace (6.16)
}

// Load loads the programs and attaches nothing. The verifier's refusal is an *ebpf.VerifierError.
func Load(m *maps.Maps, config Config) (*Loader, error) {
	if config.Timeouts == (Timeouts{}) {
		config.Timeouts = DefaultTimeouts()
	}
	if config.Hairpin == ([2]netip.Addr{}) {
		config.Hairpin = DefaultHairpin()
	}
	features, err := Probe()
	if err != nil {
		return nil, err
	}
	l := &Loader{
		maps: m, config: config, features: features,
		byHeader: map[int]*tcPrograms{}, hooks: map[hook]attachment{},
		clsact: config.Clsact || !features.TCX,
	}
	// Ethernet now, so that a refusal is known before anything is attached; the rest as it is met.
	if _, err := l.programs(14); err != nil {
		return nil, err
	}
	l.sweeper = new(sweepPrograms)
	if err := l.load(loadSweep, 14, l.sweeper); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Features returns what the kernel was found to have.
func (l *Loader) Features() Features { return l.features }

// Close lets go of the programs. Those that are attached by pinned links or filters stay attached.
func (l *Loader) Close() error {
	var errs []error
	for _, a := range l.hooks {
		errs = append(errs, a.close())
	}
	for _, p := range l.byHeader {
		errs = append(errs, p.Close())
	}
	if l.sweeper.Sweep != nil {
		errs = append(errs, l.sweeper.Close())
		l.sweeper.Sweep = nil
	}
	clear(l.hooks)
	clear(l.byHeader)
	return errors.Join(errs...)
}

// programs returns the programs for devices with a link header of that length, loaded on first use: a copy
// with another constant costs a packet nothing, a map of devices would cost it a lookup.
func (l *Loader) programs(linkHeader int) (*tcPrograms, error) {
	if p := l.byHeader[linkHeader]; p != nil {
		return p, nil
	}
	var p tcPrograms
	if err := l.load(loadTc, linkHeader, &p); err != nil {
		return nil, err
	}
	l.byHeader[linkHeader] = &p
	return &p, nil
}

// load loads the programs of an object, for devices with a link header of that length.
func (l *Loader) load(object func() (*ebpf.CollectionSpec, error), linkHeader int, into any) error {
	spec, err := object()
	if err != nil {
		return fmt.Errorf("read the programs' object: %w", err)
	}
	if err := l.configure(spec, linkHeader); err != nil {
		return err
	}
	l.maps.Sizes().Apply(spec)
	err = spec.LoadAndAssign(into, &ebpf.CollectionOptions{MapReplacements: l.maps.All()})
	if err != nil {
		return fmt.Errorf("load the programs: %w", err)
	}
	return nil
}

// configure sets every constant of the programs; one that it does not know is an error, so that none is
// forgotten.
func (l *Loader) configure(spec *ebpf.CollectionSpec, linkHeader int) error {
	key, err := l.maps.HashKey()
	if err != nil {
		return err
	}
	t := l.config.Timeouts
	var csumFlag uint64
	if l.features.CsumIPv6 {
		csumFlag = csumIPv6
	}
	silent := uint32(math.MaxUint32) // SILENT_NEVER
	if d := l.config.SilentBackend; d >= 0 && d.Milliseconds() < math.MaxUint32 {
		silent = uint32(d.Milliseconds())
	}
	values := map[string]any{
		"silent_backend_timeout_ms": silent,
		"hairpin_addresses":         [2][16]byte{l.config.Hairpin[0].As16(), l.config.Hairpin[1].As16()},
		"link_header_length":        uint8(linkHeader),
		"hash_key":                  key,
		"csum_ipv6_flag":            csumFlag,
		"timeouts_ns": tcFlowTimeouts{
			TcpPending: uint64(t.TCPPending), TcpEstablished: uint64(t.TCPEstablished), TcpHalfClosed: uint64(t.TCPHalfClosed),
			TcpClosed: uint64(t.TCPClosed), Reset: uint64(t.Reset), UdpPending: uint64(t.UDPPending), Udp: uint64(t.UDP),
		},
	}
	for name, v := range spec.Variables {
		if !v.Constant() {
			continue // it is there for its type alone
		}
		value, known := values[name]
		if !known {
			return fmt.Errorf("the programs have a variable %s that nothing sets", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set variable %s of the programs: %w", name, err)
		}
	}
	return nil
}

// Configure sets in the spec of other programs, which include bpf/config.h as well, what those for Ethernet
// devices were loaded with, so that the two can be measured side by side.
func (l *Loader) Configure(spec *ebpf.CollectionSpec) error { return l.configure(spec, 14) }

// Programs returns the programs for Ethernet devices by name, for tests that run them.
func (l *Loader) Programs() map[string]*ebpf.Program {
	p := l.byHeader[14]
	return map[string]*ebpf.Program{
		"pod_in": p.PodIn, "pod_out": p.PodOut, "port_in": p.PortIn, "node_in": p.NodeIn, "node_out": p.NodeOut,
	}
}
