// SPDX-License-Identifier: Apache-2.0

package source

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestCurrent: what a watch has not told of yet is not current, whether it came, changed or went.
func TestCurrent(t *testing.T) {
	run(t, func(w *world) {
		w.services.set(service("a", 80))
		w.slices.set(slice("a-1", "a", "10.0.0.1"))
		w.pods.set(pod("p", 8080))
		w.pods.set(pod("q", 0))
	}, func(w *world) {
		expect := func(want ...Name) {
			t.Helper()
			all, current, err := w.objects.Current(t.Context())
			wanted := Dirty{Services: want, Pods: []Name{{"default", "p"}}, Node: true}
			if err != nil || current != (want != nil) || current && !cmp.Equal(all, wanted) {
				t.Errorf("Current() = %v, %v, %v; want %v", all, current, err, want)
			}
		}
		a := Name{"default", "a"}
		w.settle()
		expect(a)
		w.mute(w.services, func() { w.services.set(service("b", 80)) })
		expect()
		w.mute(w.services, func() { w.services.remove("default/b") })
		expect(a)
		w.mute(w.pods, func() { w.pods.set(pod("r", 0)) })
		expect()
		w.mute(w.pods, func() { w.pods.remove("default/r") })
		expect(a)
		w.mute(w.slices, func() { w.slices.set(slice("a-1", "a", "10.0.0.2")) })
		expect()
		w.mute(w.slices, func() { w.slices.remove("default/a-1") })
		expect()
		w.nodes.refuse = true
		if _, current, err := w.objects.Current(t.Context()); current || err != nil {
			t.Errorf("%v, %v: the slices are not current, the nodes are not asked", current, err)
		}
	})
}

// mute makes a change of which no watch tells.
func (w *world) mute(s *server, change func()) {
	watches := s.watches
	s.watches = nil
	change()
	s.watches = watches
}
