/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Rejections are made out of the packet that they answer: TCP reset (RFC 9293, 3.10.7.1), ICMP and ICMPv6 errors (RFC
 * 792, 1812, 4443). They leave by the interface where the packet came in.
 *
 * An error quotes the IP header and the start of the transport header. Where the sender left the packet's checksum to
 * offload (CHECKSUM_PARTIAL: containers, virtual machines) it stays so, and sums account for what will be filled in
 * later. */
#ifndef MESH_REJECT_H
#define MESH_REJECT_H

#include "csum.h"
#include "metrics.h"
#include "scratch.h"

#define ERROR_BURST 50u
#define QUOTED_MOST 4096u /* bytes more than the quote: what bpf_skb_adjust_room takes */

/* Swap the Ethernet addresses, and write an IP header from the flow's destination to its source. */
INLINE int swap_headers(struct __sk_buff *skb, const struct packet *p, __u32 length, __u8 protocol)
{
	__u8 macs[12], swapped[12];

	if (bpf_skb_load_bytes(skb, 0, macs, 12))
		return -1;
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	if (bpf_skb_store_bytes(skb, 0, swapped, 12, 0))
		return -1;
	if (p->version == 4) {
		__be16 words[10] = {
			bpf_htons(0x4500), bpf_htons((__u16)(V4_HEADER + length)),          0,
			bpf_htons(IP_DF),  bpf_htons((__u16)(DEFAULT_TTL << 8 | protocol)),
		};
		__u64 sum = 0;

		__builtin_memcpy(words + 6, &p->flow.destination.words[3], 4);
		__builtin_memcpy(words + 8, &p->flow.source.words[3], 4);
		for (int i = 0; i < 10; i++)
			sum += words[i];
		words[5] = (__be16)~fold16(sum);
		return (int)bpf_skb_store_bytes(skb, L3, words, sizeof(words), 0);
	}
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons((__u16)length),
		.nexthdr = protocol,
		.hop_limit = DEFAULT_TTL,
	};

	__builtin_memcpy(&ip.saddr, &p->flow.destination, 16);
	__builtin_memcpy(&ip.daddr, &p->flow.source, 16);
	return (int)bpf_skb_store_bytes(skb, L3, &ip, sizeof(ip), 0);
}

/* A reset as long as the segment that it answers: a packet with the marks of a tunnel (encap_room) cannot be
 * shortened. Resets may carry data, which nobody reads (RFC 9293, 3.5.2). */
INLINE int reset_in_place(struct __sk_buff *skb, const struct packet *p, struct tcphdr *got, struct tcphdr *tcp)
{
	__u32 diff;

	if (skb->gso_size)
		return -1;
	tcp->check = got->check;
	diff = (__u32)bpf_csum_diff((void *)got, sizeof(*got), (void *)tcp, sizeof(*tcp), 0);
	if (bpf_skb_store_bytes(skb, p->l4, tcp, sizeof(*tcp), 0) ||
	    bpf_l4_csum_replace(skb, p->l4 + TCP_CHECK, 0, diff, 0))
		return -1;
	return swap_headers(skb, p, p->length - header_length(p), IPPROTO_TCP);
}

/* The reset that a TCP segment gets from a port where nobody listens. */
INLINE int make_reset(struct __sk_buff *skb, const struct packet *p)
{
	struct tcphdr got, tcp = {};
	__sum16 check;
	__u32 length;
	__u64 sum;
	int partial;

	if (bpf_skb_load_bytes(skb, p->l4, &got, sizeof(got)))
		return -1;
	length = p->length - header_length(p) - got.doff * 4u + got.syn + got.fin;
	tcp.source = got.dest;
	tcp.dest = got.source;
	tcp.doff = 5;
	tcp.rst = 1;
	if (got.ack) {
		tcp.seq = got.ack_seq;
	} else {
		tcp.ack_seq = bpf_htonl(bpf_ntohl(got.seq) + length);
		tcp.ack = 1;
	}
	if (bpf_skb_change_tail(skb, p->l4 + (__u32)sizeof(tcp), 0))
		return reset_in_place(skb, p, &got, &tcp);
	partial = csum_is_partial(skb, p->l4 + TCP_CHECK, &check);
	if (partial < 0)
		return -1;
	sum = pseudo_sum(p, sizeof(tcp), IPPROTO_TCP);
	if (!partial)
		sum += fold32((__u64)tcp.seq + tcp.ack_seq + (__u32)bpf_csum_diff(NULL, 0, (void *)&tcp.source, 4, 0) +
			      (__u32)bpf_csum_diff(NULL, 0, (void *)&tcp + 12, 4, 0));
	tcp.check = partial ? fold16(fold32(sum)) : (__sum16)~fold16(fold32(sum));
	if (bpf_skb_store_bytes(skb, p->l4, &tcp, sizeof(tcp), 0))
		return -1;
	return swap_headers(skb, p, sizeof(tcp), IPPROTO_TCP);
}

