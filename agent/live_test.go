// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	lbmaps "github.com/lbagent/lbagent/maps"
)

// Every field of a Service and of its slices is edited here while clients ask all the time, by every kind of
// frontend, from outside and from a pod, in both families, by TCP and UDP. What each of them may see is written beside
// the edit, and anything else fails: nothing is asked twice.

// objects are a Service and what belongs to it, as a manifest has them.
type objects struct {
	service *corev1.Service // nil: there is none
	slices  []*discoveryv1.EndpointSlice
}

func (o objects) clone() objects {
	c := objects{service: o.service.DeepCopy()}
	for _, s := range o.slices {
		c.slices = append(c.slices, s.DeepCopy())
	}
	return c
}

// endpoint changes endpoint i in both families.
func (o *objects) endpoint(i int, change func(*discoveryv1.Endpoint)) {
	for _, s := range o.slices {
		change(&s.Endpoints[i])
	}
}

// only leaves these endpoints.
func (o *objects) only(left ...int) {
	for _, s := range o.slices {
		var list []discoveryv1.Endpoint
		for _, i := range left {
			list = append(list, s.Endpoints[i])
		}
		s.Endpoints = list
	}
}

// conditions says of endpoints whether they are ready, serving and terminating.
func (o *objects) conditions(ready, serving, terminating bool, of ...int) {
	for _, i := range of {
		o.endpoint(i, func(e *discoveryv1.Endpoint) {
			e.Conditions = discoveryv1.EndpointConditions{Ready: new(ready), Serving: new(serving), Terminating: new(terminating)}
		})
	}
}

func (o *objects) weights(of ...int) {
	for _, s := range o.slices {
		var list []string
		for i, w := range of {
			list = append(list, fmt.Sprintf("%s=%d", s.Endpoints[i].Addresses[0], w))
		}
		s.Annotations = map[string]string{"lbagent.io/weights": strings.Join(list, ",")}
	}
}

// clusterIPOnly takes what only Services of other types have.
func (o *objects) clusterIPOnly() {
	o.service.Spec.Type = corev1.ServiceTypeClusterIP
	for i := range o.service.Spec.Ports {
		o.service.Spec.Ports[i].NodePort = 0
	}
}

func (o *objects) affinity(timeout int32) {
	o.service.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	o.service.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &timeout}}
}

func (o *objects) singleStack() {
	spec := &o.service.Spec
	spec.IPFamilies, spec.IPFamilyPolicy = spec.IPFamilies[:1], new(corev1.IPFamilyPolicySingleStack)
	spec.ClusterIPs = spec.ClusterIPs[:1]
}

// onePortMore adds port 8 of both protocols.
func (o *objects) onePortMore() {
	for name, protocol := range map[string]corev1.Protocol{"more-tcp": corev1.ProtocolTCP, "more-udp": corev1.ProtocolUDP} {
		o.service.Spec.Ports = append(o.service.Spec.Ports, corev1.ServicePort{Name: name, Port: 8, NodePort: 30008, Protocol: protocol})
		for _, s := range o.slices {
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: new(name), Port: new(int32(7007)), Protocol: new(protocol)})
		}
	}
}

func (o *objects) externalIPs(all ...string) { o.service.Spec.ExternalIPs = all }

// nodePort has the first two ports of the Service served at this one of the node; 0 is none.
func (o *objects) nodePort(number int32) {
	if number == 0 {
		o.service.Spec.AllocateLoadBalancerNodePorts = new(false)
	}
	for i := range 2 {
		o.service.Spec.Ports[i].NodePort = number
	}
}

func (o *objects) targetPort(number int32) {
	for _, s := range o.slices {
		for i := range s.Ports {
			*s.Ports[i].Port = number
		}
	}
}

func (o *objects) portNames() {
	for i := range o.service.Spec.Ports {
		o.service.Spec.Ports[i].Name += "-2"
	}
	for _, s := range o.slices {
		for i := range s.Ports {
			*s.Ports[i].Name += "-2"
		}
	}
}

func (o *objects) maglev() {
	o.service.Annotations = map[string]string{"lbagent.io/algorithm": "maglev"}
}

// zones hints each endpoint to a zone.
func (o *objects) zones(zones ...string) {
	for i, zone := range zones {
		o.endpoint(i, func(e *discoveryv1.Endpoint) {
			e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zone}}}
		})
	}
}

// split gives all endpoints but the first a slice of their own.
func (o *objects) split() {
	for _, s := range slices.Clone(o.slices) {
		rest := s.DeepCopy()
		rest.Name += "-rest"
		s.Endpoints, rest.Endpoints = s.Endpoints[:1], rest.Endpoints[1:]
		o.slices = append(o.slices, rest)
	}
}

func (o *objects) renameSlices() {
	for _, s := range o.slices {
		s.Name = "renamed-" + s.Name
	}
}

func (o *objects) sourceRanges(all ...string) { o.service.Spec.LoadBalancerSourceRanges = all }

