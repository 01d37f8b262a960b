// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What a kernel can do is found by running it, never by its version: loader runs these once. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include "ctx_skb.h"

/* probe_csum_ipv6 returns 0 where bpf_l4_csum_replace knows BPF_F_IPV6, and an error where it does not.
 * The packet must have room for Ethernet, IPv6 and UDP headers. */
SEC("tc")
int probe_csum_ipv6(struct __sk_buff *ctx)
{
	__u32 sum = ETH_HLEN + sizeof(struct ipv6hdr) + __builtin_offsetof(struct udphdr, check);

	return !ctx_csum_update(ctx, sum, 0, BPF_F_PSEUDO_HDR | CSUM_IPV6);
}

char _license[] SEC("license") = "Dual BSD/GPL";
