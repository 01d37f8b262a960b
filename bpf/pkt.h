/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A packet as the data plane sees it: parsed once, rewritten at most once. */
#ifndef LBAGENT_PKT_H
#define LBAGENT_PKT_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "config.h"
#include "ctx_skb.h"
#include "types.h"

#define VLAN_TAGS_MAX 2
#define EXTENSION_HEADERS_MAX 8

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_DONT_FRAGMENT 0x4000
#define IPV6_FRAGMENT_OFFSET 0xfff8
#define IPV6_MORE_FRAGMENTS 0x0001

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct pkt {
	struct tuple tuple; /* as on the wire */
	__u16 l3; /* offset of the IP header */
	__u16 l4; /* offset of the TCP or UDP header */
	__u8 family; /* 4 or 6; 0 until the addresses of the tuple are known */
	__u8 tcp_flags; /* 0 for all but TCP */
	bool fragment; /* the first or a later one */
	bool ports; /* they are known: not those of a later fragment */
	bool link_local; /* sent to an IPv6 address of the link alone: no service's, but maybe a client's */
	bool switched; /* set by ingress: if the frame stays as it is, a bridge may carry it past the stack */
	__u16 vlan; /* id of the outermost tag; 0: none */
	__u32 length; /* of the IP packet; of all that a GSO packet stands for */
	__u32 sequence; /* of TCP, as are the next two */
	__u32 acknowledgement;
	__u32 segment; /* sequence numbers that it takes */
};

struct vlan_header {
	__be16 tag;
	__be16 ethertype;
};

struct ipv6_extension {
	__u8 next;
	__u8 length; /* in 8 bytes, the first 8 not counted */
	__u8 type; /* routing header */
	__u8 segments_left; /* routing header */
	__u8 rest[4];
};

struct ipv6_fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset; /* and flags */
	__be32 id;
};

static __always_inline void address_set_ipv4(__u8 *address, __be32 ipv4)
{
	__u32 *words = (__u32 *)address;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = ipv4;
}

