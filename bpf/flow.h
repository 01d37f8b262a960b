/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The flow tables. A flow is a pair of entries: T -> U at ingress (the forward half) and, at egress,
 * inverse(U) -> inverse(T) (the reply half). Of a hairpin flow, whose source changes as well, both apply at
 * ingress. Each half leads to its twin: the twin's key is the inverse of `to`.
 *
 * Lookups, touches and writes of state take no lock. What changes which keys exist, or what a `to` says,
 * holds the flow's lock, and looks again after taking it: flow_open, flow_assure, flow_restore, and
 * flow_sweep in sweep.c. These rules were model-checked; see docs/datapath.md before changing one.
 */
#ifndef LBAGENT_FLOW_H
#define LBAGENT_FLOW_H

#include "pkt.h"
#include "service.h"

#define SECOND_NS 1000000000ULL
#define LOCK_SPINS 1024 /* some ten microseconds; a lock is held for one to three */
#define FLOW_CLOSED (FLOW_CLIENT_RST | FLOW_BACKEND_RST | FLOW_MOVED)
#define REMAP_TRIES 8
#define REMAP_FIRST 1024 /* ports below are some server's */

/* The clock of `last_seen_ns`: that of the last tick, some milliseconds late, a third of the price. */
static __always_inline __u64 clock_now(void)
{
	return bpf_ktime_get_coarse_ns();
}

static __always_inline void tuple_invert(struct tuple *to, const struct tuple *from)
{
	__builtin_memcpy(to->source, from->destination, ADDRESS_LENGTH);
	__builtin_memcpy(to->destination, from->source, ADDRESS_LENGTH);
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
	to->protocol = from->protocol;
	to->pad[0] = to->pad[1] = to->pad[2] = 0;
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

/* ---- life ---- */

static __always_inline __u64 flow_timeout_ns(const struct flow *flow, enum protocol protocol,
					     enum table table)
{
	const __u8 fins = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;

	if (flow->state & FLOW_CLOSED)
		return timeouts_ns.reset;
	if (protocol == PROTOCOL_UDP)
		return table == PENDING ? timeouts_ns.udp_pending : timeouts_ns.udp;
	if ((flow->state & fins) == fins)
		return timeouts_ns.tcp_closed;
	if (table == PENDING)
		return timeouts_ns.tcp_pending;
	return flow->state ? timeouts_ns.tcp_half_closed : timeouts_ns.tcp_established;
}

static __always_inline bool flow_alive(const struct flow *flow, enum protocol protocol,
				       enum table table, __u64 now)
{
	__s64 age = now - flow->last_seen_ns; /* negative: another CPU's clock was read later */

	return age <= 0 || (__u64)age <= flow_timeout_ns(flow, protocol, table);
}

/* flow_lookup returns the living entry of a tuple in a table. One past its timeout is absent although it is
 * there: it would translate a new connection that reuses its ports into an old one. */
static __always_inline struct flow *flow_lookup(enum table table, const struct tuple *t, __u64 now)
{
	struct flow *flow =
		table == FLOWS ? bpf_map_lookup_elem(&flows, t) : bpf_map_lookup_elem(&pending, t);

	return flow && flow_alive(flow, t->protocol, table, now) ? flow : NULL;
}

/* flow_find returns the living entry of a tuple in either table, the assured one before the other. */
static __always_inline struct flow *flow_find(const struct tuple *t, __u64 now)
{
	struct flow *flow = flow_lookup(FLOWS, t, now);

	return flow ? flow : flow_lookup(PENDING, t, now);
}

/* flow_closing tells whether a SYN on this flow begins another connection. */
static __always_inline bool flow_closing(const struct flow *flow)
{
	const __u8 fins = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;

	return flow->state & FLOW_CLOSED || (flow->state & fins) == fins;
}

/* ---- locks ---- */

/* tuple_lock returns the lock of a flow: the same for a tuple and its inverse. */
static __always_inline __u32 tuple_lock(const struct tuple *t)
{
	const __u32 *source = (const __u32 *)t->source,
		    *destination = (const __u32 *)t->destination;
	__u32 h = ((__u32)t->source_port ^ t->destination_port) << 8 ^ t->protocol;

#pragma unroll
	for (int i = 0; i < ADDRESS_LENGTH / 4; i++)
		h = h * 31 + (source[i] ^ destination[i]) + source[i] + destination[i];
	h *= 0x9e3779b1;
	return h >> 16 & (FLOW_LOCKS - 1);
}

/* lock_take is a function of its own to the verifier, who would count every spin at every place it is called. */
__noinline int lock_take(__u32 lock)
{
	__u32 *word = bpf_map_lookup_elem(&flow_locks, &lock);

	if (!word)
		return false;
	for (int i = 0; i < LOCK_SPINS; i++)
		if (!__sync_val_compare_and_swap(word, 0, 1))
			return true;
	return false;
}

static __always_inline void lock_release(__u32 lock)
{
	__u32 *word = bpf_map_lookup_elem(&flow_locks, &lock);

	if (word)
		__sync_lock_test_and_set(word, 0);
}

/* change_begin returns this CPU's change. A function of its own to the verifier calls it instead of taking
 * the pointer as an argument, which 6.1 does not let be a map's key. */
static __always_inline struct change *change_begin(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&changes, &zero);
}

