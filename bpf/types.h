/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The contract between the data plane and user space: the key and value types of every map. Go's types
 * are generated from this file and `bpftool map dump` prints these names, so they explain themselves.
 *
 * Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6 (::ffff:a.b.c.d). Ports are in host
 * order: the parser converts them once, and a dump reads `port: 80`. No key has a hole.
 */
#ifndef LBAGENT_TYPES_H
#define LBAGENT_TYPES_H

#include <linux/types.h>

#define ADDRESS_LENGTH 16
#define MAC_LENGTH 6
#define NAME_LENGTH 64 /* a DNS label (RFC 1123) and its final zero */
#define OBJECT_NAME_LENGTH 256 /* a DNS subdomain, as a Pod's name, and its final zero */

/* The version of all layouts below, kept in map `record`. Raise it with every change of a layout. */
#define LAYOUT_VERSION 4

#define __one_byte __attribute__((packed)) /* an enum of one byte */

enum protocol {
	PROTOCOL_ANY = 0,
	PROTOCOL_TCP = 6,
	PROTOCOL_UDP = 17,
	PROTOCOL_SCTP = 132,
} __one_byte;

/* ---- services ---- */

/* Where a frontend comes from. The values are those of lb.Kind. */
enum frontend_kind {
	KIND_NONE,
	KIND_CLUSTER_IP,
	KIND_NODE_PORT,
	KIND_LOAD_BALANCER,
	KIND_EXTERNAL,
	KIND_HOST_PORT,
	KIND_IDENTITY, /* a backend's own address; of no service */
	KIND_ADDRESS, /* port 0, PROTOCOL_ANY: this address is some Service's, and its flags say more */
} __one_byte;

/* What is known of an address itself, of KIND_ADDRESS. None of them: it is another proxy's VIP, or an address of
 * this node that is a VIP too or in a service prefix, and what is not sent to a frontend of it is left alone. */
enum address_flags {
	ADDRESS_CLUSTER_IP = 1, /* a ClusterIP: what is sent to another port is rejected */
	ADDRESS_ECHO = 2, /* a service here has a usable endpoint: echo requests are answered */
};

struct frontend_key {
	__u8 address[ADDRESS_LENGTH];
	__u16 port;
	enum protocol protocol;
	__u8 pad;
} __attribute__((aligned(4))); /* key_tag reads words */
_Static_assert(sizeof(struct frontend_key) == 20, "a key without a hole");

/* One u64, loaded and stored as one: an element of a hash is reused at once, so a reader that holds one
 * may see it change, but never sees half of it. */
struct frontend {
	__u32 service;
	enum frontend_kind kind;
	__u8 flags; /* of enum address_flags */
	__u16 key_tag; /* of its key: see key_tag */
} __attribute__((aligned(8)));
_Static_assert(sizeof(struct frontend) == 8, "one u64");

/* A range of map `slots`. One u64: user space replaces it by one store. */
struct slot_range {
	__u32 first;
	__u32 count; /* 0: no backend */
} __attribute__((aligned(8)));
_Static_assert(sizeof(struct slot_range) == 8, "one u64");

enum service_flags {
	SERVICE_INTERNAL_LOCAL = 1, /* internalTrafficPolicy: Local */
	SERVICE_EXTERNAL_LOCAL = 2, /* externalTrafficPolicy: Local */
	SERVICE_SOURCE_RANGES =
		4, /* only clients in map `source_ranges` reach its load balancer addresses */
};

/* How a service chooses. One u64: user space replaces it by one store. */
struct service_policy {
	__u32 flags; /* of enum service_flags */
	__u32 affinity_timeout_s; /* 0: no session affinity */
} __attribute__((aligned(8)));
_Static_assert(sizeof(struct service_policy) == 8, "one u64");

struct service {
	struct slot_range cluster; /* the endpoints usable in scope Cluster */
	struct slot_range
		local; /* those usable in scope Local; empty unless a policy flag is set */
	struct service_policy policy;
};
_Static_assert(sizeof(struct service) == 24, "no padding");

/* The name of a service, for people and for the agent that finds it after a restart. */
struct service_name {
	char namespace[NAME_LENGTH];
	char name[OBJECT_NAME_LENGTH];
	char port[NAME_LENGTH]; /* name of the Service port; "" where it has none */
	enum protocol protocol;
	__u8 family; /* 4 or 6 */
	__u8 pod; /* 1: `name` is a Pod's, and `port` its hostPort, behind its hostIP where it has one */
	__u8 pad;
};
_Static_assert(sizeof(struct service_name) == 388, "no padding");

