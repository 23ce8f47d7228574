/* SPDX-License-Identifier: Apache-2.0 */
/* Descriptions of C structs for `_layout.pyx`: every member by its name, so that the compiler says where it lies.
 *
 * A table of members is written with the macros below, one entry per member and none for pads. The description of a
 * member that the struct does not have, or that is of another kind, does not compile. */
#ifndef MESH_LAYOUT_H
#define MESH_LAYOUT_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "mesh/abi.h"

enum mesh_member_kind {
	MESH_MEMBER_HOST,    /* a number in host order */
	MESH_MEMBER_NETWORK, /* a number in network order */
	MESH_MEMBER_RAW,     /* bytes, as they are */
	MESH_MEMBER_ADDRESS, /* struct mesh_addr */
	MESH_MEMBER_STRUCT,  /* a struct that has a description of its own */
};

struct mesh_member {
	const char *name;
	size_t offset;
	size_t size;
	enum mesh_member_kind kind;
	int is_signed;
	const char *type; /* MESH_MEMBER_STRUCT: the inner struct's name */
};

struct mesh_layout {
	const char *record; /* name of its class in Python */
	const char *name;
	size_t size;
	const struct mesh_member *members;
	size_t count;
};

struct mesh_constant {
	const char *name;
	uint64_t value;
};

/* The size of a member, but for one of another type: then it does not compile. */
#define MESH_SIZE_IF(condition, size) (sizeof(char[(condition) ? 1 : -1]) * (size))
#define MESH_OF(s, f)                 (((struct s *)0)->f)
#define MESH_IS(s, f, type)           __builtin_types_compatible_p(__typeof__(MESH_OF(s, f)), type)
#define MESH_IS_NUMBER(s, f)          (__builtin_classify_type(MESH_OF(s, f)) == 1)
#define MESH_IS_SIGNED(s, f)          ((__typeof__(MESH_OF(s, f)))-1 < (__typeof__(MESH_OF(s, f)))1)

#define MESH_NUMBER(s, f, kind)                                                                                        \
	{                                                                                                              \
		#f, offsetof(struct s, f), MESH_SIZE_IF(MESH_IS_NUMBER(s, f), sizeof(MESH_OF(s, f))), kind,            \
			MESH_IS_SIGNED(s, f), NULL                                                                     \
	}
#define HOST(s, f)    MESH_NUMBER(s, f, MESH_MEMBER_HOST)
#define NETWORK(s, f) MESH_NUMBER(s, f, MESH_MEMBER_NETWORK)
#define POINTER(s, f)                                                                                                  \
	{                                                                                                              \
		#f, offsetof(struct s, f), sizeof(MESH_OF(s, f)), MESH_MEMBER_HOST, 0, NULL                            \
	}
#define RAW(s, f)                                                                                                      \
	{                                                                                                              \
		#f, offsetof(struct s, f), sizeof(MESH_OF(s, f)), MESH_MEMBER_RAW, 0, NULL                             \
	}
#define ADDRESS(s, f)                                                                                                  \
	{                                                                                                              \
		#f, offsetof(struct s, f), MESH_SIZE_IF(MESH_IS(s, f, struct mesh_addr), sizeof(struct mesh_addr)),    \
			MESH_MEMBER_ADDRESS, 0, NULL                                                                   \
	}
#define STRUCT(s, f, type)                                                                                             \
	{                                                                                                              \
		#f, offsetof(struct s, f), MESH_SIZE_IF(MESH_IS(s, f, struct type), sizeof(struct type)),              \
			MESH_MEMBER_STRUCT, 0, #type                                                                   \
	}
#define LAYOUT(record, s)                                                                                              \
	{                                                                                                              \
		#record, #s, sizeof(struct s), s##_members, sizeof(s##_members) / sizeof(*s##_members)                 \
	}

/* Numbers of 1, 2, 4 or 8 bytes. */
static inline void mesh_member_store(const struct mesh_member *m, char *base, uint64_t value)
{
	int swap = m->kind == MESH_MEMBER_NETWORK;
	uint16_t two = swap ? htobe16((uint16_t)value) : (uint16_t)value;
	uint32_t four = swap ? htobe32((uint32_t)value) : (uint32_t)value;
	uint64_t eight = swap ? htobe64(value) : value;

	switch (m->size) {
	case 1:
		base[m->offset] = (char)value;
		break;
	case 2:
		memcpy(base + m->offset, &two, sizeof(two));
		break;
	case 4:
		memcpy(base + m->offset, &four, sizeof(four));
		break;
	default:
		memcpy(base + m->offset, &eight, sizeof(eight));
	}
}

static inline uint64_t mesh_member_load(const struct mesh_member *m, const char *base)
{
	int swap = m->kind == MESH_MEMBER_NETWORK;
	uint16_t two;
	uint32_t four;
	uint64_t eight;

	switch (m->size) {
	case 1:
		return m->is_signed ? (uint64_t)(int64_t)(int8_t)base[m->offset] : (uint8_t)base[m->offset];
	case 2:
		memcpy(&two, base + m->offset, sizeof(two));
		two = swap ? be16toh(two) : two;
		return m->is_signed ? (uint64_t)(int64_t)(int16_t)two : two;
	case 4:
		memcpy(&four, base + m->offset, sizeof(four));
		four = swap ? be32toh(four) : four;
		return m->is_signed ? (uint64_t)(int64_t)(int32_t)four : four;
	default:
		memcpy(&eight, base + m->offset, sizeof(eight));
		return swap ? be64toh(eight) : eight;
	}
}

/* Whether a member can hold the value, which is an int64_t's bits if it is signed. */
static inline int mesh_member_fits(const struct mesh_member *m, uint64_t value)
{
	unsigned bits = (unsigned)m->size * 8;
	int64_t top = (int64_t)1 << (bits - 1);

	if (bits == 64)
		return 1;
	return m->is_signed ? (int64_t)value >= -top && (int64_t)value < top : value >> bits == 0;
}

#endif /* MESH_LAYOUT_H */
