/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* SipHash-2-4 (J.-P. Aumasson, D. J. Bernstein, "SipHash: a fast short-input PRF", 2012): the proof that a node knows
 * the swarm's key. Reference vectors: tests/unit/test_siphash24.py. */
#ifndef MESH_SIPHASH24_H
#define MESH_SIPHASH24_H

#include <linux/types.h>

#define MESH_SIP_ROTATE(x, n) (((x) << (n)) | ((x) >> (64 - (n))))

static inline __attribute__((always_inline)) void mesh_sip_round(__u64 v[4])
{
	v[0] += v[1];
	v[2] += v[3];
	v[1] = MESH_SIP_ROTATE(v[1], 13) ^ v[0];
	v[3] = MESH_SIP_ROTATE(v[3], 16) ^ v[2];
	v[0] = MESH_SIP_ROTATE(v[0], 32);
	v[2] += v[1];
	v[0] += v[3];
	v[1] = MESH_SIP_ROTATE(v[1], 17) ^ v[2];
	v[3] = MESH_SIP_ROTATE(v[3], 21) ^ v[0];
	v[2] = MESH_SIP_ROTATE(v[2], 32);
}

/* Bytes as a little-endian number; 8 at most. */
static inline __attribute__((always_inline)) __u64 mesh_sip_word(const __u8 *data, __u32 length)
{
	__u64 word = 0;

	for (__u32 i = 0; i < length; i++)
		word |= (__u64)data[i] << (8 * i);
	return word;
}

/* The state that a key begins with, by its two halves. */
static inline __attribute__((always_inline)) void mesh_sip_begin(__u64 v[4], __u64 k0, __u64 k1)
{
	v[0] = k0 ^ 0x736f6d6570736575ull;
	v[1] = k1 ^ 0x646f72616e646f6dull;
	v[2] = k0 ^ 0x6c7967656e657261ull;
	v[3] = k1 ^ 0x7465646279746573ull;
}

static inline __attribute__((always_inline)) void mesh_sip_absorb(__u64 v[4], __u64 word)
{
	v[3] ^= word;
	mesh_sip_round(v);
	mesh_sip_round(v);
	v[0] ^= word;
}

/* The hash, once all words are absorbed, the last of them with the message's length in its highest byte. */
static inline __attribute__((always_inline)) __u64 mesh_sip_end(__u64 v[4])
{
	v[2] ^= 0xff;
	for (int i = 0; i < 4; i++)
		mesh_sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The hash of `length` bytes under a key of 16 bytes. */
static inline __u64 mesh_siphash24(const __u8 *key, const __u8 *data, __u32 length)
{
	__u32 whole = length & ~7u;
	__u64 v[4];

	mesh_sip_begin(v, mesh_sip_word(key, 8), mesh_sip_word(key + 8, 8));
	for (__u32 at = 0; at < whole; at += 8)
		mesh_sip_absorb(v, mesh_sip_word(data + at, 8));
	mesh_sip_absorb(v, (__u64)length << 56 | mesh_sip_word(data + whole, length & 7));
	return mesh_sip_end(v);
}

#endif /* MESH_SIPHASH24_H */
