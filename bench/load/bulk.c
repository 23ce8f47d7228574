/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk transfer over a few streams, --connections in all.
 *
 * down: the peer sends for as long as the connection lasts; what arrives inside the window counts.
 * up:   the generator sends until the window ends, then half-closes; the peer answers with the number of bytes it got
 * (8 bytes, little endian), which must be what was sent. What was sent inside the window counts.
 * A stream that was not connected before the window ended is a time-out; one that was refused is an error of connect.
 */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK  (256 * 1024)
#define EVENTS 64
#define LINGER (5 * SECOND) /* for the peer's count, after the window */

struct stream {
	int fd;
	bool open, half_closed;
	unsigned answered; /* bytes of `confirmed` received */
	uint64_t moved, confirmed;
};

struct loop {
	struct worker *w;
	int epoll;
	bool up;
	unsigned alive;
	char *chunk;
	struct stream *streams;
};

static void end(struct loop *l, struct stream *s)
{
	close(s->fd);
	s->open = false;
	l->alive--;
}

static void fail(struct loop *l, struct stream *s, enum error cause)
{
	l->w->tally->errors[cause]++;
	end(l, s);
}

static void account(struct loop *l, struct stream *s, ssize_t n)
{
	s->moved += (uint64_t)n;
	if (measured(l->w, now()))
		l->w->tally->bytes += (uint64_t)n;
}

static void on_download(struct loop *l, struct stream *s)
{
	ssize_t n = recv(s->fd, l->chunk, CHUNK, 0);

	if (n > 0)
		account(l, s, n);
	else if (n == 0)
		fail(l, s, ERROR_closed);
	else if (errno != EAGAIN)
		fail(l, s, cause_of(errno, s->moved > 0));
}

static void on_upload(struct loop *l, struct stream *s)
{
	ssize_t n = send(s->fd, l->chunk, CHUNK, MSG_NOSIGNAL);

	if (n > 0)
		account(l, s, n);
	else if (errno != EAGAIN)
		fail(l, s, cause_of(errno, s->moved > 0));
}

static void on_confirmation(struct loop *l, struct stream *s)
{
	ssize_t n = recv(s->fd, (char *)&s->confirmed + s->answered, sizeof(s->confirmed) - s->answered, 0);

	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0) {
		fail(l, s, n ? cause_of(errno, s->moved > 0) : ERROR_closed);
		return;
	}
	s->answered += (unsigned)n;
	if (s->answered < sizeof(s->confirmed))
		return;
	if (s->confirmed != s->moved)
		fail(l, s, ERROR_mismatch);
	else
		end(l, s);
}

static void on_event(struct loop *l, struct stream *s, uint32_t events)
{
	if (!s->open)
		return;
	if (!l->up)
		on_download(l, s);
	else if (s->half_closed || events & (EPOLLIN | EPOLLERR | EPOLLHUP))
		on_confirmation(l, s);
	else
		on_upload(l, s);
}

static void half_close(struct loop *l)
{
	for (unsigned i = 0; i < l->w->connections; i++) {
		struct stream *s = &l->streams[i];
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = s};

		if (!s->open)
			continue;
		if (!s->moved) { /* shutdown() would end a socket that still connects with ECONNRESET */
			fail(l, s, ERROR_timeout);
			continue;
		}
		s->half_closed = true;
		shutdown(s->fd, SHUT_WR);
		epoll_ctl(l->epoll, EPOLL_CTL_MOD, s->fd, &event);
	}
}

static void run(struct loop *l, uint64_t deadline)
{
	struct epoll_event events[EVENTS];

	while (l->alive && now() < deadline) {
		int n = wait_events(l->epoll, events, EVENTS, deadline);

		for (int i = 0; i < n; i++)
			on_event(l, events[i].data.ptr, events[i].events);
	}
}

void work_bulk(struct worker *w)
{
	struct loop l = {.w = w, .epoll = epoll_create1(EPOLL_CLOEXEC)};

	l.up = strcmp(w->options->mode, "up") == 0;
	l.chunk = calloc(1, CHUNK);
	l.streams = calloc(w->connections, sizeof(*l.streams));
	for (unsigned i = 0; i < w->connections; i++) {
		struct stream *s = &l.streams[i];
		struct epoll_event event = {.events = l.up ? EPOLLOUT | EPOLLIN : EPOLLIN, .data.ptr = s};

		s->fd = dial(w, SOCK_STREAM);
		if (s->fd < 0)
			continue;
		s->open = true;
		l.alive++;
		epoll_ctl(l.epoll, EPOLL_CTL_ADD, s->fd, &event);
	}
	run(&l, w->stop);
	if (l.up) {
		half_close(&l);
		run(&l, w->stop + LINGER);
	}
	for (unsigned i = 0; i < w->connections; i++) {
		w->tally->operations += l.streams[i].moved > 0;
		if (!l.streams[i].open)
			continue;
		if (l.up || !l.streams[i].moved)
			fail(&l, &l.streams[i], ERROR_timeout);
		else
			end(&l, &l.streams[i]);
	}
	free(l.streams);
	free(l.chunk);
	close(l.epoll);
}
