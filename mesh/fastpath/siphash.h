/* SPDX-License-Identifier: Apache-2.0 */
/* SipHash-2-4 (J.-P. Aumasson, D. J. Bernstein: "SipHash: a fast short-input PRF"): a hash by a secret key, for tables
 * whose keys others choose, and for short authentication codes. Little-endian hosts. */
#ifndef MESH_SIPHASH_H
#define MESH_SIPHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie in memory");

struct mesh_siphash_key {
	uint64_t words[2];
};

static inline uint64_t mesh_siphash_turn(uint64_t x, unsigned bits)
{
	return x << bits | x >> (64 - bits);
}

static inline void mesh_siphash_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = mesh_siphash_turn(v[1], 13) ^ v[0];
	v[0] = mesh_siphash_turn(v[0], 32);
	v[2] += v[3];
	v[3] = mesh_siphash_turn(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = mesh_siphash_turn(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = mesh_siphash_turn(v[1], 17) ^ v[2];
	v[2] = mesh_siphash_turn(v[2], 32);
}

static inline void mesh_siphash_take(uint64_t v[4], uint64_t word)
{
	v[3] ^= word;
	mesh_siphash_round(v);
	mesh_siphash_round(v);
	v[0] ^= word;
}

/* The hash of `size` bytes. */
static inline uint64_t mesh_siphash(const struct mesh_siphash_key *key, const void *data, size_t size)
{
	uint64_t v[4] = {
		key->words[0] ^ 0x736f6d6570736575ull,
		key->words[1] ^ 0x646f72616e646f6dull,
		key->words[0] ^ 0x6c7967656e657261ull,
		key->words[1] ^ 0x7465646279746573ull,
	};
	const char *bytes = data;
	uint64_t word;
	size_t at = 0;

	for (; at + 8 <= size; at += 8) {
		memcpy(&word, bytes + at, 8);
		mesh_siphash_take(v, word);
	}
	word = 0;
	memcpy(&word, bytes + at, size - at);
	mesh_siphash_take(v, word | (uint64_t)size << 56);
	v[2] ^= 0xff;
	for (int i = 0; i < 4; i++)
		mesh_siphash_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#endif /* MESH_SIPHASH_H */
