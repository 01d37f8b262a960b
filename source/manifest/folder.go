// SPDX-License-Identifier: Apache-2.0

// Package manifest reads Kubernetes objects from the manifests in a folder, follows the folder, and serves
// what it holds to client-go as an API server would.
//
// Files whose names end in .yaml, .yml or .json count, in the folder itself, unless the name begins with a
// dot. A file is read once it has been still for a moment, and it is all or nothing: one that cannot be read
// in full, or that is empty, keeps what it held last in force. To remove its objects, delete it.
package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/client-go/tools/cache"

	"github.com/lbagent/lbagent/lb"
)

const (
	// still is how long a file must not change before it is read: a half-written one may parse.
	still = 200 * time.Millisecond
	// poll is how often the folder is looked at without an event: network file systems send none.
	poll = 30 * time.Second
	// patience, in times of still, is how long what is still waits for what is not.
	patience = 10
)

// Folder is a folder of manifests. Its methods may be called at any time, Run once.
type Folder struct {
	dir         string
	absolute    string
	still, poll time.Duration
	sights      map[string]*sight // by file name; of Run alone

	mu      sync.Mutex
	set     *set
	broken  error         // why the folder cannot be listed
	changed chan struct{} // closed and replaced when Problems or Held change
}

// Open reads the folder once, so that the first lists are complete. It waits for a file that was changed just
// now to be still; one that does not become so within some seconds counts as not known, see [Folder.Held].
func Open(dir string, nodePorts PortRange, log *slog.Logger) (*Folder, error) {
	return open(dir, nodePorts, log, still, poll)
}

func open(dir string, nodePorts PortRange, log *slog.Logger, still, poll time.Duration) (*Folder, error) {
	absolute, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open folder of manifests: %w", err)
	}
	f := &Folder{
		dir: dir, absolute: absolute, still: still, poll: poll,
		sights: map[string]*sight{}, set: newSet(nodePorts, log), changed: make(chan struct{}),
	}
	names, err := list(dir)
	if err != nil {
		return nil, fmt.Errorf("open folder of manifests: %w", err)
	}
	for _, name := range names {
		f.set.file(f.path(name)).unknown = true
		// A file that was last written long ago is still. The clock of a file server may be ahead of ours.
		print := look(f.path(name))
		since := time.Unix(0, print.modified)
		if now := time.Now(); since.After(now) {
			since = now
		}
		f.sights[name] = &sight{print: print, since: since}
	}
	start := time.Now()
	for now := start; ; now = time.Now() {
		next := f.step(now)
		if next.IsZero() || now.Sub(start) >= patience*still {
			return f, nil
		}
		<-time.After(time.Until(next))
	}
}

// Run follows the folder until ctx ends; it returns nil then.
func (f *Folder) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil { // the host may be out of inotify instances
		f.set.log.Warn("folder of manifests is not watched, only looked at now and then", "interval", f.poll, "error", err)
		watcher = &fsnotify.Watcher{} // its channels are nil: no events
	} else {
		defer watcher.Close()
	}

	at := time.Now() // of the next look
	timer := time.NewTimer(0)
	defer timer.Stop()
	look := func(t time.Time) {
		at = t
		timer.Reset(time.Until(t))
	}
	watched := fingerprint{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watch folder of manifests: the watcher has ended")
			}
			if filepath.Dir(e.Name) != f.absolute && e.Name != f.absolute {
				continue // a neighbour of the folder
			}
			if e.Name == f.absolute {
				watched = fingerprint{}
			}
			if soon := time.Now().Add(f.still / 4); soon.Before(at) { // many events, one look
				look(soon)
			}
		case err, ok := <-watcher.Errors: // events may have been lost
			if ok {
				f.set.log.Warn("watching the folder of manifests stumbled", "error", err)
				look(time.Now())
			}
		case <-timer.C:
			if watcher.Events != nil {
				watched = f.watch(watcher, watched)
			}
			next := time.Now().Add(f.poll)
			if due := f.step(time.Now()); !due.IsZero() && due.Before(next) {
				next = due
			}
			look(next)
		}
	}
}

// watch sees to it that the folder itself is watched, not one that had its name before, and its parent, where
// its replacement shows.
func (f *Folder) watch(watcher *fsnotify.Watcher, watched fingerprint) fingerprint {
	now := look(f.absolute)
	if now.device == watched.device && now.inode == watched.inode && slices.Contains(watcher.WatchList(), f.absolute) {
		return watched
	}
	_ = watcher.Remove(f.absolute)
	for _, path := range []string{filepath.Dir(f.absolute), f.absolute} {
		// What cannot be watched is polled; that the folder is not there is told by step.
		if err := watcher.Add(path); err != nil && !os.IsNotExist(err) {
			f.set.log.Warn("folder of manifests is not watched, only looked at now and then", "interval", f.poll, "error", err)
		}
	}
	return now
}

// Services lists and watches the Services in force. Each of these may be used by several informers.
func (f *Folder) Services() cache.ListerWatcher { return f.set.stores.kinds[service] }

