/* SPDX-License-Identifier: Apache-2.0 */
/* System headers of the proxy engine, and C that Cython cannot express: atomics, branch hints, a system call. */
#ifndef MESH_FASTPATH_SYS_H
#define MESH_FASTPATH_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

typedef void *__attribute__((__may_alias__)) fp_pointer;

/* Pointers that one thread publishes and others follow. */
#define fp_load(p)     __atomic_load_n((fp_pointer *)(p), __ATOMIC_ACQUIRE)
#define fp_store(p, v) __atomic_store_n((fp_pointer *)(p), v, __ATOMIC_RELEASE)

/* Numbers that several threads write. */
#define fp_add(p, v) __atomic_fetch_add(p, v, __ATOMIC_RELAXED)

/* A counter has one writer; readers in other threads see whole values. */
#define fp_count(p, v) __atomic_store_n(p, *(p) + (v), __ATOMIC_RELAXED)
#define fp_peek(p)     __atomic_load_n(p, __ATOMIC_RELAXED)

#define fp_likely(x)   __builtin_expect(!!(x), 1)
#define fp_unlikely(x) __builtin_expect(!!(x), 0)

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t fp_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* Unix seconds, to some milliseconds. */
static inline uint64_t fp_wall(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME_COARSE, &t);
	return (uint64_t)t.tv_sec;
}

/* struct sched_attr of sched_setattr(2), which the C library may lack, under a name of our own. */
struct fp_sched {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

/*
 * Double the calling thread's time slice. Does nothing before Linux 6.12, which reports no slice (runtime 0), and where
 * the process runs under another policy than SCHED_OTHER (0).
 */
static inline void fp_longer_slice(void)
{
	struct fp_sched s = {0};

	if (syscall(SYS_sched_getattr, 0, &s, sizeof(s), 0) || s.policy != 0 || s.runtime == 0)
		return;
	s.size = sizeof(s);
	s.runtime *= 2;
	syscall(SYS_sched_setattr, 0, &s, 0);
}

#endif
