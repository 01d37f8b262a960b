// SPDX-License-Identifier: Apache-2.0

// Package node is this host as plain values: its addresses, devices, bridge ports and routes, listed once
// and then followed by netlink. What is made of them is decided elsewhere, but for one thing that needs
// nothing else: which devices get programs, and by which ones a reply can leave without ([Select]).
package node

import (
	"net/netip"
	"slices"
)

// Snapshot is the host at one moment. The slices are sorted, so that equal hosts are equal snapshots;
// they are the reader's own.
type Snapshot struct {
	Addresses []Address // by device, then prefix
	Devices   []Device  // by index
	Routes    []Route   // by table, destination, metric, device and gateway; no two are equal
}

// Address is an IP address of a device.
type Address struct {
	// Prefix is the address itself with the length of its subnet: 10.0.0.7/24. Where a peer is configured
	// the length is that of the one address, as the subnet is the peer's.
	Prefix netip.Prefix
	Device int // index
	// Secondary: IPv4, not the first of its subnet on the device; IPv6, a temporary (privacy) address.
	Secondary bool
	// Tentative: IPv6, not yet or never found unique on its link; the kernel neither answers for it nor
	// sends from it.
	Tentative bool
	// Deprecated: no new connection of the host is to begin from it.
	Deprecated bool
}

// Device is a network device.
type Device struct {
	Index int
	Name  string
	// Kind is the kernel's name of the driver: "veth", "bridge", "vxlan", "wireguard", "vlan", "bond",
	// "tun" and so on. It is "" for hardware, and for lo.
	Kind     string
	Loopback bool
	Up       bool // set up by its administrator; a cable may still be missing
	// LinkHeader is the length of the header before the IP header: 14, or 0 for devices without one (tun,
	// WireGuard, ipip).
	LinkHeader int
	MAC        [6]byte // zero where the device has none
	Master     int     // index of the bridge, bond, team or VRF that it belongs to; 0 none
	Parent     int     // index of the device that it was made on (VLAN, macvlan, VXLAN); 0 none, or elsewhere
	VLAN       uint16  // of a VLAN device: its id
}

// Route is one way to a destination. Only routes by which a packet leaves are listed: no table of local
// addresses, no blackholes, and none whose device is down. A multipath route is several routes.
type Route struct {
	Table       int
	Destination netip.Prefix // masked
	Metric      int
	Device      int        // index
	Gateway     netip.Addr // invalid where the destination is on the link; IPv6 also for an IPv4 destination
}

// Device returns the device with an index.
func (s Snapshot) Device(index int) (Device, bool) {
	i, ok := slices.BinarySearchFunc(s.Devices, index, func(d Device, index int) int { return d.Index - index })
	if !ok {
		return Device{}, false
	}
	return s.Devices[i], true
}

// Bridge returns the bridge that a device is a port of.
func (s Snapshot) Bridge(port Device) (Device, bool) {
	master, ok := s.Device(port.Master)
	if !ok || master.Kind != "bridge" {
		return Device{}, false
	}
	return master, true
}