/* Sum of the quoted bytes as they will be on the wire. `at`: offset of the quoted IP header. */
INLINE int quoted_sum(struct __sk_buff *skb, const struct packet *p, __u32 at, __u64 *sum)
{
	__u32 header = header_length(p), l4 = at + header;
	int tcp = p->flow.protocol == IPPROTO_TCP, partial;
	__be32 words[15] = {};
	__sum16 check;

	partial = csum_is_partial(skb, l4 + (tcp ? TCP_CHECK : UDP_CHECK), &check);
	if (partial < 0)
		return -1;
	if (p->version == 4 ? bpf_skb_load_bytes(skb, at, words, V4_HEADER)
			    : bpf_skb_load_bytes(skb, at, words, V6_HEADER))
		return -1;
	*sum = (__u32)bpf_csum_diff(NULL, 0, words, V6_HEADER, 0); /* zeros behind an IPv4 header */
	if (partial) {
		*sum += (__u16)~check; /* what was stored, once the rest is added and the complement filled in */
		return 0;
	}
	__builtin_memset(words, 0, sizeof(words));
	if (tcp ? bpf_skb_load_bytes(skb, l4, words, sizeof(struct tcphdr))
		: bpf_skb_load_bytes(skb, l4, words, sizeof(struct udphdr)))
		return -1;
	*sum += (__u32)bpf_csum_diff(NULL, 0, words, sizeof(struct tcphdr), 0);
	return 0;
}

/* Leave `quote` bytes of the packet. A packet with the marks of a tunnel (encap_room) cannot be shortened: what it
 * loses is behind the Ethernet header, and the quote is written anew. */