enum backend_state {
	BACKEND_FREE, /* never used, or no flow names it any more; its generation stays */
	BACKEND_ACTIVE, /* new flows choose it */
	BACKEND_DRAINING, /* its flows keep it, no new flow chooses it */
	BACKEND_REMOVED, /* no flow may choose it again; those that it has go on at its address */
} __one_byte;

/* The scopes in which new flows may choose a backend, by a slot or by affinity. */
enum backend_flags {
	BACKEND_CLUSTER = 1,
	BACKEND_LOCAL = 2,
};

/* What may change while flows refer to the backend. One u64: user space replaces it by one store and a
 * packet judges a flow by one load, so it never meets a new generation with an old state. */
struct backend_life {
	__u32 generation; /* raised whenever flows of this backend must look again */
	enum backend_state state;
	__u8 flags; /* of enum backend_flags */
	__u16 port;
} __attribute__((aligned(8)));
_Static_assert(sizeof(struct backend_life) == 8, "one u64");

struct backend {
	__u8 address[ADDRESS_LENGTH];
	struct backend_life life;
	__u32 service;
	enum protocol protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct backend) == 32, "no padding");

/* The client of a service with session affinity, whichever frontend it comes by. */
struct affinity_key {
	__u32 service;
	__u8 client[ADDRESS_LENGTH];
};
_Static_assert(sizeof(struct affinity_key) == 20, "a key without a hole");

/* The backend that it has. By address, not by generation: what makes flows look again ends no affinity. */
struct affinity {
	__u8 address[ADDRESS_LENGTH];
	__u64 last_used_ns; /* CLOCK_MONOTONIC; of the last flow that began */
	__u32 backend;
	__u16 port;
	__u8 pad[2];
};
_Static_assert(sizeof(struct affinity) == 32, "no padding");

/* A range of clients that may use the load balancer addresses of a service. A key of an LPM trie. */
struct source_range {
	__u32 prefix_length; /* in bits, of what follows: 32 and those of the address, which are 96 more for IPv4 */
	__u32 service;
	__u8 address[ADDRESS_LENGTH];
};
_Static_assert(sizeof(struct source_range) == 24, "a key without a hole");

#define SERVICE_PREFIXES 16

/* Addresses whose bits under `mask` are `address`. */
struct prefix {
	__u8 address[ADDRESS_LENGTH];
	__u8 mask[ADDRESS_LENGTH]; /* all 0: none */
} __attribute__((aligned(8)));

/* Where ClusterIPs are: what is sent there and is no service's must not leave this node. */
struct service_prefixes {
	struct prefix list[SERVICE_PREFIXES];
	__u32 count;
	__u32 elsewhere; /* 1: there are ClusterIPs that are in none of the list */
};
_Static_assert(sizeof(struct service_prefixes) == 520, "no padding");

/* What has become of packets that began a flow, or were to. Numbers since the maps were made. */
struct service_stats {
	__u64 flows; /* begun */
	__u64 no_backend; /* packets refused: no usable endpoint */
	__u64 no_local_backend; /* packets dropped: none on this node */
	__u64 source_denied; /* packets dropped: loadBalancerSourceRanges */
	__u64 packets_in; /* from clients; of the flows, up to their last count by the sweeper, as are the next three */
	__u64 bytes_in;
	__u64 packets_out; /* to clients */
	__u64 bytes_out;
};
_Static_assert(sizeof(struct service_stats) == 64, "no padding");

struct backend_stats {
	__u64 flows; /* begun */
	__u64 packets_in; /* as above */
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
};
_Static_assert(sizeof(struct backend_stats) == 40, "no padding");

/* How many ICMP errors a CPU may send: a bucket that fills with time. */
struct icmp_limit {
	__u64 last_ns;
	__u64 tokens;
};
_Static_assert(sizeof(struct icmp_limit) == 16, "no padding");

/* ---- flows ---- */

struct tuple {
	__u8 source[ADDRESS_LENGTH];
	__u8 destination[ADDRESS_LENGTH];
	__u16 source_port;
	__u16 destination_port;
	enum protocol protocol;
	__u8 pad[3];
} __attribute__((aligned(8)));
_Static_assert(sizeof(struct tuple) == 40, "a key without a hole");

