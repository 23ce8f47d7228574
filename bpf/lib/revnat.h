/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Reverse NAT: exact entries (client, backend) -> what the client called. The client's packets create and refresh
 * them.
 *
 * A flow waits in mesh_revnat_new until it is proven, since whoever invents addresses can send any packet of a client.
 * TCP: the client has acknowledged the sequence number by which the task has answered, or the task goes on with the
 * flow. UDP has no proof: its flows wait for the second packet, and then have a map of their own. */
#ifndef MESH_REVNAT_H
#define MESH_REVNAT_H

#include "flow_cache.h"
#include "metrics.h"

/* How long, in stamps, a client must have been silent before another flow of its address and port may take the entry.
 */
#define REUSE_TCP 8192u
#define REUSE_UDP 64u
#define OVERDUE   2u /* how long, at least, a TCP flow that is not proven keeps its entry from others */

/* How far behind the start of the task's answer a client's acknowledgement may be to prove that it got that: what a
 * task sends before it has heard from the client, ten segments (RFC 6928) of jumbo frames. A guess is right once in
 * 32,768 times. */
#define PROOF_WINDOW (1u << 17)

/* Other uses of mesh_revnat_new, by mesh_flow.pad[0] of the key: starts by what the client called. */
#define KEY_SEEN   1   /* dropped for an unknown task */
#define KEY_AWAITS 2   /* sent to another node, which has not answered */
#define SEEN_LIFE  64u /* stamps for which such an entry holds */

INLINE void revnat_key(struct mesh_flow *key, const struct packet *p, const struct tuple *to)
{
	key->source = to->source;
	key->destination = to->destination;
	key->source_port = to->source_port;
	key->destination_port = to->destination_port;
	key->protocol = p->flow.protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
}

INLINE int is_current(const struct mesh_revnat *reply, const struct lb_choice *c)
{
	return reply->owner == c->owner && reply->epoch == c->backend->epoch;
}

INLINE int calls_same(const struct mesh_revnat *reply, const struct packet *p)
{
	return same_address(&reply->called, &p->flow.destination) && reply->called_port == p->flow.destination_port;
}

/* Set flags atomically, since both ends may close at the same moment on two CPUs. Returns the flags from before. eBPF
 * atomics take words: this word also holds called_port, which does not change. */
INLINE __u16 revnat_add_flags(struct mesh_revnat *reply, __u16 flags)
{
	union {
		__u16 half[2];
		__u32 whole;
	} word = {.half = {0, flags}};

	_Static_assert(offsetof(struct mesh_revnat, called_port) % 4 == 0, "a word that is aligned");
	_Static_assert(offsetof(struct mesh_revnat, flags) == offsetof(struct mesh_revnat, called_port) + 2,
		       "one word");
	word.whole = __sync_fetch_and_or((__u32 *)&reply->called_port, word.whole);
	return word.half[1];
}

/* One direction has closed. When both have, the flow has ended. */
INLINE void revnat_close(struct mesh_revnat *reply, __u16 closed)
{
	__u16 before = revnat_add_flags(reply, closed);

	if ((before & REVNAT_CLOSED) != REVNAT_CLOSED && ((before | closed) & REVNAT_CLOSED) == REVNAT_CLOSED &&
	    (before & MESH_REVNAT_OPENED))
		count_flow(reply->frontend, reply->owner, 0, 1);
}

INLINE __u16 closed_by(const struct packet *p, __u16 direction)
{
	if (likely(!(p->tcp_flags & (TCP_FIN | TCP_RST))))
		return 0;
	return p->tcp_flags & TCP_RST ? REVNAT_CLOSED : direction;
}

/* Whether this flow may take another flow's entry. */
INLINE int revnat_is_reusable(const struct mesh_revnat *reply, const struct packet *p, const struct lb_choice *c,
			      __u32 now)
{
	__u32 limit = p->flow.protocol == IPPROTO_TCP ? REUSE_TCP : REUSE_UDP;

	return !is_current(reply, c) || (reply->flags & REVNAT_CLOSED) == REVNAT_CLOSED || now - reply->stamp >= limit;
}

