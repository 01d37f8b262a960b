/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the answers that are made of the packet itself have in common: resets, ICMP errors, echo replies. */
#ifndef LBAGENT_ANSWER_H
#define LBAGENT_ANSWER_H

#include "pkt.h"

#define ANSWER_TTL 64

/* address_is_host tells whether an address is one host's, so that an answer may be sent there. That of all hosts of
 * a network (10.1.2.255) cannot be told from a host's: nothing here knows the network's prefix. */
static __always_inline bool address_is_host(const __u8 *address)
{
	const struct in6_addr *a = (const struct in6_addr *)address;
	__be32 ipv4 = a->s6_addr32[3];

	if (address_is_mapped(a)) {
		if ((ipv4 & bpf_htonl(0xff000000)) == 0 ||
		    (ipv4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000))
			return false;
		return (ipv4 & bpf_htonl(0xf0000000)) != bpf_htonl(0xe0000000) && ipv4 != ~0U;
	}
	if (a->s6_addr[0] == 0xff)
		return false;
	/* :: and ::1 */
	return a->s6_addr32[0] || a->s6_addr32[1] || a->s6_addr32[2] || (ipv4 & ~bpf_htonl(1)) != 0;
}

/* csum_is_partial tells whether the device is to finish the checksum at `offset`: then it holds the pseudo
 * header's sum alone, and an update that is none of the pseudo header's leaves it. */
static __always_inline bool csum_is_partial(ctx_t *ctx, __u32 offset)
{
	__sum16 *sum = ctx_at(ctx, offset, sizeof(*sum));
	__sum16 saved;
	bool partial;

	if (!sum)
		return false;
	saved = *sum;
	*sum = 1;
	ctx_csum_update(ctx, offset, 2, 0);
	sum = ctx_at(ctx, offset, sizeof(*sum));
	if (!sum)
		return false;
	partial = *sum == 1;
	*sum = saved;
	return partial;
}

/* words_sum adds up `count` words of 32 bits. */
static __always_inline __u64 words_sum(const void *from, int count)
{
	const __u32 *words = from;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < count; i++)
		sum += words[i];
	return sum;
}

/* frame_turn sends a frame to whom it came from. */
static __always_inline bool frame_turn(ctx_t *ctx)
{
	struct ethhdr *eth;
	__u8 mac[ETH_ALEN];

	if (!link_header_length)
		return true;
	eth = ctx_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return false;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return true;
}

/* ipv4_header writes the header of an answer, sum and all. */
static __always_inline bool ipv4_header(ctx_t *ctx, __u32 offset, __u8 protocol, __be32 source,
					__be32 destination, __u16 length)
{
	struct iphdr *ip = ctx_at(ctx, offset, sizeof(*ip));

	if (!ip)
		return false;
	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = sizeof(*ip) / 4;
	ip->tot_len = bpf_htons(length);
	ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
	ip->ttl = ANSWER_TTL;
	ip->protocol = protocol;
	ip->saddr = source;
	ip->daddr = destination;
	ip->check = ~sum_fold16(sum_fold32(words_sum(ip, sizeof(*ip) / 4)));
	return true;
}

/* ipv6_header writes the header of an answer. */
static __always_inline bool ipv6_header(ctx_t *ctx, __u32 offset, __u8 protocol,
					const __u32 *source, const __u32 *destination, __u16 length)
{
	struct ipv6hdr *ip = ctx_at(ctx, offset, sizeof(*ip));

	if (!ip)
		return false;
	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 6;
	ip->payload_len = bpf_htons(length);
	ip->nexthdr = protocol;
	ip->hop_limit = ANSWER_TTL;
	__builtin_memcpy(&ip->saddr, source, ADDRESS_LENGTH);
	__builtin_memcpy(&ip->daddr, destination, ADDRESS_LENGTH);
	return true;
}

#endif
