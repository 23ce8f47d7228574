/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where tasks' packets come out: tc ingress of the host side of every local container's interface. A reply gets the
 * called address back as its source; anything else may be a call of a port of this node. */
#define MESH_PROVES
#include "lib/tunnel_reply.h"

#define MTU_SAFE 1280u /* every interface that carries IPv6 takes this much: a smaller packet needs no check */

int mesh_tunnel_reply(struct __sk_buff *skb);
int mesh_task_early(struct __sk_buff *skb);
int mesh_task(struct __sk_buff *skb);

/* Programs that mesh_task continues in, by CALL_*. The kernel empties the map when nobody holds or pins it. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, TASK_CALLS);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} mesh_task_calls SEC(".maps") = {.values = {
					  [CALL_TUNNEL_REPLY] = (void *)&mesh_tunnel_reply,
					  [CALL_TASK_EARLY] = (void *)&mesh_task_early,
					  [CALL_TASK] = (void *)&mesh_task,
				  }};

/* Whether a reply, or one of the segments it will be cut into, exceeds the MTU of its interface. Only the kernel's own
 * path tells the task so: such a packet is passed to it as it is. The helper counts an Ethernet header that some
 * interfaces do not have. */
static __noinline int is_too_big(struct __sk_buff *skb, const struct packet *p, __u32 ifindex)
{
	__u32 mtu = 0;

	if (bpf_check_mtu(skb, ifindex, &mtu, 0, skb->gso_size ? BPF_MTU_CHK_SEGS : 0) <= 0)
		return 0;
	return skb->gso_size || p->length > mtu;
}

/* A reply, with the called address as its source, straight to the interface where the packets of the client come in.
 */
static __noinline int forward_reply(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply)
{
	struct tuple to = {
		.source = reply->called,
		.destination = reply->client,
		.source_port = reply->called_port,
		.destination_port = client_port(reply, p->flow.destination_port),
	};
	__u32 ifindex = reply->ifindex, peer = reply->flags & MESH_REVNAT_PEER;

	if (unlikely(p->ttl <= 1))
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	if (!peer && unlikely(p->length > MTU_SAFE) && is_too_big(skb, p, ifindex)) {
		count_failed_start(p, reply->frontend, FAILURE(too_big));
		return verdict(MESH_VERDICT_TOO_BIG, p->dont_fragment ? TC_ACT_UNSPEC : TC_ACT_SHOT);
	}
	if (unlikely(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) && reply_changes_state(skb, p, reply))
		return verdict(MESH_VERDICT_RESET_HELD, TC_ACT_SHOT);
	count_out(reply->frontend, reply->owner, p->length);
	if (unlikely(rewrite(skb, p, &to)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_REPLY);
	if (likely(!peer))
		return fib_send(skb, p, &to.source, &to.destination, ifindex);
	return deliver_to_client(skb, ifindex, peer);
}

/* An error of a task about a packet that a client sent. -1: not about a flow that we forward. */
RARE int forward_task_icmp(struct __sk_buff *skb, struct packet *p)
{
	struct icmp_work *w = icmp_work();
	struct mesh_revnat *reply;
	__u32 ifindex, peer;

	if (!p || !w)
		return -1;
	reply = revnat_of_task_error(skb, p, w);
	if (!reply || !is_from_task(skb, reply))
		return -1;
	ifindex = reply->ifindex;
	if (ifindex & MESH_REVNAT_NODE)
		return TAIL_CALL(CALL_TUNNEL_REPLY);
	peer = reply->flags & MESH_REVNAT_PEER;
	if (translate_to_client(skb, p, w, reply))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	count_verdict(MESH_VERDICT_ICMP_OUT);
	return deliver_to_client(skb, ifindex, peer);
}

/* A container calls a port of this node. */
static __noinline int forward_call(struct __sk_buff *skb, struct packet *p)
{
	return p ? forward_flow(skb, p, FROM_TASK) : TC_ACT_UNSPEC;
}

/* A task's packet: a reply to its client, or a container's call of a port of its own node. */
SEC("tc")
int mesh_task(struct __sk_buff *skb)
{
	enum parse_result result;
	struct mesh_revnat *reply;
	struct packet p;
	int action;

	result = parse(skb, &p);
	if (unlikely(result == PARSE_FRAGMENT) && complete(&p, &result, 1)) {
		bpf_tail_call(skb, &mesh_task_calls, CALL_TASK_EARLY);
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	}
	if (likely(result == PARSE_FLOW)) {
		reply = revnat_lookup(skb, &p);
		if (unlikely(reply && !is_from_task(skb, reply)))
			return verdict(MESH_VERDICT_FOREIGN_REPLY, TC_ACT_SHOT);
		if (likely(reply && !(reply->ifindex & MESH_REVNAT_NODE)))
			return forward_reply(skb, &p, reply);
		if (!reply) {
			action = forward_call(skb, &p);
			return IS_REJECT(action) ? reject(skb, &p, action) : action;
		}
		bpf_tail_call(skb, &mesh_task_calls, CALL_TUNNEL_REPLY);
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	}
	if (result == PARSE_OTHER)
		return TC_ACT_UNSPEC;
	if (result != PARSE_ICMP)
		return pass_without_ports(skb, &p, result);
	action = forward_task_icmp(skb, &p);
	if (action == TAIL_CALL(CALL_TUNNEL_REPLY))
		bpf_tail_call(skb, &mesh_task_calls, CALL_TUNNEL_REPLY);
	return action >= 0 ? action : forward_icmp(skb, &p, FROM_TASK);
}

/* A task's reply to a client that called another node: to that node through the tunnel, or straight to the client. */
SEC("tc")
int mesh_tunnel_reply(struct __sk_buff *skb)
{
	struct reply_path d = {};
	enum parse_result result;
	struct mesh_revnat *reply;
	struct packet p;
	int action;

	result = parse(skb, &p);
	if (result == PARSE_ICMP) {
		action = prepare_icmp(skb, &p, &d);
		return action ? action : send_reply(skb, &p, &d, MESH_VERDICT_ICMP_OUT);
	}
	if (result != PARSE_FLOW && (result != PARSE_FRAGMENT || fragment_ports(&p, 1)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	reply = revnat_lookup(skb, &p);
	if (!reply || !(reply->ifindex & MESH_REVNAT_NODE))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	action = prepare_reply(skb, &p, reply, &d);
	if (IS_REJECT(action))
		return reject(skb, &p, action);
	return action ? action : send_reply(skb, &p, &d, MESH_VERDICT_TUNNEL_REPLY_TX);
}

/* A task's fragment that came before its first one is kept; a first one has those that came before it come in again. */
SEC("tc")
int mesh_task_early(struct __sk_buff *skb)
{
	struct packet p;
	int action;

	if (parse(skb, &p) != PARSE_FRAGMENT)
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	action = early_fragment(skb, &p, 1);
	if (action != EARLY_GO_ON)
		return action;
	bpf_tail_call(skb, &mesh_task_calls, CALL_TASK);
	return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
}
