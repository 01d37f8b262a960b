// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The programs at the TC hooks of devices. docs/datapath.md walks a packet through them.
 *
 *   pod_in, port_in, node_in   ingress: from a VIP to a backend, before the host's stack
 *   pod_out, node_out          egress: a reply's source back to the VIP, behind it
 *
 * What is answered, and both directions between a pod and itself, is sent back out of the device that it came by;
 * it passes that device's egress program, which has no flow for it.
 *
 * Between the two, routing, rp_filter, netfilter and conntrack see client and backend as if there were
 * no service.
 */
#include "bridge.h"
#include "flow.h"
#include "hairpin.h"
#include "reject.h"
#include "verdict.h"

/* ingress_refuse is the exit of a packet whose ports are not known. The border: what is sent to a ClusterIP, or
 * where there might be one, or to the hairpin address, and cannot be understood is ours and dropped, for the stack
 * must not see it; all else passes. Echo requests to a VIP alone are answered. */
static __always_inline int ingress_refuse(ctx_t *ctx, struct pkt *pkt, enum reason reason)
{
	bool ours = pkt->family && (reason == REASON_MALFORMED || reason == REASON_FRAGMENT ||
				    reason == REASON_UNSUPPORTED);
	struct frontend address;

	if (!ours)
		return verdict(reason, VERDICT_PASS);
	if (reason == REASON_UNSUPPORTED && echo_is_request(ctx, pkt)) {
		address = address_lookup(pkt->tuple.destination);
		if (address.flags & ADDRESS_ECHO)
			return echo_answer(ctx, pkt);
		if (address.flags & ADDRESS_CLUSTER_IP)
			return reject(ctx, pkt, REASON_NO_BACKEND);
	}
	if (address_judge(&pkt->tuple) == REASON_NO_SERVICE &&
	    !address_is_hairpin(pkt->tuple.destination))
		return verdict(reason, VERDICT_PASS);
	if (reason == REASON_FRAGMENT)
		return verdict(REASON_VIP_FRAGMENT, VERDICT_DROP);
	if (reason == REASON_UNSUPPORTED)
		return verdict(REASON_VIP_UNSUPPORTED, VERDICT_DROP);
	return verdict(REASON_VIP_MALFORMED, VERDICT_DROP);
}

/* ingress_stranger is the exit of a packet whose port is no frontend's, by what address_judge says of its
 * address. */
static __always_inline int ingress_stranger(ctx_t *ctx, struct pkt *pkt, enum reason reason)
{
	if (reason == REASON_NO_SERVICE)
		return verdict(reason, VERDICT_PASS);
	if (reason == REASON_WRONG_PORT)
		return reject(ctx, pkt, reason);
	return verdict(reason, VERDICT_DROP);
}

/* translate makes the packet what its flow says. At the port of a bridge the frame need not be sent to the
 * bridge: the pod's gateway may be another, or have another's MAC. It is from then on, for its replies come to
 * the stack as well. */
static __always_inline int translate(ctx_t *ctx, struct pkt *pkt, const struct tuple *to,
				     enum reason reason)
{
	if (pkt->switched && !address_equal(to->destination, pkt->tuple.destination))
		frame_to_bridge(ctx);
	if (!pkt_rewrite(ctx, pkt, to))
		return verdict(REASON_NOT_WRITABLE, VERDICT_DROP);
	return verdict(reason, VERDICT_PASS);
}

/* ingress_open is the way of a packet that needs a change of the flow tables. */
static __always_inline int ingress_open(ctx_t *ctx, struct pkt *pkt, struct frontend frontend,
					bool outside)
{
	struct change *change = change_begin();
	enum reason reason;
	struct tuple to;

	if (!change)
		return verdict(REASON_TABLE_FULL, VERDICT_DROP);
	change->t = pkt->tuple;
	change->frontend = frontend;
	change->bytes = pkt->length;
	change->flags = (pkt_is_syn(pkt) ? CHANGE_SYN : 0) |
			(pkt->tcp_flags & TCP_RST ? CHANGE_RST : 0) |
			(frontend.kind == KIND_IDENTITY ? CHANGE_IDENTITY : 0) |
			(outside ? CHANGE_OUTSIDE : 0);
	reason = flow_open();
	switch (reason) {
	case REASON_OTHER_HOOK:
	case REASON_DIRECT:
	case REASON_NEW_DIRECT:
		return verdict(reason, VERDICT_PASS);
	case REASON_FORWARD:
	case REASON_NEW_FLOW:
		to = change->u;
		if (change->flags & CHANGE_BACK)
			return hairpin_forward(ctx, pkt, &to, reason);
		return translate(ctx, pkt, &to, reason);
	case REASON_NO_BACKEND:
		return reject(ctx, pkt, reason);
	default:
		return verdict(reason, VERDICT_DROP);
	}
}