func (o *objects) externalLocal() {
	o.service.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func (o *objects) internalLocal() {
	o.service.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
}

func (o *objects) text(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	put := func(object any) {
		text, err := yaml.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(text)
		b.WriteString("---\n")
	}
	if o.service != nil {
		put(o.service)
	}
	for _, s := range o.slices {
		put(s)
	}
	return b.String()
}

// The kinds of frontends that are asked at, and the ways to ask.
const (
	kindClusterIP = "ClusterIP"
	kindNodePort  = "NodePort"
	kindIngress   = "LoadBalancer"
	kindExternal  = "external"

	newTCP  = "a new connection"
	longTCP = "a connection that was there"
	newUDP  = "a new socket"
	longUDP = "a socket that was there"
)

// outcome is what a request gets.
type outcome int

const (
	served    outcome = iota
	refused           // a reset, or a port unreachable
	dropped           // by the agent's programs
	untouched         // the stack gets it, whose strict rules drop and count it
	failed            // anything else, as a connection that was made and then did not work
)

func (o outcome) String() string {
	return [...]string{"served", "refused", "dropped", "untouched", "failed"}[o]
}

// want is what clients get once a state of the manifest is in force. The zero want: all are served, by all three
// backends, and no UDP flow has moved.
type want struct {
	gone  func(*caller) outcome // what new requests get; nil: all are served
	by    func(*caller) string  // who serves new ones; nil: backend0 backend1 backend2
	moves string                // the backends whose UDP flows choose anew, else they stay; or everybody
	keeps bool                  // UDP flows go on at their backends though new ones are not served
	alike bool                  // one client of one port and family has one server
	few   bool                  // some of those who may serve new ones do not
	also  func(*live)           // looked at when it is in force
}

const everybody = "everybody"

func (w want) gives(c *caller) outcome {
	if w.gone == nil {
		return served
	}
	return w.gone(c)
}

func (w want) servers(c *caller) string {
	if w.by == nil {
		return backends
	}
	return w.by(c)
}

const backends = "backend0 backend1 backend2"

func by(names string) func(*caller) string { return func(*caller) string { return names } }

// gone returns want.gone for those frontends that a condition is about.
func gone(gets outcome, which func(*caller) bool) func(*caller) outcome {
	return func(c *caller) outcome {
		if which(c) {
			return gets
		}
		return served
	}
}

func reachedAt(kinds ...string) func(*caller) bool {
	return func(c *caller) bool { return slices.Contains(kinds, c.kind) }
}

// vanished is what is sent to a frontend that the agent knows no more: nobody has a cluster IP that no Service has.
func vanished(c *caller) outcome {
	if c.kind == kindClusterIP {
		return dropped
	}
	return untouched
}

func localTo(condition func(*caller) bool) func(*caller) string {
	return func(c *caller) string {
		if condition(c) {
			return "backend0 backend1"
		}
		return backends
	}
}

func (c *caller) externalFromOutside() bool { return c.kind != kindClusterIP && c.outside }

// step is a state of the manifest and what is seen of it.
type step struct {
	change func(*objects) // from the first state
	want   want
}

// edits are all fields, one by one. After its steps each is taken back.
var edits = []struct {
	field string
	steps []step
}{
	{"type", []step{
		{func(o *objects) { o.service.Spec.Type = corev1.ServiceTypeNodePort }, want{gone: gone(untouched, reachedAt(kindIngress))}},
		{(*objects).clusterIPOnly, want{gone: gone(untouched, reachedAt(kindIngress, kindNodePort))}},
		{func(o *objects) { o.service.Spec.Type = corev1.ServiceTypeNodePort }, want{gone: gone(untouched, reachedAt(kindIngress))}},
		{func(o *objects) {
			ports := o.service.Spec.Ports
			o.service.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "elsewhere.example", Ports: ports}
			for i := range ports {
				ports[i].NodePort = 0
			}
		}, want{gone: vanished}},
	}},
	{"internalTrafficPolicy", []step{{(*objects).internalLocal, want{by: localTo(reachedAt(kindClusterIP))}}}},
	{"externalTrafficPolicy", []step{{(*objects).externalLocal, want{by: localTo((*caller).externalFromOutside)}}}},
	{"both policies, with endpoints here and then none", []step{
		{func(o *objects) { o.externalLocal(); o.internalLocal() }, want{
			by: localTo(func(c *caller) bool { return c.kind == kindClusterIP || c.outside }),
		}},
		{func(o *objects) { o.externalLocal(); o.internalLocal(); o.only(2) }, want{
			gone:  gone(dropped, func(c *caller) bool { return c.kind == kindClusterIP || c.outside }),
			by:    by("backend2"),
			moves: "backend0 backend1",
			keeps: true,
		}},
	}},
	{"sessionAffinity", []step{
		{func(o *objects) { o.affinity(10800) }, want{alike: true}},
		{func(o *objects) { o.affinity(600) }, want{alike: true}},
	}},
	{"annotation algorithm", []step{{(*objects).maglev, want{}}}},
	{"annotation weights", []step{
		{func(o *objects) { o.weights(5, 3, 4) }, want{}},
		{func(o *objects) { o.weights(0, 3, 1) }, want{by: by("backend1 backend2")}},
		{func(o *objects) { o.weights(0, 0, 1) }, want{by: by("backend2")}},
	}},
	{"ports.name", []step{{(*objects).portNames, want{moves: everybody}}}},
	{"ports: one more", []step{{(*objects).onePortMore, want{also: func(l *live) { l.reach(netip.MustParseAddrPort("198.51.100.10:8")) }}}}},
	{"ports: one less", []step{{func(o *objects) { o.service.Spec.Ports = o.service.Spec.Ports[:1] }, want{
		gone: func(c *caller) outcome {
			switch {
			case c.by == newTCP:
				return served
			case c.kind == kindClusterIP:
				return refused
			}
			return untouched
		},
	}}}},
	{"ports.port", []step{{func(o *objects) {
		for i := range o.service.Spec.Ports {
			o.service.Spec.Ports[i].Port = 9
		}
	}, want{gone: func(c *caller) outcome {
		switch c.kind {
		case kindNodePort:
			return served
		case kindClusterIP:
			return refused
		}
		return untouched
	}}}}},
	{"ports.targetPort, which is the port of the slices", []step{{func(o *objects) { o.targetPort(7008) }, want{by: by("other0 other1 other2"), moves: everybody}}}},
	{"ports.nodePort", []step{{func(o *objects) { o.nodePort(30009) }, want{gone: gone(untouched, reachedAt(kindNodePort)), also: func(l *live) { l.reach(netip.MustParseAddrPort("192.0.2.1:30009")) }}}}},
	{"allocateLoadBalancerNodePorts", []step{{func(o *objects) { o.nodePort(0) }, want{gone: gone(untouched, reachedAt(kindNodePort))}}}},
	{"ipFamilies", []step{{(*objects).singleStack, want{gone: func(c *caller) outcome {
		if c.family == 4 {
			return served
		}
		return vanished(c)
	}}}}},
	{"clusterIPs", []step{{func(o *objects) {
		o.service.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
		o.service.Spec.ClusterIPs = o.service.Spec.ClusterIPs[:1]
	}, want{gone: gone(dropped, func(c *caller) bool { return c.kind == kindClusterIP && c.family == 6 })}}}},
	{"externalIPs", []step{{func(o *objects) { o.externalIPs() }, want{gone: gone(untouched, reachedAt(kindExternal))}}}},
	{"status.loadBalancer", []step{
		{func(o *objects) { o.service.Status.LoadBalancer.Ingress = nil }, want{gone: gone(untouched, reachedAt(kindIngress))}},
		{func(o *objects) {
			o.service.Status.LoadBalancer.Ingress = o.service.Status.LoadBalancer.Ingress[:1]
		}, want{gone: gone(untouched, func(c *caller) bool { return c.kind == kindIngress && c.family == 6 })}},
		{func(o *objects) {
			for i := range o.service.Status.LoadBalancer.Ingress {
				o.service.Status.LoadBalancer.Ingress[i].IPMode = new(corev1.LoadBalancerIPModeProxy)
			}
		}, want{gone: gone(untouched, reachedAt(kindIngress))}},
	}},
	{"loadBalancerSourceRanges", []step{
		{func(o *objects) { o.sourceRanges("192.0.2.0/24", "10.244.0.0/16", "fd00::/16") }, want{}},
		{func(o *objects) { o.sourceRanges("10.244.0.0/16", "fd00:244::/32") }, want{gone: gone(dropped, func(c *caller) bool { return c.kind == kindIngress && c.outside }), keeps: true}},
		{func(o *objects) { o.sourceRanges("192.0.2.0/24") }, want{
			gone: gone(dropped, func(c *caller) bool { return c.kind == kindIngress && !c.outside && c.family == 4 }), keeps: true,
		}},
	}},
	{"conditions: not ready", []step{
		{func(o *objects) { o.conditions(false, false, false, 0) }, want{by: by("backend1 backend2"), moves: "backend0"}},
		{func(o *objects) { o.conditions(false, false, false, 0, 1, 2) }, want{gone: gone(refused, func(*caller) bool { return true })}},
		{func(o *objects) { o.conditions(false, false, false, 1, 2) }, want{by: by("backend0"), moves: everybody}},
	}},
	{"conditions: ready, not serving, as of publishNotReadyAddresses", []step{
		{func(o *objects) { o.conditions(true, false, true, 0, 1, 2) }, want{}},
	}},
	{"conditions: terminating", []step{
		{func(o *objects) { o.conditions(false, true, true, 0) }, want{by: by("backend1 backend2")}},
		{func(o *objects) { o.conditions(false, true, true, 0, 1, 2) }, want{}},
		{func(o *objects) { o.conditions(false, true, true, 0, 1, 2); o.externalLocal() }, want{by: localTo((*caller).externalFromOutside)}},
	}},
	{"conditions: nothing said", []step{{func(o *objects) {
		for i := range 3 {
			o.endpoint(i, func(e *discoveryv1.Endpoint) { e.Conditions = discoveryv1.EndpointConditions{} })
		}
	}, want{}}}},
	{"hints", []step{
		{func(o *objects) { o.zones("here", "here", "there") }, want{by: by("backend0 backend1")}},
		{func(o *objects) {
			for i, node := range []string{"node", "other", "other"} {
				o.endpoint(i, func(e *discoveryv1.Endpoint) {
					e.Hints = &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: node}}}
				})
			}
		}, want{by: by("backend0")}},
	}},
	{"trafficDistribution", []step{
		{func(o *objects) {
			o.service.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferClose)
		}, want{by: by("backend0 backend1")}},
	}},
	{"zone", []step{{func(o *objects) {
		o.service.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferClose)
		o.endpoint(1, func(e *discoveryv1.Endpoint) { e.Zone = new("there") })
	}, want{by: by("backend0")}}}},
	{"nodeName", []step{{func(o *objects) {
		o.externalLocal()
		o.endpoint(2, func(e *discoveryv1.Endpoint) { e.NodeName = new("node") })
	}, want{}}}},
	{"healthCheckNodePort", []step{{func(o *objects) {
		o.externalLocal()
		o.service.Spec.HealthCheckNodePort = 30100
	}, want{by: localTo((*caller).externalFromOutside), also: (*live).healthy}}}},
	{"label service-proxy-name", []step{{func(o *objects) {
		o.service.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
	}, want{gone: gone(untouched, func(*caller) bool { return true })}}}},
	{"label service-proxy-name of the slices", []step{{func(o *objects) {
		for _, s := range o.slices {
			s.Labels["service.kubernetes.io/service-proxy-name"] = "other"
		}
	}, want{gone: gone(refused, func(*caller) bool { return true })}}}},
	{"label headless", []step{{func(o *objects) {
		o.service.Labels = map[string]string{corev1.IsHeadlessService: ""}
	}, want{gone: vanished}}}},
	{"clusterIP None", []step{{func(o *objects) {
		o.clusterIPOnly()
		o.service.Spec.ClusterIP, o.service.Spec.ClusterIPs = corev1.ClusterIPNone, []string{corev1.ClusterIPNone}
	}, want{gone: vanished}}}},
	{"slices: two more that share the endpoints", []step{{(*objects).split, want{}}}},
	{"slices: one endpoint in two of them, ready in one", []step{{func(o *objects) {
		for _, s := range slices.Clone(o.slices) {
			again := s.DeepCopy()
			again.Name += "-again"
			again.Endpoints = again.Endpoints[:1]
			again.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
			o.slices = append(o.slices, again)
		}
	}, want{}}}},
	{"slices: other names", []step{{(*objects).renameSlices, want{}}}},
	{"slices: endpoints gone", []step{
		{func(o *objects) { o.only(0, 2) }, want{by: by("backend0 backend2"), moves: "backend1"}},
		{func(o *objects) { o.only(2) }, want{by: by("backend2"), moves: "backend0"}},
		{func(o *objects) { o.slices = nil }, want{gone: gone(refused, func(*caller) bool { return true })}},
	}},
	{"slices: endpoints in another order", []step{{func(o *objects) { o.only(2, 0, 1) }, want{}}}},
	{"the Service itself", []step{{func(o *objects) { o.service = nil }, want{gone: vanished}}}},
	{"uid, resourceVersion and creationTimestamp, as of a Service that was made anew", []step{{func(o *objects) {
		o.service.UID, o.service.CreationTimestamp = "11111111-2222-3333-4444-555555555555", metav1.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	}, want{}}}},
	{"what has no effect", []step{{func(o *objects) {
		spec := &o.service.Spec
		spec.PublishNotReadyAddresses, spec.Selector = true, map[string]string{"app": "web"}
		spec.LoadBalancerClass, spec.ExternalName = new("example.com/class"), ""
		for i := range spec.Ports {
			spec.Ports[i].AppProtocol, spec.Ports[i].TargetPort = new("http"), intstr.FromInt32(7010)
		}
		o.service.Labels, o.service.Annotations = map[string]string{"app": "web"}, map[string]string{"app": "web"}
	}, want{}}}},
}

