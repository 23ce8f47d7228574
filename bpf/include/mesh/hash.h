/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Flow hash and slot choice, one source for eBPF, Cython and (re-written independently) tests/oracle/selection.py.
 * Contract: docs/HASHING.md and the golden vectors in tests/unit/golden_hash.json. All nodes of a cluster must agree,
 * so nothing here may change without a new MESH_ABI_VERSION.
 */
#ifndef MESH_HASH_H
#define MESH_HASH_H

#include "abi.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MESH_BE64(x) __builtin_bswap64(x)
#define MESH_BE16(x) __builtin_bswap16(x)
#else
#define MESH_BE64(x) (x)
#define MESH_BE16(x) (x)
#endif

/* Odd 64-bit constants: the fractional digits of pi (as in Blowfish's P-array), lowest bit set. */
#define MESH_K0   0x243f6a8885a308d3ull
#define MESH_K1   0x13198a2e03707345ull
#define MESH_K2   0xa4093822299f31d1ull
#define MESH_K3   0x082efa98ec4e6c89ull
#define MESH_K4   0x452821e638d01377ull
#define MESH_SEED 0xbe5466cf34e90c6dull

/* The 64-bit finaliser of MurmurHash3 (A. Appleby, public domain): every input bit reaches every output bit. */
static inline __attribute__((always_inline)) __u64 mesh_mix64(__u64 h)
{
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdull;
	h ^= h >> 33;
	h *= 0xc4ceb9fe1a85ec53ull;
	h ^= h >> 33;
	return h;
}

/* The products do not depend on one another, so that they overlap in the pipeline; mixing happens once, at the end. */
static inline __attribute__((always_inline)) __u64 mesh_hash_address(const struct mesh_addr *a, __u64 k_high,
								     __u64 k_low)
{
	return ((MESH_BE64(a->halves[0]) ^ k_low) * k_high) ^ ((MESH_BE64(a->halves[1]) ^ k_high) * k_low);
}

/* All 64 bits behind mesh_hash_flow. */
static inline __attribute__((always_inline)) __u64 mesh_hash_flow_wide(const struct mesh_flow *f)
{
	__u64 ports =
		(__u64)MESH_BE16(f->source_port) << 32 | (__u64)MESH_BE16(f->destination_port) << 16 | f->protocol;
	__u64 h = MESH_SEED;

	h ^= mesh_hash_address(&f->source, MESH_K0, MESH_K1);
	h ^= mesh_hash_address(&f->destination, MESH_K2, MESH_K3);
	h ^= (ports ^ MESH_SEED) * MESH_K4;
	return mesh_mix64(h);
}

/* Hash of the 5-tuple, 32 bits, uniform. */
static inline __attribute__((always_inline)) __u32 mesh_hash_flow(const struct mesh_flow *f)
{
	return (__u32)(mesh_hash_flow_wide(f) >> 32);
}

/* Hash of the client's address alone (affinity), 32 bits, uniform: whatever port of whatever protocol it calls. */
static inline __attribute__((always_inline)) __u32 mesh_hash_client(const struct mesh_addr *source)
{
	return (__u32)(mesh_mix64(MESH_SEED ^ mesh_hash_address(source, MESH_K0, MESH_K1)) >> 32);
}

/* Slot of a hash in a table of `size` slots, without a division (D. Lemire, "Fast random integer generation in an
 * interval", 2019). */
static inline __attribute__((always_inline)) __u32 mesh_slot_of(__u32 hash, __u32 size)
{
	return (__u32)(((__u64)hash * size) >> 32);
}

/* The hash of a flow's n-th further choice (n from 1): where it goes when the choices before have refused it. */
static inline __attribute__((always_inline)) __u32 mesh_hash_again(__u32 hash, __u32 n)
{
	return (__u32)(mesh_mix64(((__u64)n << 32 | hash) ^ MESH_SEED) >> 32);
}

#endif /* MESH_HASH_H */
