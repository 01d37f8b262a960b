// SPDX-License-Identifier: Apache-2.0

// Package lb is the vocabulary of lbagent as plain values: services, their frontends and their backends,
// after every rule of Kubernetes has been applied and before anything has become a map entry. It imports
// the standard library only; [resolve] makes these values and [reconcile] writes them.
package lb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Protocol is an IP protocol number, as on the wire and in every map.
type Protocol uint8

// The protocols that a Service port can have.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Family is an IP family, 4 or 6.
type Family uint8

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf returns the family of an address. A v4-mapped address is IPv4: that is the form in which IPv4 is
// written into maps.
func FamilyOf(a netip.Addr) Family {
	if a.Unmap().Is4() {
		return IPv4
	}
	return IPv6
}

func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// ServiceName names a service: one port of one Service object, in one family. A dual-stack Service is a
// service twice, for the endpoints of a frontend are those of its own family, and a service has one table
// of them.
type ServiceName struct {
	Namespace string
	Name      string
	Port      string // name of the Service port; "" where it has none
	Protocol  Protocol
	Family    Family
	// Pod: this is a hostPort. Name is the Pod's, and Port the hostPort, as "8080" or, where it has a hostIP,
	// "192.0.2.1:8080".
	Pod bool
}

// String is NAMESPACE/NAME:PORT/PROTOCOL FAMILY, without :PORT where the port has no name; "pod " before it where
// the name is a Pod's.
func (n ServiceName) String() string {
	port := ""
	if n.Port != "" {
		port = ":" + n.Port
	}
	pod := ""
	if n.Pod {
		pod = "pod "
	}
	return fmt.Sprintf("%s%s/%s%s/%s %s", pod, n.Namespace, n.Name, port, n.Protocol, n.Family)
}

// Compare orders names by namespace, name, port, protocol and family.
func (n ServiceName) Compare(o ServiceName) int {
	return cmp.Or(
		cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name), cmp.Compare(n.Port, o.Port),
		cmp.Compare(n.Protocol, o.Protocol), cmp.Compare(n.Family, o.Family), CompareBool(n.Pod, o.Pod))
}

// CompareBool orders false before true, as cmp.Compare does what has an order.
func CompareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// Kind says where a frontend comes from. The zero Kind is none. The values are those of `enum
// frontend_kind` in bpf/types.h; a test of package maps holds the two together.
type Kind uint8

// The kinds of frontends.
const (
	ClusterIP Kind = iota + 1
	NodePort
	LoadBalancer
	External
	HostPort
	Identity // a backend's own address
	Address  // port 0: the address itself is some Service's
)

