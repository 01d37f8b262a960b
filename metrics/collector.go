// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lbagent/lbagent/lb"
	"github.com/lbagent/lbagent/maps"
)

// mapsCollector reads the maps at each scrape, at a cost that is proportional to what is in them, but for the
// backends, of whom every id is looked at (a memory read). Nothing is locked: what changes meanwhile is seen
// before or after.
type mapsCollector struct {
	maps  *maps.Maps
	state func() State
}

// The labels of a service. Of service and pod one is empty, which is the same as absent: a hostPort is its Pod's.
var (
	serviceLabels = []string{"namespace", "service", "pod", "port", "protocol", "family"}
	backendLabels = append(serviceLabels[:len(serviceLabels):len(serviceLabels)], "address")
)

func with(labels []string, more string) []string {
	return append(labels[:len(labels):len(labels)], more)
}

// The descriptions of what is read from the maps.
var (
	packets = prometheus.NewDesc("lbagent_packets_total",
		"Packets that the programs saw, by the reason of what became of them.", []string{"reason"}, nil)

	mapEntries = prometheus.NewDesc("lbagent_map_entries",
		"Entries of a map. flows and pending: as of the last walk of the sweeper.", []string{"map"}, nil)
	mapMaxEntries = prometheus.NewDesc("lbagent_map_max_entries",
		"How many entries a map can have.", []string{"map"}, nil)

	serviceFlows = prometheus.NewDesc("lbagent_service_flows_total",
		"Flows that began.", serviceLabels, nil)
	serviceRefused = prometheus.NewDesc("lbagent_service_refused_packets_total",
		"Packets that were to begin a flow and did not, by reason.", with(serviceLabels, "reason"), nil)
	servicePackets = prometheus.NewDesc("lbagent_service_packets_total",
		"Packets of flows, from clients (in) and to them (out), as of the last walk of the sweeper.", with(serviceLabels, "direction"), nil)
	serviceBytes = prometheus.NewDesc("lbagent_service_bytes_total",
		"Bytes of IP packets, as lbagent_service_packets_total.", with(serviceLabels, "direction"), nil)
	serviceBackends = prometheus.NewDesc("lbagent_service_backends",
		"Backends, by state: active, draining, or removed while flows may go on.", with(serviceLabels, "state"), nil)

	backendFlows = prometheus.NewDesc("lbagent_backend_flows_total",
		"Flows that began.", backendLabels, nil)
	backendPackets = prometheus.NewDesc("lbagent_backend_packets_total",
		"Packets of flows, from clients (in) and to them (out), as of the last walk of the sweeper.", with(backendLabels, "direction"), nil)
	backendBytes = prometheus.NewDesc("lbagent_backend_bytes_total",
		"Bytes of IP packets, as lbagent_backend_packets_total.", with(backendLabels, "direction"), nil)

	pendingChanges = prometheus.NewDesc("lbagent_pending_changes",
		"Changes that are not in the maps.", nil, nil)
	attachedPrograms = prometheus.NewDesc("lbagent_attached_programs",
		"Programs at devices.", nil, nil)
	uncoveredDevices = prometheus.NewDesc("lbagent_uncovered_devices",
		"Devices without programs by which replies can leave untranslated.", nil, nil)
	problems = prometheus.NewDesc("lbagent_problems",
		"What is wrong with the input, by severity.", []string{"severity"}, nil)
)

// descriptions are all of the above.
var descriptions = []*prometheus.Desc{
	packets, mapEntries, mapMaxEntries, serviceFlows, serviceRefused, servicePackets, serviceBytes, serviceBackends,
	backendFlows, backendPackets, backendBytes, pendingChanges, attachedPrograms, uncoveredDevices, problems,
}

func (c *mapsCollector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range descriptions {
		to <- d
	}
}

// service is what is summed up of a service. It is by name, not by id: no name may be told twice in a scrape, and
// a name can be seen at two ids while the map changes.
type service struct {
	stats    maps.ServiceStats
	backends map[maps.BackendState]int
}

// backend names a backend. The same may have two ids, one of them removed.
type backend struct {
	service lb.ServiceName
	at      netip.AddrPort
}

