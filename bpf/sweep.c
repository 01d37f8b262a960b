// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The sweeper's program, attached to nothing: package loader runs it by BPF_PROG_TEST_RUN on a struct sweep_step,
 * since no system call can take a flow's lock. It counts what flows have carried, and frees memory: an expired
 * entry is absent anyway.
 */
#include "flow.h"

/* twin_taken tells whether another flow has the key of a half's twin, so that the half is no one's: its packets
 * make it no younger (flow_note). A claim that is not in force may yet be taken back. */
static __always_inline bool twin_taken(const struct tuple *key, const struct tuple *to, __u64 now)
{
	struct tuple twin, back;
	struct flow *flow;
	bool taken;

	tuple_invert(&twin, to);
	tuple_invert(&back, key);
	flow = flow_lookup(FLOWS, &twin, now);
	if (half_is(flow, &back))
		return false;
	taken = flow && flow->hook;
	flow = flow_lookup(PENDING, &twin, now);
	if (half_is(flow, &back))
		return false;
	return taken || (flow && flow->hook);
}

/* flow_useless tells whether an entry may go: it has expired, or its twin is another flow's. That is so on
 * purpose of a reply half whose flow has moved, for as long as it lives. */
static __always_inline bool flow_useless(const struct flow *flow, const struct tuple *key,
					 const struct tuple *to, enum table table, __u64 now)
{
	if (!flow_alive(flow, key->protocol, table, now))
		return true;
	return !(flow->state & FLOW_MOVED) && twin_taken(key, to, now);
}

/* flow_sweep counts what the entry of a key has carried, removes it if it may go, and returns how many it removed. It
 * judges once without the lock, so that none is taken for what stays, and again with it. It does without `changes`: on
 * some kernels BPF_PROG_TEST_RUN lets packets interrupt it. */
__noinline int flow_sweep(const struct tuple *key, __u32 in)
{
	enum table table = in == FLOWS ? FLOWS : PENDING;
	struct tuple to, own;
	struct flow *flow;
	__u32 lock;
	int removed = 0;

	if (!key)
		return 0;
	own = *key; /* 6.1 does not let an argument's memory be a map's key */
	key = &own;
	flow = table == FLOWS ? bpf_map_lookup_elem(&flows, key)
			      : bpf_map_lookup_elem(&pending, key);
	if (!flow)
		return 0;
	flow_fold(flow);
	to = flow->to;
	/* As in flow_claim. */
	lock = flow->role == ROLE_REPLY ? tuple_lock(&to) : tuple_lock(key);
	if (!flow_useless(flow, key, &to, table, clock_now()) || !lock_take(lock))
		return 0;
	flow = table == FLOWS ? bpf_map_lookup_elem(&flows, key)
			      : bpf_map_lookup_elem(&pending, key);
	if (half_is(flow, &to) && flow_useless(flow, key, &to, table, clock_now()))
		removed = table == FLOWS ? !bpf_map_delete_elem(&flows, key)
					 : !bpf_map_delete_elem(&pending, key);
	lock_release(lock);
	return removed;
}

/* Its layout is for package loader, by BTF. */
const struct sweep_step *sweep_step_type __attribute__((unused));

SEC("tc")
int sweep(struct __sk_buff *ctx)
{
	__u32 offset = __builtin_offsetof(struct sweep_step, keys);
	struct tuple key;
	int removed = 0;
	__u8 table;

	if (bpf_skb_load_bytes(ctx, __builtin_offsetof(struct sweep_step, table), &table,
			       sizeof(table)))
		return 0;
	for (int i = 0; i < SWEEP_KEYS; i++) {
		if (bpf_skb_load_bytes(ctx, offset, &key, sizeof(key)))
			break;
		removed += flow_sweep(&key, table);
		offset += sizeof(key);
	}
	return removed;
}

char _license[] SEC("license") = "Dual BSD/GPL";
