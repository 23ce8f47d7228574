/* SPDX-License-Identifier: Apache-2.0 */
/* Request and answer over TCP: the peer echoes what it is sent.
 *
 * connections: connect, one request, close (the generator closes first, orderly), again.  Latency: from connect.
 * requests:    on kept connections, the next request follows the answer (closed loop).    Latency: from send.
 * rate:        on kept connections, requests fall due at a fixed rate whether or not the
 *              ones before were answered (open loop).                                     Latency: from when it was
 * due.
 */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS 256

enum state { DOWN, CONNECTING, IDLE, BUSY };

struct connection {
	int fd;
	enum state state;
	unsigned received;
	uint64_t begun; /* of the request under way, or of the attempt to connect */
	uint64_t due;   /* what latency counts from */
	struct connection *next_idle;
};

struct loop {
	struct worker *w;
	int epoll;
	bool keep, paced;
	struct connection *connections, *idle;
	uint64_t due, interval; /* paced */
	char request[MAX_PAYLOAD];
};

static void open_connection(struct loop *l, struct connection *c)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};

	c->state = DOWN;
	c->fd = dial(l->w, SOCK_STREAM);
	if (c->fd < 0)
		return;
	c->state = CONNECTING;
	c->begun = c->due = now();
	epoll_ctl(l->epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void close_connection(struct connection *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
	c->state = DOWN;
}

/* It is opened again by the next sweep: a peer that refuses is not asked in a tight loop. */
static void fail(struct loop *l, struct connection *c, enum error cause)
{
	count_error(l->w, cause);
	close_connection(c);
}

static void send_request(struct loop *l, struct connection *c, uint64_t due)
{
	ssize_t n;

	c->begun = now(); /* before it is sent: on one core the answer can be there when send() returns */
	c->due = due ? due : c->begun;
	c->received = 0;
	n = send(c->fd, l->request, l->w->options->payload, MSG_NOSIGNAL);
	if (n == (ssize_t)l->w->options->payload)
		c->state = BUSY;
	else
		fail(l, c, n < 0 ? cause_of(errno, c->state != CONNECTING) : ERROR_local);
}

static void ready(struct loop *l, struct connection *c)
{
	if (!l->paced) {
		send_request(l, c, l->keep ? 0 : c->due);
		return;
	}
	c->state = IDLE;
	c->next_idle = l->idle;
	l->idle = c;
}

static void answered(struct loop *l, struct connection *c)
{
	uint64_t t = now();

	if (measured(l->w, t)) {
		l->w->tally->operations++;
		l->w->tally->bytes += l->w->options->payload;
		histogram_add(&l->w->tally->latency, t - c->due);
	}
	if (l->keep) {
		ready(l, c);
		return;
	}
	close_connection(c);
	open_connection(l, c);
}

static void readable(struct loop *l, struct connection *c)
{
	unsigned payload = l->w->options->payload;
	char answer[MAX_PAYLOAD];
	ssize_t n = recv(c->fd, answer, payload - c->received, 0);

	if (n < 0 && errno == EAGAIN)
		return;
	if (n < 0) {
		fail(l, c, cause_of(errno, true));
	} else if (n == 0) {
		fail(l, c, ERROR_closed);
	} else if (memcmp(answer, l->request + c->received, (size_t)n) != 0) {
		fail(l, c, ERROR_mismatch);
	} else {
		c->received += (unsigned)n;
		if (c->received == payload)
			answered(l, c);
	}
}

static void on_event(struct loop *l, struct connection *c, uint32_t events)
{
	if (c->state == CONNECTING) {
		int errnum = 0;
		socklen_t size = sizeof(errnum);

		if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
			return;
		if (events & (EPOLLERR | EPOLLHUP)) {
			getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &errnum, &size);
			fail(l, c, cause_of(errnum, false));
			return;
		}
		ready(l, c);
	} else if (c->state == BUSY && (events & (EPOLLIN | EPOLLERR | EPOLLHUP))) {
		readable(l, c);
	}
}

static void sweep(struct loop *l, uint64_t t)
{
	for (unsigned i = 0; i < l->w->connections; i++) {
		struct connection *c = &l->connections[i];

		if (c->state == DOWN)
			open_connection(l, c);
		else if ((c->state == BUSY || c->state == CONNECTING) && t - c->begun > REQUEST_TIMEOUT)
			fail(l, c, ERROR_timeout);
	}
}

static void send_due(struct loop *l, uint64_t t)
{
	while (l->due <= t && l->idle) {
		struct connection *c = l->idle;

		l->idle = c->next_idle;
		send_request(l, c, l->due);
		l->due += l->interval;
	}
}

static void run(struct loop *l)
{
	struct epoll_event events[EVENTS];
	uint64_t t = now();
	uint64_t next_sweep = t;

	l->due = t + SECOND / 10;
	while (t < l->w->stop) {
		uint64_t until = next_sweep;
		int n;

		if (t >= next_sweep) {
			sweep(l, t);
			next_sweep = t + SWEEP_INTERVAL;
			until = next_sweep;
		}
		if (l->paced) {
			send_due(l, t);
			if (l->idle && l->due < until)
				until = l->due;
		}
		n = wait_events(l->epoll, events, EVENTS, until);
		for (int i = 0; i < n; i++)
			on_event(l, events[i].data.ptr, events[i].events);
		t = now();
	}
}

void work_requests(struct worker *w)
{
	struct loop l = {.w = w, .epoll = epoll_create1(EPOLL_CLOEXEC)};

	l.keep = strcmp(w->options->mode, "connections") != 0;
	l.paced = strcmp(w->options->mode, "rate") == 0;
	l.interval = l.paced ? (uint64_t)((double)SECOND / w->rate) : 0;
	l.connections = calloc(w->connections, sizeof(*l.connections));
	for (unsigned i = 0; i < MAX_PAYLOAD; i++)
		l.request[i] = (char)(i * 31 + 7);
	for (unsigned i = 0; i < w->connections; i++)
		l.connections[i].fd = -1;
	run(&l);
	/* What fell due and found no free connection was not served at the rate: it counts as late. With one free, all
	 * that was due at the last look has been sent. */
	for (; l.paced && !l.idle && l.due < w->stop; l.due += l.interval)
		if (measured(w, l.due))
			w->tally->errors[ERROR_timeout]++;
	for (unsigned i = 0; i < w->connections; i++)
		close_connection(&l.connections[i]);
	free(l.connections);
	close(l.epoll);
}