// EndpointSlices lists and watches the EndpointSlices in force.
func (f *Folder) EndpointSlices() cache.ListerWatcher { return f.set.stores.kinds[endpointSlice] }

// Pods lists and watches the Pods in force.
func (f *Folder) Pods() cache.ListerWatcher { return f.set.stores.kinds[pod] }

// Nodes lists and watches the Nodes in force.
func (f *Folder) Nodes() cache.ListerWatcher { return f.set.stores.kinds[node] }

// Latest returns the resourceVersions of the latest changes of Services, EndpointSlices, Pods and Nodes. What is put
// in force together is in it all or not at all.
func (f *Folder) Latest() [4]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return [4]uint64(f.set.stores.latest(service, endpointSlice, pod, node))
}

// Problems returns all that is wrong with the manifests now, by file.
func (f *Folder) Problems() []lb.Problem {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problems()
}

func (f *Folder) problems() []lb.Problem {
	problems := f.set.problems()
	if f.broken != nil {
		problems = append([]lb.Problem{{File: f.dir, Message: unread(f.broken)}}, problems...)
	}
	return problems
}

// Held returns the files that were there when the folder was opened and have not been good since. What they
// held before is not known, so while there are any, nothing that an earlier run put in place may be removed.
func (f *Folder) Held() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set.unknown()
}

// Changed returns a channel that is closed when Problems or Held change. Ask for it before them.
func (f *Folder) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// FileOf returns where an object that is in force ("Service default/web") stands, "" if it is not.
func (f *Folder) FileOf(object string) (file string, document int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p, ok := f.set.owners[object]; ok {
		return p.file.path, p.document
	}
	return "", 0
}

func (f *Folder) path(name string) string { return filepath.Join(f.dir, name) }

// sight is what was seen of a file.
type sight struct {
	print   fingerprint
	since   time.Time   // print has not changed since
	read    fingerprint // of what was read last
	pending time.Time   // when it was first seen to differ from what was read; zero if it does not
}

// step looks at the folder, reads what has changed and is still, and returns when to look again, zero if
// there is no hurry. All that changed is taken in together once all of it is still: an object may move from
// one file to another, a file may be renamed. What does not become still is not waited for for ever.
func (f *Folder) step(now time.Time) (next time.Time) {
	names, err := list(f.dir)
	if err != nil { // nothing is known to be gone
		f.settle(err)
		return time.Time{}
	}
	for _, name := range names {
		if f.sights[name] == nil {
			f.sights[name] = &sight{since: now}
		}
	}

	var ready []string
	latest, impatient := time.Time{}, false
	for name, s := range f.sights {
		if p := look(f.path(name)); p != s.print {
			s.print, s.since = p, now
		}
		if s.print == s.read && s.print != (fingerprint{}) {
			s.pending = time.Time{}
			continue
		}
		if s.pending.IsZero() {
			s.pending = now
		}
		if due := s.since.Add(f.still); due.After(now) {
			latest = later(latest, due)
			continue
		}
		ready = append(ready, name)
		impatient = impatient || !now.Before(s.pending.Add(patience*f.still))
	}
	if !latest.IsZero() && !impatient {
		return latest
	}
	slices.Sort(ready)
	f.follow(ready)
	for _, name := range ready {
		if !f.take(name, now) {
			latest = later(latest, now.Add(f.still))
		}
	}
	f.settle(nil)
	return latest
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// follow looks which files that are gone have become others that are new. They are those from now on: a broken
// file that is renamed keeps in force what it held last.
func (f *Folder) follow(ready []string) {
	type inode struct{ device, number uint64 }
	unread := map[inode]string{}
	for name, s := range f.sights {
		if s.read == (fingerprint{}) {
			unread[inode{s.print.device, s.print.inode}] = name
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range ready {
		s := f.sights[name]
		if s.print != (fingerprint{}) || s.read == (fingerprint{}) {
			continue
		}
		if to, ok := unread[inode{s.read.device, s.read.inode}]; ok {
			f.set.rename(f.path(name), f.path(to))
		}
	}
}

// take reads one file, or takes in that it is gone. It returns false if the file changed meanwhile.
func (f *Folder) take(name string, now time.Time) bool {
	s, path := f.sights[name], f.path(name)
	if s.print == (fingerprint{}) {
		delete(f.sights, name)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.set.remove(path)
		return true
	}
	text, err := read(path)
	if p := look(path); p != s.print {
		s.print, s.since = p, now
		return false
	}
	path, objects, problems := contents(path, text, err)
	s.read, s.pending = s.print, time.Time{}
	if err != nil { // what was in the way may go without a trace on the file: it is tried at every look
		s.read = fingerprint{}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set.put(path, objects, problems)
	return true
}

// settle puts in force what was taken in, and tells what is wrong.
func (f *Folder) settle(broken error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	held := f.set.unknown()
	f.broken = broken
	f.set.settle()
	if f.set.tell(f.problems()) || !slices.Equal(held, f.set.unknown()) {
		close(f.changed)
		f.changed = make(chan struct{})
	}
}
