// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/lbagent/lbagent/lb"
)

// maxProblems is how many problems of one file are told.
const maxProblems = 20

// set is files and what of them is in force. A file is all or nothing: it is in force as it was last read
// without an error and without an object that another file has in force.
type set struct {
	ports   PortRange        // of node ports
	files   map[string]*file // by path
	owners  map[string]place // object -> where it is in force
	stores  stores
	hints   distribution
	members members
	strays  map[string]string // EndpointSlices in force that belong to no Service here, and why
	log     *slog.Logger
	told    map[lb.Problem]bool // problems that were logged and still are
	ailing  map[string]bool     // files with an error when problems were last told
}

// place is a document of a file.
type place struct {
	file     *file
	document int
}

// file is what is known of one file.
type file struct {
	path     string
	inForce  []string     // its objects that are in force
	read     bool         // it was read since the start
	waiting  bool         // next is to be put in force; it is not yet, or in conflict with another file
	next     []decoded    // what it holds
	removed  bool         // it is no more; next is empty
	unknown  bool         // was there at the start and has not been good since: what it held then is not known
	parsing  []lb.Problem // what is wrong with it alone
	conflict []lb.Problem // what is wrong between it and others
}

func newSet(ports PortRange, log *slog.Logger) *set {
	return &set{
		ports: ports,
		files: map[string]*file{}, owners: map[string]place{}, stores: newStores(), hints: newDistribution(),
		members: members{owner: map[string]string{}, of: map[string]map[string]bool{}}, strays: map[string]string{},
		log: log, told: map[lb.Problem]bool{}, ailing: map[string]bool{},
	}
}

func (s *set) file(path string) *file {
	f := s.files[path]
	if f == nil {
		f = &file{path: path}
		s.files[path] = f
	}
	return f
}

// put takes in what a file was found to hold. settle puts it in force.
func (s *set) put(path string, objects []decoded, problems []lb.Problem) {
	f := s.file(path)
	problems = append(problems, s.ports.check(path, objects)...)
	f.read, f.removed, f.parsing, f.conflict = true, false, problems, nil
	f.waiting = !slices.ContainsFunc(problems, isError)
	f.next = nil
	if f.waiting {
		f.next = objects
	}
}

// remove takes in that a file is no more.
func (s *set) remove(path string) {
	if f := s.files[path]; f != nil {
		f.removed, f.waiting, f.next, f.parsing, f.conflict = true, true, nil, nil, nil
	}
}

// rename takes in that a file has another name, under which none is known.
func (s *set) rename(from, to string) {
	if f := s.files[from]; f != nil && s.files[to] == nil {
		delete(s.files, from)
		f.path, s.files[to] = to, f
	}
}

// settle puts in force what can be of all that was taken in. What changes together (an object that moves to
// another file, a file that is renamed) takes effect together. It does not depend on the order in which files
// were taken in: of two files with one object, the one that has it in force and still holds it keeps it, else
// the first by name gets it.
func (s *set) settle() {
	var candidates []*file
	for _, f := range s.files {
		if f.waiting {
			f.conflict = nil
			candidates = append(candidates, f)
		}
	}
	slices.SortFunc(candidates, func(a, b *file) int { return strings.Compare(a.path, b.path) })

	var rest []*file
	for {
		losers := s.conflicts(candidates)
		if len(losers) == 0 {
			break
		}
		// A loser stays as it was, which may be in the way of others in turn.
		candidates = slices.DeleteFunc(candidates, func(f *file) bool { return len(f.conflict) > 0 })
		rest = append(rest, losers...)
	}
	s.install(candidates)

	// A file may have lost to one that lost in its turn.
	slices.SortFunc(rest, func(a, b *file) int { return strings.Compare(a.path, b.path) })
	for progress := true; progress; {
		progress = false
		for _, f := range rest {
			if f.waiting && len(s.conflicts([]*file{f})) == 0 {
				s.install([]*file{f})
				progress = true
			}
		}
	}
}

// findStrays looks which of some EndpointSlices are in force and belong to no Service of the folder: in a cluster one
// may come before its Service, in a folder a name is misspelt.
func (s *set) findStrays(names map[string]bool) {
	for name := range names {
		delete(s.strays, name)
		o := s.stores.of(name).objects[name]
		if o == nil {
			continue
		}
		_, labelled := o.GetLabels()[discoveryv1.LabelServiceName]
		owner := s.members.owner[name]
		switch _, there := s.owners[owner]; {
		case !labelled:
			s.strays[name] = fmt.Sprintf("no label %s: it belongs to no Service", discoveryv1.LabelServiceName)
		case !there:
			s.strays[name] = fmt.Sprintf("%s: there is no %s among the manifests", discoveryv1.LabelServiceName, owner)
		}
	}
}

// members are the EndpointSlices in force and the Services that they name, by names such as "Service default/web".
type members struct {
	owner map[string]string          // slice -> Service
	of    map[string]map[string]bool // Service -> its slices
}

// update takes in what is about to be in force, and returns the slices that this concerns: those that change, come or
// go, and those of a Service that does.
func (m members) update(changed map[string]decoded) map[string]bool {
	concerned := map[string]bool{}
	for name, c := range changed {
		if owner, was := m.owner[name]; was {
			concerned[name] = true
			delete(m.owner, name)
			if delete(m.of[owner], name); len(m.of[owner]) == 0 {
				delete(m.of, owner)
			}
		}
		if s, ok := c.object.(*discoveryv1.EndpointSlice); ok {
			concerned[name] = true
			owner := objectName(string(service), s.Namespace, s.Labels[discoveryv1.LabelServiceName])
			m.owner[name] = owner
			if m.of[owner] == nil {
				m.of[owner] = map[string]bool{}
			}
			m.of[owner][name] = true
		}
	}
	for name := range changed {
		maps.Copy(concerned, m.of[name])
	}
	return concerned
}

