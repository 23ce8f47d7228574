/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses of both IP versions in one struct. */
#ifndef MESH_ADDRESS_H
#define MESH_ADDRESS_H

#include "bpf.h"

#define V4_MAPPED bpf_htonl(0xffff)

INLINE void address_v4(struct mesh_addr *a, __be32 v4)
{
	a->halves[0] = 0;
	a->words[2] = V4_MAPPED;
	a->words[3] = v4;
}

INLINE int is_v4(const struct mesh_addr *a)
{
	return a->halves[0] == 0 && a->words[2] == V4_MAPPED;
}

INLINE int same_address(const struct mesh_addr *a, const struct mesh_addr *b)
{
	return a->halves[0] == b->halves[0] && a->halves[1] == b->halves[1];
}

#endif /* MESH_ADDRESS_H */
