// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a folder that is followed. It is not polled, so what it learns it learned from events.
type fixture struct {
	*Folder
	t   *testing.T
	dir string
}

// follow opens and follows a folder.
func follow(t *testing.T, dir string) *fixture {
	t.Helper()
	return followAt(t, dir, 20*time.Millisecond, time.Hour)
}

// followSlowly is for tests that must write twice within the time of being still, on a busy machine too.
func followSlowly(t *testing.T, dir string) *fixture {
	t.Helper()
	return followAt(t, dir, still, time.Hour)
}

func followAt(t *testing.T, dir string, still, poll time.Duration) *fixture {
	t.Helper()
	f, err := open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler), still, poll)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &fixture{Folder: f, t: t, dir: dir}
}

// ports is the Services in force with their ports: "a:80 web:81".
func (f *fixture) ports() string {
	f.t.Helper()
	list, err := f.set.stores.kinds[service].List(metav1.ListOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	var s []string
	for _, item := range list.(*corev1.List).Items {
		svc := item.Object.(*corev1.Service)
		s = append(s, fmt.Sprintf("%s:%d", svc.Name, svc.Spec.Ports[0].Port))
	}
	return strings.Join(s, " ")
}

// state is what is in force, and after it a line for each problem and held file.
func (f *fixture) state() string {
	f.t.Helper()
	s := append([]string{f.ports()}, lines(f.Problems())...)
	for _, h := range f.Held() {
		s = append(s, "held: "+h)
	}
	return strings.ReplaceAll(strings.Join(s, "\n"), f.dir+"/", "")
}

// await waits until the state is the one wanted.
func (f *fixture) await(want ...string) {
	f.t.Helper()
	await(f.t, strings.Join(want, "\n"), f.state)
}

func await(t *testing.T, want string, got func() string) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(10 * time.Second)
	for got() != want {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("after 10 s (-want +got):\n%s", cmp.Diff(want, got()))
		}
	}
}

// events collects the events of a watch from now on.
func (f *fixture) events(lw *store) <-chan watch.Event {
	f.t.Helper()
	list, err := lw.List(metav1.ListOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	w, err := lw.Watch(metav1.ListOptions{ResourceVersion: list.(*corev1.List).ResourceVersion})
	if err != nil {
		f.t.Fatal(err)
	}
	events := make(chan watch.Event, 10000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			events <- e
		}
	}()
	f.t.Cleanup(func() {
		w.Stop()
		<-done
	})
	return events
}

// next is the next event: "MODIFIED web".
func next(t *testing.T, events <-chan watch.Event) string {
	t.Helper()
	select {
	case e := <-events:
		return fmt.Sprintf("%s %s", e.Type, e.Object.(object).GetName())
	case <-time.After(10 * time.Second):
		t.Fatal("no event for 10 s")
		return ""
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// svc is a manifest of one Service.
func svc(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {ports: [{port: %d}]}\n", name, port)
}

const badPort = "document 1: Service default/web: spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive"

func TestOpenMissingFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	_, err := Open(dir, DefaultNodePorts, slog.New(slog.DiscardHandler))
	if want := "open folder of manifests: open " + dir + ": no such file or directory"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	file := filepath.Join(t.TempDir(), "a.yaml")
	write(t, file, svc("a", 80))
	if _, err := Open(file, DefaultNodePorts, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("got %v, want that it is not a directory", err)
	}
}

func TestWhichFilesCount(t *testing.T) {
	dir := t.TempDir()
	for i, name := range []string{"a.yaml", "b.yml", "c.json", ".d.yaml", "e.yaml~", "f.yaml.swp", "#g.yaml#", "h.txt", "i", "sub/j.yaml"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		text := svc(string(rune('a'+i)), 80)
		if strings.HasSuffix(name, ".json") {
			text = `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"ports": [{"port": 80}]}}`
		}
		write(t, filepath.Join(dir, name), text)
	}
	follow(t, dir).await("a:80 b:80 c:80")
}

// TestBadFile: whatever is wrong with a file, it is said, and what the file held last stays in force until it
// is mended or deleted.
func TestBadFile(t *testing.T) {
	large := make([]byte, 10<<20)
	for i := range large {
		large[i] = '#'
	}
	tests := []struct {
		name, text, want string
	}{
		{"port 0", svc("web", 0), badPort},
		{"empty", "", "empty: to remove its objects delete the file"},
		{"binary", "\x00\x01", "not a text file: byte 0 at offset 0"},
		{"cut", svc("web", 80)[:60], "document 1: does not parse: line 4: did not find expected ',' or '}'"},
		{"large", string(large), "too large: 10485760 bytes, at most 8388608 are read"},
		{"unknown field", svc("web", 80) + "sepc: {}\n", "document 1: Service default/web: sepc: unknown field"},
		{"unknown kind", "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n", "document 1: Secret s: Secret of v1 is not read, " +
			"only v1 Service, Pod, Node and Endpoints, discovery.k8s.io/v1 EndpointSlice, and lists of them"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := filepath.Join(dir, "web.yaml")
			write(t, file, svc("web", 80))
			write(t, filepath.Join(dir, "other.yaml"), svc("other", 1))
			f := follow(t, dir)
			f.await("other:1 web:80")

			write(t, file, tt.text)
			f.await("other:1 web:80", "web.yaml: "+tt.want)
			write(t, file, svc("web", 81))
			f.await("other:1 web:81")
			write(t, file, tt.text)
			f.await("other:1 web:81", "web.yaml: "+tt.want)
			must(t, os.Remove(file))
			f.await("other:1")

			// A file that comes while we run was not there before, so nothing is held for it.
			write(t, file, tt.text)
			f.await("other:1", "web.yaml: "+tt.want)

			// At the next start it is not known what it held.
			again := follow(t, dir)
			again.await("other:1", "web.yaml: "+tt.want, "held: web.yaml")
			write(t, file, svc("web", 82))
			again.await("other:1 web:82")
			write(t, file, tt.text)
			again.await("other:1 web:82", "web.yaml: "+tt.want)

			third := follow(t, dir)
			third.await("other:1", "web.yaml: "+tt.want, "held: web.yaml")
			must(t, os.Remove(file))
			third.await("other:1")
		})
	}
}

func TestUnreadableFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Symlink("nothing", filepath.Join(dir, "link.yaml")))
	must(t, os.Mkdir(filepath.Join(dir, "folder.yaml"), 0o755))
	f := follow(t, dir)
	f.await("", "folder.yaml: not a regular file", "link.yaml: cannot be read: no such file or directory",
		"held: folder.yaml", "held: link.yaml")
	write(t, filepath.Join(dir, "nothing"), svc("web", 80))
	must(t, os.Remove(filepath.Join(dir, "folder.yaml")))
	f.await("web:80")
}

// TestUnreadForNow: that a file could not be read is no reason never to try again. What stands in the way here,
// a lease as file servers take them, leaves no trace on the file when it ends.
func TestUnreadForNow(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "web.yaml")
	write(t, path, svc("web", 80))
	holder, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer holder.Close()
	_, err = unix.FcntlInt(holder.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	must(t, err)
	f := followAt(t, dir, 20*time.Millisecond, 50*time.Millisecond)
	f.await("", "web.yaml: cannot be read: resource temporarily unavailable", "held: web.yaml")
	holder.Close()
	f.await("web:80")
}

// TestConfigMap swaps files as the kubelet does in the volume of a ConfigMap.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	swap := func(version string, files map[string]string) {
		data := "..2026_" + version
		must(t, os.Mkdir(filepath.Join(dir, data), 0o755))
		for name, text := range files {
			write(t, filepath.Join(dir, data, name), text)
		}
		must(t, os.Symlink(data, filepath.Join(dir, "..data_tmp")))
		old, _ := os.Readlink(filepath.Join(dir, "..data"))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		for name := range files {
			if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
				t.Fatal(err)
			}
		}
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, e := range entries {
			if _, ok := files[e.Name()]; !ok && !strings.HasPrefix(e.Name(), "..") {
				must(t, os.Remove(filepath.Join(dir, e.Name())))
			}
		}
		if old != "" {
			must(t, os.RemoveAll(filepath.Join(dir, old)))
		}
	}
	swap("1", map[string]string{"web.yaml": svc("web", 80)})
	f := followSlowly(t, dir)
	f.await("web:80")
	swap("2", map[string]string{"web.yaml": svc("web", 81)})
	f.await("web:81")
	swap("3", map[string]string{"web.yaml": svc("web", 0), "b.yaml": svc("b", 1)})
	f.await("b:1 web:81", "web.yaml: "+badPort)
	swap("4", map[string]string{"web.yaml": svc("web", 82), "b.yaml": svc("b", 1)})
	f.await("b:1 web:82")
	// The objects move to other files, and one file goes: no object may seem to be gone meanwhile.
	events := f.events(f.set.stores.kinds[service])
	swap("5", map[string]string{"web.yaml": svc("b", 2) + "---\n" + svc("c", 3), "c.yaml": svc("web", 82)})
	f.await("b:2 c:3 web:82")
	if got := []string{next(t, events), next(t, events)}; !slices.Equal(got, []string{"MODIFIED b", "ADDED c"}) {
		t.Errorf("events %v", got)
	}
	if len(events) > 0 {
		t.Errorf("and %s", next(t, events))
	}
}

