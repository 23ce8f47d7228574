/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Encapsulation: the IP packet as it is, in Geneve (RFC 8926) with one option that names the backend or marks a reply.
 * Checksums left to offload and large segments stay so: the kernel completes and segments the inner packet. */
#ifndef MESH_ENCAP_H
#define MESH_ENCAP_H

#include "csum.h"
#include "fib.h"
#include "metrics.h"
#include "scratch.h"
#include "tunnel_proof.h"

#define TUNNEL_HEADERS ((__u32)(sizeof(struct udphdr) + sizeof(struct mesh_geneve))) /* without a proof */
#define PROOF_SIZE     ((__u32)sizeof(struct mesh_proof))
#define MSS_OPTION     2u
#define MSS_ROOM       40u /* of all TCP options */
#define MTU_LEAST      128u
#define PATH_LEAST     1280u /* a smaller path MTU is not believed (RFC 8200) */
#define IP_LENGTH      65535u
#define PROTO_DIFF     ((__s32)(V6_HEADER - V4_HEADER))

struct tunnel_header {
	struct udphdr udp;
	struct mesh_geneve geneve;
	struct mesh_proof proof; /* not always: TUNNEL_HEADERS */
};

/* Hand a packet to mesh_tunnel_tx. `frontend` 0: nothing to count. `flags`: MESH_TUNNEL_*. */
INLINE int tunnel_tx_call(struct __sk_buff *skb, __u32 owner, __u32 frontend, __u32 entropy, __u32 flags)
{
	skb->cb[0] = owner;
	skb->cb[1] = frontend;
	skb->cb[2] = entropy;
	skb->cb[3] = flags;
	return TAIL_CALL(CALL_TUNNEL_TX);
}

/* Hand a packet to mesh_tunnel_rx. */
INLINE int tunnel_rx_call(struct __sk_buff *skb)
{
	skb->cb[0] = 0;
	return TAIL_CALL(CALL_TUNNEL_RX);
}

/* Bytes that the tunnel adds to a packet that is proven, or not. */
INLINE __u32 encap_overhead(int v4, int proven)
{
	return (v4 ? V4_HEADER : V6_HEADER) + TUNNEL_HEADERS + (proven ? PROOF_SIZE : 0);
}

/* How large a packet to a node may be, with a proof whether the node knows proofs or not: so nothing grows too large
 * on the day it does. 0: there is no path. */
INLINE __u32 path_takes(const struct mesh_node *path, int v4)
{
	__u32 room = encap_overhead(v4, 1), mtu;

	if (!path)
		return 0;
	mtu = path->mtu;
	if (unlikely(path->path_mtu && path->path_mtu < mtu) && stamp_now() - path->path_stamp < MESH_PATH_LIFE)
		mtu = path->path_mtu;
	if (mtu > IP_LENGTH)
		mtu = IP_LENGTH;
	return mtu > room + MTU_LEAST ? mtu - room : 0;
}

INLINE __u32 tunnel_mtu(const struct mesh_addr *node)
{
	return path_takes(bpf_map_lookup_elem(&mesh_nodes, node), is_v4(node));
}

/* Whether a frame's packet, or one of the segments it will be cut into, is larger than p->mtu. */
INLINE int exceeds_mtu(struct __sk_buff *skb, const struct packet *p)
{
	__u32 header = p->l4 - L3, length = skb->len - L3;
	__u8 words = 0;

	if (likely(length <= p->mtu))
		return 0;
	if (!skb->gso_size || length > IP_LENGTH - encap_overhead(0, 1))
		return 1;
	if (p->flow.protocol != IPPROTO_TCP)
		header += (__u32)sizeof(struct udphdr);
	else if (bpf_skb_load_bytes(skb, p->l4 + TCP_FLAGS - 1, &words, 1))
		return 1;
	return header + (words >> 4) * 4u + skb->gso_size > p->mtu;
}

/* Offset of the MSS option's value among the options; 0: there is none. */
INLINE __u32 find_mss(const struct tcp_options *w, __u32 length)
{
	__u32 at = 0;

	for (int i = 0; i < (int)MSS_ROOM; i++) {
		__u8 kind, size;

		if (at + 4 > length)
			return 0;
		kind = w->options[at & 63];
		size = w->options[(at + 1) & 63];
		if (kind == 0)
			return 0;
		if (kind == MSS_OPTION)
			return size == 4 ? at + 2 : 0;
		if (kind != 1 && size < 2)
			return 0;
		at += kind == 1 ? 1 : size;
	}
	return 0;
}