/* ---- statistics ---- */

static __always_inline void half_count(struct flow *flow, __u32 bytes)
{
	flow->packets++;
	flow->bytes += bytes;
}

/* flow_fold adds what a half has carried since it was last counted to the statistics of its backend, and of the
 * service that has that. It takes no lock: of two CPUs that count one half, one gets to set counted_packets; and
 * bytes are exchanged, so that whoever comes first, their sum is right. */
__noinline int flow_fold(struct flow *flow)
{
	__u64 counted, packets, bytes;
	struct service_stats *service;
	struct backend_stats *stats;
	struct backend *backend;
	bool reply;
	__u32 id;

	if (!flow || !flow->backend)
		return 0;
	id = flow->backend;
	reply = flow->role == ROLE_REPLY;
	counted = flow->counted_packets;
	packets = flow->packets;
	if (packets <= counted ||
	    __sync_val_compare_and_swap(&flow->counted_packets, counted, packets) != counted)
		return 0;
	packets -= counted;
	bytes = flow->bytes;
	bytes -= __sync_lock_test_and_set(&flow->counted_bytes, bytes);

	stats = bpf_map_lookup_elem(&backend_stats, &id);
	backend = backend_lookup(id);
	if (!stats || !backend)
		return 0;
	__sync_fetch_and_add(reply ? &stats->packets_out : &stats->packets_in, packets);
	__sync_fetch_and_add(reply ? &stats->bytes_out : &stats->bytes_in, bytes);
	id = backend->service;
	service = bpf_map_lookup_elem(&service_stats, &id);
	if (!service)
		return 0;
	__sync_fetch_and_add(reply ? &service->packets_out : &service->packets_in, packets);
	__sync_fetch_and_add(reply ? &service->bytes_out : &service->bytes_in, bytes);
	return 0;
}

/* change_count counts a flow that has begun, or a packet that was to begin one and may not. */
static __always_inline void change_count(const struct change *change, enum reason reason)
{
	struct service_stats *service;
	struct backend_stats *backend;

	service = bpf_map_lookup_elem(&service_stats, &change->frontend.service);
	if (!service)
		return;
	switch (reason) {
	case REASON_NEW_FLOW:
		backend = bpf_map_lookup_elem(&backend_stats, &change->backend);
		if (!backend || !change->backend) /* straight to a backend */
			break;
		__sync_fetch_and_add(&service->flows, 1);
		__sync_fetch_and_add(&backend->flows, 1);
		break;
	case REASON_NO_BACKEND:
		__sync_fetch_and_add(&service->no_backend, 1);
		break;
	case REASON_NO_LOCAL_BACKEND:
		__sync_fetch_and_add(&service->no_local_backend, 1);
		break;
	case REASON_SOURCE_DENIED:
		__sync_fetch_and_add(&service->source_denied, 1);
		break;
	default:
		break;
	}
}

/* ---- what follows holds change->lock ---- */

enum claim {
	CLAIM_NEW, /* the entry is ours, made now */
	CLAIM_JOINED, /* it was there, and is the same flow's */
	CLAIM_TAKEN, /* it is another living flow's */
	CLAIM_FAILED,
};

/* half_own gives a half to a backend: another id at the same address, where it was removed and is back. */
static __always_inline void half_own(struct flow *flow, __u32 backend)
{
	if (flow->backend == backend)
		return;
	flow_fold(flow);
	flow->backend = backend;
}

