/* SPDX-License-Identifier: Apache-2.0 */
/* Load generator: what its files share. One process, a few threads, each with its own epoll and its own tally.
 *
 * Only what completes inside the measured window [start, stop) counts; what fails counts as an error by its cause.
 * Everything is bounded: connections by --connections, time by --warmup + --duration, a request by REQUEST_TIMEOUT.
 */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

#define SECOND          1000000000ull
#define REQUEST_TIMEOUT (3 * SECOND)
#define SWEEP_INTERVAL  (SECOND / 10) /* how often time-outs are looked for and failed connections are opened again */
#define MAX_TARGETS     64
#define MAX_SOURCES     64
#define MAX_THREADS     64
#define MAX_PAYLOAD     4096

/* X(name, what happened) */
#define ERRORS(X)                                                                                                      \
	X(connect)  /* refused, unreachable */                                                                         \
	X(reset)    /* after it was established */                                                                     \
	X(closed)   /* an end of stream where an answer was due */                                                     \
	X(timeout)  /* no answer in REQUEST_TIMEOUT */                                                                 \
	X(mismatch) /* another answer than the one that was due */                                                     \
	X(lost)     /* a datagram that did not come back */                                                            \
	X(local)    /* the generator's own: out of ports, descriptors or memory */

enum error {
#define X(name) ERROR_##name,
	ERRORS(X)
#undef X
		ERROR_COUNT
};

/* Log-linear: 256 steps per power of two, so that a percentile is exact to 0.4 %. */
#define HISTOGRAM_STEPS 256
#define HISTOGRAM_SIZE  (40 * HISTOGRAM_STEPS)

struct histogram {
	uint64_t counts[HISTOGRAM_SIZE];
	uint64_t total, sum, max; /* sum and max in ns */
};

struct options {
	const char *mode;
	struct sockaddr_in targets[MAX_TARGETS];
	struct in_addr sources[MAX_SOURCES];
	unsigned n_targets, n_sources;
	unsigned connections, threads, payload, window;
	double rate, duration, warmup;
	uint64_t seed; /* of the order of targets */
};

struct tally {
	uint64_t operations, bytes;
	uint64_t errors[ERROR_COUNT];
	struct histogram latency;
};

/* One thread's share of the work. */
struct worker {
	const struct options *options;
	unsigned index, connections;
	double rate;
	uint64_t start, stop; /* the measured window, by now() */
	uint64_t dialled;     /* position in the order of targets, and of sources */
	struct tally *tally;
};

uint64_t now(void);
void histogram_add(struct histogram *h, uint64_t ns);
void histogram_merge(struct histogram *into, const struct histogram *from);
uint64_t histogram_percentile(const struct histogram *h, double share);

static inline bool measured(const struct worker *w, uint64_t t)
{
	return t >= w->start && t < w->stop;
}

void count_error(struct worker *w, enum error cause);
enum error cause_of(int errnum, bool established);

/* A non-blocking socket that connects (SOCK_STREAM) or is connected (SOCK_DGRAM) to one of the targets, drawn by lot as
 * a balancer draws, from the worker's next source address. (Taken in turn, each of two threads would have half of the
 * targets for itself, hence on its own core: a partition that no balancer makes.) Returns -1, with the error counted,
 * where that fails at once. */
int dial(struct worker *w, int type);

/* Sleep until an event or `until`. Returns the number of events. */
struct epoll_event;
int wait_events(int epoll, struct epoll_event *events, int max, uint64_t until);

/* The work of one thread, until w->stop. */
void work_requests(struct worker *w);  /* modes connections, requests, rate */
void work_bulk(struct worker *w);      /* modes down, up */
void work_datagrams(struct worker *w); /* mode datagrams */

/* Mode hold: open all connections, say so, keep them until standard input ends. */
int hold(struct worker *w);

void print_errors(const struct tally *t);

#endif
