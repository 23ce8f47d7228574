/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where tasks' packets come out: tc ingress of the host side of every local container's interface. A reply gets the
 * called address back as its source; anything else may be a call of a port of this node. */
#define MESH_PROVES
#include "lib/tunnel_reply.h"

#define MTU_SAFE 1280u /* every interface that carries IPv6 takes this much: a smaller packet needs no check */

int mesh_tunnel_reply(struct __sk_buff *skb);
int mesh_task_cut(struct __sk_buff *skb);

/* Programs that mesh_task continues in, by CALL_*. The kernel empties the map when nobody holds or pins it. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, TASK_CALLS);
	__uint(key_size, sizeof(__u32));
	__array(values, int(void *));
} mesh_task_calls SEC(".maps") = {.values = {
					  [CALL_TUNNEL_REPLY] = (void *)&mesh_tunnel_reply,
					  [CALL_TASK_CUT] = (void *)&mesh_task_cut,
				  }};

/* The MTU of its interface that a reply, or one of the segments it will be cut into, exceeds; 0: it does not. The
 * helper counts an Ethernet header that some interfaces do not have. */
static __noinline __u32 exceeded_mtu(struct __sk_buff *skb, const struct packet *p, __u32 ifindex)
{
	__u32 mtu = 0;

	if (bpf_check_mtu(skb, ifindex, &mtu, 0, skb->gso_size ? BPF_MTU_CHK_SEGS : 0) <= 0)
		return 0;
	return skb->gso_size || p->length > mtu ? mtu : 0;
}

/* A reply that is larger than its interface takes is cut if it may be. Else only the kernel's own path tells the task:
 * such a packet is passed to it as it is. */
static __noinline int reply_too_big(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply, __u32 mtu)
{
	if (!p || !reply)
		return TC_ACT_SHOT;
	if (is_cuttable(skb, p, mtu))
		return fragmenter_call(skb, mtu, 0, CALL_TASK_CUT);
	count_failed_start(p, reply->frontend, FAILURE(too_big));
	return verdict(MESH_VERDICT_TOO_BIG, p->dont_fragment ? TC_ACT_UNSPEC : TC_ACT_SHOT);
}

/* A reply, with the called address as its source, straight to the interface where the packets of the client come in.
 * Returns an action or a TAIL_CALL. */
static __noinline int forward_reply(struct __sk_buff *skb, struct packet *p, struct mesh_revnat *reply)
{
	struct tuple to = {
		.source = reply->called,
		.destination = reply->client,
		.source_port = reply->called_port,
		.destination_port = client_port(reply, p->flow.destination_port),
	};
	__u32 ifindex = reply->ifindex, peer = reply->flags & MESH_REVNAT_PEER, mtu;

	if (unlikely(p->ttl <= 1))
		return verdict(MESH_VERDICT_EXPIRED, TC_ACT_SHOT);
	mtu = !peer && unlikely(p->length > MTU_SAFE) ? exceeded_mtu(skb, p, ifindex) : 0;
	if (unlikely(mtu))
		return reply_too_big(skb, p, reply, mtu);
	if (unlikely(p->fragment == 1))
		fragment_store(p);
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
	if (unlikely(result == PARSE_FRAGMENT) && complete(&p, &result))
		return verdict(MESH_VERDICT_NO_PORTS, TC_ACT_SHOT);
	if (likely(result == PARSE_FLOW)) {
		reply = revnat_lookup(skb, &p);
		if (unlikely(reply && !is_from_task(skb, reply)))
			return verdict(MESH_VERDICT_FOREIGN_REPLY, TC_ACT_SHOT);
		if (likely(reply && !(reply->ifindex & MESH_REVNAT_NODE))) {
			action = forward_reply(skb, &p, reply);
			if (likely(action != TAIL_CALL(CALL_TASK_CUT)))
				return action;
			bpf_tail_call(skb, &mesh_task_calls, CALL_TASK_CUT);
			return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
		}
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
	if (result != PARSE_FLOW && (result != PARSE_FRAGMENT || fragment_ports(&p)))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	reply = revnat_lookup(skb, &p);
	if (!reply || !(reply->ifindex & MESH_REVNAT_NODE))
		return verdict(MESH_VERDICT_ERROR, TC_ACT_UNSPEC);
	action = prepare_reply(skb, &p, reply, &d);
	if (unlikely(action == TAIL_CALL(CALL_TASK_CUT))) {
		bpf_tail_call(skb, &mesh_task_calls, CALL_TASK_CUT);
		return verdict(MESH_VERDICT_ERROR, TC_ACT_SHOT);
	}
	if (IS_REJECT(action))
		return reject(skb, &p, action);
	return action ? action : send_reply(skb, &p, &d, MESH_VERDICT_TUNNEL_REPLY_TX);
}

/* A task's reply without DF that is larger than its way takes: its fragments come in instead. */
SEC("tc")
int mesh_task_cut(struct __sk_buff *skb)
{
	return fragmenter_run(skb);
}
