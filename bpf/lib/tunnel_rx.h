/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From another node, through the tunnel: clients' packets for tasks of this node, and replies for clients that called
 * this one: the program mesh_tunnel, behind mesh_ingress. Whoever is no node of the cluster is not listened to.
 * Refusals go back the way the packet came.
 */
#ifndef MESH_TUNNEL_RX_H
#define MESH_TUNNEL_RX_H

#include "second_chance.h"
#include "icmp.h"

#define AGAIN 64u /* stamps within which a start that was dropped for an unknown task counts as having come before */

INLINE int is_one_flag(__u8 flags)
{
	return flags <= MESH_TUNNEL_BACK && !(flags & (flags - 1));
}

/* Whether the headers are what `tunnel_send` writes. */
INLINE int is_ours(const struct tunnel_head *head, const struct packet *p)
{
	const struct mesh_geneve *geneve = &head->geneve;

	return geneve->words == MESH_GENEVE_WORDS && geneve->flags == MESH_GENEVE_CRITICAL && !geneve->vni &&
	       (geneve->inner == bpf_htons(ETH_P_IP) || geneve->inner == bpf_htons(ETH_P_IPV6)) &&
	       geneve->option_class == bpf_htons(MESH_GENEVE_CLASS) && geneve->option_type == MESH_GENEVE_TYPE &&
	       geneve->option_words == MESH_GENEVE_OPTION && is_one_flag(geneve->id.flags) && !p->fragment &&
	       p->l4 == L3 + header_length(p) && p->length >= p->l4 - L3 + TUNNEL_HEADERS;
}

/* The task of this node that an id names. */
INLINE struct mesh_backend *find_id(struct mesh_id *id, __u32 *owner)
{
	struct mesh_backend *backend;
	__u32 *found;

	found = bpf_map_lookup_elem(&mesh_ids, id);
	if (!found)
		return NULL;
	*owner = *found;
	backend = find_backend(*owner);
	if (!backend || backend->state == MESH_BACKEND_FREE || is_away(backend) || is_own(backend))
		return NULL;
	return backend;
}

/* Have the flow's next packet looked at, whichever way it comes: replies take that way back. */
INLINE void forget_recent(const struct choice *c)
{
	struct recent *recent = recent_of(c);

	if (recent)
		recent->words[0] = recent->words[1] = 0;
}

/* A client's packet that another node has given to a backend of this one. Returns an action or a REFUSAL. */
static __noinline int arrive(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from)
{
	struct mesh_node *node = bpf_map_lookup_elem(&mesh_nodes, &from->node);
	__u8 flags = from->id.flags;
	struct choice c = {};
	struct tuple to;
	__u32 word;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	if (!node || p->flow.protocol != from->id.protocol || (word & MESH_PORT_TUNNEL))
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	from->id.flags = 0;
	c.backend = find_id(&from->id, &c.owner);
	if ((flags & MESH_TUNNEL_ASK) && (!c.backend || !is_known_of(&p->flow, c.owner)))
		return REFUSAL(MESH_VERDICT_TUNNEL_BACK);
	if (!c.backend || is_v4(&c.backend->address) != (p->version == 4))
		return REFUSAL(MESH_VERDICT_TUNNEL_UNKNOWN);
	if (p->ttl <= 1)
		return REFUSAL(MESH_VERDICT_EXPIRED);
	c.wide = mesh_hash_flow_wide(&p->flow);
	c.start = p->flow.protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	c.frontend = frontend_at(&p->flow, word);
	task_tuple(&to, p, c.backend, 0);
	if (keep_reply(p, &c, &to, MESH_REPLY_NODE | node->id, 0))
		return REFUSAL(MESH_VERDICT_COLLISION);
	forget_recent(&c);
	if ((c.start && clamp_mss(skb, p, tunnel_mtu(&from->node))) || rewrite(skb, p, &to))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_in(c.frontend, c.owner, p->length);
	count_verdict(MESH_VERDICT_TUNNEL_IN);
	return deliver(skb, c.backend);
}

