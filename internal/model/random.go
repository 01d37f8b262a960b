// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Step is one thing that happens; one field is set, or several of a Packet.
type Step struct {
	Edit    *Edit
	Packet  *Packet
	From    Side
	Reply   bool          // not the packet, but what its backend answers, if there is one
	Way     uint8         // which of the programs that may get it does
	Forget  bool          // all flows expire
	Sweep   bool          // what no flow needs is freed
	Age     time.Duration // of what affinity remembers
	Restart bool          // of what writes the maps
}

// String is the step as a person would describe it.
func (s Step) String() string {
	switch {
	case s.Edit != nil:
		return "edit: " + s.Edit.String()
	case s.Packet != nil && s.Reply:
		return fmt.Sprintf("reply to %s\n", s.Packet)
	case s.Packet != nil:
		return fmt.Sprintf("packet from %s: %s\n", s.From, s.Packet)
	case s.Forget:
		return "all flows expire\n"
	case s.Sweep:
		return "sweep\n"
	case s.Restart:
		return "restart\n"
	}
	return fmt.Sprintf("%s pass for affinity\n", s.Age)
}

// The places of all random worlds. They are few, so that things meet: one address is a VIP of two Services and the
// node's own, one endpoint serves two Services, a client is an endpoint.
var (
	ownAddresses   = addrs("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2")
	vipPool        = addrs("10.96.0.1", "10.96.0.2", "10.96.0.3", "10.97.0.1", "fd00:96::1", "fd00:96::2", "fd00:97::1")
	publicPool     = addrs("203.0.113.1", "203.0.113.2", "192.0.2.2", "10.96.0.3", "2001:db8:b::1", "2001:db8::2", "fd00:96::2")
	nobodys        = addrs("10.96.0.77", "10.95.255.255", "10.96.1.0", "198.51.100.77", "fd00:96::77", "2001:db8:77::1")
	hereRoutes     = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")}
	herePods       = addrs("10.244.1.1", "10.244.1.2", "10.244.1.3", "fd00:244:1::1", "fd00:244:1::2", "fd00:244:1::3")
	farPods        = addrs("10.244.2.1", "10.244.2.2", "10.244.2.3", "fd00:244:2::1", "fd00:244:2::2", "fd00:244:2::3")
	hostNetwork    = addrs("192.0.2.1", "192.0.2.11", "2001:db8::1", "2001:db8::11")
	outsiders      = addrs("172.16.0.1", "172.16.1.1", "192.0.2.11", "10.244.2.1", "10.96.0.200", "2001:db8:c::1", "2001:db8:c:1::1", "2001:db8::11", "fd00:244:2::1", "fd00:96::200")
	sourceRanges   = []string{"172.16.0.0/24", "172.16.0.0/23", "172.16.1.1/32", "10.244.1.0/24", "10.244.1.2/31", "0.0.0.0/0", " 192.0.2.0/24", "2001:db8:c::/64", "2001:db8:c::/63", "fd00:244:1::2/127"}
	portNumbers    = []int32{80, 81, 443}
	nodePortPool   = []int32{30000, 30001, 30002}
	hostPortPool   = []int32{80, 8080, 30001}
	targetPorts    = []int32{8080, 8081, 80, 30001}
	servicePrefix4 = netip.MustParsePrefix("10.96.0.0/24")
	servicePrefix6 = netip.MustParsePrefix("fd00:96::/112")
	zones          = []string{"a", "b", ""}
)

