/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef LBAGENT_HASH_H
#define LBAGENT_HASH_H

#include "config.h"
#include "types.h"

#define ROTATE(x, n) ((x) << (n) | (x) >> (64 - (n)))

#define SIP_ROUND                                                                                  \
	do {                                                                                       \
		v0 += v1, v1 = ROTATE(v1, 13), v1 ^= v0, v0 = ROTATE(v0, 32);                      \
		v2 += v3, v3 = ROTATE(v3, 16), v3 ^= v2;                                           \
		v0 += v3, v3 = ROTATE(v3, 21), v3 ^= v0;                                           \
		v2 += v1, v1 = ROTATE(v1, 17), v1 ^= v2, v2 = ROTATE(v2, 32);                      \
	} while (0)

/* words_hash is SipHash-1-3 (Aumasson and Bernstein, 2012) of `count` words under `hash_key`. The words are
 * whole, so no padding is hashed but the length, as the algorithm says. */
static __always_inline __u32 words_hash(const __u64 *words, unsigned int count)
{
	__u64 k0 = hash_key[0], k1 = hash_key[1];
	__u64 v0 = k0 ^ 0x736f6d6570736575ULL, v1 = k1 ^ 0x646f72616e646f6dULL;
	__u64 v2 = k0 ^ 0x6c7967656e657261ULL, v3 = k1 ^ 0x7465646279746573ULL;
	__u64 length = (__u64)count * sizeof(*words) << 56;

#pragma unroll
	for (unsigned int i = 0; i < count; i++) {
		v3 ^= words[i];
		SIP_ROUND;
		v0 ^= words[i];
	}
	v3 ^= length;
	SIP_ROUND;
	v0 ^= length;
	v2 ^= 0xff;
	SIP_ROUND;
	SIP_ROUND;
	SIP_ROUND;
	return (__u32)(v0 ^ v1 ^ v2 ^ v3);
}

/* tuple_hash is what a flow chooses by: two CPUs, a retransmitted SYN and a packet whose flow was lost choose
 * alike, and a client cannot choose for all others. */
static __always_inline __u32 tuple_hash(const struct tuple *t)
{
	return words_hash((const __u64 *)t, sizeof(*t) / sizeof(__u64));
}

/* client_hash is what it chooses by where a service has session affinity: a client's flows choose alike, by
 * whichever frontend they come, on whichever CPU, and although the record of the first is gone. */
static __always_inline __u32 client_hash(__u32 service, const __u8 *client)
{
	__u64 words[3] = { service };

	__builtin_memcpy(&words[1], client, ADDRESS_LENGTH);
	return words_hash(words, 3);
}

#endif
