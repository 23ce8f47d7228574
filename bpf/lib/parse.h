/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From bytes to a flow. Nothing here writes to the packet. Headers are read from the linear part only; `parse` pulls
 * them there if need be. */
#ifndef MESH_PARSE_H
#define MESH_PARSE_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "address.h"

#define L3               ((__u32)sizeof(struct ethhdr)) /* tagged frames are not served: their VLAN interface serves them */
#define HEADERS          128u                           /* bytes pulled into the linear part if need be */
#define V4_HEADER        ((__u32)sizeof(struct iphdr))
#define V6_HEADER        ((__u32)sizeof(struct ipv6hdr))
#define DEFAULT_TTL      64u /* of packets that programs make */
#define IP_DF            0x4000
#define IP_MORE          0x2000
#define IP_OFFSET        0x1fff
#define IP6_MORE         0x0001 /* of the fragment header */
#define IP6_OFFSET       0xfff8
#define TOS_DSCP         0xfc /* of the type of service: all but the ECN bits */
#define TCP_FIN          0x01
#define TCP_SYN          0x02
#define TCP_RST          0x04
#define TCP_ACK          0x10
#define TCP_FLAGS        13u /* offset in the TCP header */
#define PACKET_HOST      0u
#define PACKET_OTHERHOST 3u

/* ICMP and ICMPv6 (linux/icmp.h needs a C library). */
struct icmp {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 rest; /* unused, or the MTU of the next hop */
};

/* IPv6 fragment header. */
struct v6_fragment {
	__u8 next;
	__u8 reserved;
	__be16 place; /* offset, and whether more follow */
	__be32 id;
};

#define ICMP4_UNREACHABLE   3u
#define ICMP4_TOO_BIG       4u /* code of ICMP4_UNREACHABLE: fragmentation needed */
#define ICMP4_TIME_EXCEEDED 11u
#define ICMP4_PARAMETER     12u
#define ICMP6_UNREACHABLE   1u
#define ICMP6_TOO_BIG       2u
#define ICMP6_TIME_EXCEEDED 3u
#define ICMP6_PARAMETER     4u

enum parse_result {
	PARSE_OTHER,     /* not handled */
	PARSE_FLOW,      /* TCP or UDP with ports */
	PARSE_ICMP,      /* ICMP error: `flow` has the addresses only */
	PARSE_FRAGMENT,  /* fragment: likewise, and the ports of a first one */
	PARSE_EXTENSION, /* IPv6 extension header: likewise */
	PARSE_MALFORMED, /* likewise, and the ports if they could be read */
	PARSE_SHORT,     /* not in the linear part */
};

struct packet {
	struct mesh_flow flow;
	__u32 length; /* of the IP packet, headers included */
	__be32 fragment_id;
	__u16 l4;     /* offset of the transport header in the frame */
	__u8 version; /* 4 or 6 */
	__u8 ttl;
	__u8 tcp_flags;
	__u8 fragment; /* 0: whole, 1: first, 2: later fragment */
	__sum16 check; /* of the IPv4 header */
	__u8 dont_fragment;
	__u8 tos;  /* IPv4: without the ECN bits */
	__u16 mtu; /* that it exceeds, where it is rejected as too big */
	__u16 pad2[2];
};

/* The addresses and ports that a packet is to get. */
struct tuple {
	struct mesh_addr source;
	struct mesh_addr destination;
	__be16 source_port;
	__be16 destination_port;
	__u16 flags; /* MESH_REVNAT_* of the entry */
	__u16 pad;
};

INLINE __u32 header_length(const struct packet *p)
{
	return p->version == 4 ? V4_HEADER : V6_HEADER;
}

/* The ports of a transport header that is cut off, for source rules: other fragments may have the rest of it. */
INLINE enum parse_result parse_ports(struct packet *p, __be16 *ports, void *end, __u32 rest)
{
	if (rest < 2 * sizeof(*ports))
		return PARSE_MALFORMED;
	if ((void *)(ports + 2) > end)
		return PARSE_SHORT;
	p->flow.source_port = ports[0];
	p->flow.destination_port = ports[1];
	return PARSE_MALFORMED;
}