// caller asks at one frontend in one way, again and again.
type caller struct {
	from    *testenv.Host
	outside bool
	family  int
	kind    string
	by      string
	to      netip.AddrPort
	anchor  bool // it asks a Service that nobody edits

	ports *atomic.Uint32 // of its host, that new sockets have had

	last       string // who serves the flow that is there; "" without one
	tcp        *testenv.EchoConn
	udp        *testenv.UDPClient
	unanswered []*testenv.UDPClient // left open
	done       atomic.Uint64
	gave       atomic.Bool // it has ended for good
}

func (c *caller) String() string {
	return fmt.Sprintf("%s of %s to %s %s", c.by, c.from.Name, c.kind, c.to)
}

func (c *caller) isNew() bool { return c.by == newTCP || c.by == newUDP }

func (c *caller) overUDP() bool { return c.by == newUDP || c.by == longUDP }

// phase is a step while it is brought into force, and then in force.
type phase struct {
	name          string
	before, after want
	settled       atomic.Bool

	mu    sync.Mutex
	seen  map[string]map[string]bool // servers that new requests may reach -> those that they reached
	alike map[string]string          // client, port and family -> server
}

// live is a site with requests under way.
type live struct {
	*site
	first   objects
	phase   atomic.Pointer[phase]
	callers []*caller
	marks   int
	rest    string // what the maps say in the first state
	total   atomic.Uint64
	stop    func()

	mu       sync.Mutex
	failures int
	limited  []string // UDP requests that were to be refused and got no answer
}

