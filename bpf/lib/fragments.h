/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: the ports of those that have none, and those that come before their first one.
 *
 * A first fragment's ports are stored, and the others of its datagram follow it. A fragment that comes earlier belongs
 * to nobody yet: it is copied and dropped. When the first one comes, the copies come in again where it came in, each as
 * if its sender had sent it then, and find their way like any other: so neither the kernel nor a task gets half a
 * datagram, and nothing is reassembled on the way. What an early fragment costs is a copy, now and once more. */
#ifndef MESH_FRAGMENTS_H
#define MESH_FRAGMENTS_H

#include "maps.h"
#include "metrics.h"
#include "parse.h"
#include "scratch.h"

#define FRAGMENT_LIFE 4u  /* stamps for which a datagram's fragments wait for each other; then its id is another's */
#define EARLY_CHUNKS  8u  /* of a fragment, at most */
#define EARLY_MOST    64u /* fragments of a datagram that are kept */
#define EARLY_TRIES   4   /* where another CPU keeps a fragment of the same datagram at that moment */

#define EARLY_GO_ON (-2) /* of early_fragment */

/* Whether packets with unknown ports must not reach the kernel, which might give them to another mesh. */
INLINE int is_guarded(void)
{
	struct mesh_config *node = config();

	return node && (node->settings & MESH_SETTING_GUARD);
}

INLINE void fragment_key(struct mesh_fragment_key *key, const struct packet *p)
{
	key->source = p->flow.source;
	key->destination = p->flow.destination;
	key->id = p->fragment_id;
	key->protocol = p->flow.protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
}

/* Store the ports of a first fragment. */
INLINE void fragment_store(const struct packet *p)
{
	struct mesh_fragment ports = {
		.source_port = p->flow.source_port,
		.destination_port = p->flow.destination_port,
		.stamp = stamp_now(),
	};
	struct mesh_fragment_key key;

	fragment_key(&key, p);
	bpf_map_update_elem(&mesh_fragments, &key, &ports, BPF_ANY);
}

/* The ports of a datagram that fragments were lately heard of, or NULL. */
INLINE const struct mesh_fragment *fragment_find(const struct mesh_fragment_key *key)
{
	struct mesh_fragment *known = bpf_map_lookup_elem(&mesh_fragments, key);
	__u32 now = stamp_now();

	if (!known || now - known->stamp >= FRAGMENT_LIFE)
		return NULL;
	if (known->stamp != now)
		known->stamp = now;
	return known;
}

INLINE int has_early(const struct mesh_fragment_key *key)
{
	struct early *early = bpf_map_lookup_elem(&early_datagrams, key);

	return unlikely(early && early->last) && stamp_now() - early->stamp < FRAGMENT_LIFE;
}

/* Store the ports of a first fragment, or find those of a later one. First ones to this node are stored whoever has
 * their port, with `any` those to everybody, so that later fragments of others are known as such. Returns 0 when the
 * ports are known, -1 when they are not and the fragment passes, 1 when it is to be handed to early_fragment. */
static __noinline int fragment_ports(struct packet *p, int any)
{
	const struct mesh_fragment *known;
	struct mesh_fragment_key key;

	fragment_key(&key, p);
	if (p->fragment == 1) {
		if (!any && !is_local(&p->flow.destination))
			return 0;
		if (has_early(&key))
			return 1;
		fragment_store(p);
		return 0;
	}
	known = fragment_find(&key);
	if (!known)
		return is_guarded() && (any || is_local(&p->flow.destination)) ? 1 : -1;
	p->flow.source_port = known->source_port;
	p->flow.destination_port = known->destination_port;
	return 0;
}

/* Make a flow's packet of a fragment whose ports are known. Returns 1 where it is to be handed to early_fragment. */
INLINE int complete(struct packet *p, enum parse_result *result, int any)
{
	int known = fragment_ports(p, any);

	if (!known)
		*result = PARSE_FLOW;
	return known > 0;
}

INLINE struct early_chunk *early_chunk(__u32 number)
{
	__u32 index = number & ((1u << EARLY_BITS) - 1);

	return bpf_map_lookup_elem(&early_chunks, &index);
}

/* How much of a fragment is in the chunk that begins at `at`, from 1 to EARLY_CHUNK. */
INLINE __u32 early_size(__u32 length, __u32 at)
{
	__u32 size = length - at;

	if (size > EARLY_CHUNK)
		size = EARLY_CHUNK;
	asm volatile("" : "+r"(size)); /* the verifiers of kernels before 6.3 do not see through what the compiler makes */
	return ((size - 1) & (EARLY_CHUNK - 1)) + 1;
}