func addrs(all ...string) (list []netip.Addr) {
	for _, text := range all {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// random makes worlds.
type random struct{ *rand.Rand }

// Random returns a world and what happens in it, the same for the same numbers.
func Random(seed, number uint64, packets int) (World, []Step) {
	r := &random{rand.New(rand.NewPCG(seed, number))}
	w := r.world()
	var steps []Step
	current := w
	edits := r.IntN(12)
	var sent []Step
	places := r.places(current)
	for n := 0; n < packets; {
		switch {
		case edits > 0 && r.IntN(packets) < 2*edits:
			for _, e := range r.edit(current) {
				current = current.Apply(e)
				steps = append(steps, Step{Edit: &e})
			}
			places = r.places(current)
		case r.IntN(100) == 0:
			steps = append(steps, r.event())
		case len(sent) > 0 && r.IntN(2) == 0: // the same again, or its answer
			s := sent[len(sent)-1-r.IntN(min(len(sent), 1+r.IntN(60)))]
			p := *s.Packet
			if p.Protocol == TCP {
				p.Flags = r.flags()
			}
			s.Packet = &p
			s.Way = uint8(r.IntN(16))
			s.Reply = s.Packet.Protocol != GRE && s.Packet.Protocol != ICMP && s.Packet.Protocol != ICMPv6 && r.IntN(2) == 0
			steps = append(steps, s)
			n++
		default:
			s := r.packet(places)
			sent = append(sent, s)
			steps = append(steps, s)
			n++
		}
	}
	return w, steps
}

func (r *random) event() Step {
	switch r.IntN(8) {
	case 0:
		return Step{Forget: true}
	case 1:
		return Step{Restart: true}
	case 2, 3:
		return Step{Sweep: true}
	}
	return Step{Age: pick(r, []time.Duration{time.Minute, time.Minute, 10 * time.Minute, 100 * time.Minute, 14 * time.Hour})}
}

func (r *random) flags() uint8 {
	return pick(r, []uint8{SYN, SYN, SYN, SYN, SYN, SYN, ACK, ACK, ACK, ACK, ACK, ACK, ACK, ACK, ACK, RST, RST | ACK})
}

// places are where packets of a world are worth sending: frontends, most of all, and what is near them.
func (r *random) places(w World) (all []vip) {
	defer func() {
		var held []vip
		for _, v := range all {
			if _, ok := w.holder(v); ok {
				held = append(held, v)
			}
		}
		for len(held) > 0 && len(held) < 3*len(all) {
			held = append(held, held...)
		}
		all = append(all, held...)
	}()
	add := func(a netip.Addr, port int32, p corev1.Protocol) {
		all = append(all, vip{netip.AddrPortFrom(a, uint16(port)), protocolOf(p)})
	}
	for _, s := range w.Services {
		texts := append(slices.Clone(clusterIPs(s)), s.Spec.ExternalIPs...)
		for _, in := range s.Status.LoadBalancer.Ingress {
			texts = append(texts, in.IP)
		}
		for _, p := range s.Spec.Ports {
			for _, text := range texts {
				if a, err := netip.ParseAddr(text); err == nil {
					add(a, p.Port, p.Protocol)
					add(a, p.Port, p.Protocol)
				}
			}
			for _, a := range ownAddresses {
				add(a, p.NodePort, p.Protocol)
			}
		}
	}
	for _, p := range w.Pods {
		for _, c := range p.Spec.Containers {
			for _, port := range c.Ports {
				for _, a := range ownAddresses {
					add(a, port.HostPort, port.Protocol)
				}
			}
		}
	}
	backends := map[vip]bool{}
	w.addBackends(backends)
	for b := range backends {
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b vip) int { return a.at.Compare(b.at)*4 + int(a.protocol) - int(b.protocol) })
	for _, a := range slices.Concat(nobodys, vipPool) {
		add(a, 80, pick(r, []corev1.Protocol{"TCP", "UDP"}))
	}
	return all
}

func (r *random) packet(places []vip) Step {
	v := pick(r, places)
	if v.protocol == 0 {
		v.protocol = TCP
	}
	port := v.at.Port()
	switch r.IntN(20) {
	case 0:
		port++
	case 1:
		port--
	case 2:
		v.protocol = TCP + UDP - v.protocol
	}
	if port == 0 {
		port = 1
	}
	from := Side(r.IntN(2))
	pool := [...][]netip.Addr{herePods, outsiders}[from]
	if r.IntN(30) == 0 { // as if it came by another way
		pool = outsiders
	}
	var source netip.Addr
	for source = pick(r, pool); source.Is4() != v.at.Addr().Is4(); source = pick(r, pool) {
	}
	sourcePort := uint16(40000 + r.IntN(4)) // others' ports
	if r.IntN(3) > 0 {
		sourcePort = uint16(1024 + r.IntN(64000))
	}
	p := Packet{From: netip.AddrPortFrom(source, sourcePort), To: netip.AddrPortFrom(v.at.Addr(), port), Protocol: v.protocol}
	if p.Protocol == TCP {
		p.Flags = r.flags()
	}
	if r.IntN(12) == 0 {
		p.From, p.To, p.Flags = netip.AddrPortFrom(source, 0), netip.AddrPortFrom(v.at.Addr(), 0), 0
		switch {
		case r.IntN(6) == 0:
			p.Protocol = GRE
		case source.Is4():
			p.Protocol = ICMP
		default:
			p.Protocol = ICMPv6
		}
	}
	return Step{Packet: &p, From: from, Way: uint8(r.IntN(16))}
}

// ---- worlds ----

func (r *random) world() World {
	w := World{Host: r.host(), Prefixes: r.prefixes()}
	if r.IntN(4) == 0 {
		w.ExternalIPsAllow = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/31"), netip.MustParsePrefix("2001:db8::/32")}
	}
	if r.IntN(8) == 0 {
		w.ProxyName = "mine"
	}
	for i := range 1 + r.IntN(5) {
		s := r.service(w, fmt.Sprintf("s%d", i))
		w.Services = append(w.Services, s)
		w.Slices = append(w.Slices, r.slices(s)...)
	}
	for i := range r.IntN(4) {
		w.Pods = append(w.Pods, r.pod(fmt.Sprintf("p%d", i)))
	}
	return w
}

func (r *random) host() Host {
	h := Host{Name: "here", Zone: pick(r, zones)}
	h.Addresses = some(r, ownAddresses, 3)
	h.NodePorts = some(r, h.Addresses, 2)
	if r.IntN(3) > 0 {
		h.PodRoutes = some(r, hereRoutes, 3)
		if h.PodRoutes == nil {
			h.PodRoutes = []netip.Prefix{}
		}
	}
	return h
}

func (r *random) prefixes() []netip.Prefix {
	return some(r, []netip.Prefix{servicePrefix4, servicePrefix6}, 3)
}

// created is a time of its own, or now and then one that another object has too, or none.
func (r *random) created() metav1.Time {
	switch r.IntN(8) {
	case 0:
		return metav1.Time{}
	case 1:
		return metav1.Unix(1, 0)
	}
	return metav1.Unix(int64(r.IntN(1000)), 0)
}

func (r *random) service(w World, name string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, []string{"default", "default", "other"}), Name: name, CreationTimestamp: r.created()}}
	r.families(s)
	s.Spec.Type = pick(r, []corev1.ServiceType{"ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"})
	for i := range 1 + r.IntN(2) {
		s.Spec.Ports = append(s.Spec.Ports, r.port(s, i))
	}
	r.addresses(s)
	if r.IntN(3) == 0 {
		r.policies(s)
	}
	if r.IntN(3) == 0 {
		r.affinity(s)
	}
	if r.IntN(3) == 0 {
		r.ranges(s)
	}
	if r.IntN(4) == 0 {
		s.Annotations = map[string]string{"lbagent.io/algorithm": pick(r, []string{"plain", "maglev", "maglev"})}
	}
	r.labels(w, s)
	return s
}