// conflicts returns those of the candidates that cannot be put in force together with the others and with
// what is in force of other files, and notes why.
func (s *set) conflicts(candidates []*file) (losers []*file) {
	holds := map[*file]map[string]int{} // object -> document
	for _, f := range candidates {
		holds[f] = map[string]int{}
		for _, d := range f.next {
			holds[f][d.name] = d.document
		}
	}
	claimed := map[string]place{}
	for _, f := range candidates {
		f.conflict = nil
		for _, d := range f.next {
			holder, ok := s.owners[d.name]
			if next, leaves := holds[holder.file]; ok && leaves {
				holder.document, ok = next[d.name]
			}
			if !ok {
				holder, ok = claimed[d.name]
			}
			if !ok || holder.file == f {
				claimed[d.name] = place{f, d.document}
				continue
			}
			f.conflict = append(f.conflict, lb.Problem{
				File: f.path, Document: d.document, Object: d.name, Severity: lb.Error,
				Message: fmt.Sprintf("also in %s, document %d, which keeps it", holder.file.path, holder.document),
			})
		}
		if len(f.conflict) > 0 {
			losers = append(losers, f)
		}
	}
	return losers
}

// install puts files in force in place of what they had, all at once.
func (s *set) install(files []*file) {
	changed := map[string]decoded{} // without an object: gone
	for _, f := range files {
		for _, name := range f.inForce {
			changed[name] = decoded{}
			delete(s.owners, name)
		}
	}
	for _, f := range files {
		f.inForce = nil
		for _, d := range f.next {
			changed[d.name] = d
			s.owners[d.name] = place{f, d.document}
			f.inForce = append(f.inForce, d.name)
		}
		f.next, f.waiting, f.unknown, f.conflict = nil, false, false, nil
		if f.removed {
			delete(s.files, f.path)
		}
	}
	concerned := s.members.update(changed)
	s.hints.apply(changed, concerned, func(name string) object {
		if d, ok := changed[name]; ok {
			return d.object
		}
		return s.stores.of(name).objects[name]
	})
	names := slices.Sorted(maps.Keys(changed))
	gone := func(name string) bool { return changed[name].object == nil }
	for _, name := range names {
		if !gone(name) {
			s.stores.put(changed[name])
		}
	}
	// Watchers learn of one change after the other: what goes does so when what takes its place is there.
	for _, name := range names {
		if gone(name) {
			s.stores.remove(name)
		}
	}
	s.findStrays(concerned)
	s.stores.announce()
}

// problems returns all that is wrong, by file, and of a file the most grave first where they are too many.
func (s *set) problems() (all []lb.Problem) {
	strays := map[*file][]lb.Problem{}
	for name, message := range s.strays {
		at := s.owners[name]
		strays[at.file] = append(strays[at.file], lb.Problem{
			File: at.file.path, Document: at.document, Object: name, Field: "metadata.labels", Message: message, Severity: lb.Warning,
		})
	}
	for _, path := range slices.Sorted(maps.Keys(s.files)) {
		f := s.files[path]
		all = append(all, limit(slices.Concat(f.parsing, f.conflict, strays[f]))...)
		if f.unknown && !f.read {
			all = append(all, lb.Problem{File: path, Message: "not read yet: it does not stop changing"})
		}
	}
	return all
}

// limit sorts the problems of one file and cuts what is too much.
func limit(problems []lb.Problem) []lb.Problem {
	slices.SortFunc(problems, lb.Problem.Compare)
	if len(problems) <= maxProblems {
		return problems
	}
	slices.SortStableFunc(problems, func(a, b lb.Problem) int { return int(a.Severity) - int(b.Severity) })
	more := problems[maxProblems:]
	problems = problems[:maxProblems]
	slices.SortFunc(problems, lb.Problem.Compare)
	return append(problems, lb.Problem{
		File: more[0].File, Severity: more[0].Severity, Message: fmt.Sprintf("and %d more", len(more)),
	})
}

func isError(p lb.Problem) bool { return p.Severity == lb.Error }

// unknown returns the files that were there at the start and have not been good since.
func (s *set) unknown() (paths []string) {
	for path, f := range s.files {
		if f.unknown {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	return paths
}

// tell logs each problem when it is new, and a file when it has no error any more. It reports whether any
// problem came or went.
func (s *set) tell(problems []lb.Problem) (changed bool) {
	told, ailing := map[lb.Problem]bool{}, map[string]bool{}
	for _, p := range problems {
		told[p] = true
		if isError(p) {
			ailing[p.File] = true
		}
		if s.told[p] {
			continue
		}
		changed = true
		level := slog.LevelError
		switch p.Severity {
		case lb.Warning:
			level = slog.LevelWarn
		case lb.NotYet:
			level = slog.LevelInfo
		}
		s.log.Log(context.Background(), level, "manifest problem", "problem", p)
	}
	for _, path := range slices.Sorted(maps.Keys(s.ailing)) {
		if !ailing[path] {
			s.log.Info("manifest problem is gone", "file", path)
		}
	}
	changed = changed || len(told) != len(s.told)
	s.told, s.ailing = told, ailing
	return changed
}
