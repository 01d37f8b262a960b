// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// values lets cmp compare what is comparable but has no exported fields.
var values = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()}

func linkMessage(family uint8, hardware uint16, flags uint32, attributes ...*nl.RtAttr) []byte {
	header := nl.NewIfInfomsg(int(family))
	header.Index, header.Type, header.Flags = 7, hardware, flags
	message := header.Serialize()
	for _, a := range attributes {
		message = append(message, a.Serialize()...)
	}
	return message
}

func linkInfo(kind string, data ...*nl.RtAttr) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(unix.IFLA_INFO_KIND, nl.ZeroTerminated(kind))
	if len(data) > 0 {
		nested := info.AddRtAttr(unix.IFLA_INFO_DATA, nil)
		for _, a := range data {
			nested.AddChild(a)
		}
	}
	return info
}

// Devices of all kinds, also of those that the kernel of the test may lack.
func TestDecodeDevice(t *testing.T) {
	name := func(s string) *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(s)) }
	number := func(attribute int, v uint32) *nl.RtAttr { return nl.NewRtAttr(attribute, nl.Uint32Attr(v)) }
	mac := [6]byte{2, 0, 0, 0, 0, 1}
	tests := []struct {
		name    string
		message []byte
		want    Device
		ignored bool
	}{
		{
			name: "hardware",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, unix.IFF_UP, name("eth0"),
				nl.NewRtAttr(unix.IFLA_ADDRESS, mac[:])),
			want: Device{Name: "eth0", Up: true, LinkHeader: 14, MAC: mac},
		},
		{
			name:    "lo",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_LOOPBACK, unix.IFF_LOOPBACK, name("lo")),
			want:    Device{Name: "lo", Loopback: true, LinkHeader: 14},
		},
		{
			name: "VLAN",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, 0, name("eth0.7"), number(unix.IFLA_LINK, 2),
				linkInfo("vlan", nl.NewRtAttr(unix.IFLA_VLAN_ID, nl.Uint16Attr(7)))),
			want: Device{Name: "eth0.7", Kind: "vlan", LinkHeader: 14, Parent: 2, VLAN: 7},
		},
		{
			name: "member of a bond, nested flag set",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, 0, name("eth1"), number(unix.IFLA_MASTER, 3),
				nl.NewRtAttr(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, nil)),
			want: Device{Name: "eth1", LinkHeader: 14, Master: 3},
		},
		{
			name:    "WireGuard",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_NONE, 0, name("wg0"), linkInfo("wireguard")),
			want:    Device{Name: "wg0", Kind: "wireguard"},
		},
		{
			name: "ipip, whose hardware address is an IP address",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_TUNNEL, 0, name("tunl0"), linkInfo("ipip"),
				nl.NewRtAttr(unix.IFLA_ADDRESS, []byte{192, 0, 2, 1})),
			want: Device{Name: "tunl0", Kind: "ipip"},
		},
		{
			name: "veth, whose other end is not below it",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, 0, name("veth1"), number(unix.IFLA_LINK, 8),
				linkInfo("veth")),
			want: Device{Name: "veth1", Kind: "veth", LinkHeader: 14},
		},
		{
			name: "macvlan on a device of another namespace",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, 0, name("mv0"), number(unix.IFLA_LINK, 8),
				number(unix.IFLA_LINK_NETNSID, 0), linkInfo("macvlan")),
			want: Device{Name: "mv0", Kind: "macvlan", LinkHeader: 14},
		},
		{
			name:    "a bridge about its port",
			message: linkMessage(unix.AF_BRIDGE, unix.ARPHRD_ETHER, 0, name("veth1")),
			ignored: true,
		},
		{
			name: "an event of a wireless driver",
			message: linkMessage(unix.AF_UNSPEC, unix.ARPHRD_ETHER, 0, name("wlan0"),
				nl.NewRtAttr(unix.IFLA_WIRELESS, []byte{1, 2, 3, 4})),
			ignored: true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok, err := decodeDevice(tt.message)
			if err != nil || ok == tt.ignored {
				t.Fatalf("got %v, %v", ok, err)
			}
			if !tt.ignored {
				tt.want.Index = 7
			}
			if diff := cmp.Diff(tt.want, got, values); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// An IPv4 route by an IPv6 gateway, in a table with a large number, and one that is a cached copy.
func TestDecodeRoute(t *testing.T) {
	header := nl.NewRtMsg()
	header.Family, header.Dst_len, header.Table = unix.AF_INET, 16, unix.RT_TABLE_UNSPEC
	message := header.Serialize()
	via := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	via = append(via, netip.MustParseAddr("fe80::1").AsSlice()...)
	for _, a := range []*nl.RtAttr{
		nl.NewRtAttr(unix.RTA_DST, []byte{10, 9, 0, 0}), nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(3)),
		nl.NewRtAttr(unix.RTA_VIA, via), nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(51820)),
	} {
		message = append(message, a.Serialize()...)
	}
	_, hops, ok, err := decodeRoute(message)
	want := []hop{{Route: Route{Table: 51820, Destination: netip.MustParsePrefix("10.9.0.0/16"), Device: 3,
		Gateway: netip.MustParseAddr("fe80::1")}}}
	if diff := cmp.Diff(want, hops, values, cmp.AllowUnexported(hop{})); !ok || err != nil || diff != "" {
		t.Errorf("%v, %v, -want +got:\n%s", ok, err, diff)
	}
	header.Flags = unix.RTM_F_CLONED
	if _, _, ok, err := decodeRoute(header.Serialize()); ok || err != nil {
		t.Errorf("a cached route: %v, %v", ok, err)
	}
}