func (r *random) families(s *corev1.Service) {
	s.Spec.IPFamilies = pick(r, [][]corev1.IPFamily{{"IPv4"}, {"IPv6"}, {"IPv4", "IPv6"}, {"IPv6", "IPv4"}, nil})
	s.Spec.ClusterIPs, s.Spec.ClusterIP = nil, ""
	for _, f := range s.Spec.IPFamilies {
		for a := pick(r, vipPool); ; a = pick(r, vipPool) {
			if familyName(a) == string(f) {
				s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, a.String())
				break
			}
		}
	}
	if s.Spec.IPFamilies == nil {
		s.Spec.ClusterIPs = []string{pick(r, vipPool).String()}
	}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
}

func (r *random) port(s *corev1.Service, i int) corev1.ServicePort {
	p := corev1.ServicePort{Name: []string{"", "one", "two"}[i+r.IntN(2)*i], Protocol: pick(r, []corev1.Protocol{"TCP", "UDP", ""}), Port: pick(r, portNumbers)}
	if r.IntN(4) > 0 {
		p.NodePort = pick(r, nodePortPool)
	}
	for _, other := range s.Spec.Ports {
		if other.Name == p.Name {
			p.Name += "x"
		}
		if other.Port == p.Port && protocolOf(other.Protocol) == protocolOf(p.Protocol) {
			p.Port += 100
		}
		if other.NodePort == p.NodePort && p.NodePort != 0 && protocolOf(other.Protocol) == protocolOf(p.Protocol) {
			p.NodePort += 10
		}
	}
	return p
}