const (
	pace    = 20 * time.Millisecond // between two requests of a caller
	patient = 5 * time.Second       // with one that must be served
	brief   = 60 * time.Millisecond // with one that may be dropped

	firstPort, lastPort = 2000, 32000 // of new UDP sockets: those of other sockets are above
)

// fail reports a request that got what it must not. One fault makes many.
func (l *live) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failures++; l.failures <= 30 {
		l.t.Errorf(format, args...)
	}
}

func (l *live) limit(when string, c *caller) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limited = append(l.limited, fmt.Sprintf("%s: %s", when, c))
}

// allowed returns what a request may get of a state that is in force, and from whom.
func (c *caller) allowed(w want) (outcome, string) {
	if c.anchor {
		w = want{}
	}
	gets := w.gives(c)
	switch {
	case c.by == longTCP && c.last != "":
		return served, c.last
	case c.by == longUDP && c.last != "" && (gets == served || w.keeps) && w.moves != everybody && !names(w.moves, c.last):
		return served, c.last
	}
	return gets, w.servers(c)
}

func names(list, name string) bool { return slices.Contains(strings.Fields(list), name) }

// run asks until ctx ends, and then has the last answer: the stack would see what is said of one that comes later.
func (l *live) run(ctx context.Context, c *caller) {
	defer c.gave.Store(true)
	for n := 0; ctx.Err() == nil; n++ {
		p := l.phase.Load()
		settled := p.settled.Load()
		after, servers := c.allowed(p.after)
		before, earlier := after, servers
		if !settled {
			if before, earlier = c.allowed(want{gone: p.before.gone, by: p.before.by}); c.by == longUDP && c.last != "" {
				before, earlier = served, c.last
			}
		}
		limit := patient
		switch {
		case max(before, after) > refused:
			limit = brief
		case max(before, after) == refused && c.overUDP():
			limit = time.Second // answers are limited
		}
		got, server, err := c.ask(limit, n)
		l.total.Add(1)
		when := p.name
		if !settled {
			when = "while it changes to " + when
		}
		// The port of a cluster IP that comes or goes may be a wrong one for a moment.
		wrongPort := !settled && c.kind == kindClusterIP && max(before, after) == dropped && got == refused
		same := func(want outcome) bool { return want == got || want == untouched && got == dropped || wrongPort }
		switch {
		case got == dropped && (after == refused || before == refused) && c.overUDP(): // port unreachables are limited
			l.limit(when, c)
		case got == refused && c.by == longTCP, got == failed, !same(after) && !same(before):
			l.fail("%s: %s: %s, want %s; %s: %v", when, c, got, after, server, err)
		case got == served && !(same(after) && names(servers, server) || same(before) && names(earlier, server)):
			l.fail("%s: %s is served by %s, want one of %s; before, of %s", when, c, server, servers, earlier)
		case settled && c.isNew() && got == served && !c.anchor:
			l.note(p, c, servers, server)
		}
		c.last = server
		if c.by == longTCP && got != served {
			return
		}
		c.done.Add(1)
		time.Sleep(pace)
	}
}

