/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A client's packet: from its frontend to its task. Shared by the interfaces that face clients and by those of local
 * containers, which call their own node's ports (hairpin).
 */
#ifndef MESH_FORWARD_H
#define MESH_FORWARD_H

#include "ask.h"
#include "reject.h"
#include "revnat.h"
#include "encap.h"

/* Whose packet it is. */
#define FROM_CLIENT 0
#define FROM_TASK   1 /* of the container whose interface this is */
#define FROM_BRIDGE 2 /* of some container of this node, on a bridge of its own */

/* Past netfilter into the task's network namespace, or to the bridge where its veth is not known. */
INLINE int deliver(struct __sk_buff *skb, const struct mesh_backend *backend)
{
	if (likely(backend->ifindex)) {
		if (skb->pkt_type != PACKET_HOST)
			bpf_skb_change_type(skb, PACKET_HOST);
		return (int)bpf_redirect_peer(backend->ifindex, 0);
	}
	return (int)bpf_redirect_neigh(backend->bridge, NULL, 0, 0);
}

/* Towards the client: into its network namespace where it is a container of this node. */
INLINE int hand_back(struct __sk_buff *skb, __u32 ifindex, __u32 peer)
{
	if (likely(!peer))
		return (int)bpf_redirect_neigh(ifindex, NULL, 0, 0);
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return (int)bpf_redirect_peer(ifindex, 0);
}

/* Send the packet back as a refusal; what cannot be answered is dropped. */
INLINE int refuse(struct __sk_buff *skb, struct packet *p, int refusal)
{
	__u32 name = (__u32)(-2 - refusal);
	int failed = answer_client(skb, p, answer_to(name));

	if (failed > 0)
		return verdict(MESH_VERDICT_LIMITED, TC_ACT_SHOT);
	if (failed)
		return verdict(name == MESH_VERDICT_REFUSED ? MESH_VERDICT_NO_BACKEND : name, TC_ACT_SHOT);
	count_verdict(name);
	return (int)bpf_redirect(skb->ifindex, 0);
}

/* Ports of a further fragment from its first one. Returns 0 when they are known. */
INLINE int fragment_ports(struct packet *p)
{
	struct mesh_fragment_key key = {
		.source = p->flow.source,
		.destination = p->flow.destination,
		.id = p->fragment_id,
		.protocol = p->flow.protocol,
	};
	__be16 ports[2], *known;

	if (p->fragment == 1) {
		ports[0] = p->flow.source_port;
		ports[1] = p->flow.destination_port;
		bpf_map_update_elem(&mesh_fragments, &key, ports, BPF_ANY);
		return 0;
	}
	known = bpf_map_lookup_elem(&mesh_fragments, &key);
	if (!known)
		return -1;
	p->flow.source_port = known[0];
	p->flow.destination_port = known[1];
	return 0;
}

/* Write down what `choose` decided in transition, or that the flow was seen (one write in a stamp's unit). */
INLINE void note_choice(const struct mesh_flow *flow, const struct choice *c)
{
	__u32 now = stamp_now();

	if (c->note) {
		struct mesh_note note = {
			.owner = c->owner,
			.epoch = c->backend ? c->backend->epoch : 0,
			.stamp = now,
			.frontend = c->frontend | c->asked,
		};

		if (c->note == NOTE_FIRST) {
			bpf_map_update_elem(&mesh_starts, flow, &note, BPF_ANY);
			return;
		}
		bpf_map_update_elem(&mesh_flows, flow, &note, BPF_ANY);
		if (c->note == NOTE_AGAIN)
			bpf_map_delete_elem(&mesh_starts, flow);
	} else if (c->noted && c->noted->stamp != now) {
		c->noted->stamp = now;
	}
}

/* The tuple by which the task sees the flow. */
INLINE __u16 task_tuple(struct tuple *to, const struct packet *p, const struct mesh_backend *backend, int from)
{
	struct mesh_config *node;

	to->source = p->flow.source;
	to->source_port = p->flow.source_port;
	to->destination = backend->address;
	to->destination_port = backend->port;
	to->pad = 0;
	if (from != FROM_TASK)
		return 0;
	node = config();
	if (!node || !same_address(&to->source, &to->destination))
		return MESH_REPLY_PEER;
	to->source = p->version == 4 ? node->hairpin : node->hairpin6;
	return MESH_REPLY_PEER | MESH_REPLY_HAIRPIN;
}

/* A packet whose owner is a task of another node. Containers' own addresses mean nothing there: they are this node's,
 * or another container's as well. */
