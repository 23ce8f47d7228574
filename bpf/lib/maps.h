/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps, and the look-ups that several headers share.
 *
 * User space pins a map whose name begins with mesh_, by this name: all objects and the next agent use the same one.
 * Any other map belongs to the object that declares it.
 *
 * Where a comment says "mmap", the agent writes by plain stores into a shared mapping.
 *
 * How the agent publishes (make before break; no step needs a system call per element, and none exposes half a state):
 *
 *   1. Backends: write the mesh_backend, `state` last. A reused id first gets epoch + 1.
 *   2. Table: take a free range of an arena, write all slots, then store mesh_frontend.table as one aligned 64-bit
 *      word. x86-64 keeps stores in order; elsewhere a release store is needed.
 *   3. The range of the old table is free once every program that was running has returned: after one RCU grace period
 *      (any update of a map-in-map waits for one: put an arena into its own index again), or after a second.
 *   4. Frontends: write the mesh_frontend, table included, then mesh_exact or the port's word in mesh_ports. To remove
 *      one: clear the word or the key first; after a grace period free the mesh_frontend and the range.
 *   5. Removed backends: set `state` to FREE once no table names them, and keep the epoch.
 *
 * The agent creates an arena only when the others are full. This is the only step that waits for a grace period, and
 * it costs one update for each new arena, however many tables it then holds. */
#ifndef MESH_MAPS_H
#define MESH_MAPS_H

#include <linux/in.h>
#include "address.h"

#define MESH_RECENT_BITS 17
#define FIB_CACHE_BITS   10
#define SNAT_BITS        16

/* Frontend id and MESH_PORT_* flags by protocol and port; 0: the packet passes. Written by the agent (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * 65536);
	__type(key, __u32);
	__type(value, __u32);
} mesh_ports SEC(".maps");

/* Frontends that have an address of their own: the id by address, port and protocol. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, struct mesh_frontend_key);
	__type(value, __u32);
} mesh_exact SEC(".maps");

/* This node's own addresses, and whether they move between nodes (MESH_ADDRESS_*). A frontend for any address serves
 * these and no others. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct mesh_addr);
	__type(value, __u32);
} mesh_addresses SEC(".maps");

/* Frontends by id; id 0 is none. Written by the agent (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct mesh_frontend);
} mesh_frontends SEC(".maps");

/* An arena: an array of slots. The agent creates each as this inner map and writes it (mmap). */
struct mesh_arena {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_ARENA_SLOTS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct mesh_slot)); /* __type would not reach BTF behind the pointer */
};

