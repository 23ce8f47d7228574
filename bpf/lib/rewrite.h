/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses, ports and TTL changed in place, with checksums updated by difference (RFC 1624): what was wrong stays
 * wrong, what the sender left to offload stays so. Changes of the pseudo header are told apart from changes of the
 * covered bytes, which is what keeps CHECKSUM_PARTIAL and GSO packets right.
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

INLINE int rewrite_v4(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, __u64 diff)
{
	struct {
		__u8 ttl;
		__u8 protocol;
		__sum16 check;
		__be32 source;
		__be32 destination;
	} header = {
		.ttl = p->ttl - 1,
		.protocol = p->flow.protocol,
		.source = to->source.words[3],
		.destination = to->destination.words[3],
	};

	diff += diff16(bpf_htons((__u16)(p->ttl << 8)), bpf_htons((__u16)((p->ttl - 1) << 8)));
	header.check = (__sum16)~fold16((__u16)~p->check + diff);
	return (int)bpf_skb_store_bytes(skb, L3 + 8, &header, sizeof(header), 0);
}

INLINE int rewrite_v6(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	__u8 header[33];

	header[0] = p->ttl - 1;
	__builtin_memcpy(header + 1, &to->source, 16);
	__builtin_memcpy(header + 17, &to->destination, 16);
	/* No header checksum compensates in IPv6, so a CHECKSUM_COMPLETE sum has to follow. */
	return (int)bpf_skb_store_bytes(skb, L3 + 7, header, sizeof(header), BPF_F_RECOMPUTE_CSUM);
}

/* Rewrite a TCP or UDP packet, or a further fragment of one (addresses only). Not 0: nothing or a part was done. */
INLINE int rewrite(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	int udp = p->flow.protocol == IPPROTO_UDP;
	__u32 check = p->l4 + (udp ? UDP_CHECK : TCP_CHECK);
	__u64 flags = udp ? BPF_F_MARK_MANGLED_0 : 0;
	__u64 addresses, ports;
	int error;

	if (p->version == 4)
		addresses = diff32(p->flow.source.words[3], to->source.words[3]) +
			    diff32(p->flow.destination.words[3], to->destination.words[3]);
	else
		addresses = diff_address(&p->flow.source, &to->source) +
			    diff_address(&p->flow.destination, &to->destination);
	if (likely(p->fragment != 2)) {
		ports = diff16(p->flow.source_port, to->source_port) +
			diff16(p->flow.destination_port, to->destination_port);
		error = (int)bpf_l4_csum_replace(skb, check, 0, fold32(addresses), flags | BPF_F_PSEUDO_HDR);
		if (p->flow.source_port != to->source_port || p->flow.destination_port != to->destination_port) {
			error |= (int)bpf_l4_csum_replace(skb, check, 0, fold32(ports), flags);
			error |= (int)bpf_skb_store_bytes(skb, p->l4, &to->source_port, 4, 0);
		}
		if (unlikely(error))
			return error;
	}
	return p->version == 4 ? rewrite_v4(skb, p, to, addresses) : rewrite_v6(skb, p, to);
}

#endif /* MESH_REWRITE_H */