/* Whether a TCP flow is not proven in time. Anybody can have forged its start. */
INLINE int is_overdue(const struct mesh_revnat *opening, const struct packet *p, __u32 now)
{
	return p->flow.protocol == IPPROTO_TCP && now - opening->stamp >= OVERDUE;
}

INLINE struct recent *recent_of(const struct lb_choice *c)
{
	__u32 index = (__u32)(c->wide >> (64 - MESH_RECENT_BITS));

	return bpf_map_lookup_elem(&mesh_recent, &index);
}

INLINE __u64 recent_value(const struct lb_choice *c, __u32 now)
{
	__u64 owner = ((__u64)c->backend->epoch << 32 | c->owner) * MESH_K0;

	return ((c->wide ^ owner) & ~0xffffull) | (__u16)(now + 1);
}

/* Whether this flow, with this owner, was confirmed within the current stamp. Packets that start or end a flow never
 * are. One packet in 256, chosen by its IPv4 header's checksum, reads the clock, so that time passes where no flow
 * starts. */
INLINE int is_recent(const struct packet *p, const struct lb_choice *c)
{
	struct recent *recent = recent_of(c);
	__u64 value;

	if (unlikely(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) || !recent)
		return 0;
	value = recent_value(c, unlikely(!(p->check & 0xff)) ? stamp_tick() : mesh_now);
	return recent->words[0] == value || recent->words[1] == value;
}

/* Two flows share a place: the one confirmed last comes first. The start of a flow only removes its own word. */
INLINE void recent_set(const struct lb_choice *c, __u32 now)
{
	struct recent *recent = recent_of(c);
	__u64 value = recent_value(c, now);
	int first, second;

	if (!recent)
		return;
	first = (recent->words[0] ^ value) <= 0xffff;
	second = (recent->words[1] ^ value) <= 0xffff;
	if (c->start) {
		if (first)
			recent->words[0] = 0;
		if (second)
			recent->words[1] = 0;
		return;
	}
	if (!first)
		recent->words[1] = recent->words[0];
	recent->words[0] = value;
}

/* Have the next packet of the flow looked up, whichever way it arrives: replies take that way back. */
INLINE void recent_forget(const struct lb_choice *c)
{
	struct recent *recent = recent_of(c);

	if (recent)
		recent->words[0] = recent->words[1] = 0;
}

#define REVNAT_START (MESH_REVNAT_REFUSED | MESH_REVNAT_ANSWERED | MESH_REVNAT_UNANSWERED)

/* A client sends its SYN again: what the new entry keeps of the one that waits. The start counts as unanswered if the
 * task has said nothing; of one that came through the tunnel the node that was called knows more (await_answer). */
INLINE __u16 flags_sent_again(const struct mesh_revnat *opening, __u32 frontend, __u32 ifindex)
{
	__u16 flags = opening->flags & REVNAT_START;

	if (flags || (ifindex & MESH_REVNAT_NODE))
		return flags;
	count_failure(frontend, FAILURE(unanswered));
	return MESH_REVNAT_UNANSWERED;
}

/* Whether a segment acknowledges the task's answer to the start of its flow. */
INLINE int acknowledges_answer(struct __sk_buff *skb, const struct packet *p, const struct mesh_revnat *opening)
{
	__be32 acknowledged;

	if (!(opening->flags & MESH_REVNAT_ANSWERED) || !(p->tcp_flags & TCP_ACK) || p->fragment)
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, ack_seq), &acknowledged, sizeof(acknowledged)))
		return 0;
	return bpf_ntohl(acknowledged) - opening->sequence - 1 < PROOF_WINDOW;
}

