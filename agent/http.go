// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/health"
	"github.com/lbagent/lbagent/metrics"
	"github.com/lbagent/lbagent/source"
)

// server serves HTTP at an address that the operator has chosen.
type server struct {
	name, address string
	handler       http.Handler
	err           atomic.Pointer[error] // why it does not listen, nil when it does; not set before the first try
}

// newServers returns the servers that are not turned off.
func (a *agent) newServers() (servers []*server) {
	healthz, metrics := http.NewServeMux(), http.NewServeMux()
	healthz.Handle("/healthz", a.metrics.CountProbes("healthz", a.proxy.Healthz()))
	healthz.Handle("/livez", a.metrics.CountProbes("livez", a.proxy.Livez()))

	metrics.Handle("/metrics", a.metrics.Handler())
	metrics.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { text(w, "ok") })
	// The name of no mode of kube-proxy's: who asks for those would look for what they leave on a host.
	metrics.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) { text(w, "lbagent") })
	metrics.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) {
		flags := maps.Clone(a.config.Flags)
		if flags != nil {
			flags["flows"] = fmt.Sprint(a.maps.Sizes().Flows) // the only one that is chosen at the start
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]map[string]string{"lbagent": flags})
	})
	for _, s := range []*server{
		{name: "metrics", address: a.config.MetricsAddress, handler: metrics},
		{name: "healthz", address: a.config.HealthzAddress, handler: healthz},
	} {
		if s.address != "" {
			servers = append(servers, s)
		}
	}
	return servers
}

func text(w http.ResponseWriter, s string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = io.WriteString(w, s)
}

// serve serves until ctx ends, and returns nil then. That it cannot listen is logged, not an error: Services matter
// more.
func (a *agent) serve(ctx context.Context, s *server) error {
	told := ""
	health.Listen(ctx, s.address, s.handler, func(err error) {
		s.err.Store(&err)
		switch {
		case err == nil:
			told = ""
			a.config.Log.Info("listening", "server", s.name, "address", s.address)
		case err.Error() != told: // once, however often it is tried
			told = err.Error()
			a.config.Log.Warn("not listening, tried again", "server", s.name, "error", err)
		}
	})
	return nil
}

// listeners returns where HTTP is served, or is to be; from any goroutine.
func (a *agent) listeners() []api.Listener {
	all := []api.Listener{}
	add := func(name, address string, err error) {
		l := api.Listener{Name: name, Address: address}
		if err != nil {
			l.Error = err.Error()
		}
		all = append(all, l)
	}
	for _, s := range a.servers {
		if err := s.err.Load(); err != nil {
			add(s.name, s.address, *err)
		}
	}
	for _, l := range a.checks.Listening() {
		add("health check "+l.Check.Namespace+"/"+l.Check.Name, l.At.String(), l.Err)
	}
	return all
}

// next waits for objects that may have changed. From then on they wait to be in force, also while run is stuck.
func (a *agent) next(ctx context.Context) (source.Dirty, error) {
	dirty, err := a.objects.Next(ctx)
	if err == nil {
		a.proxy.Queued()
		a.metrics.Queued()
	}
	return dirty, err
}

// setChecks has health checks answered as the table says, where NodePorts are.
func (a *agent) setChecks() {
	addresses := slices.Clone(a.here.NodePorts)
	for _, local := range a.host.Addresses { // a host without IPv6 has one
		addr := local.Prefix.Addr()
		if a.flags.nodePorts.Localhost && (addr == netip.AddrFrom4([4]byte{127, 0, 0, 1}) || addr == netip.IPv6Loopback()) {
			addresses = append(addresses, addr)
		}
	}
	a.checks.Set(a.table.HealthChecks(), addresses)
}

// metricsState is what the metrics have from the agent; from any goroutine.
func (a *agent) metricsState() metrics.State {
	page, stats := a.page.Load(), a.stats.Load()
	s := metrics.State{
		Frontends: stats.Frontends, Identities: stats.Identities, Pending: stats.Pending, Flows: -1,
		Programs: len(page.Programs), Uncovered: len(page.Uncovered), Problems: map[string]int{},
	}
	if flows := a.flows.Load(); flows != nil {
		s.Flows, s.PendingFlows = flows.Flows, flows.Pending
	}
	for _, p := range page.Problems {
		s.Problems[p.Severity]++
	}
	return s
}