func (k Kind) String() string {
	switch k {
	case ClusterIP:
		return "ClusterIP"
	case NodePort:
		return "NodePort"
	case LoadBalancer:
		return "LoadBalancer"
	case External:
		return "external"
	case HostPort:
		return "hostPort"
	case Identity:
		return "identity"
	case Address:
		return "address"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// VIP is what a packet is sent to: an address, a port and a protocol. It is a value to compare and to use
// as a key, so Addr must not be v4-mapped and has no zone.
type VIP struct {
	Addr     netip.Addr
	Port     uint16
	Protocol Protocol
}

// String is ADDRESS:PORT/PROTOCOL.
func (v VIP) String() string {
	return netip.AddrPortFrom(v.Addr, v.Port).String() + "/" + v.Protocol.String()
}

// Compare orders VIPs by address, port and protocol.
func (v VIP) Compare(o VIP) int {
	return cmp.Or(v.Addr.Compare(o.Addr), cmp.Compare(v.Port, o.Port), cmp.Compare(v.Protocol, o.Protocol))
}

// Frontend is a VIP of a service, and where it comes from.
type Frontend struct {
	VIP  VIP
	Kind Kind
}

// Backend is one endpoint of one service; the same pod behind two services is two backends. One that no new flow
// may choose keeps the flows that it has (an endpoint that drains).
type Backend struct {
	Addr netip.AddrPort // of the service's family, not v4-mapped
	// Cluster: new flows may choose it (it is usable in the scope Cluster).
	Cluster bool
	// Local: new flows under a policy Local may (it is on this node, and usable in the scope Local).
	Local bool
	// Weight is its share of new flows beside those of the others of its scope. 0: no new client comes to it,
	// though one that session affinity brings does.
	Weight uint16
}

// MaxWeight is the greatest weight of a backend.
const MaxWeight = 1000

// Algorithm is how the new flows of a service spread over its backends.
type Algorithm uint8

// The algorithms.
const (
	Plain  Algorithm = iota // a list of the backends, each as often as its weight says
	Maglev                  // as Plain, and a backend that comes or goes moves few flows of the others
)

func (a Algorithm) String() string {
	switch a {
	case Plain:
		return "plain"
	case Maglev:
		return "maglev"
	}
	return fmt.Sprintf("algorithm %d", uint8(a))
}

// Service is one port of one Service in one family, with all that the kernel is to know of it.
// Backends are sorted by address and no address stands twice.
type Service struct {
	Name      ServiceName
	Frontends []Frontend // sorted by VIP, no VIP twice
	Backends  []Backend
	Algorithm Algorithm
	// InternalLocal: flows to a ClusterIP choose in the scope Local. ExternalLocal: those from outside to
	// every other kind of frontend do.
	InternalLocal, ExternalLocal bool
	Affinity                     time.Duration // how long a client keeps its backend; whole seconds, 0: not at all
	// SourceRanges are the clients that reach its frontends of kind LoadBalancer: masked, of the service's
	// family, sorted, none twice. nil: all do, or it has no such frontend.
	SourceRanges []netip.Prefix
}

// Has tells whether a service has a frontend of a kind.
func (s Service) Has(kind Kind) bool {
	return slices.ContainsFunc(s.Frontends, func(f Frontend) bool { return f.Kind == kind })
}

// Endpoint is one endpoint of a service with what becomes of it, for people.
type Endpoint struct {
	Addr       netip.AddrPort
	Node, Zone string // where it is; "" where that is not known
	Weight     uint16
	// Cluster and Local are why new flows of that scope do not choose it: "not ready", "on another node",
	// "hinted to another zone", "terminating, and ready ones exist". "": they do. Local says so also where no
	// policy of the service asks for that scope.
	Cluster, Local string
}

// View is all that is known of a service, for people: more than the kernel is told.
type View struct {
	Service   Service
	Endpoints []Endpoint // sorted by address, those that are no backends too
	Waiting   []Waiting
}

// Waiting is a frontend that a service asks for and another one has.
type Waiting struct {
	Frontend Frontend
	Holder   ServiceName
}

// HealthCheck is what the healthCheckNodePort of a Service answers.
type HealthCheck struct {
	Namespace, Name string
	Port            uint16
	LocalEndpoints  int // distinct addresses of ready endpoints on this node
}

// Problem is something wrong with the input, said so that its author can mend it.
type Problem struct {
	File     string // path of the manifest; "" where the object came from an API server
	Document int    // number of the document in the file, from 1; 0 for the file as a whole
	Object   string // "Service default/web"; "" where the document was not understood so far
	Field    string // "spec.ports[0].port"; "" for the object as a whole
	Message  string
	Severity Severity
}

// Severity says what a Problem means for the object.
type Severity uint8

// The severities.
const (
	// Error: the object, or the whole file, is not in force; what was in force before still is.
	Error Severity = iota
	// Warning: the object is in force, a part of it is not as its author may expect.
	Warning
	// NotYet: the object is in force, the named field or kind is not served by this version.
	NotYet
)

func (s Severity) String() string {
	switch s {
	case Error:
		return "error"
	case Warning:
		return "warning"
	case NotYet:
		return "not yet"
	}
	return fmt.Sprintf("severity %d", uint8(s))
}

// Error is "FILE: document N: OBJECT: FIELD: MESSAGE", without the parts that are not known.
func (p Problem) Error() string {
	s := ""
	for _, part := range []string{p.File, p.document(), p.Object, p.Field} {
		if part != "" {
			s += part + ": "
		}
	}
	return s + p.Message
}

func (p Problem) document() string {
	if p.Document == 0 {
		return ""
	}
	return fmt.Sprintf("document %d", p.Document)
}

// Compare orders problems by file, document, object, field and message.
func (p Problem) Compare(o Problem) int {
	return cmp.Or(
		cmp.Compare(p.File, o.File), cmp.Compare(p.Document, o.Document), cmp.Compare(p.Object, o.Object),
		cmp.Compare(p.Field, o.Field), cmp.Compare(p.Message, o.Message))
}
