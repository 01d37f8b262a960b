// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What `make bench` holds the programs of tc.c against: programs that do part of a packet's work, by the
 * same functions on the same maps, and some that do it on other layouts of a flow. No part of the product.
 *
 * BPF_PROG_TEST_RUN repeats one packet. So that many flows are seen, what is run is walk_v4 or walk_v6: it
 * makes the packet that of the next flow and calls the program in question by a tail call.
 */
#include "flow.h"

/* 0 -> the program that is measured. A constant key makes the call a direct jump. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} targets SEC(".maps");

/* Stands in the payload of the packet, where it lasts from one repetition to the next. */
struct walk {
	__u32 state;
	__u32 mask; /* flows - 1, a power of two less one */
	__u32 client; /* last word of the first client's address */
	__u32 peer; /* last word of what it speaks to */
	__u32 peers; /* their number less one, likewise */
	__u16 peer_port;
	__u16 reply;
};
const struct walk *walk_type __attribute__((unused)); /* to BTF */

/* walk makes the packet that of another flow: each once in mask + 1 packets, in scattered order. All that a
 * rewriting may have changed is written anew; sums are not, for nobody looks. */
static __always_inline int walk(ctx_t *ctx, __u32 source, __u32 destination, __u32 l4)
{
	__u8 *frame = ctx_at(ctx, 0, l4 + sizeof(struct tcphdr) + sizeof(struct walk));
	__be32 client, peer;
	__be16 client_port;
	struct walk *walk;
	__u32 flow;

	if (!frame)
		return VERDICT_DROP;
	walk = (struct walk *)(frame + l4 + sizeof(struct tcphdr));
	walk->state = walk->state * 1664525 + 1013904223;
	flow = walk->state & walk->mask;
	client = bpf_htonl(walk->client + (flow >> 15));
	client_port = bpf_htons(0x8000 | (flow & 0x7fff));
	peer = bpf_htonl(walk->peer + (flow & walk->peers));
	if (walk->reply) {
		*(__be32 *)(frame + source) = peer;
		*(__be32 *)(frame + destination) = client;
		*(__be16 *)(frame + l4) = bpf_htons(walk->peer_port);
		*(__be16 *)(frame + l4 + 2) = client_port;
	} else {
		*(__be32 *)(frame + source) = client;
		*(__be32 *)(frame + destination) = peer;
		*(__be16 *)(frame + l4) = client_port;
		*(__be16 *)(frame + l4 + 2) = bpf_htons(walk->peer_port);
	}
	bpf_tail_call(ctx, &targets, 0);
	return VERDICT_DROP;
}

SEC("tc")
int walk_v4(struct __sk_buff *ctx)
{
	return walk(ctx, ETH_HLEN + 12, ETH_HLEN + 16, ETH_HLEN + sizeof(struct iphdr));
}

SEC("tc")
int walk_v6(struct __sk_buff *ctx)
{
	return walk(ctx, ETH_HLEN + 20, ETH_HLEN + 36, ETH_HLEN + sizeof(struct ipv6hdr));
}

SEC("tc")
int nothing(struct __sk_buff *ctx __attribute__((unused)))
{
	return VERDICT_PASS;
}

/* ---- the way of an established packet, step by step ---- */

enum step {
	STEP_PARSE,
	STEP_LOOKUP,
	STEP_REWRITE,
	STEP_COPY, /* of `to`, for the element may become another's */
	STEP_ALIVE, /* the clock, and the age by state and protocol */
	STEP_BACKEND, /* its generation */
	STEP_NOTE, /* packets, bytes, acknowledgement, last use */
	STEP_REASON,
};

static __always_inline int established(ctx_t *ctx, enum step last)
{
	struct backend *backend;
	const struct tuple *to;
	struct tuple copy;
	struct flow *flow;
	struct pkt pkt;
	__u64 now = 0;
	__u32 key;

	if (pkt_parse(ctx, &pkt))
		return VERDICT_DROP;
	if (last == STEP_PARSE)
		return VERDICT_PASS;
	if (last >= STEP_ALIVE) {
		now = clock_now();
		flow = flow_lookup(FLOWS, &pkt.tuple, now);
	} else {
		flow = bpf_map_lookup_elem(&flows, &pkt.tuple);
	}
	if (!flow)
		return VERDICT_DROP;
	if (last == STEP_LOOKUP)
		return VERDICT_PASS;
	to = &flow->to;
	if (last >= STEP_COPY) {
		copy = flow->to;
		to = &copy;
		barrier_var(to);
	}
	if (last >= STEP_BACKEND) {
		backend = backend_lookup(flow->backend);
		if (!backend || (backend_life_load(backend).generation != flow->generation &&
				 flow->role == ROLE_FORWARD))
			return VERDICT_DROP;
	}
	if (last >= STEP_NOTE)
		flow_note(&pkt, flow, to, FLOWS, now);
	if (!pkt_rewrite(ctx, &pkt, to))
		return VERDICT_DROP;
	if (last >= STEP_REASON) {
		__u64 *packets;

		key = REASON_FORWARD;
		packets = bpf_map_lookup_elem(&reasons, &key);
		if (packets)
			(*packets)++;
	}
	return VERDICT_PASS;
}

