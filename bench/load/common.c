/* SPDX-License-Identifier: Apache-2.0 */
/* Time, histogram, sockets. */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static unsigned histogram_index(uint64_t ns)
{
	unsigned shift = 0;
	unsigned index;

	if (ns >= 2 * HISTOGRAM_STEPS)
		shift = 63 - (unsigned)__builtin_clzll(ns) - 8;
	index = shift * HISTOGRAM_STEPS + (unsigned)(ns >> shift);
	return index < HISTOGRAM_SIZE ? index : HISTOGRAM_SIZE - 1;
}

static uint64_t histogram_value(unsigned index)
{
	unsigned shift = index < 2 * HISTOGRAM_STEPS ? 0 : index / HISTOGRAM_STEPS - 1;
	uint64_t low = (uint64_t)(index - shift * HISTOGRAM_STEPS) << shift;

	return low + ((1ull << shift) >> 1);
}

void histogram_add(struct histogram *h, uint64_t ns)
{
	h->counts[histogram_index(ns)]++;
	h->total++;
	h->sum += ns;
	if (ns > h->max)
		h->max = ns;
}

void histogram_merge(struct histogram *into, const struct histogram *from)
{
	for (unsigned i = 0; i < HISTOGRAM_SIZE; i++)
		into->counts[i] += from->counts[i];
	into->total += from->total;
	into->sum += from->sum;
	if (from->max > into->max)
		into->max = from->max;
}

uint64_t histogram_percentile(const struct histogram *h, double share)
{
	uint64_t rank = (uint64_t)(share * (double)h->total);
	uint64_t seen = 0;

	for (unsigned i = 0; i < HISTOGRAM_SIZE; i++) {
		seen += h->counts[i];
		if (seen > rank)
			return histogram_value(i);
	}
	return h->max;
}

void count_error(struct worker *w, enum error cause)
{
	if (now() < w->stop)
		w->tally->errors[cause]++;
}

enum error cause_of(int errnum, bool established)
{
	switch (errnum) {
	case EADDRNOTAVAIL:
	case EADDRINUSE:
	case EMFILE:
	case ENFILE:
	case ENOBUFS:
	case ENOMEM:
		return ERROR_local;
	case ETIMEDOUT:
		return ERROR_timeout;
	default:
		return established ? ERROR_reset : ERROR_connect;
	}
}

/* SplitMix64 (S. Vigna): the n-th number of a sequence that `seed` names. */
static uint64_t draw(uint64_t seed, uint64_t n)
{
	uint64_t x = seed + n * 0x9e3779b97f4a7c15ull;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

int dial(struct worker *w, int type)
{
	const struct options *o = w->options;
	uint64_t turn = w->index + w->dialled++ * o->threads;
	uint64_t target = draw(o->seed, turn) % o->n_targets;
	struct sockaddr_in source = {.sin_family = AF_INET};
	int one = 1;
	int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		goto failed;
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (o->n_sources) {
		source.sin_addr = o->sources[turn % o->n_sources];
		setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		if (bind(fd, (struct sockaddr *)&source, sizeof(source)))
			goto failed;
	}
	if (!connect(fd, (const struct sockaddr *)&o->targets[target], sizeof(*o->targets)) || errno == EINPROGRESS)
		return fd;
failed:
	count_error(w, cause_of(errno, false));
	if (fd >= 0)
		close(fd);
	return -1;
}

int wait_events(int epoll, struct epoll_event *events, int max, uint64_t until)
{
	uint64_t t = now();
	uint64_t left = until > t ? until - t : 0;
	struct timespec timeout = {.tv_sec = (time_t)(left / SECOND), .tv_nsec = (long)(left % SECOND)};
	int n = epoll_pwait2(epoll, events, max, &timeout, NULL);

	return n < 0 ? 0 : n;
}

void print_errors(const struct tally *t)
{
	static const char *const names[] = {
#define X(name) #name,
		ERRORS(X)
#undef X
	};
	const char *separator = "";

	printf("\"errors\": {");
	for (unsigned i = 0; i < ERROR_COUNT; i++) {
		if (!t->errors[i])
			continue;
		printf("%s\"%s\": %llu", separator, names[i], (unsigned long long)t->errors[i]);
		separator = ", ";
	}
	printf("}");
}
