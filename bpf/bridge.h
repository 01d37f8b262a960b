/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Ports of bridges, and VLANs: what of a device's frames goes to the host's stack, and by which device.
 *
 * A bridge carries a frame from port to port by its MAC address, past the stack. What is translated must not go
 * that way, for the stack would see one direction of a connection: its frame is sent to the bridge's own MAC.
 */
#ifndef LBAGENT_BRIDGE_H
#define LBAGENT_BRIDGE_H

#include "flow.h"

#define QUOTED_IPV6_OPTIONS_MAX 4
#define ICMP_REDIRECT 5
#define ICMPV6_REDIRECT 137
#define ICMPV6_REDIRECTED_HEADER 4 /* RFC 4861, 4.6.3 */

struct icmp_redirect { /* of both families */
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 gateway; /* IPv4 */
};

struct icmpv6_redirect {
	struct icmp_redirect icmp;
	struct in6_addr target, destination;
};

struct ndisc_option {
	__u8 type;
	__u8 length; /* in 8 bytes, these 2 counted */
	__u8 reserved[6];
};

/* vlan_has_device tells whether a tagged frame is that of another device, which is told apart by the tag. */
static __always_inline bool vlan_has_device(ctx_t *ctx, const struct pkt *pkt)
{
	struct vlan_key key = { .parent = ctx_device(ctx), .id = pkt->vlan };

	return bpf_map_lookup_elem(&vlans, &key);
}

/* port_lookup returns what is known of the device as the port of a bridge, NULL where it is none. The element
 * may become another's while it is read; that can cost a frame, at the moment when a port comes or goes. */
static __always_inline const struct device *port_lookup(ctx_t *ctx)
{
	__u32 index = ctx_device(ctx);

	return bpf_map_lookup_elem(&devices, &index);
}

static __always_inline bool mac_equal(const __u8 *a, const __u8 *b)
{
	const __u16 *x = (const __u16 *)a, *y = (const __u16 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

/* frame_is_bridges tells whether the frame is sent to the bridge itself, and so to the host. */
static __always_inline bool frame_is_bridges(ctx_t *ctx, const struct device *port)
{
	const struct ethhdr *eth = ctx_at(ctx, 0, sizeof(*eth));

	return eth && mac_equal(eth->h_dest, port->bridge_mac);
}

/* frame_to_bridge sends the frame to the bridge itself. False: it was already, or the bridge is not known. */
__noinline bool frame_to_bridge(ctx_t *ctx)
{
	const struct device *port = port_lookup(ctx);
	struct ethhdr *eth = ctx_at(ctx, 0, sizeof(*eth));

	if (!port || !eth || mac_equal(eth->h_dest, port->bridge_mac))
		return false;
	__builtin_memcpy(eth->h_dest, port->bridge_mac, MAC_LENGTH);
	return true;
}

/* quoted_tuple reads the beginning of the packet that an ICMP error is about. */
static __always_inline bool quoted_tuple(ctx_t *ctx, __u32 offset, __u8 family, struct tuple *to)
{
	__be16 *ports;

	__builtin_memset(to, 0, sizeof(*to));
	if (family == 4) {
		struct iphdr *ip = ctx_at(ctx, offset, sizeof(*ip));

		if (!ip || ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET))
			return false;
		address_set_ipv4(to->source, ip->saddr);
		address_set_ipv4(to->destination, ip->daddr);
		to->protocol = ip->protocol;
		offset += ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = ctx_at(ctx, offset, sizeof(*ip));

		if (!ip)
			return false;
		__builtin_memcpy(to->source, &ip->saddr, ADDRESS_LENGTH);
		__builtin_memcpy(to->destination, &ip->daddr, ADDRESS_LENGTH);
		to->protocol = ip->nexthdr; /* one with extension headers is not found */
		offset += sizeof(*ip);
	}
	ports = ctx_at(ctx, offset, 2 * sizeof(*ports));
	if (!ports)
		return false;
	to->source_port = bpf_ntohs(ports[0]);
	to->destination_port = bpf_ntohs(ports[1]);
	return true;
}

/* tuple_is_translated tells whether this is what the stack sees of a flow that is another one outside. */
static __always_inline bool tuple_is_translated(const struct tuple *t, __u64 now)
{
	struct flow *flow = flow_find(t, now);

	return flow && flow->hook == AT_EGRESS;
}

/* redirect_is_ours tells whether a packet is an ICMP redirect about a translated flow: the stack, which sees
 * client and backend behind one device, tells them of a shorter way, past the translation. The packet is one
 * whose protocol has no ports. */
__noinline bool redirect_is_ours(ctx_t *ctx, struct pkt *pkt)
{
	struct tuple quoted, inverse;
	struct icmp_redirect *icmp;
	__u32 offset;
	__u64 now;

	if (!pkt || !pkt_is_icmp(pkt))
		return false;
	offset = pkt->l4;
	icmp = ctx_at(ctx, offset, sizeof(*icmp));
	if (!icmp || icmp->type != (pkt->family == 4 ? ICMP_REDIRECT : ICMPV6_REDIRECT))
		return false;
	ctx_pull(ctx);
	if (pkt->family == 4) {
		offset += sizeof(*icmp);
	} else {
		struct ndisc_option *option;

		offset += sizeof(struct icmpv6_redirect);
		for (int i = 0; i < QUOTED_IPV6_OPTIONS_MAX; i++) {
			option = ctx_at(ctx, offset, sizeof(*option));
			if (!option || !option->length)
				return false;
			if (option->type == ICMPV6_REDIRECTED_HEADER)
				break;
			offset += option->length * 8;
		}
		offset += sizeof(*option);
	}
	if (!quoted_tuple(ctx, offset, pkt->family, &quoted))
		return false;
	now = clock_now();
	tuple_invert(&inverse, &quoted);
	return tuple_is_translated(&inverse, now) || tuple_is_translated(&quoted, now);
}

#endif
