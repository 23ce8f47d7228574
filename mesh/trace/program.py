# SPDX-License-Identifier: Apache-2.0
"""The bcc program of `mesh trace`: its text, made for the running kernel, and the events that it sends.

It hangs on stable tracepoints only, and only while `mesh trace` runs. It follows the TCP sockets whose local end is a
backend's (a task's own sockets, whatever namespace they are in) or a frontend's (the proxy engine's), and the packets
to and from them that the kernel drops.
"""

from __future__ import annotations

import ctypes
from typing import Final

from mesh.errors import MeshError
from mesh.trace.kernel import Btf, Tracepoint, tracepoint

OPEN: Final = 1
CLOSE: Final = 2
RESET_SENT: Final = 3
RESET_RECEIVED: Final = 4
DROP: Final = 5


class Key(ctypes.Structure):
    """A local end: 16-byte address (zeros: any), port in host order."""

    _fields_ = (("address", ctypes.c_uint8 * 16), ("port", ctypes.c_uint32))


class Event(ctypes.Structure):
    """One event. Times in ns (CLOCK_MONOTONIC); local is the task's or the frontend's end, peer the other."""

    _fields_ = (
        ("time", ctypes.c_uint64),
        ("began", ctypes.c_uint64),  # 0: before the trace did
        ("received", ctypes.c_uint64),  # bytes from the peer
        ("sent", ctypes.c_uint64),  # bytes that the peer acknowledged
        ("local", ctypes.c_uint8 * 16),
        ("peer", ctypes.c_uint8 * 16),
        ("local_port", ctypes.c_uint16),
        ("peer_port", ctypes.c_uint16),
        ("kind", ctypes.c_uint32),
        ("srtt_us", ctypes.c_uint32),
        ("retransmits", ctypes.c_uint32),
        ("reason", ctypes.c_uint32),
        ("resets", ctypes.c_uint32),  # bit 0: one was sent, bit 1: one was received
    )