/* hit is the way of a packet whose flow is found and stays as it is. */
static __always_inline int hit(ctx_t *ctx, struct pkt *pkt, struct flow *flow, struct tuple *to,
			       enum table table, __u64 now, enum reason reason)
{
	bool both = flow->hook == AT_BOTH, back = flow->flags & FLOW_BACK;

	flow_note(pkt, flow, to, table, now);
	if (both)
		return verdict(REASON_DIRECT, VERDICT_PASS);
	if (back)
		return hairpin_forward(ctx, pkt, to, reason);
	return translate(ctx, pkt, to, reason);
}

/* detour is the way of a packet at the port of a bridge whose flow applies at egress, if at all: a reply. The
 * bridge would carry it to the client's port, so that the stack never saw it. Sent to the bridge itself it is
 * routed, and translated where it leaves. It is noted there, too. */
static __always_inline int detour(ctx_t *ctx, const struct pkt *pkt, const struct flow *flow,
				  const struct tuple *to)
{
	if (flow->hook == AT_BOTH)
		return verdict(REASON_DIRECT, VERDICT_PASS);
	if (flow->hook == AT_EGRESS && !address_equal(to->source, pkt->tuple.source) &&
	    frame_to_bridge(ctx))
		return verdict(REASON_DETOUR, VERDICT_PASS);
	return verdict(REASON_OTHER_HOOK, VERDICT_PASS);
}

/* Whose frames an ingress hook sees. */
enum device_role {
	ROUTED_POD, /* this host's alone are of interest */
	POD_PORT, /* of a bridge: all that are for one host, for nobody else can have sent them */
	NODE, /* as ROUTED_POD; a port of a bridge if map `devices` says so */
};

static __always_inline int ingress(ctx_t *ctx, enum device_role device)
{
	/* At the node's own port of a bridge, a frame for another host, which may only be here because it is
	 * sent to all ports: nobody but this node made the flow that it may be a reply of, but another node
	 * may have the VIP. */
	bool foreign = false;
	bool switched = false;
	bool hairpin; /* sent to the hairpin address: a reply, or nothing */
	struct frontend frontend = {};
	struct backend_life life;
	struct backend *backend;
	enum table table = FLOWS;
	struct flow *flow;
	struct tuple to;
	struct pkt pkt;
	enum reason reason;
	bool looks;
	__u64 now;

	if (!ctx_to_this_host(ctx)) {
		if (device == ROUTED_POD || !ctx_to_other_host(ctx))
			return verdict(REASON_NOT_HOST, VERDICT_PASS);
		switched = true;
		if (device == NODE) {
			const struct device *port = port_lookup(ctx);

			if (!port)
				return verdict(REASON_NOT_HOST, VERDICT_PASS);
			switched = foreign = !frame_is_bridges(ctx, port);
		}
	}
	reason = pkt_parse(ctx, &pkt);
	if (pkt.vlan && vlan_has_device(ctx, &pkt))
		return verdict(REASON_OTHER_DEVICE, VERDICT_PASS);
	if (pkt.link_local)
		return verdict(REASON_MULTICAST, VERDICT_PASS);
	if (reason)
		return foreign ? verdict(reason, VERDICT_PASS) : ingress_refuse(ctx, &pkt, reason);
	pkt.switched = switched;

	now = clock_now();
	flow = flow_lookup(FLOWS, &pkt.tuple, now);
	if (!flow) {
		if (!foreign)
			frontend = frontend_lookup(pkt.tuple.destination,
						   pkt.tuple.destination_port, pkt.tuple.protocol);
		hairpin = !foreign && address_is_hairpin(pkt.tuple.destination);
		reason = REASON_NO_SERVICE;
		if (!frontend.kind && !foreign)
			reason = address_judge(&pkt.tuple);
		if (!frontend.kind && !switched && !hairpin && reason == REASON_NO_SERVICE)
			return verdict(REASON_NO_SERVICE, VERDICT_PASS);
		table = PENDING;
		flow = flow_lookup(PENDING, &pkt.tuple, now);
		if (hairpin && (!flow || flow->hook == AT_NONE))
			return verdict(REASON_NO_HAIRPIN, VERDICT_DROP);
		if (!frontend.kind && !hairpin) {
			if (!flow)
				return ingress_stranger(ctx, &pkt, reason);
			if (flow->hook != AT_INGRESS) {
				to = flow->to;
				return detour(ctx, &pkt, flow, &to);
			}
			/* To a client that has been answered its connection is there, and goes on without
			 * the Service, as those in `flows` do. At an address that is in no service prefix
			 * it has passed above: every stranger's packet would pay for that look. */
			if (pkt.tuple.protocol != PROTOCOL_TCP || pkt_is_syn(&pkt))
				return ingress_stranger(ctx, &pkt, reason);
		}
	}
	if (!flow)
		return ingress_open(ctx, &pkt, frontend, device == NODE);

	to = flow->to; /* copied at once: the element may become another's */
	if (!(flow->hook & AT_INGRESS)) {
		if (switched)
			return detour(ctx, &pkt, flow, &to);
		return verdict(REASON_OTHER_HOOK, VERDICT_PASS);
	}
	if (foreign && flow->hook != AT_BOTH)
		return verdict(REASON_NOT_HOST, VERDICT_PASS);
	if (flow->hook == AT_INGRESS && flow->role == ROLE_REPLY) /* of a hairpin flow */
		return hit(ctx, &pkt, flow, &to, table, now, REASON_REPLY);
	/* UDP and SYNs of a changed backend look again; all other TCP goes on. */
	looks = pkt.tuple.protocol == PROTOCOL_UDP;
	if (pkt_is_syn(&pkt)) {
		if (flow_closing(flow))
			goto open;
		looks = true;
	}
	backend = backend_lookup(flow->backend);
	if (!backend)
		return verdict(REASON_NO_BACKEND, VERDICT_DROP);
	life = backend_life_load(backend);
	if (looks && flow->backend && life.generation != flow->generation) {
		if (table == FLOWS)
			frontend = frontend_lookup(pkt.tuple.destination,
						   pkt.tuple.destination_port, pkt.tuple.protocol);
		if (!frontend.kind)
			goto gone;
		if (!flow_keeps(backend, life, frontend.service, &to))
			goto open;
		flow->generation = life.generation;
	}
	if (life.state == BACKEND_REMOVED && pkt.tuple.protocol == PROTOCOL_TCP &&
	    !(pkt.tcp_flags & TCP_RST) && flow_is_silent(&pkt, flow, &to, table, now)) {
		flow_break(&pkt.tuple, &to, now);
		return verdict(REASON_SILENT_BACKEND, reset_answer(ctx, &pkt));
	}
	return hit(ctx, &pkt, flow, &to, table, now, REASON_FORWARD);
open:
	if (table == FLOWS && !frontend.kind)
		frontend = frontend_lookup(pkt.tuple.destination, pkt.tuple.destination_port,
					   pkt.tuple.protocol);
	if (!frontend.kind || (foreign && frontend.kind != KIND_IDENTITY))
		goto gone;
	return ingress_open(ctx, &pkt, frontend, device == NODE);
gone:
	return ingress_stranger(ctx, &pkt, foreign ? REASON_NO_SERVICE : address_judge(&pkt.tuple));
}

