/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Translation of ICMP errors about flows, in both directions: outer addresses and the quoted packet are rewritten like
 * the flow, so that each side recognises its own packet. Only errors about a flow with a reverse NAT entry are
 * touched.
 *
 * The quoted transport checksum, which nobody verifies, stays as it was. */
#ifndef MESH_ICMP_H
#define MESH_ICMP_H

#include "forward.h"
#include "quoted.h"

#define ICMP_CHECK 2u

/* Give the quoted packet `to`'s addresses and ports, and the error's checksum the difference. In IPv4 the quoted
 * header's own checksum cancels the addresses. */
INLINE int rewrite_quoted(struct __sk_buff *skb, const struct packet *p, const struct quoted *q, const struct tuple *to)
{
	__u64 addresses, diff;
	int error;

	diff = diff16(q->flow.source_port, to->source_port) + diff16(q->flow.destination_port, to->destination_port);
	addresses = diff_addresses(&q->flow, to);
	error = (int)bpf_skb_store_bytes(skb, q->l4, &to->source_port, 4, 0);
	if (p->version == 4) {
		__sum16 check = (__sum16)~fold16((__u16)~q->check + (__u64)fold32(addresses));
		__be32 v4[2] = {to->source.words[3], to->destination.words[3]};

		/* Where the sums are the same number but differ in bits (0 and 0xffff), the difference includes it. */
		diff += diff16(q->check, check) + fold32(addresses);
		error |= (int)bpf_skb_store_bytes(skb, q->ip + 10, &check, 2, 0);
		error |= (int)bpf_skb_store_bytes(skb, q->ip + 12, v4, 8, 0);
	} else {
		diff += fold32(addresses);
		error |= (int)bpf_skb_store_bytes(skb, q->ip + 8, &to->source, 32, 0);
	}
	return error | (int)bpf_l4_csum_replace(skb, p->l4 + ICMP_CHECK, 0, fold32(diff), 0);
}

/* The outer addresses; in IPv6 the error's checksum covers them. */
INLINE int rewrite_outer(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	__u64 diff;

	if (p->version == 4) {
		diff = diff32(p->flow.source.words[3], to->source.words[3]) +
		       diff32(p->flow.destination.words[3], to->destination.words[3]);
		return rewrite_v4(skb, p, to, diff);
	}
	diff = diff_addresses(&p->flow, to);
	if (bpf_l4_csum_replace(skb, p->l4 + ICMP_CHECK, 0, fold32(diff), BPF_F_PSEUDO_HDR))
		return -1;
	return rewrite_v6(skb, p, to, diff);
}

/* The reverse NAT entry of the flow with a backend that an error from the client's side quotes (called -> client). */
INLINE struct mesh_revnat *revnat_of_backend(struct icmp_work *w, const struct mesh_backend *backend, __u32 owner)
{
	struct mesh_flow *key = &w->key, *flow = &w->client;
	struct mesh_revnat *reply;

	flow->source = w->quoted.flow.destination;
	flow->destination = w->quoted.flow.source;
	flow->source_port = w->quoted.flow.destination_port;
	flow->destination_port = w->quoted.flow.source_port;
	flow->protocol = w->quoted.flow.protocol;
	key->source = w->quoted.flow.destination;
	key->source_port = w->quoted.flow.destination_port;
	key->destination = backend->address;
	key->destination_port = backend->port;
	key->protocol = w->quoted.flow.protocol;
	reply = revnat_find(key);
	if (likely(reply && revnat_is_of(reply, key->source_port, flow)))
		return reply;
	if (!snat_may_know(mesh_hash_flow_wide(flow), stamp_now()))
		return NULL;
	reply = snat_find(flow, key, backend, owner);
	return reply && revnat_is_of(reply, key->source_port, flow) ? reply : NULL;
}

/* Likewise, of the backend that the table names. */
INLINE struct mesh_revnat *revnat_of_client_error(struct icmp_work *w, struct lb_choice *c, __u32 word)
{
	struct mesh_flow *key = &w->key;

	key->source = w->quoted.flow.destination;
	key->destination = w->quoted.flow.source;
	key->source_port = w->quoted.flow.destination_port;
	key->destination_port = w->quoted.flow.source_port;
	key->protocol = w->quoted.flow.protocol;
	c->frontend = find_frontend(key, word);
	if (!c->frontend)
		return NULL;
	lb_choose(key, c);
	return c->backend && !is_remote(c->backend) ? revnat_of_backend(w, c->backend, c->owner) : NULL;
}

