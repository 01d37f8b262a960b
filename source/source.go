// SPDX-License-Identifier: Apache-2.0

// Package source keeps the Kubernetes objects that services are made of, as a list and watch of each kind
// delivers them, and tells which Services a change concerns. Where they come from, a folder or an API server,
// makes no difference here.
package source

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// Name is the name of a Service.
type Name struct {
	Namespace, Name string
}

// String is NAMESPACE/NAME.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace and name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// Watches is where objects come from.
type Watches struct {
	Services       cache.ListerWatcher
	EndpointSlices cache.ListerWatcher
	Nodes          cache.ListerWatcher
	// Node is the name of this node. When its object changes, every Service is dirty.
	Node string
}

// LogTo sends what client-go has to say to a log. It knows one for the whole process, so this is main's to call.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log) }

const (
	// lull is how long nothing must change before Next tells of changes. What changes together, a Service
	// and its EndpointSlices, comes by several watches, and half of it may mean no endpoints.
	lull = 10 * time.Millisecond
	// patience, in lulls, is how long Next waits for one.
	patience = 10
)

// byService is the index of EndpointSlices by the Service that they are of.
const byService = "service"

// Objects is all that the watches have delivered. What it returns must not be written to.
type Objects struct {
	watches       Watches
	services      cache.SharedIndexInformer
	slices        cache.SharedIndexInformer
	nodes         cache.SharedIndexInformer
	registrations []cache.ResourceEventHandlerRegistration

	changed chan struct{} // holds one token while there may be news for Next

	mu     sync.Mutex
	synced bool
	told   bool // Next has returned once
	dirty  map[Name]struct{}
}

// New makes Objects that [Objects.Run] fills.
func New(w Watches) (*Objects, error) {
	o := &Objects{watches: w, changed: make(chan struct{}, 1), dirty: map[Name]struct{}{}}
	index := cache.Indexers{byService: func(obj any) ([]string, error) {
		return []string{serviceOf(obj.(*discoveryv1.EndpointSlice)).String()}, nil
	}}
	o.services = cache.NewSharedIndexInformer(w.Services, &corev1.Service{}, 0, cache.Indexers{})
	o.slices = cache.NewSharedIndexInformer(w.EndpointSlices, &discoveryv1.EndpointSlice{}, 0, index)
	o.nodes = cache.NewSharedIndexInformer(w.Nodes, &corev1.Node{}, 0, cache.Indexers{})
	for _, kind := range []struct {
		informer cache.SharedIndexInformer
		concerns func(obj any) []Name
	}{
		{o.services, func(obj any) []Name {
			svc := obj.(*corev1.Service)
			return []Name{{svc.Namespace, svc.Name}}
		}},
		{o.slices, func(obj any) []Name { return []Name{serviceOf(obj.(*discoveryv1.EndpointSlice))} }},
		{o.nodes, func(obj any) []Name {
			if obj.(*corev1.Node).Name != o.watches.Node {
				return nil
			}
			return o.names()
		}},
	} {
		if err := kind.informer.SetTransform(trim); err != nil {
			return nil, fmt.Errorf("set up an informer: %w", err)
		}
		registration, err := kind.informer.AddEventHandler(o.handler(kind.concerns))
		if err != nil {
			return nil, fmt.Errorf("set up an informer: %w", err)
		}
		o.registrations = append(o.registrations, registration)
	}
	return o, nil
}

// handler marks as dirty what a change concerns, before it and after it.
func (o *Objects) handler(concerns func(obj any) []Name) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { o.mark(concerns(obj)) },
		UpdateFunc: func(old, obj any) {
			if !same(old.(metav1.Object), obj.(metav1.Object)) {
				o.mark(slices.Concat(concerns(old), concerns(obj)))
			}
		},
		DeleteFunc: func(obj any) {
			if unseen, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = unseen.Obj
			}
			o.mark(concerns(obj))
		},
	}
}

func (o *Objects) mark(names []Name) {
	if len(names) == 0 {
		return
	}
	o.mu.Lock()
	for _, n := range names {
		if n.Name != "" {
			o.dirty[n] = struct{}{}
		}
	}
	o.mu.Unlock()
	o.wake()
}

