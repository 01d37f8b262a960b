// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// host builds a snapshot from lines that read like those of ip(8): devices are numbered as they come.
//
//	dev NAME [KIND] [master NAME] [parent NAME] [down] [raw]
//	addr NAME PREFIX [secondary] [tentative] [deprecated]
//	route DESTINATION NAME [TABLE [METRIC]]
func host(t *testing.T, lines ...string) Snapshot {
	t.Helper()
	s := Snapshot{Devices: []Device{{Index: 1, Name: "lo", Loopback: true, Up: true, LinkHeader: 14}}}
	index := map[string]int{"lo": 1}
	for _, line := range lines {
		words := strings.Fields(line)
		if words[0] == "dev" {
			index[words[1]] = len(index) + 1
		}
	}
	for _, line := range lines {
		words := strings.Fields(line)
		switch words[0] {
		case "dev":
			d := Device{Index: index[words[1]], Name: words[1], Up: true, LinkHeader: 14}
			for i := 2; i < len(words); i++ {
				switch words[i] {
				case "down":
					d.Up = false
				case "raw":
					d.LinkHeader = 0
				case "master":
					i++
					d.Master = index[words[i]]
				case "parent":
					i++
					d.Parent = index[words[i]]
				default:
					d.Kind = words[i]
				}
			}
			s.Devices = append(s.Devices, d)
		case "addr":
			s.Addresses = append(s.Addresses, Address{
				Device: index[words[1]], Prefix: netip.MustParsePrefix(words[2]), Secondary: slices.Contains(words, "secondary"),
				Tentative: slices.Contains(words, "tentative"), Deprecated: slices.Contains(words, "deprecated"),
			})
		case "route":
			r := Route{Table: 254, Destination: netip.MustParsePrefix(words[1]), Device: index[words[2]]}
			if r.Device == 0 {
				t.Fatalf("%q: no such device", line)
			}
			if len(words) > 3 {
				fmt.Sscan(words[3], &r.Table)
			}
			if len(words) > 4 {
				fmt.Sscan(words[4], &r.Metric)
			}
			s.Routes = append(s.Routes, r)
		default:
			t.Fatalf("what is %q?", line)
		}
	}
	return s
}