/* Translate an error about a flow whose entry revnat_of_backend has found: the quoted packet becomes the one that the
 * task sent, and its client, if it is the sender, what the task sees. */
INLINE int translate_to_task(struct __sk_buff *skb, const struct packet *p, struct icmp_work *w,
			     const struct mesh_revnat *reply)
{
	w->inner.source = w->key.destination;
	w->inner.source_port = w->key.destination_port;
	w->inner.destination = w->key.source;
	w->inner.destination_port = w->key.source_port;
	w->outer.source = same_address(&p->flow.source, &reply->client) ? w->key.source : p->flow.source;
	w->outer.destination = w->key.destination;
	return rewrite_quoted(skb, p, &w->quoted, &w->inner) || rewrite_outer(skb, p, &w->outer);
}

/* The reverse NAT entry of the flow that an error of a task quotes (client -> task). */
INLINE struct mesh_revnat *revnat_of_task_error(struct __sk_buff *skb, const struct packet *p, struct icmp_work *w)
{
	struct mesh_revnat *reply;

	if (p->ttl <= 1 || load_quoted(skb, p, w) || !same_address(&w->quoted.flow.source, &p->flow.destination))
		return NULL;
	w->key = w->quoted.flow;
	reply = revnat_find(&w->key);
	return reply && !(reply->flags & MESH_REVNAT_HAIRPIN) ? reply : NULL;
}

/* Port unreachable says of UDP what a reset says of TCP. */
INLINE void count_refused_datagram(struct __sk_buff *skb, const struct packet *p, const struct icmp_work *w,
				   const struct mesh_revnat *reply)
{
	__u8 kind[2];

	if (w->quoted.flow.protocol != IPPROTO_UDP || bpf_skb_load_bytes(skb, p->l4, kind, sizeof(kind)))
		return;
	if (p->version == 4 ? kind[0] == ICMP4_UNREACHABLE && kind[1] == 3
			    : kind[0] == ICMP6_UNREACHABLE && kind[1] == 4)
		count_backend_failure(reply->frontend, reply->owner, BACKEND_FAILURE(refused));
}

/* Translate it for the client. */
INLINE int translate_to_client(struct __sk_buff *skb, const struct packet *p, struct icmp_work *w,
			       const struct mesh_revnat *reply)
{
	count_refused_datagram(skb, p, w, reply);
	w->inner.source = reply->client;
	w->inner.source_port = client_port(reply, w->key.source_port);
	w->inner.destination = reply->called;
	w->inner.destination_port = reply->called_port;
	w->outer.source = reply->called;
	w->outer.destination = reply->client;
	return rewrite_quoted(skb, p, &w->quoted, &w->inner) || rewrite_outer(skb, p, &w->outer);
}

/* Whether a quoted packet belongs to the tunnel. */
INLINE int is_tunnel(const struct mesh_flow *quoted)
{
	return quoted->protocol == IPPROTO_UDP &&
	       (port_word(IPPROTO_UDP, quoted->destination_port) & MESH_PORT_TUNNEL) != 0;
}

/* An error from the client's side about a packet that we sent for a task. Returns an action or a TAIL_CALL. */
RARE int forward_icmp(struct __sk_buff *skb, struct packet *p, int from)
{
	struct icmp_work *w = icmp_work();
	struct mesh_revnat *reply;
	struct lb_choice c = {};
	__u32 word;

	if (!p || !w || load_quoted(skb, p, w))
		return TC_ACT_UNSPEC;
	if (from == FROM_CLIENT && skb->pkt_type == PACKET_HOST && is_tunnel(&w->quoted.flow))
		return TAIL_CALL(CALL_TUNNEL_RX);
	word = port_word(w->quoted.flow.protocol, w->quoted.flow.source_port);
	if (likely(!word) || p->ttl <= 1 || (from != FROM_TASK && skb->pkt_type != PACKET_HOST))
		return TC_ACT_UNSPEC;
	reply = revnat_of_client_error(w, &c, word);
	if (!reply)
		return c.backend && is_remote(c.backend) && c.backend->version == p->version && from == FROM_CLIENT
			       ? tunnel_tx_call(skb, c.owner, 0, (__u32)c.wide, 0)
			       : TC_ACT_UNSPEC;
	if (!c.backend || is_v4(&w->key.destination) != (p->version == 4))
		return TC_ACT_UNSPEC;
	if (translate_to_task(skb, p, w, reply))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_ICMP_IN);
	return deliver(skb, c.backend);
}

#endif /* MESH_ICMP_H */