/* Copy a packet. Returns its number, or 0 where it is too large. */
static __noinline __u32 early_copy(struct __sk_buff *skb)
{
	__u32 length = skb->len - L3, number;
	struct early_chunk *chunk;

	if (skb->len <= L3 || length > EARLY_CHUNKS * EARLY_CHUNK || skb->gso_size)
		return 0;
	number = __sync_fetch_and_add(&early_count, (length + EARLY_CHUNK - 1) / EARLY_CHUNK) + 1;
	for (__u32 i = 0; i < EARLY_CHUNKS && i * EARLY_CHUNK < length; i++) {
		chunk = early_chunk(number + i);
		if (!chunk)
			return 0;
		__sync_lock_test_and_set(&chunk->number, 0);
		chunk->previous = 0;
		chunk->length = length;
		if (bpf_skb_load_bytes(skb, L3 + i * EARLY_CHUNK, chunk->data, early_size(length, i * EARLY_CHUNK)))
			return 0;
		__sync_lock_test_and_set(&chunk->number, number + i);
	}
	return number;
}

/* Make the packet one that was copied, behind its Ethernet header. Returns 0, or -1 where the copy is gone or the
 * packet spoilt. */
RARE int early_write(struct __sk_buff *skb, __u32 number)
{
	struct early_chunk *chunk = early_chunk(number);
	__u32 length;

	if (!number || !chunk || chunk->number != number)
		return -1;
	length = chunk->length;
	if (!length || length > EARLY_CHUNKS * EARLY_CHUNK)
		return -1;
	/* What has the marks of a tunnel (encap_room) has a fixed tail. */
	if (bpf_skb_change_tail(skb, L3 + length, 0) &&
	    bpf_skb_adjust_room(skb, (__s32)(L3 + length - skb->len), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return -1;
	for (__u32 i = 0; i < EARLY_CHUNKS && i * EARLY_CHUNK < length; i++) {
		chunk = early_chunk(number + i);
		if (!chunk || chunk->number != number + i)
			return -1;
		if (bpf_skb_store_bytes(skb, L3 + i * EARLY_CHUNK, chunk->data, early_size(length, i * EARLY_CHUNK),
					BPF_F_RECOMPUTE_CSUM))
			return -1;
		if (*(volatile __u32 *)&chunk->number != number + i) /* replaced meanwhile */
			return -1;
	}
	return 0;
}

/* Keep a copy with the datagram's others. Returns 0. */
INLINE int early_keep(struct early *early, __u32 number)
{
	struct early_chunk *chunk = early_chunk(number);
	__u32 last, now = stamp_now();

	if (!number || !chunk)
		return -1;
	if (now - early->stamp >= FRAGMENT_LIFE)
		early->last = 0;
	early->stamp = now;
	for (int i = 0; i < EARLY_TRIES; i++) {
		last = *(volatile __u32 *)&early->last;
		chunk->previous = last;
		if (__sync_val_compare_and_swap(&early->last, last, number) == last)
			return 0;
	}
	return -1;
}

/* Have what was kept of a datagram come in again. The packet is spoilt. */
INLINE void early_release(struct __sk_buff *skb, struct early *early)
{
	__u32 number = __sync_lock_test_and_set(&early->last, 0), previous;
	struct early_chunk *chunk;

	for (__u32 i = 0; i < EARLY_MOST && number; i++) {
		chunk = early_chunk(number);
		if (!chunk)
			return;
		previous = chunk->previous;
		if (early_write(skb, number))
			return;
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
		number = previous;
	}
}

INLINE struct early *early_of(const struct mesh_fragment_key *key)
{
	struct early made = {.stamp = stamp_now()};
	struct early *early = bpf_map_lookup_elem(&early_datagrams, key);

	if (early)
		return early;
	bpf_map_update_elem(&early_datagrams, key, &made, BPF_NOEXIST);
	return bpf_map_lookup_elem(&early_datagrams, key);
}

/* Whether a fragment came before its first one, or is a first one that comes after others. */
INLINE int is_early(const struct packet *p)
{
	struct mesh_fragment_key key;

	fragment_key(&key, p);
	return p->fragment == 2 ? !fragment_find(&key) : has_early(&key);
}

/* Such a fragment. `proven`: a first one's ports may be stored. Returns an action, or EARLY_GO_ON where the packet is to
 * be handled: the first one leaves before the others come in again, as whoever gets them next may know no better
 * order. */
INLINE int early_fragment(struct __sk_buff *skb, const struct packet *p, int proven)
{
	struct mesh_fragment_key key;
	struct early *early;
	__u32 number;

	fragment_key(&key, p);
	early = early_of(&key);
	number = early_copy(skb);
	if (!early || !number)
		return verdict(MESH_VERDICT_NO_PORTS, TC_ACT_SHOT);
	if (p->fragment == 1) {
		if (proven)
			fragment_store(p);
		early_release(skb, early);
		return early_write(skb, number) ? verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT) : EARLY_GO_ON;
	}
	if (early_keep(early, number))
		return verdict(MESH_VERDICT_NO_PORTS, TC_ACT_SHOT);
	if (unlikely(fragment_find(&key) != NULL)) /* the first one has come at this moment, on another CPU */
		early_release(skb, early);
	return verdict(MESH_VERDICT_EARLY, TC_ACT_SHOT);
}

#endif /* MESH_FRAGMENTS_H */