func (r *random) addresses(s *corev1.Service) {
	s.Spec.ExternalIPs, s.Status.LoadBalancer.Ingress = nil, nil
	if r.IntN(4) == 0 {
		for _, a := range some(r, publicPool, 1) {
			s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, a.String())
		}
	}
	if r.IntN(4) > 0 { // whatever the type: it counts for one alone
		for _, a := range some(r, publicPool, 1) {
			in := corev1.LoadBalancerIngress{IP: a.String()}
			if mode := pick(r, []corev1.LoadBalancerIPMode{"VIP", "Proxy", "", "", ""}); mode != "" {
				in.IPMode = &mode
			}
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, in)
		}
		if r.IntN(4) == 0 {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{Hostname: "lb.example"})
		}
	}
}

func (r *random) policies(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = pick(r, []corev1.ServiceExternalTrafficPolicy{"", "Cluster", "Local", "Local"})
	internal := pick(r, []corev1.ServiceInternalTrafficPolicy{"Cluster", "Local"})
	s.Spec.InternalTrafficPolicy = &internal
}

func (r *random) affinity(s *corev1.Service) {
	s.Spec.SessionAffinity = pick(r, []corev1.ServiceAffinity{"None", "ClientIP", "ClientIP"})
	s.Spec.SessionAffinityConfig = nil
	if s.Spec.SessionAffinity == "ClientIP" && r.IntN(4) > 0 {
		seconds := pick(r, []int32{100, 1000, 10800, 86400})
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
}

func (r *random) ranges(s *corev1.Service) {
	s.Spec.LoadBalancerSourceRanges = some(r, sourceRanges, 1)
}

func (r *random) labels(w World, s *corev1.Service) {
	delete(s.Labels, labelProxy)
	delete(s.Labels, labelHeadless)
	set := func(label, value string) {
		if s.Labels == nil {
			s.Labels = map[string]string{}
		}
		s.Labels[label] = value
	}
	if w.ProxyName != "" && r.IntN(4) > 0 {
		set(labelProxy, w.ProxyName)
		return
	}
	if r.IntN(8) == 0 {
		set(labelProxy, pick(r, []string{"", "another"}))
	}
}

// slices are those of a Service, for its ports and some others.
func (r *random) slices(s *corev1.Service) (all []*discoveryv1.EndpointSlice) {
	weights, mode := r.weights(), r.IntN(hintModes)
	for i := range min(1+r.IntN(4), r.IntN(12)) {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: s.Namespace, Name: fmt.Sprintf("%s-%d", s.Name, i), Labels: map[string]string{labelService: s.Name}},
			AddressType: pick(r, []discoveryv1.AddressType{"IPv4", "IPv4", "IPv6", "IPv6"}),
		}
		if n := len(s.Spec.IPFamilies); n > 0 && r.IntN(6) > 0 {
			slice.AddressType = discoveryv1.AddressType(s.Spec.IPFamilies[i%n])
		}
		if label, ok := s.Labels[labelProxy]; ok {
			slice.Labels[labelProxy] = label
		}
		if r.IntN(20) == 0 {
			slice.Labels[pick(r, []string{labelHeadless, labelProxy})] = ""
		}
		slice.Annotations = map[string]string{annotationHints: strconv.Itoa(mode)}
		if weights != "" {
			slice.Annotations["lbagent.io/weights"] = weights
		}
		for _, p := range s.Spec.Ports {
			slice.Ports = append(slice.Ports, r.endpointPort(p))
		}
		slice.Endpoints = r.endpoints(slice)
		all = append(all, slice)
	}
	return all
}

// endpointPort is nearly always that of a Service port.
func (r *random) endpointPort(p corev1.ServicePort) discoveryv1.EndpointPort {
	name, protocol, number := p.Name, p.Protocol, pick(r, targetPorts)
	port := discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number}
	if name == "" && r.IntN(2) == 0 {
		port.Name = nil
	}
	if protocolOf(protocol) == TCP && r.IntN(2) == 0 {
		port.Protocol = nil
	}
	switch r.IntN(25) {
	case 0:
		port.Port = nil
	case 1:
		*port.Port = 0
	case 2:
		other := name + "y"
		port.Name = &other
	}
	return port
}

