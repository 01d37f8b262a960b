/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The only file that knows the context of a program: here that of TC, struct __sk_buff. All else takes
 * a ctx_t and asks through these functions.
 */
#ifndef LBAGENT_CTX_SKB_H
#define LBAGENT_CTX_SKB_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

typedef struct __sk_buff ctx_t;

/* The next program on the device has its turn: TC_ACT_UNSPEC, and TCX_NEXT (6.6). Never TC_ACT_OK. */
#define VERDICT_PASS -1
#define VERDICT_DROP 2 /* TC_ACT_SHOT, TCX_DROP */

/* BPF_F_IPV6 of bpf_l4_csum_replace: 6.16, and some stable kernels before. */
#define CSUM_IPV6 (1ULL << 7)

#define VLAN_ID_MASK 0x0fff

/* Offsets beyond this one are not looked at; the verifier needs a bound, and no sane header is there. */
#define CTX_OFFSET_MAX 512

static __always_inline bool ctx_to_this_host(ctx_t *ctx)
{
	return ctx->pkt_type == PACKET_HOST;
}

/* A frame for one other host, by its MAC address; not one for many. */
static __always_inline bool ctx_to_other_host(ctx_t *ctx)
{
	return ctx->pkt_type == PACKET_OTHERHOST;
}

/* Index of the device whose hook this is. */
static __always_inline __u32 ctx_device(ctx_t *ctx)
{
	return ctx->ifindex;
}

/* ctx_vlan returns the id of the tag that the kernel, or the device, has taken out of the frame, which is the
 * outermost. 0: there is none, or it says a priority alone. */
static __always_inline __u16 ctx_vlan(ctx_t *ctx)
{
	return ctx->vlan_present ? ctx->vlan_tci & VLAN_ID_MASK : 0;
}

/* EtherType, for devices whose frames do not begin with one. */
static __always_inline __be16 ctx_ethertype(ctx_t *ctx)
{
	return ctx->protocol;
}

static __always_inline __u32 ctx_length(ctx_t *ctx)
{
	return ctx->len;
}

/* Whether the packet stands for several, to be cut by the device or the kernel (GSO). Its IP length may
 * then be 0 (BIG TCP). */
static __always_inline bool ctx_is_gso(ctx_t *ctx)
{
	return ctx->gso_size != 0;
}

/* ctx_at is the cursor: `length` bytes at `offset`, or NULL where the packet, or the part of it that can
 * be read directly, ends before. The pointer is good until the next helper that may move the packet. */
static __always_inline void *ctx_at(ctx_t *ctx, __u32 offset, __u32 length)
{
	void *start = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	if (offset > CTX_OFFSET_MAX)
		return NULL;
	/* Changes nothing: 6.1 forgets the bound where the compiler keeps the offset on the stack as well. */
	asm volatile("" : "+r"(offset));
	start += offset & (2 * CTX_OFFSET_MAX - 1);
	/* One register for the check and the use: the verifier ties the bound to it. */
	asm volatile("" : "+r"(start));
	if (start + length > end)
		return NULL;
	return start;
}

/* ctx_pull makes the headers of a packet directly readable. False: they are already, or cannot be. */
static __always_inline bool ctx_pull(ctx_t *ctx)
{
	__u32 length = ctx->len < CTX_OFFSET_MAX ? ctx->len : CTX_OFFSET_MAX;

	if ((void *)(long)ctx->data + length <= (void *)(long)ctx->data_end)
		return false;
	return !bpf_skb_pull_data(ctx, length);
}

/* ctx_csum_update adds `difference` to the L4 checksum at `offset`, in whatever state it is: complete,
 * or only begun and to be finished by the device (CHECKSUM_PARTIAL), when the pseudo header counts and
 * the rest does not. That is why the helper does it. Flags are those of bpf_l4_csum_replace. */
static __always_inline bool ctx_csum_update(ctx_t *ctx, __u32 offset, __s64 difference, __u64 flags)
{
	return !bpf_l4_csum_replace(ctx, offset, 0, (__u32)difference, flags);
}

/* ctx_trim cuts a packet to `length` bytes; one that stood for several (GSO) is one then. */
static __always_inline bool ctx_trim(ctx_t *ctx, __u32 length)
{
	return !bpf_skb_change_tail(ctx, length, 0);
}

/* ctx_grow makes room of `length` bytes behind the link header. The checksum that a device is to finish keeps its
 * place in what was there. False: not for this packet. */
static __always_inline bool ctx_grow(ctx_t *ctx, __u32 length)
{
	return !bpf_skb_adjust_room(ctx, length, BPF_ADJ_ROOM_MAC, 0);
}

/* ctx_send_back returns the verdict that sends a packet out of the device by which it came. */
static __always_inline int ctx_send_back(ctx_t *ctx)
{
	return bpf_redirect(ctx->ifindex, 0);
}

#endif
