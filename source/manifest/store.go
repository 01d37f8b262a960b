// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// minHistory is how many past changes of a kind are kept at least. A watcher that is further behind lists
// again.
const minHistory = 1024

// stores holds the objects in force, one store for each kind.
type stores struct {
	clock *versions
	kinds map[kind]*store
}

// versions is the resourceVersion of the folder as a whole, and its lock.
type versions struct {
	mu   sync.Mutex
	last uint64
}

// store is the objects of one kind and their changes of late. It lists and watches for client-go.
type store struct {
	clock   *versions
	objects map[string]object // "Service default/web" -> object
	history []change          // in order of version
	forgot  uint64            // the latest version that is in history no more
	changed chan struct{}     // closed and replaced at a change
	dirty   bool              // changed since it was last closed
}

// change is a change of one object. The object is never written to again.
type change struct {
	version uint64
	kind    watch.EventType
	object  object
}

func newStores() stores {
	s := stores{clock: &versions{}, kinds: map[kind]*store{}}
	for _, k := range []kind{service, endpointSlice, node, pod, endpoints} {
		s.kinds[k] = &store{clock: s.clock, objects: map[string]object{}, changed: make(chan struct{})}
	}
	return s
}

// of returns the store that an object of this name belongs to.
func (s stores) of(name string) *store {
	k, _, _ := strings.Cut(name, " ")
	return s.kinds[kind(k)]
}

// put adds or replaces an object; the same object again is no change.
func (s stores) put(d decoded) {
	store := s.of(d.name)
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()

	o := d.object
	if o.GetUID() == "" {
		o.SetUID(uidOf(d.name))
	}
	old := store.objects[d.name]
	if old == nil {
		store.add(watch.Added, o)
	} else {
		o.SetResourceVersion(old.GetResourceVersion())
		if equality.Semantic.DeepEqual(o, old) {
			return
		}
		store.add(watch.Modified, o)
	}
	store.objects[d.name] = o
}

// remove removes an object.
func (s stores) remove(name string) {
	store := s.of(name)
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()

	// Watchers learn the version of the deletion from the object, and the stored one is not written to.
	store.add(watch.Deleted, store.objects[name].DeepCopyObject().(object))
	delete(store.objects, name)
}

// announce wakes watchers, once for many changes.
func (s stores) announce() {
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	for _, store := range s.kinds {
		if store.dirty {
			close(store.changed)
			store.changed, store.dirty = make(chan struct{}), false
		}
	}
}

// latest returns the version of the latest change of each of some kinds, 0 where there was none.
func (s stores) latest(kinds ...kind) []uint64 {
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	versions := make([]uint64, len(kinds))
	for i, k := range kinds {
		if h := s.kinds[k].history; len(h) > 0 {
			versions[i] = h[len(h)-1].version
		}
	}
	return versions
}

// add appends to the history and gives the object its version.
func (s *store) add(kind watch.EventType, o object) {
	s.clock.last++
	o.SetResourceVersion(strconv.FormatUint(s.clock.last, 10))
	s.history = append(s.history, change{s.clock.last, kind, o})
	s.dirty = true
	if keep := max(minHistory, len(s.objects)); len(s.history) > 2*keep {
		cut := len(s.history) - keep
		s.forgot = s.history[cut-1].version
		s.history = slices.Clone(s.history[cut:])
	}
}

// uidOf makes a UID of a name, the same at every start.
func uidOf(name string) types.UID {
	h := sha256.Sum256([]byte(name))
	return types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16]))
}

// List returns all objects.
func (s *store) List(metav1.ListOptions) (runtime.Object, error) {
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	list := &corev1.List{ListMeta: metav1.ListMeta{ResourceVersion: strconv.FormatUint(s.clock.last, 10)}}
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		// An informer may change what it is given.
		list.Items = append(list.Items, runtime.RawExtension{Object: s.objects[name].DeepCopyObject()})
	}
	return list, nil
}

// Watch sends what changed after the version that the options name.
func (s *store) Watch(options metav1.ListOptions) (watch.Interface, error) {
	version, err := strconv.ParseUint(cmp.Or(options.ResourceVersion, "0"), 10, 64)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("resource version %q is not a number", options.ResourceVersion))
	}
	w := &watcher{store: s, events: make(chan watch.Event), stop: make(chan struct{})}
	go w.run(version)
	return w, nil
}

// IsWatchListSemanticsUnSupported tells client-go to list before it watches. It spells the name so.
func (s *store) IsWatchListSemanticsUnSupported() bool { return true }

// since returns the changes after a version, and a channel that is closed when there are more. It returns
// false if not all of them are known any more.
func (s *store) since(version uint64) ([]change, <-chan struct{}, bool) {
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	first, _ := slices.BinarySearchFunc(s.history, version+1, func(c change, v uint64) int { return cmp.Compare(c.version, v) })
	return slices.Clone(s.history[first:]), s.changed, version >= s.forgot
}

// watcher is one watch of one store; whoever began it stops it.
type watcher struct {
	store  *store
	events chan watch.Event
	once   sync.Once
	stop   chan struct{}
}

func (w *watcher) ResultChan() <-chan watch.Event { return w.events }

func (w *watcher) Stop() { w.once.Do(func() { close(w.stop) }) }

func (w *watcher) run(version uint64) {
	defer close(w.events)
	for {
		changes, more, ok := w.store.since(version)
		if !ok {
			expired := apierrors.NewResourceExpired(fmt.Sprintf("changes since version %d are not kept", version)).Status()
			w.send(watch.Event{Type: watch.Error, Object: &expired})
			return
		}
		for _, c := range changes {
			if !w.send(watch.Event{Type: c.kind, Object: c.object.DeepCopyObject()}) {
				return
			}
			version = c.version
		}
		select {
		case <-more:
		case <-w.stop:
			return
		}
	}
}

func (w *watcher) send(e watch.Event) bool {
	select {
	case w.events <- e:
		return true
	case <-w.stop:
		return false
	}
}
