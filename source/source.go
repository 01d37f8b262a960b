// SPDX-License-Identifier: Apache-2.0

// Package source keeps the Kubernetes objects that services are made of, as a list and watch of each kind
// delivers them, and tells what a change concerns: Services, Pods with hostPorts, or this node. Where they come from,
// a folder or an API server, makes no difference here.
package source

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
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

// Name is the name of a Service or of a Pod.
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
	Pods           cache.ListerWatcher
	Nodes          cache.ListerWatcher
	Node           string // the name of this node
	// Latest returns the resourceVersions of the latest changes of the four, in their order here, no part of those
	// that come together missing. nil: that is not to be known, as of an API server.
	Latest func() [4]uint64
}

// Dirty is what may have changed. A name may be of an object that is gone.
type Dirty struct {
	Services []Name // sorted, each once; with slices of theirs that changed. A Service may never have been
	Pods     []Name // sorted, each once; those that have or had a hostPort
	Node     bool   // this node's object
	// Began is when changes of EndpointSlices began, as whoever made them has noted there.
	Began []time.Time
}

// LogTo sends what client-go has to say to a log. It knows one for the whole process, so this is main's to call.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log) }

const (
	// lull is how long nothing must change before Next tells of changes. What changes together, a Service
	// and its EndpointSlices, comes by several watches, and half of it may mean no endpoints.
	lull = 10 * time.Millisecond
	// patience, in lulls, is how long Next waits for one.
	patience = 10
	// lateness is how long it waits for changes that are known to be on their way: on a busy machine one watch
	// may be far behind another.
	lateness = time.Second
)

// byService is the index of EndpointSlices by the Service that they are of.
const byService = "service"

// Objects is all that the watches have delivered. What it returns must not be written to.
type Objects struct {
	watches       Watches
	services      cache.SharedIndexInformer
	slices        cache.SharedIndexInformer
	pods          cache.SharedIndexInformer
	nodes         cache.SharedIndexInformer
	registrations []cache.ResourceEventHandlerRegistration

	changed chan struct{} // holds one token while there may be news for Next

	mu     sync.Mutex
	synced bool
	told   bool // Next has returned once
	dirty  map[concern]struct{}
	began  []time.Time
	seen   [4]uint64 // the latest resourceVersions that came, where Watches.Latest is known
}

// concern is what a change concerns.
type concern struct {
	of   kind
	name Name // none with aNode: there is one only
}

type kind uint8

const (
	aService kind = iota
	aPod
	aNode
)

// New makes Objects that [Objects.Run] fills.
func New(w Watches) (*Objects, error) {
	o := &Objects{watches: w, changed: make(chan struct{}, 1), dirty: map[concern]struct{}{}}
	index := cache.Indexers{byService: func(obj any) ([]string, error) {
		return []string{serviceOf(obj.(*discoveryv1.EndpointSlice)).String()}, nil
	}}
	o.services = cache.NewSharedIndexInformer(w.Services, &corev1.Service{}, 0, cache.Indexers{})
	o.slices = cache.NewSharedIndexInformer(w.EndpointSlices, &discoveryv1.EndpointSlice{}, 0, index)
	o.pods = cache.NewSharedIndexInformer(w.Pods, &corev1.Pod{}, 0, cache.Indexers{})
	o.nodes = cache.NewSharedIndexInformer(w.Nodes, &corev1.Node{}, 0, cache.Indexers{})
	for i, kind := range []struct {
		informer cache.SharedIndexInformer
		concerns func(obj any) (concern, bool)
	}{
		{o.services, func(obj any) (concern, bool) { return concern{aService, nameOf(obj.(metav1.Object))}, true }},
		{o.slices, func(obj any) (concern, bool) {
			name := serviceOf(obj.(*discoveryv1.EndpointSlice))
			return concern{aService, name}, name.Name != ""
		}},
		{o.pods, func(obj any) (concern, bool) {
			_, whole := obj.(*corev1.Pod)
			return concern{aPod, nameOf(obj.(metav1.Object))}, whole
		}},
		{o.nodes, func(obj any) (concern, bool) {
			return concern{of: aNode}, obj.(*corev1.Node).Name == o.watches.Node
		}},
	} {
		if err := kind.informer.SetTransform(trim); err != nil {
			return nil, fmt.Errorf("set up an informer: %w", err)
		}
		registration, err := kind.informer.AddEventHandler(o.handler(i, kind.concerns))
		if err != nil {
			return nil, fmt.Errorf("set up an informer: %w", err)
		}
		o.registrations = append(o.registrations, registration)
	}
	return o, nil
}

