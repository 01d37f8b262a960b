// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"path"
	"slices"
)

// Config says which devices are whose. Patterns are those of [path.Match], on names of devices.
type Config struct {
	// Devices are the node's own. Empty: those with a default route and the overlay devices that are up.
	Devices []string
	// PodDevices are the host's ends of pods' devices. A device that is the node's own is none of them,
	// whatever its name.
	PodDevices []string
}

// Defaults sets PodDevices where it is nil to the names that the common network plugins give.
func (c *Config) Defaults() {
	if c.PodDevices == nil {
		c.PodDevices = []string{"veth*", "cali*", "lxc*", "eni*", "gke*", "azv*"}
	}
}

// Validate names every pattern that is not one.
func (c Config) Validate() error {
	var errs []error
	check := func(flag string, patterns []string) {
		for _, pattern := range patterns {
			if _, err := path.Match(pattern, ""); err != nil {
				errs = append(errs, fmt.Errorf("%s: pattern %q: %w", flag, pattern, err))
			} else if pattern == "" {
				errs = append(errs, fmt.Errorf("%s: an empty pattern", flag))
			}
		}
	}
	check("--devices", c.Devices)
	check("--pod-devices", c.PodDevices)
	return errors.Join(errs...)
}

// Role says which programs a device gets.
type Role uint8

// The roles.
const (
	RoleNode Role = iota + 1 // node_in and node_out
	RolePod                  // pod_in and pod_out
	RolePort                 // port_in and pod_out
)