func (o *Objects) wake() {
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

// Run brings in objects and their changes until ctx ends; it returns nil then. It is called once.
func (o *Objects) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for _, informer := range []cache.SharedIndexInformer{o.services, o.slices, o.nodes} {
		running.Go(func() { informer.RunWithContext(ctx) })
	}
	for _, r := range o.registrations {
		select {
		case <-r.HasSyncedChecker().Done(): // all that was there at first has been marked
		case <-ctx.Done():
			return nil
		}
	}
	o.mu.Lock()
	o.synced = true
	o.mu.Unlock()
	o.wake()
	<-ctx.Done()
	return nil
}

// Next waits until Services may have changed, and for a lull, and returns their names, each once, however
// often it changed since; sorted. The first call returns every Service once all that there was at first is
// known, also where there is none. A name may be of a Service that is gone, or that has never been though
// there are slices of it. Returns an error only when ctx ends. For one caller at a time.
func (o *Objects) Next(ctx context.Context) ([]Name, error) {
	for {
		select {
		case <-o.changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if err := o.waitForLull(ctx); err != nil {
			return nil, err
		}
		if names, ok := o.take(); ok {
			return names, nil
		}
	}
}

func (o *Objects) waitForLull(ctx context.Context) error {
	quiet, enough := time.NewTimer(lull), time.NewTimer(patience*lull)
	defer quiet.Stop()
	defer enough.Stop()
	for {
		select {
		case <-o.changed:
			quiet.Reset(lull)
		case <-quiet.C:
			return nil
		case <-enough.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (o *Objects) take() ([]Name, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.synced || o.told && len(o.dirty) == 0 {
		return nil, false
	}
	o.told = true
	names := slices.SortedFunc(maps.Keys(o.dirty), Name.Compare)
	o.dirty = map[Name]struct{}{} // a map never shrinks, and this one held every Service once
	return names, true
}

// Service returns a Service, nil if there is none, and the EndpointSlices that are of it, sorted by name.
func (o *Objects) Service(name Name) (*corev1.Service, []*discoveryv1.EndpointSlice) {
	var svc *corev1.Service
	if obj, ok, _ := o.services.GetIndexer().GetByKey(name.String()); ok {
		svc = obj.(*corev1.Service)
	}
	var its []*discoveryv1.EndpointSlice
	found, _ := o.slices.GetIndexer().ByIndex(byService, name.String()) // fails only without the index
	for _, obj := range found {
		its = append(its, obj.(*discoveryv1.EndpointSlice))
	}
	slices.SortFunc(its, func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	return svc, its
}

// Node returns a node's object, nil if there is none.
func (o *Objects) Node(name string) *corev1.Node {
	obj, ok, _ := o.nodes.GetIndexer().GetByKey(name)
	if !ok {
		return nil
	}
	return obj.(*corev1.Node)
}

// names returns the names of all Services.
func (o *Objects) names() (names []Name) {
	for _, key := range o.services.GetIndexer().ListKeys() {
		namespace, name, _ := cache.SplitMetaNamespaceKey(key)
		names = append(names, Name{namespace, name})
	}
	return names
}

func serviceOf(s *discoveryv1.EndpointSlice) Name {
	return Name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
}

// trim drops what no stage reads, so that it takes no memory and its changes make nothing dirty.
func trim(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
		m.SetAnnotations(nil)
		m.SetOwnerReferences(nil)
		m.SetFinalizers(nil)
	}
	switch obj := obj.(type) {
	case *corev1.Service:
		obj.Status.Conditions = nil
	case *discoveryv1.EndpointSlice:
		for i := range obj.Endpoints {
			obj.Endpoints[i].TargetRef = nil
			obj.Endpoints[i].DeprecatedTopology = nil
		}
	case *corev1.Node:
		obj.Status = corev1.NodeStatus{Addresses: obj.Status.Addresses}
	}
	return obj, nil
}

// same reports whether two states of one object differ in their version only.
func same(old, obj metav1.Object) bool {
	copied := old.(runtime.Object).DeepCopyObject().(metav1.Object)
	copied.SetResourceVersion(obj.GetResourceVersion())
	copied.SetGeneration(obj.GetGeneration())
	return equality.Semantic.DeepEqual(copied, obj)
}