// handler marks as dirty what a change of a watch concerns, before it and after it.
func (o *Objects) handler(watch int, concerns func(obj any) (concern, bool)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) {
			o.mark(concerns, began(obj), obj)
			o.see(watch, obj)
		},
		UpdateFunc: func(old, obj any) {
			if !same(old.(metav1.Object), obj.(metav1.Object)) {
				o.mark(concerns, began(obj), old, obj)
			}
			o.see(watch, obj)
		},
		DeleteFunc: func(obj any) {
			if unseen, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = unseen.Obj
			}
			o.mark(concerns, time.Time{}, obj) // what it has noted is when it changed last, not when it went
			o.see(watch, obj)
		},
	}
}

// see notes how far a watch has come, where that is of use.
func (o *Objects) see(watch int, obj any) {
	if o.watches.Latest == nil {
		return
	}
	// Of a source that knows the latest one, versions are numbers.
	version, err := strconv.ParseUint(obj.(metav1.Object).GetResourceVersion(), 10, 64)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil && version > o.seen[watch] {
		o.seen[watch] = version
	}
}

// behind tells whether changes are known to be on their way.
func (o *Objects) behind() bool {
	if o.watches.Latest == nil {
		return false
	}
	latest := o.watches.Latest()
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, version := range latest {
		if o.seen[i] < version {
			return true
		}
	}
	return false
}

// began returns when the change of an EndpointSlice began, the zero time where that is not known.
func began(obj any) time.Time {
	s, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
	if err != nil { // as with none
		return time.Time{}
	}
	return t
}