/* flow_claim enters change->value under `key` in `pending`, unless a living flow has it. One that has expired
 * is removed under its own flow's lock. */
static __always_inline enum claim flow_claim(struct change *change, const struct tuple *key)
{
	struct flow *other;
	struct tuple seen;
	__u32 lock;
	int err;

	if (!bpf_map_update_elem(&pending, key, &change->value, BPF_NOEXIST))
		return CLAIM_NEW;
	other = bpf_map_lookup_elem(&pending, key);
	if (!other) /* gone meanwhile, or the table is full */
		return bpf_map_update_elem(&pending, key, &change->value, BPF_NOEXIST)
			       ? CLAIM_FAILED
			       : CLAIM_NEW;
	if (flow_alive(other, key->protocol, PENDING, change->now_ns)) {
		if (!tuple_equal(&other->to, &change->value.to))
			return CLAIM_TAKEN;
		half_own(other, change->value.backend);
		other->last_seen_ns = change->now_ns;
		other->state = 0;
		other->flags = change->value.flags;
		other->generation = change->value.generation;
		return CLAIM_JOINED;
	}
	/* Its lock is that of its client's tuple: the key, or the inverse of what a reply becomes. */
	seen = other->to;
	if (other->role == ROLE_REPLY)
		lock = tuple_lock(&seen);
	else
		lock = tuple_lock(key);
	if (lock != change->lock) {
		if (!lock_take(lock))
			return CLAIM_TAKEN;
		other = bpf_map_lookup_elem(&pending, key);
		if (!other || !tuple_equal(&other->to, &seen) ||
		    flow_alive(other, key->protocol, PENDING, change->now_ns)) {
			lock_release(lock);
			return CLAIM_TAKEN;
		}
	}
	flow_fold(other);
	bpf_map_delete_elem(&pending, key);
	err = bpf_map_update_elem(&pending, key, &change->value, BPF_NOEXIST);
	if (lock != change->lock)
		lock_release(lock);
	return err ? CLAIM_FAILED : CLAIM_NEW;
}

/* half_is tells whether an entry is that half of the flow which becomes `to`. */
static __always_inline bool half_is(const struct flow *flow, const struct tuple *to)
{
	return flow && tuple_equal(&flow->to, to);
}

static __always_inline void half_reopen(struct flow *flow, const struct tuple *to,
					const struct change *change)
{
	if (!half_is(flow, to))
		return;
	flow->state = 0;
	flow->flags &= FLOW_BACK;
	half_own(flow, change->backend);
	flow->generation = change->generation;
	flow->last_seen_ns = change->now_ns;
}

/* flow_reopen begins the same flow anew, in place: a SYN on a connection that has ended, to the same backend. */
static __always_inline void flow_reopen(const struct change *change)
{
	half_reopen(bpf_map_lookup_elem(&pending, &change->u_back), &change->t_back, change);
	half_reopen(bpf_map_lookup_elem(&flows, &change->u_back), &change->t_back, change);
	half_reopen(bpf_map_lookup_elem(&pending, &change->t), &change->u, change);
	half_reopen(bpf_map_lookup_elem(&flows, &change->t), &change->u, change);
}

/* half_close makes a reply half whose flow leads elsewhere now expire soon: replies on their way are still
 * translated. */
static __always_inline void half_close(struct flow *flow, const struct change *change)
{
	if (!half_is(flow, &change->t_back))
		return;
	flow->state |= FLOW_MOVED;
	flow->last_seen_ns = change->now_ns;
}

/* ended_remove removes the reply half of a new flow that an ended one of the same tuples has left in `flows`: it
 * would be found first, and the answers that assure the new one be noted nowhere. */
static __always_inline void ended_remove(const struct change *change)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &change->u_back);

	if (half_is(flow, &change->t_back) && flow_closing(flow)) {
		flow_fold(flow);
		bpf_map_delete_elem(&flows, &change->u_back);
	}
}

/* expired_remove removes an entry of `flows` that has expired and is in the way of a new flow's promotion. */
static __always_inline void expired_remove(const struct tuple *key, const struct tuple *to,
					   const struct change *change)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	if (flow && !flow_alive(flow, key->protocol, FLOWS, change->now_ns) &&
	    (flow->role == ROLE_FORWARD || half_is(flow, to))) {
		flow_fold(flow);
		bpf_map_delete_elem(&flows, key);
	}
}

