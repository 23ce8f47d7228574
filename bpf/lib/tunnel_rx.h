/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From another node, through the tunnel: clients' packets for tasks of this node, and replies for clients that called
 * this node. Rejections go back through the tunnel. */
#ifndef MESH_TUNNEL_RX_H
#define MESH_TUNNEL_RX_H

#include "icmp.h"

INLINE int is_one_flag(__u8 flags)
{
	return flags <= MESH_TUNNEL_BACK && !(flags & (flags - 1));
}

INLINE int is_geneve(const struct mesh_geneve *geneve)
{
	__u32 more = geneve->option_words - MESH_GENEVE_OPTION;

	return (!more || more == MESH_PROOF_WORDS) && geneve->words == MESH_GENEVE_WORDS + more &&
	       geneve->flags == MESH_GENEVE_CRITICAL && !geneve->vni &&
	       (geneve->inner == bpf_htons(ETH_P_IP) || geneve->inner == bpf_htons(ETH_P_IPV6)) &&
	       geneve->option_class == bpf_htons(MESH_GENEVE_CLASS) && geneve->option_type == MESH_GENEVE_TYPE &&
	       is_one_flag(geneve->id.flags);
}

INLINE int is_with_proof(const struct mesh_geneve *geneve)
{
	return geneve->option_words != MESH_GENEVE_OPTION;
}

/* Whether the headers are what encap_send writes. */
INLINE int is_tunnel_header(const struct tunnel_header *head, const struct packet *p)
{
	return is_geneve(&head->geneve) && !p->fragment && p->l4 == L3 + header_length(p) &&
	       p->length >= p->l4 - L3 + TUNNEL_HEADERS + (is_with_proof(&head->geneve) ? PROOF_SIZE : 0);
}

/* The task of this node that an id names. */
INLINE struct mesh_backend *find_backend_by_id(struct mesh_id *id, __u32 *owner)
{
	struct mesh_backend *backend;
	__u32 *found;

	found = bpf_map_lookup_elem(&mesh_ids, id);
	if (!found)
		return NULL;
	*owner = *found;
	backend = find_backend(*owner);
	if (!backend || backend->state == MESH_BACKEND_FREE || is_remote(backend) || is_host_backend(backend))
		return NULL;
	return backend;
}

static __noinline int is_denied_by(__u32 id, const struct mesh_addr *client)
{
	struct mesh_frontend *frontend = bpf_map_lookup_elem(&mesh_frontends, &id);

	return frontend && client && is_denied(frontend, client);
}

/* Whether the source rules of a backend's service deny a client, whatever the node that was called has let through. */
INLINE int is_denied_here(const struct mesh_backend *backend, const struct mesh_addr *client)
{
	__u32 id = backend->frontend;
	struct mesh_frontend *frontend = bpf_map_lookup_elem(&mesh_frontends, &id);

	if (likely(!frontend || (!frontend->acl && !(frontend->flags & MESH_FRONTEND_DENY))))
		return 0;
	return is_denied_by(id, client);
}

/* A client's packet that another node has given to a backend of this one. Returns an action or a REJECT. */
static __noinline int tunnel_rx_flow(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from)
{
	__u8 flags = from->id.flags;
	struct snat_keys *keys = snat_keys();
	struct lb_choice c = {};
	struct tuple to;
	__u32 word;
	int taken;

	word = port_word(p->flow.protocol, p->flow.destination_port);
	if (!keys || p->flow.protocol != from->id.protocol || (word & MESH_PORT_TUNNEL))
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	from->id.flags = 0;
	c.backend = find_backend_by_id(&from->id, &c.owner);
	if ((flags & MESH_TUNNEL_ASK) && (!c.backend || !revnat_knows(&p->flow, c.owner)))
		return REJECT(MESH_VERDICT_TUNNEL_BACK);
	if (!c.backend || is_v4(&c.backend->address) != (p->version == 4))
		return REJECT(MESH_VERDICT_TUNNEL_NO_BACKEND);
	if (p->ttl <= 1)
		return REJECT(MESH_VERDICT_EXPIRED);
	c.wide = mesh_hash_flow_wide(&p->flow);
	c.start = p->flow.protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	c.frontend = frontend_at(&p->flow, word);
	if (unlikely(is_denied_here(c.backend, &p->flow.source))) {
		count_failed_start(p, c.backend->frontend, FAILURE(denied));
		return verdict(MESH_VERDICT_DENIED, TC_ACT_SHOT);
	}
	c.verdict = MESH_VERDICT_TUNNEL_RX;
	task_tuple(&to, p, c.backend, 0);
	taken = revnat_update(skb, p, &c, &to, MESH_REVNAT_NODE | from->number, &keys->place);
	if (taken)
		return collide(p, c.frontend, taken);
	recent_forget(&c);
	if ((c.start && clamp_mss(skb, p, tunnel_mtu(&from->node))) || rewrite(skb, p, &to))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_in(c.frontend, c.owner, p->length);
	count_verdict(c.verdict);
	return deliver(skb, c.backend);
}

