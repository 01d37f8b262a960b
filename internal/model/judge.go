// SPDX-License-Identifier: Apache-2.0

package model

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// The protocols that packets of the model have.
const (
	ICMP   uint8 = 1
	TCP    uint8 = 6
	UDP    uint8 = 17
	GRE    uint8 = 47 // one that has no ports
	ICMPv6 uint8 = 58
)

// The flags of a TCP segment.
const (
	SYN uint8 = 2
	RST uint8 = 4
	ACK uint8 = 16
)

// Packet is what the rules look at. Of ICMP it is an echo request, and its ports are 0.
type Packet struct {
	From, To netip.AddrPort
	Protocol uint8
	Flags    uint8 // of TCP
}

// Side is where a packet comes from.
type Side uint8

// The sides.
const (
	Pod     Side = iota // a pod of this node
	Outside             // anybody else
)

func (s Side) String() string { return [...]string{"pod", "outside"}[s] }

// Action is what becomes of a packet.
type Action uint8

// The actions.
const (
	Untouched Action = iota // goes on as it is
	Translated
	Rejected // answered with a TCP reset, or with port unreachable
	Dropped
	Echoed // answered with an echo reply
)

func (a Action) String() string {
	return [...]string{"untouched", "translated", "rejected", "dropped", "echoed"}[a]
}

// Service names one port of a Service in one family, or a hostPort of a Pod.
type Service struct {
	Namespace, Name, Port string
	Protocol              uint8
	IPv6, Pod             bool
}

// Expectation is what must become of the first packet of a flow.
type Expectation struct {
	Action  Action
	Reasons []string // under one of which it is counted
	// Of a packet that is translated: to which service, to one of which backends, sorted, and among which it may
	// keep the one it has by affinity.
	Service  Service
	Backends []netip.AddrPort
	Usable   []netip.AddrPort
	Affinity time.Duration // 0: none
	// Table is all that the choice depends on, but for the packet: the same Table, the same choice.
	Table string
}

// Judge says what must become of a packet that belongs to no flow.
func (w World) Judge(p Packet, from Side) Expectation {
	if p.Protocol != TCP && p.Protocol != UDP {
		return w.judgeAddress(p)
	}
	c, ok := w.holder(vip{p.To, p.Protocol})
	if !ok {
		return w.judgeAddress(p)
	}
	// Design, "new(T, U)": an RST without a flow is dropped, whatever it would have met.
	if p.Protocol == TCP && p.Flags&RST != 0 {
		return Expectation{Action: Dropped, Reasons: []string{"stray_rst", "source_denied", "no_local_backend", "not_answered", "no_backend"}}
	}
	// "loadBalancerSourceRanges": spec only; LB addresses only; for every source, before reject. A miss: drop.
	if c.kind == loadBalancer && !sourceAllowed(c.service.Spec.LoadBalancerSourceRanges, p.From.Addr()) {
		return Expectation{Action: Dropped, Reasons: []string{"source_denied"}}
	}
	ends := w.endpoints(c, family(p.To.Addr()))
	cluster, local := w.cluster(ends), w.local(ends)
	chosen := cluster
	isLocal := false
	if c.service != nil {
		switch {
		// "internalTrafficPolicy: Local": ClusterIP traffic, from whomever: endpoints of this node only.
		case c.kind == clusterIP:
			isLocal = deref(c.service.Spec.InternalTrafficPolicy, "") == corev1.ServiceInternalTrafficPolicyLocal
		// "externalTrafficPolicy: Local": NodePort, LB and external addresses from outside: endpoints of this node
		// only. From pods of this node: as Cluster.
		default:
			isLocal = c.service.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && from == Outside
		}
	}
	if isLocal {
		chosen = local
	}
	e := Expectation{
		Action: Translated, Reasons: []string{"new_flow"}, Service: c.name(family(p.To.Addr())),
		Usable: addresses(chosen), Table: fmt.Sprint(isLocal),
	}
	if s := c.service; s != nil {
		// "sessionAffinity: ClientIP": per Service port, timeout 1..86400 s, default 10800.
		if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
			e.Affinity = 10800 * time.Second
			if cfg := s.Spec.SessionAffinityConfig; cfg != nil && cfg.ClientIP != nil && cfg.ClientIP.TimeoutSeconds != nil {
				e.Affinity = time.Duration(*cfg.ClientIP.TimeoutSeconds) * time.Second
			}
		}
		e.Table += " " + s.Annotations["lbagent.io/algorithm"]
	}
	for _, end := range chosen {
		e.Table += fmt.Sprintf(" %s=%d", end.at, end.weight)
	}
	e.Backends = addresses(weighty(chosen))
	if len(e.Backends) > 0 {
		return e
	}
	// "reject or drop": no usable endpoint anywhere: reject. Usable ones exist but none on this node under Local:
	// drop. (A client that has one by affinity goes on to it: State.)
	e.Action, e.Reasons = Dropped, []string{"no_local_backend"}
	if len(weighty(cluster)) == 0 {
		e.Action, e.Reasons = Rejected, []string{"no_backend"}
	}
	return e
}