/* Ports and flags of the transport header at `l4`. `rest`: bytes of the IP packet from there on. */
INLINE enum parse_result parse_l4(struct packet *p, void *l4, void *end, __u32 rest)
{
	if (p->flow.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if (unlikely(rest < sizeof(*tcp)))
			return parse_ports(p, l4, end, rest);
		if ((void *)(tcp + 1) > end)
			return PARSE_SHORT;
		p->flow.source_port = tcp->source;
		p->flow.destination_port = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[TCP_FLAGS];
		return tcp->doff * 4u >= sizeof(*tcp) && tcp->doff * 4u <= rest ? PARSE_FLOW : PARSE_MALFORMED;
	}
	struct udphdr *udp = l4;

	if (rest < sizeof(*udp))
		return PARSE_MALFORMED;
	if ((void *)(udp + 1) > end)
		return PARSE_SHORT;
	p->flow.source_port = udp->source;
	p->flow.destination_port = udp->dest;
	return PARSE_FLOW;
}

INLINE int icmp_error_v4(__u8 type)
{
	return type == ICMP4_UNREACHABLE || type == ICMP4_TIME_EXCEEDED || type == ICMP4_PARAMETER;
}

/* Likewise of a first fragment. */
INLINE enum parse_result parse_first_fragment(struct packet *p, void *l4, void *end, __u32 rest)
{
	enum parse_result result = parse_l4(p, l4, end, rest);

	return result == PARSE_FLOW ? PARSE_FRAGMENT : result;
}

INLINE enum parse_result parse_v4(struct packet *p, void *data, void *end, __u32 available)
{
	struct iphdr *ip = data + L3;
	__u32 header, offset;
	__u8 protocol;
	void *l4;

	if ((void *)(ip + 1) > end)
		return PARSE_SHORT;
	header = ip->ihl * 4u;
	protocol = ip->protocol;
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_ICMP)
		return PARSE_OTHER;
	p->flow.protocol = protocol;
	p->length = bpf_ntohs(ip->tot_len);
	p->version = 4;
	p->ttl = ip->ttl;
	p->check = ip->check;
	p->tos = ip->tos & TOS_DSCP;
	p->l4 = (__u16)(L3 + header);
	if (unlikely(ip->version != 4 || header < sizeof(*ip) || p->length < header || p->length > available))
		return PARSE_OTHER;
	offset = bpf_ntohs(ip->frag_off);
	p->dont_fragment = (offset & IP_DF) != 0;
	if (unlikely(offset & (IP_MORE | IP_OFFSET))) {
		p->fragment = offset & IP_OFFSET ? 2 : 1;
		p->fragment_id = ip->id;
	}
	address_v4(&p->flow.source, ip->saddr);
	address_v4(&p->flow.destination, ip->daddr);
	l4 = (void *)ip + header;
	if (protocol == IPPROTO_ICMP) {
		struct icmp *icmp = l4;

		if (p->fragment || p->length - header < sizeof(*icmp))
			return PARSE_OTHER;
		if ((void *)(icmp + 1) > end)
			return PARSE_SHORT;
		return icmp_error_v4(icmp->type) ? PARSE_ICMP : PARSE_OTHER;
	}
	if (unlikely(p->fragment))
		return p->fragment == 2 ? PARSE_FRAGMENT : parse_first_fragment(p, l4, end, p->length - header);
	return parse_l4(p, l4, end, p->length - header);
}

INLINE int is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_FRAGMENT ||
	       next == IPPROTO_DSTOPTS || next == IPPROTO_AH || next == IPPROTO_MH;
}

/* A fragment of a TCP or UDP packet whose fragment header comes first. Atomic fragments (RFC 6946), those of other
 * protocols, and first ones that have no ports (RFC 7112) are packets with an extension header like any other. */
