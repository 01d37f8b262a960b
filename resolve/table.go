// SPDX-License-Identifier: Apache-2.0

// Package resolve turns Kubernetes objects into the services of package lb. All that Kubernetes says about
// the meaning of a Service lives here, a row of the rules to a function: which objects count and at which
// addresses in service.go, which endpoints in endpoints.go, who gets an address that several Services
// claim here. The package is pure: no clocks, no goroutines, no state but the Table.
package resolve

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// Name names a Service object.
type Name struct {
	Namespace, Name string
}

// String is NAMESPACE/NAME.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace and name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// Change is what an update of a Table did to the services in force, those of other Services included: a VIP
// that one Service loses and another gains shows as both of them changed, in one Change. No service is both
// changed and removed. The services are the Table's own; the caller must not write to them.
type Change struct {
	Changed map[lb.ServiceName]lb.Service // new ones, and those that differ from before
	Removed []lb.ServiceName              // sorted
}

// Table holds what every Service asks for, and settles who gets what. Its state depends on the objects that
// are in it, not on the order in which they came. The cost of a change is that of the Service changed and of
// those that claim the same VIPs. A Table is not safe for concurrent use.
type Table struct {
	objects   map[Name]object               // none for Services that ask for nothing
	problems  map[Name][]lb.Problem         // only of those that have some: so Problems is cheap
	claims    map[lb.VIP][]claim            // oldest first: the first holds the VIP, the others wait for it
	contested map[lb.VIP]struct{}           // those of claims that have more than one
	inForce   map[lb.ServiceName]lb.Service // what the Changes so far add up to
}

// object is what one Service asks for, as if it were alone.
type object struct {
	services map[lb.ServiceName]lb.Service
	claims   map[lb.VIP]claim // one for each frontend of services
	problems []lb.Problem
}

// claim is a service's wish for a VIP.
type claim struct {
	service lb.ServiceName
	created time.Time // of the Service; zero where it does not say
	field   string    // of the Service that asks for the VIP
}

// NewTable returns a Table without Services.
func NewTable() *Table {
	return &Table{
		objects:   map[Name]object{},
		problems:  map[Name][]lb.Problem{},
		claims:    map[lb.VIP][]claim{},
		contested: map[lb.VIP]struct{}{},
		inForce:   map[lb.ServiceName]lb.Service{},
	}
}

// Update puts a Service in place of what was known under its name, and returns what that changed.
// endpointSlices are all those that belong to it by their namespace and label kubernetes.io/service-name, in
// any order. A nil Service is one that is not there, whatever slices it has. The objects are not kept.
//
// A service that is left without a VIP, because older Services hold them all, is not in force.
func (t *Table) Update(name Name, svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) Change {
	before, after := t.objects[name], resolve(name, svc, endpointSlices)
	put(t.objects, name, after, len(after.services) > 0)
	put(t.problems, name, after.problems, len(after.problems) > 0)

	dirty := map[lb.ServiceName]struct{}{}
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
	return t.settle(dirty)
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
				vip, objectOf(holder.name()))
			p.Object = objectOf(c.name())
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
	change := Change{Changed: map[lb.ServiceName]lb.Service{}}
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
	s := t.objects[Name{name.Namespace, name.Name}].services[name]
	s.Frontends = slices.DeleteFunc(slices.Clone(s.Frontends), func(f lb.Frontend) bool {
		return t.claims[f.VIP][0].service != name
	})
	return s, len(s.Frontends) > 0
}

func (c claim) name() Name { return Name{c.service.Namespace, c.service.Name} }

// compare orders the claims on one VIP, of which a Service has at most one: the oldest Service first, one
// that does not say its age last.
func (c claim) compare(o claim) int {
	if ageless := c.created.IsZero(); ageless != o.created.IsZero() {
		if ageless {
			return 1
		}
		return -1
	}
	return cmp.Or(c.created.Compare(o.created), c.name().Compare(o.name()))
}

func equal(a, b lb.Service) bool {
	return a.Name == b.Name && slices.Equal(a.Frontends, b.Frontends) && slices.Equal(a.Backends, b.Backends)
}

// put sets m[k], or deletes it where there is nothing to hold.
func put[M ~map[K]V, K comparable, V any](m M, k K, v V, hold bool) {
	if hold {
		m[k] = v
	} else {
		delete(m, k)
	}
}

// objectOf is how a Problem names a Service.
func objectOf(n Name) string { return "Service " + n.String() }

func warning(field, format string, args ...any) lb.Problem {
	return lb.Problem{Field: field, Message: fmt.Sprintf(format, args...), Severity: lb.Warning}
}

func notYet(field, format string, args ...any) lb.Problem {
	return lb.Problem{Field: field, Message: fmt.Sprintf(format, args...), Severity: lb.NotYet}
}
