/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What every program includes: UAPI types, helpers, the contract, the digest that user space compares at open. */
#ifndef MESH_BPF_H
#define MESH_BPF_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <mesh/abi.h>
#include <mesh/geneve.h>
#include <mesh/hash.h>

#define INLINE static __always_inline
/* Verified once by itself, whoever calls it: keeps rare paths from multiplying the frequent one. Kernels before 6.4 do
 * not take what its pointer arguments point at for a map's key. */
#define RARE        __attribute__((noinline))
#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Initial value of the object's map ".rodata.abi": the digest as text, with its NUL. */
const volatile char mesh_abi_digest[sizeof(MESH_ABI_DIGEST)] SEC(".rodata.abi") = MESH_ABI_DIGEST;

char mesh_license[] SEC("license") = "Dual BSD/GPL";

#endif /* MESH_BPF_H */