// What is twice in the slices of one Service is at one place, with one weight and one hint, as in a cluster: no rule
// says which of two would count.
func (r *random) endpoints(s *discoveryv1.EndpointSlice) (all []discoveryv1.Endpoint) {
	for _, a := range some(r, slices.Concat(herePods, farPods, hostNetwork), 0) {
		if familyName(a) != string(s.AddressType) || len(all) > 0 && r.IntN(3) == 0 {
			continue
		}
		e := discoveryv1.Endpoint{Addresses: []string{a.String()}, Hints: hints(a, s.Annotations[annotationHints])}
		if node := nodeOf(a); a.As16()[15]%4 != 3 && a != hostNetwork[0] {
			e.NodeName = &node
		}
		if r.IntN(4) > 0 {
			e.Conditions = r.conditions()
		}
		all = append(all, e)
	}
	return all
}

func nodeOf(a netip.Addr) string {
	switch {
	case slices.Contains(herePods, a) || slices.Contains(ownAddresses, a):
		return "here"
	case a.As16()[15]%2 == 0:
		return "there"
	}
	return "yonder"
}

// annotationHints says which hints the endpoints of a slice have.
const (
	annotationHints = "model/hints"
	hintModes       = 7
)

// hints are those of an address in a mode: none, or zone, node or both, of all endpoints or of all but one.
func hints(a netip.Addr, mode string) *discoveryv1.EndpointHints {
	m, _ := strconv.Atoi(mode)
	h := &discoveryv1.EndpointHints{}
	last := a.As16()[15]
	if m == 0 || m > 3 && last == 2 {
		return nil
	}
	if m%3 != 0 {
		h.ForZones = []discoveryv1.ForZone{{Name: zones[last%2]}}
	}
	if m%3 != 1 {
		h.ForNodes = []discoveryv1.ForNode{{Name: nodeOf(a)}}
	}
	return h
}

// conditions are those of an endpoint; of one address in two slices, each has its own.
func (r *random) conditions() (c discoveryv1.EndpointConditions) {
	set := func(ready, serving, terminating bool) discoveryv1.EndpointConditions {
		return discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}
	}
	no := false
	switch r.IntN(14) {
	case 0:
		return discoveryv1.EndpointConditions{Ready: &no} // serving: nil is true
	case 1:
		return set(false, false, false)
	case 2, 3, 4:
		return set(false, true, true)
	case 5:
		return set(false, false, true)
	case 6:
		return set(true, false, r.IntN(2) == 0) // publishNotReadyAddresses
	}
	return set(true, true, false)
}

func (r *random) weights() string {
	if r.IntN(5) > 0 {
		return ""
	}
	var parts []string
	for _, a := range some(r, slices.Concat(herePods, farPods), 0) {
		parts = append(parts, fmt.Sprintf("%s=%d", a, pick(r, []int{0, 0, 1, 2, 7})))
	}
	return strings.Join(parts, ",")
}

func (r *random) pod(name string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, CreationTimestamp: r.created()}}
	i := r.IntN(3)
	pool := herePods
	p.Spec.NodeName = "here"
	if r.IntN(5) == 0 {
		pool, p.Spec.NodeName = farPods, "there"
	}
	if r.IntN(5) == 0 {
		p.Spec.NodeName = ""
	}
	p.Spec.HostNetwork = r.IntN(10) == 0
	p.Status.Phase = pick(r, []corev1.PodPhase{"Running", "Running", "Running", "Pending", "Succeeded"})
	for _, a := range pick(r, [][]netip.Addr{{pool[i]}, {pool[i+3]}, {pool[i], pool[i+3]}, {pool[i], pool[i+3]}, {}}) {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if len(p.Status.PodIPs) > 0 {
		p.Status.PodIP = p.Status.PodIPs[0].IP
	}
	taken := map[int32]bool{}
	for range 1 + r.IntN(2) {
		port := corev1.ContainerPort{ContainerPort: pick(r, targetPorts), HostPort: pick(r, hostPortPool), Protocol: pick(r, []corev1.Protocol{"TCP", "UDP", ""})}
		if r.IntN(3) == 0 {
			port.HostIP = pick(r, ownAddresses).String()
		}
		if taken[port.HostPort] {
			continue
		}
		taken[port.HostPort] = true
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", len(taken)), Ports: []corev1.ContainerPort{port}})
	}
	return p
}

// ---- edits ----