func TestSelect(t *testing.T) {
	tests := []struct {
		name    string
		devices string // --devices
		pods    string // --pod-devices; "" the default
		host    []string
		// want has a line per device: "node NAME", "pod NAME", with " raw" where there is no link header,
		// or "uncovered NAME: ...", with a part of the reason.
		want []string
	}{
		{
			name: "routed pods, the uplink has the default route",
			host: []string{"dev eth0", "dev cali1 veth", "dev veth2 veth", "dev lxc3 veth",
				"route 0.0.0.0/0 eth0", "route 192.0.2.0/24 eth0", "route 10.244.0.5/32 cali1", "route 10.244.0.6/32 veth2"},
			want: []string{"node eth0", "pod cali1", "pod veth2", "pod lxc3"},
		},
		{
			name: "an IPv6 default route counts as one, and one of any table",
			host: []string{"dev eth0", "dev eth1", "dev eth2", "route ::/0 eth0", "route 0.0.0.0/0 eth1 100"},
			want: []string{"node eth0", "node eth1"},
		},
		{
			name: "overlay devices, also without a link header; none that is down",
			host: []string{"dev eth0", "dev flannel.1 vxlan", "dev genev_sys geneve", "dev wg0 wireguard raw",
				"dev tunl0 ipip raw", "dev gre0 gre raw down", "dev tun0 tun raw", "route 0.0.0.0/0 eth0"},
			want: []string{"node eth0", "node flannel.1", "node genev_sys", "node wg0 raw", "node tunl0 raw"},
		},
		{
			name: "an overlay device that is a bridge port belongs to the bridge's network",
			host: []string{"dev eth0", "dev br-vni bridge", "dev vx10 vxlan master br-vni", "route 0.0.0.0/0 eth0"},
			want: []string{"node eth0"},
		},
		{
			name: "a pod's device that has the default route is the node's uplink, whatever its name",
			host: []string{"dev veth0 veth", "dev veth1 veth", "route 0.0.0.0/0 veth0"},
			want: []string{"node veth0", "pod veth1"},
		},
		{
			name:    "named devices take the place of the default ones",
			devices: "eth1",
			host:    []string{"dev eth0", "dev eth1", "dev wg0 wireguard raw", "route 0.0.0.0/0 eth0", "route 10.9.0.0/16 wg0"},
			want:    []string{"uncovered eth0: --devices", "node eth1", "uncovered wg0: --devices"},
		},
		{
			name:    "a device that is named is the node's even if it matches a pod pattern",
			devices: "eth0,veth-up",
			host:    []string{"dev eth0", "dev veth-up veth", "dev veth-pod veth", "route 0.0.0.0/0 eth0"},
			want:    []string{"node eth0", "node veth-up", "pod veth-pod"},
		},
		{
			name:    "a pattern never names lo",
			devices: "*",
			host:    []string{"dev eth0", "route 127.0.0.0/8 lo"},
			want:    []string{"node eth0"},
		},
		{
			name: "own pod patterns",
			pods: "pod-*,tap?",
			host: []string{"dev eth0", "dev pod-a veth", "dev tap1 tun", "dev tap12 tun", "dev veth0 veth",
				"route 0.0.0.0/0 eth0", "route 10.244.0.9/32 veth0"},
			want: []string{"node eth0", "pod pod-a", "pod tap1", "uncovered veth0: --pod-devices"},
		},
		{
			name: "devices that are down are selected by name",
			host: []string{"dev eth0", "dev veth1 veth down", "route 0.0.0.0/0 eth0"},
			want: []string{"node eth0", "pod veth1"},
		},
		{
			name: "a bridge that pods hang on, and its ports",
			host: []string{"dev eth0", "dev cni0 bridge", "dev veth1 veth master cni0", "dev veth2 veth master cni0",
				"route 0.0.0.0/0 eth0", "route 10.244.0.0/24 cni0"},
			want: []string{"node eth0", "port veth1", "port veth2"},
		},
		{
			name: "a bridge is no pod's device, even by name",
			host: []string{"dev eth0", "dev veth-br bridge", "dev x1 veth master veth-br", "route 0.0.0.0/0 eth0"},
			want: []string{"node eth0"},
		},
		{
			name:    "a pods' bridge that is named",
			devices: "eth0,cni*",
			host:    []string{"dev eth0", "dev cni0 bridge", "dev veth1 veth master cni0", "route 0.0.0.0/0 eth0"},
			want:    []string{"node eth0", "uncovered cni0: refused: pods hang on this bridge", "port veth1"},
		},
		{
			name:    "a bridge whose only veth is named has no pods",
			devices: "br0,veth1",
			host:    []string{"dev br0 bridge", "dev veth1 veth master br0", "route 0.0.0.0/0 br0"},
			want:    []string{"node br0", "uncovered veth1: a port of br0, which has programs"},
		},
		{
			name: "the default route over a bridge without pods",
			host: []string{"dev eth0 master br0", "dev br0 bridge", "dev tap0 tun master br0", "route 0.0.0.0/0 br0"},
			want: []string{"node br0"},
		},
		{
			name: "the default route over the pods' own bridge: its physical port, not the bridge",
			host: []string{"dev eth0 master br0", "dev br0 bridge", "dev veth1 veth master br0", "dev tap0 tun master br0",
				"route 0.0.0.0/0 br0"},
			want: []string{"node eth0", "port veth1", "uncovered tap0: a port of br0, a bridge that pods hang on"},
		},
		{
			name:    "its physical port is named, and nothing else",
			devices: "eth0",
			host:    []string{"dev eth0 master br0", "dev br0 bridge", "dev veth1 veth master br0", "route 0.0.0.0/0 br0"},
			want:    []string{"node eth0", "port veth1"},
		},
		{
			name:    "its physical port is not among those that are named",
			devices: "wg0",
			host: []string{"dev eth0 master br0", "dev br0 bridge", "dev veth1 veth master br0", "dev wg0 wireguard raw",
				"route 0.0.0.0/0 br0"},
			want: []string{"uncovered eth0: a port of br0", "port veth1", "node wg0 raw"},
		},
		{
			name: "ports of a pods' bridge by which nothing leaves",
			host: []string{"dev eth0", "dev br0 bridge", "dev veth1 veth master br0", "dev tap0 tun master br0 down",
				"dev br1 bridge", "dev veth2 veth master br1", "dev tap1 tun master br1", "route 0.0.0.0/0 eth0", "route 10.244.0.0/24 br0"},
			want: []string{"node eth0", "port veth1", "port veth2"},
		},
		{
			name: "a bridge of something else",
			host: []string{"dev eth0", "dev docker0 bridge", "route 0.0.0.0/0 eth0", "route 172.17.0.0/16 docker0"},
			want: []string{"node eth0", "uncovered docker0: unless pods hang on it"},
		},
		{
			name: "above a bond",
			host: []string{"dev eth0 master bond0", "dev eth1 master bond0", "dev bond0 bond", "route 0.0.0.0/0 bond0"},
			want: []string{"node bond0"},
		},
		{
			name:    "a bond's members that are named",
			devices: "eth*,bond0",
			host:    []string{"dev eth0 master bond0", "dev bond0 bond", "route 0.0.0.0/0 bond0"},
			want:    []string{"uncovered eth0: a member of bond0", "node bond0"},
		},
		{
			name: "a VLAN device counts on its own, with and without its parent",
			host: []string{"dev eth0", "dev eth0.7 vlan parent eth0", "dev eth0.8 vlan parent eth0",
				"route 0.0.0.0/0 eth0.7", "route 10.8.0.0/16 eth0.8"},
			want: []string{"node eth0.7", "uncovered eth0.8: --devices"},
		},
		{
			name: "a VRF's members, pods too, and not the VRF",
			host: []string{"dev eth0 master blue", "dev blue vrf", "dev veth1 veth master blue",
				"route 0.0.0.0/0 eth0 10", "route 10.0.0.0/8 blue"},
			want: []string{"node eth0", "pod veth1"},
		},
		{
			name:    "a VRF that is named",
			devices: "blue",
			host:    []string{"dev blue vrf"},
			want:    []string{"uncovered blue: programs belong on its members"},
		},
		{
			name: "a pod's device in a switch of another kind",
			host: []string{"dev ovs-system openvswitch", "dev veth1 veth master ovs-system"},
			want: []string{"uncovered veth1: a member of ovs-system (openvswitch)"},
		},
		{
			name: "no reply leaves by link-local and multicast routes, nor by a device that is down",
			host: []string{"dev eth0", "dev eth1", "dev eth2", "dev eth3 down", "route 0.0.0.0/0 eth0", "route fe80::/64 eth1",
				"route ff00::/8 eth1", "route 169.254.0.0/16 eth2", "route 224.0.0.0/4 eth2", "route 10.3.0.0/16 eth3"},
			want: []string{"node eth0"},
		},
		{
			name: "an empty host",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var cfg Config
			if tt.devices != "" {
				cfg.Devices = strings.Split(tt.devices, ",")
			}
			if tt.pods != "" {
				cfg.PodDevices = strings.Split(tt.pods, ",")
			}
			cfg.Defaults()
			if err := cfg.Validate(); err != nil {
				t.Fatal(err)
			}
			s := host(t, tt.host...)
			attach, uncovered := Select(s, cfg)

			// The selection as lines like those of want, in the order of the devices.
			lines := map[int]string{}
			for _, a := range attach {
				raw := ""
				if a.LinkHeader == 0 {
					raw = " raw"
				}
				lines[a.Index] = fmt.Sprintf("%s %s%s", a.Role, a.Name, raw)
			}
			for _, u := range uncovered {
				if lines[u.Index] != "" {
					t.Errorf("%s is attached and uncovered", u.Name)
				}
				line := fmt.Sprintf("uncovered %s: %s", u.Name, u.Reason)
				for _, want := range tt.want {
					name, part, _ := strings.Cut(want, ": ")
					if name == "uncovered "+u.Name && strings.Contains(u.Reason, part) {
						line = want
					}
				}
				lines[u.Index] = line
			}
			var got []string
			for _, d := range s.Devices {
				if line := lines[d.Index]; line != "" {
					got = append(got, line)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if !slices.IsSortedFunc(attach, func(a, b Attachment) int { return a.Index - b.Index }) ||
				!slices.IsSortedFunc(uncovered, func(a, b Uncovered) int { return a.Index - b.Index }) {
				t.Error("not in the order of the indices")
			}
		})
	}
}

func TestConfigValidate(t *testing.T) {
	tests := []struct {
		name string
		cfg  Config
		want string // "" for none
	}{
		{name: "nothing"},
		{name: "good patterns", cfg: Config{Devices: []string{"eth0", "en[ps]*", "wlan?"}, PodDevices: []string{"veth*"}}},
		{
			name: "a bracket left open",
			cfg:  Config{Devices: []string{"eth0", "en[ps"}},
			want: `--devices: pattern "en[ps": syntax error in pattern`,
		},
		{
			name: "one in each flag",
			cfg:  Config{Devices: []string{`eth\`}, PodDevices: []string{"a[]", ""}},
			want: `--devices: pattern "eth\\": syntax error in pattern` + "\n" +
				`--pod-devices: pattern "a[]": syntax error in pattern` + "\n" +
				`--pod-devices: an empty pattern`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			if err := tt.cfg.Validate(); err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	var zero Config
	zero.Defaults()
	if err := zero.Validate(); err != nil || len(zero.PodDevices) == 0 {
		t.Errorf("the defaults are %v: %v", zero.PodDevices, err)
	}
	none := Config{PodDevices: []string{}}
	none.Defaults()
	if len(none.PodDevices) != 0 {
		t.Errorf("no patterns became %v", none.PodDevices)
	}
}

func TestSnapshotHelpers(t *testing.T) {
	s := host(t, "dev br0 bridge", "dev veth1 veth master br0", "dev bond0 bond", "dev eth0 master bond0", "dev eth1")
	for name, want := range map[string]string{"veth1": "br0", "eth0": "", "eth1": "", "br0": ""} {
		i := slices.IndexFunc(s.Devices, func(d Device) bool { return d.Name == name })
		if got, ok := s.Bridge(s.Devices[i]); got.Name != want || ok != (want != "") {
			t.Errorf("bridge of %s: %q, want %q", name, got.Name, want)
		}
	}
	if d, ok := s.Device(99); ok {
		t.Errorf("device 99 is %v", d)
	}
}

func TestSelectBridge(t *testing.T) {
	s := host(t, "dev eth0 master br0", "dev br0 bridge", "dev veth1 veth master br0", "dev veth2 veth", "route 0.0.0.0/0 br0")
	mac := [6]byte{2, 0, 0, 0, 0, 7}
	s.Devices[2].MAC = mac
	attach, _ := Select(s, Config{PodDevices: []string{"veth*"}})
	want := []Attachment{
		{Index: 2, Name: "eth0", Role: RoleNode, LinkHeader: 14, Bridge: 3, BridgeMAC: mac},
		{Index: 4, Name: "veth1", Role: RolePort, LinkHeader: 14, Bridge: 3, BridgeMAC: mac},
		{Index: 5, Name: "veth2", Role: RolePod, LinkHeader: 14},
	}
	if diff := cmp.Diff(want, attach); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