INLINE int cut_to_quote(struct __sk_buff *skb, __u32 quote)
{
	__u32 zero = 0, more = skb->len - L3 - quote;
	struct tcp_options *w;

	if (likely(!bpf_skb_change_tail(skb, L3 + quote, 0)))
		return 0;
	w = bpf_map_lookup_elem(&scratch_tcp, &zero);
	if (!w || skb->gso_size || more < 8 || more > QUOTED_MOST)
		return -1;
	asm volatile("" : "+r"(quote)); /* kernels before 6.3 do not see through what the compiler makes of it */
	quote = ((quote - 1) & (sizeof(w->options) - 1)) + 1;
	/* A checksum that is left to offload is forgotten once it is gone; before Linux 6.2 by the next change. */
	return bpf_skb_load_bytes(skb, L3, w->options, quote) ||
	       bpf_skb_adjust_room(skb, -(__s32)(more - 8), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_adjust_room(skb, -8, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_store_bytes(skb, L3, w->options, quote, BPF_F_RECOMPUTE_CSUM);
}

/* An ICMP error about the packet. `type` and `code` are those of the packet's IP version; `mtu`: where it is too big.
 */
INLINE int make_icmp_error(struct __sk_buff *skb, const struct packet *p, __u8 type, __u8 code, __u32 mtu)
{
	__u32 header = header_length(p), room = header + (__u32)sizeof(struct icmp);
	__u32 quote = header + (p->flow.protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : sizeof(struct udphdr));
	__u8 protocol = p->version == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	__u32 length = quote + (__u32)sizeof(struct icmp);
	struct icmp icmp = {.type = type, .code = code, .rest = bpf_htonl(mtu)};
	__u64 sum = 0;

	if (cut_to_quote(skb, quote) || bpf_skb_adjust_room(skb, (__s32)room, BPF_ADJ_ROOM_MAC, 0) ||
	    quoted_sum(skb, p, L3 + room, &sum))
		return -1;
	sum += (__u64)bpf_htons((__u16)(type << 8 | code)) + icmp.rest;
	if (p->version == 6)
		sum += pseudo_sum(p, length, protocol);
	icmp.check = (__sum16)~fold16(fold32(sum));
	if (bpf_skb_store_bytes(skb, L3 + header, &icmp, sizeof(icmp), 0))
		return -1;
	return swap_headers(skb, p, length, protocol);
}

/* Whether the packet may be answered at all: whole, without IP options, no error, no reset. */
INLINE int may_reject(const struct packet *p)
{
	return (p->flow.protocol == IPPROTO_TCP || p->flow.protocol == IPPROTO_UDP) && !p->fragment &&
	       p->l4 == L3 + header_length(p) && !(p->tcp_flags & TCP_RST);
}

#define REJECT_RESET       0 /* TCP reset, for UDP port unreachable */
#define REJECT_UNREACHABLE 1
#define REJECT_EXPIRED     2
#define REJECT_TOO_BIG     3 /* for more than p->mtu bytes */

INLINE int rejection_for(__u32 name)
{
	if (name == MESH_VERDICT_TUNNEL_TOO_BIG || name == MESH_VERDICT_TOO_BIG)
		return REJECT_TOO_BIG;
	return name == MESH_VERDICT_EXPIRED ? REJECT_EXPIRED : REJECT_RESET;
}

INLINE int make_icmp_error_v4(struct __sk_buff *skb, const struct packet *p, int what)
{
	int big = what == REJECT_TOO_BIG, expired = what == REJECT_EXPIRED;

	return make_icmp_error(skb, p, expired ? ICMP4_TIME_EXCEEDED : ICMP4_UNREACHABLE,
			       expired ? 0 : (big ? ICMP4_TOO_BIG : 3), big ? p->mtu : 0);
}

INLINE int make_icmp_error_v6(struct __sk_buff *skb, const struct packet *p, int what)
{
	int big = what == REJECT_TOO_BIG, expired = what == REJECT_EXPIRED;

	return make_icmp_error(skb, p, big ? ICMP6_TOO_BIG : (expired ? ICMP6_TIME_EXCEEDED : ICMP6_UNREACHABLE),
			       big || expired ? 0 : 4, big ? p->mtu : 0);
}

/* As the kernel does (icmp_msgs_per_sec, icmp_msgs_burst), but per CPU and without a lock: each error uses up its part
 * of a second, and at most ERROR_BURST such parts are taken in advance. */
INLINE int icmp_rate_allows(void)
{
	__u64 now, part, *until;
	struct mesh_config *node = config();
	__u32 zero = 0;

	until = bpf_map_lookup_elem(&mesh_icmp_limit, &zero);
	if (!until || !node || !node->error_rate)
		return 1;
	now = bpf_ktime_get_ns();
	part = 1000000000u / node->error_rate;
	if (*until < now)
		*until = now;
	if (*until - now > (ERROR_BURST - 1) * part)
		return 0;
	*until += part;
	return 1;
}

/* Turn the packet into an answer to its sender. Not 0: drop it, it is spoilt, or (1) the rate limit is reached. */
RARE int make_rejection(struct __sk_buff *skb, struct packet *p, int what)
{
	if (!p || !may_reject(p))
		return -1;
	if (what == REJECT_RESET && p->flow.protocol == IPPROTO_TCP)
		return make_reset(skb, p);
	if (!icmp_rate_allows())
		return 1;
	return p->version == 4 ? make_icmp_error_v4(skb, p, what) : make_icmp_error_v6(skb, p, what);
}

/* Send the packet back as a rejection; what cannot be answered is dropped. */
INLINE int reject(struct __sk_buff *skb, struct packet *p, int rejection)
{
	__u32 name = (__u32)(-2 - rejection);
	int failed = make_rejection(skb, p, rejection_for(name));

	if (failed > 0)
		return verdict(MESH_VERDICT_RATE_LIMITED, TC_ACT_SHOT);
	if (failed)
		return verdict(name == MESH_VERDICT_REJECTED ? MESH_VERDICT_NO_BACKEND : name, TC_ACT_SHOT);
	count_verdict(name);
	return (int)bpf_redirect(skb->ifindex, 0);
}

#endif /* MESH_REJECT_H */