// note notes by whom a new request was served.
func (l *live) note(p *phase, c *caller, servers, server string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.after.alike && !p.after.few {
		if p.seen[servers] == nil {
			p.seen[servers] = map[string]bool{}
		}
		p.seen[servers][server] = true
		return
	}
	if !p.after.alike {
		return
	}
	key := fmt.Sprint(c.from.Name, c.by, c.family)
	if before := p.alike[key]; before != "" && before != server {
		l.fail("%s: %s is served by %s, and the one before by %s", p.name, c, server, before)
	}
	p.alike[key] = server
}

// ask makes one request, and waits for `limit` until it knows whether somebody serves it. A packet that had to be
// sent again is a failure.
func (c *caller) ask(limit time.Duration, n int) (outcome, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	first, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	text := fmt.Sprint("request ", n)
	var server string
	var err error
	switch c.by {
	case newTCP, longTCP:
		conn := c.tcp
		if conn == nil {
			made, err := c.from.DialContext(first, "tcp", c.to.String())
			if err != nil {
				return outcomeOf(err), "", err
			}
			if conn, err = testenv.GreetEcho(ctx, made); err != nil {
				return failed, "", err
			}
			if c.by == longTCP {
				c.tcp = conn
			} else {
				defer conn.Close()
			}
		}
		if err = conn.Say(ctx, text); err == nil {
			err = sentOnce(conn)
		}
		if server = conn.Server; err != nil {
			return failed, server, err // once made, a connection works
		}
	case newUDP, longUDP:
		u := c.udp
		if u == nil {
			source := netip.AddrPort{}
			if c.by == newUDP {
				// A flow of an earlier socket with this port has long expired when it comes again.
				source = netip.AddrPortFrom(c.from.Addr(c.family), uint16(firstPort+c.ports.Add(1)%(lastPort-firstPort)))
			}
			if u, err = testenv.DialUDP(ctx, c.from.Namespace, source, c.to); err != nil {
				return failed, "", err
			}
			if c.by == longUDP {
				c.udp = u
			}
		}
		a, err := u.Ask(first, c.to, text)
		if err != nil && u != c.udp {
			c.unanswered = append(c.unanswered, u) // the stack would see what is said of an answer to a closed one
		} else if u != c.udp {
			defer u.Close()
		}
		if err != nil {
			return outcomeOf(err), "", err
		}
		server = a.Server
	}
	return served, server, nil
}

func outcomeOf(err error) outcome {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return refused
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return dropped
	}
	return failed
}

// sentOnce returns an error if a segment was sent twice.
func sentOnce(c *testenv.EchoConn) error {
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	if e := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }); e != nil || err != nil {
		return errors.Join(e, err)
	}
	if info.Total_retrans > 0 {
		return fmt.Errorf("%d segments were sent again", info.Total_retrans)
	}
	return nil
}