func (r *random) edit(w World) []Edit {
	switch n := r.IntN(20); {
	case n == 0:
		h := r.host()
		return []Edit{{Host: &h}}
	case n == 1:
		p := r.prefixes()
		return []Edit{{Prefixes: &p}}
	case n < 4:
		p := r.pod(fmt.Sprintf("p%d", r.IntN(4)))
		return []Edit{{Pod: p, Gone: r.IntN(3) == 0}}
	case n < 8 && len(w.Slices) > 0:
		return []Edit{r.editSlice(w)}
	case n < 11 && len(w.Slices) > 0:
		return r.editSlices(w)
	case n == 11 || len(w.Services) == 0:
		return []Edit{{Service: r.service(w, fmt.Sprintf("s%d", r.IntN(5)))}}
	}
	return []Edit{r.editService(w)}
}

func (r *random) editService(w World) Edit {
	s := pick(r, w.Services).DeepCopy()
	switch r.IntN(10) {
	case 0:
		return Edit{Service: s, Gone: true}
	case 1:
		s.Spec.Type = pick(r, []corev1.ServiceType{"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"})
		if s.Spec.Type == corev1.ServiceTypeExternalName {
			s.Spec.ClusterIPs, s.Spec.ClusterIP = nil, ""
		} else if r.IntN(5) == 0 {
			s.Spec.ClusterIPs, s.Spec.ClusterIP = []string{"None"}, "None"
		} else if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == "None" {
			r.families(s)
		}
	case 2:
		p := &s.Spec.Ports[r.IntN(len(s.Spec.Ports))]
		if r.IntN(2) == 0 {
			p.Port = pick(r, portNumbers) + 200 + r.Int32N(2)
		} else {
			p.NodePort = pick(r, nodePortPool) + 100 + r.Int32N(2)
		}
	case 3:
		r.policies(s)
	case 4:
		r.affinity(s)
	case 5:
		r.ranges(s)
	case 6:
		r.labels(w, s)
	case 7:
		r.addresses(s)
	case 8:
		s.Annotations = map[string]string{"lbagent.io/algorithm": pick(r, []string{"plain", "maglev"})}
	case 9:
		if s.Spec.Type != corev1.ServiceTypeExternalName && s.Spec.ClusterIP != "None" {
			r.families(s)
		}
	}
	return Edit{Service: s}
}

func (r *random) editSlice(w World) Edit {
	s := pick(r, w.Slices).DeepCopy()
	if r.IntN(10) == 0 {
		return Edit{Slice: s, Gone: true}
	}
	switch r.IntN(4) {
	case 0:
		s.Endpoints = r.endpoints(s)
	case 1:
		for i := range s.Ports {
			if s.Ports[i].Port != nil {
				number := pick(r, targetPorts)
				s.Ports[i].Port = &number
			}
		}
	default:
		for i := range s.Endpoints {
			if r.IntN(2) == 0 {
				s.Endpoints[i].Conditions = r.conditions()
			}
		}
	}
	return Edit{Slice: s}
}

// editSlices gives all endpoints of a Service other hints, or other weights.
func (r *random) editSlices(w World) (edits []Edit) {
	of := pick(r, w.Slices)
	mode, weights := strconv.Itoa(r.IntN(hintModes)), r.weights()
	other := r.IntN(2) == 0
	for _, s := range w.Slices {
		if s.Namespace != of.Namespace || s.Labels[labelService] != of.Labels[labelService] {
			continue
		}
		s = s.DeepCopy()
		if other {
			s.Annotations["lbagent.io/weights"] = weights
		} else {
			s.Annotations[annotationHints] = mode
			for i := range s.Endpoints {
				s.Endpoints[i].Hints = hints(netip.MustParseAddr(s.Endpoints[i].Addresses[0]), mode)
			}
		}
		edits = append(edits, Edit{Slice: s})
	}
	return edits
}

func pick[T any](r *random, all []T) T { return all[r.IntN(len(all))] }

// some returns some of all in their order: of each, odds to one (0: 1 to 2; 1: 1 to 3, one at least).
func some[T any](r *random, all []T, odds int) (list []T) {
	for _, one := range all {
		switch {
		case odds == 0 && r.IntN(3) == 0, odds == 1 && r.IntN(3) == 0, odds > 1 && r.IntN(odds+1) > 0:
			list = append(list, one)
		}
	}
	if len(list) == 0 && odds == 1 {
		list = append(list, pick(r, all))
	}
	return list
}
