// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lbagent/lbagent/maps"
)

// TestDevices: the maps follow what is desired, nothing is written that is there already, and what failed is
// made good by the next call.
func TestDevices(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes BPF maps")
	}
	m, err := maps.New(maps.Sizes{Frontends: 16, Services: 4, Slots: 16, Backends: 4, Flows: 256})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	port := func(bridge uint32, last uint8) maps.Device {
		return maps.Device{Bridge: bridge, BridgeMac: [6]uint8{2, 0, 0, 0, 0, last}}
	}
	type ports = map[uint32]maps.Device
	type vlans = map[maps.VLANKey]uint32
	failing := errors.New("no room")
	for _, step := range []struct {
		name   string
		ports  ports
		vlans  vlans
		fault  error
		writes []string // the maps that are written
	}{
		{"nothing", nil, nil, nil, nil},
		{"two ports", ports{3: port(2, 7), 4: port(2, 7)}, nil, nil, []string{"devices", "devices"}},
		{"the same", ports{3: port(2, 7), 4: port(2, 7)}, nil, nil, nil},
		{"the bridge has another MAC", ports{3: port(2, 8), 4: port(2, 8)}, nil, nil, []string{"devices", "devices"}},
		{"a port leaves, a VLAN comes", ports{4: port(2, 8)}, vlans{{Parent: 1, Id: 5}: 9}, nil, []string{"devices", "vlans"}},
		{"a port goes to another bridge, but no write goes through", ports{4: port(6, 8)}, nil, failing, []string{"devices", "vlans"}},
		{"again", ports{4: port(6, 8)}, nil, nil, []string{"devices", "vlans"}},
		{"no ports", nil, nil, nil, []string{"devices"}},
	} {
		var written []string
		m.Fault = func(name string) error {
			written = append(written, name)
			return step.fault
		}
		if err := Devices(m, step.ports, step.vlans); !errors.Is(err, step.fault) {
			t.Errorf("%s: %v", step.name, err)
		}
		slices.Sort(written)
		if !slices.Equal(written, step.writes) {
			t.Errorf("%s: written: %v, want %v", step.name, written, step.writes)
		}
		if step.fault != nil {
			continue
		}
		gotPorts, gotVLANs := ports{}, vlans{}
		if err := errors.Join(
			m.EachDevice(func(index uint32, d maps.Device) bool { gotPorts[index] = d; return true }),
			m.EachVLAN(func(k maps.VLANKey, index uint32) bool { gotVLANs[k] = index; return true })); err != nil {
			t.Fatal(err)
		}
		if len(gotPorts)+len(step.ports) > 0 && !cmp.Equal(gotPorts, step.ports) ||
			len(gotVLANs)+len(step.vlans) > 0 && !cmp.Equal(gotVLANs, step.vlans) {
			t.Errorf("%s: %v and %v, want %v and %v", step.name, gotPorts, gotVLANs, step.ports, step.vlans)
		}
	}
}
