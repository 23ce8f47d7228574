/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Optional first stage, on network cards only: drops what source rules deny before the kernel allocates an skb for it.
 * It makes no other decision, and none that differs from mesh_ingress, which runs after it. */
#include "lib/lb.h"
#include "lib/metrics.h"
#include "lib/parse.h"

#define MULTICAST 0x01 /* of the first byte of a MAC address */

/* The flow of an untagged unicast frame that is no fragment. XDP does not know the MAC address of the interface; frames
 * for another host reach promiscuous interfaces only. */
INLINE enum parse_result parse_frame(struct xdp_md *xdp, struct packet *p)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct ethhdr *ether = data;
	enum parse_result result = PARSE_OTHER;
	__u32 available;

	if ((void *)(ether + 1) > end || (ether->h_dest[0] & MULTICAST))
		return PARSE_OTHER;
	__builtin_memset(p, 0, sizeof(*p));
	available = (__u32)bpf_xdp_get_buff_len(xdp) - L3;
	if (ether->h_proto == bpf_htons(ETH_P_IP))
		result = parse_v4(NULL, p, data, end, available);
	else if (ether->h_proto == bpf_htons(ETH_P_IPV6))
		result = parse_v6(NULL, p, data, end, available);
	return unlikely(p->fragment) ? PARSE_FRAGMENT : result;
}

/* A packet from a denied source: dropped by the driver. Of a frame in several buffers (jumbo frames) the first one has
 * the headers. */
SEC("xdp.frags")
int mesh_xdp(struct xdp_md *xdp)
{
	struct mesh_frontend *frontend;
	struct packet p;
	__u32 word, id;

	if (parse_frame(xdp, &p) != PARSE_FLOW)
		return XDP_PASS;
	word = port_word(p.flow.protocol, p.flow.destination_port);
	if (likely(!word))
		return XDP_PASS;
	id = find_frontend(&p.flow, word);
	frontend = id ? bpf_map_lookup_elem(&mesh_frontends, &id) : NULL;
	if (!frontend || likely(!frontend->acl && !(frontend->flags & MESH_FRONTEND_DENY)))
		return XDP_PASS;
	if (!is_denied(frontend, &p.flow.source))
		return XDP_PASS;
	count_failed_start(&p, id, FAILURE(denied));
	count_verdict(MESH_VERDICT_DENIED);
	return XDP_DROP;
}