// judgeAddress is the row "other port": what is sent to an address, and to no frontend of it.
func (w World) judgeAddress(p Packet) Expectation {
	addr := p.To.Addr()
	ports := p.Protocol == TCP || p.Protocol == UDP
	echo := p.Protocol == ICMP || p.Protocol == ICMPv6
	// Packets straight to a backend are noted, and pass.
	untouched := Expectation{Action: Untouched, Reasons: []string{"no_service", "direct", "new_direct"}}
	if !ports {
		untouched.Reasons = []string{"unsupported", "no_service"}
	}
	// "VIP that is also an address of this node": all else goes to the stack.
	if slices.Contains(w.Host.Addresses, addr) {
		return untouched
	}
	isClusterIP, isVIP, usable := false, false, false
	for _, s := range w.Services {
		if !w.counts(s) {
			continue
		}
		for i := range s.Spec.Ports {
			number := uint16(s.Spec.Ports[i].Port)
			c, ok := w.holder(vip{netip.AddrPortFrom(addr, number), protocolOf(s.Spec.Ports[i].Protocol)})
			if !ok || c.service != s || c.kind == nodePort {
				continue
			}
			isVIP = true
			isClusterIP = isClusterIP || c.kind == clusterIP
			usable = usable || len(weighty(w.cluster(w.endpoints(c, family(addr))))) > 0
		}
	}
	switch {
	// "ICMP echo to a VIP": answered while the Service has a usable endpoint.
	case isVIP && echo && usable:
		return Expectation{Action: Echoed, Reasons: []string{"echo"}}
	// "other port": of a ClusterIP: reject (port unreachable / RST).
	case isClusterIP && ports && p.Protocol == TCP && p.Flags&RST != 0:
		return Expectation{Action: Dropped, Reasons: []string{"not_answered", "wrong_port"}} // a reset is never answered
	case isClusterIP && ports:
		return Expectation{Action: Rejected, Reasons: []string{"wrong_port"}}
	case isClusterIP && echo: // kube-proxy rejects
		return Expectation{Action: Rejected, Reasons: []string{"no_backend"}}
	case isClusterIP:
		return Expectation{Action: Dropped, Reasons: []string{"vip_unsupported"}} // the stack must not see it
	// Of an LB or external address: untouched.
	case isVIP:
		return untouched
	// "service-proxy-name": its VIPs are still known, so as not to drop them as unassigned.
	case w.isForeign(addr):
		return untouched
	// An address in a service prefix that no Service has: drop.
	case slices.ContainsFunc(w.Prefixes, func(p netip.Prefix) bool { return p.Contains(addr) }):
		return Expectation{Action: Dropped, Reasons: []string{"unassigned", "vip_unsupported"}}
	}
	return untouched
}

// ---- which objects count ----

const (
	labelProxy    = "service.kubernetes.io/service-proxy-name"
	labelHeadless = "service.kubernetes.io/headless"
	labelService  = "kubernetes.io/service-name"
)

// isOurs is the row "service-proxy-name": the label present, even empty: not ours; with a name of our own: that name
// and none other.
func (w World) isOurs(labels map[string]string) bool {
	name, labelled := labels[labelProxy]
	if w.ProxyName == "" {
		return !labelled
	}
	return labelled && name == w.ProxyName
}

// sliceIsOurs: one without the label belongs to whoever has the Service, for the controller copies the label a moment
// later.
func (w World) sliceIsOurs(s *discoveryv1.EndpointSlice) bool {
	_, labelled := s.Labels[labelProxy]
	return !labelled || w.isOurs(s.Labels)
}

// counts is the rows "service-proxy-name", "headless" and "ExternalName" for a Service.
func (w World) counts(s *corev1.Service) bool {
	_, headless := s.Labels[labelHeadless]
	return w.isOurs(s.Labels) && !headless && s.Spec.ClusterIP != "None" && s.Spec.Type != corev1.ServiceTypeExternalName
}

