// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// service is a service as the maps have it.
type service struct {
	ID uint32 `json:"id"`
	serviceName
	Frontends []frontend `json:"frontends"` // by address
	Backends  []backend  `json:"backends"`  // by address; those that are removed are not listed
}

// serviceName is an lb.ServiceName for people. It is empty where the maps have no name for an id.
type serviceName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port,omitempty"` // name of the Service port
	Protocol  string `json:"protocol"`
	Family    string `json:"family"`
}

func nameOf(n lb.ServiceName) serviceName {
	return serviceName{n.Namespace, n.Name, n.Port, n.Protocol.String(), n.Family.String()}
}

type frontend struct {
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port"`
	Protocol string     `json:"protocol"`
	Kind     string     `json:"kind"`
}

type backend struct {
	ID         uint32     `json:"id"`
	Address    netip.Addr `json:"address"`
	Port       uint16     `json:"port"`
	State      string     `json:"state"`
	Generation uint32     `json:"generation"`
}

func (b backend) addrPort() string { return netip.AddrPortFrom(b.Address, b.Port).String() }

func backendOf(id uint32, b maps.Backend) backend {
	return backend{id, b.Addr().Addr(), b.Addr().Port(), maps.EnumName("backend_state", uint64(b.Life.State)), b.Life.Generation}
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
			s = &service{ID: id, Frontends: []frontend{}, Backends: []backend{}}
			if n, ok := names[id]; ok {
				s.serviceName = nameOf(n)
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
			v := k.VIP()
			s := at(f.Service)
			s.Frontends = append(s.Frontends, frontend{v.Addr, v.Port, v.Protocol.String(), kind.String()})
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
		slices.SortFunc(s.Frontends, func(a, b frontend) int {
			return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
		})
		slices.SortFunc(s.Backends, func(a, b backend) int {
			return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.ID, b.ID))
		})
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
