// SPDX-License-Identifier: Apache-2.0

// Package resolve turns Kubernetes objects into the services of package lb. All that Kubernetes says about
// the meaning of a Service lives here, a row of the rules to a function: which objects count in service.go, at
// which addresses in frontends.go, which endpoints in endpoints.go, hostPorts in pod.go, what of it depends on
// this node in host.go, who gets an address that several claim here. The package is pure: no clocks, no
// goroutines, no state but the Table.
package resolve

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// Options are what an operator decides about the meaning of Services.
type Options struct {
	// ExternalIPsAllow are where spec.externalIPs may be. nil: anywhere.
	ExternalIPsAllow []netip.Prefix
	// ProxyName is the value of the label service.kubernetes.io/service-proxy-name that is ours. "": the
	// Services without the label are.
	ProxyName string
}

// Name names a Service or a Pod object.
type Name struct {
	Namespace, Name string
}

// String is NAMESPACE/NAME.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace and name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// ref names an object: a Service and a Pod may have the same name.
type ref struct {
	Name
	pod bool
}

// String is how a Problem names an object.
func (r ref) String() string {
	if r.pod {
		return "Pod " + r.Name.String()
	}
	return "Service " + r.Name.String()
}

func refOf(s lb.ServiceName) ref { return ref{Name{s.Namespace, s.Name}, s.Pod} }

// Change is what an update of a Table did to the services in force, those of other objects included: a VIP
// that one Service loses and another gains shows as both of them changed, in one Change. No service is both
// changed and removed. The services are the Table's own; the caller must not write to them.
type Change struct {
	Changed map[lb.ServiceName]lb.Service // new ones, and those that differ from before
	Removed []lb.ServiceName              // sorted
	// Foreign are addresses of Services that another proxy serves, or none: true for those that came, false
	// for those that went. One may be a frontend's here as well.
	Foreign map[netip.Addr]bool
}

// Table holds what every Service and every hostPort asks for, and settles who gets what. Its state depends on
// the objects and the Host that are in it, not on the order in which they came. The cost of a change is that
// of the objects that it concerns and of those that claim the same VIPs. A Table is not safe for concurrent
// use.
type Table struct {
	options   Options
	node      node
	askers    askers                        // of the node
	objects   map[ref]object                // none for those that ask for nothing, whatever the Host
	problems  map[ref][]lb.Problem          // only of those that have some: so Problems is cheap
	checks    map[Name]lb.HealthCheck       // likewise
	claims    map[lb.VIP][]claim            // by precedence: the first holds the VIP, the others wait for it
	contested map[lb.VIP]struct{}           // those of claims that have more than one
	foreign   map[netip.Addr]int            // how many Services that are not ours have it
	inForce   map[lb.ServiceName]lb.Service // what the Changes so far add up to
}

// input is what an object is resolved from: a Service and what belongs to it, or a Pod.
type input struct {
	svc    *corev1.Service
	slices []*discoveryv1.EndpointSlice
	pod    *corev1.Pod
}

// object is what one Service or Pod asks for, as if it were alone.
type object struct {
	input    input
	asked    questions
	services map[lb.ServiceName]lb.Service
	claims   map[lb.VIP]claim // one for each frontend of services
	foreign  map[netip.Addr]struct{}
	check    *lb.HealthCheck
	problems []lb.Problem
}

// idle reports whether an object asks for nothing, and would of any other Host.
func (o *object) idle() bool {
	return len(o.services) == 0 && len(o.foreign) == 0 && len(o.problems) == 0 && o.check == nil && o.asked.none()
}

// class is how exactly a claim names its VIP; what names it more exactly goes first.
type class uint8

const (
	exact       class = iota // an address of the Service's own: ClusterIP, LoadBalancer, external
	hostPortAt               // with a hostIP
	hostPortAny              // at all addresses of the node
	nodePort
)

// claim is a service's wish for a VIP.
type claim struct {
	class   class
	created time.Time // of the object; zero where it does not say
	service lb.ServiceName
	field   string // of the object that asks for the VIP
}

// NewTable returns a Table without objects, and of a Host of which nothing is known.
func NewTable(options Options) *Table {
	return &Table{
		options:   options,
		askers:    newAskers(),
		objects:   map[ref]object{},
		problems:  map[ref][]lb.Problem{},
		checks:    map[Name]lb.HealthCheck{},
		claims:    map[lb.VIP][]claim{},
		contested: map[lb.VIP]struct{}{},
		foreign:   map[netip.Addr]int{},
		inForce:   map[lb.ServiceName]lb.Service{},
	}
}

