// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// TestConflicts: several files claim one object. Each step puts files ("a" holds "x y", "-" is gone) and tells
// where the objects are in force after it, and which files are refused.
func TestConflicts(t *testing.T) {
	type step struct {
		files   map[string]string
		inForce string
		refused string
	}
	tests := []struct {
		name  string
		steps []step
	}{
		{"at the start the first by name", []step{
			{map[string]string{"b": "x", "a": "x xy", "c": "z x"}, "x=a xy=a", "b c"},
		}},
		{"what is in force stays", []step{
			{map[string]string{"b": "x"}, "x=b", ""},
			{map[string]string{"a": "x xy"}, "x=b", "a"},
			{map[string]string{"b": "x z"}, "x=b z=b", "a"},
		}},
		{"the next by name follows", []step{
			{map[string]string{"a": "x", "b": "x", "c": "x"}, "x=a", "b c"},
			{map[string]string{"a": "-"}, "x=b", "c"},
			{map[string]string{"b": "xy"}, "x=c xy=b", ""},
		}},
		{"an object moves", []step{
			{map[string]string{"a": "x xy", "b": "z"}, "x=a xy=a z=b", ""},
			{map[string]string{"a": "x", "b": "xy z"}, "x=a xy=b z=b", ""},
		}},
		{"an object moves, the new place first", []step{
			{map[string]string{"a": "x xy", "b": "z"}, "x=a xy=a z=b", ""},
			{map[string]string{"b": "xy z"}, "x=a xy=a z=b", "b"},
			{map[string]string{"a": "x"}, "x=a xy=b z=b", ""},
		}},
		{"two change places", []step{
			{map[string]string{"a": "x", "b": "xy"}, "x=a xy=b", ""},
			{map[string]string{"a": "xy", "b": "x"}, "x=b xy=a", ""},
		}},
		{"a renamed file", []step{
			{map[string]string{"a": "x xy"}, "x=a xy=a", ""},
			{map[string]string{"a": "-", "b": "x xy"}, "x=b xy=b", ""},
		}},
		{"a loser stays as it was and is in the way", []step{
			{map[string]string{"a": "x", "b": "xy", "c": "z"}, "x=a xy=b z=c", ""},
			{map[string]string{"b": "z", "a": "x xy"}, "x=a xy=b z=c", "a b"},
			{map[string]string{"c": "-"}, "x=a xy=a z=b", ""},
		}},
		{"lost to a loser", []step{
			{map[string]string{"b": "xy", "c": "w"}, "w=c xy=b", ""},
			{map[string]string{"a": "x w", "b": "x"}, "w=c x=b", "a"},
		}},
		{"lost to a loser that is in the way of the winner", []step{
			{map[string]string{"b": "xy"}, "xy=b", ""},
			{map[string]string{"a": "x xy", "b": "x"}, "x=b", "a"},
		}},
		{"a broken file keeps its objects", []step{
			{map[string]string{"a": "x"}, "x=a", ""},
			{map[string]string{"a": "!", "b": "x"}, "x=a", "a b"},
			{map[string]string{"a": "-"}, "x=b", ""},
		}},
		{"broken while refused", []step{
			{map[string]string{"a": "x", "b": "x"}, "x=a", "b"},
			{map[string]string{"b": "!"}, "x=a", "b"},
			{map[string]string{"a": "-"}, "", "b"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
			for i, step := range tt.steps {
				for path, holds := range step.files { // in any order
					switch holds {
					case "-":
						s.remove(path)
					case "!":
						s.put(contents(path, []byte("?"), nil))
					default:
						var docs []string
						for name := range strings.FieldsSeq(holds) {
							docs = append(docs, svc(name, 80))
						}
						s.put(contents(path, []byte(strings.Join(docs, "---\n")), nil))
					}
				}
				s.settle()
				var inForce []string
				for _, object := range slices.Sorted(maps.Keys(s.owners)) {
					if s.stores.of(object).objects[object] == nil {
						t.Errorf("step %d: %s is not in its store", i, object)
					}
					inForce = append(inForce, strings.TrimPrefix(object, "Service default/")+"="+s.owners[object].file.path)
				}
				if got := strings.Join(inForce, " "); got != step.inForce {
					t.Errorf("step %d: in force %s, want %s", i, got, step.inForce)
				}
				if n := len(s.stores.kinds[service].objects); n != len(inForce) {
					t.Errorf("step %d: %d objects in the store, %d in force", i, n, len(inForce))
				}
				refused := map[string]bool{}
				for _, p := range s.problems() {
					refused[p.File] = true
				}
				if got := strings.Join(slices.Sorted(maps.Keys(refused)), " "); got != step.refused {
					t.Errorf("step %d: refused %s, want %s:\n%s", i, got, step.refused, strings.Join(lines(s.problems()), "\n"))
				}
			}
		})
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), svc("a", 80)+"---\n"+svc("web", 80))
	write(t, filepath.Join(dir, "b.yaml"), svc("b", 80)+"---\n"+svc("web", 81))
	write(t, filepath.Join(dir, "c.txt"), svc("web", 0))
	empty := t.TempDir()
	tests := []struct {
		name  string
		paths []string
		want  []string
	}{
		{"good file", []string{dir + "/a.yaml"}, nil},
		{"a file twice", []string{dir + "/a.yaml", dir + "//a.yaml"}, nil},
		{"folder", []string{dir}, []string{
			dir + "/b.yaml: document 2: Service default/web: also in " + dir + "/a.yaml, document 2, which keeps it",
		}},
		{"file of any name", []string{dir + "/c.txt"}, []string{dir + "/c.txt: " + badPort}},
		{"nothing there", []string{dir + "/none"}, []string{dir + "/none: cannot be read: no such file or directory"}},
		{"empty folder", []string{empty}, []string{"warning: " + empty + ": holds no file that ends in .yaml, .yml or .json"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, lines(Validate(tt.paths...))); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// TestStrays: an EndpointSlice that belongs to no Service is in force and named, until there is one.
func TestStrays(t *testing.T) {
	s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
	slice := func(name, labels string) string {
		return "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: " + name + labels + "}\naddressType: IPv4\nendpoints: []\n"
	}
	s.put(contents("slices.yaml", []byte(slice("a", "")+"---\n"+slice("b", ", labels: {kubernetes.io/service-name: wbe}")+
		"---\n"+slice("c", ", labels: {kubernetes.io/service-name: web}")), nil))
	s.put(contents("web.yaml", []byte(svc("web", 80)), nil))
	const (
		unlabelled = "warning: slices.yaml: document 1: EndpointSlice default/a: metadata.labels: no label kubernetes.io/service-name: it belongs to no Service"
		misspelt   = "warning: slices.yaml: document 2: EndpointSlice default/b: metadata.labels: kubernetes.io/service-name: there is no Service default/wbe among the manifests"
		orphaned   = "warning: slices.yaml: document 3: EndpointSlice default/c: metadata.labels: kubernetes.io/service-name: there is no Service default/web among the manifests"
	)
	expect := func(want ...string) {
		t.Helper()
		s.settle()
		if diff := cmp.Diff(want, lines(s.problems())); diff != "" {
			t.Errorf("problems (-want +got):\n%s", diff)
		}
	}
	expect(unlabelled, misspelt)
	if n := len(s.stores.kinds[endpointSlice].objects); n != 3 {
		t.Errorf("%d EndpointSlices in force", n)
	}
	s.remove("web.yaml")
	expect(unlabelled, misspelt, orphaned)
	s.put(contents("web.yaml", []byte(svc("web", 80)+"---\n"+svc("wbe", 81)), nil))
	expect(unlabelled)
}

// TestStillness looks at times of its own choosing.
func TestStillness(t *testing.T) {
	dir := t.TempDir()
	const still = 100 * time.Millisecond
	f, err := open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler), still, time.Hour)
	must(t, err)
	start := time.Now()
	at := func(ms int, wantNext int, want string) {
		t.Helper()
		next := f.step(start.Add(time.Duration(ms) * time.Millisecond))
		got := -1
		if !next.IsZero() {
			got = int(next.Sub(start).Milliseconds())
		}
		state := (&fixture{Folder: f, t: t, dir: dir}).state()
		if got != wantNext || state != want {
			t.Fatalf("at %d ms: look again at %d, want %d; state %q, want %q", ms, got, wantNext, state, want)
		}
	}
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")

	at(0, -1, "")
	write(t, a, svc("a", 1))
	at(10, 110, "")
	write(t, a, svc("a", 22)) // before it was still
	at(50, 150, "")
	at(110, 150, "")
	at(150, -1, "a:22")

	// What is still waits for what is not.
	write(t, a, svc("a", 333))
	write(t, b, svc("b", 1))
	at(200, 300, "a:22")
	write(t, b, svc("b", 22))
	at(290, 390, "a:22")
	at(310, 390, "a:22")
	at(390, -1, "a:333 b:22")

	// Gone for a moment is not gone.
	must(t, os.Remove(a))
	at(400, 500, "a:333 b:22")
	write(t, a, svc("a", 4))
	at(450, 550, "a:333 b:22")
	at(550, -1, "a:4 b:22")
	must(t, os.Rename(a, a+".x"))
	at(560, 660, "a:4 b:22")
	must(t, os.Rename(a+".x", a))
	at(600, 700, "a:4 b:22") // its change time differs, so it is read again
	at(700, -1, "a:4 b:22")

	// One that never is still does not hold up the others for ever.
	write(t, a, svc("a", 5))
	now := 1000
	for ; now < 2000; now += 50 {
		write(t, b, svc("b", now))
		at(now, now+100, "a:4 b:22")
	}
	write(t, b, svc("b", now))
	at(now, now+100, "a:5 b:22")
	at(now+100, -1, "a:5 b:2000")
	must(t, os.Remove(a))
	at(now+110, now+210, "a:5 b:2000")
	at(now+210, -1, "b:2000")

	// It came and went between two looks, or before it was read.
	write(t, a, svc("a", 6))
	at(now+300, now+400, "b:2000")
	must(t, os.Remove(a))
	at(now+350, now+450, "b:2000")
	at(now+450, -1, "b:2000")
	if len(f.sights) != 1 || len(f.set.files) != 1 {
		t.Errorf("%d files are remembered, %d of them by content, want 1", len(f.sights), len(f.set.files))
	}
}

// TestOpenWaits: a file that is being written when the folder is opened is waited for, but not for ever.
func TestOpenWaits(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "web.yaml")
	stop, stopped := make(chan struct{}), make(chan struct{})
	write(t, file, svc("web", 0))
	go func() {
		defer close(stopped)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for i := 1; ; i++ {
			select {
			case <-tick.C:
				_ = os.WriteFile(file, []byte(svc("web", i)), 0o644)
			case <-stop:
				return
			}
		}
	}()
	// Stillness of 50 ms, so that a writer that is held up for a moment does not seem to have ended.
	f, err := open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler), 50*time.Millisecond, time.Hour)
	must(t, err)
	x := &fixture{Folder: f, t: t, dir: dir}
	if got, want := x.state(), "\nweb.yaml: not read yet: it does not stop changing\nheld: web.yaml"; got != want {
		t.Errorf("while it is written: %q, want %q", got, want)
	}
	close(stop)
	<-stopped
	write(t, file, svc("web", 80))
	f, err = open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler), 50*time.Millisecond, time.Hour)
	must(t, err)
	x = &fixture{Folder: f, t: t, dir: dir}
	if got, want := x.state(), "web:80"; got != want {
		t.Errorf("after it was written: %q, want %q", got, want)
	}
}