// isForeign tells whether a Service of another proxy has this address. What that one makes of families and allowed
// addresses is its own affair.
func (w World) isForeign(addr netip.Addr) bool {
	return slices.ContainsFunc(w.Services, func(s *corev1.Service) bool {
		if w.isOurs(s.Labels) || s.Spec.ClusterIP == "None" || s.Spec.Type == corev1.ServiceTypeExternalName {
			return false
		}
		texts := append(slices.Clone(clusterIPs(s)), s.Spec.ExternalIPs...)
		if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
			for _, in := range s.Status.LoadBalancer.Ingress {
				if deref(in.IPMode, corev1.LoadBalancerIPModeVIP) == corev1.LoadBalancerIPModeVIP {
					texts = append(texts, in.IP)
				}
			}
		}
		return slices.Contains(texts, addr.String())
	})
}

// ---- frontends ----

type vip struct {
	at       netip.AddrPort
	protocol uint8
}

type kind uint8

const (
	none kind = iota
	clusterIP
	loadBalancer
	external
	hostIPPort // hostPort with hostIP
	hostPort
	nodePort
)

// claim is somebody's wish for a VIP: a port of a Service, or of a Pod.
type claim struct {
	kind    kind
	service *corev1.Service
	port    *corev1.ServicePort
	pod     *corev1.Pod
	target  netip.AddrPort // of a Pod
	label   string         // of a Pod's port
}

func (c claim) name(ipv6 bool) Service {
	if c.pod != nil {
		return Service{c.pod.Namespace, c.pod.Name, c.label, protocolOfClaim(c), ipv6, true}
	}
	return Service{c.service.Namespace, c.service.Name, c.port.Name, protocolOf(c.port.Protocol), ipv6, false}
}

func protocolOfClaim(c claim) uint8 {
	_, protocol, _ := strings.Cut(c.label, "/")
	n, _ := strconv.Atoi(protocol)
	return uint8(n)
}

// holder says whose a VIP is: "several Services claim one address:port:protocol" and the precedence of row "hostPort":
// exact address (ClusterIP, LB, external) > hostPort with hostIP > hostPort any > NodePort; within these the oldest, then
// the first by name.
func (w World) holder(v vip) (claim, bool) {
	var best claim
	found := false
	for c := range w.claims(v) {
		if !found || before(c, best) {
			best, found = c, true
		}
	}
	return best, found
}

func before(a, b claim) bool {
	class := func(c claim) int {
		switch c.kind {
		case hostIPPort:
			return 1
		case hostPort:
			return 2
		case nodePort:
			return 3
		}
		return 0
	}
	created := func(c claim) (time.Time, string, string) {
		if c.pod != nil {
			return c.pod.CreationTimestamp.Time, c.pod.Namespace, c.pod.Name
		}
		return c.service.CreationTimestamp.Time, c.service.Namespace, c.service.Name
	}
	aTime, aSpace, aName := created(a)
	bTime, bSpace, bName := created(b)
	ageless := func(t time.Time) int { // one that does not say its age is the youngest
		if t.IsZero() {
			return 1
		}
		return 0
	}
	return cmp.Or(class(a)-class(b), ageless(aTime)-ageless(bTime), aTime.Compare(bTime), cmp.Compare(aSpace, bSpace), cmp.Compare(aName, bName)) < 0
}