/* The hooks at which a flow applies. Without them a reply would be translated before the host's stack,
 * which would then see a VIP. */
enum flow_hook {
	AT_NONE, /* claimed, not yet in force */
	AT_INGRESS,
	AT_EGRESS,
	AT_BOTH, /* nothing is rewritten: a connection straight to a backend's own address */
} __one_byte;

enum flow_role {
	ROLE_NONE,
	ROLE_FORWARD, /* from the client: key T, to U */
	ROLE_REPLY, /* from the backend: key inverse(U), to inverse(T) */
} __one_byte;

/* What has been seen of a connection's end; written to both halves, in both tables. */
enum flow_state {
	FLOW_CLIENT_FIN = 1,
	FLOW_BACKEND_FIN = 2,
	FLOW_CLIENT_RST = 4, /* in sequence; taken back by the next packet of the same side */
	FLOW_BACKEND_RST = 8,
	FLOW_RST_AHEAD = 16, /* not the next in sequence; taken back by any packet */
	FLOW_MOVED = 32, /* reply half: its client's tuple leads elsewhere now */
};

/* What has been seen of one half. */
enum flow_flags {
	FLOW_ACKNOWLEDGED = 1, /* `acknowledgement` is one */
	FLOW_ANSWERED = 2, /* reply half: the backend has spoken; of TCP, up to `answer` */
	FLOW_BACK = 4, /* hairpin: its packets leave by the device by which they came */
};

/* One half of a flow: a packet whose tuple is the key becomes `to` at `hook`. `to` is literal: ids of equal
 * content (56 bytes) cost 0.96 to 1.04 of it at 64k flows, 0.92 to 1.05 at 512k (docs/performance.md). */
struct flow {
	struct tuple to;
	enum flow_hook hook;
	enum flow_role role;
	__u8 state; /* of enum flow_state */
	__u8 flags; /* of enum flow_flags */
	__u32 backend;
	__u32 generation; /* the backend's, when it was last looked up; forward half only */
	__u32 acknowledgement; /* last TCP acknowledgement seen on this half */
	__u32 answer; /* reply half: end of the segment that the client must acknowledge. Forward half, with
		       * silent_since_ms: how many packets the backend had sent then */
	__u32 silent_since_ms; /* of last_seen_ns; forward half of a removed backend: when a segment went to it
				* that it has not answered yet. 0: none */
	__u64 last_seen_ns; /* CLOCK_MONOTONIC; written at most once a second */
	__u64 packets;
	__u64 bytes; /* of IP packets */
	__u64 counted_packets; /* of those, what the sweeper has added to the statistics */
	__u64 counted_bytes;
};
_Static_assert(sizeof(struct flow) == 104, "no padding");

/* The two tables of flows. */
enum table {
	PENDING,
	FLOWS,
};

#define FLOW_LOCKS 16384
#define SWEEP_KEYS 32

/* The packet that program sweep is run on. It has as many keys as its length tells. */
struct sweep_step {
	__u8 frame[15]; /* 0: an Ethernet header of no protocol, which the kernel wants */
	__u8 table; /* of enum table */
	struct tuple keys[SWEEP_KEYS];
};

/* A change of a flow that is being made, by the CPU whose it is. */
struct change {
	struct tuple t; /* the client's tuple */
	struct tuple u; /* what its packets become */
	struct tuple t_back; /* inverse(t): what replies become */
	struct tuple u_back; /* inverse(u): what replies are */
	struct tuple old_back; /* u_back of the flow that this one replaces */
	struct flow value; /* to be written */
	struct frontend frontend; /* that t is sent to */
	__u64 now_ns;
	__u32 lock; /* the lock that is held */
	__u32 backend;
	__u32 generation;
	__u32 flags; /* of enum change_flags */
	__u32 bytes; /* of the packet that makes it */
	__u32 pad;
};

enum change_flags {
	CHANGE_SYN = 1, /* the packet that makes it is a TCP SYN */
	CHANGE_RST = 2, /* a TCP reset */
	CHANGE_IDENTITY = 4, /* u is t */
	CHANGE_REPLACE = 8, /* t has a living entry, which leads elsewhere */
	CHANGE_LOST_REPLY = 16, /* flow_restore: it is the reply half that is lost */
	CHANGE_IN_FLOWS = 32, /* flow_restore: the other half is in `flows` */
	CHANGE_OUTSIDE = 64, /* the packet that makes it is not from this node */
	CHANGE_BACK = 128, /* hairpin: u is sent back, and so is what comes in answer */
	CHANGE_AFFINITY =
		256, /* if the flow begins, its client is to have the same backend from now on */
};

