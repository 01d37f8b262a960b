// SPDX-License-Identifier: Apache-2.0

// Package api is the admin socket of the agent: HTTP and JSON over a unix socket that only root can open.
// `GET /v1/status` answers with a [Status], `GET /v1/services/NAMESPACE/NAME` with a list of [Service]. The types
// here are those that server and client share, and what `lbagent status -o json` prints; their keys are a contract.
package api

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/maps"
)

// Status is what an agent says of itself and of its data plane. Without an agent, [FromPins] gives the part
// of it that outlives one.
type Status struct {
	Running  bool      `json:"running"` // an agent answered; else only programs, maps and reasons are known
	Version  string    `json:"version,omitempty"`
	PID      int       `json:"pid,omitempty"`
	Started  time.Time `json:"started,omitzero"`
	NodeName string    `json:"nodeName,omitempty"`

	NodePortAddresses []netip.Addr `json:"nodePortAddresses,omitempty"` // where NodePorts are served

	Source *Source `json:"source,omitempty"`
	Apply  *Apply  `json:"apply,omitempty"`

	Programs  []loader.Attached `json:"programs"`
	Uncovered []Uncovered       `json:"uncovered"` // devices that replies leave by and that have no programs
	// AttachError says why programs are not where they should be; it is tried again.
	AttachError string `json:"attachError,omitempty"`

	Listeners []Listener `json:"listeners"` // where the agent serves HTTP

	Maps     []Map             `json:"maps"`
	Reasons  map[string]uint64 `json:"reasons"` // packets by the reason of their verdict, those above 0
	Problems []Problem         `json:"problems"`
	Features *loader.Features  `json:"features,omitempty"`
}

// Source is where the objects come from.
type Source struct {
	Path   string `json:"path"`
	Synced bool   `json:"synced"` // all that was there at the start has been read
	// Held: something that was in force at the last run does not parse, so nothing is removed that the
	// source no longer names, until HeldFiles are mended.
	Held       bool      `json:"held"`
	HeldFiles  []string  `json:"heldFiles,omitempty"`
	LastChange time.Time `json:"lastChange,omitzero"`
}

// Apply is how far the maps are what the source says.
type Apply struct {
	Pending   int       `json:"pending"`             // services, backends, addresses and prefixes that the maps do not have as they should
	Failures  uint64    `json:"failures"`            // since the agent's start
	LastError string    `json:"lastError,omitempty"` // of the last try, if that failed
	LastApply time.Time `json:"lastApply,omitzero"`  // the last that did not fail
}

// Uncovered is a device without programs, and what that means.
type Uncovered struct {
	Device string `json:"device"`
	Index  int    `json:"index"`
	Reason string `json:"reason"`
}

// Listener is an address at which the agent serves HTTP, or is to.
type Listener struct {
	Name    string `json:"name"` // "metrics", "healthz", "health check default/web"
	Address string `json:"address"`
	Error   string `json:"error,omitempty"` // why it does not; it is tried again
}

// Map is how full a map is.
type Map struct {
	Name       string `json:"name"`
	Entries    int    `json:"entries"`
	MaxEntries uint32 `json:"maxEntries"`
}

// Problem is an [lb.Problem] for people and scripts.
type Problem struct {
	File     string `json:"file,omitempty"`
	Document int    `json:"document,omitempty"`
	Object   string `json:"object,omitempty"`
	Field    string `json:"field,omitempty"`
	Message  string `json:"message"`
	Severity string `json:"severity"`
}

// ProblemsOf returns problems as Problem, in the order of [lb.Problem.Compare]; it is never nil.
func ProblemsOf(problems []lb.Problem) []Problem {
	sorted := slices.Clone(problems)
	slices.SortStableFunc(sorted, lb.Problem.Compare)
	all := make([]Problem, len(sorted))
	for i, p := range sorted {
		all[i] = Problem{p.File, p.Document, p.Object, p.Field, p.Message, p.Severity.String()}
	}
	return all
}

// FlowCounts is how many entries the flow tables have: halves of flows, those included that have expired and are
// still there.
type FlowCounts struct{ Pending, Flows int }

func countFlows(m *maps.Maps) (counts FlowCounts, err error) {
	err = errors.Join(
		m.EachHalf(maps.Pending, func(maps.Tuple, maps.Flow) bool { counts.Pending++; return true }),
		m.EachHalf(maps.Flows, func(maps.Tuple, maps.Flow) bool { counts.Flows++; return true }))
	return counts, err
}

// mapsOf counts what is in the maps, but for the flows where somebody has counted them, as that is much to
// read; of `slots` those that services refer to. Backends' own addresses are counted apart from the frontends
// of services, as "identities"; they share a map.
func mapsOf(m *maps.Maps, flows *FlowCounts) ([]Map, error) {
	var frontends, identities, services, slots, backends int
	err := m.EachFrontend(func(_ maps.FrontendKey, f maps.Frontend) bool {
		if lb.Kind(f.Kind) == lb.Identity {
			identities++
		} else {
			frontends++
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	err = m.EachServiceName(func(id uint32, _ maps.ServiceName) bool {
		services++
		s := m.Service(id)
		slots += int(s.Cluster.Count + s.Local.Count)
		return true
	})
	if err != nil {
		return nil, err
	}
	for _, b := range m.EachBackend() {
		if b.Life.State != maps.BackendRemoved {
			backends++
		}
	}
	if flows == nil {
		counts, err := countFlows(m)
		if err != nil {
			return nil, err
		}
		flows = &counts
	}
	sizes := m.Sizes()
	return []Map{
		{"backends", backends, sizes.Backends}, {"flows", flows.Flows, sizes.Flows}, {"frontends", frontends, sizes.Frontends},
		{"identities", identities, sizes.Frontends}, {"pending", flows.Pending, sizes.Flows / 4},
		{"services", services, sizes.Services}, {"slots", slots, sizes.Slots},
	}, nil
}

// FromPins is the part of a status that needs no agent: what is pinned below `root` and attached in this
// network namespace. Without pins it is an empty one.
func FromPins(root string) (Status, error) {
	s := Status{Programs: []loader.Attached{}, Uncovered: []Uncovered{}, Listeners: []Listener{}, Maps: []Map{}, Reasons: map[string]uint64{}, Problems: []Problem{}}
	var err error
	if s.Programs, err = loader.List(filepath.Join(root, "links")); err != nil {
		return s, err
	}
	m, err := maps.Read(filepath.Join(root, "maps"))
	if errors.Is(err, maps.ErrNotPinned) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	defer m.Close()
	return s, s.FillFromMaps(m, nil)
}

// FillFromMaps sets what the maps alone say: Maps and Reasons. The flows are counted anew where `flows` is nil.
func (s *Status) FillFromMaps(m *maps.Maps, flows *FlowCounts) error {
	var err error
	if s.Maps, err = mapsOf(m, flows); err != nil {
		return err
	}
	if s.Reasons, err = m.Reasons(); err != nil {
		return err
	}
	for name, packets := range s.Reasons {
		if packets == 0 {
			delete(s.Reasons, name)
		}
	}
	return nil
}

// String is "FILE: document N: OBJECT: FIELD: MESSAGE", as [lb.Problem.Error].
func (p Problem) String() string {
	return lb.Problem{File: p.File, Document: p.Document, Object: p.Object, Field: p.Field, Message: p.Message}.Error()
}
