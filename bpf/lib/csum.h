/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Checksums: one's complement sums in the byte order of the packet (RFC 1071), changed by difference (RFC 1624). */
#ifndef MESH_CSUM_H
#define MESH_CSUM_H

#include "parse.h"

#define TCP_CHECK 16u
#define UDP_CHECK 6u

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

/* Of both addresses, by the helper: the stack has no room for the sums of eight words and eight. */
INLINE __u64 diff_addresses(const struct mesh_flow *from, const struct tuple *to)
{
	return (__u32)bpf_csum_diff((void *)&from->source, 32, (void *)&to->source, 32, 0);
}

/* Whether two sums are the same number: 0 and 0xffff are. */
INLINE int csum_equal(__u16 a, __u16 b)
{
	return (a == 0xffff ? 0 : a) == (b == 0xffff ? 0 : b);
}

INLINE __u64 sum_address(const struct mesh_addr *a)
{
	return (__u64)a->words[0] + a->words[1] + a->words[2] + a->words[3];
}

/* Sum of the pseudo header from the flow's destination to its source (the 0xffff of IPv4-mapped addresses adds
 * nothing). */
INLINE __u64 pseudo_sum(const struct packet *p, __u32 length, __u8 protocol)
{
	return sum_address(&p->flow.source) + sum_address(&p->flow.destination) + bpf_htonl(length) +
	       bpf_htonl(protocol);
}

/* The IPv4 header's checksum after a change of addresses, given as their difference, and one hop less. */
INLINE __sum16 next_header_csum(const struct packet *p, __u64 addresses)
{
	addresses += diff16(bpf_htons((__u16)(p->ttl << 8)), bpf_htons((__u16)((p->ttl - 1) << 8)));
	return (__sum16)~fold16((__u16)~p->check + addresses);
}

/* Whether the checksum at `offset` is left to offload (CHECKSUM_PARTIAL): then a change of the covered bytes does not
 * change it. Returns -1 on failure. */
INLINE int csum_is_partial(struct __sk_buff *skb, __u32 offset, __sum16 *check)
{
	__sum16 after = 0;

	if (bpf_skb_load_bytes(skb, offset, check, 2) || bpf_l4_csum_replace(skb, offset, 0, bpf_htons(1), 2) ||
	    bpf_skb_load_bytes(skb, offset, &after, 2))
		return -1;
	if (after == *check)
		return 1;
	return bpf_skb_store_bytes(skb, offset, check, 2, 0) ? -1 : 0;
}

#endif /* MESH_CSUM_H */