// TestEditors: the ways in which programs replace files. None of them removes the object for a moment.
func TestEditors(t *testing.T) {
	ways := map[string]func(t *testing.T, file, text string){
		"written in place": write,
		"renamed over": func(t *testing.T, file, text string) {
			write(t, file+".tmp", text)
			must(t, os.Rename(file+".tmp", file))
		},
		"moved away and written anew": func(t *testing.T, file, text string) {
			must(t, os.Rename(file, file+"~"))
			write(t, file, text)
		},
		"deleted and written anew": func(t *testing.T, file, text string) {
			must(t, os.Remove(file))
			write(t, file, text)
		},
		"under another name": func(t *testing.T, file, text string) {
			write(t, file, text)
			must(t, os.Rename(file, filepath.Join(filepath.Dir(file), fmt.Sprint(len(text), ".yaml"))))
		},
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := filepath.Join(dir, "web.yaml")
			write(t, file, svc("web", 80))
			f := followSlowly(t, dir)
			events := f.events(f.set.stores.kinds[service])
			way(t, file, svc("web", 8081))
			f.await("web:8081")
			if got := next(t, events); got != "MODIFIED web" || len(events) > 0 {
				t.Errorf("first event %s, %d more", got, len(events))
			}
		})
	}
}

// TestRenamedWhileBroken: another name is no end of what a file had in force, or may have had at the last run.
func TestRenamedWhileBroken(t *testing.T) {
	for _, to := range []string{"a.yaml", "z.yaml"} {
		t.Run(to, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file, renamed := filepath.Join(dir, "web.yaml"), filepath.Join(dir, to)
			write(t, file, svc("web", 80))
			f := followSlowly(t, dir)
			f.await("web:80")
			write(t, file, svc("web", 0))
			must(t, os.Rename(file, renamed)) // while it is running
			f.await("web:80", to+": "+badPort)
			if file, document := f.FileOf("Service default/web"); file != renamed || document != 1 {
				t.Errorf("web is in %s, document %d", file, document)
			}
			must(t, os.Rename(renamed, file))
			f.await("web:80", "web.yaml: "+badPort)

			again := followSlowly(t, dir) // at the start
			again.await("", "web.yaml: "+badPort, "held: web.yaml")
			must(t, os.Rename(file, renamed))
			again.await("", to+": "+badPort, "held: "+to)

			write(t, renamed, svc("web", 81))
			f.await("web:81")
			again.await("web:81")
			must(t, os.Remove(renamed))
			f.await("")
			again.await("")
		})
	}
}

// TestWrittenInPieces: a file that is being written is read when it is complete, though parts of it parse.
func TestWrittenInPieces(t *testing.T) {
	dir := t.TempDir()
	f := followSlowly(t, dir)
	events := f.events(f.set.stores.kinds[service])
	text := svc("a", 80) + "---\n" + svc("b", 80) + "---\n" + svc("c", 8080)
	file, err := os.Create(filepath.Join(dir, "web.yaml"))
	must(t, err)
	defer file.Close()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for chunk := range slices.Chunk([]byte(text), 5) {
		_, err := file.Write(chunk)
		must(t, err)
		<-tick.C
	}
	f.await("a:80 b:80 c:8080")
	for _, want := range []string{"ADDED a", "ADDED b", "ADDED c"} {
		if got := next(t, events); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if len(events) > 0 {
		t.Errorf("and %s", next(t, events))
	}
}

// TestOneOfManyChanges: 1000 Services in 100 files, one edited.
func TestOneOfManyChanges(t *testing.T) {
	dir := t.TempDir()
	text := func(file, port int) string {
		var docs []string
		for i := range 10 {
			docs = append(docs, svc(fmt.Sprintf("s%03d", file*10+i), port+i))
		}
		return strings.Join(docs, "---\n")
	}
	for i := range 100 {
		write(t, filepath.Join(dir, fmt.Sprintf("%02d.yaml", i)), text(i, 80))
	}
	f := follow(t, dir)
	list, err := f.set.stores.kinds[service].List(metav1.ListOptions{})
	must(t, err)
	if n := len(list.(*corev1.List).Items); n != 1000 {
		t.Fatalf("%d Services, want 1000", n)
	}
	events := f.events(f.set.stores.kinds[service])
	write(t, filepath.Join(dir, "42.yaml"), strings.Replace(text(42, 80), "port: 83", "port: 9999", 1))
	e := <-events
	if got := e.Object.(*corev1.Service); e.Type != watch.Modified || got.Name != "s423" || got.Spec.Ports[0].Port != 9999 {
		t.Errorf("%s %s", e.Type, got.Name)
	}
	// The next change is the next event: nothing else came of the first.
	write(t, filepath.Join(dir, "zz.yaml"), svc("zz", 1))
	if got := next(t, events); got != "ADDED zz" {
		t.Errorf("then %s", got)
	}
}

func TestFolderReplaced(t *testing.T) {
	ways := map[string]func(t *testing.T, dir, fresh string){
		"renamed": func(t *testing.T, dir, fresh string) {
			must(t, os.Rename(dir, dir+"-old"))
			must(t, os.Rename(fresh, dir))
		},
		"deleted": func(t *testing.T, dir, fresh string) {
			must(t, os.RemoveAll(dir))
			must(t, os.Rename(fresh, dir))
		},
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			dir, fresh := filepath.Join(parent, "m"), filepath.Join(parent, "fresh")
			must(t, os.Mkdir(dir, 0o755))
			must(t, os.Mkdir(fresh, 0o755))
			write(t, filepath.Join(dir, "web.yaml"), svc("web", 80))
			write(t, filepath.Join(dir, "old.yaml"), svc("old", 80))
			write(t, filepath.Join(fresh, "web.yaml"), svc("web", 81))
			f := follow(t, dir)
			f.await("old:80 web:80")
			way(t, dir, fresh)
			f.await("web:81")
			write(t, filepath.Join(dir, "web.yaml"), svc("web", 8082)) // the new folder is followed
			f.await("web:8082")
		})
	}
	t.Run("by a link", func(t *testing.T) {
		parent := t.TempDir()
		for i, name := range []string{"1", "2"} {
			must(t, os.Mkdir(filepath.Join(parent, name), 0o755))
			write(t, filepath.Join(parent, name, "web.yaml"), svc("web", 81+i))
		}
		dir := filepath.Join(parent, "current")
		must(t, os.Symlink("1", dir))
		f := follow(t, dir)
		f.await("web:81")
		must(t, os.Symlink("2", dir+".tmp"))
		must(t, os.Rename(dir+".tmp", dir))
		f.await("web:82")
		write(t, filepath.Join(parent, "2", "web.yaml"), svc("web", 8083))
		f.await("web:8083")
	})
}