/* An ICMP error from the client's side about what a backend of this node sent. */
static __noinline int tunnel_rx_icmp(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from)
{
	struct icmp_work *w = icmp_work();
	struct mesh_backend *backend;
	struct mesh_revnat *reply;
	__u32 owner = 0;

	if (!w || p->ttl <= 1 || load_quoted(skb, p, w))
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	backend = find_backend_by_id(&from->id, &owner);
	if (!backend || is_v4(&backend->address) != (p->version == 4))
		return verdict(MESH_VERDICT_TUNNEL_NO_BACKEND, TC_ACT_SHOT);
	reply = revnat_of_backend(w, backend, owner);
	if (!reply)
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	if (translate_to_task(skb, p, w, reply))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_TUNNEL_ICMP);
	return deliver(skb, backend);
}

/* Whether a flow's packets go to an owner on that node: no other node answers them. The called address may have left
 * this node since. `goes_on`: the reply proves that the flow exists. */
static __noinline int is_reply_from(struct mesh_flow *flow, struct mesh_addr *node, int goes_on)
{
	struct lb_choice c = {.trusted = 1};
	__u32 word;

	word = port_word(flow->protocol, flow->destination_port);
	if (!word || (word & MESH_PORT_TUNNEL))
		return 0;
	c.frontend = frontend_at(flow, word);
	if (!c.frontend)
		return 0;
	lb_choose(flow, &c);
	if (!c.backend || !is_remote(c.backend) || !same_address(&c.backend->address, node))
		return 0;
	if (unlikely(c.asked || (goes_on && c.note == NOTE_PROMOTE))) {
		c.asked = 0;
		c.recent = goes_on != 0;
		if (c.noted)
			c.noted->frontend = c.frontend;
		flow_cache_update(flow, &c);
	}
	return 1;
}

/* The flow, as its client sent it, to which a reply (or an error about such a packet) belongs. Returns 0. */
INLINE int flow_of_reply(struct __sk_buff *skb, const struct packet *p, int result, struct mesh_flow *flow)
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

/* The answer to a trial of the tunnel (mesh/datapath/paths/tunnel_probe.py): no flow has these addresses. */
INLINE int is_trial_answer(const struct packet *p)
{
	return p->version == 4 && p->flow.protocol == IPPROTO_TCP && !p->fragment && !p->flow.source_port &&
	       p->flow.source.words[3] == bpf_htonl(MESH_TRIAL_ADDRESS) &&
	       same_address(&p->flow.source, &p->flow.destination);
}

/* Leave it to the agent's packet socket, which is asked after these programs, and to nobody else: IP drops what is
 * for another host. */
INLINE int leave_to_agent(struct __sk_buff *skb)
{
	if (bpf_skb_change_type(skb, PACKET_OTHERHOST))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	return verdict(MESH_VERDICT_TUNNEL_TRIAL, TC_ACT_OK);
}

/* A reply to a client that called this node, with the called address as its source. */
static __noinline int tunnel_rx_reply(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from, int result)
{
	struct mesh_flow flow = {};
	int goes_on = result == PARSE_FLOW && !p->fragment && !(p->tcp_flags & (TCP_SYN | TCP_RST));
	__u32 ifindex;

	if (unlikely(is_trial_answer(p)))
		return leave_to_agent(skb);
	if (flow_of_reply(skb, p, result, &flow) || !is_reply_from(&flow, &from->node, goes_on) ||
	    is_local(&p->flow.destination))
		return verdict(MESH_VERDICT_TUNNEL_INVALID, TC_ACT_SHOT);
	if (p->ttl <= 1)
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	if (result == PARSE_FLOW && (p->tcp_flags & (TCP_SYN | TCP_RST)))
		answer_came(&flow);
	ifindex = fib_output(skb, &p->flow.source, &p->flow.destination);
	if (!ifindex)
		return verdict(MESH_VERDICT_TOO_BIG, TC_ACT_SHOT);
	if (((p->tcp_flags & TCP_SYN) && clamp_mss(skb, p, tunnel_mtu(&from->node))) || decrement_ttl(skb, p))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_TUNNEL_REPLY_RX);
	return fib_send(skb, p, &p->flow.source, &p->flow.destination, ifindex);
}

