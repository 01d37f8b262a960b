// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The netlink library's parsers of addresses and routes are private to it, its public one for devices reads
// sysfs, which is that of another namespace, and the one for attributes panics at some that are cut short.
// Listings and notifications are therefore read here, by the same functions.

type attribute struct {
	kind  uint16
	value []byte
}

func parseAttributes(b []byte) ([]attribute, error) {
	var attributes []attribute
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return nil, fmt.Errorf("an attribute of %d bytes in %d", size, len(b))
		}
		kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		attributes = append(attributes, attribute{kind, b[unix.SizeofRtAttr:size]})
		b = b[min(len(b), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
	}
	return attributes, nil
}

// hop is one way of one of the kernel's routes: what is published, and what else tells two of them apart.
type hop struct {
	Route
	tos byte
	// from is the source prefix of an IPv6 route that has one.
	from netip.Addr
	// source is the address that an IPv4 route prefers as source. An IPv6 route loses its own without a
	// message when the address goes, so there it cannot be part of what the route is recognised by.
	source netip.Addr
	// multipath: an IPv4 hop of several. (An IPv6 one is told of alone when it alone goes.)
	multipath bool
}

// slot is a hop without what a replacement may change; a route replaces those in its slot.
func (h hop) slot() hop {
	h.Device, h.Gateway, h.source, h.multipath = 0, netip.Addr{}, netip.Addr{}, false
	return h
}

// decodeDevice returns false for messages that tell nothing of a device as a whole.
func decodeDevice(message []byte) (Device, bool, error) {
	if len(message) < unix.SizeofIfInfomsg {
		return Device{}, false, fmt.Errorf("decode device: %d bytes", len(message))
	}
	header := nl.DeserializeIfInfomsg(message)
	// A bridge tells of its ports in messages of its own family, and in one of them a port that leaves the
	// bridge looks like a device that is deleted. The same news comes in ordinary messages too.
	if header.Family != unix.AF_UNSPEC {
		return Device{}, false, nil
	}
	d := Device{
		Index:    int(header.Index),
		Up:       header.Flags&unix.IFF_UP != 0,
		Loopback: header.Flags&unix.IFF_LOOPBACK != 0,
	}
	if header.Type == unix.ARPHRD_ETHER || header.Type == unix.ARPHRD_LOOPBACK {
		d.LinkHeader = 14
	}
	attributes, err := parseAttributes(message[unix.SizeofIfInfomsg:])
	if err != nil {
		return Device{}, false, fmt.Errorf("decode device %d: %w", d.Index, err)
	}
	elsewhere := false
	for _, a := range attributes {
		switch a.kind {
		case unix.IFLA_WIRELESS: // an event of a wireless driver, with nothing but the name
			return Device{}, false, nil
		case unix.IFLA_IFNAME:
			d.Name = unix.ByteSliceToString(a.value)
		case unix.IFLA_ADDRESS:
			if len(a.value) == len(d.MAC) {
				d.MAC = [6]byte(a.value)
			}
		case unix.IFLA_MASTER:
			d.Master = int(u32(a.value))
		case unix.IFLA_LINK:
			d.Parent = int(u32(a.value))
		case unix.IFLA_LINK_NETNSID:
			elsewhere = true
		case unix.IFLA_LINKINFO:
			if d.Kind, d.VLAN, err = decodeKind(a.value); err != nil {
				return Device{}, false, fmt.Errorf("decode device %s: %w", d.Name, err)
			}
		}
	}
	if elsewhere || d.Kind == "veth" { // the other end of a veth is not below it
		d.Parent = 0
	}
	return d, true, nil
}

func decodeKind(info []byte) (kind string, vlan uint16, err error) {
	attributes, err := parseAttributes(info)
	if err != nil {
		return "", 0, err
	}
	for _, a := range attributes {
		switch a.kind {
		case unix.IFLA_INFO_KIND:
			kind = unix.ByteSliceToString(a.value)
		case unix.IFLA_INFO_DATA: // comes after the kind
			if kind != "vlan" {
				continue
			}
			data, err := parseAttributes(a.value)
			if err != nil {
				return "", 0, err
			}
			for _, a := range data {
				if a.kind == unix.IFLA_VLAN_ID && len(a.value) >= 2 {
					vlan = binary.NativeEndian.Uint16(a.value)
				}
			}
		}
	}
	return kind, vlan, nil
}

