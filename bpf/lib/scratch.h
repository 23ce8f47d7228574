/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Working space that the stack has no room for: one element per CPU, which runs one program at a time; and what
 * programs remember of proofs, and of fragments that came too early. Private to each object. */
#ifndef MESH_SCRATCH_H
#define MESH_SCRATCH_H

#include "maps.h"
#include "parse.h"

#define PROOF_MEMO_BITS 11

/* Working space: the key of a look-up in the flow tables. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_flow);
} scratch_flow SEC(".maps");

/* The packet that an ICMP error quotes. */
struct quoted {
	struct mesh_flow flow; /* as quoted */
	__u16 ip;              /* offsets in the frame */
	__u16 l4;
	__sum16 check; /* of the quoted IPv4 header */
	__u16 pad;
};

/* The translation of an ICMP error. */
struct icmp_work {
	struct tuple inner;
	struct tuple outer;
	struct quoted quoted;
	struct mesh_flow key;
	struct mesh_flow client; /* the flow as its client sends it */
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip;
};

/* Working space: the translation of an ICMP error. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct icmp_work);
} scratch_icmp SEC(".maps");

/* Zeroed, or NULL. */
INLINE struct icmp_work *icmp_work(void)
{
	struct icmp_work *work;
	__u32 zero = 0;

	work = bpf_map_lookup_elem(&scratch_icmp, &zero);
	if (work)
		__builtin_memset(work, 0, sizeof(*work));
	return work;
}

/* Options of a TCP header. */
struct tcp_options {
	__u8 options[64];
};

/* Working space: the options of a TCP header. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcp_options);
} scratch_tcp SEC(".maps");

/* Working space: a new entry of reverse NAT. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mesh_revnat);
} scratch_revnat SEC(".maps");

/* Zeroed, or NULL. */
INLINE struct mesh_revnat *revnat_work(void)
{
	struct mesh_revnat *work;
	__u32 zero = 0;

	work = bpf_map_lookup_elem(&scratch_revnat, &zero);
	if (work)
		__builtin_memset(work, 0, sizeof(*work));
	return work;
}

#ifdef MESH_PROVES /* the object sends or takes packets of the tunnel */
/* A proof, and what it is of. */
struct proof {
	__u64 key; /* first half of the key: says which key, nodes and direction */
	struct mesh_flow flow;
	struct mesh_id id;
	__u32 epoch;
	__u64 mac;
	__u32 since; /* jiffies, when the epoch was last compared with the clock */
	__u32 pad;
};

/* Proofs of recent flows, by the flow's hash, of what is sent and of what is received. Written by programs.
 *
 * Private to each object, since other builds may prove other things. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << PROOF_MEMO_BITS);
	__type(key, __u32);
	__type(value, struct proof);
} proof_memo SEC(".maps");

#define EARLY_BITS  11    /* of the number of chunks */
#define EARLY_CHUNK 2048u /* bytes */

/* A part of an early fragment. */
struct early_chunk {
	__u32 number;   /* that it was stored with; 0: being written */
	__u32 previous; /* of the fragment: the number of the one that was kept before it; 0: none */
	__u32 length;   /* of the fragment */
	__u32 pad;
	__u8 data[EARLY_CHUNK];
};

/* Early fragments in chunks, by the lower bits of the chunk's number: the newest replace the oldest. Written by
 * programs.
 *
 * Private to each object, as all fragments of a datagram meet the same one. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << EARLY_BITS);
	__type(key, __u32);
	__type(value, struct early_chunk);
} early_chunks SEC(".maps");

/* A datagram whose first fragment has not come. */
struct early {
	__u32 last;  /* the number of the fragment that was kept last; 0: none */
	__u32 stamp; /* when */
};

/* Datagrams with early fragments, by addresses and fragment id. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct mesh_fragment_key);
	__type(value, struct early);
} early_datagrams SEC(".maps");

/* How many chunks have been stored. */
__u32 early_count;
#endif

/* By what an entry keeps its place at a task, as of revnat_holds. */
struct snat_holder {
	__u32 owner;
	__u32 epoch;
	__u32 now;
	__u32 proven;  /* how many stamps are lately */
	__u32 waiting; /* likewise, for flows that are not proven */
	__s32 chosen;  /* what snat_port answers: here, for the verifier to follow one path for all its values */
	__u32 hash;
	__u32 make;
	__u32 taken;
	__u32 pad;
};

/* Keys of look-ups, and what the stack has no room for either. */
struct snat_keys {
	struct mesh_flow place; /* where a flow's entry is, or will be */
	struct mesh_flow other; /* where it may be */
	struct mesh_network_key network;
	struct snat_holder holder;
};

/* Working space: keys of reverse NAT, and of a task's networks. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct snat_keys);
} scratch_snat SEC(".maps");

INLINE struct snat_keys *snat_keys(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch_snat, &zero);
}

#endif /* MESH_SCRATCH_H */
