// SPDX-License-Identifier: Apache-2.0

package api

import (
	"net/netip"

	"github.com/lbagent/lbagent/lb"
)

// Service is all that an agent knows of one port of a Service in one family, or of a hostPort of a Pod.
type Service struct {
	ServiceName
	Policy
	Algorithm string     `json:"algorithm"`
	Frontends []Frontend `json:"frontends"` // those that it holds, by address
	Waiting   []Waiting  `json:"waiting"`   // those that it asks for and another has
	Endpoints []Endpoint `json:"endpoints"` // by address, those that get nothing too
}

// ServiceName is an [lb.ServiceName]. It is empty where that is not known.
type ServiceName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port,omitempty"` // name of the Service port; of a Pod, the hostPort
	Protocol  string `json:"protocol"`
	Family    string `json:"family"`
	Pod       bool   `json:"pod,omitempty"` // Name is a Pod's
}

// NameOf returns a name for people and scripts.
func NameOf(n lb.ServiceName) ServiceName {
	return ServiceName{n.Namespace, n.Name, n.Port, n.Protocol.String(), n.Family.String(), n.Pod}
}

// String is NAMESPACE/NAME:PORT/PROTOCOL FAMILY, without :PORT where there is none, and "pod " before it where it is
// a Pod's.
func (n ServiceName) String() string {
	s := n.Namespace + "/" + n.Name
	if n.Pod {
		s = "pod " + s
	}
	if n.Port != "" {
		s += ":" + n.Port
	}
	return s + "/" + n.Protocol + " " + n.Family
}

// Policy is what decides of a client of a service, but for the scope, which each frontend has.
type Policy struct {
	AffinitySeconds uint32         `json:"affinitySeconds,omitempty"` // how long a client keeps its backend; 0: not at all
	SourceRanges    []netip.Prefix `json:"sourceRanges,omitempty"`    // who reaches its LoadBalancer addresses; none: all
}

// Frontend is an address that a service is reached at.
type Frontend struct {
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port"`
	Protocol string     `json:"protocol"`
	Kind     string     `json:"kind"`
	// Scope is Cluster where all usable endpoints get its flows, Local where those on this node do: for a
	// ClusterIP all its flows, for others those from outside.
	Scope string `json:"scope"`
}

// The scopes.
const (
	ScopeCluster = "Cluster"
	ScopeLocal   = "Local"
)

// FrontendOf returns a frontend of a service with these policies.
func FrontendOf(f lb.Frontend, internalLocal, externalLocal bool) Frontend {
	local := externalLocal
	switch f.Kind {
	case lb.ClusterIP:
		local = internalLocal
	case lb.HostPort:
		local = false
	}
	scope := ScopeCluster
	if local {
		scope = ScopeLocal
	}
	return Frontend{f.VIP.Addr, f.VIP.Port, f.VIP.Protocol.String(), f.Kind.String(), scope}
}

// Waiting is a frontend that a service asks for, and who has it.
type Waiting struct {
	Frontend
	Holder ServiceName `json:"holder"`
}

// Endpoint is an endpoint of a service.
type Endpoint struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
	Node    string     `json:"node,omitempty"`
	Zone    string     `json:"zone,omitempty"`
	Weight  uint16     `json:"weight"`
	Cluster Use        `json:"cluster"` // in the scope Cluster
	Local   Use        `json:"local"`   // in the scope Local
}

// Use is whether new flows of a scope choose an endpoint, and why not.
type Use struct {
	Used   bool   `json:"used"`
	Reason string `json:"reason,omitempty"`
}

func useOf(reason string) Use { return Use{reason == "", reason} }

// ServicesOf returns views for people and scripts; it is never nil.
func ServicesOf(views []lb.View) []Service {
	all := make([]Service, 0, len(views))
	for _, v := range views {
		s := v.Service
		shown := Service{
			ServiceName: NameOf(s.Name), Algorithm: s.Algorithm.String(),
			Policy:    Policy{uint32(s.Affinity.Seconds()), s.SourceRanges},
			Frontends: []Frontend{}, Waiting: []Waiting{}, Endpoints: []Endpoint{},
		}
		for _, f := range s.Frontends {
			shown.Frontends = append(shown.Frontends, FrontendOf(f, s.InternalLocal, s.ExternalLocal))
		}
		for _, w := range v.Waiting {
			shown.Waiting = append(shown.Waiting, Waiting{FrontendOf(w.Frontend, s.InternalLocal, s.ExternalLocal), NameOf(w.Holder)})
		}
		for _, e := range v.Endpoints {
			shown.Endpoints = append(shown.Endpoints, Endpoint{
				Address: e.Addr.Addr(), Port: e.Addr.Port(), Node: e.Node, Zone: e.Zone, Weight: e.Weight,
				Cluster: useOf(e.Cluster), Local: useOf(e.Local),
			})
		}
		all = append(all, shown)
	}
	return all
}
