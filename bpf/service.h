/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a VIP to a backend. */
#ifndef LBAGENT_SERVICE_H
#define LBAGENT_SERVICE_H

#include "hash.h"
#include "maps.h"

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

/* backend_select returns the id of the backend behind slot `hash % count` of a service, 0 where the service
 * has none. One load of the range: user space replaces it by one store. */
static __always_inline __u32 backend_select(__u32 service_id, __u32 hash)
{
	const struct service *service = bpf_map_lookup_elem(&services, &service_id);
	union {
		__u64 word;
		struct slot_range range;
	} loaded;
	__u32 slot;
	const __u32 *id;

	if (!service)
		return 0;
	loaded.word = u64_load(&service->cluster);
	if (!loaded.range.count)
		return 0;
	slot = loaded.range.first + hash % loaded.range.count;
	id = bpf_map_lookup_elem(&slots, &slot);
	return id ? *id : 0;
}

#endif
