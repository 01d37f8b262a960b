// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server lists and watches like an API server that is asked for one kind.
type server struct {
	mu      sync.Mutex
	version int
	objects map[string]runtime.Object
	watches []*watch.RaceFreeFakeWatcher
	refuse  bool // lists fail
}

func newServer() *server { return &server{objects: map[string]runtime.Object{}} }

func (s *server) set(o interface {
	runtime.Object
	metav1.Object
}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	o.SetResourceVersion(fmt.Sprint(s.version))
	key := o.GetNamespace() + "/" + o.GetName()
	_, had := s.objects[key]
	s.objects[key] = o
	for _, w := range s.watches {
		if had {
			w.Modify(o.DeepCopyObject())
		} else {
			w.Add(o.DeepCopyObject())
		}
	}
}

func (s *server) remove(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	for _, w := range s.watches {
		w.Delete(s.objects[key].DeepCopyObject())
	}
	delete(s.objects, key)
}

// cut ends all watches after changes that no watch will tell of.
func (s *server) cut(removed ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range removed {
		delete(s.objects, key)
	}
	s.version++
	for _, w := range s.watches {
		w.Error(&metav1.Status{Status: metav1.StatusFailure, Code: 410, Reason: metav1.StatusReasonExpired})
	}
	s.watches = nil
}

func (s *server) allow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = false
}

func (s *server) List(metav1.ListOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse {
		return nil, errors.New("not now")
	}
	list := &corev1.List{ListMeta: metav1.ListMeta{ResourceVersion: fmt.Sprint(s.version)}}
	for _, o := range s.objects {
		list.Items = append(list.Items, runtime.RawExtension{Object: o.DeepCopyObject()})
	}
	return list, nil
}

func (s *server) Watch(metav1.ListOptions) (watch.Interface, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := watch.NewRaceFreeFake()
	s.watches = append(s.watches, w)
	return w, nil
}

func (s *server) IsWatchListSemanticsUnSupported() bool { return true }

func service(name string, port int32) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: port}}},
	}
}

func slice(name, service string, addresses ...string) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		Endpoints:  []discoveryv1.Endpoint{{Addresses: addresses}},
	}
}

func node(name, zone string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone}}}
}

// world is Objects that run, in a bubble of synctest.
type world struct {
	t                             *testing.T
	services, slices, pods, nodes *server
	latest                        func() [4]uint64 // nil: not known
	objects                       *Objects
}

// run runs a test in a bubble. before fills the servers.
func run(t *testing.T, before, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, services: newServer(), slices: newServer(), pods: newServer(), nodes: newServer()}
		before(w)
		o, err := New(Watches{Services: w.services, EndpointSlices: w.slices, Pods: w.pods, Nodes: w.nodes, Node: "this", Latest: w.latest})
		if err != nil {
			t.Fatal(err)
		}
		w.objects = o
		for _, informer := range []cache.SharedIndexInformer{o.services, o.slices, o.pods, o.nodes} {
			// The default one sleeps by a clock from outside the bubble, for 26 years.
			if err := informer.SetWatchErrorHandler(func(*cache.Reflector, error) {}); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- o.Run(ctx) }()
		synctest.Wait()
		test(w)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// dirty returns what Next does once all is quiet, "blocks" if it does not return: the names of Services,
// those of Pods as "pod default/a", "node", and when changes began.
func (w *world) dirty() string {
	synctest.Wait()
	ctx, cancel := context.WithCancel(w.t.Context())
	defer cancel()
	type result struct {
		dirty Dirty
		err   error
	}
	got := make(chan result, 1)
	go func() {
		dirty, err := w.objects.Next(ctx)
		got <- result{dirty, err}
	}()
	<-time.After(2 * lull)
	synctest.Wait()
	cancel() // it is blocked, or has returned
	r := <-got
	if r.err != nil {
		if !errors.Is(r.err, context.Canceled) {
			w.t.Error(r.err)
		}
		return "blocks"
	}
	var s []string
	for _, n := range r.dirty.Services {
		s = append(s, n.String())
	}
	for _, n := range r.dirty.Pods {
		s = append(s, "pod "+n.String())
	}
	if r.dirty.Node {
		s = append(s, "node")
	}
	for _, t := range r.dirty.Began {
		s = append(s, t.Format("began 15:04:05.000"))
	}
	return strings.Join(s, " ")
}

