/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses, ports and TTL changed in place, with checksums updated by difference (RFC 1624): what was wrong stays
 * wrong, what the sender left to offload stays so. Changes of the pseudo header are told apart from changes of the
 * covered bytes, which is what keeps CHECKSUM_PARTIAL and GSO packets right. The helper that does so costs as much as a
 * quarter of all the rest, and is left out where the checksum shows that it is complete.
 */
#ifndef MESH_REWRITE_H
#define MESH_REWRITE_H

#include "parse.h"

#define TCP_CHECK 16u
#define UDP_CHECK 6u

/* What a packet is to become. */
struct tuple {
	struct mesh_addr source;
	struct mesh_addr destination;
	__be16 source_port;
	__be16 destination_port;
	__u32 pad;
};

/* One's complement sums, in the byte order of the packet (RFC 1071). */
INLINE __u64 diff32(__be32 from, __be32 to)
{
	return (__u64)(__u32)~from + to;
}

INLINE __u64 diff16(__be16 from, __be16 to)
{
	return (__u64)(__u16)~from + to;
}

INLINE __u32 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (__u32)(sum + (sum >> 32));
}

INLINE __u16 fold16(__u64 sum)
{
	sum = fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)(sum + (sum >> 16));
}

INLINE __u64 diff_address(const struct mesh_addr *from, const struct mesh_addr *to)
{
	return diff32(from->words[0], to->words[0]) + diff32(from->words[1], to->words[1]) +
	       diff32(from->words[2], to->words[2]) + diff32(from->words[3], to->words[3]);
}

/* The IPv4 header's checksum with other addresses (their difference) and one hop less. */
INLINE __sum16 next_check(const struct packet *p, __u64 addresses)
{
	addresses += diff16(bpf_htons((__u16)(p->ttl << 8)), bpf_htons((__u16)((p->ttl - 1) << 8)));
	return (__sum16)~fold16((__u16)~p->check + addresses);
}

INLINE int rewrite_v4(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	struct iphdr *ip = (void *)(long)skb->data + L3;

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return -1;
	ip->ttl = p->ttl - 1;
	ip->check = next_check(p, addresses);
	ip->saddr = to->source.words[3];
	ip->daddr = to->destination.words[3];
	return 0;
}

/* No header checksum compensates in IPv6, so a CHECKSUM_COMPLETE sum has to follow. */
INLINE int rewrite_v6(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	struct ipv6hdr *ip = (void *)(long)skb->data + L3;

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return -1;
	ip->hop_limit = p->ttl - 1;
	__builtin_memcpy(&ip->saddr, &to->source, 16);
	__builtin_memcpy(&ip->daddr, &to->destination, 16);
	bpf_csum_update(skb, fold32(addresses + diff16(bpf_htons(p->ttl), bpf_htons(p->ttl - 1))));
	return 0;
}

/* A transport header in the linear part, or NULL. */
INLINE void *transport(struct __sk_buff *skb, const struct packet *p)
{
	void *l4 = (void *)(long)skb->data + (p->l4 & 0x7f);
	__u32 size = p->flow.protocol == IPPROTO_UDP ? 8 : 20;

	if (size == 8)
		return l4 + 8 > (void *)(long)skb->data_end ? NULL : l4;
	return l4 + 20 > (void *)(long)skb->data_end ? NULL : l4;
}

INLINE int is_congruent(__u16 a, __u16 b)
{
	return (a == 0xffff ? 0 : a) == (b == 0xffff ? 0 : b);
}

INLINE __u64 sum_address(const struct mesh_addr *a)
{
	return (__u64)a->words[0] + a->words[1] + a->words[2] + a->words[3];
}

/* Sum of the pseudo header from the flow's destination to its source (IPv4-mapped addresses: 0xffff adds nothing). */
INLINE __u64 pseudo_sum(const struct packet *p, __u32 length, __u8 protocol)
{
	return sum_address(&p->flow.source) + sum_address(&p->flow.destination) + bpf_htonl(length) +
	       bpf_htonl(protocol);
}

/* Whether the transport checksum may be left to offload (CHECKSUM_PARTIAL): it then holds the sum of the pseudo header,
 * which one in 65536 complete ones does too. */
