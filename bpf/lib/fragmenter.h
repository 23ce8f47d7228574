/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragmentation of IPv4 packets without DF that are larger than their way takes, as a router does it (RFC 791, 2.3).
 *
 * The fragments come in again where the packet did, as if its sender had cut it, and each finds its way like any other:
 * so tunnel, proof and neighbour are the business of the programs that know them. */
#ifndef MESH_FRAGMENTER_H
#define MESH_FRAGMENTER_H

#include "encap.h"

#define FRAGMENTS_MOST 32u /* of a packet */
#define SHED           104 /* bytes; more than are before a checksum that is left to offload */

#define FRAGMENTER_MOST  16384u /* bytes of a packet that is cut */
#define FRAGMENTER_CHUNK 512u
#define FRAGMENT_MOST    4088u /* of a fragment's payload: what bpf_skb_adjust_room takes */

/* A packet that is being cut. */
struct fragmenter {
	struct packet p;
	struct tunnel_peer from; /* where it came from through the tunnel, if `outer` */
	struct mesh_node_key key;
	struct tunnel_header head;
	__u32 outer;  /* bytes of the tunnel's headers before each fragment; 0: none */
	__u32 length; /* of the payload */
	__u32 each;   /* of a fragment's */
	__u32 at;     /* of it have been sent */
	__u32 sum;    /* of the payload */
	__be16 header[10];
	__be16 words[10]; /* the header of a fragment */
	__u8 payload[FRAGMENTER_MOST + 8 * FRAGMENTER_CHUNK];
};

/* Working space: a packet that is being cut. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fragmenter);
} scratch_fragmenter SEC(".maps");

/* Whether a packet that is larger than `mtu` may be cut. Large segments are cut by the kernel; packets with IP options
 * are rare enough to be rejected. */
INLINE int is_cuttable(struct __sk_buff *skb, const struct packet *p, __u32 mtu)
{
	return p->version == 4 && !p->dont_fragment && !skb->gso_size && p->l4 == L3 + V4_HEADER &&
	       p->length <= FRAGMENTER_MOST && p->length > V4_HEADER + SHED + V4_HEADER &&
	       p->length <= (mtu - V4_HEADER - 7) * FRAGMENTS_MOST && mtu >= MTU_LEAST;
}

/* Hand a packet for which is_cuttable holds to the program that cuts it. `node`: 0, or 1 and the number of the node
 * from which it came through the tunnel. */
INLINE int fragmenter_call(struct __sk_buff *skb, __u32 mtu, __u32 node, int program)
{
	skb->cb[0] = mtu;
	skb->cb[1] = node;
	return TAIL_CALL(program);
}

INLINE struct fragmenter *fragmenter(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch_fragmenter, &zero);
}

/* Copy the payload, and add it up: the sum is right if it is of a whole packet. Returns 0. */
RARE int fragmenter_load(struct __sk_buff *skb)
{
	struct fragmenter *w = fragmenter();
	__u32 length, sum = 0;

	if (!w)
		return -1;
	length = w->length;
	for (__u32 at = 0; at < FRAGMENTER_MOST; at += FRAGMENTER_CHUNK) {
		__u32 size = length - at, end;

		if (at >= length)
			break;
		if (size > FRAGMENTER_CHUNK)
			size = FRAGMENTER_CHUNK;
		end = at + size;
		asm volatile(""
			     : "+r"(size), "+r"(end)); /* the verifier does not see through what the compiler makes */
		size = ((size - 1) & (FRAGMENTER_CHUNK - 1)) + 1;
		end &= 2 * FRAGMENTER_MOST - 1;
		if (end > FRAGMENTER_MOST)
			return -1;
		w->payload[end] = w->payload[end + 1] = w->payload[end + 2] = 0;
		if (bpf_skb_load_bytes(skb, L3 + V4_HEADER + at, w->payload + at, size))
			return -1;
		sum = (__u32)bpf_csum_diff(NULL, 0, (void *)(w->payload + at), (size + 3) & ~3u, sum);
	}
	w->sum = sum;
	return 0;
}

/* Take the packet apart. Returns 0, 1 if its checksum was left to offload: it is complete now. */
INLINE int fragmenter_begin(struct __sk_buff *skb, struct fragmenter *w)
{
	__u32 check = w->p.flow.protocol == IPPROTO_TCP ? TCP_CHECK : UDP_CHECK;
	int partial = 0;
	__sum16 word;

	w->at = 0;
	w->length = w->p.length - V4_HEADER;
	if (bpf_skb_load_bytes(skb, L3, w->header, sizeof(w->header)))
		return -1;
	if (!w->p.fragment)
		partial = csum_is_partial(skb, L3 + V4_HEADER + check, &word);
	if (partial < 0 || fragmenter_load(skb))
		return -1;
	if (!partial)
		return 0;
	word = (__sum16)~fold16(w->sum);
	*(__sum16 *)(w->payload + check) = word ? word : 0xffff;
	return 1;
}

INLINE int resize(struct __sk_buff *skb, __s32 more)
{
	return (int)bpf_skb_adjust_room(skb, more, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO);
}

/* Make the frame as long as that of a fragment, which is written then. Bytes go and come behind the Ethernet header,
 * since the tail of a packet with the marks of a tunnel (encap_room) is not cut off. */
RARE int fragmenter_resize(struct __sk_buff *skb, int more, int partial)
{
	/* What is left to offload is forgotten once what it is about is gone; before Linux 6.2 by the next change. */
	if (partial) {
		if (resize(skb, -SHED) || resize(skb, -8))
			return -1;
		more += SHED + 8;
	}
	for (int i = 0; i < (int)(FRAGMENTER_MOST / FRAGMENT_MOST) + 1 && more < 0; i++) {
		__s32 step = more < -(__s32)FRAGMENT_MOST ? -(__s32)FRAGMENT_MOST : more;

		if (resize(skb, step))
			return -1;
		more -= step;
	}
	return more ? resize(skb, more) : 0;
}