/* Arenas of slots by number. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MESH_MAX_ARENAS);
	__type(key, __u32);
	__array(values, struct mesh_arena);
} mesh_arenas SEC(".maps");

/* Backends by owner id; ids 0 and 1 are NONE and PASS. Written by the agent (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct mesh_backend);
} mesh_backends SEC(".maps");

/* Other nodes of the cluster by address: only they may send through the tunnel. Written by the agent; programs write
 * the path MTU. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MESH_MAX_NODES);
	__type(key, struct mesh_addr);
	__type(value, struct mesh_node);
} mesh_nodes SEC(".maps");

/* Addresses of other nodes by mesh_node.id. Written by the agent, before mesh_nodes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MESH_MAX_NODES);
	__type(key, __u32);
	__type(value, struct mesh_addr);
} mesh_node_addrs SEC(".maps");

/* Owner ids of the backends of this node, by the id that other nodes use. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, struct mesh_id);
	__type(value, __u32);
} mesh_ids SEC(".maps");

/* Source rules: MESH_ACL_ALLOW or MESH_ACL_DENY by rule set and prefix. Written by the agent.
 *
 * The longest prefix decides, so the agent leaves out what a deny covers (deny wins); without a match
 * MESH_FRONTEND_DENY decides. Changed rules are a new rule set. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct mesh_acl_key);
	__type(value, __u32);
} mesh_acl SEC(".maps");

/* Flow cache: the owner of each flow whose slot is in transition, by the client's 5-tuple. Written by programs; the
 * agent sets max_entries at load, and may read and delete. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_note);
} mesh_flows SEC(".maps");

/* Flow cache, flows without proof, UDP, and flows that belong to the previous owner in any case: a flood fills this map
 * alone, and never evicts an established flow's note. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_note);
} mesh_flows_new SEC(".maps");

/* Reverse NAT: what the client called, by (client, backend). Written by programs; the agent sets max_entries at load.
 *
 * TCP flows whose client has shown that it gets the task's packets, or whose task has gone on with them: no flood from
 * invented addresses gets in, so that none evicts them. The entry of a closed flow stays for late packets: the agent
 * deletes entries that have both MESH_REVNAT_FIN flags and are a minute old, and the LRU evicts what it misses. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 524288);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_revnat);
} mesh_revnat SEC(".maps");

/* Reverse NAT of UDP flows, from their second packet on. Written by programs; the agent sets max_entries at load.
 *
 * No datagram proves that its sender's address is not invented: so UDP flows can evict each other, and no connection.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_revnat);
} mesh_revnat_udp SEC(".maps");

/* Reverse NAT, flows without proof: TCP until a client acknowledges the task's answer, UDP until the second packet. A
 * flood fills this map alone, and never evicts an established flow. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct mesh_flow);
	__type(value, struct mesh_revnat);
} mesh_revnat_new SEC(".maps");

#define REVNAT_CLOSED (MESH_REVNAT_FIN_IN | MESH_REVNAT_FIN_OUT)

/* Two flows to a place. A word holds bits of the flow's hash and owner, and of the stamp. */
struct recent {
	__u64 words[2];
};

/* Flows whose entry in mesh_revnat was confirmed within the current stamp, by the flow's hash: their packets need no
 * look-up there, nor in mesh_addresses. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* tests empty it */
	__uint(max_entries, 1 << MESH_RECENT_BITS);
	__type(key, __u32);
	__type(value, struct recent);
} mesh_recent SEC(".maps");

/* The current stamp, as of the last packet of this object that read the clock: reading it costs a quarter of all the
 * rest. Entries of mesh_recent are lost to new ones only, and every packet that makes one reads the clock. */
volatile __u32 mesh_now;

/* Generation of the routing tables: how often routes, rules, addresses or interfaces have changed. Written by the
 * agent (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} mesh_fib_gen SEC(".maps");

/* Ports of fragmented datagrams, by addresses and fragment id. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct mesh_fragment_key);
	__type(value, struct mesh_fragment);
} mesh_fragments SEC(".maps");

/* Networks that tasks of this node have themselves, by owner and prefix, and this node's address by which such a task
 * sees clients with addresses in them. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct mesh_network_key);
	__type(value, struct mesh_addr);
} mesh_networks SEC(".maps");

/* When a flow whose source is translated was last heard (MESH_STAMP_SHIFT), by bits of its hash: other flows need not
 * be looked for among them. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* tests empty it */
	__uint(max_entries, 1 << SNAT_BITS);
	__type(key, __u32);
	__type(value, __u32);
} mesh_translated SEC(".maps");

/* Packets by verdict. Written by programs; the agent sums over CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_VERDICT_COUNT);
	__type(key, __u32);
	__type(value, __u64); /* packets */
} mesh_verdicts SEC(".maps");