/* flow_try enters the pair change->t -> change->u, whose source port is a candidate. The reply half is claimed
 * without a hook, then the clashes are looked for, then it is put in force, and the forward half comes last:
 * a packet that finds it finds its answer's. CLAIM_TAKEN: another port. */
__noinline enum claim flow_try(void)
{
	struct change *change = change_begin();
	bool identity, back;
	struct flow *other;
	enum claim claimed;

	if (!change)
		return CLAIM_FAILED;
	identity = change->flags & CHANGE_IDENTITY;
	back = change->flags & CHANGE_BACK;
	tuple_invert(&change->u_back, &change->u);
	tuple_invert(&change->t_back, &change->t);
	__builtin_memset(&change->value, 0, sizeof(change->value));
	change->value.to = change->t_back;
	change->value.role = ROLE_REPLY;
	change->value.flags = back ? FLOW_BACK : 0;
	change->value.backend = change->backend;
	change->value.generation = change->generation;
	change->value.last_seen_ns = change->now_ns;

	claimed = flow_claim(change, &change->u_back);
	if (claimed != CLAIM_NEW && claimed != CLAIM_JOINED)
		return claimed;
	/* A VIP may be its own endpoint: that is no clash, nor is the flow of the same tuple that this one replaces. */
	other = flow_lookup(FLOWS, &change->u_back, change->now_ns);
	if ((other && !half_is(other, &change->t_back)) ||
	    (!identity && !tuple_equal(&change->u, &change->t) &&
	     flow_find(&change->u, change->now_ns))) {
		if (claimed == CLAIM_NEW)
			bpf_map_delete_elem(&pending, &change->u_back);
		return CLAIM_TAKEN;
	}
	if (claimed == CLAIM_NEW) {
		change->value.hook = identity ? AT_BOTH : back ? AT_INGRESS : AT_EGRESS;
		if (bpf_map_update_elem(&pending, &change->u_back, &change->value, BPF_ANY))
			goto full;
	}

	change->value.to = change->u;
	change->value.role = ROLE_FORWARD;
	change->value.hook = identity ? AT_BOTH : AT_INGRESS;
	change->value.packets = 1;
	change->value.bytes = change->bytes;
	if (change->flags & CHANGE_REPLACE) {
		flow_fold(bpf_map_lookup_elem(&pending, &change->t));
		flow_fold(bpf_map_lookup_elem(&flows, &change->t));
		if (bpf_map_update_elem(&pending, &change->t, &change->value, BPF_ANY))
			goto full;
		bpf_map_delete_elem(&flows, &change->t);
		return CLAIM_NEW;
	}
	expired_remove(&change->t, &change->u, change);
	expired_remove(&change->u_back, &change->t_back, change);
	switch (flow_claim(change, &change->t)) {
	case CLAIM_NEW:
	case CLAIM_JOINED:
		return CLAIM_NEW;
	default:
		break;
	}
full:
	if (claimed == CLAIM_NEW)
		bpf_map_delete_elem(&pending, &change->u_back);
	return CLAIM_FAILED;
}

/* flow_keeps tells whether a flow whose backend has another generation by now may stay where it is. That no new flow
 * would choose it, by another policy or from another scope, is no reason to move. */
static __always_inline bool flow_keeps(const struct backend *backend, struct backend_life life,
				       __u32 service, const struct tuple *to)
{
	return (life.state == BACKEND_ACTIVE || life.state == BACKEND_DRAINING) &&
	       backend->service == service && life.port == to->destination_port &&
	       address_equal(backend->address, to->destination);
}

/* reply_is_there tells whether a living flow still has its reply half. Where the LRU has taken that, its key may be
 * another flow's by now. */
static __always_inline bool reply_is_there(const struct change *change)
{
	return half_is(flow_find(&change->old_back, change->now_ns), &change->t_back);
}

/* flow_choose chooses change->backend for a new flow to change->frontend; `hash` is its tuple's. Not 0: why it gets
 * none. A function of its own for the room that it takes on the stack. */