/* Write the IP header of the fragment whose payload begins at w->at. */
INLINE int fragmenter_header(struct __sk_buff *skb, struct fragmenter *w, __u32 offset, __u32 size)
{
	__u16 place = bpf_ntohs(w->header[3]);
	__be16 *words = w->words;
	__u64 sum = 0;

	__builtin_memcpy(words, w->header, sizeof(w->words));
	words[1] = bpf_htons((__u16)(V4_HEADER + size));
	words[3] = bpf_htons((__u16)((place + w->at / 8) | (w->at + size < w->length ? IP_MORE : 0)));
	words[5] = 0;
	for (int i = 0; i < 10; i++)
		sum += words[i];
	words[5] = (__be16)~fold16(sum);
	return (int)bpf_skb_store_bytes(skb, offset, words, sizeof(w->words), BPF_F_RECOMPUTE_CSUM);
}

/* Write the headers of the tunnel before a fragment of so many bytes, as the node has sent them before the packet. */
RARE int fragmenter_outer(struct __sk_buff *skb, __u32 length)
{
	struct fragmenter *w = fragmenter();
	struct mesh_config *own = config();
	struct mesh_node *path;
	int v4, proven;

	if (!w || !own)
		return -1;
	path = bpf_map_lookup_elem(&mesh_nodes, &w->from.node);
	if (!path)
		return -1;
	v4 = is_v4(&w->from.node);
	proven = path->keys[0].valid;
	w->key.name = path->keys[0].name;
	w->key.sent = path->keys[0].taken;
	if (proven && proof_make(skb, &w->p, &w->from, &w->key, &w->head.proof))
		return -1;
	length += encap_overhead(v4, proven);
	tunnel_header(&w->head, &w->from, own->tunnel_port, length - (v4 ? V4_HEADER : V6_HEADER), bpf_htons(ETH_P_IP),
		      proven);
	return encap_store(skb, &w->head, L3 + (v4 ? V4_HEADER : V6_HEADER), proven) ||
	       (v4 ? outer_v4(skb, &w->from.node, &path->source, length)
		   : outer_v6(skb, &w->from.node, &path->source, length));
}

/* Make the frame the next fragment. Returns 0, 1 for the last one. */
RARE int fragmenter_next(struct __sk_buff *skb)
{
	struct fragmenter *w = fragmenter();
	__u32 size, index;

	if (!w)
		return -1;
	size = w->length - w->at;
	if (size > w->each)
		size = w->each;
	else if (w->at && size < w->each && resize(skb, (__s32)size - (__s32)w->each))
		return -1;
	index = w->at & (FRAGMENTER_MOST - 1);
	asm volatile("" : "+r"(index), "+r"(size)); /* the verifier does not see through what the compiler makes */
	size = ((size - 1) & (8 * FRAGMENTER_CHUNK - 1)) + 1;
	if ((w->outer && fragmenter_outer(skb, V4_HEADER + size)) || fragmenter_header(skb, w, L3 + w->outer, size) ||
	    bpf_skb_store_bytes(skb, L3 + w->outer + V4_HEADER, w->payload + index, size, BPF_F_RECOMPUTE_CSUM))
		return -1;
	w->at += size;
	w->p.fragment = 2;
	return w->at >= w->length;
}

/* Cut the packet, which is parsed, and have its fragments come in again. */
INLINE int fragmenter_cut(struct __sk_buff *skb, struct fragmenter *w, __u32 mtu)
{
	int partial, ended;
	__u32 size;

	if (!is_cuttable(skb, &w->p, mtu))
		return -1;
	w->each = (mtu - V4_HEADER) & ~7u;
	if (w->each > FRAGMENT_MOST)
		w->each = FRAGMENT_MOST;
	partial = fragmenter_begin(skb, w);
	size = w->length < w->each ? w->length : w->each;
	if (partial < 0 || fragmenter_resize(skb, (int)(L3 + w->outer + V4_HEADER + size) - (int)skb->len, partial))
		return -1;
	for (int i = 0; i < (int)FRAGMENTS_MOST; i++) {
		ended = fragmenter_next(skb);
		if (ended)
			return ended < 0 ? -1 : (int)bpf_redirect(skb->ifindex, BPF_F_INGRESS);
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	}
	return -1;
}

/* A packet that fragmenter_call has handed over. */
INLINE int fragmenter_run(struct __sk_buff *skb)
{
	__u32 mtu = skb->cb[0], number = skb->cb[1] - 1;
	struct fragmenter *w = fragmenter();
	struct mesh_addr *node;
	struct mesh_node *path;
	int action;

	if (!w || parse(skb, &w->p) == PARSE_OTHER)
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	__builtin_memset(&w->from, 0, sizeof(w->from));
	w->outer = 0;
	if (skb->cb[1]) {
		node = bpf_map_lookup_elem(&mesh_node_addrs, &number);
		path = node ? bpf_map_lookup_elem(&mesh_nodes, node) : NULL;
		if (!path)
			return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
		w->from.node = *node;
		w->from.id.flags = MESH_TUNNEL_REPLY;
		w->from.entropy = (__u32)mesh_hash_flow_wide(&w->p.flow);
		w->outer = encap_overhead(is_v4(node), path->keys[0].valid);
	}
	action = fragmenter_cut(skb, w, mtu);
	return action < 0 ? verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT) : verdict(MESH_VERDICT_FRAGMENTED, action);
}

#endif /* MESH_FRAGMENTER_H */