/* Counters by frontend id. Written by programs; the agent sums over CPUs, and zeroes an id before it reuses it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct mesh_counts);
} mesh_fe_metrics SEC(".maps");

/* Counters by owner id. Written by programs; the agent sums over CPUs, and zeroes an id before it reuses it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct mesh_counts);
} mesh_be_metrics SEC(".maps");

/* Failures by frontend id and cause. Written by programs; the agent sums over CPUs, and zeroes an id before it reuses
 * it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MESH_MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct mesh_failures);
} mesh_fe_failures SEC(".maps");

/* Rate limit of ICMP errors: until when the errors that this CPU has sent use up its share (icmp_rate_allows).
 * Written by programs.
 *
 * In nanoseconds of CLOCK_MONOTONIC. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} mesh_icmp_limit SEC(".maps");

/* What holds for the whole node. Written by the agent (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_config);
} mesh_config SEC(".maps");

/* From when on the tables are orphaned: a stamp, or MESH_ORPHAN_NEVER. Written by the agent every second (mmap). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} mesh_heartbeat SEC(".maps");

/* Socket hooks: what a socket called and where it went instead; freed with the socket. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mesh_sk_revnat);
} mesh_sk_revnat SEC(".maps");

/* Socket hooks, UDP: what was called, by (socket, backend). Written by programs; the agent looks up connected sockets.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mesh_udp_peer);
	__type(value, struct mesh_sk_revnat);
} mesh_udp_revnat SEC(".maps");

/* The next hop of IPv4 packets between two addresses. */
struct fib_entry {
	__be32 source;
	__be32 destination;
	__u32 ifindex;
	__u32 routes; /* mesh_fib_gen, as of the answer */
	__u32 since;  /* jiffies, as of the answer */
	__be32 next;  /* next hop; 0: the kernel looks up each packet */
	__u8 protocol;
	__u8 tos;
	__u8 pad[2];
};

/* Next hops that the kernel has answered, by a hash of both addresses. Written by programs.
 *
 * Private to each object, since other builds may cache other things. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << FIB_CACHE_BITS);
	__type(key, __u32);
	__type(value, struct fib_entry);
} fib_cache SEC(".maps");

INLINE struct mesh_config *config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&mesh_config, &zero);
}

INLINE __u32 stamp_now(void)
{
	return (__u32)(bpf_ktime_get_coarse_ns() >> MESH_STAMP_SHIFT);
}

/* Read the clock, and store the stamp for all packets of this object. */
INLINE __u32 stamp_tick(void)
{
	__u32 now = stamp_now();

	if (mesh_now != now)
		mesh_now = now;
	return now;
}

/* The word of mesh_ports: 0 for a port that is not served, by one array look-up. */
INLINE __u32 port_word(__u8 protocol, __be16 port)
{
	__u32 index = (protocol == IPPROTO_TCP ? MESH_PORT_TCP : MESH_PORT_UDP) + bpf_ntohs(port);
	__u32 *word = bpf_map_lookup_elem(&mesh_ports, &index);

	return word ? *(volatile __u32 *)word : 0;
}

INLINE int is_local(const struct mesh_addr *address)
{
	return bpf_map_lookup_elem(&mesh_addresses, address) != NULL;
}

/* The reverse NAT entry of a flow that has proved itself, or NULL. */
INLINE struct mesh_revnat *revnat_proven(const struct mesh_flow *key)
{
	struct mesh_revnat *reply;

	if (unlikely(key->protocol == IPPROTO_UDP)) {
		reply = bpf_map_lookup_elem(&mesh_revnat_udp, key);
		barrier_var(reply); /* two calls stay two: the kernel inlines those whose map it knows */
		return reply;
	}
	return bpf_map_lookup_elem(&mesh_revnat, key);
}

/* The reverse NAT entry of a flow, or NULL. */
INLINE struct mesh_revnat *revnat_find(const struct mesh_flow *key)
{
	struct mesh_revnat *reply = revnat_proven(key);

	return reply ? reply : bpf_map_lookup_elem(&mesh_revnat_new, key);
}

INLINE struct mesh_backend *find_backend(__u32 owner)
{
	return owner < MESH_OWNER_FIRST ? NULL : bpf_map_lookup_elem(&mesh_backends, &owner);
}

/* Whether a backend runs on another node. */
INLINE int is_remote(const struct mesh_backend *backend)
{
	return backend->seed != 0;
}

/* Whether a backend is at an address of this node itself: no program sees what it sends. */
INLINE int is_host_backend(const struct mesh_backend *backend)
{
	return !backend->ifindex && backend->bridge == MESH_LOOPBACK;
}

#endif /* MESH_MAPS_H */
