// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/maps"
)

// TestWalkCounts: what connections have carried is in the statistics after the next walk, of living ones too, and stays
// what it is while they are silent, however many walks come.
func TestWalkCounts(t *testing.T) {
	s := newSite(t)
	s.config.SweepInterval = 50 * time.Millisecond
	s.write("web.yaml", s.manifest("web", 10, 3))
	agent := s.start(s.config)
	s.settled(6)
	s.request(10)
	stats := func() (services map[uint32]maps.ServiceStats, backends maps.BackendStats) {
		m, err := maps.Read(filepath.Join(s.config.BPFRoot, "maps"))
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		services = map[uint32]maps.ServiceStats{}
		err = m.EachServiceName(func(id uint32, _ maps.ServiceName) bool {
			services[id] = m.ServiceStats(id)
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		for id := range m.EachBackend() {
			b := m.BackendStats(id)
			backends.Flows += b.Flows
			backends.PacketsIn += b.PacketsIn
			backends.BytesIn += b.BytesIn
			backends.PacketsOut += b.PacketsOut
			backends.BytesOut += b.BytesOut
		}
		return services, backends
	}
	var before map[uint32]maps.ServiceStats
	since := time.Now()
	s.eventually(func(api.Status) string {
		services, backends := stats()
		var sum maps.BackendStats
		for id, now := range services {
			// A handshake, a request and an end are at least this much.
			if now.Flows == 0 || now.PacketsIn < 5 || now.BytesIn < 5*40 || now.PacketsOut < 4 || now.BytesOut < 4*40 {
				return "a service has too little"
			}
			if now != before[id] {
				before, since = services, time.Now()
				return "it goes on"
			}
			sum.Flows += now.Flows
			sum.PacketsIn += now.PacketsIn
			sum.BytesIn += now.BytesIn
			sum.PacketsOut += now.PacketsOut
			sum.BytesOut += now.BytesOut
		}
		if len(services) != 2 || sum != backends {
			return "services and backends differ"
		}
		if time.Since(since) < time.Second { // twenty walks
			return "not yet seen to stay"
		}
		return ""
	})
	agent.terminate()
}