/* Store the entry of a flow that is proven now, and of one that is not. */
INLINE void revnat_store(const struct mesh_flow *key, const struct mesh_revnat *made)
{
	if (key->protocol == IPPROTO_UDP)
		bpf_map_update_elem(&mesh_revnat_udp, key, made, BPF_ANY);
	else
		bpf_map_update_elem(&mesh_revnat, key, made, BPF_ANY);
	bpf_map_delete_elem(&mesh_revnat_new, key);
}

/* A segment that neither starts its flow nor proves it. `opening`: the flow's entry that waits, or NULL. */
INLINE void revnat_wait(const struct mesh_flow *key, const struct mesh_revnat *made, struct mesh_revnat *opening)
{
	if (!opening) {
		bpf_map_update_elem(&mesh_revnat_new, key, made, BPF_ANY);
		return;
	}
	opening->ifindex = made->ifindex;
	opening->veth = made->veth;
	if (made->flags & REVNAT_CLOSED)
		revnat_add_flags(opening, made->flags & REVNAT_CLOSED);
}

/* The first packet of a flow, or the first since its entry was lost: create one. Returns -1 on collision, 1 where the
 * other flow is not proven: the client is to try again. */
static __noinline int revnat_create(struct __sk_buff *skb, struct packet *p, struct lb_choice *c, struct tuple *to,
				    __u32 ifindex)
{
	struct mesh_revnat *made = revnat_work(), *opening;
	struct mesh_flow key;
	int known = 0;

	if (!p || !c || !to || !c->backend || !made)
		return -1;
	revnat_key(&key, p, to);
	made->called = p->flow.destination;
	made->client = p->flow.source;
	made->called_port = p->flow.destination_port;
	made->flags = to->flags;
	made->ifindex = ifindex;
	made->frontend = c->frontend;
	made->owner = c->owner;
	made->epoch = c->backend->epoch;
	made->veth = c->backend->ifindex;
	made->stamp = stamp_now();
	opening = bpf_map_lookup_elem(&mesh_revnat_new, &key);
	if (opening) {
		known = calls_same(opening, p) && is_current(opening, c);
		if (!known && !revnat_is_reusable(opening, p, c, made->stamp) && !is_overdue(opening, p, made->stamp))
			return p->flow.protocol == IPPROTO_TCP ? 1 : -1;
	}
	if (c->start || (!known && p->flow.protocol == IPPROTO_UDP)) {
		if (p->flow.protocol == IPPROTO_UDP) {
			made->flags |= MESH_REVNAT_OPENED;
			count_flow(c->frontend, c->owner, 1, 0);
		}
		if (known) {
			made->flags |= flags_sent_again(opening, c->frontend, ifindex);
			made->sequence = opening->sequence;
			if (p->flow.protocol == IPPROTO_TCP)
				made->stamp = opening->stamp; /* for is_overdue */
		}
		bpf_map_update_elem(&mesh_revnat_new, &key, made, BPF_ANY);
		return 0;
	}
	made->flags |= closed_by(p, MESH_REVNAT_FIN_IN);
	if (p->tcp_flags & TCP_RST) {
		if (opening)
			bpf_map_delete_elem(&mesh_revnat_new, &key);
		return 0;
	}
	if (p->flow.protocol == IPPROTO_TCP && !(known && acknowledges_answer(skb, p, opening))) {
		revnat_wait(&key, made, known ? opening : NULL);
		return 0;
	}
	if (!(made->flags & MESH_REVNAT_FIN_IN)) {
		made->flags |= MESH_REVNAT_OPENED;
		if (p->flow.protocol == IPPROTO_TCP)
			count_flow(c->frontend, c->owner, 1, 0);
	}
	revnat_store(&key, made);
	c->recent = 1;
	return 0;
}

/* The client's packet of a flow that goes to `c->backend` as `to`: see that replies find their way back. Returns -1
 * where the task would mistake the flow for another one of the same client, 1 where it might. */
