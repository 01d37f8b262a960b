/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map of the data plane. The sizes here are defaults: package maps sets those the operator chose,
 * in this file's object and in each program's. docs/maps.md says how to read a dump.
 */
#ifndef LBAGENT_MAPS_H
#define LBAGENT_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

/* address, port, protocol -> service, or IDENTITY: a backend's own address. Written by reconcile, read for
 * every packet without a flow. A missing key: neither. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
} frontends SEC(".maps");

/* service id -> its slots. Written by reconcile through its own mapping. Id 0 is no service. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, struct service);
} services SEC(".maps");

/* service id -> its name. Written by reconcile, read by people and by the agent after a restart; no
 * program reads it. A missing key: the id is free. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, struct service_name);
} service_names SEC(".maps");

/* slot -> backend id. Written by reconcile through its own mapping; a range is never changed while a
 * service refers to it. Id 0 is no backend. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1048576);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps");

/* backend id -> address, generation and state. Written by reconcile through its own mapping. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct backend);
} backends SEC(".maps");

/* service and client -> the backend that the client has, of services with session affinity. Written by the
 * programs where a flow begins. A missing key: the client has none yet. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinity SEC(".maps");

/* service and prefix of clients -> allowed. Written by reconcile, read where a flow to a load balancer address
 * of a service with SERVICE_SOURCE_RANGES begins. A missing key: not allowed. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct source_range);
	__type(value, __u8);
} source_ranges SEC(".maps");

/* 0 -> where ClusterIPs are. Written by reconcile through its own mapping, read for packets that are no
 * service's. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct service_prefixes);
} service_prefixes SEC(".maps");

/* service id, backend id -> what has become of its packets. Added to by the programs, atomically, where a flow
 * begins and where the sweeper passes; never per packet. Set to 0 by reconcile where an id gets a new owner. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, struct service_stats);
} service_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct backend_stats);
} backend_stats SEC(".maps");

/* 0 -> how many ICMP errors this CPU may send. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct icmp_limit);
} icmp_limits SEC(".maps");

/* tuple -> one half of a flow. Written by the programs alone. `pending` holds what is not assured yet: the
 * client has not spoken again after an answer. A flood turns it over and leaves `flows` alone. An entry past
 * its timeout is absent, whether or not the table has dropped it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tuple);
	__type(value, struct flow);
} pending SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct tuple);
	__type(value, struct flow);
} flows SEC(".maps");

/* hash of a flow, whichever its direction -> 1 while a CPU changes which entries exist. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOW_LOCKS);
	__type(key, __u32);
	__type(value, __u32);
} flow_locks SEC(".maps");

/* 0 -> what a CPU needs to change a flow, too large for the stack. Programs do not interrupt each other. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct change);
} changes SEC(".maps");

/* index of a device -> the bridge that it is a port of. Written by reconcile, read for frames that are not
 * sent to the device's own MAC address. A missing key: no port of a bridge, or one without programs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

/* index of a device, id of a VLAN on it -> index of the VLAN's own device. Written by reconcile, read for
 * tagged frames alone. A missing key: the frame is the device's own. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct vlan_key);
	__type(value, __u32);
} vlans SEC(".maps");

/* enum reason -> packets. Written by the programs, each CPU its own. The kernel wants a plain number as
 * the key of an array's BTF. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} reasons SEC(".maps");

/* 0 -> what belongs to all maps together. Written once, by the agent that makes the maps. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct record);
} record SEC(".maps");

#endif