// decodeAddress returns false for an address of another family.
func decodeAddress(message []byte) (Address, bool, error) {
	if len(message) < unix.SizeofIfAddrmsg {
		return Address{}, false, fmt.Errorf("decode address: %d bytes", len(message))
	}
	header := nl.DeserializeIfAddrmsg(message)
	if header.Family != unix.AF_INET && header.Family != unix.AF_INET6 {
		return Address{}, false, nil
	}
	attributes, err := parseAttributes(message[unix.SizeofIfAddrmsg:])
	if err != nil {
		return Address{}, false, fmt.Errorf("decode address of device %d: %w", header.Index, err)
	}
	var local, peer netip.Addr // an address without a peer is in both, or, IPv6, in the second only
	flags := uint32(header.Flags)
	for _, a := range attributes {
		switch a.kind {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(a.value)
		case unix.IFA_ADDRESS:
			peer, _ = netip.AddrFromSlice(a.value)
		case unix.IFA_FLAGS: // the header has room for the first eight only
			flags = u32(a.value)
		}
	}
	address := Address{
		Device:     int(header.Index),
		Prefix:     netip.PrefixFrom(peer, int(header.Prefixlen)),
		Secondary:  flags&unix.IFA_F_SECONDARY != 0,
		Tentative:  flags&unix.IFA_F_TENTATIVE != 0 && flags&unix.IFA_F_OPTIMISTIC == 0,
		Deprecated: flags&unix.IFA_F_DEPRECATED != 0,
	}
	if local.IsValid() && local != peer {
		address.Prefix = netip.PrefixFrom(local, local.BitLen())
	}
	if !address.Prefix.IsValid() {
		return Address{}, false, fmt.Errorf("decode address of device %d: no address", header.Index)
	}
	return address, true, nil
}

// decodeRoute returns a route's slot, and its hops unless it leads nowhere (a blackhole); false for routes
// that are not ours to know: other families, the local table, the IPv6 cache.
func decodeRoute(message []byte) (slot hop, hops []hop, ok bool, err error) {
	if len(message) < unix.SizeofRtMsg {
		return hop{}, nil, false, fmt.Errorf("decode route: %d bytes", len(message))
	}
	header := nl.DeserializeRtMsg(message)
	slot.Table = int(header.Table)
	slot.tos = header.Tos
	destination := netip.IPv4Unspecified()
	switch {
	case header.Flags&unix.RTM_F_CLONED != 0:
		return hop{}, nil, false, nil
	case header.Family == unix.AF_INET6:
		destination = netip.IPv6Unspecified()
	case header.Family != unix.AF_INET:
		return hop{}, nil, false, nil
	}
	attributes, err := parseAttributes(message[unix.SizeofRtMsg:])
	if err != nil {
		return hop{}, nil, false, fmt.Errorf("decode route: %w", err)
	}
	var only hop // device and gateway of a route with one hop
	var source netip.Addr
	var multipath []byte
	for _, a := range attributes {
		switch a.kind {
		case unix.RTA_TABLE: // the header has room for 255
			slot.Table = int(u32(a.value))
		case unix.RTA_DST:
			destination, _ = netip.AddrFromSlice(a.value)
		case unix.RTA_PRIORITY:
			slot.Metric = int(u32(a.value))
		case unix.RTA_SRC:
			slot.from, _ = netip.AddrFromSlice(a.value)
		case unix.RTA_PREFSRC:
			source, _ = netip.AddrFromSlice(a.value)
		case unix.RTA_OIF:
			only.Device = int(u32(a.value))
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			only.Gateway = gateway(a)
		case unix.RTA_MULTIPATH:
			multipath = a.value
		}
	}
	if slot.Table == unix.RT_TABLE_LOCAL {
		return hop{}, nil, false, nil
	}
	slot.Destination = netip.PrefixFrom(destination, int(header.Dst_len))
	if !slot.Destination.IsValid() {
		return hop{}, nil, false, fmt.Errorf("decode route: no destination")
	}
	if header.Type != unix.RTN_UNICAST {
		return slot, nil, true, nil
	}
	add := func(device int, gateway netip.Addr) {
		h := slot
		h.Device, h.Gateway = device, gateway
		if header.Family == unix.AF_INET {
			h.source, h.multipath = source, multipath != nil
		}
		hops = append(hops, h)
	}
	if only.Device != 0 {
		add(only.Device, only.Gateway)
	}
	for len(multipath) >= unix.SizeofRtNexthop {
		next := nl.DeserializeRtNexthop(multipath)
		size := int(next.RtNexthop.Len)
		if size < unix.SizeofRtNexthop || size > len(multipath) {
			return hop{}, nil, false, fmt.Errorf("decode route to %s: hop of %d bytes", slot.Destination, size)
		}
		attributes, err := parseAttributes(multipath[unix.SizeofRtNexthop:size])
		if err != nil {
			return hop{}, nil, false, fmt.Errorf("decode route to %s: %w", slot.Destination, err)
		}
		var via netip.Addr
		for _, a := range attributes {
			if t := a.kind; t == unix.RTA_GATEWAY || t == unix.RTA_VIA {
				via = gateway(a)
			}
		}
		add(int(next.RtNexthop.Ifindex), via)
		multipath = multipath[min(len(multipath), (size+unix.RTNH_ALIGNTO-1)&^(unix.RTNH_ALIGNTO-1)):]
	}
	return slot, hops, true, nil
}

// gateway reads RTA_GATEWAY, an address, or RTA_VIA, an address after its family.
func gateway(a attribute) netip.Addr {
	value := a.value
	if a.kind == unix.RTA_VIA && len(value) > 2 {
		value = value[2:]
	}
	addr, _ := netip.AddrFromSlice(value)
	return addr
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}
