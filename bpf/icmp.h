/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP and ICMPv6 that is made here, of the packet that it answers: errors and echo replies. */
#ifndef LBAGENT_ICMP_H
#define LBAGENT_ICMP_H

#include "answer.h"
#include "flow.h"

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_UNREACHABLE_PORT 3
#define ICMP_ECHO_REQUEST 8
#define ICMP_TIME_EXCEEDED 11
#define ICMPV6_UNREACHABLE 1
#define ICMPV6_UNREACHABLE_PORT 4
#define ICMPV6_TIME_EXCEEDED 3
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129

/* Linux's icmp_msgs_per_sec and icmp_msgs_burst; here of each CPU. */
#define ICMP_INTERVAL_NS (SECOND_NS / 1000)
#define ICMP_BURST 50

struct icmp_header { /* of both families */
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be32 rest;
};

/* ---- errors ---- */

/* icmp_allowed takes one error from what this CPU may send. */
static __always_inline bool icmp_allowed(void)
{
	struct icmp_limit *limit;
	__u64 now = clock_now(), gained = 0;
	__u32 zero = 0;

	limit = bpf_map_lookup_elem(&icmp_limits, &zero);
	if (!limit)
		return false;
	if ((__s64)(now - limit->last_ns) > 0)
		gained = (now - limit->last_ns) / ICMP_INTERVAL_NS;
	if (limit->tokens + gained >= ICMP_BURST) {
		limit->tokens = ICMP_BURST;
		limit->last_ns = now;
	} else {
		limit->tokens += gained;
		limit->last_ns += gained * ICMP_INTERVAL_NS;
	}
	if (!limit->tokens)
		return false;
	limit->tokens--;
	return true;
}

/* icmp_error turns a packet into the ICMP error about it, ready to be sent back by the device that it came by.
 * It quotes the IP header with its options or extension headers and the whole transport header, of ICMP its
 * first 8 bytes. The error comes from the address that the packet was sent to: that is what answers where a port is
 * unreachable, and where a hairpin packet's time is exceeded it is the only address of ours that the pod is known to
 * reach by this device, which mostly has none of its own.
 *
 * Returns why there is none, and the packet may be spoilt then; REASON_NONE: it is the error. */
