// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/loader"
	"github.com/lbagent/lbagent/resolve"
)

// publish puts up what status answers with, and logs what is new of it.
func (a *agent) publish() {
	problems := append(a.table.Problems(), a.checks.Problems()...)
	for _, addr := range a.elsewhere {
		problems = append(problems, lb.Problem{
			Object: "Node " + a.config.NodeName, Field: "status.addresses", Severity: lb.Warning,
			Message: fmt.Sprintf("%s is not an address of this host: NodePorts are not served there", addr),
		})
	}
	for _, o := range a.overlaps {
		problems = append(problems, lb.Problem{
			Field: "--service-cluster-ip-range", Severity: lb.Warning,
			Message: fmt.Sprintf("%s overlaps %s, where pods of this host are: what is sent straight to them there is dropped, as to an address that no Service has",
				o.prefix, o.pods),
		})
	}
	for i := range problems {
		problems[i].File, problems[i].Document = a.folder.FileOf(problems[i].Object)
	}
	a.problems.tell(a.config.Log, problems)
	if changed := a.folder.Changed(); changed != a.changed { // asked for only then: it looks at every file
		a.changed, a.ofFolder = changed, a.folder.Problems()
	}

	stats := a.reconciler.Stats()
	a.stats.Store(&stats)
	a.apply.Pending = stats.Pending
	apply, features := a.apply, a.programs.Features()
	s := api.Status{
		Running: true, Version: Version(), PID: os.Getpid(), Started: a.started, NodeName: a.config.NodeName,
		NodePortAddresses: a.here.NodePorts,

		Source: &api.Source{Path: a.config.Manifests, Synced: a.synced, Held: a.holding, LastChange: a.lastChange},
		Apply:  &apply,

		Programs: append([]loader.Attached{}, a.attached...), Uncovered: []api.Uncovered{}, AttachError: a.attachError,
		Problems: api.ProblemsOf(append(problems, a.ofFolder...)),
		Features: &features,
	}
	if a.holding {
		s.Source.HeldFiles = a.folder.Held()
	}
	for _, u := range a.uncovered {
		s.Uncovered = append(s.Uncovered, api.Uncovered{Device: u.Name, Index: u.Index, Reason: u.Reason})
	}
	a.page.Store(&s)
}

// Status answers the admin socket, from any goroutine: the page that was put up last, what the maps say
// right now and where HTTP is served; of the flow tables, what the last walk has counted.
func (a *agent) Status() (api.Status, error) {
	s := *a.page.Load()
	s.Listeners = a.listeners()
	return s, s.FillFromMaps(a.maps, a.flows.Load())
}

// show asks for all that is known of a Service, or of a Pod with hostPorts.
type show struct {
	name   resolve.Name
	answer chan []lb.View // has room for it
}

// Services answers the admin socket, from any goroutine.
func (a *agent) Services(ctx context.Context, namespace, name string) ([]api.Service, error) {
	s := show{resolve.Name{Namespace: namespace, Name: name}, make(chan []lb.View, 1)}
	select {
	case a.shows <- s:
		return api.ServicesOf(<-s.answer), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// problemLog knows which problems were logged. Those of the folder itself are logged by package manifest.
type problemLog struct {
	told map[lb.Problem]bool
}

// tell logs each problem once, and when it is no more.
func (l *problemLog) tell(log *slog.Logger, problems []lb.Problem) {
	told := map[lb.Problem]bool{}
	for _, p := range problems {
		told[p] = true
		if !l.told[p] {
			log.Log(context.Background(), levelOf(p.Severity), "service problem", "problem", p)
		}
	}
	gone := slices.SortedFunc(maps.Keys(l.told), lb.Problem.Compare)
	for _, p := range gone {
		if !told[p] {
			log.Info("service problem is gone", "problem", p)
		}
	}
	l.told = told
}

func levelOf(s lb.Severity) slog.Level {
	switch s {
	case lb.Error:
		return slog.LevelError
	case lb.Warning:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}