// round waits until each caller has ended n requests.
func (l *live) round(n uint64) {
	l.t.Helper()
	want := map[*caller]uint64{}
	for _, c := range l.callers {
		want[c] = c.done.Load() + n
	}
	deadline := time.Now().Add(20 * time.Second)
	for c, want := range want {
		for c.done.Load() < want && !c.gave.Load() {
			if time.Now().After(deadline) {
				l.t.Fatalf("%s: no answer", c)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// put writes the objects and waits until they are in force. What says so is one more Service, with a slice, whose
// names come after all others: each kind of object is told in that order, and of all that Apply writes the own
// address of a new backend comes last, and that of the mark after all others.
func (l *live) put(o objects) {
	l.t.Helper()
	l.marks++
	l.write("web.yaml", o.text(l.t)+fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: zz-mark}
spec: {clusterIP: "fd00:96::250", ports: [{name: m%[1]d, port: 1}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: zz-mark, labels: {kubernetes.io/service-name: zz-mark}}
addressType: IPv6
ports: [{name: m%[1]d, port: %[1]d}]
endpoints: [{addresses: ["fd00:244:1::250"]}]
`, l.marks))
	l.serves(true, l.mark())
}

// mark is the own address of the latest backend.
func (l *live) mark() lb.VIP {
	return lb.VIP{Addr: netip.MustParseAddr("fd00:244:1::250"), Port: uint16(l.marks), Protocol: lb.TCP}
}

// change brings a state into force and looks at what the callers see of it.
func (l *live) change(name string, o objects, after want) {
	l.t.Helper()
	p := &phase{name: name, before: l.phase.Load().after, after: after, seen: map[string]map[string]bool{}, alike: map[string]string{}}
	l.phase.Store(p)
	l.round(1) // what began before has ended
	l.put(o)
	p.settled.Store(true)
	l.round(4) // one that began before, and three
	p.mu.Lock()
	for servers, seen := range p.seen {
		if len(seen) != len(strings.Fields(servers)) {
			l.fail("%s: of %s only %v have served", name, servers, slices.Sorted(maps.Keys(seen)))
		}
	}
	p.mu.Unlock()
	if after.also != nil {
		after.also(l)
	}
	if l.exposed(p.before) || l.exposed(after) {
		if err := l.ResetCounters(l.t.Context()); err != nil {
			l.t.Fatal(err)
		}
	} else if err := l.CheckStrict(l.t.Context()); err != nil {
		l.fail("%s: %v", name, err)
	}
	if l.failures > 0 {
		status, err := api.NewClient(l.config.Socket).Status(l.t.Context())
		l.t.Fatalf("packets by reason: %v, %v", status.Reasons, err)
	}
}

// exposed tells whether somebody sends what the stack gets.
func (l *live) exposed(w want) bool {
	return slices.ContainsFunc(l.callers, func(c *caller) bool { return w.gives(c) == untouched })
}

// healthy asks the health check of the Service.
func (l *live) healthy() {
	l.t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: l.Client.DialContext, DisableKeepAlives: true}}
	response, err := client.Get("http://192.0.2.1:30100")
	if err != nil {
		l.t.Errorf("health check: %v", err)
		return
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK || response.Header.Get("X-Load-Balancing-Endpoint-Weight") != "4" {
		l.t.Errorf("health check: %s, %v", response.Status, response.Header)
	}
}

// says returns all that the maps say, in words: without ids, generations, removed backends and the mark.
func (s *site) says() string {
	s.t.Helper()
	m, err := lbmaps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	isMark := func(n lb.ServiceName) bool { return n.Name == "zz-mark" }
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	services, living := map[uint32]lb.ServiceName{}, map[lb.VIP]bool{}
	err = m.EachServiceName(func(id uint32, n lbmaps.ServiceName) bool { services[id] = n.LB(); return true })
	for id, b := range m.EachBackend() {
		if b.Life.State == lbmaps.BackendRemoved || isMark(services[b.Service]) {
			continue
		}
		living[b.VIP()] = true
		say("backend %s of %s: %v, scopes %d", m.Backend(id).Addr(), services[b.Service], b.Life.State, b.Life.Flags)
	}
	for id, name := range services {
		if isMark(name) {
			continue
		}
		is := m.Service(id)
		for scope, r := range map[string]lbmaps.SlotRange{"Cluster": is.Cluster, "Local": is.Local} {
			var slots []string
			for _, id := range m.Slots(r) {
				slots = append(slots, m.Backend(id).Addr().String())
			}
			say("service %s: %s %s", name, scope, slots)
		}
		say("service %s: policy %+v", name, is.Policy)
	}
	err = errors.Join(err,
		m.EachFrontend(func(k lbmaps.FrontendKey, f lbmaps.Frontend) bool {
			kind := lb.Kind(f.Kind)
			if !isMark(services[f.Service]) && (kind != lb.Identity || living[k.VIP()]) {
				say("frontend %s: %s, flags %d, of %s", k.VIP(), kind, f.Flags, services[f.Service])
			}
			return true
		}),
		m.EachSourceRange(func(id uint32, p netip.Prefix) bool { say("source range %s of %s", p, services[id]); return true }))
	if err != nil {
		s.t.Fatal(err)
	}
	prefixes, elsewhere := m.ServicePrefixes()
	say("prefixes %v, elsewhere %v", prefixes, elsewhere)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// wantSays waits until the maps say something.
func (l *live) wantSays(when, want string) {
	l.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		got := l.says()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s the maps say something else: %s", when, gocmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// newLive is a site with an agent, two Services and all callers at work.
func newLive(t *testing.T) *live {
	t.Helper()
	l := &live{site: newSiteLike(t, testenv.Config{Backends: 3, ClientPods: 1})}
	l.echo()
	for i, b := range l.Backends {
		for _, serve := range []func(context.Context, *testenv.Namespace, string, string) (*testenv.Server, error){testenv.ServeEcho, testenv.ServeUDP} {
			server, err := serve(t.Context(), b.Namespace, fmt.Sprint("other", i), ":7008")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { server.Close() })
		}
	}
	if err := l.AddNodePorts(t.Context(), 30007, 30008, 30009); err != nil {
		t.Fatal(err)
	}
	l.config.Sizes = lbmaps.Sizes{Frontends: 512, Services: 64, Slots: 65536, Backends: 512, Flows: 1 << 19}
	l.config.SweepInterval = time.Second
	l.config.ServiceCIDRs = []string{testenv.ServiceCIDR4, testenv.ServiceCIDR6}

	text, _, _ := strings.Cut(l.everywhere(), "---\napiVersion: v1\nkind: Pod")
	for document := range strings.SplitSeq(text, "---\n") {
		var err error
		if strings.Contains(document, "kind: Service\n") {
			l.first.service = &corev1.Service{}
			err = yaml.UnmarshalStrict([]byte(document), l.first.service)
		} else {
			s := &discoveryv1.EndpointSlice{}
			err = yaml.UnmarshalStrict([]byte(document), s)
			l.first.slices = append(l.first.slices, s)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	spec := &l.first.service.Spec
	spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	for _, s := range l.first.slices {
		third := s.Endpoints[0].DeepCopy()
		third.Addresses = []string{l.Backends[2].IPv4.String()}
		if s.AddressType == discoveryv1.AddressTypeIPv6 {
			third.Addresses = []string{l.Backends[2].IPv6.String()}
		}
		s.Endpoints = append(s.Endpoints, *third)
	}
	for i, node := range []string{"node", "node", "other"} {
		zone := cmp.Or(map[string]string{"other": "there"}[node], "here")
		l.first.endpoint(i, func(e *discoveryv1.Endpoint) { e.NodeName, e.Zone = new(node), new(zone) })
	}
	l.write("node.yaml", `apiVersion: v1
kind: Node
metadata: {name: node, labels: {topology.kubernetes.io/zone: here}}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "fd00:c::1"}]}
`)
	l.write("anchor.yaml", l.talk("anchor", 20, older, endpoint{host: l.Backends[0]}, endpoint{host: l.Backends[1]}, endpoint{host: l.Backends[2]}))
	t.Setenv(childPause, "1ms")
	l.start(l.config)
	l.put(l.first)
	l.eventually(func(status api.Status) string {
		if len(status.Programs) != 2*5 {
			return "not all devices have programs"
		}
		return ""
	})
	l.rest = l.says()

	p := &phase{name: "begin"}
	p.settled.Store(true)
	p.seen = map[string]map[string]bool{}
	l.phase.Store(p)
	for _, from := range []*testenv.Host{l.Client, l.ClientPods[0]} {
		ports := &atomic.Uint32{}
		for _, by := range []string{newTCP, longTCP, newUDP, longUDP} {
			for _, f := range []struct{ kind, at string }{
				{kindClusterIP, "10.96.0.10:7"}, {kindClusterIP, "[fd00:96::10]:7"}, {kindNodePort, "192.0.2.1:30007"}, {kindNodePort, "[fd00:c::1]:30007"},
				{kindIngress, "198.51.100.10:7"}, {kindIngress, "[fd00:1b::10]:7"}, {kindExternal, "203.0.113.10:7"}, {kindExternal, "[fd00:e::10]:7"},
				{kindClusterIP, talkVIP(20, 4).String()}, {kindClusterIP, talkVIP(20, 6).String()},
			} {
				to := netip.MustParseAddrPort(f.at)
				l.callers = append(l.callers, &caller{from: from, outside: from == l.Client, family: familyOf(to), kind: f.kind, by: by, to: to,
					ports: ports, anchor: to == talkVIP(20, familyOf(to))})
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, c := range l.callers {
		running.Go(func() {
			l.run(ctx, c)
			if c.tcp != nil {
				c.tcp.Close()
			}
			for _, u := range append(c.unanswered, c.udp) {
				if u != nil {
					u.Close()
				}
			}
		})
	}
	l.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(l.stop)
	l.round(2)
	return l
}

// field is what a field may be in TestLiveAtRandom, all values of which leave endpoint 1 to everybody.
type field struct {
	name     string
	still    bool // no UDP flow moves when it changes
	settings []setting
}

type setting struct {
	set  func(*objects)
	gone func(*caller) outcome // as want.gone
}

// fields are set in this order, from the first state; the first value is that of the first state.
var fields = []field{
	{"internalTrafficPolicy", true, settings(nil, (*objects).internalLocal)},
	{"externalTrafficPolicy", true, settings(nil, (*objects).externalLocal)},
	{"sessionAffinity", true, settings(nil, func(o *objects) { o.affinity(10800) }, func(o *objects) { o.affinity(7) })},
	{"algorithm", true, settings(nil, (*objects).maglev)},
	{"weights", true, settings(nil, func(o *objects) { o.weights(0, 1, 0) }, func(o *objects) { o.weights(3, 2, 0) }, func(o *objects) { o.weights(1, 1, 9) })},
	{"source ranges", true, settings(nil, func(o *objects) { o.sourceRanges("0.0.0.0/0") }, func(o *objects) {
		o.sourceRanges("192.0.2.2/32", "10.244.1.101/32", "fd00:c::2/128", "fd00:244::/32")
	})},
	{"one port more", true, settings(nil, (*objects).onePortMore)},
	{"names of ports", false, settings(nil, (*objects).portNames)},
	{"targetPort", false, settings(nil, func(o *objects) { o.targetPort(7008) })},
	{"nodePort", false, []setting{{}, {func(o *objects) { o.nodePort(30009) }, gone(untouched, reachedAt(kindNodePort))}}},
	{"externalIPs", false, []setting{{}, {func(o *objects) { o.externalIPs() }, gone(untouched, reachedAt(kindExternal))}}},
	{"conditions of 0", false, settings(nil, func(o *objects) { o.conditions(false, false, false, 0) }, func(o *objects) { o.conditions(false, true, true, 0) })},
	{"conditions of 2", false, settings(nil, func(o *objects) { o.conditions(false, false, false, 2) }, func(o *objects) { o.conditions(false, true, true, 2) })},
	{"hints", false, settings(nil, func(o *objects) { o.zones("there", "here", "there") }, func(o *objects) { o.zones("here", "here", "there") })},
	{"endpoints", false, settings(nil, func(o *objects) { o.only(1) }, func(o *objects) { o.only(0, 1) }, func(o *objects) { o.only(2, 1) })},
	{"split", false, settings(nil, (*objects).split)},
	{"names of slices", false, settings(nil, (*objects).renameSlices)},
}

func settings(sets ...func(*objects)) (all []setting) {
	for _, set := range sets {
		all = append(all, setting{set: set})
	}
	return all
}

// TestLive changes every field, one by one and then some at random, and in the end the maps say what an agent writes
// that starts with the last manifest.
func TestLive(t *testing.T) {
	if testing.Short() {
		t.Skip("too long for -short: every field, one after the other")
	}
	l := newLive(t)
	for _, e := range edits {
		l.within(e.field, func() { l.edit(e.steps) })
	}
	l.within("at random", func() { l.atRandom(rand.New(rand.NewPCG(7, 77)), 10) })
	l.stop()
	if status := l.eventually(func(api.Status) string { return "" }); uint64(len(l.limited)) > status.Reasons["reject_limited"] {
		t.Errorf("%d requests that were to be refused got no answer: %v: %s", len(l.limited), status.Reasons, strings.Join(l.limited, "\n"))
	}
	t.Logf("%d requests", l.total.Load())
	// Each edit has looked at the lab's rules. Not so the end: a client that is gone answers what still comes with an
	// ICMP error to the VIP, which is not translated yet.
	edited := l.says()
	l.last.terminate()
	if err := l.Node.Do(func() error { _, err := loader.Cleanup(l.config.BPFRoot); return err }); err != nil {
		t.Fatal(err)
	}
	l.start(l.config)
	l.serves(true, l.mark())
	l.wantSays("started afresh", edited)
	if err := l.ResetCounters(t.Context()); err != nil { // VIPs were nobody's for a moment, and some are in the last state
		t.Error(err)
	}
}

// within runs a part of the test. When one fails the others are left out: in what state it left the clients nobody
// knows.
func (l *live) within(name string, part func()) {
	outer := l.t
	if outer.Failed() {
		return
	}
	in := func(t *testing.T) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.t = t
	}
	outer.Run(name, func(t *testing.T) {
		in(t)
		defer in(outer)
		part()
	})
}

// edit takes the steps of an edit, and takes it back.
func (l *live) edit(steps []step) {
	l.t.Helper()
	back := want{}
	for i, s := range steps {
		o := l.first.clone()
		s.change(&o)
		l.change(fmt.Sprint("step ", i+1), o, s.want)
		if s.want.moves == everybody {
			back.moves = everybody
		}
	}
	l.change("back", l.first, back)
	l.wantSays("back", l.rest)
}

// atRandom changes some fields at a time.
func (l *live) atRandom(random *rand.Rand, rounds int) {
	l.t.Helper()
	now := make([]int, len(fields))
	for round := range rounds {
		next, moves := want{by: by(backends + " other0 other1 other2"), few: true}, ""
		name := fmt.Sprintf("round %d:", round)
		for range 1 + random.IntN(4) {
			i := random.IntN(len(fields))
			now[i] = random.IntN(len(fields[i].settings))
			name += fmt.Sprintf(" %s %d", fields[i].name, now[i])
			if !fields[i].still {
				moves = everybody
			}
		}
		next.moves = moves
		o := l.first.clone()
		current := slices.Clone(now)
		for i, f := range fields {
			if set := f.settings[now[i]].set; set != nil {
				set(&o)
			}
		}
		next.gone = func(c *caller) outcome {
			for i, f := range fields {
				if g := f.settings[current[i]].gone; g != nil && g(c) != served {
					return g(c)
				}
			}
			return served
		}
		l.change(name, o, next)
	}
}