func (w *world) expect(want string) {
	w.t.Helper()
	if got := w.dirty(); got != want {
		w.t.Errorf("dirty: %q, want %q", got, want)
	}
}

// has tells a Service's port and its endpoints' addresses: "80 10.0.0.1 10.0.0.2".
func (w *world) has(name, want string) {
	w.t.Helper()
	svc, its := w.objects.Service(Name{"default", name})
	got := "none"
	if svc != nil {
		got = fmt.Sprint(svc.Spec.Ports[0].Port)
	}
	for _, s := range its {
		for _, e := range s.Endpoints {
			got += " " + strings.Join(e.Addresses, " ")
		}
	}
	if got != want {
		w.t.Errorf("%s: %q, want %q", name, got, want)
	}
}

func TestChanges(t *testing.T) {
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.services.set(service("b", 80))
		w.services.set(service("c", 80))
		w.slices.set(slice("a-2", "a", "10.0.0.2"))
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
		w.slices.set(slice("b-1", "b", "10.0.0.3"))
		w.slices.set(slice("other", "", "10.0.0.9"))
		w.nodes.set(node("this", "z1"))
		w.nodes.set(node("that", "z2"))
	}, func(w *world) {
		w.expect("default/a default/b default/c node")
		w.expect("blocks")
		w.has("a", "80 10.0.0.1 10.0.0.2")
		w.has("c", "80")
		w.has("d", "none")

		w.services.set(service("a", 81))
		w.expect("default/a")
		w.has("a", "81 10.0.0.1 10.0.0.2")
		w.slices.set(slice("b-1", "b", "10.0.0.4"))
		w.slices.set(slice("b-1", "b", "10.0.0.5"))
		w.slices.set(slice("b-1", "b", "10.0.0.6"))
		w.expect("default/b")
		w.has("b", "80 10.0.0.6")

		// A slice goes over to another Service.
		w.slices.set(slice("b-1", "c", "10.0.0.6"))
		w.expect("default/b default/c")
		w.has("b", "80")
		w.has("c", "80 10.0.0.6")

		// Gone, and known as gone.
		w.services.remove("default/a")
		w.slices.remove("default/a-1")
		w.expect("default/a")
		w.has("a", "none 10.0.0.2")
		w.services.set(service("a", 82))
		w.expect("default/a")
		w.has("a", "82 10.0.0.2")

		// Slices of a Service that comes later.
		w.slices.set(slice("d-1", "d", "10.0.0.7"))
		w.expect("default/d")
		w.services.set(service("d", 80))
		w.expect("default/d")
		w.has("d", "80 10.0.0.7")

		// Nodes: only this one is told of, and only what is read of it.
		w.nodes.set(node("that", "z3"))
		w.expect("blocks")
		w.nodes.set(node("this", "z3"))
		w.expect("node")
		beat := node("this", "z3")
		beat.Annotations = map[string]string{"a": "b"}
		beat.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady}}
		w.nodes.set(beat)
		w.expect("blocks")
		if z := w.objects.Node("that").Labels[corev1.LabelTopologyZone]; z != "z3" {
			t.Errorf("zone %s", z)
		}
		w.nodes.remove("/this")
		w.expect("node")
		if w.objects.Node("this") != nil {
			t.Error("there is a node that was deleted")
		}

		// What is deleted while no watch runs.
		w.slices.cut("default/d-1")
		w.services.cut("default/b")
		w.settle()
		w.expect("default/b default/d")
		w.has("d", "80")
		w.has("b", "none")
	})
}

// beganAt is a slice with a note of when its last change began.
func beganAt(s *discoveryv1.EndpointSlice, at string) *discoveryv1.EndpointSlice {
	s.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: at}
	return s
}

