// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	maps2 "maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lbagent/lbagent/balance"
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
	ranges    map[scopeOf]maps.SlotRange // not those of no slots
	slots     map[scopeOf][]uint32
	policies  map[uint32]maps.Policy // not the empty one
	sources   map[uint32][]netip.Prefix
	backends  map[uint32]maps.Backend // not FREE ones
	prefixes  []netip.Prefix
	elsewhere bool
}

// scopeOf is a scope of a service.
type scopeOf struct {
	service uint32
	scope   balance.Scope
}

func empty() content {
	return content{
		names: map[uint32]lb.ServiceName{}, frontends: map[lb.VIP]maps.Frontend{},
		ranges: map[scopeOf]maps.SlotRange{}, slots: map[scopeOf][]uint32{}, policies: map[uint32]maps.Policy{},
		sources: map[uint32][]netip.Prefix{}, backends: map[uint32]maps.Backend{},
	}
}

func read(m *maps.Maps) (content, error) {
	c := empty()
	c.sizes = m.Sizes()
	err := errors.Join(
		m.EachServiceName(func(id uint32, n maps.ServiceName) bool { c.names[id] = n.LB(); return true }),
		m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
			c.frontends[k.VIP()] = f
			if f.KeyTag != k.Tag() {
				c.badTags = append(c.badTags, k.VIP())
			}
			return true
		}),
		m.EachSourceRange(func(id uint32, p netip.Prefix) bool {
			c.sources[id] = append(c.sources[id], p)
			return true
		}))
	for id := range c.sizes.Services {
		is := m.Service(id)
		if is.Policy != (maps.Policy{}) {
			c.policies[id] = is.Policy
		}
		for scope, r := range map[balance.Scope]maps.SlotRange{balance.Cluster: is.Cluster, balance.Local: is.Local} {
			if r.Count == 0 {
				continue
			}
			c.ranges[scopeOf{id, scope}] = r
			if uint64(r.First)+uint64(r.Count) <= uint64(c.sizes.Slots) {
				c.slots[scopeOf{id, scope}] = m.Slots(r)
			}
		}
	}
	for id, b := range m.EachBackend() {
		c.backends[id] = b
	}
	c.prefixes, c.elsewhere = m.ServicePrefixes()
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
		switch lb.Kind(f.Kind) {
		case lb.ClusterIP, lb.LoadBalancer, lb.External:
			if lb.Kind(c.frontends[addressVIP(vip.Addr)].Kind) != lb.Address {
				bad("frontend %s has no address entry", vip)
			}
		}
		if lb.Kind(f.Kind) == lb.ClusterIP && !c.elsewhere && !within(c.prefixes, vip.Addr) {
			bad("ClusterIP %s is outside of all prefixes, and nothing says so", vip)
		}
	}
	for _, vip := range c.badTags {
		bad("frontend %s has the tag of another", vip)
	}
	type taken struct{ first, end uint64 }
	var all []taken
	for of, r := range c.ranges {
		all = append(all, taken{uint64(r.First), uint64(r.First) + uint64(r.Count)})
		if c.slots[of] == nil {
			bad("service %d has slots out of the map", of.service)
		}
		flag := maps.BackendCluster
		if of.scope == balance.Local {
			flag = maps.BackendLocal
		}
		for _, b := range c.slots[of] {
			backend := c.backends[b]
			if b == 0 || backend.Service != of.service || backend.Life.State != maps.BackendActive || backend.Life.Flags&flag == 0 {
				bad("a slot of service %d names backend %d of service %d, which is %s", of.service, b, backend.Service, state(backend))
			}
		}
	}
	for _, ids := range []iter.Seq[uint32]{services(c.ranges), maps2.Keys(c.policies), maps2.Keys(c.sources)} {
		for id := range ids {
			if c.names[id] == (lb.ServiceName{}) {
				bad("service %d has slots, a policy or source ranges, and no name", id)
			}
		}
	}
	for id, b := range c.backends {
		if (b.Life.Flags != 0) != (b.Life.State == maps.BackendActive) {
			bad("backend %d is %s", id, state(b))
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

// checkVersions returns what a packet to a service must never meet though the service is changing: something else
// than one of its versions has, where its endpoints may be of one and its policy of another.
func (c content) checkVersions(versions map[lb.ServiceName][]lb.Service) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	led, balances := map[uint32]bool{}, map[uint32]bool{}
	for _, f := range c.frontends {
		led[f.Service] = true
		balances[f.Service] = balances[f.Service] || lb.Kind(f.Kind) == lb.LoadBalancer
	}
	for id, name := range c.names {
		if !led[id] || len(versions[name]) == 0 {
			continue
		}
		for kind, flag := range map[lb.Kind]uint32{lb.ClusterIP: maps.InternalLocal, lb.LoadBalancer: maps.ExternalLocal} {
			var all []string
			for _, policy := range versions[name] {
				for _, endpoints := range versions[name] {
					all = append(all, verdict(policyOf(policy).Flags&flag != 0, usable(endpoints, balance.Cluster), usable(endpoints, balance.Local)))
				}
			}
			got := verdict(c.policies[id].Flags&flag != 0, c.addrs(scopeOf{id, balance.Cluster}), c.addrs(scopeOf{id, balance.Local}))
			if !slices.Contains(all, got) {
				bad("%s: a flow to a %s meets %q, should be of %q", name, kind, got, all)
			}
		}
		for _, client := range []string{"192.0.2.7", "198.51.100.7", "198.51.100.207", "203.0.113.7", "10.9.9.9"} {
			client := netip.MustParseAddr(client)
			got := c.policies[id].Flags&maps.HasSourceRanges == 0 || within(c.sources[id], client)
			if !slices.ContainsFunc(versions[name], func(svc lb.Service) bool {
				if svc.SourceRanges == nil && balances[id] && !svc.Has(lb.LoadBalancer) {
					return false // there is nobody whom it lets in
				}
				return got == (svc.SourceRanges == nil || within(svc.SourceRanges, client))
			}) {
				bad("%s: %s is let in: %t, and should not be, by any version", name, client, got)
			}
		}
	}
	return errors.Join(errs...)
}

// verdict is what becomes of a new flow of a service with these backends.
func verdict(local bool, inCluster, inLocal []string) string {
	chosen := inCluster
	if local {
		chosen = inLocal
	}
	switch {
	case len(chosen) > 0:
		return strings.Join(chosen, " ")
	case len(inCluster) > 0:
		return "drop"
	}
	return "reject"
}

// usable are the backends of a service that new flows choose in a scope.
func usable(svc lb.Service, scope balance.Scope) []string {
	var all []string
	for _, b := range svc.Backends {
		if scope.Has(b) && b.Weight > 0 {
			all = append(all, b.Addr.String())
		}
	}
	slices.Sort(all)
	return all
}

// addrs are the backends in slots, each once.
func (c content) addrs(of scopeOf) []string {
	var all []string
	for _, id := range c.slots[of] {
		all = append(all, c.backends[id].Addr().String())
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// services yields the services that have slots.
func services(of map[scopeOf]maps.SlotRange) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for of := range of {
			if !yield(of.service) {
				return
			}
		}
	}
}

// state is "active" or another state, and in which scopes the backend is usable if not in Cluster alone.
func state(b maps.Backend) string {
	text := maps.EnumName("backend_state", uint64(b.Life.State))
	switch active := b.Life.State == maps.BackendActive; {
	case active && b.Life.Flags == maps.BackendCluster, !active && b.Life.Flags == 0:
		return text
	case active && b.Life.Flags == maps.BackendLocal:
		return text + " local"
	case active && b.Life.Flags == maps.BackendCluster|maps.BackendLocal:
		return text + " cluster local"
	}
	return fmt.Sprintf("%s flags %d", text, b.Life.Flags)
}

// table is a table of slots, by address; of a long one, what distinguishes it from others.
func (c content) table(ids []uint32) string {
	var addrs []string
	counts := map[string]int{}
	for _, id := range ids {
		addr := c.backends[id].Addr().String()
		addrs = append(addrs, addr)
		counts[addr]++
	}
	if len(addrs) <= 16 {
		return strings.Join(addrs, " ")
	}
	text := ""
	for _, addr := range slices.Sorted(maps2.Keys(counts)) {
		text += fmt.Sprintf("%s x%d ", addr, counts[addr])
	}
	return fmt.Sprintf("%sin order %08x", text, crc32.ChecksumIEEE([]byte(strings.Join(addrs, " "))))
}

var policyNames = map[uint32]string{maps.InternalLocal: "internal-local", maps.ExternalLocal: "external-local", maps.HasSourceRanges: "source-ranges"}

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
		for scope, word := range []string{balance.Cluster: "slots", balance.Local: "local"} {
			if ids := c.slots[scopeOf{id, balance.Scope(scope)}]; len(ids) > 0 {
				text += "  " + word + " " + c.table(ids) + "\n"
			}
		}
		if p, ok := c.policies[id]; ok {
			text += "  policy"
			for _, flag := range slices.Sorted(maps2.Keys(policyNames)) {
				if p.Flags&flag != 0 {
					text += " " + policyNames[flag]
				}
			}
			if p.AffinityTimeoutS != 0 {
				text += fmt.Sprintf(" affinity=%d", p.AffinityTimeoutS)
			}
			text += "\n"
		}
		if ranges := c.sources[id]; len(ranges) > 0 {
			slices.SortFunc(ranges, netip.Prefix.Compare)
			text += "  sources " + strings.Trim(fmt.Sprint(ranges), "[]") + "\n"
		}
		lines = append(lines, text)
	}
	for vip, f := range c.frontends {
		if lb.Kind(f.Kind) == lb.Address {
			text := "~address " + vip.Addr.String()
			if f.Flags&maps.AddressClusterIP != 0 {
				text += " cluster-ip"
			}
			if f.Flags&maps.AddressEcho != 0 {
				text += " echo"
			}
			lines = append(lines, text+"\n")
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
	if c.prefixes != nil || c.elsewhere {
		text := "~prefixes " + strings.Trim(fmt.Sprint(c.prefixes), "[]")
		if c.elsewhere {
			text += " elsewhere"
		}
		lines = append(lines, text+"\n")
	}
	for id, ranges := range c.sources {
		if _, ok := c.names[id]; !ok {
			strays = append(strays, fmt.Sprintf("stray source ranges %v\n", ranges))
		}
	}
	slices.Sort(lines)
	slices.Sort(strays)
	return strings.ReplaceAll(strings.Join(append(lines, strays...), ""), "~", "")
}

// input is all that a Reconciler is told.
type input struct {
	services map[lb.ServiceName]lb.Service
	foreign  map[netip.Addr]bool
	host     []netip.Addr
	prefixes []netip.Prefix
}

// checkOwn tells which of the node's own addresses the programs would take for ones that no Service has.
func (c content) checkOwn(own []netip.Addr) error {
	for _, addr := range own {
		if _, there := c.frontends[addressVIP(addr)]; !there && within(c.prefixes, addr) {
			return fmt.Errorf("%s is the node's own and in a prefix, and has no entry", addr)
		}
	}
	return nil
}

// expected is what content.String has to be when this is in force: the model of all tests.
func expected(in input) string {
	c := empty()
	c.prefixes = in.prefixes
	address := func(addr netip.Addr, flags uint8) {
		f := c.frontends[addressVIP(addr)]
		f.Kind = maps.FrontendOf(0, lb.Address).Kind
		if f.Flags |= flags; slices.Contains(in.host, addr) {
			f.Flags = 0
		}
		c.frontends[addressVIP(addr)] = f
	}
	for addr := range in.foreign {
		address(addr, 0)
	}
	for _, addr := range in.host {
		if within(in.prefixes, addr) {
			address(addr, 0)
		}
	}
	for name, svc := range in.services {
		id := uint32(len(c.names) + 1)
		c.names[id] = name
		ids := map[int]uint32{}
		for i, b := range svc.Backends {
			ids[i] = uint32(len(c.backends) + 1)
			life := maps.BackendLife{State: maps.BackendDraining}
			if b.Cluster {
				life.State, life.Flags = maps.BackendActive, maps.BackendCluster
			}
			if b.Local {
				life.State, life.Flags = maps.BackendActive, life.Flags|maps.BackendLocal
			}
			c.backends[ids[i]] = maps.BackendOf(id, ownVIP(name, b.Addr), life)
		}
		var policy maps.Policy
		for flag, on := range map[uint32]bool{
			maps.InternalLocal: svc.InternalLocal, maps.ExternalLocal: svc.ExternalLocal, maps.HasSourceRanges: svc.SourceRanges != nil,
		} {
			if on {
				policy.Flags |= flag
			}
		}
		policy.AffinityTimeoutS = uint32(svc.Affinity.Seconds())
		if policy != (maps.Policy{}) {
			c.policies[id] = policy
		}
		c.sources[id] = svc.SourceRanges
		for scope, has := range map[balance.Scope]bool{balance.Cluster: true, balance.Local: svc.InternalLocal || svc.ExternalLocal} {
			if !has {
				continue
			}
			for _, i := range balance.Table(svc.Backends, scope, svc.Algorithm) {
				c.slots[scopeOf{id, scope}] = append(c.slots[scopeOf{id, scope}], ids[i])
			}
		}
		for _, f := range svc.Frontends {
			c.frontends[f.VIP] = maps.FrontendOf(id, f.Kind)
			var flags uint8
			if len(c.slots[scopeOf{id, balance.Cluster}]) > 0 {
				flags |= maps.AddressEcho
			}
			switch f.Kind {
			case lb.ClusterIP:
				address(f.VIP.Addr, flags|maps.AddressClusterIP)
				if !slices.ContainsFunc(in.prefixes, func(p netip.Prefix) bool { return p.Contains(f.VIP.Addr) }) {
					c.elsewhere = true
				}
			case lb.LoadBalancer, lb.External:
				address(f.VIP.Addr, flags)
			}
		}
	}
	for _, b := range c.backends { // unless a service has a frontend there
		if _, taken := c.frontends[b.VIP()]; !taken {
			c.frontends[b.VIP()] = maps.FrontendOf(0, lb.Identity)
		}
	}
	return c.String()
}

// parse reads services as content.String writes them; lines that follow from the others it skips. A backend may
// have "weight=N", which is 1 else, and a service a line "algorithm maglev".
func parse(text string) (map[lb.ServiceName]lb.Service, error) {
	all := map[lb.ServiceName]lb.Service{}
	var name lb.ServiceName
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || slices.Contains([]string{"slots", "local", "address", "identity", "prefixes"}, f[0]) {
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
			b := lb.Backend{
				Addr: addr, Weight: 1,
				Local:   slices.Contains(f, "local"),
				Cluster: slices.Contains(f, "active") && (slices.Contains(f, "cluster") || !slices.Contains(f, "local")),
			}
			for _, word := range f {
				if n, ok := strings.CutPrefix(word, "weight="); ok {
					var weight uint64
					weight, err = strconv.ParseUint(n, 10, 16)
					b.Weight = uint16(weight)
				}
			}
			svc.Backends = append(svc.Backends, b)
		case "algorithm":
			svc.Algorithm = map[string]lb.Algorithm{"plain": lb.Plain, "maglev": lb.Maglev}[f[1]]
		case "policy":
			for _, word := range f[1:] {
				if n, ok := strings.CutPrefix(word, "affinity="); ok {
					svc.Affinity, err = time.ParseDuration(n + "s")
				}
			}
			svc.InternalLocal = slices.Contains(f, policyNames[maps.InternalLocal])
			svc.ExternalLocal = slices.Contains(f, policyNames[maps.ExternalLocal])
		case "sources":
			svc.SourceRanges, err = parsePrefixes(f[1:])
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

func parsePrefixes(words []string) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, word := range words {
		p, err := netip.ParsePrefix(word)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

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