__noinline enum reason flow_choose(__u32 hash)
{
	struct change *change = change_begin();
	struct service_policy policy;
	const struct service *service;
	struct affinity_key key = {};
	enum frontend_kind kind;
	struct slot_range range;
	__u32 id = 0;
	__u8 scope;

	if (!change)
		return REASON_NO_BACKEND;
	kind = change->frontend.kind;
	key.service = change->frontend.service;
	__builtin_memcpy(key.client, change->t.source, ADDRESS_LENGTH);
	service = bpf_map_lookup_elem(&services, &change->frontend.service);
	if (!service)
		return REASON_NO_BACKEND;
	policy = policy_load(service);
	if (kind == KIND_LOAD_BALANCER && policy.flags & SERVICE_SOURCE_RANGES &&
	    !client_is_allowed(key.service, key.client))
		return REASON_SOURCE_DENIED;
	scope = policy_scope(policy, kind, change->flags & CHANGE_OUTSIDE);
	if (policy.affinity_timeout_s) {
		change->flags |= CHANGE_AFFINITY;
		hash = client_hash(key.service, key.client);
		id = affinity_find(&key, policy.affinity_timeout_s, scope, change->now_ns);
	}
	if (!id) {
		range = range_load(scope == BACKEND_LOCAL ? &service->local : &service->cluster);
		id = range_select(range, hash);
		if (!id && scope == BACKEND_LOCAL && range_load(&service->cluster).count)
			return REASON_NO_LOCAL_BACKEND;
		if (!id)
			return REASON_NO_BACKEND;
	}
	change->backend = id;
	return REASON_NONE;
}

/* affinity_note remembers the backend of a flow that has begun. A segment that begins none changes nothing. */
__noinline int affinity_note(void)
{
	struct change *change = change_begin();
	struct affinity_key key = {};

	if (!change)
		return 0;
	key.service = change->frontend.service;
	__builtin_memcpy(key.client, change->t.source, ADDRESS_LENGTH);
	affinity_write(&key, change->backend, change->now_ns);
	return 0;
}

static __always_inline enum reason flow_open_locked(struct change *change)
{
	struct backend_life life;
	struct backend *backend;
	enum reason reason;
	struct flow *flow;
	__u32 hash, id;

	change->now_ns = clock_now();
	hash = tuple_hash(&change->t);
	flow = flow_find(&change->t, change->now_ns);
	if (flow) {
		change->u = flow->to;
		if (!(flow->hook & AT_INGRESS))
			return REASON_OTHER_HOOK;
		id = flow->backend;
		backend = backend_lookup(id);
		if (!backend)
			return REASON_NO_BACKEND;
		life = backend_life_load(backend);
		/* Another CPU may have done the work while this one waited for the lock. */
		if (!(change->flags & CHANGE_SYN && flow_closing(flow)) &&
		    (!id || life.generation == flow->generation ||
		     flow_keeps(backend, life, change->frontend.service, &change->u))) {
			if (flow->flags & FLOW_BACK)
				change->flags |= CHANGE_BACK;
			half_count(flow, change->bytes);
			return flow->hook == AT_BOTH ? REASON_DIRECT : REASON_FORWARD;
		}
		tuple_invert(&change->old_back, &change->u);
	} else if (change->flags & CHANGE_RST) {
		/* One straight to a backend too: the client may send it because a translated flow has lost its
		 * reply half, and the backend spoke first. */
		return REASON_STRAY_RST;
	}

	change->u = change->t;
	change->backend = 0;
	change->generation = 0;
	if (!(change->flags & CHANGE_IDENTITY)) {
		reason = flow_choose(hash);
		if (reason)
			return reason;
		backend = backend_lookup(change->backend);
		if (!backend)
			return REASON_NO_BACKEND;
		/* Its generation is raised a grace period after it can be chosen no more. */
		life = backend_life_load(backend);
		change->generation = life.generation;
		__builtin_memcpy(change->u.destination, backend->address, ADDRESS_LENGTH);
		change->u.destination_port = life.port;
		if (address_equal(change->u.destination, change->u.source)) {
			const volatile __u64 *hairpin = address_hairpin(change->u.source);

			((__u64 *)change->u.source)[0] = hairpin[0];
			((__u64 *)change->u.source)[1] = hairpin[1];
			change->flags |= CHANGE_BACK;
		}
	}
	if (flow) {
		tuple_invert(&change->t_back, &change->t);
		if (address_equal(change->u.destination, change->old_back.source) &&
		    change->u.destination_port == change->old_back.source_port &&
		    reply_is_there(change)) {
			/* The same again, by whatever port the backend knows the client. */
			tuple_invert(&change->u, &change->old_back);
			change->u_back = change->old_back;
			flow_reopen(change);
			half_count(flow, change->bytes);
			return tuple_equal(&change->u, &change->t) ? REASON_NEW_DIRECT
								   : REASON_NEW_FLOW;
		}
		change->flags |= CHANGE_REPLACE;
	}

	for (int i = 0; i <= REMAP_TRIES; i++) {
		if (i) {
			if (change->t.protocol != PROTOCOL_UDP && !(change->flags & CHANGE_SYN))
				break;
			change->flags &= ~CHANGE_IDENTITY;
			hash = hash * 0x9e3779b1 + i;
			change->u.source_port = REMAP_FIRST + (hash >> 8) % (65536 - REMAP_FIRST);
		}
		switch (flow_try()) {
		case CLAIM_NEW:
			ended_remove(change);
			if (change->flags & CHANGE_REPLACE &&
			    !tuple_equal(&change->old_back, &change->u_back)) {
				half_close(bpf_map_lookup_elem(&pending, &change->old_back),
					   change);
				half_close(bpf_map_lookup_elem(&flows, &change->old_back), change);
			}
			return change->flags & CHANGE_IDENTITY ? REASON_NEW_DIRECT
							       : REASON_NEW_FLOW;
		case CLAIM_TAKEN:
			continue;
		default:
			return REASON_TABLE_FULL;
		}
	}
	return REASON_TUPLE_TAKEN;
}

