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

INLINE int is_current(const struct mesh_revnat *reply, __u32 owner, const struct mesh_backend *backend)
{
	return reply->owner == owner && reply->epoch == backend->epoch;
}

/* Whether the entry at the client's own address and port is that of its flow. */
INLINE int is_untranslated(const struct mesh_revnat *reply, const struct packet *p)
{
	return same_address(&reply->called, &p->flow.destination) && reply->called_port == p->flow.destination_port &&
	       likely(!(reply->flags & MESH_REVNAT_TRANSLATED));
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

/* What revnat_begin is told of a packet's flow. */
struct beginning {
	__u64 wide; /* lb_choice.wide */
	__u32 owner;
	__u32 frontend;
	__u32 ifindex; /* of the entry */
	__u32 start;
};

/* A client sends its SYN again: what the new entry keeps of the one that waits. The start counts as unanswered if the
 * task has said nothing; of one that came through the tunnel the node that was called knows more (await_answer). */
INLINE __u16 flags_sent_again(const struct mesh_revnat *opening, const struct beginning *b)
{
	__u16 flags = opening->flags & REVNAT_START;

	if (flags || (b->ifindex & MESH_REVNAT_NODE))
		return flags;
	count_backend_failure(b->frontend, b->owner, BACKEND_FAILURE(unanswered));
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

/* What becomes of an entry that is about to make room: of this flow's former life, or of another that has ended. */
INLINE void revnat_remove(const struct mesh_flow *key, struct mesh_revnat *reply)
{
	revnat_close(reply, REVNAT_CLOSED);
	if (key->protocol == IPPROTO_UDP)
		bpf_map_delete_elem(&mesh_revnat_udp, key);
	else
		bpf_map_delete_elem(&mesh_revnat, key);
}

/* The client was heard. */
INLINE void revnat_refresh(struct mesh_revnat *reply, const struct packet *p, const struct mesh_backend *backend,
			   __u32 ifindex, __u32 now)
{
	if (reply->stamp != now)
		reply->stamp = now;
	if (reply->ifindex != ifindex)
		reply->ifindex = ifindex;
	if (reply->veth != backend->ifindex)
		reply->veth = backend->ifindex;
	if (unlikely(p->tcp_flags & (TCP_FIN | TCP_RST)))
		revnat_close(reply, closed_by(p, MESH_REVNAT_FIN_IN));
}

#define PLACE_LOOK   1 /* to->pad: there may be a proven entry */
#define PLACE_CHOSEN 2 /* to->pad: the source is chosen */

/* What revnat_begin answers besides what revnat_update does. */
#define REVNAT_LOOK   2 /* the flow may have had another source before: look */
#define REVNAT_MUST   3 /* it needs another source; `to` has the address that it can have */
#define REVNAT_PROVEN 4 /* its entry is proven */

/* The entries of a flow that has `to`'s source towards the task, and what they are to it. */
struct revnat_place {
	const struct mesh_backend *backend;
	struct mesh_flow *key;
	struct mesh_revnat *reply;   /* proven */
	struct mesh_revnat *opening; /* not proven; NULL also where `reply` is the flow's own */
	struct mesh_revnat *proven;  /* `reply`, if it is of this flow, with its present owner */
	struct mesh_revnat *known;   /* likewise `opening` */
};

INLINE struct mesh_revnat *if_its_own(struct mesh_revnat *entry, const struct packet *p, const struct tuple *to,
				      __u32 owner, const struct mesh_backend *backend)
{
	if (entry && !(revnat_is_of(entry, to->source_port, &p->flow) && is_current(entry, owner, backend)))
		entry = NULL;
	barrier_var(entry); /* the verifier sees a pointer that is tested, not what the compiler knows of it */
	return entry;
}

/* Not 0: a map has failed. */
INLINE int revnat_place(struct revnat_place *at, const struct packet *p, const struct tuple *to, __u32 owner, int look)
{
	struct snat_keys *keys = snat_keys();

	at->backend = find_backend(owner);
	if (!keys || !at->backend)
		return -1;
	at->key = &keys->place;
	revnat_key(at->key, p, to);
	at->reply = look ? revnat_proven(at->key) : NULL;
	at->proven = if_its_own(at->reply, p, to, owner, at->backend);
	at->opening = at->proven ? NULL : bpf_map_lookup_elem(&mesh_revnat_new, at->key);
	at->known = if_its_own(at->opening, p, to, owner, at->backend);
	return 0;
}

/* Whether the flow needs another source towards the task (REVNAT_MUST), may have had one before (REVNAT_LOOK), or
 * neither (0). */
INLINE int snat_wanted(const struct revnat_place *at, const struct packet *p, const struct beginning *b,
		       struct tuple *to, __u32 now)
{
	__u32 limit = p->flow.protocol == IPPROTO_TCP ? REUSE_TCP : REUSE_UDP, epoch = at->backend->epoch;
	int held = !at->proven && revnat_holds(at->reply, b->owner, epoch, now, limit);
	const struct mesh_addr *gateway;

	if (likely(at->proven || (at->known && !held)))
		return 0;
	if (!(to->flags & MESH_REVNAT_PEER) && b->ifindex != at->backend->bridge) {
		gateway = snat_gateway(at->backend, b->owner, &p->flow.source);
		if (unlikely(gateway)) {
			to->source = *gateway;
			return REVNAT_MUST;
		}
	}
	if (unlikely(held || revnat_holds(at->opening, b->owner, epoch, now, limit)))
		return REVNAT_MUST;
	return snat_may_know(b->wide, now) ? REVNAT_LOOK : 0;
}

/* Give such a flow its other source. Returns as revnat_update. */
INLINE int snat_choose(struct packet *p, struct lb_choice *c, struct tuple *to, int wanted)
{
	int port = snat_port(&p->flow, &to->source, c->owner, wanted == REVNAT_MUST);
	__u32 *seen, now = mesh_now;

	to->pad = PLACE_LOOK | PLACE_CHOSEN;
	if (port < 0)
		return port == SNAT_WAIT && p->flow.protocol == IPPROTO_TCP ? 1 : -1;
	if (port == SNAT_NONE)
		return 0;
	to->source_port = (__be16)port;
	to->flags |= MESH_REVNAT_TRANSLATED;
	c->verdict = MESH_VERDICT_TRANSLATED;
	seen = snat_seen(c->wide);
	if (seen && *seen != now)
		*seen = now;
	return 0;
}

/* As snat_port, of a client's packet that comes now; changes nothing. */
INLINE __maybe_unused int snat_foretell(struct packet *p, const struct lb_choice *c, struct tuple *to)
{
	struct beginning b = {.wide = c->wide, .owner = c->owner};
	struct revnat_place at;
	int wanted;

	if (revnat_place(&at, p, to, c->owner, 1))
		return SNAT_NONE;
	wanted = snat_wanted(&at, p, &b, to, stamp_now());
	return wanted ? snat_port(&p->flow, &to->source, c->owner, wanted == REVNAT_MUST) : SNAT_NONE;
}

/* Create an entry, or prove the one that waits. Returns as revnat_begin. */
INLINE int revnat_create(struct __sk_buff *skb, const struct packet *p, const struct beginning *b,
			 const struct revnat_place *at, struct mesh_revnat *made)
{
	struct mesh_revnat *opening = at->known;

	if (b->start || (!opening && p->flow.protocol == IPPROTO_UDP)) {
		if (p->flow.protocol == IPPROTO_UDP) {
			made->flags |= MESH_REVNAT_OPENED;
			count_flow(b->frontend, b->owner, 1, 0);
		}
		if (opening) {
			made->flags |= flags_sent_again(opening, b);
			made->sequence = opening->sequence;
			if (p->flow.protocol == IPPROTO_TCP)
				made->stamp = opening->stamp; /* for OVERDUE */
		}
		bpf_map_update_elem(&mesh_revnat_new, at->key, made, BPF_ANY);
		return 0;
	}
	made->flags |= closed_by(p, MESH_REVNAT_FIN_IN);
	if (p->tcp_flags & TCP_RST) {
		if (at->opening)
			bpf_map_delete_elem(&mesh_revnat_new, at->key);
		return 0;
	}
	if (p->flow.protocol == IPPROTO_TCP && !(opening && acknowledges_answer(skb, p, opening))) {
		revnat_wait(at->key, made, opening);
		return 0;
	}
	if (!(made->flags & MESH_REVNAT_FIN_IN)) {
		made->flags |= MESH_REVNAT_OPENED;
		if (p->flow.protocol == IPPROTO_TCP)
			count_flow(b->frontend, b->owner, 1, 0);
	}
	revnat_store(at->key, made);
	return REVNAT_PROVEN;
}

/* The first packet of a flow, the first since its entry was lost, or any whose source is translated. to->pad says what
 * is known of it (PLACE_*). Nothing is done where the answer is REVNAT_LOOK or REVNAT_MUST. */
RARE int revnat_begin(struct __sk_buff *skb, const struct packet *p, struct tuple *to, const struct beginning *b)
{
	__u32 now = stamp_now();
	struct mesh_revnat *made;
	struct revnat_place at;
	int wanted;

	if (!p || !to || !b || revnat_place(&at, p, to, b->owner, to->pad & PLACE_LOOK))
		return -1;
	wanted = to->pad & PLACE_CHOSEN ? 0 : snat_wanted(&at, p, b, to, now);
	if (unlikely(wanted))
		return wanted;
	if (at.proven && !b->start) {
		revnat_refresh(at.proven, p, at.backend, b->ifindex, now);
		return REVNAT_PROVEN;
	}
	if (at.reply)
		revnat_remove(at.key, at.reply);
	made = revnat_work();
	if (!made)
		return -1;
	made->called = p->flow.destination;
	made->client = p->flow.source;
	made->called_port = p->flow.destination_port;
	made->client_port = p->flow.source_port;
	made->flags = to->flags;
	made->ifindex = b->ifindex;
	made->frontend = (__u16)b->frontend;
	made->owner = b->owner;
	made->epoch = at.backend->epoch;
	made->veth = at.backend->ifindex;
	made->stamp = now;
	return revnat_create(skb, p, b, &at, made);
}

/* The client's packet of a flow that goes to `c->backend` as `to`: see that replies find their way back, and that the
 * task can tell the flow from others. `key`: working space. Returns -1 where it cannot, 1 where it cannot now. */
INLINE int revnat_update(struct __sk_buff *skb, struct packet *p, struct lb_choice *c, struct tuple *to, __u32 ifindex,
			 struct mesh_flow *key)
{
	struct beginning b = {c->wide, c->owner, c->frontend, ifindex, c->start};
	struct mesh_revnat *reply;
	__u32 now = stamp_tick();
	int begun;

	revnat_key(key, p, to);
	reply = revnat_proven(key);
	if (likely(reply && !c->start && is_untranslated(reply, p) && is_current(reply, c->owner, c->backend))) {
		revnat_refresh(reply, p, c->backend, ifindex, now);
		recent_set(c, now);
		c->recent = 1;
		return 0;
	}
	if (c->start)
		recent_set(c, now);
	to->pad = reply ? PLACE_LOOK : 0;
	begun = revnat_begin(skb, p, to, &b);
	if (unlikely(begun == REVNAT_MUST || begun == REVNAT_LOOK)) {
		begun = snat_choose(p, c, to, begun);
		if (!begun)
			begun = revnat_begin(skb, p, to, &b);
	}
	if (begun != REVNAT_PROVEN)
		return begun;
	c->recent = 1;
	return 0;
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
