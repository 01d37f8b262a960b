/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a VIP to a backend: which frontend, whether the client may, which scope, which endpoint. */
#ifndef LBAGENT_SERVICE_H
#define LBAGENT_SERVICE_H

#include "hash.h"
#include "maps.h"
#include "pkt.h"

/* u64_load reads what user space replaces by one store, as one load. */
static __always_inline __u64 u64_load(const void *p)
{
	return *(const volatile __u64 *)p;
}

/* key_tag folds a key into 16 bits, never 0: its five words, each XORed in and multiplied by 2^32 / phi, then the
 * upper half. maps.FrontendKey.Tag is the same in Go, and writes it into every frontend. */
static __always_inline __u16 key_tag(const struct frontend_key *key)
{
	const __u32 *words = (const __u32 *)key;
	__u32 h = 0;

#pragma unroll
	for (unsigned int i = 0; i < sizeof(*key) / sizeof(*words); i++)
		h = (h ^ words[i]) * 0x9e3779b1;
	h >>= 16;
	return h ? h : 1;
}

/* frontend_lookup returns the frontend at an address and port, one of KIND_NONE where there is none. The
 * element that the kernel finds may have been deleted and reused for another key by the time it is read: one
 * load, whose tag must be the key's. Else another look, and if it is reused under that too, it counts as absent. */
static __always_inline struct frontend frontend_lookup(const __u8 *address, __u16 port,
						       enum protocol protocol)
{
	struct frontend_key key = { .port = port, .protocol = protocol };
	union {
		__u64 word;
		struct frontend frontend;
	} loaded;
	const struct frontend *frontend;
	__u16 tag;

	__builtin_memcpy(key.address, address, ADDRESS_LENGTH);
	tag = key_tag(&key);
	for (int i = 0; i < 2; i++) {
		frontend = bpf_map_lookup_elem(&frontends, &key);
		if (!frontend)
			break;
		loaded.word = u64_load(frontend);
		if (loaded.frontend.key_tag == tag)
			return loaded.frontend;
	}
	loaded.word = 0;
	return loaded.frontend;
}

/* address_lookup returns what is known of an address itself, for packets whose port is not known or is none of its
 * frontends'. */
static __always_inline struct frontend address_lookup(const __u8 *address)
{
	return frontend_lookup(address, 0, PROTOCOL_ANY);
}

/* prefixes_have tells whether an address is one of those where ClusterIPs are. */
static __always_inline bool prefixes_have(const struct service_prefixes *prefixes,
					  const __u8 *address)
{
	const __u64 *a = (const __u64 *)address;

	for (__u32 i = 0; i < SERVICE_PREFIXES && i < prefixes->count; i++) {
		const __u64 *want = (const __u64 *)prefixes->list[i].address;
		const __u64 *mask = (const __u64 *)prefixes->list[i].mask;

		if (mask[0] && (a[0] & mask[0]) == want[0] && (a[1] & mask[1]) == want[1])
			return true;
	}
	return false;
}

/* address_judge says what becomes of a packet whose destination is no frontend, or whose port is not known, by
 * its address alone: REASON_NO_SERVICE, it is left alone; REASON_WRONG_PORT, it is sent to a ClusterIP;
 * REASON_UNASSIGNED, to an address where ClusterIPs are, that no Service has. Outside the prefixes it takes no
 * lookup, unless there are ClusterIPs elsewhere. A function of its own to the verifier, who would count every
 * prefix at every place it is called. */
__noinline enum reason address_judge(const struct tuple *t)
{
	const struct service_prefixes *prefixes;
	struct frontend frontend;
	__u32 zero = 0;
	bool inside;

	if (!t)
		return REASON_NO_SERVICE;
	prefixes = bpf_map_lookup_elem(&service_prefixes, &zero);
	if (!prefixes)
		return REASON_NO_SERVICE;
	inside = prefixes_have(prefixes, t->destination);
	if (!inside && !prefixes->elsewhere)
		return REASON_NO_SERVICE;
	frontend = address_lookup(t->destination);
	if (frontend.kind == KIND_ADDRESS)
		return frontend.flags & ADDRESS_CLUSTER_IP ? REASON_WRONG_PORT : REASON_NO_SERVICE;
	return inside ? REASON_UNASSIGNED : REASON_NO_SERVICE;
}