INLINE enum parse_result parse_v6_fragment(struct packet *p, void *data, void *end)
{
	__u32 headers = V6_HEADER + (__u32)sizeof(struct v6_fragment);
	struct v6_fragment *head = data;
	__u16 place;

	if (p->length < headers)
		return PARSE_EXTENSION;
	if ((void *)(head + 1) > end)
		return PARSE_SHORT;
	place = bpf_ntohs(head->place);
	if ((head->next != IPPROTO_TCP && head->next != IPPROTO_UDP) || !(place & (IP6_MORE | IP6_OFFSET)))
		return PARSE_EXTENSION;
	if (!(place & IP6_OFFSET) && p->length < headers + sizeof(struct udphdr))
		return PARSE_EXTENSION;
	p->flow.protocol = head->next;
	p->fragment_id = head->id;
	p->fragment = place & IP6_OFFSET ? 2 : 1;
	p->l4 = (__u16)(L3 + headers);
	return p->fragment == 2 ? PARSE_FRAGMENT : parse_first_fragment(p, head + 1, end, p->length - headers);
}

INLINE enum parse_result parse_v6(struct packet *p, void *data, void *end, __u32 available)
{
	struct ipv6hdr *ip = data + L3;
	__u8 next;

	if ((void *)(ip + 1) > end)
		return PARSE_SHORT;
	next = ip->nexthdr;
	p->flow.protocol = next;
	p->length = bpf_ntohs(ip->payload_len) + (__u32)sizeof(*ip);
	p->version = 6;
	p->dont_fragment = 1;
	p->ttl = ip->hop_limit;
	p->l4 = (__u16)(L3 + sizeof(*ip));
	if (unlikely(ip->version != 6 || p->length > available))
		return PARSE_OTHER;
	__builtin_memcpy(&p->flow.source, &ip->saddr, 16);
	__builtin_memcpy(&p->flow.destination, &ip->daddr, 16);
	if (is_v4(&p->flow.source) || is_v4(&p->flow.destination)) /* mapped addresses are not valid on the wire */
		return PARSE_OTHER;
	if (next == IPPROTO_ICMPV6) {
		struct icmp *icmp = (void *)(ip + 1);

		if (p->length < sizeof(*ip) + sizeof(*icmp))
			return PARSE_OTHER;
		if ((void *)(icmp + 1) > end)
			return PARSE_SHORT;
		return icmp->type >= ICMP6_UNREACHABLE && icmp->type <= ICMP6_PARAMETER ? PARSE_ICMP : PARSE_OTHER;
	}
	if (next == IPPROTO_FRAGMENT)
		return parse_v6_fragment(p, ip + 1, end);
	if (is_extension(next))
		return PARSE_EXTENSION;
	if (next != IPPROTO_TCP && next != IPPROTO_UDP)
		return PARSE_OTHER;
	return parse_l4(p, ip + 1, end, p->length - (__u32)sizeof(*ip));
}

INLINE enum parse_result parse_linear(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	__builtin_memset(p, 0, sizeof(*p));
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_v4(p, data, end, skb->len - L3);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return parse_v6(p, data, end, skb->len - L3);
	return PARSE_OTHER;
}

/* Parse an Ethernet frame. A tagged frame is PARSE_OTHER: the VLAN's interface sees it again without the tag (VLAN 0,
 * a priority tag, counts as untagged). */
INLINE enum parse_result parse(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result result;

	if (skb->len < L3 || (skb->vlan_present && (skb->vlan_tci & 0xfff)))
		return PARSE_OTHER;
	result = parse_linear(skb, p);
	if (likely(result != PARSE_SHORT))
		return result;
	if (bpf_skb_pull_data(skb, skb->len < HEADERS ? skb->len : HEADERS))
		return PARSE_OTHER;
	result = parse_linear(skb, p);
	return result == PARSE_SHORT ? PARSE_OTHER : result;
}

#endif /* MESH_PARSE_H */