// Update puts a Service in place of what was known under its name, and returns what that changed.
// endpointSlices are all those that belong to it by their namespace and label kubernetes.io/service-name, in
// any order. A nil Service is one that is not there, whatever slices it has. The objects are kept: nobody must
// write to them.
//
// A service that is left without a VIP, because others hold them all, is not in force.
func (t *Table) Update(name Name, svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) Change {
	return t.update(map[ref]input{{name, false}: {svc: svc, slices: endpointSlices}})
}

// UpdatePod puts a Pod in place of what was known under its name, for its hostPorts, and returns what that
// changed. A nil Pod is one that is not there. It is kept: nobody must write to it.
func (t *Table) UpdatePod(name Name, pod *corev1.Pod) Change {
	return t.update(map[ref]input{{name, true}: {pod: pod}})
}

// SetHost says what is to be known of this node, in place of what was, and returns what that changed. The cost
// is that of the objects that depend on what differs.
func (t *Table) SetHost(h Host) Change {
	before := t.node
	t.node = nodeOf(h)
	inputs := map[ref]input{}
	for r := range t.askers.concerned(&before, &t.node) {
		inputs[r] = t.objects[r].input
	}
	return t.update(inputs)
}

// update resolves objects, and lets what they ask for take effect together.
func (t *Table) update(inputs map[ref]input) Change {
	dirty := map[lb.ServiceName]struct{}{}
	foreign := map[netip.Addr]int{} // those that may have changed, with what there was
	for r, in := range inputs {
		before, after := t.objects[r], t.resolve(r, in)
		put(t.objects, r, after, !after.idle())
		put(t.problems, r, after.problems, len(after.problems) > 0)
		t.askers.replace(r, before.asked, after.asked)
		if !r.pod {
			put(t.checks, r.Name, deref(after.check, lb.HealthCheck{}), after.check != nil)
		}
		for service := range before.services {
			dirty[service] = struct{}{}
		}
		for service := range after.services {
			dirty[service] = struct{}{}
		}
		for vip, c := range before.claims {
			if c != after.claims[vip] {
				t.withdraw(vip, c, dirty)
			}
		}
		for vip, c := range after.claims {
			if c != before.claims[vip] {
				t.enter(vip, c, dirty)
			}
		}
		t.count(before.foreign, -1, foreign)
		t.count(after.foreign, +1, foreign)
	}
	change := t.settle(dirty)
	for a, n := range foreign {
		if has := t.foreign[a] > 0; has != (n > 0) {
			change.Foreign[a] = has
		}
	}
	return change
}

// count adds n to the number of Services that each address has, and notes what it was before all of it.
func (t *Table) count(addrs map[netip.Addr]struct{}, n int, was map[netip.Addr]int) {
	for a := range addrs {
		if _, noted := was[a]; !noted {
			was[a] = t.foreign[a]
		}
		put(t.foreign, a, t.foreign[a]+n, t.foreign[a]+n > 0)
	}
}

// resolve says what one object asks for, without regard to any other.
func (t *Table) resolve(r ref, in input) object {
	host := &reader{node: &t.node}
	var o object
	if r.pod {
		o = resolvePod(r.Name, in.pod, host)
	} else {
		o = resolveService(r.Name, in.svc, in.slices, &t.options, host)
	}
	o.input, o.asked = in, host.asked
	for i := range o.problems {
		o.problems[i].Object = cmp.Or(o.problems[i].Object, r.String())
	}
	return o
}

// View returns all that is known of the services of a Service, and of the hostPorts of a Pod of that name,
// sorted by name. Waiting are those that want a VIP of theirs and do not hold it.
func (t *Table) View(name Name) []lb.View {
	var all []lb.View
	for _, r := range []ref{{name, false}, {name, true}} {
		o := t.objects[r]
		for _, service := range slices.SortedFunc(maps.Keys(o.services), lb.ServiceName.Compare) {
			all = append(all, t.view(service, &o))
		}
	}
	slices.SortFunc(all, func(a, b lb.View) int { return a.Service.Name.Compare(b.Service.Name) })
	return all
}

func (t *Table) view(name lb.ServiceName, o *object) lb.View {
	v := lb.View{}
	v.Service, _ = t.granted(name)
	for _, f := range o.services[name].Frontends {
		if holder := t.claims[f.VIP][0].service; holder != name {
			v.Waiting = append(v.Waiting, lb.Waiting{Frontend: f, Holder: holder})
		}
	}
	if name.Pod {
		v.Endpoints = podEndpoints(o.services[name], &t.node)
	} else {
		v.Endpoints = viewEndpoints(name, o.input.slices, &t.options, &t.node)
	}
	return v
}