func (c *mapsCollector) Collect(to chan<- prometheus.Metric) {
	state := c.state()
	services, backends, entries, err := c.read()
	if err != nil {
		to <- prometheus.NewInvalidMetric(serviceFlows, err)
		return
	}
	reasons, err := c.maps.Reasons()
	if err != nil {
		to <- prometheus.NewInvalidMetric(packets, err)
		return
	}
	counter := func(d *prometheus.Desc, value uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	}
	gauge := func(d *prometheus.Desc, value int, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
	}
	for reason, n := range reasons {
		if reason != "none" {
			counter(packets, n, reason)
		}
	}
	states := map[maps.BackendState]string{}
	for _, state := range []maps.BackendState{maps.BackendActive, maps.BackendDraining, maps.BackendRemoved} {
		states[state] = maps.EnumName("backend_state", uint64(state))
	}
	for name, s := range services {
		labels := labelsOf(name)
		counter(serviceFlows, s.stats.Flows, labels...)
		counter(serviceRefused, s.stats.NoBackend, with(labels, "no_backend")...)
		counter(serviceRefused, s.stats.NoLocalBackend, with(labels, "no_local_backend")...)
		counter(serviceRefused, s.stats.SourceDenied, with(labels, "source_denied")...)
		counter(servicePackets, s.stats.PacketsIn, with(labels, "in")...)
		counter(servicePackets, s.stats.PacketsOut, with(labels, "out")...)
		counter(serviceBytes, s.stats.BytesIn, with(labels, "in")...)
		counter(serviceBytes, s.stats.BytesOut, with(labels, "out")...)
		for state, text := range states {
			gauge(serviceBackends, s.backends[state], with(labels, text)...)
		}
	}
	for name, stats := range backends {
		labels := with(labelsOf(name.service), name.at.String())
		counter(backendFlows, stats.Flows, labels...)
		counter(backendPackets, stats.PacketsIn, with(labels, "in")...)
		counter(backendPackets, stats.PacketsOut, with(labels, "out")...)
		counter(backendBytes, stats.BytesIn, with(labels, "in")...)
		counter(backendBytes, stats.BytesOut, with(labels, "out")...)
	}

	entries["frontends"], entries["identities"] = state.Frontends, state.Identities
	if state.Flows >= 0 {
		entries["flows"], entries["pending"] = state.Flows, state.PendingFlows
	}
	for name, n := range entries {
		gauge(mapEntries, n, name)
	}
	sizes := c.maps.Sizes()
	for name, n := range map[string]uint32{
		"backends": sizes.Backends, "flows": sizes.Flows, "frontends": sizes.Frontends, "identities": sizes.Frontends,
		"pending": sizes.Flows / 4, "services": sizes.Services, "slots": sizes.Slots,
	} {
		gauge(mapMaxEntries, int(n), name)
	}
	gauge(pendingChanges, state.Pending)
	gauge(attachedPrograms, state.Programs)
	gauge(uncoveredDevices, state.Uncovered)
	for _, severity := range []lb.Severity{lb.Error, lb.Warning, lb.NotYet} {
		gauge(problems, state.Problems[severity.String()], severity.String())
	}
}

// read sums up what the maps say of each service and of each backend that a name can be given to, and counts the
// entries that it meets, by the names that lbagent status has for them.
func (c *mapsCollector) read() (map[lb.ServiceName]*service, map[backend]maps.BackendStats, map[string]int, error) {
	services, backends := map[lb.ServiceName]*service{}, map[backend]maps.BackendStats{}
	entries := map[string]int{"services": 0, "slots": 0, "backends": 0}
	names := map[uint32]lb.ServiceName{}
	err := c.maps.EachServiceName(func(id uint32, n maps.ServiceName) bool {
		names[id] = n.LB()
		return true
	})
	if err != nil {
		return nil, nil, nil, err
	}
	for id, name := range names {
		s := services[name]
		if s == nil {
			s = &service{backends: map[maps.BackendState]int{}}
			services[name] = s
		}
		add(&s.stats, c.maps.ServiceStats(id))
		slots := c.maps.Service(id)
		entries["slots"] += int(slots.Cluster.Count + slots.Local.Count)
		entries["services"]++
	}
	for id, b := range c.maps.EachBackend() {
		if b.Life.State != maps.BackendRemoved {
			entries["backends"]++
		}
		name, named := names[b.Service]
		if !named {
			continue // its Service is gone
		}
		services[name].backends[b.Life.State]++
		key := backend{name, b.Addr()}
		sum := backends[key]
		addBackend(&sum, c.maps.BackendStats(id))
		backends[key] = sum
	}
	return services, backends, entries, nil
}

func add(sum *maps.ServiceStats, s maps.ServiceStats) {
	sum.Flows += s.Flows
	sum.NoBackend += s.NoBackend
	sum.NoLocalBackend += s.NoLocalBackend
	sum.SourceDenied += s.SourceDenied
	sum.PacketsIn += s.PacketsIn
	sum.BytesIn += s.BytesIn
	sum.PacketsOut += s.PacketsOut
	sum.BytesOut += s.BytesOut
}

func addBackend(sum *maps.BackendStats, s maps.BackendStats) {
	sum.Flows += s.Flows
	sum.PacketsIn += s.PacketsIn
	sum.BytesIn += s.BytesIn
	sum.PacketsOut += s.PacketsOut
	sum.BytesOut += s.BytesOut
}

func labelsOf(n lb.ServiceName) []string {
	service, pod := n.Name, ""
	if n.Pod {
		service, pod = "", n.Name
	}
	return []string{n.Namespace, service, pod, n.Port, n.Protocol.String(), n.Family.String()}
}