/* flow_open finds or makes the flow of change->t, and sets change->u to what its packets become. Returns
 * REASON_NEW_FLOW, REASON_FORWARD, REASON_NEW_DIRECT or REASON_DIRECT, or why there is none. */
__noinline enum reason flow_open(void)
{
	struct change *change = change_begin();
	enum reason reason;

	if (!change)
		return REASON_TABLE_FULL;
	change->lock = tuple_lock(&change->t);
	if (!lock_take(change->lock))
		return REASON_LOCK_BUSY;
	reason = flow_open_locked(change);
	lock_release(change->lock);
	if (change->flags & CHANGE_AFFINITY &&
	    (reason == REASON_NEW_FLOW || reason == REASON_NEW_DIRECT))
		affinity_note();
	change_count(change, reason);
	return reason;
}

/* half_copy makes change->value the copy of a pending half for `flows`. What that one has carried is its own to be
 * counted, at whatever moment: the copy begins with nothing to count. */
static __always_inline void half_copy(struct change *change, const struct flow *flow)
{
	change->value = *flow;
	change->value.last_seen_ns = change->now_ns;
	change->value.counted_packets = change->value.packets;
	change->value.counted_bytes = change->value.bytes;
}

/* flow_assure copies a pair from `pending` to `flows`, the reply half first. The pending ones are left to
 * expire, so that no CPU ever finds neither. */
__noinline int flow_assure(void)
{
	struct change *change = change_begin();
	struct flow *forward, *reply, *other;

	if (!change)
		return 0;
	change->lock = tuple_lock(&change->t);
	if (!lock_take(change->lock))
		return 0;
	change->now_ns = clock_now();
	forward = flow_lookup(PENDING, &change->t, change->now_ns);
	reply = flow_lookup(PENDING, &change->u_back, change->now_ns);
	other = flow_lookup(FLOWS, &change->u_back, change->now_ns);
	if (half_is(forward, &change->u) && half_is(reply, &change->t_back) &&
	    !flow_closing(forward) && reply->flags & FLOW_ANSWERED &&
	    (!other || half_is(other, &change->t_back))) {
		if (other)
			flow_fold(other);
		half_copy(change, reply);
		if (!bpf_map_update_elem(&flows, &change->u_back, &change->value, BPF_ANY)) {
			half_copy(change, forward);
			if (bpf_map_update_elem(&flows, &change->t, &change->value, BPF_ANY))
				bpf_map_delete_elem(&flows, &change->u_back);
		}
	}
	lock_release(change->lock);
	return 0;
}

/* flow_restore makes a half that the LRU has taken anew, from the one that is left; change->value is what it
 * is to be. */
