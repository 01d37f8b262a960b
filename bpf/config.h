/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What package loader sets before it loads the programs: constants to the verifier. A test of loader
 * asserts that it sets every one.
 */
#ifndef LBAGENT_CONFIG_H
#define LBAGENT_CONFIG_H

#include <linux/types.h>

/* Of the devices this copy of the programs is attached to: 14 (Ethernet), or 0 (WireGuard, tun, ipip). */
const volatile __u8 link_header_length = 14;

/* Key of the selection hash, from map `record`. */
const volatile __u64 hash_key[2];

/* Age at which an entry of `flows` is absent. */
struct flow_timeouts {
	__u64 tcp_pending; /* the client has not spoken again after an answer */
	__u64 tcp_established;
	__u64 tcp_half_closed; /* a FIN from one side */
	__u64 tcp_closed; /* a FIN from both */
	__u64 reset; /* an RST, or a reply half whose flow has moved */
	__u64 udp_pending;
	__u64 udp;
};
const volatile struct flow_timeouts timeouts_ns;

/* How long a removed backend may leave a segment unanswered before its client's next packet is answered with
 * a reset. 0: no time at all. SILENT_NEVER: for ever. */
#define SILENT_NEVER 0xffffffff
const volatile __u32 silent_backend_timeout_ms = SILENT_NEVER;

/* What a pod that is its own endpoint sees as its client, IPv4 (v4-mapped) and IPv6. */
const volatile __u8 hairpin_addresses[2][16] __attribute__((aligned(8)));

/* CSUM_IPV6 where the kernel knows it, else 0. Without it the kernel would spoil the sum of a whole IPv6
 * packet that a device has computed (CHECKSUM_COMPLETE): the packet is still accepted, after the kernel
 * has summed it again. */
const volatile __u64 csum_ipv6_flag;

#endif
