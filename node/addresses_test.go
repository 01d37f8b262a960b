// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// addrs parses addresses that are separated by blanks.
func addrs(text string) (list []netip.Addr) {
	for _, word := range strings.Fields(text) {
		list = append(list, netip.MustParseAddr(word))
	}
	return list
}

// listed is a list as the tests write it.
func listed[T any](list []T) string { return strings.Trim(fmt.Sprint(list), "[]") }

func TestNodePortAddresses(t *testing.T) {
	usual := []string{
		"dev eth0", "dev eth1", "dev veth0 veth",
		"addr lo 127.0.0.1/8", "addr lo ::1/128", "addr lo 203.0.113.9/32",
		"addr eth0 192.0.2.1/24", "addr eth0 192.0.2.2/24 secondary", "addr eth0 fe80::1/64", "addr eth0 2001:db8::1/64",
		"addr eth1 10.0.0.1/8", "addr eth1 fd00:1::1/64",
		"route 0.0.0.0/0 eth0", "route ::/0 eth0", "route 10.0.0.0/8 eth1",
	}
	tests := []struct {
		name string
		flag string
		node string // of the Node object
		host []string
		want string
	}{
		{"no Node object", "primary,localhost", "", usual, "192.0.2.1 2001:db8::1"},
		{"Node object", "primary", "10.0.0.1 fd00:1::1", usual, "10.0.0.1 fd00:1::1"},
		{"Node object of one family", "primary", "10.0.0.1", usual, "10.0.0.1"},
		{"Node object with an address that is not here", "primary", "198.51.100.1 fd00:1::1", usual, "fd00:1::1"},
		{"all, without loopback and link-local", "all", "10.0.0.1", usual, "10.0.0.1 192.0.2.1 192.0.2.2 203.0.113.9 2001:db8::1 fd00:1::1"},
		{"localhost alone is nothing here", "localhost", "", usual, ""},
		{"none", "", "", usual, ""},
		{"CIDRs of both families", "192.0.2.0/24,fd00::/8", "10.0.0.1", usual, "192.0.2.1 192.0.2.2 fd00:1::1"},
		{"of IPv4 only: all of IPv6", "10.0.0.0/8", "", usual, "10.0.0.1 2001:db8::1 fd00:1::1"},
		{"of IPv6 only: all of IPv4", "2001:db8::/32", "", usual, "10.0.0.1 192.0.2.1 192.0.2.2 203.0.113.9 2001:db8::1"},
		{"of loopback: all of IPv6", "127.0.0.0/8", "", usual, "2001:db8::1 fd00:1::1"},
		{"CIDR beside primary: of IPv6 the primary one", "primary,10.0.0.0/8", "", usual, "10.0.0.1 192.0.2.1 2001:db8::1"},
		{"CIDR with host bits", "10.0.0.7/8,fd00:1::7/64", "", usual, "10.0.0.1 fd00:1::1"},
		{"two default routes: the lower metric", "primary", "", []string{
			"dev eth0", "dev eth1", "addr eth0 192.0.2.1/24", "addr eth1 10.0.0.1/8",
			"route 0.0.0.0/0 eth0 254 200", "route 0.0.0.0/0 eth1 254 100"}, "10.0.0.1"},
		{"default routes of two tables: the main one", "primary", "", []string{
			"dev vpn0", "dev eth0", "addr vpn0 10.0.0.1/8", "addr eth0 192.0.2.1/24",
			"route 0.0.0.0/0 vpn0 52", "route 0.0.0.0/0 eth0 254 100"}, "192.0.2.1"},
		{"the device of the first has no address", "primary", "", []string{
			"dev ppp0", "dev eth0", "addr eth0 192.0.2.1/24",
			"route 0.0.0.0/0 ppp0", "route 0.0.0.0/0 eth0 254 100"}, "192.0.2.1"},
		{"privacy, deprecated and tentative addresses", "primary", "", []string{
			"dev eth0", "addr eth0 2001:db8::1/64 tentative", "addr eth0 2001:db8::2/64 deprecated", "addr eth0 2001:db8::3/64 secondary",
			"addr eth0 2001:db8::4/64", "addr eth0 2001:db8::5/64", "route ::/0 eth0"}, "2001:db8::4"},
		{"nothing but a deprecated one", "primary", "", []string{
			"dev eth0", "addr eth0 2001:db8::1/64 tentative", "addr eth0 2001:db8::2/64 deprecated", "route ::/0 eth0"}, "2001:db8::2"},
		{"link-local only", "primary", "", []string{"dev eth0", "addr eth0 fe80::2/64", "route ::/0 eth0"}, ""},
		{"no default route", "primary", "", []string{"dev eth0", "addr eth0 192.0.2.1/24"}, ""},
		{"one address on two devices", "all", "", []string{
			"dev eth0", "dev eth1", "addr eth0 192.0.2.1/24", "addr eth1 192.0.2.1/32"}, "192.0.2.1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := ParseNodePorts(strings.FieldsFunc(tt.flag, func(r rune) bool { return r == ',' }))
			if err != nil {
				t.Fatal(err)
			}
			if got := listed(NodePortAddresses(host(t, tt.host...), cfg, addrs(tt.node))); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestParseNodePorts(t *testing.T) {
	got, err := ParseNodePorts([]string{"primary", " localhost", "all", "10.1.2.3/8"})
	want := NodePorts{Primary: true, Localhost: true, All: true, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, word := range []string{"", "Primary", "10.0.0.1", "10.0.0.0/33", "::ffff:10.0.0.0/104", "eth0"} {
		if n, err := ParseNodePorts([]string{word}); err == nil {
			t.Errorf("%q is taken for %+v", word, n)
		}
	}
}

func TestPodRoutes(t *testing.T) {
	tests := []struct {
		name    string
		devices string // --devices
		host    []string
		want    string
	}{
		{"routed pods", "", []string{"dev eth0", "dev veth0 veth", "dev veth1 veth",
			"route 0.0.0.0/0 eth0", "route 192.0.2.0/24 eth0", "route 10.244.1.2/32 veth1", "route 10.244.1.1/32 veth0",
			"route fd00:244::1/128 veth0", "route fe80::/64 veth0", "route 10.244.2.0/24 eth0"},
			"10.244.1.1/32 10.244.1.2/32 fd00:244::1/128"},
		{"a bridge that pods hang on", "", []string{"dev eth0", "dev cni0 bridge", "dev veth0 veth master cni0",
			"route 0.0.0.0/0 eth0", "route 10.244.1.0/24 cni0", "route fd00:244:1::/64 cni0"},
			"10.244.1.0/24 fd00:244:1::/64"},
		{"a bridge without pods", "", []string{"dev eth0", "dev br0 bridge", "dev tap0 tun master br0", "route 10.9.0.0/16 br0"}, ""},
		{"a default route to a pod", "", []string{"dev veth0 veth", "dev eth0", "route 0.0.0.0/0 eth0", "route 0.0.0.0/0 veth0 100",
			"route 10.244.1.1/32 veth0"}, ""}, // so it is the node's own
		{"a default route to a pod that is none of the node's own", "eth0", []string{"dev veth0 veth", "dev eth0",
			"route 0.0.0.0/0 veth0", "route 10.244.1.1/32 veth0"}, "10.244.1.1/32"},
		{"one destination in two tables", "", []string{"dev eth0", "dev veth0 veth", "route 10.244.1.1/32 veth0", "route 10.244.1.1/32 veth0 100"},
			"10.244.1.1/32"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := Config{Devices: strings.Fields(tt.devices)}
			cfg.Defaults()
			if got := listed(PodRoutes(host(t, tt.host...), cfg)); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
