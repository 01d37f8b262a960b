/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A packet to a VIP that leads nowhere: its sender is told. */
#ifndef LBAGENT_REJECT_H
#define LBAGENT_REJECT_H

#include "icmp.h"
#include "reset.h"
#include "verdict.h"

/* reject answers a packet as a host would on which nobody listens, and returns its verdict: a segment with a
 * reset, all else with port unreachable. Resets are not limited, as Linux's own are not: one is no larger than
 * its segment, and a client that gets none waits for minutes. What must not be answered, or cannot be, is dropped
 * for a reason of its own. */
static __always_inline int reject(ctx_t *ctx, struct pkt *pkt, enum reason reason)
{
	enum reason failed;

	if (pkt->tuple.protocol == PROTOCOL_TCP) {
		int action = VERDICT_DROP;

		if (!(pkt->tcp_flags & TCP_RST) && address_is_host(pkt->tuple.source))
			action = reset_answer(ctx, pkt);
		return verdict(action == VERDICT_DROP ? REASON_NOT_ANSWERED : reason, action);
	}
	failed = icmp_port_unreachable(ctx, pkt);
	if (failed)
		return verdict(failed, VERDICT_DROP);
	return verdict(reason, ctx_send_back(ctx));
}

/* echo_answer is the verdict of an echo request to a VIP that has endpoints. */
static __always_inline int echo_answer(ctx_t *ctx, struct pkt *pkt)
{
	if (!address_is_host(pkt->tuple.source))
		return verdict(REASON_NOT_ANSWERED, VERDICT_DROP);
	if (!echo_reply(ctx, pkt))
		return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
	return verdict(REASON_ECHO, ctx_send_back(ctx));
}

#endif