// TestBegan: each change of a slice tells once when it began, if that is known; and a note alone is no change.
func TestBegan(t *testing.T) {
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.1"), "2030-01-02T03:04:05.678Z"))
	}, func(w *world) {
		w.expect("default/a began 03:04:05.678")
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.1"), "2030-01-02T03:04:06Z"))
		w.expect("blocks")
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
		w.expect("blocks")
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.1"), "2030-01-02T03:04:06Z"))
		w.expect("blocks")
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.2"), "2030-01-02T03:04:07Z"))
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.3"), "2030-01-02T03:04:08.5Z"))
		w.expect("default/a began 03:04:07.000 began 03:04:08.500")
		w.slices.set(beganAt(slice("other", "", "10.0.0.2"), "2030-01-02T03:04:09Z")) // of no Service
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.4"), "yesterday"))
		w.expect("default/a")
		w.services.set(service("a", 81))
		w.expect("default/a")
		w.slices.set(beganAt(slice("a-1", "a", "10.0.0.5"), "2030-01-02T03:04:10Z"))
		w.expect("default/a began 03:04:10.000")
		w.slices.remove("default/a-1")
		w.expect("default/a")
	})
}

// pod has one container, with a hostPort unless that is 0.
func pod(name string, hostPort int32) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "c", Ports: []corev1.ContainerPort{{ContainerPort: 80, HostPort: hostPort}},
		}}},
	}
}

// TestPods: only those with a hostPort are told of and known.
func TestPods(t *testing.T) {
	run(t, func(w *world) {
		w.pods.set(pod("a", 8080))
		w.pods.set(pod("b", 0))
	}, func(w *world) {
		w.expect("pod default/a")
		if p := w.objects.Pod(Name{"default", "a"}); p == nil || p.Spec.Containers[0].Ports[0].HostPort != 8080 {
			t.Errorf("the Pod with a hostPort is %v", p)
		}
		if p := w.objects.Pod(Name{"default", "b"}); p != nil {
			t.Errorf("the Pod without one is %v", p)
		}
		changed := pod("b", 0)
		changed.Status.Phase = corev1.PodRunning
		w.pods.set(changed)
		w.expect("blocks")

		// A hostPort comes, its Pod changes, and it goes.
		w.pods.set(pod("b", 8081))
		w.services.set(service("b", 80))
		w.expect("default/b pod default/b")
		changed = pod("b", 8081)
		changed.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.1"}}
		w.pods.set(changed)
		w.expect("pod default/b")
		w.pods.set(pod("b", 0))
		w.expect("pod default/b")
		if p := w.objects.Pod(Name{"default", "b"}); p != nil {
			t.Errorf("the Pod whose hostPort went is %v", p)
		}
		w.pods.remove("default/b")
		w.expect("blocks")
		w.pods.cut("default/a")
		w.settle()
		w.expect("pod default/a")
		if p := w.objects.Pod(Name{"default", "a"}); p != nil {
			t.Errorf("the Pod that went is %v", p)
		}
	})
}

// TestTogether: what changes together comes by two watches, and Next tells of it once all of it is there.
func TestTogether(t *testing.T) {
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
	}, func(w *world) {
		w.expect("default/a")
		time.AfterFunc(lull/2, func() { w.slices.set(slice("a-1", "a", "10.0.0.2")) })
		w.services.set(service("a", 81))
		if _, err := w.objects.Next(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		w.has("a", "81 10.0.0.2")
		w.expect("blocks")
	})
}

// TestBehind: what is known to be on its way is waited for, however long a lull there is before it, and not for ever.
func TestBehind(t *testing.T) {
	var latest [4]uint64
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
		latest = [4]uint64{1, 1}
		w.latest = func() [4]uint64 { return latest }
	}, func(w *world) {
		next := func(want string, least, most time.Duration) {
			t.Helper()
			start := time.Now()
			if _, err := w.objects.Next(w.t.Context()); err != nil {
				w.t.Fatal(err)
			}
			w.has("a", want)
			if took := time.Since(start); took < least || took > most {
				w.t.Errorf("told of %s after %v", want, took)
			}
		}
		w.expect("default/a")
		const far = 3 * patience * lull
		latest = [4]uint64{2, 2}
		w.services.set(service("a", 81))
		time.AfterFunc(far, func() { w.slices.set(slice("a-1", "a", "10.0.0.2")) })
		next("81 10.0.0.2", far, far+2*lull)
		latest = [4]uint64{3, 3}
		w.services.set(service("a", 82))
		next("82 10.0.0.2", lateness, lateness)
		latest = [4]uint64{4, 3}
		w.services.set(service("a", 83))
		next("83 10.0.0.2", lull, lull)
	})
}

