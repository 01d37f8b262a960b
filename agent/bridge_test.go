// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/lbagent/lbagent/api"
	"github.com/lbagent/lbagent/internal/testenv"
	"github.com/lbagent/lbagent/loader"
	lbmaps "github.com/lbagent/lbagent/maps"
)

// TestBridge: bridged pods get programs on their ports, and their bridge is refused, even by name. The map of
// devices follows the bridge's MAC address and which ports it has.
func TestBridge(t *testing.T) {
	s := newSiteLike(t, testenv.Config{Backends: 3, Bridge: true})
	s.config.Devices.Devices = []string{"eth0", "cni0"}
	s.write("web.yaml", s.manifest("web", 10, 3))
	agent := s.start(s.config)
	defer agent.terminate()
	status := s.settled(6)

	if len(status.Uncovered) != 1 || status.Uncovered[0].Device != "cni0" ||
		!strings.HasPrefix(status.Uncovered[0].Reason, "refused: pods hang on this bridge, so the programs are on its ports") {
		t.Errorf("uncovered: %+v", status.Uncovered)
	}
	programs := map[string]string{}
	for _, p := range status.Programs {
		programs[p.Device] += p.Program + " "
	}
	want := map[string]string{"eth0": "node_in node_out "}
	for _, b := range s.Backends {
		want[b.NodeDevice] = "pod_out port_in "
	}
	if diff := cmp.Diff(want, programs); diff != "" {
		t.Errorf("programs (-want +got):\n%s", diff)
	}
	s.request(10)

	link := func(name string) (l netlink.Link) {
		t.Helper()
		if err := s.Node.Do(func() (err error) {
			l, err = netlink.LinkByName(name)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return l
	}
	bridge := link("cni0")
	ports := func(hosts ...*testenv.Host) {
		t.Helper()
		device := lbmaps.Device{Bridge: uint32(bridge.Attrs().Index)}
		copy(device.BridgeMac[:], link("cni0").Attrs().HardwareAddr)
		want := map[uint32]lbmaps.Device{}
		for _, h := range hosts {
			want[uint32(link(h.NodeDevice).Attrs().Index)] = device
		}
		s.eventually(func(api.Status) string {
			if got := s.ports(); !maps.Equal(got, want) {
				return fmt.Sprintf("the map of devices has %v, want %v", got, want)
			}
			return ""
		})
	}
	ports(s.Backends...)
	if err := s.Node.Do(func() error {
		return netlink.LinkSetHardwareAddr(bridge, net.HardwareAddr{2, 0, 0, 0, 0, 0xb1})
	}); err != nil {
		t.Fatal(err)
	}
	ports(s.Backends...)
	left := link(s.Backends[2].NodeDevice)
	if err := s.Node.Do(func() error { return netlink.LinkSetNoMaster(left) }); err != nil {
		t.Fatal(err)
	}
	ports(s.Backends[:2]...)
	s.eventually(func(status api.Status) string {
		if !slices.ContainsFunc(status.Programs, func(p loader.Attached) bool { return p.Index == left.Attrs().Index && p.Program == "pod_in" }) {
			return "the port that left has no pod_in"
		}
		return ""
	})
}

// ports reads the pinned map of devices.
func (s *site) ports() map[uint32]lbmaps.Device {
	s.t.Helper()
	m, err := lbmaps.Read(filepath.Join(s.config.BPFRoot, "maps"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	ports := map[uint32]lbmaps.Device{}
	if err := m.EachDevice(func(index uint32, d lbmaps.Device) bool { ports[index] = d; return true }); err != nil {
		s.t.Fatal(err)
	}
	return ports
}