// TestStable: the same folder has the same identities at every start, whatever the order of its entries.
func TestStable(t *testing.T) {
	identities := func() (s []string) {
		dir := t.TempDir()
		for i := range 20 { // in map order
			for _, name := range map[int]string{0: "a", 1: "b", 2: "c"} {
				_ = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s%d.yaml", name, i)), []byte(svc(fmt.Sprintf("%s%d", name, i), 80)), 0o644)
			}
		}
		f, err := open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler), 0, time.Hour)
		must(t, err)
		for name, o := range f.set.stores.kinds[service].objects {
			s = append(s, fmt.Sprintln(name, o.GetUID(), o.GetResourceVersion()))
		}
		slices.Sort(s)
		return s
	}
	first := identities()
	if len(first) != 60 {
		t.Fatalf("%d objects", len(first))
	}
	if diff := cmp.Diff(first, identities()); diff != "" {
		t.Errorf("(-first +second):\n%s", diff)
	}
}

// TestReplacement: what takes the place of something is there before that goes.
func TestReplacement(t *testing.T) {
	s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
	apply := func(text string) {
		s.put(contents("a", []byte(text), nil))
		s.settle()
	}
	apply(svc("old", 1))
	apply(svc("young", 1))
	w, err := s.stores.kinds[service].Watch(metav1.ListOptions{})
	must(t, err)
	defer w.Stop()
	for _, want := range []string{"ADDED old", "ADDED young", "DELETED old"} {
		if got := next(t, w.ResultChan()); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// TestWatch: a watch that begins late misses nothing, and one that is too late is told so.
func TestWatch(t *testing.T) {
	s := newSet(DefaultNodePorts, slog.New(slog.DiscardHandler))
	apply := func(path, text string) {
		s.put(contents(path, []byte(text), nil))
		s.settle()
	}
	apply("a", svc("a", 1))
	apply("node", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
	store := s.stores.kinds[service]
	apply("a", svc("a", 2))
	apply("a", svc("a", 2)+"\n") // no change
	apply("b", svc("b", 1))
	s.remove("a")
	s.settle()

	w, err := store.Watch(metav1.ListOptions{ResourceVersion: "1"})
	must(t, err)
	for _, want := range []string{"MODIFIED a 3", "ADDED b 4", "DELETED a 5"} {
		e := <-w.ResultChan()
		o := e.Object.(object)
		if got := fmt.Sprintf("%s %s %s", e.Type, o.GetName(), o.GetResourceVersion()); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		o.SetLabels(map[string]string{"mine": "yes"}) // a watcher may write to what it got
	}
	apply("c", svc("c", 1))
	if e := <-w.ResultChan(); e.Type != watch.Added || e.Object.(object).GetName() != "c" {
		t.Errorf("got %s", e.Type)
	}
	if labels := store.objects["Service default/b"].GetLabels(); labels != nil {
		t.Errorf("a watcher wrote to the store: %v", labels)
	}
	w.Stop()
	w.Stop()
	if _, open := <-w.ResultChan(); open {
		t.Error("stopped, but not closed")
	}

	for i := range 3 * minHistory {
		apply("c", svc("c", i+1))
	}
	if n := len(store.history); n > 2*minHistory {
		t.Errorf("%d changes are kept", n)
	}
	w, err = store.Watch(metav1.ListOptions{ResourceVersion: "5"})
	must(t, err)
	e := <-w.ResultChan()
	if status, ok := e.Object.(*metav1.Status); e.Type != watch.Error || !ok || status.Reason != metav1.StatusReasonExpired {
		t.Errorf("got %s %v, want that the version has expired", e.Type, e.Object)
	}
	if _, open := <-w.ResultChan(); open {
		t.Error("expired, but not closed")
	}
	if _, err := store.Watch(metav1.ListOptions{ResourceVersion: "x"}); err == nil {
		t.Error("a version that is no number is accepted")
	}
}
