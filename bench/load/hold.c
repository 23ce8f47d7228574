/* SPDX-License-Identifier: Apache-2.0 */
/* Mode hold: open connections, let each carry one echo so that the far end has them too, and keep them. */
#define _GNU_SOURCE
#include "load.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define AT_ONCE    256
#define PATIENCE   (5 * SECOND)  /* for one answer */
#define TIME_LIMIT (40 * SECOND) /* for all of them */

/* Wait for one socket, at most PATIENCE and not beyond `deadline`. */
static bool await(int fd, short events, uint64_t deadline)
{
	struct pollfd ready = {.fd = fd, .events = events};
	uint64_t t = now();
	uint64_t left = t < deadline ? deadline - t : 0;

	return poll(&ready, 1, (int)((left < PATIENCE ? left : PATIENCE) / (SECOND / 1000))) == 1;
}

/* Open `count` connections side by side and wait for each one's echo. Returns how many there are. */
static unsigned open_batch(struct worker *w, int *fds, unsigned count, uint64_t deadline)
{
	unsigned opened = 0;
	char byte = 'x';

	for (unsigned i = 0; i < count; i++)
		fds[i] = dial(w, SOCK_STREAM);
	for (unsigned i = 0; i < count; i++) {
		enum error cause = ERROR_timeout;

		if (fds[i] < 0)
			continue;
		if (await(fds[i], POLLOUT, deadline)) {
			cause = ERROR_connect;
			if (send(fds[i], &byte, 1, MSG_NOSIGNAL) == 1) {
				cause = ERROR_timeout;
				if (await(fds[i], POLLIN, deadline) && recv(fds[i], &byte, 1, 0) == 1) {
					opened++;
					continue;
				}
			}
		}
		w->tally->errors[cause]++;
		close(fds[i]);
		fds[i] = -1;
	}
	return opened;
}

int hold(struct worker *w)
{
	struct linger reset = {.l_onoff = 1, .l_linger = 0};
	int *fds = calloc(w->connections, sizeof(*fds));
	uint64_t deadline = now() + TIME_LIMIT;
	unsigned opened = 0;
	char c;

	w->stop = UINT64_MAX;
	for (unsigned i = 0; i < w->connections; i += AT_ONCE) {
		unsigned left = w->connections - i;
		unsigned got = open_batch(w, fds + i, left < AT_ONCE ? left : AT_ONCE, deadline);

		opened += got;
		if (!got) {
			for (i += AT_ONCE; i < w->connections; i++)
				fds[i] = -1;
			break;
		}
	}
	printf("{\"mode\": \"hold\", \"operations\": %u, ", opened);
	print_errors(w->tally);
	printf("}\n");
	fflush(stdout);
	while (read(STDIN_FILENO, &c, 1) > 0)
		;
	for (unsigned i = 0; i < w->connections; i++) {
		if (fds[i] < 0)
			continue;
		/* A reset: no time-wait entries are left behind for the next measurement. */
		setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fds[i]);
	}
	free(fds);
	return 0;
}