/* An ICMP error from the client's side about what a backend of this node sent. */
static __noinline int arrive_icmp(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from)
{
	struct icmp_work *w = icmp_work();
	struct mesh_backend *backend;
	struct mesh_reply *reply;
	__u32 owner = 0;

	if (!w || p->ttl <= 1 || load_quoted(skb, p, w))
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	backend = find_id(&from->id, &owner);
	if (!backend || is_v4(&backend->address) != (p->version == 4))
		return verdict(MESH_VERDICT_TUNNEL_UNKNOWN, TC_ACT_SHOT);
	reply = find_called(w, backend);
	if (!reply)
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	if (translate_error(skb, p, w))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_TUNNEL_ICMP);
	return deliver(skb, backend);
}

/* Whether a flow's packets go to an owner on that node: nobody else answers them. Its called address may have moved
 * away from this node since. */
static __noinline int is_answered_by(struct mesh_flow *flow, struct mesh_addr *node)
{
	struct choice c = {.trusted = 1};
	__u32 word;

	word = port_word(flow->protocol, flow->destination_port);
	if (!word || (word & MESH_PORT_TUNNEL))
		return 0;
	c.frontend = frontend_at(flow, word);
	if (!c.frontend)
		return 0;
	choose(flow, &c);
	if (!c.backend || !is_away(c.backend) || !same_address(&c.backend->address, node))
		return 0;
	if (unlikely(c.asked)) {
		c.asked = 0;
		if (c.noted)
			c.noted->frontend = c.frontend;
		note_choice(flow, &c);
	}
	return 1;
}

/* The flow, as its client sent it, to which a reply (or an error about such a packet) belongs. Returns 0. */
INLINE int answered_flow(struct __sk_buff *skb, const struct packet *p, int result, struct mesh_flow *flow)
{
	struct icmp_work *w;

	if (result == PARSE_FLOW) {
		flow->source = p->flow.destination;
		flow->destination = p->flow.source;
		flow->source_port = p->flow.destination_port;
		flow->destination_port = p->flow.source_port;
		flow->protocol = p->flow.protocol;
		return 0;
	}
	w = icmp_work();
	if (result != PARSE_ICMP || !w || load_quoted(skb, p, w))
		return -1;
	*flow = w->quoted.flow;
	return !same_address(&flow->source, &p->flow.destination) || !same_address(&flow->destination, &p->flow.source);
}

/* A reply to a client that called this node: as from the address that it called. */
static __noinline int arrive_reply(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from, int result)
{
	struct mesh_flow flow = {};
	__u32 ifindex;

	if (answered_flow(skb, p, result, &flow) || !is_answered_by(&flow, &from->node) ||
	    is_local(&p->flow.destination))
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	if (p->ttl <= 1)
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	ifindex = way_out(skb, &p->flow.source, &p->flow.destination);
	if (!ifindex)
		return verdict(MESH_VERDICT_TOO_BIG, TC_ACT_SHOT);
	if (((p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, tunnel_mtu(&from->node))) || hop(skb, p))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_TUNNEL_REPLY);
	return send_packet(skb, p, &p->flow.source, &p->flow.destination, ifindex);
}

/* Whether this packet for an unknown task comes again; if not, it is noted as seen, under a key that no entry has. */
static __noinline int is_again(struct packet *p)
{
	struct mesh_reply seen = {.stamp = stamp_now()}, *before;
	struct mesh_flow key = p->flow;

	key.pad[0] = 1;
	before = bpf_map_lookup_elem(&mesh_openings, &key);
	if (before && seen.stamp - before->stamp < AGAIN)
		return 1;
	bpf_map_update_elem(&mesh_openings, &key, &seen, BPF_ANY);
	return 0;
}

/* Refuse what came through the tunnel, back to the node that it came from. What starts a flow, and any datagram, may
 * only have come before the agent here knew its task: it is dropped the first time, and refused when it comes again. */
static __noinline int refuse_back(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from, int refusal)
{
	__u32 name = (__u32)(-2 - refusal);
	int failed;

	if (name == MESH_VERDICT_TUNNEL_BACK)
		return send_back(skb, p, from);
	if (name == MESH_VERDICT_TUNNEL_UNKNOWN && (p->flow.protocol != IPPROTO_TCP || (p->tcp_flags & TCP_SYN)) &&
	    !is_again(p))
		return verdict(name, TC_ACT_SHOT);
	failed = answer_client(skb, p, answer_to(name));
	count_verdict(failed > 0 ? MESH_VERDICT_LIMITED : name);
	if (failed)
		return TC_ACT_SHOT;
	__builtin_memset(&from->id, 0, sizeof(from->id));
	from->id.flags = MESH_TUNNEL_REPLY;
	return tunnel_send(skb, from, p->version);
}

