/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Processes of this node that call a published port of it: the socket is connected straight to a task, or, for a task
 * of another node, to the fallback proxy, which is told the task; no packet is ever rewritten. Host network namespace
 * only: containers' calls are translated packet by packet (task.bpf.c). Source rules do not apply: these processes can
 * reach the tasks anyway. */
#include <linux/in.h>
#include "lib/lb.h"
#include "lib/metrics.h"

#define ALLOW    1 /* let the call proceed */
#define DENY     0 /* EPERM */
#define LOOPBACK bpf_htonl(0x7f000000)
#define NET8     bpf_htonl(0xff000000)
#define DRAWS    8 /* choices of a call, until one is of a task that processes of this node reach */

enum call { CONNECT, SEND };

INLINE void get_v4(const struct bpf_sock_addr *ctx, struct mesh_addr *address)
{
	address_v4(address, ctx->user_ip4);
}

INLINE void get_v6(const struct bpf_sock_addr *ctx, struct mesh_addr *address)
{
	address->words[0] = ctx->user_ip6[0];
	address->words[1] = ctx->user_ip6[1];
	address->words[2] = ctx->user_ip6[2];
	address->words[3] = ctx->user_ip6[3];
}

INLINE void set_v6(struct bpf_sock_addr *ctx, const struct mesh_addr *address)
{
	ctx->user_ip6[0] = address->words[0];
	ctx->user_ip6[1] = address->words[1];
	ctx->user_ip6[2] = address->words[2];
	ctx->user_ip6[3] = address->words[3];
}

/* Addresses that mean this node to a socket: 127.0.0.0/8, ::1 and the unspecified ones. */
INLINE int is_loopback(const struct mesh_addr *a)
{
	if (is_v4(a))
		return (a->words[3] & NET8) == LOOPBACK || a->words[3] == 0;
	return a->halves[0] == 0 && a->words[2] == 0 && (a->words[3] == 0 || a->words[3] == bpf_htonl(1));
}

/* Whether a socket's own address keeps it from talking to a task. */
INLINE int is_bound_to_loopback(struct bpf_sock *sk)
{
	return sk->family == 2 ? (sk->src_ip4 & NET8) == LOOPBACK
			       : sk->src_ip6[0] == 0 && sk->src_ip6[1] == 0 && sk->src_ip6[2] == 0 &&
					 sk->src_ip6[3] == bpf_htonl(1);
}

/* Whether an address of the fallback proxy names an owner: the kernel sends datagrams of an IPv6 socket that is
 * connected to one through the hook of IPv4 again, with that address. */
INLINE int is_named(const struct mesh_addr *a)
{
	return is_v4(a) && (a->words[3] & bpf_htonl(MESH_NAMED_MASK)) == bpf_htonl(MESH_NAMED);
}

/* The frontend that a socket of the host's namespace calls; 0: none. `any`: whether it is one for any address. */
INLINE __u32 called_frontend(struct bpf_sock_addr *ctx, struct mesh_flow *flow, int *any)
{
	__u32 zero = 0, word, id;
	struct mesh_config *node;

	if (flow->protocol != IPPROTO_TCP && flow->protocol != IPPROTO_UDP)
		return 0;
	word = port_word(flow->protocol, flow->destination_port);
	if (likely(!word) || is_named(&flow->destination))
		return 0;
	node = bpf_map_lookup_elem(&mesh_config, &zero);
	if (!node || !node->netns_cookie || bpf_get_netns_cookie(ctx) != node->netns_cookie)
		return 0;
	id = is_loopback(&flow->destination) ? word & MESH_PORT_FRONTEND : find_frontend(flow, word);
	*any = id == (word & MESH_PORT_FRONTEND);
	return id;
}

/* Whether processes of this node reach a task: of another node, they do by its peer port. */
INLINE int is_reached(const struct mesh_backend *backend)
{
	return !is_remote(backend) || backend->handed;
}

/* Unconnected UDP: whether a socket may stay with the task that it talks to about this address. */
INLINE int is_still_valid(const struct mesh_sk_revnat *entry, const struct mesh_flow *flow)
{
	struct mesh_backend *backend;

	if (entry->called_port != flow->destination_port || !same_address(&entry->called, &flow->destination))
		return 0;
	backend = find_backend(entry->owner);
	return backend && backend->state == MESH_BACKEND_ACTIVE && backend->epoch == entry->epoch &&
	       is_reached(backend);
}