__noinline enum reason icmp_error(ctx_t *ctx, struct pkt *pkt, __u32 type, __u32 code)
{
	__u32 l3, l4, end, check, stop, grown, length, source[4], destination[4];
	struct icmp_header *icmp;
	__sum16 *quoted;
	bool partial, v4;
	__u64 sum;
	__u8 *byte;

	if (!pkt)
		return REASON_NOT_ANSWERED;
	l3 = pkt->l3;
	l4 = pkt->l4;
	v4 = pkt->family == 4;
	/* What has no l4 is a fragment after the first, or was not understood. */
	if (!l4 || !address_is_host(pkt->tuple.source))
		return REASON_NOT_ANSWERED;
	if (pkt->tuple.protocol == PROTOCOL_TCP) {
		byte = ctx_at(ctx, l4, sizeof(struct tcphdr));
		if (!byte)
			return REASON_NOT_ANSWERED;
		end = l4 + (byte[12] >> 4) * 4;
		check = __builtin_offsetof(struct tcphdr, check);
	} else if (pkt->tuple.protocol == PROTOCOL_UDP) {
		end = l4 + sizeof(struct udphdr);
		check = __builtin_offsetof(struct udphdr, check);
	} else {
		/* Of ICMP only echo requests are: not an error, above all. */
		icmp = ctx_at(ctx, l4, sizeof(*icmp));
		if (!icmp || !pkt_is_icmp(pkt) ||
		    icmp->type != (v4 ? ICMP_ECHO_REQUEST : ICMPV6_ECHO_REQUEST))
			return REASON_NOT_ANSWERED;
		end = l4 + sizeof(*icmp);
		check = __builtin_offsetof(struct icmp_header, checksum);
	}
	grown = (v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + sizeof(*icmp);
	if (end + grown > CTX_OFFSET_MAX)
		return REASON_NOT_ANSWERED; /* it could not be read to be summed */
	if (!icmp_allowed())
		return REASON_REJECT_LIMITED;
	if (!ctx_trim(ctx, end))
		return REASON_NOT_ANSWERED;
	partial = csum_is_partial(ctx, l4 + check);

	__builtin_memcpy(source, pkt->tuple.destination, sizeof(source));
	__builtin_memcpy(destination, pkt->tuple.source, sizeof(destination));
	/* A frame with a second VLAN tag inside is refused. */
	if (!ctx_grow(ctx, grown))
		return REASON_NOT_ANSWERED;
	ctx_pull(ctx);
	l4 += grown;
	end += grown;
	length = end - l3;
	if (!frame_turn(ctx))
		return REASON_NOT_ANSWERED;
	if (v4) {
		if (!ipv4_header(ctx, l3, IPPROTO_ICMP, source[3], destination[3], length))
			return REASON_NOT_ANSWERED;
		l3 += sizeof(struct iphdr);
		sum = 0;
	} else {
		length -= sizeof(struct ipv6hdr);
		if (!ipv6_header(ctx, l3, IPPROTO_ICMPV6, source, destination, length))
			return REASON_NOT_ANSWERED;
		l3 += sizeof(struct ipv6hdr);
		sum = words_sum(source, 4) + words_sum(destination, 4) + bpf_htonl(length) +
		      (__u64)bpf_htonl(IPPROTO_ICMPV6);
	}
	icmp = ctx_at(ctx, l3, sizeof(*icmp));
	if (!icmp)
		return REASON_NOT_ANSWERED;
	icmp->type = type;
	icmp->code = code;
	icmp->checksum = 0;
	icmp->rest = 0;

	/* A quoted checksum that the device is to finish (CHECKSUM_PARTIAL) holds the pseudo header's sum now, and
	 * is finished after this, by the kernel or the device, over what is quoted: the transport header will then
	 * add up to the complement of that sum, whatever it says. */
	stop = end;
	if (partial) {
		quoted = ctx_at(ctx, l4 + check, sizeof(*quoted));
		if (!quoted)
			return REASON_NOT_ANSWERED;
		sum += (__u16) ~*quoted;
		stop = l4;
	}
	for (__u32 i = 0; i < CTX_OFFSET_MAX / 4; i++) {
		__u32 *word, offset = l3 + i * 4;

		if (offset >= stop)
			break;
		word = ctx_at(ctx, offset, sizeof(*word));
		if (!word)
			return REASON_NOT_ANSWERED;
		sum += *word;
	}
	icmp = ctx_at(ctx, l3, sizeof(*icmp));
	if (!icmp)
		return REASON_NOT_ANSWERED;
	icmp->checksum = ~sum_fold16(sum_fold32(sum));
	return REASON_NONE;
}

static __always_inline enum reason icmp_port_unreachable(ctx_t *ctx, struct pkt *pkt)
{
	if (pkt->family == 4)
		return icmp_error(ctx, pkt, ICMP_UNREACHABLE, ICMP_UNREACHABLE_PORT);
	return icmp_error(ctx, pkt, ICMPV6_UNREACHABLE, ICMPV6_UNREACHABLE_PORT);
}

static __always_inline enum reason icmp_time_exceeded(ctx_t *ctx, struct pkt *pkt)
{
	return icmp_error(ctx, pkt, pkt->family == 4 ? ICMP_TIME_EXCEEDED : ICMPV6_TIME_EXCEEDED,
			  0);
}

/* ---- echo ---- */

/* echo_is_request tells whether a packet whose protocol has no ports is a whole echo request behind a bare IP
 * header. */
static __always_inline bool echo_is_request(ctx_t *ctx, const struct pkt *pkt)
{
	__u32 header = pkt->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	const struct icmp_header *icmp;

	if (!pkt_is_icmp(pkt) || pkt->fragment || pkt->l4 != pkt->l3 + header ||
	    pkt->length < header + sizeof(*icmp))
		return false;
	icmp = ctx_at(ctx, pkt->l4, sizeof(*icmp));
	return icmp && icmp->type == (pkt->family == 4 ? ICMP_ECHO_REQUEST : ICMPV6_ECHO_REQUEST);
}

/* echo_reply turns an echo request into its reply, in place: what it asks to have back is not looked at, and its
 * checksum, right or wrong, stays so. False: it may be half a reply. Replies are not limited, as Linux's own are
 * not (icmp_ratemask): one is no larger than what it answers, and goes to whoever would get it from a host. */
__noinline bool echo_reply(ctx_t *ctx, struct pkt *pkt)
{
	struct icmp_header *icmp;
	__u16 *words, before;
	__u32 l3, l4;

	if (!pkt || !frame_turn(ctx))
		return false;
	l3 = pkt->l3;
	l4 = pkt->l4;
	if (pkt->family == 4) {
		struct iphdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return false;
		ip->saddr = ((const __u32 *)pkt->tuple.destination)[3];
		ip->daddr = ((const __u32 *)pkt->tuple.source)[3];
		words = (__u16 *)&ip->ttl;
		before = *words;
		ip->ttl = ANSWER_TTL;
		/* RFC 1624, equation 3 */
		ip->check = ~sum_fold16((__u16)~ip->check + (__u16)~before + *words);
	} else {
		struct ipv6hdr *ip = ctx_at(ctx, l3, sizeof(*ip));

		if (!ip)
			return false;
		__builtin_memcpy(&ip->saddr, pkt->tuple.destination, ADDRESS_LENGTH);
		__builtin_memcpy(&ip->daddr, pkt->tuple.source, ADDRESS_LENGTH);
		ip->hop_limit = ANSWER_TTL;
	}
	icmp = ctx_at(ctx, l4, sizeof(*icmp));
	if (!icmp)
		return false;
	words = (__u16 *)icmp;
	before = *words;
	icmp->type = pkt->family == 4 ? ICMP_ECHO_REPLY : ICMPV6_ECHO_REPLY;
	return ctx_csum_update(ctx, l4 + __builtin_offsetof(struct icmp_header, checksum),
			       *words + (__u16)~before, 0);
}

#endif