/* MSS clamping, of a SYN or SYN-ACK: the other side must not send segments that do not fit into `mtu` bytes. */
RARE int clamp_mss(struct __sk_buff *skb, struct packet *p, __u32 mtu)
{
	__u32 zero = 0, length, at, most;
	struct tcp_options *w = bpf_map_lookup_elem(&scratch_tcp, &zero);
	__be16 now, was;
	__u8 words;

	if (!p || !w || p->fragment || bpf_skb_load_bytes(skb, p->l4 + TCP_FLAGS - 1, &words, 1))
		return 0;
	most = mtu - header_length(p) - (__u32)sizeof(struct tcphdr);
	length = (words >> 4) * 4u - (__u32)sizeof(struct tcphdr);
	if (length < 4 || length > MSS_ROOM)
		return 0;
	asm volatile("" : "+r"(length)); /* kernels before 6.3 do not see through what the compiler makes of it */
	length = ((length - 1) & (sizeof(w->options) - 1)) + 1;
	if (bpf_skb_load_bytes(skb, p->l4 + sizeof(struct tcphdr), w->options, length))
		return 0;
	at = find_mss(w, length);
	if (!at)
		return 0;
	was = (__be16)(w->options[at & 63] | w->options[(at + 1) & 63] << 8);
	if (bpf_ntohs(was) <= most)
		return 0;
	now = bpf_htons((__u16)most);
	if (bpf_skb_store_bytes(skb, p->l4 + (__u32)sizeof(struct tcphdr) + at, &now, 2, 0))
		return -1;
	if (at & 1) { /* the sum is of words: an odd place swaps the bytes */
		was = (__be16)__builtin_bswap16(was);
		now = (__be16)__builtin_bswap16(now);
	}
	return (int)bpf_l4_csum_replace(skb, p->l4 + TCP_CHECK, was, now, 2);
}

INLINE int decrement_ttl(struct __sk_buff *skb, const struct packet *p)
{
	__u8 ttl = p->ttl - 1;

	if (p->version == 6)
		return (int)bpf_skb_store_bytes(skb, L3 + 7, &ttl, 1, BPF_F_RECOMPUTE_CSUM);
	return bpf_l3_csum_replace(skb, L3 + 10, bpf_htons((__u16)(p->ttl << 8)), bpf_htons((__u16)(ttl << 8)), 2) ||
	       bpf_skb_store_bytes(skb, L3 + 8, &ttl, 1, 0);
}

/* Make room for the outer headers, and set the marks by which the kernel segments and checksums inside. Virtual links
 * leave the marks of an earlier tunnel on a packet; the kernel then refuses to set them again, and they still hold. */
INLINE int encap_room(struct __sk_buff *skb, __s32 room, int v4, int inner_v4)
{
	if (likely(!bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC,
					BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
						(v4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))))
		return 0;
	if (v4 == inner_v4)
		return (int)bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO);
	if (bpf_skb_adjust_room(skb, room + (v4 ? PROTO_DIFF : -PROTO_DIFF), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO))
		return -1;
	return (int)bpf_skb_change_proto(skb, v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6), 0);
}

/* Remove the outer headers. The kernel learns another IP version by bpf_skb_change_proto, which inserts or removes the
 * difference of two headers: before Linux 6.3 there is no other way. */
INLINE int decap_room(struct __sk_buff *skb, __s32 room, int v4, int inner_v4)
{
	__be16 type = inner_v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);

	if (v4 == inner_v4)
		return (int)bpf_skb_adjust_room(skb, -room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO);
	room += v4 ? PROTO_DIFF : -PROTO_DIFF;
	return bpf_skb_change_proto(skb, type, 0) ||
	       bpf_skb_adjust_room(skb, -room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, 2, 0);
}