/* Take the tunnel's headers off a packet whose outer ones are parsed; `p` and `from` become the inner one's. Segments
 * are cut by lengths inside; those of datagrams that an interface has merged (rx-udp-gro-forwarding) are not. */
static __noinline int unwrap(struct __sk_buff *skb, struct packet *p, struct tunnel_to *from)
{
	struct tunnel_head head;
	int result;

	from->node = p->flow.source;
	if (bpf_skb_load_bytes(skb, p->l4, &head, sizeof(head)) || !is_ours(&head, p))
		return PARSE_MALFORMED;
	from->id = head.geneve.id;
	if (take_room(skb, p->version == 4, head.geneve.inner == bpf_htons(ETH_P_IP)))
		return PARSE_MALFORMED;
	result = parse(skb, p);
	if (skb->gso_size && p->length != skb->len - L3)
		return PARSE_MALFORMED;
	if ((result == PARSE_FRAGMENT || (result == PARSE_FLOW && p->fragment)) && !fragment_ports(p))
		result = PARSE_FLOW;
	from->entropy = (__u32)mesh_hash_flow_wide(&p->flow);
	return result;
}

/* An ICMP error about a packet that this node sent through the tunnel: too big for the way. What is larger from now on
 * is answered by this node. All else about such packets is the kernel's. */
static __noinline int note_path(struct __sk_buff *skb, struct packet *p)
{
	struct icmp_work *w = icmp_work();
	struct mesh_node *way;
	struct icmp icmp;
	__u32 mtu;

	if (!w || load_quoted(skb, p, w) || bpf_skb_load_bytes(skb, p->l4, &icmp, sizeof(icmp)))
		return TC_ACT_UNSPEC;
	way = bpf_map_lookup_elem(&mesh_nodes, &w->quoted.flow.destination);
	if (!way || !is_local(&w->quoted.flow.source) || !same_address(&way->source, &w->quoted.flow.source) ||
	    bpf_ntohs(w->quoted.flow.source_port) < MESH_TUNNEL_SOURCE)
		return TC_ACT_UNSPEC;
	mtu = bpf_ntohl(icmp.rest);
	if (p->version == 4 ? icmp.type != ICMP4_UNREACHABLE || icmp.code != ICMP4_TOO_BIG : icmp.type != ICMP6_TOO_BIG)
		return TC_ACT_UNSPEC;
	if (p->version == 4)
		mtu &= 0xffff;
	if (mtu >= way->mtu || mtu < (p->version == 4 ? PATH_LEAST_V4 : PATH_LEAST_V6))
		return TC_ACT_UNSPEC;
	way->path_stamp = stamp_now();
	way->path_mtu = mtu;
	return verdict(MESH_VERDICT_TUNNEL_PATH, TC_ACT_UNSPEC);
}

/* A datagram for the tunnel's port, or an error about one from it: mesh_ingress has looked at the port. */
SEC("tc")
int mesh_tunnel(struct __sk_buff *skb)
{
	struct tunnel_to from = {};
	struct packet p;
	int result, action;

	result = parse(skb, &p);
	if ((result != PARSE_FLOW && result != PARSE_ICMP) || !is_local(&p.flow.destination))
		return TC_ACT_UNSPEC;
	if (result == PARSE_ICMP)
		return note_path(skb, &p);
	if (!bpf_map_lookup_elem(&mesh_nodes, &p.flow.source))
		return verdict(MESH_VERDICT_TUNNEL_FOREIGN, TC_ACT_SHOT);
	result = unwrap(skb, &p, &from);
	if (from.id.flags & MESH_TUNNEL_REPLY)
		return arrive_reply(skb, &p, &from, result);
	if (result == PARSE_ICMP && !from.id.flags)
		return arrive_icmp(skb, &p, &from);
	if (result != PARSE_FLOW)
		return verdict(MESH_VERDICT_TUNNEL_BAD, TC_ACT_SHOT);
	if (from.id.flags & MESH_TUNNEL_BACK)
		return arrive_back(skb, &p, &from);
	action = arrive(skb, &p, &from);
	return IS_REFUSAL(action) ? refuse_back(skb, &p, &from, action) : action;
}

#endif /* MESH_TUNNEL_RX_H */
