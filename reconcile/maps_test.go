// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// What the maps say is read here without the help of the Reconciler: as a packet would, and as text.

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes BPF maps")
	}
}

// content is all that the maps say.
type content struct {
	sizes     maps.Sizes
	names     map[uint32]lb.ServiceName
	frontends map[lb.VIP]maps.Frontend
	badTags   []lb.VIP
	ranges    map[uint32]maps.SlotRange // not those of no slots
	slots     map[uint32][]uint32       // by service
	backends  map[uint32]maps.Backend   // not FREE ones
}

func read(m *maps.Maps) (content, error) {
	c := content{
		sizes: m.Sizes(), names: map[uint32]lb.ServiceName{}, frontends: map[lb.VIP]maps.Frontend{},
		ranges: map[uint32]maps.SlotRange{}, slots: map[uint32][]uint32{}, backends: map[uint32]maps.Backend{},
	}
	err := errors.Join(
		m.EachServiceName(func(id uint32, n maps.ServiceName) bool { c.names[id] = n.LB(); return true }),
		m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
			c.frontends[k.VIP()] = f
			if f.KeyTag != k.Tag() {
				c.badTags = append(c.badTags, k.VIP())
			}
			return true
		}))
	for id := range c.sizes.Services {
		r := m.Service(id).Cluster
		if r.Count == 0 {
			continue
		}
		c.ranges[id] = r
		if uint64(r.First)+uint64(r.Count) <= uint64(c.sizes.Slots) {
			c.slots[id] = m.Slots(r)
		}
	}
	for id, b := range m.EachBackend() {
		c.backends[id] = b
	}
	return c, err
}

// check returns what a packet must never meet, not even between two writes.
func (c content) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for vip, f := range c.frontends {
		switch {
		case lb.Kind(f.Kind) == lb.Address:
			if vip.Port != 0 || vip.Protocol != 0 || f.Service != 0 {
				bad("address entry %s leads to %d", vip, f.Service)
			}
			continue
		case lb.Kind(f.Kind) == lb.Identity:
			if vip.Port == 0 || vip.Protocol == 0 || f.Service != 0 {
				bad("identity %s leads to %d", vip, f.Service)
			}
			continue
		case f.Service == 0:
			bad("frontend %s leads nowhere", vip)
		case c.names[f.Service] == lb.ServiceName{}:
			bad("frontend %s leads to service %d, which has no name", vip, f.Service)
		}
		if lb.Kind(f.Kind) == lb.ClusterIP && lb.Kind(c.frontends[addressVIP(vip.Addr)].Kind) != lb.Address {
			bad("ClusterIP %s has no address entry", vip)
		}
	}
	for _, vip := range c.badTags {
		bad("frontend %s has the tag of another", vip)
	}
	type taken struct{ first, end uint64 }
	var all []taken
	for id, r := range c.ranges {
		all = append(all, taken{uint64(r.First), uint64(r.First) + uint64(r.Count)})
		if c.names[id] == (lb.ServiceName{}) {
			bad("service %d has slots and no name", id)
		}
		if c.slots[id] == nil {
			bad("service %d has slots out of the map", id)
		}
		for _, b := range c.slots[id] {
			backend := c.backends[b]
			if b == 0 || backend.Service != id || backend.Life.State != maps.BackendActive {
				bad("a slot of service %d names backend %d of service %d, which is %s", id, b, backend.Service, state(backend))
			}
		}
	}
	slices.SortFunc(all, func(a, b taken) int { return cmp.Compare(a.first, b.first) })
	for i := 1; i < len(all); i++ {
		if all[i].first < all[i-1].end {
			bad("slots %d belong to two services", all[i].first)
		}
	}
	return errors.Join(errs...)
}

func state(b maps.Backend) string { return maps.EnumName("backend_state", uint64(b.Life.State)) }