/* ---- devices ---- */

/* A device that is the port of a bridge. */
struct device {
	__u32 bridge; /* the bridge's index */
	__u8 bridge_mac[MAC_LENGTH];
	__u8 pad[2];
};
_Static_assert(sizeof(struct device) == 12, "no padding");

struct vlan_key {
	__u32 parent; /* index of the device that the tagged frame comes by */
	__u16 id; /* of the VLAN */
	__u16 pad;
};
_Static_assert(sizeof(struct vlan_key) == 8, "a key without a hole");

/* ---- the rest ---- */

/* What outlives the agent and belongs to all maps together. */
struct record {
	__u32 layout; /* LAYOUT_VERSION of the agent that made the maps */
	__u32 pad;
	__u64 hash_key[2]; /* of the selection hash: random, the same for the life of the maps */
};

/* Why a program let a packet go as it did. Append only: the numbers are API, the names reach Go and
 * bpftool by BTF. docs/operations.md says what each means. */
enum reason {
	REASON_NONE,
	/* passed, untouched */
	REASON_NOT_HOST, /* not sent to this host, by its MAC address */
	REASON_NOT_IP,
	REASON_MULTICAST, /* multicast, broadcast or link-local destination */
	REASON_MAPPED_ADDRESS, /* a v4-mapped address inside an IPv6 packet */
	REASON_MALFORMED, /* lengths that do not fit, or cut short */
	REASON_FRAGMENT,
	REASON_UNSUPPORTED, /* a protocol or an extension header that has no ports */
	REASON_NO_SERVICE, /* no flow, and no frontend at this address and port */
	REASON_NO_FLOW, /* at egress */
	REASON_OTHER_HOOK, /* a flow that applies at the other hook */
	/* passed, translated */
	REASON_NEW_FLOW,
	REASON_FORWARD,
	REASON_REPLY,
	/* dropped */
	REASON_VIP_MALFORMED, /* as above, but sent to a ClusterIP */
	REASON_VIP_FRAGMENT,
	REASON_VIP_UNSUPPORTED,
	REASON_REPLY_FRAGMENT,
	REASON_NO_BACKEND, /* rejected: the service has no usable endpoint */
	REASON_STRAY_RST, /* a TCP reset of no flow */
	REASON_TUPLE_TAKEN, /* another flow has this client and port at the same backend */
	REASON_TABLE_FULL, /* the flow table refused an entry */
	REASON_NOT_WRITABLE, /* the packet could not be rewritten */
	REASON_LOCK_BUSY, /* another CPU was at work on the same flow */
	REASON_DIRECT, /* passed, untouched: to a backend's own address, or from it */
	REASON_NEW_DIRECT, /* as above, the first packet */
	REASON_SILENT_BACKEND, /* answered with a reset: a removed backend answers no more */
	REASON_DETOUR, /* passed: a reply from a bridge's port, sent to the host's stack by its MAC address */
	REASON_REDIRECT, /* dropped: the stack's ICMP redirect about a flow that takes such a detour */
	REASON_OTHER_DEVICE, /* passed, untouched: of a VLAN that has its own device here */
	REASON_NO_LOCAL_BACKEND, /* dropped: usable endpoints are on other nodes alone, and the policy is Local */
	REASON_SOURCE_DENIED, /* dropped: loadBalancerSourceRanges */
	REASON_WRONG_PORT, /* rejected: another port of a ClusterIP */
	REASON_UNASSIGNED, /* dropped: an address of a service prefix that no Service has */
	REASON_ECHO, /* an echo request to a VIP, answered */
	REASON_REJECT_LIMITED, /* dropped: to be rejected, but ICMP errors were too many already */
	REASON_NOT_ANSWERED, /* dropped: to be rejected, but this packet must not or cannot be answered */
	REASON_TIME_EXCEEDED, /* hairpin: answered with time exceeded */
	REASON_NO_HAIRPIN, /* dropped: sent to the hairpin address, of no flow */
	REASON_COUNT,
};

#endif