#define ESTABLISHED(name, last)                                                                    \
	SEC("tc")                                                                                  \
	int name(struct __sk_buff *ctx)                                                            \
	{                                                                                          \
		return established(ctx, last);                                                     \
	}

ESTABLISHED(parse, STEP_PARSE)
ESTABLISHED(lookup, STEP_LOOKUP)
ESTABLISHED(rewrite, STEP_REWRITE)
ESTABLISHED(with_copy, STEP_COPY)
ESTABLISHED(with_alive, STEP_ALIVE)
ESTABLISHED(with_backend, STEP_BACKEND)
ESTABLISHED(with_note, STEP_NOTE)
ESTABLISHED(with_reason, STEP_REASON)

/* ---- misses, and the entries of a new flow ---- */

/* What a packet of no service must cost: a miss in `flows` and one in `frontends`. */
SEC("tc")
int miss_frontend(struct __sk_buff *ctx)
{
	struct pkt pkt;

	if (pkt_parse(ctx, &pkt) || bpf_map_lookup_elem(&flows, &pkt.tuple) ||
	    frontend_lookup(pkt.tuple.destination, pkt.tuple.destination_port, pkt.tuple.protocol)
		    .kind)
		return VERDICT_DROP;
	return VERDICT_PASS;
}

/* And at egress: a miss in `flows` and one in `pending`. */
SEC("tc")
int miss_pending(struct __sk_buff *ctx)
{
	struct pkt pkt;

	if (pkt_parse(ctx, &pkt) || bpf_map_lookup_elem(&flows, &pkt.tuple) ||
	    bpf_map_lookup_elem(&pending, &pkt.tuple))
		return VERDICT_DROP;
	return VERDICT_PASS;
}

/* As large as `pending`. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct tuple);
	__type(value, struct flow);
} entries SEC(".maps");

/* What a new flow must cost: two entries, made without a look at anything. */
SEC("tc")
int insert_two(struct __sk_buff *ctx)
{
	struct flow flow = {};
	struct tuple back;
	struct pkt pkt;

	if (pkt_parse(ctx, &pkt))
		return VERDICT_DROP;
	flow.to = pkt.tuple;
	((__u32 *)flow.to.destination)[3] ^= 1;
	tuple_invert(&back, &flow.to);
	if (bpf_map_update_elem(&entries, &back, &flow, BPF_NOEXIST) ||
	    bpf_map_update_elem(&entries, &pkt.tuple, &flow, BPF_NOEXIST) ||
	    !pkt_rewrite(ctx, &pkt, &flow.to))
		return VERDICT_DROP;
	return VERDICT_PASS;
}

/* ---- other layouts of a flow ---- */

/* Another 16 bytes make an element of the table (48 bytes of the kernel's, key, value) three cache lines. */
struct flow_padded {
	struct flow flow;
	__u64 pad[2];
};

/* Ids in place of `to`: all else that struct flow has. */
struct flow_compact {
	enum flow_hook hook;
	enum flow_role role;
	__u8 state;
	__u8 flags;
	__u32 backend;
	__u32 generation;
	__u32 acknowledgement;
	__u32 answer;
	__u32 silent_since_s;
	__u32 vip;
	__u16 port; /* by which the backend knows the client */
	__u16 pad;
	__u64 last_seen_ns;
	__u64 packets;
	__u64 bytes;
};
_Static_assert(sizeof(struct flow_compact) == 56, "no padding");

/* The same without the two numbers of silence, with seconds for nanoseconds and 32 bits of packets: an
 * element is two cache lines. */
