/* SPDX-License-Identifier: Apache-2.0 */
/* HTTP load for the tests: new connections at a rate, or connections that are kept and used again and again.
 *
 * Prints one JSON object; before it, with -k, the line "ready" as soon as all connections have had an answer.
 * An identity is the value of "task" in the answer's body. A failure has a cause and, if known, an identity.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "options.h"
#include "tally.h"

enum state { FREE, CONNECTING, READING, IDLE, DEAD };

struct connection {
	enum state state;
	bool asked_again; /* since it was told to stop, with -e */
	int fd, identity, port;
	double since;                  /* start of what it waits for */
	size_t have;                   /* bytes of the head and of the beginning of the body in `buffer` */
	long long head, expected, got; /* body bytes that were promised and that came */
	char buffer[1536];
};

static struct connection *connections;
static int poller;
static volatile sig_atomic_t stopping;
static unsigned long finished;

static void end(struct connection *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
	c->state = keep ? DEAD : FREE;
	finished++;
}

static void fail(struct connection *c, const char *what, int error)
{
	count_failure(what, error, c->identity);
	end(c);
}

static void interest(struct connection *c, unsigned events, int operation)
{
	struct epoll_event e = {.events = events, .data.ptr = c};

	epoll_ctl(poller, operation, c->fd, &e);
}

static void start(struct connection *c)
{
	c->fd = socket(target->ai_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	c->state = CONNECTING;
	c->since = now();
	c->identity = -1;
	c->port = first_port ? first_port + (int)started : 0;
	started++;
	if (c->fd < 0) {
		fail(c, "socket", errno);
		return;
	}
	if (local || first_port) {
		struct sockaddr_storage from = {.ss_family = (sa_family_t)target->ai_family};

		setsockopt(c->fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)); /* one port to several nodes */
		if (local)
			memcpy(&from, local->ai_addr, local->ai_addrlen);
		((struct sockaddr_in *)&from)->sin_port = htons((uint16_t)c->port);
		if (bind(c->fd, (struct sockaddr *)&from, target->ai_addrlen)) {
			fail(c, "bind", errno);
			return;
		}
	}
	if (connect(c->fd, target->ai_addr, target->ai_addrlen) && errno != EINPROGRESS) {
		fail(c, "connect", errno);
		return;
	}
	interest(c, EPOLLOUT, EPOLL_CTL_ADD);
}

static void ask(struct connection *c)
{
	char request[512];
	int n = snprintf(request, sizeof(request), "GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n", path,
			 keep ? "" : "Connection: close\r\n");

	c->have = 0;
	c->head = c->got = c->expected = 0;
	c->since = now();
	c->state = READING;
	c->asked_again = stopping;
	if (send(c->fd, request, (size_t)n, MSG_NOSIGNAL) != n)
		fail(c, "send", errno);
	else
		interest(c, EPOLLIN, EPOLL_CTL_MOD);
}

static void answered(struct connection *c)
{
	char *mark = strstr(c->buffer + c->head, "\"task\": \"");
	int identity = mark ? identity_of(mark + 9, strcspn(mark + 9, "\"")) : -1;
	double took = now() - c->since;

	longest = took > longest ? took : longest;
	if (c->identity >= 0 && identity != c->identity) {
		fail(c, "moved", 0);
		return;
	}
	if (identity >= 0 && c->identity < 0) {
		answers[identity]++;
		succeeded++;
	} else if (identity < 0) {
		succeeded++;
	}
	c->identity = identity;
	*answers_so_far = ++requests;
	if (verbose && seen_count < total)
		snprintf(seen[seen_count++], 24, "[%d, %d]", c->port, identity);
	c->state = IDLE;
	if (!keep)
		end(c);
}