static __always_inline int egress(ctx_t *ctx)
{
	enum table table = FLOWS;
	struct flow *flow;
	struct tuple to;
	struct pkt pkt;
	enum reason reason;
	__u64 now;

	reason = pkt_parse(ctx, &pkt);
	if (pkt.vlan && vlan_has_device(ctx, &pkt))
		return verdict(REASON_OTHER_DEVICE, VERDICT_PASS);
	if (reason == REASON_UNSUPPORTED && redirect_is_ours(ctx, &pkt))
		return verdict(REASON_REDIRECT, VERDICT_DROP);
	if (reason && !(reason == REASON_FRAGMENT && pkt.ports))
		return verdict(reason, VERDICT_PASS);
	now = clock_now();
	flow = flow_lookup(FLOWS, &pkt.tuple, now);
	if (!flow) {
		table = PENDING;
		flow = flow_lookup(PENDING, &pkt.tuple, now);
		if (!flow)
			return verdict(REASON_NO_FLOW, VERDICT_PASS);
	}
	to = flow->to;
	if (!(flow->hook & AT_EGRESS))
		return verdict(REASON_OTHER_HOOK, VERDICT_PASS);
	/* What applies at both hooks has been noted at ingress, but for an answer that is not assured yet:
	 * there it would have cost every foreign packet a third lookup. */
	if (flow->hook == AT_BOTH && (table == FLOWS || flow->role == ROLE_FORWARD))
		return verdict(REASON_DIRECT, VERDICT_PASS);
	if (pkt.fragment && flow->hook != AT_BOTH)
		return verdict(REASON_REPLY_FRAGMENT, VERDICT_DROP);
	return hit(ctx, &pkt, flow, &to, table, now, REASON_REPLY);
}

SEC("tc")
int pod_in(struct __sk_buff *ctx)
{
	return ingress(ctx, ROUTED_POD);
}

SEC("tc")
int port_in(struct __sk_buff *ctx)
{
	return ingress(ctx, POD_PORT);
}

SEC("tc")
int pod_out(struct __sk_buff *ctx)
{
	return egress(ctx);
}

SEC("tc")
int node_in(struct __sk_buff *ctx)
{
	return ingress(ctx, NODE);
}

SEC("tc")
int node_out(struct __sk_buff *ctx)
{
	return egress(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