__noinline int flow_restore(void)
{
	struct change *change = change_begin();
	struct tuple *key, *twin;
	bool in_flows;
	struct flow *left;

	if (!change)
		return 0;
	change->lock = tuple_lock(&change->t);
	if (!lock_take(change->lock))
		return 0;
	change->now_ns = clock_now();
	change->value.last_seen_ns = change->now_ns;
	key = change->flags & CHANGE_LOST_REPLY ? &change->u_back : &change->t;
	twin = change->flags & CHANGE_LOST_REPLY ? &change->t : &change->u_back;
	in_flows = change->flags & CHANGE_IN_FLOWS;
	left = in_flows ? bpf_map_lookup_elem(&flows, twin) : bpf_map_lookup_elem(&pending, twin);
	if (half_is(left, change->flags & CHANGE_LOST_REPLY ? &change->u : &change->t_back) &&
	    !flow_lookup(FLOWS, key, change->now_ns)) {
		enum claim claimed = flow_claim(change, key);

		if ((claimed == CLAIM_NEW || claimed == CLAIM_JOINED) && in_flows &&
		    !flow_lookup(FLOWS, key, change->now_ns))
			bpf_map_update_elem(&flows, key, &change->value, BPF_ANY);
	}
	lock_release(change->lock);
	return 0;
}

/* ---- without a lock ---- */

/* change_of fills in both halves' keys and values from one of them. */
static __always_inline struct change *change_of(const struct tuple *key, const struct tuple *to,
						enum flow_role role)
{
	struct change *change = change_begin();

	if (!change)
		return NULL;
	if (role == ROLE_FORWARD) {
		change->t = *key;
		change->u = *to;
	} else {
		tuple_invert(&change->t, to);
		tuple_invert(&change->u, key);
	}
	tuple_invert(&change->t_back, &change->t);
	tuple_invert(&change->u_back, &change->u);
	change->flags = 0;
	return change;
}

static __always_inline void half_set_state(struct flow *flow, const struct tuple *to, __u8 state,
					   __u64 now)
{
	if (!half_is(flow, to))
		return;
	flow->state = state;
	flow->last_seen_ns = now;
}

/* flow_set_state writes a state to both halves in both tables, T's last: where T says that the connection is
 * over and another may begin, the reply half must have known before. */
__noinline int flow_set_state(__u32 state)
{
	struct change *change = change_begin();

	if (!change)
		return 0;
	half_set_state(bpf_map_lookup_elem(&pending, &change->u_back), &change->t_back, state,
		       change->now_ns);
	half_set_state(bpf_map_lookup_elem(&flows, &change->u_back), &change->t_back, state,
		       change->now_ns);
	half_set_state(bpf_map_lookup_elem(&pending, &change->t), &change->u, state,
		       change->now_ns);
	half_set_state(bpf_map_lookup_elem(&flows, &change->t), &change->u, state, change->now_ns);
	return 0;
}

/* flow_end judges a FIN or an RST. One counts that continues what the other side has acknowledged (RFC 5961):
 * a forged one would have to guess that number. */
static __always_inline __u8 flow_end(const struct pkt *pkt, const struct flow *twin, bool reply,
				     __u8 state)
{
	__s32 ahead = 0;

	if (twin && twin->flags & FLOW_ACKNOWLEDGED)
		ahead = pkt->sequence - twin->acknowledgement;
	if (ahead < 0)
		return state;
	if (pkt->tcp_flags & TCP_RST) {
		if (ahead)
			return state | FLOW_RST_AHEAD;
		return state | (reply ? FLOW_BACKEND_RST : FLOW_CLIENT_RST);
	}
	return state | (reply ? FLOW_BACKEND_FIN : FLOW_CLIENT_FIN);
}

/* flow_note counts a packet of a half and notes what it says of the connection. `to` is the half's, copied
 * before. */
