/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The flow table. A flow is a pair of entries: T -> U at ingress (the forward half) and, at egress,
 * inverse(U) -> inverse(T) (the reply half). Each half leads to its twin: the twin's key is the inverse
 * of `to`.
 */
#ifndef LBAGENT_FLOW_H
#define LBAGENT_FLOW_H

#include "pkt.h"
#include "service.h"

#define SECOND_NS 1000000000ULL

/* The clock of `last_seen_ns`: that of the last tick, some milliseconds late, a third of the price. */
static __always_inline __u64 clock_now(void)
{
	return bpf_ktime_get_coarse_ns();
}

static __always_inline void tuple_invert(struct tuple *to, const struct tuple *from)
{
	__builtin_memset(to, 0, sizeof(*to));
	__builtin_memcpy(to->source, from->destination, ADDRESS_LENGTH);
	__builtin_memcpy(to->destination, from->source, ADDRESS_LENGTH);
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
	to->protocol = from->protocol;
}

static __always_inline bool tuple_equal(const struct tuple *a, const struct tuple *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;
	__u64 difference = 0;

#pragma unroll
	for (unsigned int i = 0; i < sizeof(*a) / sizeof(*x); i++)
		difference |= x[i] ^ y[i];
	return !difference;
}

static __always_inline __u64 flow_timeout_ns(const struct flow *flow, enum protocol protocol)
{
	const __u8 fins = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;

	if (flow->state & FLOW_RST)
		return timeouts_ns.reset;
	if (protocol == PROTOCOL_UDP)
		return flow->state & FLOW_ANSWERED ? timeouts_ns.udp : timeouts_ns.udp_new;
	if (!(flow->state & FLOW_ANSWERED))
		return timeouts_ns.tcp_new;
	if ((flow->state & fins) == fins)
		return timeouts_ns.tcp_closed;
	return flow->state & fins ? timeouts_ns.tcp_half_closed : timeouts_ns.tcp_established;
}

/* flow_lookup returns the living entry of a tuple. One past its timeout is absent although it is there:
 * it would translate a new connection that reuses its ports into an old one. */
static __always_inline struct flow *flow_lookup(const struct tuple *t, __u64 now)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, t);
	__s64 age;

	if (!flow)
		return NULL;
	age = now - flow->last_seen_ns; /* negative: another CPU's clock was read later */
	if (age > 0 && (__u64)age > flow_timeout_ns(flow, t->protocol))
		return NULL;
	return flow;
}

/* flow_closing tells whether a SYN on this flow begins another connection. */
static __always_inline bool flow_closing(const struct flow *flow)
{
	const __u8 fins = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;

	return flow->state & FLOW_RST || (flow->state & fins) == fins;
}

/* flow_note counts a packet of a half and notes what it says of the connection. `to` is the half's, copied
 * before. A change of state is written to both halves; the time at most once a second, to both as well, so
 * that a flow lives in whichever direction it speaks. */
static __always_inline void flow_note(const struct pkt *pkt, struct flow *flow,
				      const struct tuple *to, __u64 now)
{
	bool reply = flow->role == ROLE_REPLY;
	__u8 state = flow->state & ~FLOW_RST; /* one that is followed by more was no end */
	struct tuple key, back;
	struct flow *twin;

	flow->packets++;
	flow->bytes += pkt->length;
	if (reply)
		state |= FLOW_ANSWERED;
	if (pkt->tcp_flags & TCP_RST)
		state |= FLOW_RST;
	if (pkt->tcp_flags & TCP_FIN)
		state |= reply ? FLOW_BACKEND_FIN : FLOW_CLIENT_FIN;
	if (state == flow->state && (__s64)(now - flow->last_seen_ns) < (__s64)SECOND_NS)
		return;

	tuple_invert(&key, to);
	tuple_invert(&back, &pkt->tuple);
	twin = bpf_map_lookup_elem(&flows, &key);
	if (twin && tuple_equal(&twin->to, &back)) {
		twin->state = state;
		twin->last_seen_ns = now;
	}
	flow->state = state;
	flow->last_seen_ns = now;
}

/* flow_close makes the reply half of a flow that is no longer `from`'s expire soon: replies on their way
 * are still translated. */
static __always_inline void flow_close_reply(const struct tuple *to, __u64 now)
{
	struct tuple key;
	struct flow *reply;

	tuple_invert(&key, to);
	reply = bpf_map_lookup_elem(&flows, &key);
	if (reply) {
		reply->state |= FLOW_RST;
		reply->last_seen_ns = now;
	}
}

/* flow_begin enters the pair T -> U, the reply half first: a packet that finds the forward half finds its
 * answer's. Returns REASON_NEW_FLOW, or why there is none. */
static __always_inline enum reason flow_begin(const struct pkt *pkt, const struct tuple *to,
					      __u32 backend, __u32 generation, __u64 now)
{
	struct flow flow = {
		.hook = AT_EGRESS,
		.role = ROLE_REPLY,
		.backend = backend,
		.generation = generation,
		.last_seen_ns = now,
	};
	struct tuple reply;
	const struct flow *other;

	tuple_invert(&reply, to);
	tuple_invert(&flow.to, &pkt->tuple);
	other = flow_lookup(&reply, now);
	if (other && !tuple_equal(&other->to, &flow.to))
		return REASON_TUPLE_TAKEN;
	if (flow_lookup(to, now))
		return REASON_TUPLE_TAKEN;
	if (bpf_map_update_elem(&flows, &reply, &flow, BPF_ANY))
		return REASON_TABLE_FULL;

	flow.to = *to;
	flow.hook = AT_INGRESS;
	flow.role = ROLE_FORWARD;
	flow.packets = 1;
	flow.bytes = pkt->length;
	if (bpf_map_update_elem(&flows, &pkt->tuple, &flow, BPF_ANY))
		return REASON_TABLE_FULL;
	return REASON_NEW_FLOW;
}

#endif
