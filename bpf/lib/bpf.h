/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What every program includes: UAPI types, helpers, the contract, the digest that user space compares when it opens an
 * object, and how functions say what to do with a packet. */
#ifndef MESH_BPF_H
#define MESH_BPF_H

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <mesh/abi.h>
#include <mesh/geneve.h>
#include <mesh/hash.h>

#define INLINE static __always_inline
/* A global function: verified once by itself, so that a rare path does not multiply the states of the hot path. Kernels
 * before 6.4 do not accept what its pointer arguments point at as a map key. */
#define RARE __attribute__((noinline))
/* Of a static function that not every program uses. */
#define __maybe_unused __attribute__((unused))

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Actions. A function that handles a packet returns a TC action, or one of these, below every TC action
 * (TC_ACT_UNSPEC is -1), for its program to carry out.
 *
 * REJECT: answer the sender (reject.h), for the reason of this verdict. */
#define REJECT(name)      (-2 - (int)(name))
#define IS_REJECT(action) ((action) < TC_ACT_UNSPEC)

/* TAIL_CALL: continue in another program of the object. It has a stack of its own, and nothing of it is verified into
 * the hot path. Below every REJECT. */
#define TAIL_CALL(index) (-1000 - (index))

/* Indexes of mesh_tail_calls (ingress.bpf.c). */
#define CALL_TUNNEL_RX 0
#define CALL_TUNNEL_TX 1 /* by tunnel_tx_call */
#define CALL_ICMP      2
#define CALL_INGRESS   3 /* a client's packet that another node has returned (second_chance.h) */
#define CALL_GUARD     4
#define CALL_EARLY     5 /* by early_call */
#define CALL_BRIDGE    6
#define CALL_BR_GUARD  7
#define CALL_TUNNEL_EARLY 8
#define CALLS          9

/* Indexes of mesh_task_calls (task.bpf.c). */
#define CALL_TUNNEL_REPLY 0
#define CALL_TASK_EARLY   1
#define CALL_TASK         2
#define TASK_CALLS        3

/* Initial value of the map ".rodata.abi": the digest as text, with its NUL. */
const volatile char mesh_abi_digest[sizeof(MESH_ABI_DIGEST)] SEC(".rodata.abi") = MESH_ABI_DIGEST;

char mesh_license[] SEC("license") = "Dual BSD/GPL";

#endif /* MESH_BPF_H */
