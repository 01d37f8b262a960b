// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// service is a service as the maps have it, and, where an agent answers, what it knows beyond them.
type service struct {
	ID uint32 `json:"id"` // 0: not in the maps
	api.ServiceName
	api.Policy
	Frontends []api.Frontend `json:"frontends"` // by address
	Backends  []backend      `json:"backends"`  // by address; those that are removed are not listed
	*known
	written []api.Frontend // those that the maps have, where Frontends are those that the agent knows
}

// known is what only an agent knows.
type known struct {
	Algorithm string         `json:"algorithm"`
	Waiting   []api.Waiting  `json:"waiting"`
	Endpoints []api.Endpoint `json:"endpoints"`
}

type backend struct {
	ID         uint32     `json:"id"`
	Address    netip.Addr `json:"address"`
	Port       uint16     `json:"port"`
	State      string     `json:"state"`
	Cluster    bool       `json:"cluster"` // new flows of the scope Cluster choose it
	Local      bool       `json:"local"`   // those of the scope Local do
	Generation uint32     `json:"generation"`
}

func (b backend) addrPort() string { return netip.AddrPortFrom(b.Address, b.Port).String() }

func backendOf(id uint32, b maps.Backend) backend {
	return backend{
		ID: id, Address: b.Addr().Addr(), Port: b.Addr().Port(), State: maps.EnumName("backend_state", uint64(b.Life.State)),
		Cluster: b.Life.Flags&maps.BackendCluster != 0, Local: b.Life.Flags&maps.BackendLocal != 0, Generation: b.Life.Generation,
	}
}

// active returns how many backends new flows to a frontend choose from.
func (s service) active(f api.Frontend) int {
	n := 0
	for _, b := range s.Backends {
		if f.Scope == api.ScopeLocal && b.Local || f.Scope == api.ScopeCluster && b.Cluster {
			n++
		}
	}
	return n
}

// inForce tells whether a frontend is in the maps, and not only known to the agent: there may be no room for it.
func (s service) inForce(f api.Frontend) bool {
	return s.known == nil || slices.ContainsFunc(s.written, func(is api.Frontend) bool {
		is.Scope = f.Scope
		return is == f
	})
}

// count returns how many backends are in a state, as [backend.State] names it.
func (s service) count(state string) int {
	n := 0
	for _, b := range s.Backends {
		if b.State == state {
			n++
		}
	}
	return n
}

// readServices returns what the maps say of every service, by name.
func readServices(m *maps.Maps) ([]service, error) {
	names, err := readNames(m)
	if err != nil {
		return nil, err
	}
	byID := map[uint32]*service{}
	at := func(id uint32) *service {
		s := byID[id]
		if s == nil {
			s = &service{ID: id, Frontends: []api.Frontend{}, Backends: []backend{}}
			if n, ok := names[id]; ok {
				s.ServiceName = api.NameOf(n)
				s.AffinitySeconds = m.Service(id).Policy.AffinityTimeoutS
			}
			byID[id] = s
		}
		return s
	}
	for id := range names {
		at(id)
	}
	err = m.EachFrontend(func(k maps.FrontendKey, f maps.Frontend) bool {
		// Identities and bare addresses are for the programs; a service has its frontends beside them.
		if kind := lb.Kind(f.Kind); kind != lb.Identity && kind != lb.Address {
			s, flags := at(f.Service), m.Service(f.Service).Policy.Flags
			s.Frontends = append(s.Frontends, api.FrontendOf(lb.Frontend{VIP: k.VIP(), Kind: kind},
				flags&maps.InternalLocal != 0, flags&maps.ExternalLocal != 0))
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	err = m.EachSourceRange(func(id uint32, p netip.Prefix) bool {
		if s := byID[id]; s != nil && m.Service(id).Policy.Flags&maps.HasSourceRanges != 0 {
			s.SourceRanges = append(s.SourceRanges, p)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for id, b := range m.EachBackend() {
		if b.Life.State != maps.BackendRemoved {
			s := at(b.Service)
			s.Backends = append(s.Backends, backendOf(id, b))
		}
	}

	all := make([]service, 0, len(byID))
	for _, s := range byID {
		slices.SortFunc(s.Frontends, func(a, b api.Frontend) int {
			return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
		})
		slices.SortFunc(s.Backends, func(a, b backend) int {
			return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.ID, b.ID))
		})
		slices.SortFunc(s.SourceRanges, netip.Prefix.Compare)
		s.SourceRanges = slices.Compact(s.SourceRanges) // one that goes meanwhile makes the walk begin anew
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b service) int {
		return cmp.Or(names[a.ID].Compare(names[b.ID]), cmp.Compare(a.ID, b.ID))
	})
	return all, nil
}

// readNames returns the names of the services by their ids.
func readNames(m *maps.Maps) (map[uint32]lb.ServiceName, error) {
	names := map[uint32]lb.ServiceName{}
	err := m.EachServiceName(func(id uint32, n maps.ServiceName) bool {
		names[id] = n.LB()
		return true
	})
	return names, err
}