// String is the maps as a person would write them, without ids, ranges and generations.
func (c content) String() string {
	var lines, strays []string
	for id, name := range c.names {
		text := name.String() + "\n"
		var its []string
		for vip, f := range c.frontends {
			if f.Service == id {
				its = append(its, fmt.Sprintf("  frontend %s %s\n", vip, lb.Kind(f.Kind)))
			}
		}
		for _, b := range c.backends {
			if b.Service == id && b.Life.State != maps.BackendRemoved {
				its = append(its, fmt.Sprintf("  backend %s %s\n", b.Addr(), state(b)))
			}
		}
		slices.SortFunc(its, func(a, b string) int {
			return cmp.Or(-cmp.Compare(a[:4], b[:4]), cmp.Compare(a, b))
		})
		text += strings.Join(its, "")
		if c.ranges[id].Count > 0 {
			text += "  slots"
			for _, b := range c.slots[id] {
				text += " " + c.backends[b].Addr().String()
			}
			text += "\n"
		}
		lines = append(lines, text)
	}
	for vip, f := range c.frontends {
		if lb.Kind(f.Kind) == lb.Address {
			lines = append(lines, "~address "+vip.Addr.String()+"\n")
		} else if lb.Kind(f.Kind) == lb.Identity {
			lines = append(lines, "~identity "+vip.String()+"\n")
		} else if _, ok := c.names[f.Service]; !ok {
			strays = append(strays, fmt.Sprintf("stray frontend %s %s\n", vip, lb.Kind(f.Kind)))
		}
	}
	for _, b := range c.backends {
		if _, ok := c.names[b.Service]; !ok && b.Life.State != maps.BackendRemoved {
			strays = append(strays, fmt.Sprintf("stray backend %s %s\n", b.Addr(), state(b)))
		}
	}
	slices.Sort(lines)
	slices.Sort(strays)
	return strings.ReplaceAll(strings.Join(append(lines, strays...), ""), "~", "")
}

// expected is what content.String has to be when these services are in force: the model of all tests.
func expected(desired map[lb.ServiceName]lb.Service) string {
	c := content{names: map[uint32]lb.ServiceName{}, frontends: map[lb.VIP]maps.Frontend{}, ranges: map[uint32]maps.SlotRange{}, slots: map[uint32][]uint32{}, backends: map[uint32]maps.Backend{}}
	for name, svc := range desired {
		id := uint32(len(c.names) + 1)
		c.names[id] = name
		for _, f := range svc.Frontends { // in the place of any identity
			c.frontends[f.VIP] = maps.FrontendOf(id, f.Kind)
			if f.Kind == lb.ClusterIP {
				c.frontends[addressVIP(f.VIP.Addr)] = maps.FrontendOf(0, lb.Address)
			}
		}
		for _, b := range svc.Backends {
			n := uint32(len(c.backends) + 1)
			life := maps.BackendLife{State: maps.BackendDraining}
			if b.Cluster {
				life.State = maps.BackendActive
				c.slots[id] = append(c.slots[id], n)
			}
			at := ownVIP(name, b.Addr)
			c.backends[n] = maps.BackendOf(id, at, life)
			if _, taken := c.frontends[at]; !taken {
				c.frontends[at] = maps.FrontendOf(0, lb.Identity)
			}
		}
		c.ranges[id] = maps.SlotRange{Count: uint32(len(c.slots[id]))}
	}
	return c.String()
}

// parse reads services as content.String writes them; lines that follow from the others it skips.
func parse(text string) (map[lb.ServiceName]lb.Service, error) {
	all := map[lb.ServiceName]lb.Service{}
	var name lb.ServiceName
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "slots" || f[0] == "address" || f[0] == "identity" {
			continue
		}
		svc := all[name]
		var err error
		switch f[0] {
		case "frontend":
			var vip lb.VIP
			if vip, err = parseVIP(f[1]); err == nil {
				svc.Frontends = append(svc.Frontends, lb.Frontend{VIP: vip, Kind: kinds[f[2]]})
			}
		case "backend":
			var addr netip.AddrPort
			addr, err = netip.ParseAddrPort(f[1])
			svc.Backends = append(svc.Backends, lb.Backend{Addr: addr, Cluster: f[2] == "active", Serving: true})
		default:
			name, err = parseName(f[0], f[1])
			svc = lb.Service{Name: name}
		}
		if err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		all[name] = svc
	}
	return all, nil
}

var kinds = map[string]lb.Kind{"ClusterIP": lb.ClusterIP, "NodePort": lb.NodePort, "LoadBalancer": lb.LoadBalancer, "external": lb.External, "hostPort": lb.HostPort}

var protocols = map[string]lb.Protocol{"TCP": lb.TCP, "UDP": lb.UDP, "SCTP": lb.SCTP}

func parseVIP(s string) (lb.VIP, error) {
	addr, protocol, _ := strings.Cut(s, "/")
	a, err := netip.ParseAddrPort(addr)
	return lb.VIP{Addr: a.Addr(), Port: a.Port(), Protocol: protocols[protocol]}, err
}

func parseName(s, family string) (lb.ServiceName, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return lb.ServiceName{}, errors.New("no NAMESPACE/NAME:PORT/PROTOCOL FAMILY")
	}
	name, port, _ := strings.Cut(parts[1], ":")
	n := lb.ServiceName{Namespace: parts[0], Name: name, Port: port, Protocol: protocols[parts[2]], Family: lb.IPv4}
	if family == "IPv6" {
		n.Family = lb.IPv6
	}
	return n, nil
}
