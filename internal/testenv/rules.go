// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// The rule set makes a node as strict as a careful administrator could: the stack never sees a VIP, and every
// packet belongs to a connection whose beginning it saw. The VIP chains come first in each hook but the last,
// where they come after everyone who might rewrite an address.
const strictRules = `
table inet strict {
	counter vip_prerouting {}
	counter vip_input {}
	counter vip_forward {}
	counter vip_output {}
	counter vip_postrouting {}
	counter invalid {}
	counter refused {}

	set vips4 { type ipv4_addr; flags interval; auto-merge; elements = { {{vips4}} } }
	set vips6 { type ipv6_addr; flags interval; auto-merge; elements = { {{vips6}} } }
	set node4 { type ipv4_addr; elements = { {{node4}} } }
	set node6 { type ipv6_addr; elements = { {{node6}} } }
	set node_ports { type inet_service; }
	set backends4 { type ipv4_addr; {{backends4}} }
	set backends6 { type ipv6_addr; {{backends6}} }

{{vipChains}}
	chain invalid_prerouting {
		type filter hook prerouting priority mangle; policy accept;
		ct state invalid counter name invalid drop
	}
	chain invalid_output {
		type filter hook output priority mangle; policy accept;
{{outputBridged}}
		ct state invalid counter name invalid drop
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
{{forwardBridged}}
		ip saddr { {{clients4}} } ip daddr @backends4 accept
		ip6 saddr { {{clients6}} } ip6 daddr @backends6 accept
{{forwardOutside}}
		counter name refused
	}
}
`

const vipChain = `	chain vip_HOOK {
		type filter hook HOOK priority PRIORITY; policy accept;
		ip saddr @vips4 counter name vip_HOOK drop
		ip daddr @vips4 counter name vip_HOOK drop
		ip6 saddr @vips6 counter name vip_HOOK drop
		ip6 daddr @vips6 counter name vip_HOOK drop
		ip saddr @node4 meta l4proto { tcp, udp } th sport @node_ports counter name vip_HOOK drop
		ip daddr @node4 meta l4proto { tcp, udp } th dport @node_ports counter name vip_HOOK drop
		ip6 saddr @node6 meta l4proto { tcp, udp } th sport @node_ports counter name vip_HOOK drop
		ip6 daddr @node6 meta l4proto { tcp, udp } th dport @node_ports counter name vip_HOOK drop
	}
`

func (l *Lab) loadRules(ctx context.Context) error {
	rules := l.masqueradeRules()
	if !l.Config.NoRules {
		rules += l.strictRules()
	}
	if rules == "" {
		return nil
	}
	if _, err := l.Node.Run(ctx, rules, "nft", "-f", "-"); err != nil {
		return err
	}
	// Now that connection tracking is in use, so that its sysctls are there.
	return l.Node.Sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
}

func (l *Lab) strictRules() string {
	var chains strings.Builder
	for _, hook := range []string{"prerouting", "input", "forward", "output", "postrouting"} {
		priority := "raw"
		if hook == "postrouting" {
			priority = "300"
		}
		chains.WriteString(strings.NewReplacer("HOOK", hook, "PRIORITY", priority).Replace(vipChain))
	}
	var backends4, backends6 []string
	for _, b := range l.Backends {
		backends4 = append(backends4, b.IPv4.String())
		backends6 = append(backends6, b.IPv6.String())
	}
	elements := func(list []string) string {
		if list == nil {
			return "" // an empty list is a syntax error
		}
		return "elements = { " + strings.Join(list, ", ") + " }"
	}
	outside := ""
	if l.Config.Masquerade {
		outside = "\t\tip saddr " + PodCIDR4 + " ip daddr " + outsideCIDR4 + " accept\n" +
			"\t\tip6 saddr " + PodCIDR6 + " ip6 daddr " + outsideCIDR6 + " accept"
	}
	forwardBridged, outputBridged := "", ""
	if l.Config.Bridge {
		// Where the rules see what the bridge carries, that is how pods find each other.
		forwardBridged = "\t\ticmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
		// What the stack says about packets that leave as they came, by the bridge, is invalid to its own
		// connection tracking (6.18).
		outputBridged = "\t\ticmpv6 type nd-redirect accept"
	}
	return strings.NewReplacer(
		"{{forwardBridged}}", forwardBridged, "{{outputBridged}}", outputBridged,
		"{{vips4}}", ServiceCIDR4+", "+LoadBalancerCIDR4+", "+ExternalCIDR4,
		"{{vips6}}", ServiceCIDR6+", "+LoadBalancerCIDR6+", "+ExternalCIDR6,
		"{{node4}}", l.Node.IPv4.String(), "{{node6}}", l.Node.IPv6.String(),
		"{{backends4}}", elements(backends4), "{{backends6}}", elements(backends6),
		"{{clients4}}", outsideCIDR4+", "+PodCIDR4, "{{clients6}}", outsideCIDR6+", "+PodCIDR6,
		"{{vipChains}}", chains.String(), "{{forwardOutside}}", outside,
	).Replace(strictRules)
}