/* Whether a packet for an unknown task was seen before. If not, store that it is seen now, under a key that no entry
 * has. */
static __noinline int was_seen_before(struct packet *p)
{
	struct mesh_revnat seen = {.stamp = stamp_now()}, *before;
	struct mesh_flow key = p->flow;

	key.pad[0] = KEY_SEEN;
	before = bpf_map_lookup_elem(&mesh_revnat_new, &key);
	if (before && seen.stamp - before->stamp < SEEN_LIFE)
		return 1;
	bpf_map_update_elem(&mesh_revnat_new, &key, &seen, BPF_ANY);
	return 0;
}

/* A trial of the tunnel (mesh/datapath/paths/tunnel_probe.py) that gets no answer, so that flows go elsewhere. */
INLINE int is_unwanted_trial(const struct packet *p)
{
	struct mesh_config *own = config();

	return !p->flow.destination_port && own && (own->settings & MESH_SETTING_LEAVING);
}

/* Reject a packet that came through the tunnel, back to the node that sent it. A packet that starts a flow, and any
 * datagram, may have overtaken the agent that is about to publish its task: it is dropped the first time, and rejected
 * when it comes again. */
static __noinline int reject_through_tunnel(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from,
					    int rejection)
{
	__u32 name = (__u32)(-2 - rejection);
	int failed;

	if (name == MESH_VERDICT_TUNNEL_BACK)
		return second_chance_return(skb, p, from);
	if (name == MESH_VERDICT_TUNNEL_NO_BACKEND &&
	    (is_unwanted_trial(p) ||
	     ((p->flow.protocol != IPPROTO_TCP || (p->tcp_flags & TCP_SYN)) && !was_seen_before(p))))
		return verdict(name, TC_ACT_SHOT);
	if (name == MESH_VERDICT_TUNNEL_NO_BACKEND)
		count_failed_start(p, frontend_at(&p->flow, port_word(p->flow.protocol, p->flow.destination_port)),
				   FAILURE(no_backend));
	failed = make_rejection(skb, p, rejection_for(name));
	count_verdict(failed > 0 ? MESH_VERDICT_RATE_LIMITED : name);
	if (failed)
		return TC_ACT_SHOT;
	__builtin_memset(&from->id, 0, sizeof(from->id));
	from->id.flags = MESH_TUNNEL_REPLY;
	return parse(skb, p) == PARSE_OTHER ? verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT) : encap_send(skb, from, p, NULL);
}

#define DECAP_UNPROVEN (-1)
#define DECAP_FRAGMENT (-2) /* nothing was done: see mesh_tunnel_early */
#define DECAP_ANY      1u   /* skb->cb[0]: fragments, too */

/* The headers of the tunnel, and the inner packet's first words. */
struct tunnel_start {
	struct tunnel_header head;
	__be16 inner[4]; /* behind a proof */
};

INLINE int is_fragment_inside(const struct tunnel_start *start, int proven)
{
	const __be16 *inner = proven ? start->inner : (const __be16 *)&start->head.proof;

	if (start->head.geneve.inner == bpf_htons(ETH_P_IP))
		return inner[3] & bpf_htons(IP_MORE | IP_OFFSET);
	return *(const __u8 *)(inner + 3) == IPPROTO_FRAGMENT;
}

/* Parse the inner packet, of one whose outer headers are parsed. */
INLINE enum parse_result parse_inside(struct __sk_buff *skb, struct packet *p)
{
	struct mesh_geneve geneve;
	void *data, *end;
	__u32 at;

	if (bpf_skb_load_bytes(skb, p->l4 + (__u32)sizeof(struct udphdr), &geneve, sizeof(geneve)))
		return PARSE_OTHER;
	at = encap_overhead(p->version == 4, is_with_proof(&geneve));
	if (skb->len < L3 + at || bpf_skb_pull_data(skb, skb->len < 2 * HEADERS ? skb->len : 2 * HEADERS))
		return PARSE_OTHER;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	__builtin_memset(p, 0, sizeof(*p));
	if (geneve.inner == bpf_htons(ETH_P_IP))
		return parse_v4(p, data + at, end, skb->len - L3 - at);
	return parse_v6(p, data + at, end, skb->len - L3 - at);
}

/* Whether a packet comes from the node that it says, as far as that node gives a proof. */
INLINE int is_from_node(struct __sk_buff *skb, const struct packet *p, const struct tunnel_peer *from,
			struct mesh_node *path, const struct mesh_proof *got)
{
	const struct mesh_flow *flow = &p->flow;
	struct icmp_work *w;

