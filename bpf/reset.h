/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A TCP reset in answer to a segment, made of the segment itself. */
#ifndef LBAGENT_RESET_H
#define LBAGENT_RESET_H

#include "pkt.h"

#define RESET_TTL 64

/* csum_is_partial tells whether the device is to finish the checksum at `offset`: then it holds the pseudo
 * header's sum alone, and an update that is none of the pseudo header's leaves it. The packet is spoilt
 * otherwise. */
static __always_inline bool csum_is_partial(ctx_t *ctx, __u32 offset)
{
	__sum16 *sum = ctx_at(ctx, offset, sizeof(*sum));
	__sum16 before;

	if (!sum)
		return false;
	*sum = before = 1;
	ctx_csum_update(ctx, offset, 2, 0);
	sum = ctx_at(ctx, offset, sizeof(*sum));
	return sum && *sum == before;
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

/* reset_answer turns a segment into the reset that its receiver would have sent if there were no connection
 * (RFC 9293, 3.10.7.1), and returns the verdict that sends it back where it came from. Segments with IP
 * options or extension headers are dropped: their sender's next one has none, or it gives up by itself. */
__noinline int reset_answer(ctx_t *ctx, struct pkt *pkt)
{
	__u32 l3, l4, source[4], destination[4];
	struct tcphdr *tcp;
	bool partial;
	__u64 pseudo;

	if (!pkt)
		return VERDICT_DROP;
	l3 = pkt->l3;
	l4 = pkt->l4;
	if (l4 != l3 + (pkt->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)))
		return VERDICT_DROP;
	if (!ctx_trim(ctx, l4 + sizeof(*tcp)))
		return VERDICT_DROP;
	partial = csum_is_partial(ctx, l4 + __builtin_offsetof(struct tcphdr, check));

	/* What the client sent to is what answers. */
	__builtin_memcpy(source, pkt->tuple.destination, sizeof(source));
	__builtin_memcpy(destination, pkt->tuple.source, sizeof(destination));
	if (link_header_length) {
		struct ethhdr *eth = ctx_at(ctx, 0, sizeof(*eth));
		__u8 mac[ETH_ALEN];

		if (!eth)
			return VERDICT_DROP;
		__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
		__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
		__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	}
	pseudo = bpf_htonl(IPPROTO_TCP) + (__u64)bpf_htonl(sizeof(*tcp));
	if (pkt->family == 4) {
		struct iphdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return VERDICT_DROP;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 4;
		ip->ihl = sizeof(*ip) / 4;
		ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(*tcp));
		ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
		ip->ttl = RESET_TTL;
		ip->protocol = IPPROTO_TCP;
		ip->saddr = source[3];
		ip->daddr = destination[3];
		ip->check = ~sum_fold16(sum_fold32(words_sum(ip, sizeof(*ip) / 4)));
		pseudo += (__u64)source[3] + destination[3];
	} else {
		struct ipv6hdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return VERDICT_DROP;
		ip->payload_len = bpf_htons(sizeof(*tcp));
		ip->hop_limit = RESET_TTL;
		__builtin_memcpy(&ip->saddr, source, sizeof(source));
		__builtin_memcpy(&ip->daddr, destination, sizeof(destination));
		pseudo += words_sum(source, 4) + words_sum(destination, 4);
	}
	tcp = ctx_at(ctx, l4, sizeof(*tcp));
	if (!tcp)
		return VERDICT_DROP;
	__builtin_memset(tcp, 0, sizeof(*tcp));
	tcp->source = bpf_htons(pkt->tuple.destination_port);
	tcp->dest = bpf_htons(pkt->tuple.source_port);
	tcp->doff = sizeof(*tcp) / 4;
	tcp->rst = 1;
	if (pkt->tcp_flags & TCP_ACK) {
		tcp->seq = bpf_htonl(pkt->acknowledgement);
	} else {
		tcp->ack_seq = bpf_htonl(pkt->sequence + pkt->segment);
		tcp->ack = 1;
	}
	if (partial)
		tcp->check = sum_fold16(sum_fold32(pseudo));
	else
		tcp->check = ~sum_fold16(sum_fold32(pseudo + words_sum(tcp, sizeof(*tcp) / 4)));
	return ctx_send_back(ctx);
}

#endif
