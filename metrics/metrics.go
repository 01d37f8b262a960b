// SPDX-License-Identifier: Apache-2.0

// Package metrics is what Prometheus reads of an agent: counters and fill of the maps, read when it asks and at no
// cost for packets, and how the agent's writes went. The names are API; docs/operations.md lists them all. Those
// that begin with kubeproxy_ mean what they mean of kube-proxy.
package metrics

import (
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/lbagent/lbagent/maps"
)

// State is what the agent knows and the maps do not say, or not without being read as a whole.
type State struct {
	Frontends, Identities int            // entries of map frontends, as lbagent status counts them
	Flows, PendingFlows   int            // entries of the flow tables, as of the last walk; negative: not known
	Pending               int            // changes that are not in the maps
	Programs              int            // attached
	Uncovered             int            // devices without programs by which replies leave
	Problems              map[string]int // by severity
}

// Metrics are those of one agent.
type Metrics struct {
	registry *prometheus.Registry
	started  time.Time

	applies     *prometheus.CounterVec
	lastApply   prometheus.Gauge
	syncs       prometheus.Histogram
	lastSync    prometheus.Gauge
	lastQueued  prometheus.Gauge
	programming prometheus.Histogram
	probes      map[string]*prometheus.CounterVec
}

// New returns the Metrics of an agent that starts now. state is called at each scrape, by the goroutine of the
// request, as are the maps read.
func New(m *maps.Maps, version string, state func() State) *Metrics {
	x := &Metrics{
		registry: prometheus.NewRegistry(), started: time.Now(),
		applies: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "lbagent_applies_total", Help: "Times that changes were written to the maps, by result: done or failed (in part; tried again).",
		}, []string{"result"}),
		lastApply: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "lbagent_last_apply_timestamp_seconds", Help: "When everything was in the maps last.",
		}),
		syncs: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kubeproxy_sync_proxy_rules_duration_seconds", Help: "How long it took to write changes to the maps.",
			Buckets: syncBuckets(),
		}),
		lastSync: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "kubeproxy_sync_proxy_rules_last_timestamp_seconds", Help: "As lbagent_last_apply_timestamp_seconds.",
		}),
		lastQueued: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", Help: "When a change came last that may have to be written to the maps.",
		}),
		programming: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "kubeproxy_network_programming_duration_seconds",
			Help:    "From the change of a Service or Pod, as annotation endpoints.kubernetes.io/last-change-trigger-time has it, until it was in the maps.",
			Buckets: programmingBuckets(),
		}),
		probes: map[string]*prometheus.CounterVec{},
	}
	for _, result := range []string{"done", "failed"} {
		x.applies.WithLabelValues(result)
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "lbagent_build_info", Help: "1; the labels say what was built.",
		ConstLabels: prometheus.Labels{"version": version, "go_version": runtime.Version()},
	})
	build.Set(1)
	x.registry.MustRegister(x.applies, x.lastApply, x.syncs, x.lastSync, x.lastQueued, x.programming, build,
		&mapsCollector{maps: m, state: state},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, path := range []string{"healthz", "livez"} {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kubeproxy_proxy_" + path + "_total", Help: "Answers at /" + path + " of the health server, by HTTP status.",
		}, []string{"code"})
		c.WithLabelValues("200")
		c.WithLabelValues("503")
		x.registry.MustRegister(c)
		x.probes[path] = c
	}
	return x
}

// syncBuckets are kube-proxy's: 1 ms to 16 s, doubled.
func syncBuckets() []float64 { return prometheus.ExponentialBuckets(0.001, 2, 15) }

// programmingBuckets are kube-proxy's, 0 (for clocks that disagree) and from 0.25 s to 5 min, and finer ones below.
func programmingBuckets() []float64 {
	all := []float64{0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5}
	for _, part := range []struct {
		from, step float64
		number     int
	}{{1, 1, 59}, {60, 5, 12}, {120, 30, 7}} {
		all = append(all, prometheus.LinearBuckets(part.from, part.step, part.number)...)
	}
	return all
}

// Queued says that a change has come.
func (x *Metrics) Queued() { x.lastQueued.SetToCurrentTime() }

// Applied says how long a write of changes took, and whether all of it is in the maps now.
func (x *Metrics) Applied(took time.Duration, done bool) {
	x.syncs.Observe(took.Seconds())
	if !done {
		x.applies.WithLabelValues("failed").Inc()
		return
	}
	x.applies.WithLabelValues("done").Inc()
	x.lastApply.SetToCurrentTime()
	x.lastSync.SetToCurrentTime()
}

// Programmed says that changes which began at these times are in force now. Those from before the agent's start
// do not count, as with kube-proxy: they waited for the agent.
func (x *Metrics) Programmed(began []time.Time) {
	now := time.Now()
	for _, t := range began {
		if t.After(x.started) {
			x.programming.Observe(now.Sub(t).Seconds())
		}
	}
}

// CountProbes returns a handler that counts the answers of another, at path healthz or livez.
func (x *Metrics) CountProbes(path string, h http.Handler) http.Handler {
	return promhttp.InstrumentHandlerCounter(x.probes[path], h)
}

// Handler answers a scrape. What of the maps cannot be read fails it as a whole.
func (x *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(x.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}