// TestNoLull: changes that never cease are told of nevertheless.
func TestNoLull(t *testing.T) {
	run(t, func(w *world) { w.services.set(service("a", 80)) }, func(w *world) {
		w.expect("default/a")
		start := time.Now()
		for at := time.Duration(0); at < 2*patience*lull; at += lull / 2 {
			time.AfterFunc(at, func() { w.slices.set(slice("a-1", "a", "10.0.0.1", at.String())) })
		}
		if _, err := w.objects.Next(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		if d := time.Since(start); d > patience*lull {
			w.t.Errorf("told after %v", d)
		}
		<-time.After(2 * patience * lull)
	})
}

// settle lets client-go's back-off pass.
func (w *world) settle() {
	<-time.After(time.Minute)
	synctest.Wait()
}

// TestNothingBeforeSync: one kind that cannot be listed holds all back.
func TestNothingBeforeSync(t *testing.T) {
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
		w.nodes.refuse = true
	}, func(w *world) {
		w.expect("blocks")
		w.services.set(service("b", 80))
		w.expect("blocks")
		w.nodes.allow()
		w.settle()
		w.expect("default/a default/b")
	})
}

// TestStopBeforeSync: Run ends though nothing was ever listed.
func TestStopBeforeSync(t *testing.T) {
	run(t, func(w *world) {
		w.services.refuse, w.slices.refuse, w.pods.refuse, w.nodes.refuse = true, true, true, true
	}, func(w *world) { w.expect("blocks") })
}

// TestEmpty: nothing at all is in sync, too, and Next says so once.
func TestEmpty(t *testing.T) {
	run(t, func(*world) {}, func(w *world) {
		w.expect("")
		w.expect("blocks")
		w.services.set(service("a", 80))
		w.expect("default/a")
	})
}

func TestTrim(t *testing.T) {
	svc := service("a", 80)
	svc.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubectl"}}
	svc.Annotations = map[string]string{"kubectl.kubernetes.io/last-applied-configuration": "{}", "lbagent.io/algorithm": "maglev"}
	svc.Labels = map[string]string{"service.kubernetes.io/headless": ""}
	s := slice("a-1", "a", "10.0.0.1")
	s.Endpoints[0].TargetRef = &corev1.ObjectReference{Name: "p"}
	n := node("this", "z")
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.0.0.1"}}
	n.Status.Images = []corev1.ContainerImage{{Names: []string{"i"}}}
	p := pod("p", 8080)
	p.Labels = map[string]string{"app": "p"}
	p.Spec.NodeName = "this"
	p.Spec.ServiceAccountName = "s"
	p.Spec.Containers = []corev1.Container{{Name: "other", Image: "i"}, p.Spec.Containers[0], {Name: "last"}}
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}, HostIP: "192.0.2.1"}
	run(t, func(w *world) {
		w.pods.set(p)
		w.services.set(svc)
		w.slices.set(s)
		w.nodes.set(n)
	}, func(w *world) {
		gotSvc, gotSlices := w.objects.Service(Name{"default", "a"})
		wantSvc := service("a", 80)
		wantSvc.Labels = svc.Labels
		wantSvc.Annotations = map[string]string{"lbagent.io/algorithm": "maglev"}
		wantSlice := slice("a-1", "a", "10.0.0.1")
		wantNode := node("this", "z")
		wantNode.Status.Addresses = n.Status.Addresses
		wantPod := pod("p", 8080)
		wantPod.Spec.NodeName = "this"
		wantPod.Spec.Containers = []corev1.Container{{Name: "other"}, wantPod.Spec.Containers[0]}
		wantPod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: p.Status.PodIPs}
		for _, o := range []metav1.Object{wantSvc, wantSlice, wantNode, wantPod} {
			o.SetResourceVersion("1")
		}
		if diff := cmp.Diff(wantPod, w.objects.Pod(Name{"default", "p"})); diff != "" {
			t.Errorf("Pod (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(wantSvc, gotSvc); diff != "" {
			t.Errorf("Service (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(wantSlice, gotSlices[0]); diff != "" {
			t.Errorf("EndpointSlice (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(wantNode, w.objects.Node("this")); diff != "" {
			t.Errorf("Node (-want +got):\n%s", diff)
		}
	})
}

func TestNames(t *testing.T) {
	names := []Name{{"b", "a"}, {"a", "b"}, {"a", "a"}}
	slices.SortFunc(names, Name.Compare)
	if got := fmt.Sprint(names); got != "[a/a a/b b/a]" {
		t.Error(got)
	}
}