INLINE int forward_away(struct __sk_buff *skb, struct packet *p, const struct choice *c, int from)
{
	if (c->backend->version != p->version)
		return verdict(MESH_VERDICT_FAMILY, TC_ACT_UNSPEC);
	if (from != FROM_CLIENT)
		return verdict(MESH_VERDICT_TUNNEL_NONE, TC_ACT_UNSPEC);
	if (c->note || c->noted)
		note_choice(&p->flow, c);
	return leave_for(skb, c->owner, c->frontend, (__u32)c->wide, c->asked ? MESH_TUNNEL_ASK : 0);
}

/* A packet whose owner is at an address of this node. */
INLINE int pass_own(const struct packet *p, const struct choice *c)
{
	if (c->note || c->noted)
		note_choice(&p->flow, c);
	return verdict(MESH_VERDICT_OWN, TC_ACT_UNSPEC);
}

/* A packet whose owner is a task. */
INLINE int forward(struct __sk_buff *skb, struct packet *p, struct choice *c, int from)
{
	struct tuple to;
	__u16 flags;

	if (unlikely(is_away(c->backend)))
		return forward_away(skb, p, c, from);
	if (unlikely(is_v4(&c->backend->address) != (p->version == 4)))
		return verdict(MESH_VERDICT_FAMILY, TC_ACT_UNSPEC);
	if (unlikely(is_own(c->backend)))
		return pass_own(p, c);
	if (unlikely(p->ttl <= 1))
		return REFUSAL(MESH_VERDICT_EXPIRED);
	flags = task_tuple(&to, p, c->backend, from);
	if (!c->recent && unlikely(keep_reply(p, c, &to, skb->ifindex, flags)))
		return REFUSAL(MESH_VERDICT_COLLISION);
	if (unlikely(c->note || c->noted))
		note_choice(&p->flow, c);
	if (unlikely(rewrite(skb, p, &to)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_in(c->frontend, c->owner, p->length);
	count_verdict(c->verdict);
	return deliver(skb, c->backend);
}

/* A TCP or UDP packet with known ports. Returns an action, or a REFUSAL or GO that the caller has to carry out. */
INLINE int serve_flow(struct __sk_buff *skb, struct packet *p, int from)
{
	struct choice c;
	__u32 word;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	if (likely(!word))
		return TC_ACT_UNSPEC;
	if (from != FROM_TASK && skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	if (unlikely(word & MESH_PORT_TUNNEL))
		return from != FROM_CLIENT ? TC_ACT_UNSPEC : GO(GO_ARRIVE);
	__builtin_memset(&c, 0, sizeof(c));
	c.frontend = word & MESH_PORT_EXACT ? find_frontend(&p->flow, word) : word;
	if (!c.frontend)
		return TC_ACT_UNSPEC;
	c.start = p->flow.protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	choose(&p->flow, &c);
	c.recent = c.backend && is_recent(p, &c);
	/* A recent flow's address need not be looked up: it was, or belongs to the frontend alone. */
	if (!c.recent && !(word & MESH_PORT_EXACT) && !is_local(&p->flow.destination))
		return TC_ACT_UNSPEC;
	if (unlikely(p->fragment == 1))
		fragment_ports(p);
	if (from == FROM_CLIENT && unlikely(c.other))
		ask(p, &c);
	if (likely(c.backend))
		return forward(skb, p, &c, from);
	if (c.note || c.noted)
		note_choice(&p->flow, &c);
	if (c.verdict == MESH_VERDICT_REFUSED)
		return REFUSAL(MESH_VERDICT_REFUSED);
	return verdict(c.verdict, c.verdict == MESH_VERDICT_DENIED ? TC_ACT_SHOT : TC_ACT_UNSPEC);
}

/* Packets without ports: passed, but counted where they are for us. */
INLINE int serve_rest(const struct packet *p, enum parse_result result)
{
	__u32 word;

	if (result == PARSE_MALFORMED) {
		word = port_word(p->flow.protocol, p->flow.destination_port);
		return word && find_frontend(&p->flow, word) ? verdict(MESH_VERDICT_MALFORMED, TC_ACT_UNSPEC)
							     : TC_ACT_UNSPEC;
	}
	if ((result != PARSE_FRAGMENT && result != PARSE_EXTENSION) || !is_local(&p->flow.destination))
		return TC_ACT_UNSPEC;
	return verdict(result == PARSE_FRAGMENT ? MESH_VERDICT_FRAGMENT : MESH_VERDICT_EXTENSION, TC_ACT_UNSPEC);
}

#endif /* MESH_FORWARD_H */