/* What becomes of a call that goes to `to`. */
INLINE __u32 verdict_of(const struct mesh_sk_revnat *to)
{
	return is_named(&to->backend) ? MESH_VERDICT_SOCKET_HANDED : MESH_VERDICT_SOCKET;
}

/* Draw an owner for a call to a frontend, the same one for each flow and `again`. MESH_OWNER_NONE: nobody is to answer.
 */
RARE __u32 draw(const struct mesh_flow *called, __u32 frontend, __u32 again)
{
	struct lb_choice c = {.frontend = frontend, .start = 1, .trusted = 1, .again = again};
	struct mesh_flow flow;

	if (!called)
		return MESH_OWNER_PASS;
	flow = *called;
	lb_choose(&flow, &c);
	return c.verdict == MESH_VERDICT_NO_BACKEND ? MESH_OWNER_PASS : c.owner;
}

/* Choose a task for a call; fills `to`. Returns a verdict: SOCKET, SOCKET_HANDED, or why neither. */
INLINE __u32 choose_task(struct mesh_flow *flow, __u32 frontend, int any, struct mesh_sk_revnat *to)
{
	struct mesh_backend *backend = NULL;
	__u32 owner = MESH_OWNER_NONE;
	int i;

	/* With affinity all of a node's processes are one client. */
	flow->source = flow->destination;
	flow->source_port = (__be16)bpf_get_prandom_u32();
	for (i = 0; i < DRAWS; i++) {
		owner = draw(flow, frontend, i);
		if (owner == MESH_OWNER_PASS)
			return MESH_VERDICT_SOCKET_PASS;
		backend = find_backend(owner);
		if (!backend || is_reached(backend))
			break;
	}
	if (!backend)
		return MESH_VERDICT_SOCKET_REJECTED;
	to->called = flow->destination;
	to->called_port = flow->destination_port;
	to->owner = owner;
	to->epoch = backend->epoch;
	to->frontend = frontend;
	if (!is_remote(backend)) {
		to->backend = backend->address;
		to->backend_port = backend->port;
		return MESH_VERDICT_SOCKET;
	}
	if (!any || !is_reached(backend)) /* the fallback proxy listens for the frontend's own address alone */
		return MESH_VERDICT_SOCKET_PASS;
	address_v4(&to->backend, bpf_htonl(MESH_NAMED | (owner & ~MESH_NAMED_MASK)));
	to->backend_port = flow->destination_port;
	return MESH_VERDICT_SOCKET_HANDED;
}

/* The task of a call: for a datagram socket the one that it talks to, while that is active; else a new choice, stored.
 */
INLINE __u32 resolve_call(struct bpf_sock_addr *ctx, enum call call, int v6, struct mesh_sk_revnat *to)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sk_revnat *entry;
	struct mesh_flow flow = {.destination_port = (__be16)ctx->user_port, .protocol = (__u8)ctx->protocol};
	__u32 frontend, verdict;
	int any = 0;

	if (v6)
		get_v6(ctx, &flow.destination);
	else
		get_v4(ctx, &flow.destination);
	frontend = sk && sk->mark == MESH_PASS_MARK ? 0 : called_frontend(ctx, &flow, &any);
	if (likely(!frontend) || !sk || is_bound_to_loopback(sk))
		return MESH_VERDICT_COUNT;
	if (call == SEND) {
		entry = bpf_sk_storage_get(&mesh_sk_revnat, sk, NULL, 0);
		if (entry && is_still_valid(entry, &flow)) {
			*to = *entry;
			return verdict_of(to);
		}
	}
	verdict = choose_task(&flow, frontend, any, to);
	if (verdict == MESH_VERDICT_SOCKET_REJECTED)
		count_failure(frontend, FAILURE(no_backend));
	if (verdict != MESH_VERDICT_SOCKET && verdict != MESH_VERDICT_SOCKET_HANDED)
		return verdict;
	if (is_v4(&to->backend) ? v6 && call == SEND : !v6) /* the kernel rejects a datagram's change of family */
		return MESH_VERDICT_FAMILY;
	if (flow.protocol == IPPROTO_UDP) { /* the agent ends connected sockets whose backend is gone */
		struct mesh_udp_peer key = {
			.cookie = bpf_get_socket_cookie(ctx),
			.address = to->backend,
			.port = to->backend_port,
		};

		bpf_map_update_elem(&mesh_udp_revnat, &key, to, BPF_ANY);
	}
	entry = bpf_sk_storage_get(&mesh_sk_revnat, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!entry)
		return MESH_VERDICT_ERROR;
	*entry = *to;
	if (verdict == MESH_VERDICT_SOCKET) /* the fallback proxy counts its own */
		count_flow(frontend, to->owner, 1, 1);
	return verdict;
}

