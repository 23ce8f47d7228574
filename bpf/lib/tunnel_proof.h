/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The proof that a packet in the tunnel comes from a node of the swarm (struct mesh_proof): over what decides where the
 * packet goes, and the time. What a flow's last packets proved is remembered, so that the hash is computed once for a
 * flow and epoch. */
#ifndef MESH_TUNNEL_PROOF_H
#define MESH_TUNNEL_PROOF_H

#include <mesh/siphash.h>
#include "quoted.h"

#define PROOF_FRESH 128u /* jiffies, 0.13 to 1.3 seconds: how long a flow needs no look at the clock */
#define PROOF_ERROR 1u   /* mesh_flow.pad[0] of an ICMP error: the flow is that of the packet which it quotes */

/* The node at the other end, and the option of the header. */
struct tunnel_peer {
	struct mesh_addr node;
	struct mesh_id id;
	__u32 entropy; /* of the flow: becomes the source port, by which routers balance flows */
	__u32 number;  /* mesh_node.id of who sent */
	__u32 pad;
};

INLINE struct proof *proof_of(__u32 entropy)
{
	__u32 index = (entropy >> 14) & ((1u << PROOF_MEMO_BITS) - 1);

	return bpf_map_lookup_elem(&proof_memo, &index);
}

/* Compared in the widths in which `parse` has just stored them: wider loads would wait for the stores. */
INLINE int is_proof_of(const struct proof *proof, __u64 key, const struct mesh_flow *flow, const struct mesh_id *id)
{
	const __u32 *a = (const void *)&proof->flow, *b = (const void *)flow;
	const __u32 *c = (const void *)&proof->id, *d = (const void *)id;
	__u32 differs = 0;

	for (int i = 0; i < 8; i++)
		differs |= a[i] ^ b[i];
	differs |= (__u32)(proof->flow.source_port ^ flow->source_port) |
		   (__u32)(proof->flow.destination_port ^ flow->destination_port) |
		   (__u32)(proof->flow.protocol ^ flow->protocol) | (__u32)(proof->flow.pad[0] ^ flow->pad[0]);
	return proof->key == key && !(differs | (c[0] ^ d[0]) | (c[1] ^ d[1]) | (c[2] ^ d[2]));
}

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FIRST_IS_LOW 1
#define LITTLE64(x)  (x)
#else
#define FIRST_IS_LOW 0
#define LITTLE64(x)  __builtin_bswap64(x)
#endif

/* Two words of 4 bytes, as they are in memory, as SipHash absorbs them. */
INLINE __u64 sip_pair(__u32 first, __u32 second)
{
	return LITTLE64((__u64)second << (FIRST_IS_LOW * 32) | (__u64)first << (!FIRST_IS_LOW * 32));
}

/* Compute proof->mac, by the second half of the key. */
RARE int proof_compute(struct proof *proof, __u64 second)
{
	const __u32 *id, *ends;
	__u32 v4, last, port;
	__u64 v[4];

	if (!proof)
		return 0;
	id = (const void *)&proof->id;
	ends = (const void *)&proof->flow;
	v4 = is_v4(&proof->flow.source);
	port = bpf_htonl((__u32)proof->flow.protocol << 24 | (__u32)proof->flow.pad[0] << 16 | (v4 ? 4u : 6u) << 8);
	mesh_sip_begin(v, proof->key, second);
	if (v4) {
		mesh_sip_absorb(v, sip_pair(ends[3], ends[7]));
		last = 32;
	} else {
		for (int i = 0; i < 8; i += 2)
			mesh_sip_absorb(v, sip_pair(ends[i], ends[i + 1]));
		last = 56;
	}
	mesh_sip_absorb(v, sip_pair(ends[8], port));
	mesh_sip_absorb(v, sip_pair(id[0], id[1]));
	mesh_sip_absorb(v, sip_pair(id[2], bpf_htonl(proof->epoch)));
	mesh_sip_absorb(v, (__u64)last << 56);
	proof->mac = LITTLE64(mesh_sip_end(v));
	return 0;
}

/* Make `proof` one of this flow, unless it is. */
INLINE void proof_renew(struct proof *proof, const struct mesh_sip_key *key, const struct mesh_flow *flow,
			const struct mesh_id *id, __u32 epoch)
{
	if (proof->epoch == epoch && is_proof_of(proof, key->first, flow, id))
		return;
	proof->key = key->first;
	proof->flow = *flow;
	proof->id = *id;
	proof->epoch = epoch;
	proof_compute(proof, key->second);
}

INLINE __u32 epoch_now(void)
{
	struct mesh_config *own = config();

	return own ? (__u32)((bpf_ktime_get_coarse_ns() + own->clock) >> MESH_EPOCH_SHIFT) : 0;
}

