/* SPDX-License-Identifier: Apache-2.0 */
/* The backend of all measurements: one thread, epoll. backend ECHO_PORT SOURCE_PORT SINK_PORT
 *
 * echo (TCP, UDP): returns what it gets, messages of up to 64 KiB.
 * source (TCP):    sends for as long as the connection lasts.
 * sink (TCP):      reads to the end of the stream, answers with the number of bytes (8 bytes, little endian), closes.
 * Prints "ready" once it listens.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_FILES 1048576
#define CHUNK     (256 * 1024)
#define MESSAGE   2048
#define BATCH     64
#define EVENTS    256

enum role { ECHO, SOURCE, SINK, DATAGRAM, ROLES, LISTENER = 8 };

static int epoll;
static char chunk[CHUNK];
static uint64_t *received; /* per descriptor of a sink */

static void watch(int fd, unsigned role, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.u64 = (uint64_t)role << 32 | (unsigned)fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		close(fd);
}

static void listen_on(const char *port, enum role role)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	int type = role == DATAGRAM ? SOCK_DGRAM : SOCK_STREAM;
	int size = 8 * 1024 * 1024;
	int one = 1;
	int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one,
		   sizeof(one)); /* several share the work beyond the limit of one */
	if (role == DATAGRAM)
		setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || (type == SOCK_STREAM && listen(fd, 65535))) {
		perror("backend: bind, listen");
		exit(1);
	}
	watch(fd, role == DATAGRAM ? role : role | LISTENER, EPOLLIN);
}

static void accept_all(int listener, enum role role)
{
	int one = 1;
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		received[fd] = 0;
		watch(fd, role, role == SOURCE ? EPOLLOUT | EPOLLRDHUP : EPOLLIN);
	}
}

static void echo(int fd)
{
	ssize_t n = recv(fd, chunk, 65536, 0);

	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0 || send(fd, chunk, (size_t)n, MSG_NOSIGNAL) != n)
		close(fd);
}

static void source(int fd, uint32_t events)
{
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) ||
	    (send(fd, chunk, CHUNK, MSG_NOSIGNAL) < 0 && errno != EAGAIN))
		close(fd);
}

static void sink(int fd)
{
	ssize_t n = recv(fd, chunk, CHUNK, 0);

	if (n > 0) {
		received[fd] += (uint64_t)n;
		return;
	}
	if (n < 0 && errno == EAGAIN)
		return;
	if (n == 0)
		send(fd, &received[fd], sizeof(received[fd]), MSG_NOSIGNAL);
	close(fd);
}

static void datagrams(int fd)
{
	static char buffers[BATCH][MESSAGE];
	static struct sockaddr_in peers[BATCH];
	static struct iovec vectors[BATCH];
	static struct mmsghdr messages[BATCH];
	int n;

	for (unsigned i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){.iov_base = buffers[i], .iov_len = MESSAGE};
		messages[i].msg_hdr = (struct msghdr){.msg_name = &peers[i],
						      .msg_namelen = sizeof(peers[i]),
						      .msg_iov = &vectors[i],
						      .msg_iovlen = 1};
	}
	n = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
	for (int i = 0; i < n; i++)
		vectors[i].iov_len = messages[i].msg_len;
	if (n > 0)
		sendmmsg(fd, messages, (unsigned)n, 0);
}

static void on_event(int fd, unsigned role, uint32_t events)
{
	switch (role) {
	case ECHO:
		echo(fd);
		break;
	case SOURCE:
		source(fd, events);
		break;
	case SINK:
		sink(fd);
		break;
	case DATAGRAM:
		datagrams(fd);
		break;
	default:
		accept_all(fd, role & ~LISTENER);
	}
}

int main(int argc, char **argv)
{
	struct rlimit files;
	struct epoll_event events[EVENTS];

	if (argc != 4) {
		fprintf(stderr, "usage: backend ECHO_PORT SOURCE_PORT SINK_PORT\n");
		return 2;
	}
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	received = calloc(MAX_FILES, sizeof(*received));
	epoll = epoll_create1(EPOLL_CLOEXEC);
	listen_on(argv[1], ECHO);
	listen_on(argv[1], DATAGRAM);
	listen_on(argv[2], SOURCE);
	listen_on(argv[3], SINK);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(epoll, events, EVENTS, -1);

		for (int i = 0; i < n; i++)
			on_event((int)(uint32_t)events[i].data.u64, (unsigned)(events[i].data.u64 >> 32),
				 events[i].events);
	}
}