static __always_inline void flow_note(const struct pkt *pkt, struct flow *flow,
				      const struct tuple *to, enum table table, __u64 now)
{
	bool reply = flow->role == ROLE_REPLY, tcp = pkt->tuple.protocol == PROTOCOL_TCP;
	__u8 state = flow->state & ~(FLOW_RST_AHEAD | (reply ? FLOW_BACKEND_RST : FLOW_CLIENT_RST));
	bool aged = (__s64)(now - flow->last_seen_ns) >= (__s64)SECOND_NS;
	struct change *change;
	struct flow *twin;

	half_count(flow, pkt->length);
	if (tcp && pkt->tcp_flags & TCP_ACK) {
		flow->acknowledgement = pkt->acknowledgement;
		flow->flags |= FLOW_ACKNOWLEDGED;
	}
	if (table == FLOWS && state == flow->state && !aged &&
	    !(pkt->tcp_flags & (TCP_FIN | TCP_RST)))
		return;

	if (reply && table == PENDING && !(pkt->tcp_flags & TCP_RST) &&
	    (!(flow->flags & FLOW_ANSWERED) || pkt->tcp_flags & TCP_SYN)) {
		flow->answer = pkt->sequence + pkt->segment;
		flow->flags |= FLOW_ANSWERED;
	}
	change = change_of(&pkt->tuple, to, flow->role);
	if (!change)
		return;
	change->now_ns = now;
	if (reply)
		twin = table == FLOWS ? bpf_map_lookup_elem(&flows, &change->t)
				      : bpf_map_lookup_elem(&pending, &change->t);
	else
		twin = table == FLOWS ? bpf_map_lookup_elem(&flows, &change->u_back)
				      : bpf_map_lookup_elem(&pending, &change->u_back);
	if (twin && !flow_alive(twin, pkt->tuple.protocol, table, now))
		twin = NULL;
	if (twin && !half_is(twin, reply ? &change->u : &change->t_back))
		return; /* another flow's: this half is left to expire */

	if (pkt->tcp_flags & (TCP_FIN | TCP_RST))
		state = flow_end(pkt, twin, reply, state);
	if (state != flow->state) {
		flow_set_state(state);
		return;
	}
	if (aged && !(state & FLOW_MOVED)) /* that one expires whatever comes */
		flow->last_seen_ns = now;
	if (!twin) {
		if ((table == FLOWS || !reply) && !flow_closing(flow)) {
			change->value = *flow;
			change->value.packets = 0;
			change->value.bytes = 0;
			change->value.counted_packets = 0;
			change->value.counted_bytes = 0;
			change->value.flags = flow->flags & FLOW_BACK;
			change->value.to = reply ? change->u : change->t_back;
			change->value.role = reply ? ROLE_FORWARD : ROLE_REPLY;
			change->value.hook = flow->hook == AT_BOTH		? AT_BOTH
					     : reply || flow->flags & FLOW_BACK ? AT_INGRESS
										: AT_EGRESS;
			change->flags = (reply ? 0 : CHANGE_LOST_REPLY) |
					(table == FLOWS ? CHANGE_IN_FLOWS : 0);
			flow_restore();
		}
		return;
	}
	if (aged && table == FLOWS)
		twin->last_seen_ns = now;
	if (table == PENDING && !reply && twin->flags & FLOW_ANSWERED &&
	    (!tcp ||
	     (pkt->tcp_flags & TCP_ACK && (__s32)(pkt->acknowledgement - twin->answer) >= 0)))
		flow_assure();
}

/* flow_break ends a flow that its client is told is over: as if its backend had reset it. */
static __always_inline void flow_break(const struct tuple *t, const struct tuple *to, __u64 now)
{
	struct change *change = change_of(t, to, ROLE_FORWARD);

	if (!change)
		return;
	change->now_ns = now;
	flow_set_state(FLOW_BACKEND_RST);
}

/* flow_is_silent notes the segments that a removed backend leaves unanswered, and tells whether it has for longer
 * than it may. Whether it has spoken since is seen by its packets' number: so a reply costs nothing, and only
 * flows of removed backends are looked at. */
static __always_inline bool flow_is_silent(const struct pkt *pkt, struct flow *flow,
					   const struct tuple *to, enum table table, __u64 now)
{
	__u32 now_ms = (now / 1000000) | 1;
	__s32 silence = now_ms - flow->silent_since_ms; /* negative: as in flow_alive */
	const struct flow *reply;
	struct tuple key;

	if (silent_backend_timeout_ms == SILENT_NEVER)
		return false;
	if (!flow->silent_since_ms && !pkt->segment)
		return false;
	tuple_invert(&key, to);
	reply = table == FLOWS ? bpf_map_lookup_elem(&flows, &key)
			       : bpf_map_lookup_elem(&pending, &key);
	if (!reply)
		return false;
	if (flow->silent_since_ms && flow->answer == (__u32)reply->packets)
		return silence >= 0 && (__u32)silence >= silent_backend_timeout_ms;
	flow->silent_since_ms = pkt->segment ? now_ms : 0;
	flow->answer = reply->packets;
	return false;
}

#endif