/* The head is complete: status and length. */
static bool begin_body(struct connection *c)
{
	char *gap = strstr(c->buffer, "\r\n\r\n"), *length;

	if (!gap)
		return true;
	c->head = gap + 4 - c->buffer;
	if (strncmp(c->buffer + 9, "200", 3)) {
		char what[16];

		snprintf(what, sizeof(what), "status %.3s", c->buffer + 9);
		fail(c, what, 0);
		return false;
	}
	length = strcasestr(c->buffer, "\r\ncontent-length:");
	c->expected = length && length < gap ? strtoll(length + 17, NULL, 10) : 0;
	c->got = (long long)c->have - c->head;
	return true;
}

static void take(struct connection *c)
{
	static char sink[1 << 18];

	for (;;) {
		bool fits = c->have < sizeof(c->buffer) - 1;
		ssize_t n = fits ? recv(c->fd, c->buffer + c->have, sizeof(c->buffer) - 1 - c->have, 0)
				 : recv(c->fd, sink, sizeof(sink), 0);

		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) {
			fail(c, c->state == IDLE ? "idle" : "read", errno);
			return;
		}
		if (n == 0) {
			fail(c,
			     c->state == IDLE ? "closed while idle"
			     : c->have        ? "short"
					      : "closed without an answer",
			     0);
			return;
		}
		c->since = now();
		if (fits)
			c->buffer[c->have += (size_t)n] = 0;
		if (c->head)
			c->got += n;
		else if (!begin_body(c))
			return;
		if (c->head && c->got >= c->expected) {
			answered(c);
			return;
		}
	}
}

static void event(struct connection *c)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (c->state != CONNECTING) {
		take(c);
		return;
	}
	getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error)
		fail(c, "connect", error);
	else
		ask(c);
}

/* Whether a connection is to answer once more before the end. */
static bool owes(const struct connection *c)
{
	return ask_again && c->state == IDLE && !c->asked_again;
}

/* What is due by the clock: new connections, further requests, time-outs. */
static void tick(double begun)
{
	double t = now();
	unsigned long due = rate ? (unsigned long)((t - begun) * (double)rate) + 1 : ~0ul;

	if (keep && due > limit)
		due = limit;
	if (total && due > total)
		due = total;
	for (unsigned long i = 0; i < limit; i++) {
		struct connection *c = &connections[i];

		if (c->state == FREE && !stopping && started < due)
			start(c);
		else if (c->state == IDLE && (stopping ? owes(c) : (t - c->since) * 1000 >= (double)keep))
			ask(c);
		else if ((c->state == CONNECTING || c->state == READING) && t - c->since > timeout)
			fail(c, c->state == CONNECTING ? "connect timeout" : "read timeout", 0);
	}
}

static bool complete(bool *told)
{
	unsigned long busy = 0, used = 0;

	if (!keep)
		return (stopping || (total && started >= total)) && finished == started;
	for (unsigned long i = 0; i < limit; i++) {
		busy += connections[i].state == READING || connections[i].state == CONNECTING || owes(&connections[i]);
		used += connections[i].state == DEAD || (connections[i].state != FREE && connections[i].identity >= 0);
	}
	if (!*told && used == limit) {
		*told = true;
		printf("ready\n");
		fflush(stdout);
	}
	return (stopping && !busy) || finished == limit;
}

static void stop(int signal)
{
	(void)signal;
	stopping = 1;
}

int main(int argc, char **argv)
{
	struct rlimit files = {1 << 16, 1 << 16};
	struct epoll_event events[512];
	bool told = false;
	double begun;

	options(argc, argv);
	setrlimit(RLIMIT_NOFILE, &files);
	signal(SIGTERM, stop);
	signal(SIGINT, stop);
	connections = calloc(limit, sizeof(*connections));
	seen = calloc(verbose ? total : 1, sizeof(*seen));
	poller = epoll_create1(0);
	begun = now();
	for (double last = 0; !complete(&told);) {
		int n = epoll_wait(poller, events, 512, 2);

		for (int i = 0; i < n; i++)
			event(events[i].data.ptr);
		if (now() - last >= 0.002) {
			last = now();
			tick(begun);
		}
		if (seconds && now() - begun > (double)seconds)
			stopping = 1;
	}
	report(now() - begun);
	return 0;
}