func (o *Objects) mark(concerns func(obj any) (concern, bool), began time.Time, objects ...any) {
	marked := false
	o.mu.Lock()
	for _, obj := range objects {
		if c, ok := concerns(obj); ok {
			o.dirty[c] = struct{}{}
			marked = true
		}
	}
	if marked && !began.IsZero() {
		o.began = append(o.began, began)
	}
	o.mu.Unlock()
	if marked {
		o.wake()
	}
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
	for _, informer := range []cache.SharedIndexInformer{o.services, o.slices, o.pods, o.nodes} {
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

// Next waits until something may have changed, and for a lull, and returns what, each once, however often it
// changed since. The first call returns every Service and every Pod with a hostPort once all that there was at
// first is known, also where there is none. Returns an error only when ctx ends. For one caller at a time.
func (o *Objects) Next(ctx context.Context) (Dirty, error) {
	for {
		select {
		case <-o.changed:
		case <-ctx.Done():
			return Dirty{}, ctx.Err()
		}
		if err := o.waitForLull(ctx); err != nil {
			return Dirty{}, err
		}
		if dirty, ok := o.take(); ok {
			return dirty, nil
		}
	}
}

func (o *Objects) waitForLull(ctx context.Context) error {
	quiet, enough, late := time.NewTimer(lull), time.NewTimer(patience*lull), time.NewTimer(lateness)
	defer quiet.Stop()
	defer enough.Stop()
	defer late.Stop()
	for {
		select {
		case <-o.changed:
			quiet.Reset(lull)
			continue
		case <-quiet.C:
		case <-enough.C:
		case <-late.C:
			o.giveUp()
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
		if !o.behind() {
			return nil
		}
		quiet.Reset(lull)
	}
}

// giveUp takes for seen what was waited for in vain: what came and went while a watch was broken has no event.
func (o *Objects) giveUp() {
	if o.watches.Latest == nil {
		return
	}
	latest := o.watches.Latest()
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, version := range latest {
		o.seen[i] = max(o.seen[i], version)
	}
}

func (o *Objects) take() (Dirty, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.synced || o.told && len(o.dirty) == 0 {
		return Dirty{}, false
	}
	o.told = true
	d := Dirty{Began: o.began}
	o.began = nil
	for c := range o.dirty {
		switch c.of {
		case aService:
			d.Services = append(d.Services, c.name)
		case aPod:
			d.Pods = append(d.Pods, c.name)
		case aNode:
			d.Node = true
		}
	}
	slices.SortFunc(d.Services, Name.Compare)
	slices.SortFunc(d.Pods, Name.Compare)
	o.dirty = map[concern]struct{}{} // a map never shrinks, and this one held every Service once
	return d, true
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

// Pod returns a Pod that has a hostPort, nil if there is none.
func (o *Objects) Pod(name Name) *corev1.Pod {
	obj, _, _ := o.pods.GetIndexer().GetByKey(name.String())
	pod, _ := obj.(*corev1.Pod)
	return pod
}

// all returns everything that Next returns at first.
func (o *Objects) all() Dirty {
	d := Dirty{Node: true}
	for _, key := range o.services.GetIndexer().ListKeys() {
		namespace, name, _ := cache.SplitMetaNamespaceKey(key)
		d.Services = append(d.Services, Name{namespace, name})
	}
	for _, obj := range o.pods.GetIndexer().List() {
		if pod, ok := obj.(*corev1.Pod); ok {
			d.Pods = append(d.Pods, nameOf(pod))
		}
	}
	return d
}

func nameOf(obj metav1.Object) Name { return Name{obj.GetNamespace(), obj.GetName()} }

func serviceOf(s *discoveryv1.EndpointSlice) Name {
	return Name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
}

// ours is how the annotations begin that lbagent reads.
const ours = "lbagent.io/"

// trim drops what no stage reads, so that it takes no memory and its changes make nothing dirty. Of a Pod without
// a hostPort no more is left than that there is one.
func trim(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
		m.SetOwnerReferences(nil)
		m.SetFinalizers(nil)
		annotations := m.GetAnnotations()
		maps.DeleteFunc(annotations, func(key, _ string) bool {
			return !strings.HasPrefix(key, ours) && key != corev1.EndpointsLastChangeTriggerTime
		})
		if len(annotations) == 0 {
			annotations = nil
		}
		m.SetAnnotations(annotations)
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
	case *corev1.Pod:
		return trimPod(obj), nil
	}
	return obj, nil
}

func trimPod(p *corev1.Pod) metav1.Object {
	meta := metav1.ObjectMeta{
		Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion,
		CreationTimestamp: p.CreationTimestamp, DeletionTimestamp: p.DeletionTimestamp,
	}
	spec := corev1.PodSpec{
		NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
		InitContainers: hostPorts(p.Spec.InitContainers), Containers: hostPorts(p.Spec.Containers),
	}
	if len(spec.InitContainers)+len(spec.Containers) == 0 {
		return &metav1.PartialObjectMetadata{ObjectMeta: meta}
	}
	return &corev1.Pod{ObjectMeta: meta, Spec: spec, Status: corev1.PodStatus{
		Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs,
	}}
}

// hostPorts returns the containers that have hostPorts, with those alone. An empty container stands for one
// without, so that problems name the field that has it.
func hostPorts(containers []corev1.Container) []corev1.Container {
	last := 0 // number of those up to the last with one
	kept := make([]corev1.Container, len(containers))
	for i, c := range containers {
		kept[i].Name, kept[i].RestartPolicy = c.Name, c.RestartPolicy
		if slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.HostPort != 0 }) {
			kept[i].Ports, last = c.Ports, i+1
		}
	}
	if last == 0 {
		return nil
	}
	return slices.Clone(kept[:last]) // a container is large
}

// same reports whether two states of one object differ in their version only, and in what began them.
func same(old, obj metav1.Object) bool {
	copied := old.(runtime.Object).DeepCopyObject().(metav1.Object)
	copied.SetResourceVersion(obj.GetResourceVersion())
	copied.SetGeneration(obj.GetGeneration())
	if began, ok := obj.GetAnnotations()[corev1.EndpointsLastChangeTriggerTime]; ok {
		annotations := copied.GetAnnotations()
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[corev1.EndpointsLastChangeTriggerTime] = began
		copied.SetAnnotations(annotations)
	} else {
		delete(copied.GetAnnotations(), corev1.EndpointsLastChangeTriggerTime)
	}
	return equality.Semantic.DeepEqual(copied, obj)
}
