/* SPDX-License-Identifier: Apache-2.0 */
/* The answering side of flows.c. */
#ifndef FLOWS_SERVE_H
#define FLOWS_SERVE_H

struct served {
	int fd;
	struct sockaddr_storage from;
	size_t have, due, done; /* bytes of the request that came, of the answer, and of that that are sent */
	bool last;
	unsigned char in[sizeof(struct request) + LARGEST], out[sizeof(struct answer) + LARGEST];
};

static const char *own_name;

/* The answer to a complete request; its size. */
static size_t answer_to(const unsigned char *in, const struct sockaddr_storage *from, unsigned char *out)
{
	struct answer a = {.magic = MAGIC};
	struct request r;

	memcpy(&r, in, sizeof(r));
	a.id = r.id;
	a.down = r.down < LARGEST ? r.down : LARGEST;
	a.sum = sum(in + sizeof(r), r.up);
	mapped(from, a.address, &a.port);
	snprintf(a.name, sizeof(a.name), "%s", own_name);
	memcpy(out, &a, sizeof(a));
	fill(out + sizeof(a), a.down, seed_down(r.id));
	return sizeof(a) + a.down;
}

static bool sends(struct served *s, int poller)
{
	struct epoll_event e = {.events = EPOLLIN, .data.ptr = s};

	while (s->done < s->due) {
		ssize_t n = send(s->fd, s->out + s->done, s->due - s->done, MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN) {
			e.events = EPOLLOUT;
			break;
		}
		if (n <= 0)
			return false;
		s->done += (size_t)n;
	}
	if (s->done == s->due) {
		if (s->last)
			return false;
		s->have = s->due = s->done = 0;
	}
	epoll_ctl(poller, EPOLL_CTL_MOD, s->fd, &e);
	return true;
}

/* What has come on a connection. False: it is over. */
static bool takes(struct served *s, int poller)
{
	struct request r;

	if (s->due)
		return sends(s, poller);
	for (;;) {
		size_t want = sizeof(r);

		if (s->have >= sizeof(r)) {
			memcpy(&r, s->in, sizeof(r));
			if (r.magic != MAGIC || r.up > LARGEST)
				return false;
			want += r.up;
		}
		if (s->have == want && want >= sizeof(r) && s->have >= sizeof(r) + r.up) {
			s->last = r.flags & LAST;
			s->due = answer_to(s->in, &s->from, s->out);
			return sends(s, poller);
		}
		ssize_t n = recv(s->fd, s->in + s->have, want - s->have, 0);

		if (n < 0 && errno == EAGAIN)
			return true;
		if (n <= 0)
			return false;
		s->have += (size_t)n;
	}
}

static void accepts(int listener, int poller)
{
	for (;;) {
		struct sockaddr_storage from;
		socklen_t size = sizeof(from);
		int fd = accept4(listener, (struct sockaddr *)&from, &size, SOCK_NONBLOCK), one = 1;
		struct served *s = fd < 0 ? NULL : malloc(sizeof(*s));

		if (!s)
			return;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		s->fd = fd;
		s->from = from;
		s->have = s->due = s->done = 0;
		watch(fd, poller, s, EPOLLIN);
	}
}

static void datagrams(int fd)
{
	static unsigned char in[LARGEST], out[sizeof(struct answer) + LARGEST];

	for (;;) {
		struct sockaddr_storage from;
		socklen_t size = sizeof(from);
		ssize_t n = recvfrom(fd, in, sizeof(in), 0, (struct sockaddr *)&from, &size);
		struct request r;

		if (n < 0 && errno == EAGAIN)
			return;
		if (n < (ssize_t)sizeof(r))
			continue;
		memcpy(&r, in, sizeof(r));
		if (r.magic == MAGIC && r.up == (size_t)n - sizeof(r))
			sendto(fd, out, answer_to(in, &from, out), 0, (struct sockaddr *)&from, size);
	}
}

static int bound(int type, uint16_t port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	int fd = socket(AF_INET6, type | SOCK_NONBLOCK, 0), one = 1, zero = 0, large = 8 << 20;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &large, sizeof(large));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)) || (type == SOCK_STREAM && listen(fd, 4096))) {
		perror("flows serve");
		exit(1);
	}
	return fd;
}

__attribute__((noreturn)) static void serve(const char *name, uint16_t port)
{
	static struct served streams, packets;
	struct epoll_event events[256];
	int poller = epoll_create1(0);

	own_name = name;
	packets.fd = bound(SOCK_DGRAM, port);
	streams.fd = bound(SOCK_STREAM, port);
	watch(streams.fd, poller, &streams, EPOLLIN);
	watch(packets.fd, poller, &packets, EPOLLIN);
	for (;;) {
		int n = epoll_wait(poller, events, 256, -1);

		for (int i = 0; i < n; i++) {
			struct served *s = events[i].data.ptr;

			if (s == &streams) {
				accepts(s->fd, poller);
			} else if (s == &packets) {
				datagrams(s->fd);
			} else if (!takes(s, poller)) {
				close(s->fd);
				free(s);
			}
		}
	}
}

#endif