INLINE int may_be_partial(struct __sk_buff *skb, const struct packet *p, __u16 check)
{
	if (skb->gso_size || p->fragment)
		return 1;
	return is_congruent(check, fold16(fold32(pseudo_sum(p, p->length - (p->l4 - L3), p->flow.protocol))));
}

/* Ports, and the checksum that covers them, by the kernel's helper: what that makes of the addresses' difference tells
 * whether the checksum is complete, or stands for the pseudo header alone and must not follow the ports. */
RARE int rewrite_unsure(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u32 addresses)
{
	int udp;
	__u32 at, diff;
	__u16 sum = fold16(addresses), *check, before;
	__be16 *ports;

	if (!p || !to)
		return -1;
	udp = p->flow.protocol == IPPROTO_UDP;
	at = p->l4 + (udp ? UDP_CHECK : TCP_CHECK);
	if (bpf_skb_load_bytes(skb, at, &before, 2) ||
	    bpf_l4_csum_replace(skb, at, 0, addresses, (udp ? BPF_F_MARK_MANGLED_0 : 0) | BPF_F_PSEUDO_HDR))
		return -1;
	ports = transport(skb, p);
	if (!ports)
		return -1;
	diff = fold32(diff16(p->flow.source_port, to->source_port) +
		      diff16(p->flow.destination_port, to->destination_port));
	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	check = udp ? ports + UDP_CHECK / 2 : ports + TCP_CHECK / 2;
	if ((void *)(check + 1) > (void *)(long)skb->data_end)
		return -1;
	if (unlikely(is_congruent(sum, 0))) /* it does not tell: leave it to the kernel */
		return (int)bpf_l4_csum_replace(skb, at, 0, diff, udp ? BPF_F_MARK_MANGLED_0 : 0);
	if (!is_congruent(*check, (__u16)~fold16((__u64)(__u16)~before + sum)))
		return 0;
	sum = (__u16)~fold16((__u64)(__u16) ~*check + diff);
	*check = udp && !sum ? 0xffff : sum;
	return 0;
}

/* Ports, and the checksum that covers them. */
INLINE int rewrite_transport(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 addresses)
{
	int udp = p->flow.protocol == IPPROTO_UDP;
	__be16 *ports = transport(skb, p);
	__u16 *check, sum;
	__u64 diff;

	if (!ports)
		return -1;
	check = udp ? ports + UDP_CHECK / 2 : ports + TCP_CHECK / 2;
	if ((void *)(check + 1) > (void *)(long)skb->data_end) /* for the verifiers of kernels before 6.4 */
		return -1;
	if (udp && !*check) {
		ports[0] = to->source_port;
		ports[1] = to->destination_port;
		return 0;
	}
	if (unlikely(may_be_partial(skb, p, *check)))
		return rewrite_unsure(skb, p, to, fold32(addresses));
	diff = addresses + diff16(p->flow.source_port, to->source_port) +
	       diff16(p->flow.destination_port, to->destination_port);
	sum = (__u16)~fold16((__u64)(__u16) ~*check + fold32(diff));
	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	*check = udp && !sum ? 0xffff : sum;
	/* The packet's bytes changed by what the pseudo header lost: so does a CHECKSUM_COMPLETE sum. */
	bpf_csum_update(skb, ~fold32(addresses));
	return 0;
}

/* Rewrite a TCP or UDP packet, or a further fragment of one (addresses only). Not 0: nothing or a part was done. */
INLINE int rewrite(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	__u64 addresses;

	if (p->version == 4)
		addresses = diff32(p->flow.source.words[3], to->source.words[3]) +
			    diff32(p->flow.destination.words[3], to->destination.words[3]);
	else
		addresses = diff_address(&p->flow.source, &to->source) +
			    diff_address(&p->flow.destination, &to->destination);
	if (likely(p->fragment != 2) && rewrite_transport(skb, p, to, addresses))
		return -1;
	return p->version == 4 ? rewrite_v4(skb, p, to, addresses) : rewrite_v6(skb, p, to, addresses);
}

#endif /* MESH_REWRITE_H */
