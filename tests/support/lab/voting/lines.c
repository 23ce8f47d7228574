/* SPDX-License-Identifier: Apache-2.0 */
/* Lines over TCP; see voting.h. */
#include <netdb.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "voting.h"

bool send_text(int fd, const char *text)
{
	size_t n = strlen(text);

	while (n > 0) {
		ssize_t done = send(fd, text, n, MSG_NOSIGNAL);

		if (done <= 0)
			return false;
		text += done;
		n -= (size_t)done;
	}
	return true;
}

bool read_line(int fd, char *line)
{
	size_t have = 0;

	while (have < LINE - 1 && recv(fd, line + have, 1, 0) == 1) {
		if (line[have] == '\n') {
			line[have - (have > 0 && line[have - 1] == '\r')] = 0;
			return true;
		}
		have++;
	}
	return false;
}

static int dial(const struct peer *p)
{
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found;
	struct timeval patience = {.tv_sec = 5};
	int fd = -1;

	if (getaddrinfo(p->host, p->port, &hints, &found))
		return -1;
	for (const struct addrinfo *a = found; a && fd < 0; a = a->ai_next) {
		fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, 0);
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (connect(fd, a->ai_addr, a->ai_addrlen)) {
			close(fd);
			fd = -1;
		}
	}
	freeaddrinfo(found);
	return fd;
}

bool ask(struct peer *p, const char *request, char *answer)
{
	bool ok = false;

	pthread_mutex_lock(&p->lock);
	for (int i = 0; i < 50 && p->fd < 0; i++) {
		p->fd = dial(p);
		if (p->fd < 0)
			usleep(100000);
	}
	if (p->fd >= 0) {
		ok = send_text(p->fd, request) && read_line(p->fd, answer);
		if (ok && answer[0] == '$' && answer[1] != '-')
			ok = read_line(p->fd, answer); /* a bulk string: its length, itself */
		if (!ok) {
			close(p->fd);
			p->fd = -1;
		}
	}
	pthread_mutex_unlock(&p->lock);
	return ok;
}