_TEXT: Final = r"""
#include <linux/types.h>
struct key { u8 address[16]; u32 port; };
struct event {
	u64 time, began, received, sent;
	u8 local[16], peer[16];
	u16 local_port, peer_port;
	u32 kind, srtt_us, retransmits, reason, resets;
};
struct flow { u64 began; u32 resets; u32 pad; };
BPF_HASH(ends, struct key, u32, 65536);
BPF_HASH(flows, u64, struct flow, 262144);
BPF_PERF_OUTPUT(events);
#define FIELD(type, offset) (*(type *)((char *)ctx + (offset)))
#define READ(to, base, offset) bpf_probe_read_kernel(&(to), sizeof(to), (void *)((base) + (offset)))

static __always_inline int wanted(const u8 *address, u16 port)
{
	struct key key = {};
	__builtin_memcpy(key.address, address, 16);
	key.port = port;
	if (ends.lookup(&key))
		return 1;
	__builtin_memset(key.address, 0, 16);
	return ends.lookup(&key) != 0;
}

int on_state(char *ctx)
{
	struct event e = {};
	u64 sk = FIELD(u64, STATE_skaddr);
	struct flow *flow, fresh = {};
	int state = FIELD(int, STATE_newstate);

	if (FIELD(u16, STATE_protocol) != 6 || (state != 1 && state != 7))
		return 0;
	e.local_port = FIELD(u16, STATE_sport);
	e.peer_port = FIELD(u16, STATE_dport);
	bpf_probe_read_kernel(e.local, 16, ctx + STATE_saddr_v6);
	bpf_probe_read_kernel(e.peer, 16, ctx + STATE_daddr_v6);
	e.time = bpf_ktime_get_ns();
	if (state == 1) {
		if (!wanted(e.local, e.local_port))
			return 0;
		fresh.began = e.time;
		flows.update(&sk, &fresh);
		e.kind = 1;
		e.began = e.time;
		events.perf_submit(ctx, &e, sizeof(e));
		return 0;
	}
	flow = flows.lookup(&sk);
	if (flow) {
		e.began = flow->began;
		e.resets = flow->resets;
		flows.delete(&sk);
	} else if (!wanted(e.local, e.local_port) || !e.peer_port) {
		return 0;
	}
	e.kind = 2;
	READ(e.received, sk, SOCK_bytes_received);
	READ(e.sent, sk, SOCK_bytes_acked);
	READ(e.srtt_us, sk, SOCK_srtt_us);
	READ(e.retransmits, sk, SOCK_total_retrans);
	e.srtt_us >>= 3; /* the kernel keeps eight times the value */
	events.perf_submit(ctx, &e, sizeof(e));
	return 0;
}

static __always_inline int mark_reset(u64 sk, u32 bit)
{
	struct flow *flow = flows.lookup(&sk);

	if (flow)
		flow->resets |= bit;
	return 0;
}

int on_reset_sent(char *ctx)
{
	return mark_reset(FIELD(u64, SENT_skaddr), 1);
}

int on_reset_received(char *ctx)
{
	return mark_reset(FIELD(u64, RECEIVED_skaddr), 2);
}

int on_drop(char *ctx)
{
	struct event e = {};
	u64 skb = FIELD(u64, DROP_skbaddr), head;
	u16 network, ports[2];
	u8 first, protocol;
	u32 transport;

	e.reason = FIELD(u32, DROP_reason);
	READ(head, skb, SKB_head);
	READ(network, skb, SKB_network_header);
	head += network;
	READ(first, head, 0);
	if (first >> 4 == 4) {
		READ(protocol, head, 9);
		transport = (first & 15) * 4;
		e.local[10] = e.local[11] = e.peer[10] = e.peer[11] = 0xff;
		bpf_probe_read_kernel(e.peer + 12, 4, (void *)(head + 12));
		bpf_probe_read_kernel(e.local + 12, 4, (void *)(head + 16));
	} else if (first >> 4 == 6) {
		READ(protocol, head, 6);
		transport = 40;
		bpf_probe_read_kernel(e.peer, 16, (void *)(head + 8));
		bpf_probe_read_kernel(e.local, 16, (void *)(head + 24));
	} else {
		return 0;
	}
	if (protocol != 6 && protocol != 17)
		return 0;
	READ(ports, head, transport);
	e.peer_port = bpf_ntohs(ports[0]);
	e.local_port = bpf_ntohs(ports[1]);
	if (!wanted(e.local, e.local_port)) {
		u8 swap[16];
		__builtin_memcpy(swap, e.local, 16);
		__builtin_memcpy(e.local, e.peer, 16);
		__builtin_memcpy(e.peer, swap, 16);
		e.local_port = bpf_ntohs(ports[0]);
		e.peer_port = bpf_ntohs(ports[1]);
		if (!wanted(e.local, e.local_port))
			return 0;
	}
	e.kind = 5;
	e.time = bpf_ktime_get_ns();
	events.perf_submit(ctx, &e, sizeof(e));
	return 0;
}
"""

_SOCK: Final = ("bytes_received", "bytes_acked", "srtt_us", "total_retrans")
_SKB: Final = ("head", "network_header")
_HOOKS: Final = {
    "STATE": ("sock:inet_sock_set_state", "on_state"),
    "SENT": ("tcp:tcp_send_reset", "on_reset_sent"),
    "RECEIVED": ("tcp:tcp_receive_reset", "on_reset_received"),
    "DROP": ("skb:kfree_skb", "on_drop"),
}
_BENIGN: Final = frozenset({"NOT_SPECIFIED", "SOCKET_CLOSE", "TCP_OLD_DATA", "QUEUE_PURGE"})


def program() -> tuple[str, dict[str, str], dict[int, str]]:
    """The program's text for this kernel, its hooks (tracepoint -> function), and the names of drop reasons.

    Raises:
        MeshError: the kernel lacks BTF or a tracepoint that nothing works without.
    """
    btf = Btf()
    lines = [f"#define SOCK_{name} {btf.offset('tcp_sock', name)}" for name in _SOCK]
    lines += [f"#define SKB_{name} {btf.offset('sk_buff', name)}" for name in _SKB]
    hooks: dict[str, str] = {}
    reasons: dict[int, str] = {}
    for prefix, (name, function) in _HOOKS.items():
        found: Tracepoint | None = tracepoint(name)
        if found is None:
            if prefix == "STATE":
                raise MeshError(f"the kernel has no tracepoint {name}", remedy="Linux 4.16 or later")
            found = Tracepoint({"skaddr": 0, "skbaddr": 0, "reason": 0}, {})
        else:
            hooks[name] = function
        if prefix == "DROP":
            reasons = {number: word for number, word in found.reasons.items() if word not in _BENIGN}
        lines += [f"#define {prefix}_{field} {offset}" for field, offset in found.fields.items()]
    return "\n".join(lines) + _TEXT, hooks, reasons