// HealthChecks returns what the healthCheckNodePort of each Service that has one answers, sorted by namespace
// and name.
func (t *Table) HealthChecks() []lb.HealthCheck {
	return slices.SortedFunc(maps.Values(t.checks), func(a, b lb.HealthCheck) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

// Problems returns what is wrong with the objects in the Table, sorted. File and Document are empty: where an
// object came from is not known here. The cost is proportional to the problems, not to the Services.
func (t *Table) Problems() []lb.Problem {
	var all []lb.Problem
	for _, problems := range t.problems {
		all = append(all, problems...)
	}
	for vip := range t.contested {
		holder := t.claims[vip][0]
		for _, c := range t.claims[vip][1:] {
			p := warning(c.field, "%s is held by %s; it is served here once that one lets go of it",
				vip, refOf(holder.service))
			p.Object = refOf(c.service).String()
			all = append(all, p)
		}
	}
	slices.SortFunc(all, lb.Problem.Compare)
	return all
}

// withdraw removes a claim, and marks who gains by that.
func (t *Table) withdraw(vip lb.VIP, c claim, dirty map[lb.ServiceName]struct{}) {
	claims := t.claims[vip]
	i, _ := slices.BinarySearchFunc(claims, c, claim.compare)
	claims = slices.Delete(claims, i, i+1)
	t.setClaims(vip, claims)
	if i == 0 && len(claims) > 0 {
		dirty[claims[0].service] = struct{}{}
	}
}

// enter adds a claim, and marks who loses by that.
func (t *Table) enter(vip lb.VIP, c claim, dirty map[lb.ServiceName]struct{}) {
	claims := t.claims[vip]
	i, _ := slices.BinarySearchFunc(claims, c, claim.compare)
	if i == 0 && len(claims) > 0 {
		dirty[claims[0].service] = struct{}{}
	}
	t.setClaims(vip, slices.Insert(claims, i, c))
}

func (t *Table) setClaims(vip lb.VIP, claims []claim) {
	put(t.claims, vip, claims, len(claims) > 0)
	put(t.contested, vip, struct{}{}, len(claims) > 1)
}

// settle brings the services in force up to date, and returns those that this changed.
func (t *Table) settle(dirty map[lb.ServiceName]struct{}) Change {
	change := Change{Changed: map[lb.ServiceName]lb.Service{}, Foreign: map[netip.Addr]bool{}}
	for name := range dirty {
		before, was := t.inForce[name]
		after, is := t.granted(name)
		put(t.inForce, name, after, is)
		switch {
		case was && !is:
			change.Removed = append(change.Removed, name)
		case is && !(was && equal(before, after)):
			change.Changed[name] = after
		}
	}
	slices.SortFunc(change.Removed, lb.ServiceName.Compare)
	return change
}

// granted returns a service with those of its VIPs that it holds, and false where that is none.
func (t *Table) granted(name lb.ServiceName) (lb.Service, bool) {
	s := t.objects[refOf(name)].services[name]
	s.Frontends = slices.DeleteFunc(slices.Clone(s.Frontends), func(f lb.Frontend) bool {
		return t.claims[f.VIP][0].service != name
	})
	return s, len(s.Frontends) > 0
}

// compare orders the claims on one VIP, of which an object has at most one: by class, then the oldest object
// first, one that does not say its age last.
func (c claim) compare(o claim) int {
	if c.class != o.class {
		return cmp.Compare(c.class, o.class)
	}
	if ageless := c.created.IsZero(); ageless != o.created.IsZero() {
		if ageless {
			return 1
		}
		return -1
	}
	return cmp.Or(c.created.Compare(o.created), c.service.Compare(o.service))
}

func equal(a, b lb.Service) bool {
	return a.Name == b.Name && slices.Equal(a.Frontends, b.Frontends) && slices.Equal(a.Backends, b.Backends) &&
		a.Algorithm == b.Algorithm && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.Affinity == b.Affinity && slices.Equal(a.SourceRanges, b.SourceRanges)
}

// put sets m[k], or deletes it where there is nothing to hold.
func put[M ~map[K]V, K comparable, V any](m M, k K, v V, hold bool) {
	if hold {
		m[k] = v
	} else {
		delete(m, k)
	}
}

func warning(field, format string, args ...any) lb.Problem {
	return lb.Problem{Field: field, Message: fmt.Sprintf(format, args...), Severity: lb.Warning}
}

func notYet(field, format string, args ...any) lb.Problem {
	return lb.Problem{Field: field, Message: fmt.Sprintf(format, args...), Severity: lb.NotYet}
}