INLINE int call(struct bpf_sock_addr *ctx, enum call call, int v6)
{
	struct mesh_sk_revnat to = {};
	__u32 verdict = resolve_call(ctx, call, v6, &to);

	if (likely(verdict == MESH_VERDICT_COUNT))
		return ALLOW;
	count_verdict(verdict);
	if (verdict == MESH_VERDICT_SOCKET_REJECTED) {
		if (ctx->protocol != IPPROTO_TCP)
			return DENY;
		ctx->user_port = 0; /* nobody listens there: ECONNREFUSED instead of EPERM */
		return ALLOW;
	}
	if (verdict != MESH_VERDICT_SOCKET && verdict != MESH_VERDICT_SOCKET_HANDED)
		return ALLOW;
	if (v6)
		set_v6(ctx, &to.backend);
	else
		ctx->user_ip4 = to.backend.words[3];
	ctx->user_port = to.backend_port;
	return ALLOW;
}

/* The peer's address as the process knows it. */
INLINE int restore_peer(struct bpf_sock_addr *ctx, int v6, int datagram)
{
	struct bpf_sock *sk = ctx->sk;
	struct mesh_sk_revnat *entry;
	struct mesh_udp_peer key = {.port = (__be16)ctx->user_port};

	if (!sk)
		return ALLOW;
	if (v6)
		get_v6(ctx, &key.address);
	else
		get_v4(ctx, &key.address);
	entry = bpf_sk_storage_get(&mesh_sk_revnat, sk, NULL, 0);
	if (likely(!entry))
		return ALLOW;
	if (entry->backend_port != key.port || !same_address(&entry->backend, &key.address)) {
		if (!datagram)
			return ALLOW;
		key.cookie = bpf_get_socket_cookie(ctx);
		entry = bpf_map_lookup_elem(&mesh_udp_revnat, &key);
		if (!entry)
			return ALLOW;
	}
	if (v6)
		set_v6(ctx, &entry->called);
	else
		ctx->user_ip4 = entry->called.words[3];
	ctx->user_port = entry->called_port;
	return ALLOW;
}

/* connect() to a published port: connected straight to a task. */
SEC("cgroup/connect4")
int mesh_connect4(struct bpf_sock_addr *ctx)
{
	return call(ctx, CONNECT, 0);
}

/* connect() to a published port: connected straight to a task. */
SEC("cgroup/connect6")
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	return call(ctx, CONNECT, 1);
}

/* sendmsg() of an unconnected datagram socket: sent straight to a task. */
SEC("cgroup/sendmsg4")
int mesh_sendmsg4(struct bpf_sock_addr *ctx)
{
	return call(ctx, SEND, 0);
}

/* sendmsg() of an unconnected datagram socket: sent straight to a task. */
SEC("cgroup/sendmsg6")
int mesh_sendmsg6(struct bpf_sock_addr *ctx)
{
	return call(ctx, SEND, 1);
}

/* recvmsg(): shows the called address as the sender. */
SEC("cgroup/recvmsg4")
int mesh_recvmsg4(struct bpf_sock_addr *ctx)
{
	return restore_peer(ctx, 0, 1);
}

/* recvmsg(): shows the called address as the sender. */
SEC("cgroup/recvmsg6")
int mesh_recvmsg6(struct bpf_sock_addr *ctx)
{
	return restore_peer(ctx, 1, 1);
}

/* getpeername(): shows the called address. */
SEC("cgroup/getpeername4")
int mesh_getpeername4(struct bpf_sock_addr *ctx)
{
	return restore_peer(ctx, 0, 0);
}

/* getpeername(): shows the called address. */
SEC("cgroup/getpeername6")
int mesh_getpeername6(struct bpf_sock_addr *ctx)
{
	return restore_peer(ctx, 1, 0);
}
