/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a client to a task of another node. */
#ifndef MESH_TUNNEL_TX_H
#define MESH_TUNNEL_TX_H

#include "fragmenter.h"
#include "revnat.h"

/* A SYN that goes to another node waits for its answer, under a key that no entry has. The start counts as unanswered
 * when the same SYN comes the third time: of the first two the other node may have dropped one on purpose
 * (is_first_reset, was_seen_before). Of the entry `epoch` is the SYN's sequence number, `flags` how often it came
 * again. */
static __noinline void await_answer(struct __sk_buff *skb, struct packet *p, __u32 frontend, __u32 owner)
{
	struct mesh_revnat made = {.stamp = stamp_now()}, *before;
	struct mesh_flow key;

	if (!p || bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &made.epoch, sizeof(made.epoch)))
		return;
	key = p->flow;
	key.pad[0] = KEY_AWAITS;
	before = bpf_map_lookup_elem(&mesh_revnat_new, &key);
	if (!before || before->epoch != made.epoch || made.stamp - before->stamp >= SEEN_LIFE)
		bpf_map_update_elem(&mesh_revnat_new, &key, &made, BPF_ANY);
	else if (before->flags < 2 && ++before->flags == 2)
		count_backend_failure(frontend, owner, BACKEND_FAILURE(unanswered));
}

/* A client's packet, or an error about one of its flows, to the node of its owner. Returns an action, or a REJECT or
 * TAIL_CALL.
 */
static __noinline int tunnel_tx(struct __sk_buff *skb, struct packet *p, struct mesh_backend *backend, __u32 entropy,
				__u32 flags)
{
	struct tunnel_peer to = {.node = backend->address, .entropy = entropy};
	struct mesh_node *path = bpf_map_lookup_elem(&mesh_nodes, &backend->address);

	to.id.seed[0] = ((__be32 *)&backend->seed)[0];
	to.id.seed[1] = ((__be32 *)&backend->seed)[1];
	to.id.port = backend->port;
	to.id.protocol = backend->protocol;
	to.id.flags = (__u8)flags;
	p->mtu = (__u16)path_takes(path, is_v4(&to.node));
	if (unlikely(!p->mtu))
		return verdict(MESH_VERDICT_TUNNEL_NO_PATH, TC_ACT_UNSPEC);
	if (unlikely(p->ttl <= 1))
		return REJECT(MESH_VERDICT_EXPIRED);
	if (unlikely(exceeds_mtu(skb, p)) && is_cuttable(skb, p, p->mtu))
		return fragmenter_call(skb, p->mtu, 0, CALL_CUT);
	if (unlikely(exceeds_mtu(skb, p)))
		return REJECT(MESH_VERDICT_TUNNEL_TOO_BIG);
	if ((unlikely(p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, p->mtu)) || decrement_ttl(skb, p))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	return encap_send(skb, &to, p, path);
}

#endif /* MESH_TUNNEL_TX_H */