static __always_inline struct backend_life backend_life_load(const struct backend *backend)
{
	union {
		__u64 word;
		struct backend_life life;
	} loaded = { .word = u64_load(&backend->life) };

	return loaded.life;
}

static __always_inline struct backend *backend_lookup(__u32 id)
{
	return bpf_map_lookup_elem(&backends, &id);
}

static __always_inline struct service_policy policy_load(const struct service *service)
{
	union {
		__u64 word;
		struct service_policy policy;
	} loaded = { .word = u64_load(&service->policy) };

	return loaded.policy;
}

/* client_is_allowed tells whether an address is in a source range of a service. */
static __always_inline bool client_is_allowed(__u32 service, const __u8 *client)
{
	struct source_range key = {
		.prefix_length = 8 * (sizeof(key.service) + sizeof(key.address)),
		.service = service,
	};

	__builtin_memcpy(key.address, client, ADDRESS_LENGTH);
	return bpf_map_lookup_elem(&source_ranges, &key);
}

/* policy_scope returns the scope in which a packet to a frontend chooses: as a flag of a backend. */
static __always_inline __u8 policy_scope(struct service_policy policy, enum frontend_kind kind,
					 bool outside)
{
	bool local = false;

	if (kind == KIND_CLUSTER_IP)
		local = policy.flags & SERVICE_INTERNAL_LOCAL;
	else if (kind != KIND_HOST_PORT) /* whose pod is on this node */
		local = outside && policy.flags & SERVICE_EXTERNAL_LOCAL;
	return local ? BACKEND_LOCAL : BACKEND_CLUSTER;
}

static __always_inline struct slot_range range_load(const struct slot_range *range)
{
	union {
		__u64 word;
		struct slot_range range;
	} loaded = { .word = u64_load(range) };

	return loaded.range;
}

/* range_select returns the id of the backend behind slot `hash % count`, 0 where there is none. */
static __always_inline __u32 range_select(struct slot_range range, __u32 hash)
{
	const __u32 *id;
	__u32 slot;

	if (!range.count)
		return 0;
	slot = range.first + hash % range.count;
	id = bpf_map_lookup_elem(&slots, &slot);
	return id ? *id : 0;
}

/* affinity_find returns the backend that a client of a service has; 0 where it has none, or one that no new flow may
 * choose in this scope. The element may become another client's while it is read. So its id is read once, and
 * whatever it says is held against the backend: at worst the client gets another one of this service. */
static __always_inline __u32 affinity_find(const struct affinity_key *key, __u32 timeout_s,
					   __u8 scope, __u64 now)
{
	const struct affinity *element = bpf_map_lookup_elem(&affinity, key);
	const struct backend *backend;
	struct backend_life life;
	__u32 id;
	__s64 age;

	if (!element)
		return 0;
	id = element->backend;
	age = now - element->last_used_ns; /* negative: another CPU's clock was read later */
	if (age > 0 && (__u64)age >= timeout_s * 1000000000ULL)
		return 0;
	backend = backend_lookup(id);
	if (!backend)
		return 0;
	life = backend_life_load(backend);
	if (life.state != BACKEND_ACTIVE || !(life.flags & scope) ||
	    backend->service != key->service || life.port != element->port ||
	    !address_equal(backend->address, element->address))
		return 0;
	return id;
}

static __always_inline void affinity_write(const struct affinity_key *key, __u32 id, __u64 now)
{
	struct affinity record = { .last_used_ns = now, .backend = id };
	const struct backend *backend = backend_lookup(id);

	if (!backend)
		return;
	__builtin_memcpy(record.address, backend->address, ADDRESS_LENGTH);
	record.port = backend_life_load(backend).port;
	bpf_map_update_elem(&affinity, key, &record, BPF_ANY);
}

#endif
