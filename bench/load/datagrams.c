/* SPDX-License-Identifier: Apache-2.0 */
/* UDP echo: --connections sockets, each with --window datagrams under way; an echo is followed by the next datagram.
 * Silence on a socket for LOSS_AFTER means that what was under way is lost: counted, and the window is sent again under
 * the next epoch, so that late echoes are not taken for new ones.
 */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define BATCH      64
#define EVENTS     64
#define LOSS_AFTER (SECOND / 10)

struct head {
	uint64_t sent_at, epoch;
};

struct endpoint {
	int fd;
	unsigned under_way;
	uint64_t epoch, heard;
};

struct loop {
	struct worker *w;
	int epoll;
	struct endpoint *endpoints;
	char buffers[BATCH][MAX_PAYLOAD];
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
};

static void send_datagrams(struct loop *l, struct endpoint *e, unsigned count)
{
	struct head head = {.sent_at = now(), .epoch = e->epoch};
	int n;

	if (count > BATCH)
		count = BATCH;
	for (unsigned i = 0; i < count; i++) {
		l->vectors[i].iov_len = l->w->options->payload;
		memcpy(l->buffers[i], &head, sizeof(head));
	}
	n = sendmmsg(e->fd, l->messages, count, 0);
	if (n > 0)
		e->under_way += (unsigned)n;
	else if (errno != EAGAIN)
		count_error(l->w, cause_of(errno, false));
}

/* Returns the echoes of this epoch. */
static unsigned account(struct loop *l, struct endpoint *e, int n, uint64_t t)
{
	unsigned echoes = 0;

	for (int i = 0; i < n; i++) {
		struct head head;

		memcpy(&head, l->buffers[i], sizeof(head));
		if (l->messages[i].msg_len != l->w->options->payload) {
			count_error(l->w, ERROR_mismatch);
			continue;
		}
		if (head.epoch != e->epoch)
			continue;
		echoes++;
		if (measured(l->w, t)) {
			l->w->tally->operations++;
			l->w->tally->bytes += l->w->options->payload;
			histogram_add(&l->w->tally->latency, t - head.sent_at);
		}
	}
	return echoes;
}

static void on_readable(struct loop *l, struct endpoint *e)
{
	uint64_t t;
	unsigned echoes;
	int n;

	for (unsigned i = 0; i < BATCH; i++)
		l->vectors[i].iov_len = MAX_PAYLOAD;
	n = recvmmsg(e->fd, l->messages, BATCH, MSG_DONTWAIT, NULL);
	if (n <= 0) {
		if (errno != EAGAIN)
			count_error(l->w, cause_of(errno, false));
		return;
	}
	t = now();
	echoes = account(l, e, n, t);
	if (!echoes)
		return;
	e->heard = t;
	e->under_way -= echoes < e->under_way ? echoes : e->under_way;
	send_datagrams(l, e, echoes);
}

static void sweep(struct loop *l, uint64_t t)
{
	for (unsigned i = 0; i < l->w->connections; i++) {
		struct endpoint *e = &l->endpoints[i];

		if (e->fd < 0 || t - e->heard < LOSS_AFTER)
			continue;
		if (measured(l->w, t))
			l->w->tally->errors[ERROR_lost] += e->under_way;
		e->under_way = 0;
		e->epoch++;
		e->heard = t;
		send_datagrams(l, e, l->w->options->window);
	}
}

static void run(struct loop *l)
{
	struct epoll_event events[EVENTS];
	uint64_t t = now();
	uint64_t next_sweep = t;

	while (t < l->w->stop) {
		int n;

		if (t >= next_sweep) {
			sweep(l, t);
			next_sweep = t + SWEEP_INTERVAL / 2;
		}
		n = wait_events(l->epoll, events, EVENTS, next_sweep);
		for (int i = 0; i < n; i++)
			on_readable(l, events[i].data.ptr);
		t = now();
	}
}

void work_datagrams(struct worker *w)
{
	struct loop *l = calloc(1, sizeof(*l));

	l->w = w;
	l->epoll = epoll_create1(EPOLL_CLOEXEC);
	l->endpoints = calloc(w->connections, sizeof(*l->endpoints));
	for (unsigned i = 0; i < BATCH; i++) {
		l->vectors[i].iov_base = l->buffers[i];
		l->messages[i].msg_hdr.msg_iov = &l->vectors[i];
		l->messages[i].msg_hdr.msg_iovlen = 1;
	}
	for (unsigned i = 0; i < w->connections; i++) {
		struct endpoint *e = &l->endpoints[i];
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = e};

		e->fd = dial(w, SOCK_DGRAM);
		if (e->fd >= 0)
			epoll_ctl(l->epoll, EPOLL_CTL_ADD, e->fd, &event);
	}
	run(l);
	for (unsigned i = 0; i < w->connections; i++)
		if (l->endpoints[i].fd >= 0)
			close(l->endpoints[i].fd);
	free(l->endpoints);
	close(l->epoll);
	free(l);
}