func (l *Lab) masqueradeRules() string {
	if !l.Config.Masquerade {
		return ""
	}
	statement := "masquerade"
	if l.Config.MasqueradeTo != "" {
		statement = "meta l4proto { tcp, udp } masquerade to :" + l.Config.MasqueradeTo
	}
	return fmt.Sprintf(`
table inet cni {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr %[1]s ip daddr != %[1]s %[3]s
		ip6 saddr %[2]s ip6 daddr != %[2]s %[3]s
	}
}
`, PodCIDR4, PodCIDR6, statement)
}

// AddVIPs has the rule set take more addresses for VIPs.
func (l *Lab) AddVIPs(ctx context.Context, prefixes ...netip.Prefix) error {
	for _, p := range prefixes {
		set := "vips4"
		if p.Addr().Is6() {
			set = "vips6"
		}
		if err := l.addElement(ctx, set, p.String()); err != nil {
			return err
		}
	}
	return nil
}

// AddNodePorts has the rule set take these ports of the node's addresses for VIPs, which the stack does not
// see either.
func (l *Lab) AddNodePorts(ctx context.Context, ports ...uint16) error {
	for _, p := range ports {
		if err := l.addElement(ctx, "node_ports", fmt.Sprint(p)); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) addElement(ctx context.Context, set, element string) error {
	_, err := l.Node.Run(ctx, "", "nft", "add", "element", "inet", "strict", set, "{", element, "}")
	return err
}

// Counters are what the rule set of the node has dropped, in packets.
type Counters struct {
	VIP     map[string]uint64 // with a VIP in it; by hook, those of 0 left out
	Invalid uint64            // of no connection that connection tracking knows
	Refused uint64            // to be forwarded from someone or to someone that no rule allows
}

// Counters reads the counters of the rule set.
func (l *Lab) Counters(ctx context.Context) (Counters, error) {
	c := Counters{VIP: map[string]uint64{}}
	if l.Config.NoRules {
		return c, nil
	}
	out, err := l.Node.Run(ctx, "", "nft", "-j", "list", "counters", "table", "inet", "strict")
	if err != nil {
		return c, err
	}
	var list struct {
		Nftables []struct {
			Counter *struct {
				Name    string
				Packets uint64
			}
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return c, fmt.Errorf("read the counters of nft: %w", err)
	}
	found := 0
	for _, entry := range list.Nftables {
		if entry.Counter == nil {
			continue
		}
		found++
		hook, vip := strings.CutPrefix(entry.Counter.Name, "vip_")
		switch {
		case vip && entry.Counter.Packets != 0:
			c.VIP[hook] = entry.Counter.Packets
		case entry.Counter.Name == "invalid":
			c.Invalid = entry.Counter.Packets
		case entry.Counter.Name == "refused":
			c.Refused = entry.Counter.Packets
		}
	}
	if found != 7 {
		return c, fmt.Errorf("the rule set of %s has %d counters, want 7", l.Node.Name, found)
	}
	return c, nil
}

// VIPPackets returns how many packets with a VIP in them the node's stack has seen.
func (l *Lab) VIPPackets(ctx context.Context) (uint64, error) {
	c, err := l.Counters(ctx)
	var total uint64
	for _, packets := range c.VIP {
		total += packets
	}
	return total, err
}

// InvalidPackets returns how many packets the node's connection tracking took for invalid.
func (l *Lab) InvalidPackets(ctx context.Context) (uint64, error) {
	c, err := l.Counters(ctx)
	return c.Invalid, err
}

// ResetCounters sets the counters of the rule set to 0.
func (l *Lab) ResetCounters(ctx context.Context) error {
	if l.Config.NoRules {
		return nil
	}
	_, err := l.Node.Run(ctx, "", "nft", "reset", "counters", "table", "inet", "strict")
	return err
}

// CheckStrict returns an error that says all that a lab should not have seen: packets with a VIP or invalid
// ones in the node's stack, wrong checksums anywhere.
func (l *Lab) CheckStrict(ctx context.Context) error {
	c, err := l.Counters(ctx)
	if err != nil {
		return err
	}
	var errs []error
	if len(c.VIP) != 0 {
		errs = append(errs, fmt.Errorf("the node's stack saw packets with a VIP: %v", c.VIP))
	}
	if c.Invalid != 0 {
		errs = append(errs, fmt.Errorf("the node's connection tracking took %d packets for invalid", c.Invalid))
	}
	for _, h := range l.Hosts() {
		wrong, err := h.ChecksumErrors()
		if err != nil {
			return fmt.Errorf("read the checksum errors of %s: %w", h.Name, err)
		}
		if wrong != 0 {
			errs = append(errs, fmt.Errorf("%s had %d packets with a wrong checksum", h.Name, wrong))
		}
	}
	return errors.Join(errs...)
}