static __always_inline bool address_equal(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline bool address_is_mapped(const struct in6_addr *a)
{
	return !a->s6_addr32[0] && !a->s6_addr32[1] && a->s6_addr32[2] == bpf_htonl(0xffff);
}

/* address_hairpin returns the two words of the hairpin address of an address's family. */
static __always_inline const volatile __u64 *address_hairpin(const __u8 *address)
{
	bool ipv6 = !address_is_mapped((const struct in6_addr *)address);

	return (const volatile __u64 *)hairpin_addresses[ipv6];
}

static __always_inline bool address_is_hairpin(const __u8 *address)
{
	const volatile __u64 *want = address_hairpin(address);
	const __u64 *have = (const __u64 *)address;

	return have[0] == want[0] && have[1] == want[1];
}

static __always_inline bool pkt_is_syn(const struct pkt *pkt)
{
	return (pkt->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

static __always_inline bool pkt_is_icmp(const struct pkt *pkt)
{
	return pkt->tuple.protocol == (pkt->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* pkt_parse_l4 reads the ports at pkt->l4. A function of its own to the verifier, as is the next one, for
 * whom its many ways in would otherwise be as many ways through what follows. */
__noinline enum reason pkt_parse_l4(ctx_t *ctx, struct pkt *pkt)
{
	__u32 offset, room;
	__u8 protocol;

	if (!pkt)
		return REASON_MALFORMED;
	protocol = pkt->tuple.protocol;
	offset = pkt->l4;
	room = pkt->l3 + pkt->length - offset;
	if (protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = ctx_at(ctx, offset, sizeof(*tcp));

		if (!tcp || tcp->doff * 4 < (int)sizeof(*tcp) || tcp->doff * 4U > room)
			return REASON_MALFORMED;
		pkt->tuple.source_port = bpf_ntohs(tcp->source);
		pkt->tuple.destination_port = bpf_ntohs(tcp->dest);
		pkt->tcp_flags = ((__u8 *)tcp)[13];
		pkt->sequence = bpf_ntohl(tcp->seq);
		pkt->acknowledgement = bpf_ntohl(tcp->ack_seq);
		pkt->segment = room - tcp->doff * 4 + tcp->syn + tcp->fin;
	} else if (protocol == IPPROTO_UDP) {
		struct udphdr *udp = ctx_at(ctx, offset, sizeof(*udp));
		__u16 length;

		if (!udp || sizeof(*udp) > room)
			return REASON_MALFORMED;
		length = bpf_ntohs(udp->len);
		/* A first fragment says the length of the whole. 0 says "to the end" (RFC 2675), which
		 * is only believed where the kernel made it. */
		if (!pkt->fragment && (length || !ctx_is_gso(ctx)) &&
		    (length < sizeof(*udp) || length > room))
			return REASON_MALFORMED;
		pkt->tuple.source_port = bpf_ntohs(udp->source);
		pkt->tuple.destination_port = bpf_ntohs(udp->dest);
	} else {
		return REASON_UNSUPPORTED;
	}
	pkt->ports = true;
	return pkt->fragment ? REASON_FRAGMENT : REASON_NONE;
}

/* pkt_skip_extension moves pkt->l4 behind one IPv6 extension header, and the protocol to what follows it. */
__noinline enum reason pkt_skip_extension(ctx_t *ctx, struct pkt *pkt)
{
	struct ipv6_extension *extension;
	__u32 behind;
	__u16 flags;

	if (!pkt)
		return REASON_MALFORMED;
	extension = ctx_at(ctx, pkt->l4, sizeof(*extension));
	if (!extension)
		return REASON_MALFORMED;
	behind = pkt->l4 + (extension->length + 1) * 8;
	if (pkt->tuple.protocol == IPPROTO_FRAGMENT) {
		behind = pkt->l4 + sizeof(struct ipv6_fragment);
		flags = bpf_ntohs(((struct ipv6_fragment *)extension)->offset);
		/* An atomic fragment, the first and the last, is a whole packet (RFC 6946). */
		if (flags & (IPV6_FRAGMENT_OFFSET | IPV6_MORE_FRAGMENTS))
			pkt->fragment = true;
		if (flags & IPV6_FRAGMENT_OFFSET)
			return REASON_FRAGMENT;
	} else if (pkt->tuple.protocol == IPPROTO_ROUTING && extension->segments_left) {
		/* The checksum counts the last destination, not the one in the header. */
		return REASON_UNSUPPORTED;
	}
	if (behind > pkt->l3 + pkt->length)
		return REASON_MALFORMED;
	pkt->l4 = behind;
	pkt->tuple.protocol = extension->next;
	return REASON_NONE;
}

static __always_inline enum reason pkt_parse_ipv4(ctx_t *ctx, struct pkt *pkt, __u32 offset)
{
	struct iphdr *ip = ctx_at(ctx, offset, sizeof(*ip));
	__u32 room = ctx_length(ctx) - offset, header, fragment;

	if (!ip)
		return REASON_MALFORMED;
	header = ip->ihl * 4;
	pkt->length = bpf_ntohs(ip->tot_len);
	if (!pkt->length && ctx_is_gso(ctx))
		pkt->length = room; /* BIG TCP (6.3) */
	if (ip->version != 4 || header < sizeof(*ip))
		return REASON_MALFORMED;

	address_set_ipv4(pkt->tuple.source, ip->saddr);
	address_set_ipv4(pkt->tuple.destination, ip->daddr);
	pkt->family = 4;
	pkt->l3 = offset;
	if (pkt->length < header || pkt->length > room)
		return REASON_MALFORMED;
	if ((ip->daddr & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) || ip->daddr == ~0U)
		return REASON_MULTICAST;
	fragment = bpf_ntohs(ip->frag_off) & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS);
	pkt->fragment = fragment != 0;
	if (fragment & IPV4_FRAGMENT_OFFSET)
		return REASON_FRAGMENT;
	pkt->tuple.protocol = ip->protocol;
	pkt->l4 = offset + header;
	return pkt_parse_l4(ctx, pkt);
}

static __always_inline enum reason pkt_parse_ipv6(ctx_t *ctx, struct pkt *pkt, __u32 offset)
{
	struct ipv6hdr *ip = ctx_at(ctx, offset, sizeof(*ip));
	__u32 room = ctx_length(ctx) - offset;

	if (!ip || ip->version != 6)
		return REASON_MALFORMED;
	__builtin_memcpy(pkt->tuple.source, &ip->saddr, ADDRESS_LENGTH);
	__builtin_memcpy(pkt->tuple.destination, &ip->daddr, ADDRESS_LENGTH);
	/* Where it counts as IPv4 inside lbagent it would be taken for another's packet. */
	if (address_is_mapped(&ip->saddr) || address_is_mapped(&ip->daddr))
		return REASON_MAPPED_ADDRESS;
	pkt->family = 6;
	pkt->l3 = offset;
	pkt->length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	if (!ip->payload_len && ctx_is_gso(ctx))
		pkt->length = room; /* BIG TCP (5.19) */
	if (pkt->length > room)
		return REASON_MALFORMED;
	if (ip->daddr.s6_addr[0] == 0xff)
		return REASON_MULTICAST;
	pkt->link_local = (ip->daddr.s6_addr16[0] & bpf_htons(0xffc0)) == bpf_htons(0xfe80);

	pkt->tuple.protocol = ip->nexthdr;
	pkt->l4 = offset + sizeof(*ip);
	for (int i = 0; i < EXTENSION_HEADERS_MAX; i++) {
		enum reason reason;

		switch ((__u8)pkt->tuple.protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_FRAGMENT:
		case IPPROTO_DSTOPTS:
			break;
		default:
			return pkt_parse_l4(ctx, pkt);
		}
		reason = pkt_skip_extension(ctx, pkt);
		if (reason)
			return reason;
	}
	return pkt_parse_l4(ctx, pkt);
}

static __always_inline enum reason pkt_parse_once(ctx_t *ctx, struct pkt *pkt)
{
	__u32 offset = link_header_length;
	__be16 ethertype = ctx_ethertype(ctx);

	__builtin_memset(pkt, 0, sizeof(*pkt));
	pkt->vlan = ctx_vlan(ctx);
	if (offset) {
		struct ethhdr *eth = ctx_at(ctx, 0, sizeof(*eth));

		if (!eth)
			return REASON_MALFORMED;
		ethertype = eth->h_proto;
		for (int i = 0; i < VLAN_TAGS_MAX; i++) {
			struct vlan_header *vlan;

			if (ethertype != bpf_htons(ETH_P_8021Q) &&
			    ethertype != bpf_htons(ETH_P_8021AD))
				break;
			vlan = ctx_at(ctx, offset, sizeof(*vlan));
			if (!vlan)
				return REASON_MALFORMED;
			if (!i && !pkt->vlan)
				pkt->vlan = bpf_ntohs(vlan->tag) & VLAN_ID_MASK;
			ethertype = vlan->ethertype;
			offset += sizeof(*vlan);
		}
	}
	if (ethertype == bpf_htons(ETH_P_IP))
		return pkt_parse_ipv4(ctx, pkt, offset);
	if (ethertype == bpf_htons(ETH_P_IPV6))
		return pkt_parse_ipv6(ctx, pkt, offset);
	return REASON_NOT_IP;
}

/* pkt_parse fills `pkt` from the packet; the answer is REASON_NONE, or why its ports are not to be used.
 * After REASON_FRAGMENT, those of a first fragment are known (pkt->ports). The second try is for headers
 * that could not be read directly. */
static __always_inline enum reason pkt_parse(ctx_t *ctx, struct pkt *pkt)
{
	enum reason reason = REASON_NONE;

	for (int i = 0; i < 2; i++) {
		reason = pkt_parse_once(ctx, pkt);
		if (reason != REASON_MALFORMED || !ctx_pull(ctx))
			break;
	}
	return reason;
}

/* words_sub adds to a one's complement sum what changes when `count` words become others. */
static __always_inline __s64 words_sub(const __u8 *to, const __u8 *from)
{
	const __u32 *new = (const __u32 *)to, *old = (const __u32 *)from;
	__s64 sum = 0;

#pragma unroll
	for (int i = 0; i < ADDRESS_LENGTH / 4; i++)
		sum += (__s64) new[i] + (__u32)~old[i];
	return sum;
}

static __always_inline __u32 sum_fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 sum_fold16(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* pkt_rewrite makes the packet say `to`, all sums right. False: it may be half rewritten, so it must not
 * be passed on. */
static __always_inline bool pkt_rewrite(ctx_t *ctx, struct pkt *pkt, const struct tuple *to)
{
	__u32 l3 = pkt->l3, l4 = pkt->l4, addresses, ports, csum;
	bool udp = pkt->tuple.protocol == PROTOCOL_UDP;
	__be16 *l4_ports;
	__u64 flags;

	addresses = sum_fold32(words_sub(to->source, pkt->tuple.source) +
			       words_sub(to->destination, pkt->tuple.destination));
	ports = bpf_htons(to->source_port) + (__u16)~bpf_htons(pkt->tuple.source_port) +
		bpf_htons(to->destination_port) + (__u16)~bpf_htons(pkt->tuple.destination_port);
	flags = BPF_F_PSEUDO_HDR;

	if (pkt->family == 4) {
		struct iphdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return false;
		ip->saddr = ((const __u32 *)to->source)[3];
		ip->daddr = ((const __u32 *)to->destination)[3];
		/* RFC 1624, equation 3 */
		ip->check = ~sum_fold16((__u16)~ip->check + sum_fold16(addresses));
	} else {
		struct ipv6hdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return false;
		__builtin_memcpy(&ip->saddr, to->source, ADDRESS_LENGTH);
		__builtin_memcpy(&ip->daddr, to->destination, ADDRESS_LENGTH);
		flags |= csum_ipv6_flag;
	}
	l4_ports = ctx_at(ctx, l4, 2 * sizeof(*l4_ports));
	if (!l4_ports)
		return false;
	l4_ports[0] = bpf_htons(to->source_port);
	l4_ports[1] = bpf_htons(to->destination_port);

	/* No direct access beyond this line. */
	csum = l4 + (udp ? __builtin_offsetof(struct udphdr, check)
			 : __builtin_offsetof(struct tcphdr, check));
	if (udp)
		flags |= BPF_F_MARK_MANGLED_0; /* a UDP sum of 0 means none, and stays */
	if (!ctx_csum_update(ctx, csum, addresses, flags))
		return false;
	flags &= ~(BPF_F_PSEUDO_HDR | csum_ipv6_flag);
	return sum_fold16(ports) == 0xffff || ctx_csum_update(ctx, csum, ports, flags);
}

#endif