INLINE int outer_v4(struct __sk_buff *skb, const struct tunnel_peer *to, const struct mesh_node *path, __u32 length)
{
	__be16 words[10] = {
		bpf_htons(0x4500),
		bpf_htons((__u16)length),
		0,
		bpf_htons(IP_DF),
		bpf_htons(DEFAULT_TTL << 8 | IPPROTO_UDP),
	};
	__be16 type = bpf_htons(ETH_P_IP);
	__u64 sum = 0;

	__builtin_memcpy(words + 6, &path->source.words[3], 4);
	__builtin_memcpy(words + 8, &to->node.words[3], 4);
	for (int i = 0; i < 10; i++)
		sum += words[i];
	words[5] = (__be16)~fold16(sum);
	return bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, 2, 0) ||
	       bpf_skb_store_bytes(skb, L3, words, sizeof(words), BPF_F_RECOMPUTE_CSUM);
}

INLINE int outer_v6(struct __sk_buff *skb, const struct tunnel_peer *to, const struct mesh_node *path, __u32 length)
{
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons((__u16)(length - V6_HEADER)),
		.nexthdr = IPPROTO_UDP,
		.hop_limit = DEFAULT_TTL,
	};
	__be16 type = bpf_htons(ETH_P_IPV6);

	__builtin_memcpy(&ip.saddr, &path->source, 16);
	__builtin_memcpy(&ip.daddr, &to->node, 16);
	return bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, 2, 0) ||
	       bpf_skb_store_bytes(skb, L3, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM);
}

/* Write UDP, Geneve and the proof, behind the room for the outer IP header. */
INLINE int encap_store(struct __sk_buff *skb, const struct tunnel_header *head, __u32 at, int proven)
{
	return (int)(likely(proven)
			     ? bpf_skb_store_bytes(skb, at, head, sizeof(*head), BPF_F_RECOMPUTE_CSUM)
			     : bpf_skb_store_bytes(skb, at, head, sizeof(*head) - PROOF_SIZE, BPF_F_RECOMPUTE_CSUM));
}

/* Encapsulate a packet and send it to a node. Returns an action, and counts failures only.
 * `p`: the packet as it is now; its flow is changed. `path`: to the node, if the caller has it. */
static __noinline int encap_send(struct __sk_buff *skb, struct tunnel_peer *to, struct packet *p,
				 struct mesh_node *path)
{
	struct fib_query by = {.protocol = IPPROTO_UDP};
	struct tunnel_header head = {};
	struct mesh_config *node = config();
	__u32 length, room;
	int v4, proven;

	if (!path)
		path = bpf_map_lookup_elem(&mesh_nodes, &to->node);
	if (!path || !node)
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	v4 = is_v4(&to->node);
	proven = is_to_prove(path);
	if (likely(proven) && proof_make(skb, p, to, path->keys, &head.proof))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	room = encap_overhead(v4, proven);
	length = skb->len - L3 + room;
	head.udp.source = bpf_htons((__u16)(MESH_TUNNEL_SOURCE | (to->entropy & 0x3fff)));
	head.udp.dest = node->tunnel_port;
	head.udp.len = bpf_htons((__u16)(length - (v4 ? V4_HEADER : V6_HEADER)));
	head.geneve.words = (__u8)(MESH_GENEVE_WORDS + (proven ? MESH_PROOF_WORDS : 0));
	head.geneve.flags = MESH_GENEVE_CRITICAL;
	head.geneve.inner = p->version == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	head.geneve.option_class = bpf_htons(MESH_GENEVE_CLASS);
	head.geneve.option_type = MESH_GENEVE_TYPE;
	head.geneve.option_words = (__u8)(MESH_GENEVE_OPTION + (proven ? MESH_PROOF_WORDS : 0));
	head.geneve.id = to->id;
	if (encap_room(skb, (__s32)room, v4, p->version == 4) ||
	    encap_store(skb, &head, L3 + (v4 ? V4_HEADER : V6_HEADER), proven) ||
	    (v4 ? outer_v4(skb, to, path, length) : outer_v6(skb, to, path, length)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	if (!v4)
		return (int)bpf_redirect_neigh(path->ifindex, NULL, 0, 0);
	by.source = path->source.words[3];
	by.destination = to->node.words[3];
	by.ifindex = path->ifindex;
	return fib_send_v4(skb, &by);
}

#endif /* MESH_ENCAP_H */