// What the kernel drops in silence when an address goes: older kernels more than newer ones.
func TestDeleteAddress(t *testing.T) {
	route := func(destination string, device int, source string, multipath bool) hop {
		h := hop{Route: Route{Table: 254, Destination: netip.MustParsePrefix(destination), Device: device}, multipath: multipath}
		if source != "" {
			h.source = netip.MustParseAddr(source)
		}
		return h
	}
	address := func(s string, device int) Address { return Address{Prefix: netip.MustParsePrefix(s), Device: device} }
	tests := []struct {
		name      string
		addresses []Address // the first one is deleted
		gone      []string
		stale     bool
	}{
		{"one of two of a device", []Address{address("10.0.0.1/24", 1), address("10.0.0.2/24", 1)}, []string{"10.2.0.0/16"}, false},
		{"one that another device has too", []Address{address("10.0.0.1/24", 2), address("10.0.0.2/24", 2), address("10.0.0.1/32", 1)}, nil, false},
		{"the last of a device", []Address{address("10.0.0.1/24", 1), address("10.0.0.1/24", 2), address("2001:db8::1/64", 1)},
			[]string{"10.1.0.0/16", "10.2.0.0/16"}, true},
		{"IPv6", []Address{address("2001:db8::1/64", 1)}, nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tables := newTables()
			all := []hop{route("10.1.0.0/16", 1, "", false), route("10.2.0.0/16", 1, "10.0.0.1", false), route("10.3.0.0/16", 1, "", true),
				route("10.4.0.0/16", 3, "", false), route("2001:db8:1::/64", 1, "", false)}
			for _, h := range all {
				tables.hops[h] = struct{}{}
			}
			for _, a := range tt.addresses {
				tables.addresses[addressKey{a.Device, a.Prefix}] = a
			}
			if !tables.deleteAddress(tt.addresses[0]) || tables.deleteAddress(tt.addresses[0]) {
				t.Error("changed is wrong")
			}
			var gone []string
			for _, h := range all {
				if _, ok := tables.hops[h]; !ok {
					gone = append(gone, h.Destination.String())
				}
			}
			if diff := cmp.Diff(tt.gone, gone); diff != "" || tables.staleRoutes != tt.stale {
				t.Errorf("stale %v, -want +got:\n%s", tables.staleRoutes, diff)
			}
		})
	}
}

// Whatever arrives, it is an error at worst.
func FuzzApply(f *testing.F) {
	f.Add(uint16(unix.RTM_NEWLINK), linkMessage(0, 1, 1, linkInfo("vlan", nl.NewRtAttr(unix.IFLA_VLAN_ID, []byte{1}))))
	f.Add(uint16(unix.RTM_NEWADDR), append(nl.NewIfAddrmsg(unix.AF_INET).Serialize(),
		nl.NewRtAttr(unix.IFA_LOCAL, []byte{10, 0, 0, 1}).Serialize()...))
	f.Add(uint16(unix.RTM_NEWROUTE), append(nl.NewRtMsg().Serialize(),
		nl.NewRtAttr(unix.RTA_MULTIPATH, []byte{9, 0, 0, 0, 0, 0, 0, 0, 0}).Serialize()...))
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		tables := newTables()
		for _, kind := range []uint16{kind, unix.RTM_NEWLINK, unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWROUTE,
			unix.RTM_DELROUTE, unix.RTM_DELLINK} {
			_, _ = tables.apply(syscall.NlMsghdr{Type: kind, Flags: unix.NLM_F_REPLACE}, data)
		}
		tables.snapshot()
	})
}