	if (!got)
		return is_believed(path, PROOF_NONE);
	if (unlikely(flow->protocol != IPPROTO_TCP && flow->protocol != IPPROTO_UDP)) {
		w = icmp_work();
		if (!w || load_quoted(skb, p, w))
			return is_believed(path, PROOF_NONE);
		w->quoted.flow.pad[0] = PROOF_ERROR;
		flow = &w->quoted.flow;
	}
	return is_believed(path, proof_check(flow, from, path, got));
}

/* Remove the headers of the tunnel from a packet whose outer headers are parsed; `p` and `from` then describe the
 * inner packet. TCP segments are cut by the inner lengths; datagrams that an interface has merged
 * (rx-udp-gro-forwarding) are not. */
static __noinline int decap(struct __sk_buff *skb, struct packet *p, struct tunnel_peer *from, struct mesh_node *path)
{
	struct tunnel_start start;
	int result, proven;

	from->node = p->flow.source;
	/* The last of these bytes are of the inner packet, which is longer. */
	if (bpf_skb_load_bytes(skb, p->l4, &start, sizeof(start)) || !is_tunnel_header(&start.head, p))
		return PARSE_MALFORMED;
	from->id = start.head.geneve.id;
	proven = is_with_proof(&start.head.geneve);
	if (unlikely(is_fragment_inside(&start, proven)) && skb->cb[0] != DECAP_ANY)
		return DECAP_FRAGMENT;
	if (decap_room(skb, (__s32)encap_overhead(p->version == 4, proven), p->version == 4,
		       start.head.geneve.inner == bpf_htons(ETH_P_IP)))
		return PARSE_MALFORMED;
	result = parse(skb, p);
	if (skb->gso_size && p->length != skb->len - L3)
		return PARSE_MALFORMED;
	from->entropy = (__u32)mesh_hash_flow_wide(&p->flow);
	if (!is_from_node(skb, p, from, path, proven ? &start.head.proof : NULL))
		return DECAP_UNPROVEN;
	if (result == PARSE_FRAGMENT) {
		if (p->fragment == 1)
			fragment_store(p);
		if (p->fragment == 1 || !fragment_ports(p, 0))
			result = PARSE_FLOW;
		from->entropy = (__u32)mesh_hash_flow_wide(&p->flow);
	}
	return result;
}

/* Whether an ICMP error quotes the tunnel's headers as this node writes them, as far as it quotes them: RFC 792 asks
 * for no more than the ports. */
INLINE int quotes_tunnel(struct __sk_buff *skb, const struct packet *p, const struct icmp_work *w)
{
	struct mesh_geneve geneve;
	__u32 at = w->quoted.l4 + (__u32)sizeof(struct udphdr);

	if (bpf_ntohs(w->quoted.flow.source_port) < MESH_TUNNEL_SOURCE)
		return 0;
	if (at + sizeof(geneve) > L3 + p->length || bpf_skb_load_bytes(skb, at, &geneve, sizeof(geneve)))
		return 1;
	return is_geneve(&geneve);
}

/* An ICMP error about a packet that this node sent through the tunnel: it is too big for the path. Anybody can send
 * one, so it is a hint: the agent finds out what the path takes. All else about such packets is left to the kernel. */
static __noinline int learn_path_mtu(struct __sk_buff *skb, struct packet *p)
{
	struct icmp_work *w = icmp_work();
	struct mesh_node *path;
	struct icmp icmp;
	__u32 mtu;

	if (!w || load_quoted(skb, p, w) || bpf_skb_load_bytes(skb, p->l4, &icmp, sizeof(icmp)))
		return TC_ACT_UNSPEC;
	path = bpf_map_lookup_elem(&mesh_nodes, &w->quoted.flow.destination);
	if (!path || !is_local(&w->quoted.flow.source) || !same_address(&path->source, &w->quoted.flow.source) ||
	    !quotes_tunnel(skb, p, w))
		return TC_ACT_UNSPEC;
	mtu = bpf_ntohl(icmp.rest);
	if (p->version == 4 ? icmp.type != ICMP4_UNREACHABLE || icmp.code != ICMP4_TOO_BIG : icmp.type != ICMP6_TOO_BIG)
		return TC_ACT_UNSPEC;
	if (p->version == 4)
		mtu &= 0xffff;
	if (mtu >= path->mtu || mtu < PATH_LEAST)
		return TC_ACT_UNSPEC;
	path->hint = mtu;
	return verdict(MESH_VERDICT_TUNNEL_PMTU, TC_ACT_UNSPEC);
}

#endif /* MESH_TUNNEL_RX_H */