INLINE int revnat_update(struct __sk_buff *skb, struct packet *p, struct lb_choice *c, struct tuple *to, __u32 ifindex)
{
	struct mesh_revnat *reply;
	struct mesh_flow key;
	__u32 now = stamp_tick();

	revnat_key(&key, p, to);
	reply = revnat_proven(&key);
	if (likely(reply && !c->start && calls_same(reply, p) && is_current(reply, c))) {
		if (reply->stamp != now)
			reply->stamp = now;
		if (reply->ifindex != ifindex)
			reply->ifindex = ifindex;
		if (reply->veth != c->backend->ifindex)
			reply->veth = c->backend->ifindex;
		recent_set(c, now);
		c->recent = 1;
		if (p->tcp_flags & (TCP_FIN | TCP_RST))
			revnat_close(reply, closed_by(p, MESH_REVNAT_FIN_IN));
		return 0;
	}
	if (c->start)
		recent_set(c, now);
	if (reply) {
		if (!calls_same(reply, p) && !revnat_is_reusable(reply, p, c, now))
			return -1;
		revnat_close(reply, REVNAT_CLOSED);
		if (p->flow.protocol == IPPROTO_UDP)
			bpf_map_delete_elem(&mesh_revnat_udp, &key);
		else
			bpf_map_delete_elem(&mesh_revnat, &key);
	}
	return revnat_create(skb, p, c, to, ifindex);
}

/* Another node has answered the start of a flow. */
INLINE void answer_came(const struct mesh_flow *flow)
{
	struct mesh_flow key = *flow;

	key.pad[0] = KEY_AWAITS;
	bpf_map_delete_elem(&mesh_revnat_new, &key);
}

/* Whether a packet with a task's address comes from the task: on its bridge others may invent it. */
INLINE int is_from_task(struct __sk_buff *skb, const struct mesh_revnat *reply)
{
	return !reply->veth || reply->veth == skb->ifindex;
}

/* Whether a task's segment shows that a flow that waits is a connection there. Its kernel answers segments of none by
 * resets and SYN-ACKs, and those of one that has just been answered by acknowledgements that send nothing. */
INLINE int goes_on(struct __sk_buff *skb, const struct packet *p, const struct mesh_revnat *opening)
{
	__be32 sequence;

	if (p->flow.protocol != IPPROTO_TCP || p->fragment || (p->tcp_flags & (TCP_SYN | TCP_RST)))
		return 0;
	if (!(opening->flags & MESH_REVNAT_ANSWERED) || (p->tcp_flags & TCP_FIN))
		return 1;
	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sequence, sizeof(sequence)))
		return 0;
	return bpf_ntohl(sequence) != opening->sequence + 1;
}

/* Such a flow is proven. Returns its entry. */
static __noinline struct mesh_revnat *revnat_goes_on(struct mesh_flow *key, struct mesh_revnat *opening)
{
	struct mesh_revnat made;

	if (!key || !opening || (opening->flags & REVNAT_CLOSED) == REVNAT_CLOSED)
		return opening;
	made = *opening;
	if ((made.flags & (MESH_REVNAT_ANSWERED | MESH_REVNAT_OPENED)) == MESH_REVNAT_ANSWERED) {
		made.flags |= MESH_REVNAT_OPENED;
		count_flow(made.frontend, made.owner, 1, 0);
	}
	revnat_store(key, &made);
	return bpf_map_lookup_elem(&mesh_revnat, key);
}

/* The entry of a packet that a task sends; NULL: it is no reply. */
INLINE struct mesh_revnat *revnat_lookup(struct __sk_buff *skb, const struct packet *p)
{
	struct mesh_flow key = {
		.source = p->flow.destination,
		.destination = p->flow.source,
		.source_port = p->flow.destination_port,
		.destination_port = p->flow.source_port,
		.protocol = p->flow.protocol,
	};
	struct mesh_revnat *reply = revnat_proven(&key);

	if (likely(reply))
		return reply;
	reply = bpf_map_lookup_elem(&mesh_revnat_new, &key);
	if (reply && is_from_task(skb, reply) && goes_on(skb, p, reply))
		return revnat_goes_on(&key, reply);
	return reply;
}

#endif /* MESH_REVNAT_H */
