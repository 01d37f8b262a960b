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

static __always_inline struct frontend frontend_lookup(const __u8 *address, __u16 port,
						       enum protocol protocol)
{
	struct frontend_key key = { .port = port, .protocol = protocol };
	union {
		__u64 word;
		struct frontend frontend;
	} loaded = {};
	const struct frontend *frontend;

	__builtin_memcpy(key.address, address, ADDRESS_LENGTH);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (frontend)
		loaded.word = u64_load(frontend);
	return loaded.frontend;
}

/* address_is_vip tells whether some service has this address, for packets whose port is not known. */
static __always_inline bool address_is_vip(const __u8 *address)
{
	return frontend_lookup(address, 0, PROTOCOL_ANY).kind == KIND_ADDRESS;
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
