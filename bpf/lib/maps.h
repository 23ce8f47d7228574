/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps that are shared. User space pins them by name and has the three objects and the next agent use the same
 * ones. Maps marked mmap are written by plain stores into a shared mapping.
 *
 * Publishing, agent side (make before break; no step needs a system call per element, none exposes half a state):
 *   1. backends: write the mesh_backend, `state` last. An id that is reused gets epoch + 1 first.
 *   2. table: take a free range of an arena, write all slots, then store mesh_frontend.table as ONE aligned 64-bit
 *      word. x86-64 keeps stores in order; elsewhere a release store is due.
 *   3. the range of the old table may be reused once every program that was running has ended: after one RCU grace
 *      period (any update of a map-in-map waits for one: put an arena into its own index again) or a second.
 *   4. frontends: write the mesh_frontend (table included), then mesh_exact or the port's word in mesh_ports.
 *      Removing: word or key first, then after a grace period the mesh_frontend and the range.
 *   5. backends that are gone: state = FREE once no table names them, epoch kept.
 * Programs: ingress.bpf.o mesh_ingress (tc ingress, Ethernet interfaces that face clients), mesh_explain (test run
 * only); task.bpf.o mesh_task (tc ingress, host side of the local tasks' veths); socket.bpf.o
 * mesh_{connect,sendmsg,recvmsg, getpeername}{4,6} (root cgroup); xdp.bpf.o mesh_xdp (optional, native XDP of network
 * cards). They return TC_ACT_UNSPEC (XDP_PASS) for what they leave to the kernel, so that programs and filters after
 * them still run (TC_ACT_OK would end a tcx chain, and a clsact one).
 *
 * An arena is created only when the others are full: the only step that waits for a grace period, and one update of
 * each new arena, however many tables it then holds.
 */
#ifndef MESH_MAPS_H
#define MESH_MAPS_H

#include "bpf.h"

#define MESH_RECENT_BITS 17

/* Ports (mmap, agent writes): [protocol and port] -> frontend id and MESH_PORT_EXACT. What is not ours ends here. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * 65536);
	__type(key, __u32);
	__type(value, __u32);
} mesh_ports SEC(".maps");

/* Frontends with an address of their own (agent writes): -> frontend id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, struct mesh_frontend_key);
	__type(value, __u32);
} mesh_exact SEC(".maps");

/* This node's own addresses (agent writes; MESH_ADDRESS_*). A frontend with any address serves these and no others. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct mesh_addr);
	__type(value, __u32);
} mesh_addresses SEC(".maps");

/* Frontends by id (mmap, agent writes); id 0 is none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct mesh_frontend);
} mesh_frontends SEC(".maps");

/* Arenas of slots (agent creates each as this inner map, mmap, and writes it). */
struct mesh_arena {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_ARENA_SLOTS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct mesh_slot)); /* __type would not reach BTF behind the pointer */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MESH_MAX_ARENAS);
	__type(key, __u32);
	__array(values, struct mesh_arena);
} mesh_arenas SEC(".maps");

/* Backends by owner id (mmap, agent writes); ids 0 and 1 are NONE and PASS. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct mesh_backend);
} mesh_backends SEC(".maps");

/* Other nodes of the cluster (agent writes): only they may send through the tunnel. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MESH_MAX_NODES);
	__type(key, struct mesh_addr);
	__type(value, struct mesh_node);
} mesh_nodes SEC(".maps");

/* Their addresses by mesh_node.id (agent writes, before mesh_nodes). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MESH_MAX_NODES);
	__type(key, __u32);
	__type(value, struct mesh_addr);
} mesh_ways SEC(".maps");

/* Backends of this node as other nodes call them (agent writes): -> owner id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, struct mesh_id);
	__type(value, __u32);
} mesh_ids SEC(".maps");

/* Source rules (agent writes): (rule set, prefix) -> MESH_ACL_ALLOW or _DENY; the longest prefix decides, so the agent
 * leaves out what a deny covers (deny wins). No match: MESH_FRONTEND_DENY says. New rules are a new rule set. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct mesh_acl_key);
	__type(value, __u32);
} mesh_acl SEC(".maps");

/* Flow cache (programs write; agent sets max_entries at load, and may read and delete): flows of slots in transition,
 * by the client's 5-tuple. A flow waits in mesh_starts until its second packet, so that a flood never pushes one out
 * that goes on. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_note);
} mesh_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_note);
} mesh_starts SEC(".maps");

/* Reverse translation (programs write; agent sets max_entries at load, and may read): (client, backend) -> what the
 * client called. Flows of which only a start was seen wait in mesh_openings, so that a flood never pushes an
 * established flow out. A closed flow's entry stays for late packets: the agent deletes entries with both
 * MESH_REPLY_FIN flags that are a minute old; what it misses the LRU takes. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 524288);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_reply);
} mesh_replies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_reply);
} mesh_openings SEC(".maps");

/* Flows whose entry in mesh_replies was confirmed within the current stamp (programs write; a cache of this object
 * alone, two flows to a place): their packets need no look at it, nor at mesh_addresses. Value: bits of the flow's hash
 * and owner, and of the stamp. */
struct recent {
	__u64 words[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* tests empty it */
	__uint(max_entries, 1 << MESH_RECENT_BITS);
	__type(key, __u32);
	__type(value, struct recent);
} mesh_recent SEC(".maps");

/* The current stamp, as of the last packet of this object that had to look at the time: a look costs as much as a
 * quarter of all the rest. Entries are lost to new ones only, and every packet that makes one looks. */
volatile __u32 mesh_now;

/* How often routes, rules, addresses or interfaces have changed (mmap, agent writes). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} mesh_routes SEC(".maps");

/* Ports of fragmented datagrams (programs write). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct mesh_fragment_key);
	__type(value, __u32); /* source port, destination port, both in network order */
} mesh_fragments SEC(".maps");

/* Counters (programs write, agent sums over CPUs by batch look-up and zeroes an id before it is given anew). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_VERDICT_COUNT);
	__type(key, __u32);
	__type(value, __u64); /* packets */
} mesh_verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct mesh_counts);
} mesh_fcounts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct mesh_counts);
} mesh_bcounts SEC(".maps");

/* A key for which the stack has no room (programs write; each CPU runs one at a time). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_flow);
} mesh_scratch SEC(".maps");

/* Until when the ICMP errors that a CPU has sent use up its share, in nanoseconds of CLOCK_MONOTONIC (programs write):
 * see may_send_error. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} mesh_errors SEC(".maps");

/* What holds for the whole node (mmap, agent writes). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_config);
} mesh_config SEC(".maps");

/* Socket hooks (programs write): what a socket dialled, freed with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mesh_dialled);
} mesh_dialled SEC(".maps");

/* Socket hooks, unconnected UDP (programs write): (socket, backend) -> what was dialled. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mesh_peer_key);
	__type(value, struct mesh_dialled);
} mesh_peers SEC(".maps");

#endif /* MESH_MAPS_H */
