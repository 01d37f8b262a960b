/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A pod that is its own endpoint. To its stack a packet from its own address is not from outside, so it sees the
 * hairpin address as its client, and both directions are turned back at the ingress of its device. */
#ifndef LBAGENT_HAIRPIN_H
#define LBAGENT_HAIRPIN_H

#include "icmp.h"
#include "verdict.h"

/* hairpin_forward sends a packet back by the device that it came by, as what its flow says, and does what the stack
 * would have done on the way: a hop less to live, and at the last one its sender is told. The MTU needs no look,
 * the device is the same. At the port of a bridge the frame goes to the pod directly, for a bridge sends nothing back
 * to the port it came from. */
__noinline int hairpin_forward(ctx_t *ctx, struct pkt *pkt, const struct tuple *to,
			       enum reason reason)
{
	__u8 *ttl;
	__u32 at;

	if (!pkt || !to)
		return VERDICT_DROP;
	at = pkt->l3 + (pkt->family == 4 ? __builtin_offsetof(struct iphdr, ttl)
					 : __builtin_offsetof(struct ipv6hdr, hop_limit));
	ttl = ctx_at(ctx, at, sizeof(*ttl));
	if (!ttl)
		return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
	if (*ttl <= 1) {
		enum reason failed = icmp_time_exceeded(ctx, pkt);

		if (failed)
			return verdict(failed, VERDICT_DROP);
		return verdict(REASON_TIME_EXCEEDED, ctx_send_back(ctx));
	}
	if (!pkt_rewrite(ctx, pkt, to) || !frame_turn(ctx))
		return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
	if (pkt->family == 4) {
		struct iphdr *ip = ctx_at(ctx, pkt->l3, sizeof(*ip));

		if (!ip)
			return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
		ip->ttl--;
		/* RFC 1624, equation 3; the word that TTL begins has become less by 0x100. */
		ip->check = ~sum_fold16((__u16)~ip->check + (__u16)~bpf_htons(0x0100));
	} else {
		ttl = ctx_at(ctx, at, sizeof(*ttl));
		if (!ttl)
			return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
		--*ttl;
	}
	return verdict(reason, ctx_send_back(ctx));
}

#endif