func (r Role) String() string {
	switch r {
	case RoleNode:
		return "node"
	case RolePod:
		return "pod"
	case RolePort:
		return "port"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Attachment is a device that gets programs.
type Attachment struct {
	Index      int
	Name       string
	Role       Role
	LinkHeader int // as in Device
	// Bridge is the index of the bridge that the device is a port of, of whatever role, and BridgeMAC is
	// the bridge's; 0 none.
	Bridge    int
	BridgeMAC [6]byte
}

// Uncovered is a device without programs that replies can leave by, or that was meant to have programs.
type Uncovered struct {
	Index  int
	Name   string
	Reason string // for the operator: what it means, and what can be done
}

// Select says which devices get programs, and which should have but do not. Both are in the order of their
// index. A device that is down is selected too where its name alone decides, so that its programs are there
// before its first packet.
//
// No packet may meet the programs twice on its way in, or on its way out: a flow that is passed on as it is
// (an identity) would be taken for a clash with itself. Of a bond, the bond; of a VRF, its members; of a
// bridge, the bridge itself while no pod hangs on it, and else its ports.
func Select(s Snapshot, cfg Config) ([]Attachment, []Uncovered) {
	c := classify(s, cfg)
	var attach []Attachment
	var uncovered []Uncovered
	for _, d := range s.Devices {
		role, reason := c.role(d)
		if role != 0 {
			bridge, _ := s.Bridge(d)
			attach = append(attach, Attachment{
				Index: d.Index, Name: d.Name, Role: role, LinkHeader: d.LinkHeader,
				Bridge: bridge.Index, BridgeMAC: bridge.MAC,
			})
		} else if reason != "" {
			uncovered = append(uncovered, Uncovered{Index: d.Index, Name: d.Name, Reason: reason})
		}
	}
	return attach, uncovered
}

// classified is what the role of one device depends on in the others. The maps are by index.
type classified struct {
	Snapshot
	named    []string     // patterns of --devices
	node     map[int]bool // selected as the node's own, by name or by default
	pod      map[int]bool // a pod's, by name
	podPorts map[int]bool // a bridge that pods hang on
	leaves   map[int]bool // a route leads out of it
}

func classify(s Snapshot, cfg Config) classified {
	c := classified{s, cfg.Devices, map[int]bool{}, map[int]bool{}, map[int]bool{}, map[int]bool{}}
	defaults, masters := map[int]bool{}, map[int]bool{}
	for _, r := range s.Routes {
		// An address of the link's own scope is no client's: services are reached by routed packets.
		if to := r.Destination.Addr(); !to.IsLinkLocalUnicast() && !to.IsMulticast() {
			c.leaves[r.Device] = true
		}
		if r.Destination.Bits() == 0 {
			defaults[r.Device] = true
		}
	}
	for _, d := range s.Devices {
		masters[d.Master] = true
	}
	for _, d := range s.Devices {
		named := matchAny(cfg.Devices, d.Name)
		byDefault := len(cfg.Devices) == 0 && (defaults[d.Index] || isOverlay(d) && d.Up && c.routed(d))
		switch {
		case d.Loopback:
		case named || byDefault:
			c.node[d.Index] = true
		// Masters are left out by looking, not by name: a bridge may be called anything.
		case masters[d.Index] || d.Kind == "bridge" || d.Kind == "vrf" || isBond(d):
		case matchAny(cfg.PodDevices, d.Name):
			c.pod[d.Index] = true
			if bridge, ok := s.Bridge(d); ok {
				c.podPorts[bridge.Index] = true
			}
		}
	}
	if len(cfg.Devices) > 0 {
		return c
	}
	// Where the default route leads over the pods' own bridge, the cable is one of its ports.
	for _, d := range s.Devices {
		cable := d.Kind == "" || d.Kind == "vlan" || isBond(d)
		if bridge, ok := s.Bridge(d); ok && cable && !c.pod[d.Index] && defaults[bridge.Index] && c.podPorts[bridge.Index] {
			c.node[d.Index] = true
		}
	}
	return c
}

// role returns the role of a device, or why it has none; neither where none is called for.
func (c classified) role(d Device) (Role, string) {
	master, _ := c.Device(d.Master)
	switch {
	case d.Loopback:
		return 0, ""
	case c.node[d.Index]:
		switch {
		case c.podPorts[d.Index]:
			if !matchAny(c.named, d.Name) {
				return 0, "" // what leaves by it leaves by its ports, of which each speaks for itself
			}
			return 0, "refused: pods hang on this bridge, so the programs are on its ports, and on the bridge at " +
				"once they would break connections; do not name it with --devices, but its physical port, if it has one"
		case d.Kind == "vrf":
			return 0, "a VRF: programs belong on its members; name them with --devices"
		case isBond(master):
			return 0, fmt.Sprintf("a member of %s: programs belong there, where the IP address is; "+
				"name %s with --devices", master.Name, master.Name)
		case master.Kind == "bridge" && c.node[master.Index] && !c.podPorts[master.Index]:
			return 0, fmt.Sprintf("a port of %s, which has programs: here as well they would break connections; "+
				"name only one of them with --devices", master.Name)
		}
		return RoleNode, ""
	case c.pod[d.Index]:
		if _, ok := c.Bridge(d); ok {
			return RolePort, ""
		}
		if !c.routed(d) {
			return 0, fmt.Sprintf("a member of %s (%s), which does not route: the pod behind it reaches no service, "+
				"and its replies are not translated", master.Name, master.Kind)
		}
		return RolePod, ""
	case d.Up && c.podPorts[d.Master] && c.leaves[d.Master]:
		return 0, fmt.Sprintf("a port of %s, a bridge that pods hang on: replies that leave by it are not translated, and "+
			"clients behind it reach no service; name it with --devices, or with --pod-devices if a pod is behind it", master.Name)
	case !d.Up || !c.leaves[d.Index] || d.Kind == "vrf": // what leaves by a VRF leaves by its members
		return 0, ""
	case c.podPorts[d.Index]:
		return 0, "" // as above
	case d.Kind == "bridge":
		return 0, "a bridge without programs: replies that leave by it are not translated, and clients behind it " +
			"reach no service; unless pods hang on it, name it with --devices"
	}
	return 0, "replies that leave by it are not translated, and clients behind it reach no service; name it with " +
		"--devices, or with --pod-devices if a pod is behind it"
}

// routed reports whether what comes in by a device goes to the IP stack and not to a master that takes it:
// it has no master, or a VRF.
func (c classified) routed(d Device) bool {
	master, ok := c.Device(d.Master)
	return !ok || master.Kind == "vrf"
}

func isBond(d Device) bool { return d.Kind == "bond" || d.Kind == "team" }

func isOverlay(d Device) bool {
	switch d.Kind {
	case "vxlan", "geneve", "wireguard", "ipip", "ip6tnl", "sit", "gre", "ip6gre", "gretap", "ip6gretap":
		return true
	}
	return false
}

func matchAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, _ := path.Match(pattern, name) // a bad pattern is Validate's to refuse
		return ok
	})
}