/* Give p->flow what proofs are of, where it is not yet. Returns 0. */
RARE int proof_flow(struct __sk_buff *skb, struct packet *p)
{
	struct icmp_work *w;

	if (!p)
		return -1;
	if (p->fragment == 2) {
		p->flow.source_port = 0;
		p->flow.destination_port = 0;
	}
	if (p->flow.protocol != IPPROTO_ICMP && p->flow.protocol != IPPROTO_ICMPV6)
		return 0;
	w = icmp_work();
	if (!w || load_quoted(skb, p, w))
		return -1;
	p->flow = w->quoted.flow;
	p->flow.pad[0] = PROOF_ERROR;
	return 0;
}

INLINE int is_plain(const struct packet *p)
{
	return !p->fragment && (p->flow.protocol == IPPROTO_TCP || p->flow.protocol == IPPROTO_UDP);
}

/* Whether what is sent to a node is proven: the agent says so, or that node's own proofs do. */
INLINE int is_to_prove(const struct mesh_node *path)
{
	if (likely(path->flags & MESH_NODE_PROVE))
		return 1;
	return path->heard && path->keys[0].valid && epoch_now() - path->heard < MESH_HEARD_LIFE;
}

/* Prove a packet that is about to be sent. `p`: as it is parsed now; its flow becomes what the proof is of. Returns 0.
 */
RARE int proof_make(struct __sk_buff *skb, struct packet *p, const struct tunnel_peer *to,
		    const struct mesh_node_key *key, struct mesh_proof *made)
{
	__u32 now = (__u32)bpf_jiffies64();
	struct proof *proof;

	if (!p || !to || !key || !made)
		return -1;
	proof = proof_of(to->entropy);
	if (unlikely(!proof || (!is_plain(p) && proof_flow(skb, p))))
		return -1;
	if (unlikely(now - proof->since >= PROOF_FRESH || !is_proof_of(proof, key->sent.first, &p->flow, &to->id))) {
		proof_renew(proof, &key->sent, &p->flow, &to->id, epoch_now());
		proof->since = now;
	}
	made->key = key->name;
	made->epoch = bpf_htons((__u16)proof->epoch);
	__builtin_memcpy(made->mac, &proof->mac, sizeof(made->mac));
	return 0;
}

#define PROOF_GOOD 0
#define PROOF_NONE 1 /* by a key that is not known here, too old or too new: as if there were none */
#define PROOF_BAD  2 /* forged */

INLINE const struct mesh_node_key *proof_key(const struct mesh_node *path, __be16 name)
{
	for (int i = 0; i < MESH_NODE_KEYS; i++)
		if (path->keys[i].valid && path->keys[i].name == name)
			return &path->keys[i];
	return NULL;
}

INLINE int is_mac(const struct proof *proof, const struct mesh_proof *got)
{
	const __u32 *mac = (const void *)&proof->mac;

	return !((mac[0] ^ got->mac[0]) | (mac[1] ^ got->mac[1]));
}

/* What a packet from another node proves. `flow`: what the proof is of, as proof_flow has it. */
RARE int proof_check(const struct mesh_flow *flow, const struct tunnel_peer *from, struct mesh_node *path,
		     const struct mesh_proof *got)
{
	__u32 now = (__u32)bpf_jiffies64(), epoch;
	const struct mesh_node_key *key;
	struct proof *proof;
	__s32 apart;

	if (!flow || !from || !path || !got)
		return PROOF_NONE;
	key = proof_key(path, got->key);
	proof = proof_of(from->entropy);
	if (unlikely(!key || !proof))
		return PROOF_NONE;
	if (likely(now - proof->since < PROOF_FRESH && is_proof_of(proof, key->taken.first, flow, &from->id) &&
		   bpf_htons((__u16)proof->epoch) == got->epoch))
		return is_mac(proof, got) ? PROOF_GOOD : PROOF_BAD;
	epoch = epoch_now();
	apart = (__s16)(bpf_ntohs(got->epoch) - (__u16)epoch);
	if (apart > MESH_EPOCH_WINDOW || apart < -MESH_EPOCH_WINDOW)
		return PROOF_NONE;
	proof_renew(proof, &key->taken, flow, &from->id, epoch + (__u32)apart);
	proof->since = now - PROOF_FRESH; /* not by a forged one */
	if (!is_mac(proof, got))
		return PROOF_BAD;
	proof->since = now;
	path->heard = epoch;
	return PROOF_GOOD;
}

/* Whether a packet counts as one of the node that it says it is from. */
INLINE int is_believed(struct mesh_node *path, int result)
{
	if (likely(result == PROOF_GOOD) || (result == PROOF_NONE && !(path->flags & MESH_NODE_DEMAND)))
		return 1;
	path->unproven += 1;
	return 0;
}

#endif /* MESH_TUNNEL_PROOF_H */
