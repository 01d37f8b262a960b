/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A TCP reset in answer to a segment, made of the segment itself. */
#ifndef LBAGENT_RESET_H
#define LBAGENT_RESET_H

#include "answer.h"

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
	if (!frame_turn(ctx))
		return VERDICT_DROP;
	pseudo = bpf_htonl(IPPROTO_TCP) + (__u64)bpf_htonl(sizeof(*tcp));
	if (pkt->family == 4) {
		if (!ipv4_header(ctx, l3, IPPROTO_TCP, source[3], destination[3],
				 sizeof(struct iphdr) + sizeof(*tcp)))
			return VERDICT_DROP;
		pseudo += (__u64)source[3] + destination[3];
	} else {
		if (!ipv6_header(ctx, l3, IPPROTO_TCP, source, destination, sizeof(*tcp)))
			return VERDICT_DROP;
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
