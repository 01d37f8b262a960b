// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The programs at the TC hooks of devices. docs/datapath.md walks a packet through them.
 *
 *   pod_in, node_in     ingress: from a VIP to a backend, before the host's stack
 *   pod_out, node_out   egress: a reply's source back to the VIP, behind it
 *
 * Between the two, routing, rp_filter, netfilter and conntrack see client and backend as if there were
 * no service.
 */
#include "flow.h"
#include "verdict.h"

/* ingress_refuse is the exit of a packet whose ports are not known. The border: what is sent to a VIP
 * and cannot be understood is ours and dropped, for the stack must not see a VIP; all else passes. */
static __always_inline int ingress_refuse(const struct pkt *pkt, enum reason reason)
{
	bool ours = pkt->family && (reason == REASON_MALFORMED || reason == REASON_FRAGMENT ||
				    reason == REASON_UNSUPPORTED);

	if (!ours || !address_is_vip(pkt->tuple.destination))
		return verdict(reason, VERDICT_PASS);
	if (reason == REASON_FRAGMENT)
		return verdict(REASON_VIP_FRAGMENT, VERDICT_DROP);
	if (reason == REASON_UNSUPPORTED)
		return verdict(REASON_VIP_UNSUPPORTED, VERDICT_DROP);
	return verdict(REASON_VIP_MALFORMED, VERDICT_DROP);
}

/* translate makes the packet what its flow says. */
static __always_inline int translate(ctx_t *ctx, struct pkt *pkt, const struct tuple *to,
				     enum reason reason)
{
	if (!pkt_rewrite(ctx, pkt, to))
		return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
	return verdict(reason, VERDICT_PASS);
}

/* backend_keeps tells whether a flow that must look again may stay where it is. */
static __always_inline bool backend_keeps(const struct backend *backend, struct backend_life life,
					  __u32 service, const struct tuple *to)
{
	const __u64 *have = (const __u64 *)backend->address;
	const __u64 *want = (const __u64 *)to->destination;

	return (life.state == BACKEND_ACTIVE || life.state == BACKEND_DRAINING) &&
	       backend->service == service && life.port == to->destination_port &&
	       have[0] == want[0] && have[1] == want[1];
}

static __always_inline int ingress(ctx_t *ctx)
{
	struct frontend frontend;
	struct backend_life life;
	struct backend *backend;
	struct flow *flow;
	struct tuple to;
	struct pkt pkt;
	enum reason reason;
	__u64 now;
	__u32 id;

	if (!ctx_to_this_host(ctx))
		return verdict(REASON_NOT_HOST, VERDICT_PASS);
	reason = pkt_parse(ctx, &pkt);
	if (reason)
		return ingress_refuse(&pkt, reason);

	now = clock_now();
	flow = flow_lookup(&pkt.tuple, now);
	if (flow) {
		to = flow->to; /* copied at once: the element may become another's */
		if (flow->hook != AT_INGRESS)
			return verdict(REASON_OTHER_HOOK, VERDICT_PASS);
		backend = backend_lookup(flow->backend);
		if (!backend)
			return verdict(REASON_NO_BACKEND, VERDICT_DROP);
		life = backend_life_load(backend);
		/* UDP and SYNs of a changed backend look again; all other TCP goes on. */
		if (!(pkt_is_syn(&pkt) && flow_closing(flow)) &&
		    (life.generation == flow->generation ||
		     !(pkt.tuple.protocol == PROTOCOL_UDP || pkt_is_syn(&pkt)))) {
			flow_note(&pkt, flow, &to, now);
			return translate(ctx, &pkt, &to, REASON_FORWARD);
		}
	}

	frontend = frontend_lookup(pkt.tuple.destination, pkt.tuple.destination_port,
				   pkt.tuple.protocol);
	if (!frontend.service)
		return verdict(REASON_NO_SERVICE, VERDICT_PASS);
	if (flow) {
		if (!flow_closing(flow) && backend_keeps(backend, life, frontend.service, &to)) {
			flow->generation = life.generation;
			flow_note(&pkt, flow, &to, now);
			return translate(ctx, &pkt, &to, REASON_FORWARD);
		}
	} else if (pkt.tcp_flags & TCP_RST) {
		return verdict(REASON_STRAY_RST, VERDICT_DROP);
	}

	id = backend_select(frontend.service, tuple_hash(&pkt.tuple));
	backend = id ? backend_lookup(id) : NULL;
	if (!backend)
		return verdict(REASON_NO_BACKEND, VERDICT_DROP);
	life = backend_life_load(backend);
	if (flow)
		flow_close_reply(&to, now); /* made new below where the choice is the same */
	to = pkt.tuple;
	__builtin_memcpy(to.destination, backend->address, ADDRESS_LENGTH);
	to.destination_port = life.port;
	reason = flow_begin(&pkt, &to, id, life.generation, now);
	if (reason != REASON_NEW_FLOW)
		return verdict(reason, VERDICT_DROP);
	return translate(ctx, &pkt, &to, reason);
}

static __always_inline int egress(ctx_t *ctx)
{
	struct flow *flow;
	struct tuple to;
	struct pkt pkt;
	enum reason reason;
	__u64 now;

	reason = pkt_parse(ctx, &pkt);
	if (reason && !(reason == REASON_FRAGMENT && pkt.l4))
		return verdict(reason, VERDICT_PASS);
	now = clock_now();
	flow = flow_lookup(&pkt.tuple, now);
	if (!flow)
		return verdict(REASON_NO_FLOW, VERDICT_PASS);
	to = flow->to;
	if (flow->hook != AT_EGRESS)
		return verdict(REASON_OTHER_HOOK, VERDICT_PASS);
	if (pkt.fragment)
		return verdict(REASON_REPLY_FRAGMENT, VERDICT_DROP);
	flow_note(&pkt, flow, &to, now);
	return translate(ctx, &pkt, &to, REASON_REPLY);
}

SEC("tc")
int pod_in(struct __sk_buff *ctx)
{
	return ingress(ctx);
}

SEC("tc")
int pod_out(struct __sk_buff *ctx)
{
	return egress(ctx);
}

SEC("tc")
int node_in(struct __sk_buff *ctx)
{
	return ingress(ctx);
}

SEC("tc")
int node_out(struct __sk_buff *ctx)
{
	return egress(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