// claims yields whoever asks for a VIP.
func (w World) claims(v vip) func(yield func(claim) bool) {
	return func(yield func(claim) bool) {
		for _, s := range w.Services {
			if !w.counts(s) {
				continue
			}
			for i := range s.Spec.Ports {
				p := &s.Spec.Ports[i]
				if protocolOf(p.Protocol) != v.protocol {
					continue
				}
				if k := w.kindOf(s, v.at.Addr()); k != none && uint16(p.Port) == v.at.Port() {
					if !yield(claim{kind: k, service: s, port: p}) {
						return
					}
				}
				// "NodePort": at the nodeport addresses; of a family not in ipFamilies nothing is programmed.
				published := s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer
				if published && p.NodePort != 0 && uint16(p.NodePort) == v.at.Port() &&
					slices.Contains(w.Host.NodePorts, v.at.Addr()) && hasFamily(s, v.at.Addr()) {
					if !yield(claim{kind: nodePort, service: s, port: p}) {
						return
					}
				}
			}
		}
		for _, p := range w.Pods {
			for _, c := range w.podClaims(p, v) {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// kindOf says by which of its addresses a Service has this one.
func (w World) kindOf(s *corev1.Service, addr netip.Addr) kind {
	if !hasFamily(s, addr) {
		return none
	}
	is := func(text string) bool {
		a, err := netip.ParseAddr(text)
		return err == nil && a == addr
	}
	if slices.ContainsFunc(clusterIPs(s), is) {
		return clusterIP
	}
	// "LoadBalancer": status.loadBalancer.ingress[].ip with ipMode nil or VIP; only while the type is LoadBalancer.
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, in := range s.Status.LoadBalancer.Ingress {
			if is(in.IP) && deref(in.IPMode, corev1.LoadBalancerIPModeVIP) == corev1.LoadBalancerIPModeVIP {
				return loadBalancer
			}
		}
	}
	// "externalIPs": inside --external-ips-allow.
	if slices.ContainsFunc(s.Spec.ExternalIPs, is) &&
		(w.ExternalIPsAllow == nil || slices.ContainsFunc(w.ExternalIPsAllow, func(p netip.Prefix) bool { return p.Contains(addr) })) {
		return external
	}
	return none
}

func clusterIPs(s *corev1.Service) []string {
	if len(s.Spec.ClusterIPs) > 0 {
		return s.Spec.ClusterIPs
	}
	return []string{s.Spec.ClusterIP}
}

func hasFamily(s *corev1.Service, addr netip.Addr) bool {
	if len(s.Spec.IPFamilies) > 0 {
		return slices.Contains(s.Spec.IPFamilies, corev1.IPFamily(familyName(addr)))
	}
	return slices.ContainsFunc(clusterIPs(s), func(text string) bool {
		a, err := netip.ParseAddr(text)
		return err == nil && a.Is4() == addr.Is4()
	})
}

// podClaims is the row "hostPort": (hostIP or any, hostPort, protocol) -> the one local pod, not of hostNetwork, ready or
// not.
func (w World) podClaims(p *corev1.Pod, v vip) (claims []claim) {
	if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	var pod netip.Addr
	here := false // a pod is on one node, with all of its addresses
	for _, text := range podIPs(p) {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		here = here || w.isHere(p.Spec.NodeName, a)
		if a.Is4() == v.at.Addr().Is4() && !pod.IsValid() {
			pod = a
		}
	}
	if !pod.IsValid() || !here {
		return nil
	}
	for _, c := range p.Spec.Containers {
		for _, port := range c.Ports {
			if port.HostPort == 0 || uint16(port.HostPort) != v.at.Port() || protocolOf(port.Protocol) != v.protocol {
				continue
			}
			k, label := hostPort, strconv.Itoa(int(port.HostPort))
			if port.HostIP != "" {
				k, label = hostIPPort, netip.AddrPortFrom(netip.MustParseAddr(port.HostIP), uint16(port.HostPort)).String()
				if port.HostIP != v.at.Addr().String() || !slices.Contains(w.Host.Addresses, v.at.Addr()) {
					continue
				}
			} else if !slices.Contains(w.Host.Addresses, v.at.Addr()) {
				continue
			}
			claims = append(claims, claim{kind: k, pod: p, target: netip.AddrPortFrom(pod, uint16(port.ContainerPort)),
				label: fmt.Sprintf("%s/%d", label, v.protocol)})
		}
	}
	return claims
}

func podIPs(p *corev1.Pod) []string {
	if len(p.Status.PodIPs) == 0 {
		return []string{p.Status.PodIP}
	}
	var all []string
	for _, ip := range p.Status.PodIPs {
		all = append(all, ip.IP)
	}
	return all
}

// sourceAllowed: "A family without a CIDR in the list is open".
func sourceAllowed(ranges []string, client netip.Addr) bool {
	open := true
	for _, text := range ranges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p.Addr().Is4() != client.Is4() {
			continue
		}
		if p.Contains(client) {
			return true
		}
		open = false
	}
	return open
}

// ---- endpoints ----

type endpoint struct {
	at                          netip.AddrPort
	ready, serving, terminating bool
	here                        bool
	nodes, zones                []string // hints
	weight                      int
}

// isHere is the row "where an endpoint is": nodeName. Without one, from manifests: on this node if the address is the
// node's own or is routed to a pod device, else elsewhere. In a cluster without one: elsewhere.
func (w World) isHere(node string, addr netip.Addr) bool {
	if node != "" || w.Host.PodRoutes == nil {
		return node == w.Host.Name
	}
	return slices.Contains(w.Host.Addresses, addr) || slices.ContainsFunc(w.Host.PodRoutes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// endpoints returns all of a claim's, sorted, whatever they are good for.
func (w World) endpoints(c claim, ipv6 bool) []endpoint {
	if c.pod != nil {
		return []endpoint{{at: c.target, ready: true, serving: true, here: true, weight: 1}}
	}
	return w.endpointsOf(c.service, c.port, ipv6)
}

func (w World) endpointsOf(s *corev1.Service, port *corev1.ServicePort, ipv6 bool) (all []endpoint) {
	// "slices of a Service": all with label kubernetes.io/service-name; addressType of the other family or FQDN is ignored.
	of := map[bool]discoveryv1.AddressType{false: discoveryv1.AddressTypeIPv4, true: discoveryv1.AddressTypeIPv6}[ipv6]
	for _, slice := range w.Slices {
		_, headless := slice.Labels[labelHeadless]
		if slice.Namespace != s.Namespace || slice.Labels[labelService] != s.Name || headless || slice.AddressType != of || !w.sliceIsOurs(slice) {
			continue
		}
		for _, p := range slice.Ports {
			// "ports": a slice port belongs to the Service port of the same name and protocol; a nil or 0 number is ignored.
			if deref(p.Name, "") != port.Name || protocolOf(deref(p.Protocol, corev1.ProtocolTCP)) != protocolOf(port.Protocol) || deref(p.Port, 0) == 0 {
				continue
			}
			for _, e := range slice.Endpoints {
				all = merge(all, w.endpointOf(slice, e, uint16(*p.Port)))
			}
		}
	}
	slices.SortFunc(all, func(a, b endpoint) int { return a.at.Compare(b.at) })
	return all
}

// merge is "the same (IP, port) twice counts once, the more usable wins (one that is not terminating beats one that is)".
func merge(all []endpoint, e endpoint) []endpoint {
	i := slices.IndexFunc(all, func(o endpoint) bool { return o.at == e.at })
	if i < 0 {
		return append(all, e)
	}
	use := func(e endpoint) int {
		switch {
		case e.ready && !e.terminating:
			return 4
		case e.ready:
			return 3
		case e.serving && e.terminating:
			return 2
		case e.serving:
			return 1
		}
		return 0
	}
	if use(e) > use(all[i]) {
		all[i] = e
	}
	return all
}

func (w World) endpointOf(s *discoveryv1.EndpointSlice, e discoveryv1.Endpoint, port uint16) endpoint {
	addr := netip.MustParseAddr(e.Addresses[0])
	out := endpoint{
		at: netip.AddrPortFrom(addr, port),
		// "nil": ready nil = true; serving nil = true; terminating nil = false.
		ready: deref(e.Conditions.Ready, true), serving: deref(e.Conditions.Serving, true), terminating: deref(e.Conditions.Terminating, false),
		here: w.isHere(deref(e.NodeName, ""), addr), weight: 1,
	}
	if e.Hints != nil {
		for _, n := range e.Hints.ForNodes {
			out.nodes = append(out.nodes, n.Name)
		}
		for _, z := range e.Hints.ForZones {
			out.zones = append(out.zones, z.Name)
		}
	}
	for _, part := range strings.Split(s.Annotations["lbagent.io/weights"], ",") {
		if text, weight, ok := strings.Cut(part, "="); ok && text == e.Addresses[0] {
			out.weight, _ = strconv.Atoi(weight)
		}
	}
	return out
}

// usable is the row "usable": the ready ones; if there is none in the scope, those serving and terminating.
func usable(scope []endpoint) (all []endpoint, ready bool) {
	all = where(scope, func(e endpoint) bool { return e.ready })
	if len(all) > 0 {
		return all, true
	}
	return where(scope, func(e endpoint) bool { return e.serving && e.terminating }), false
}

// weighty are those that get new clients: one of weight 0 does not.
func weighty(all []endpoint) []endpoint {
	return where(all, func(e endpoint) bool { return e.weight > 0 })
}

// cluster is the scope Cluster, with the row "topology": only ready endpoints count. If every ready endpoint carries a
// node hint and one names this node: those. Else if every ready endpoint carries a zone hint and one names this node's
// zone: those. Else all. No zone label on this node: zone rule off. No ready endpoint: hints off. Hints of endpoints that
// all have weight 0 name nothing.
func (w World) cluster(all []endpoint) []endpoint {
	all, ready := usable(all)
	if !ready {
		return all
	}
	hinted := func(hints func(endpoint) []string, name string) []endpoint {
		for _, e := range all {
			if len(hints(e)) == 0 {
				return nil
			}
		}
		near := where(all, func(e endpoint) bool { return slices.Contains(hints(e), name) })
		if len(weighty(near)) == 0 {
			return nil
		}
		return near
	}
	if here := hinted(func(e endpoint) []string { return e.nodes }, w.Host.Name); len(here) > 0 {
		return here
	}
	if w.Host.Zone != "" {
		if near := hinted(func(e endpoint) []string { return e.zones }, w.Host.Zone); len(near) > 0 {
			return near
		}
	}
	return all
}

// local is the scope Local: this node's, with a fallback of its own and without topology.
func (w World) local(all []endpoint) []endpoint {
	all, _ = usable(where(all, func(e endpoint) bool { return e.here }))
	return all
}

// keeps tells whether a service still has a backend that may keep flows: it serves.
func (w World) keeps(service Service, at netip.AddrPort) bool {
	for _, p := range w.Pods {
		if !service.Pod || p.Namespace != service.Namespace || p.Name != service.Name {
			continue
		}
		for _, addr := range append(slices.Clone(w.Host.Addresses), w.Host.NodePorts...) {
			number, _, _ := strings.Cut(service.Port, "/")
			if i := strings.LastIndex(number, ":"); i >= 0 {
				number = number[i+1:]
			}
			n, _ := strconv.Atoi(number)
			for _, c := range w.podClaims(p, vip{netip.AddrPortFrom(addr, uint16(n)), service.Protocol}) {
				if c.target == at && c.name(family(addr)) == service {
					return true
				}
			}
		}
	}
	for _, s := range w.Services {
		if service.Pod || s.Namespace != service.Namespace || s.Name != service.Name || !w.counts(s) {
			continue
		}
		for i := range s.Spec.Ports {
			p := &s.Spec.Ports[i]
			if p.Name != service.Port || protocolOf(p.Protocol) != service.Protocol {
				continue
			}
			return slices.ContainsFunc(w.endpointsOf(s, p, service.IPv6), func(e endpoint) bool { return e.at == at && (e.ready || e.serving) })
		}
	}
	return false
}

// inForce tells whether a service has at least one VIP.
func (w World) inForce(service Service) bool {
	has := func(addr netip.Addr, port int32) bool {
		if family(addr) != service.IPv6 {
			return false
		}
		c, ok := w.holder(vip{netip.AddrPortFrom(addr, uint16(port)), service.Protocol})
		return ok && c.name(family(addr)) == service
	}
	for _, s := range w.Services {
		if service.Pod || s.Namespace != service.Namespace || s.Name != service.Name {
			continue
		}
		all := slices.Clone(clusterIPs(s))
		all = append(all, s.Spec.ExternalIPs...)
		for _, in := range s.Status.LoadBalancer.Ingress {
			all = append(all, in.IP)
		}
		for _, p := range s.Spec.Ports {
			for _, text := range all {
				if a, err := netip.ParseAddr(text); err == nil && has(a, p.Port) {
					return true
				}
			}
			for _, a := range w.Host.NodePorts {
				if p.NodePort != 0 && has(a, p.NodePort) {
					return true
				}
			}
		}
	}
	for _, p := range w.Pods {
		if !service.Pod || p.Namespace != service.Namespace || p.Name != service.Name {
			continue
		}
		for _, c := range p.Spec.Containers {
			for _, port := range c.Ports {
				for _, a := range append(slices.Clone(w.Host.Addresses), w.Host.NodePorts...) {
					if has(a, port.HostPort) {
						return true
					}
				}
			}
		}
	}
	return false
}

func where(all []endpoint, keep func(endpoint) bool) (some []endpoint) {
	for _, e := range all {
		if keep(e) {
			some = append(some, e)
		}
	}
	return some
}

func addresses(all []endpoint) (at []netip.AddrPort) {
	for _, e := range all {
		at = append(at, e.at)
	}
	return at
}

func protocolOf(p corev1.Protocol) uint8 {
	switch p {
	case corev1.ProtocolTCP, "":
		return TCP
	case corev1.ProtocolUDP:
		return UDP
	}
	return 0
}

func family(a netip.Addr) (ipv6 bool) { return a.Is6() }

func familyName(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