struct flow_small {
	enum flow_hook hook;
	enum flow_role role;
	__u8 state;
	__u8 flags;
	__u32 backend;
	__u32 generation;
	__u32 acknowledgement;
	__u32 vip;
	__u16 port;
	__u16 pad;
	__u32 last_seen_s;
	__u32 packets;
	__u64 bytes;
};
_Static_assert(sizeof(struct flow_small) == 40, "no padding");

struct vip {
	__u8 address[ADDRESS_LENGTH];
	__u16 port;
	__u16 pad[3];
};

#define LAYOUT(name, value_type)                                                                   \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_LRU_HASH);                                               \
		__uint(max_entries, 1);                                                            \
		__type(key, struct tuple);                                                         \
		__type(value, value_type);                                                         \
	} name SEC(".maps")

LAYOUT(padded, struct flow_padded);
LAYOUT(compact, struct flow_compact);
LAYOUT(small, struct flow_small);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct vip);
} vips SEC(".maps");

/* on_literal does what every layout must: look up, judge the backend's generation where the packet is the
 * client's, count, rewrite. */
static __always_inline int on_literal(ctx_t *ctx, struct pkt *pkt, struct flow *flow)
{
	struct backend *backend;
	struct tuple to;

	if (!flow)
		return VERDICT_DROP;
	to = flow->to;
	if (flow->role == ROLE_FORWARD) {
		backend = backend_lookup(flow->backend);
		if (!backend || backend_life_load(backend).generation != flow->generation)
			return VERDICT_DROP;
	}
	flow->packets++;
	flow->bytes += pkt->length;
	flow->acknowledgement = pkt->acknowledgement;
	return pkt_rewrite(ctx, pkt, &to) ? VERDICT_PASS : VERDICT_DROP;
}

/* compact_to makes of ids what a packet must become: a client's from the backend, the backend's from the
 * VIP. */
static __always_inline bool compact_to(struct tuple *to, const struct pkt *pkt, enum flow_role role,
				       __u32 backend_id, __u32 generation, __u32 vip_id, __u16 port)
{
	struct backend_life life;
	struct backend *backend;
	struct vip *vip;

	*to = pkt->tuple;
	if (role == ROLE_FORWARD) {
		backend = backend_lookup(backend_id);
		if (!backend)
			return false;
		life = backend_life_load(backend);
		if (life.generation != generation)
			return false;
		__builtin_memcpy(to->destination, backend->address, ADDRESS_LENGTH);
		to->destination_port = life.port;
		to->source_port = port;
		return true;
	}
	vip = bpf_map_lookup_elem(&vips, &vip_id);
	if (!vip)
		return false;
	__builtin_memcpy(to->source, vip->address, ADDRESS_LENGTH);
	to->source_port = vip->port;
	to->destination_port = port;
	return true;
}

SEC("tc")
int on_plain(struct __sk_buff *ctx)
{
	struct pkt pkt;

	if (pkt_parse(ctx, &pkt))
		return VERDICT_DROP;
	return on_literal(ctx, &pkt, bpf_map_lookup_elem(&flows, &pkt.tuple));
}

SEC("tc")
int on_padded(struct __sk_buff *ctx)
{
	struct pkt pkt;

	if (pkt_parse(ctx, &pkt))
		return VERDICT_DROP;
	return on_literal(ctx, &pkt, bpf_map_lookup_elem(&padded, &pkt.tuple)); /* flow is first */
}

#define ON_COMPACT(name, map, value_type)                                                          \
	SEC("tc")                                                                                  \
	int name(struct __sk_buff *ctx)                                                            \
	{                                                                                          \
		value_type *flow;                                                                  \
		struct tuple to;                                                                   \
		struct pkt pkt;                                                                    \
                                                                                                   \
		if (pkt_parse(ctx, &pkt))                                                          \
			return VERDICT_DROP;                                                       \
		flow = bpf_map_lookup_elem(&map, &pkt.tuple);                                      \
		if (!flow || !compact_to(&to, &pkt, flow->role, flow->backend, flow->generation,   \
					 flow->vip, flow->port))                                   \
			return VERDICT_DROP;                                                       \
		flow->packets++;                                                                   \
		flow->bytes += pkt.length;                                                         \
		flow->acknowledgement = pkt.acknowledgement;                                       \
		return pkt_rewrite(ctx, &pkt, &to) ? VERDICT_PASS : VERDICT_DROP;                  \
	}

ON_COMPACT(on_compact, compact, struct flow_compact)
ON_COMPACT(on_small, small, struct flow_small)

char _license[] SEC("license") = "Dual BSD/GPL";
