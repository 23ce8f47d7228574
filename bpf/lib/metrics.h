/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Per-CPU counters: no atomics, no sharing. */
#ifndef MESH_METRICS_H
#define MESH_METRICS_H

#include "maps.h"
#include "parse.h"

INLINE void count_verdict(__u32 verdict)
{
	__u64 *value = bpf_map_lookup_elem(&mesh_verdicts, &verdict);

	if (likely(value))
		*value += 1;
}

/* Count a verdict and return an action. */
INLINE int verdict(__u32 name, int action)
{
	count_verdict(name);
	return action;
}

INLINE void count_in(__u32 frontend, __u32 owner, __u32 bytes)
{
	struct mesh_counts *counts = bpf_map_lookup_elem(&mesh_fe_metrics, &frontend);

	if (likely(counts)) {
		counts->packets_in += 1;
		counts->bytes_in += bytes;
	}
	counts = bpf_map_lookup_elem(&mesh_be_metrics, &owner);
	if (likely(counts)) {
		counts->packets_in += 1;
		counts->bytes_in += bytes;
	}
}

INLINE void count_out(__u32 frontend, __u32 owner, __u32 bytes)
{
	struct mesh_counts *counts = bpf_map_lookup_elem(&mesh_fe_metrics, &frontend);

	if (likely(counts)) {
		counts->packets_out += 1;
		counts->bytes_out += bytes;
	}
	counts = bpf_map_lookup_elem(&mesh_be_metrics, &owner);
	if (likely(counts)) {
		counts->packets_out += 1;
		counts->bytes_out += bytes;
	}
}

INLINE void count_flow(__u32 frontend, __u32 owner, __u32 starts, __u32 ends)
{
	struct mesh_counts *counts = bpf_map_lookup_elem(&mesh_fe_metrics, &frontend);

	if (counts) {
		counts->starts += starts;
		counts->ends += ends;
	}
	counts = bpf_map_lookup_elem(&mesh_be_metrics, &owner);
	if (counts) {
		counts->starts += starts;
		counts->ends += ends;
	}
}

#define FAILURE(cause) offsetof(struct mesh_failures, cause)

/* `cause`: a FAILURE. */
INLINE void count_failure(__u32 frontend, __u32 cause)
{
	void *failures = bpf_map_lookup_elem(&mesh_fe_failures, &frontend);

	if (failures)
		*(__u64 *)(failures + cause) += 1;
}

#define BACKEND_FAILURE(cause) FAILURE(cause), offsetof(struct mesh_backend_failures, cause)

/* A failure that is a backend's own doing. `cause`, `of_backend`: a BACKEND_FAILURE. */
INLINE void count_backend_failure(__u32 frontend, __u32 owner, __u32 cause, __u32 of_backend)
{
	void *failures = bpf_map_lookup_elem(&mesh_be_failures, &owner);

	if (failures)
		*(__u64 *)(failures + of_backend) += 1;
	count_failure(frontend, cause);
}

/* Whether a flow starts, or is answered for the first time, with this packet. A datagram always may. */
INLINE int is_start(const struct packet *p)
{
	return p->flow.protocol == IPPROTO_UDP ? p->fragment != 2 : (p->tcp_flags & TCP_SYN) != 0;
}

/* Count a packet that gets no further, if it starts a flow. */
INLINE void count_failed_start(const struct packet *p, __u32 frontend, __u32 cause)
{
	if (is_start(p))
		count_failure(frontend, cause);
}

#endif /* MESH_METRICS_H */