// TestFolderGone: a folder that cannot be listed removes nothing.
func TestFolderGone(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "m")
	must(t, os.Mkdir(dir, 0o755))
	write(t, filepath.Join(dir, "web.yaml"), svc("web", 80))
	f := follow(t, dir)
	must(t, os.Rename(dir, dir+"-gone"))
	f.await("web:80", dir+": cannot be read: no such file or directory")
	must(t, os.Rename(dir+"-gone", dir))
	f.await("web:80")
	write(t, filepath.Join(dir, "web.yaml"), svc("web", 8081))
	f.await("web:8081")
}

// TestPoll: a change that makes no event in the folder is found all the same.
func TestPoll(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "web")
	write(t, elsewhere, svc("web", 80))
	must(t, os.Symlink(elsewhere, filepath.Join(dir, "web.yaml")))
	f := followAt(t, dir, 20*time.Millisecond, 50*time.Millisecond)
	f.await("web:80")
	write(t, elsewhere, svc("web", 8081))
	f.await("web:8081")
	must(t, os.Remove(elsewhere))
	f.await("web:8081", "web.yaml: cannot be read: no such file or directory")
}

func TestFileOf(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), svc("a", 80)+"---\n"+svc("b", 80))
	write(t, filepath.Join(dir, "b.yaml"), svc("c", 0))
	f := follow(t, dir)
	for object, want := range map[string]string{
		"Service default/a": filepath.Join(dir, "a.yaml") + " 1",
		"Service default/b": filepath.Join(dir, "a.yaml") + " 2",
		"Service default/c": " 0", // not in force
	} {
		file, document := f.FileOf(object)
		if got := fmt.Sprint(file, " ", document); got != want {
			t.Errorf("%s: got %q, want %q", object, got, want)
		}
	}
}

// TestTold: a problem is logged once, and its end, and who waits for changes learns of both.
func TestTold(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "web.yaml")
	write(t, file, svc("web", 0))
	log := &strings.Builder{}
	f, err := open(dir, DefaultNodePorts, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	})), 0, time.Hour)
	must(t, err)
	changed := f.Changed()
	for _, text := range []string{svc("web", 0) + "\n", svc("web", 80), svc("web", 81)} {
		write(t, file, text)
		f.step(time.Now())
	}
	select {
	case <-changed:
	default:
		t.Error("the change was not told")
	}
	want := `level=ERROR msg="manifest problem" problem="` + file + ": " + badPort + "\"\n" +
		`level=INFO msg="manifest problem is gone" file=` + file + "\n"
	if diff := cmp.Diff(want, log.String()); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}
