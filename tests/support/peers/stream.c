/* SPDX-License-Identifier: Apache-2.0 */
/* Both ends of a TCP stream that is checked byte by byte, in both directions at once.
 *
 *   stream serve PORT                  one process per connection; prints a JSON line for each that has ended
 *   stream call ADDRESS PORT [options] prints one JSON line
 *     -t TAG   named in both lines     -u N  bytes from the caller (up)    -d N  bytes to the caller (down)
 *     -w       write nothing before the server's end of file has come (the server half-closes first)
 *     -W       the same of the server (the caller half-closes first)
 *     -s       stop reading until a line comes on standard input
 *     -x N     reset after N bytes received    -X N  the server resets after N bytes received
 *
 * Each side ends its direction with shutdown(SHUT_WR) and then waits for the other's end of file. The content repeats
 * with a prime period, so that a page or a buffer out of place shows.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PERIOD 65521
#define NEVER  (~0ull)

/* What the caller asks of the server: the first bytes of the stream. */
struct order {
	char tag[32];
	char up[24], down[24], reset_after[24];
	char patient;
};

struct side {
	int fd;
	unsigned long long send, receive, reset_after; /* bytes */
	bool patient;                                  /* writes only after the other's end of file */
	bool paused;                                   /* reads nothing until standard input says so */
	unsigned char seed_out, seed_in;
};

static unsigned char pattern[2 * PERIOD];

static void prepare(void)
{
	unsigned x = 1;

	for (int i = 0; i < PERIOD; i++) {
		x = x * 1664525u + 1013904223u;
		pattern[i] = pattern[i + PERIOD] = (unsigned char)(x >> 24);
	}
}

/* Bytes from `offset` on, at most a period of them. */
static const unsigned char *content(unsigned char seed, unsigned long long offset)
{
	return pattern + (offset + seed * 257u) % PERIOD;
}

static int reset(int fd)
{
	struct linger hard = {1, 0};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	return close(fd);
}

static void report(const char *tag, const char *end, unsigned long long sent, unsigned long long got, long long bad)
{
	printf("{\"tag\": \"%s\", \"end\": \"%s\", \"sent\": %llu, \"received\": %llu, \"corrupt_at\": %lld}\n", tag,
	       end, sent, got, bad);
	fflush(stdout);
}

/* Runs one side to its end and reports it. */
static void exchange(struct side s, const char *tag)
{
	static unsigned char buffer[PERIOD];
	unsigned long long sent = 0, got = 0;
	bool in_open = true, out_open = true;
	long long corrupt_at = -1;
	ssize_t n;

	fcntl(s.fd, F_SETFL, O_NONBLOCK);
	while (in_open || out_open) {
		bool may_write = out_open && (!s.patient || !in_open);
		struct pollfd p[2] = {{.fd = s.fd}, {.fd = s.paused ? 0 : -1, .events = POLLIN}};

		if (may_write && sent == s.send) {
			shutdown(s.fd, SHUT_WR);
			out_open = false;
			continue;
		}
		p[0].events = (short)((in_open && !s.paused ? POLLIN : 0) | (may_write ? POLLOUT : 0));
		if (poll(p, 2, 180000) <= 0) {
			report(tag, "stalled", sent, got, corrupt_at);
			return;
		}
		if (p[1].revents)
			s.paused = read(0, buffer, 1) < 0;
		if (may_write && (p[0].revents & (POLLOUT | POLLERR))) {
			size_t part = s.send - sent < PERIOD ? (size_t)(s.send - sent) : PERIOD;

			n = send(s.fd, content(s.seed_out, sent), part, MSG_NOSIGNAL);
			if (n < 0 && errno != EAGAIN)
				break;
			sent += n > 0 ? (unsigned long long)n : 0;
		}
		if (in_open && !s.paused && (p[0].revents & (POLLIN | POLLHUP | POLLERR))) {
			n = recv(s.fd, buffer, sizeof(buffer), 0);
			if (n < 0 && errno != EAGAIN)
				break;
			if (n == 0)
				in_open = false;
			if (n > 0 && corrupt_at < 0 && memcmp(buffer, content(s.seed_in, got), (size_t)n))
				corrupt_at = (long long)got;
			got += n > 0 ? (unsigned long long)n : 0;
			if (got >= s.reset_after) {
				reset(s.fd);
				report(tag, "we reset", sent, got, corrupt_at);
				return;
			}
		}
	}
	if (!in_open && !out_open)
		report(tag, got == s.receive ? "complete" : "short", sent, got, corrupt_at);
	else
		report(tag, errno == ECONNRESET || errno == EPIPE ? "reset" : strerrorname_np(errno), sent, got,
		       corrupt_at);
	close(s.fd);
}

static void serve_one(int fd)
{
	struct order o = {0};

	if (recv(fd, &o, sizeof(o), MSG_WAITALL) != sizeof(o)) {
		report(o.tag, "no order", 0, 0, -1);
		return;
	}
	exchange((struct side){.fd = fd,
			       .send = strtoull(o.down, NULL, 10),
			       .receive = strtoull(o.up, NULL, 10),
			       .reset_after = strtoull(o.reset_after, NULL, 10),
			       .patient = o.patient == 'W',
			       .seed_out = 2,
			       .seed_in = 1},
		 o.tag);
}

static int serve(const char *port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)strtoul(port, NULL, 10))};
	int fd = socket(AF_INET6, SOCK_STREAM, 0), one = 1, zero = 0;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 4096)) {
		perror("stream serve");
		return 1;
	}
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int peer = accept(fd, NULL, NULL);

		if (peer < 0)
			continue;
		if (fork() == 0) {
			close(fd);
			serve_one(peer);
			_exit(0);
		}
		close(peer);
	}
}

static int call(int argc, char **argv)
{
	struct addrinfo hints = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM}, *to;
	struct side s = {.reset_after = NEVER, .seed_out = 1, .seed_in = 2};
	struct order o = {.up = "0", .down = "0", .patient = '-'};
	int option;

	snprintf(o.reset_after, sizeof(o.reset_after), "%llu", NEVER);
	if (argc < 3 || getaddrinfo(argv[1], argv[2], &hints, &to))
		return 2;
	argc -= 2, argv += 2;
	while ((option = getopt(argc, argv, "t:u:d:wWsx:X:")) != -1) {
		if (option == 't')
			snprintf(o.tag, sizeof(o.tag), "%s", optarg);
		else if (option == 'u')
			s.send = strtoull(optarg, NULL, 10), snprintf(o.up, sizeof(o.up), "%s", optarg);
		else if (option == 'd')
			s.receive = strtoull(optarg, NULL, 10), snprintf(o.down, sizeof(o.down), "%s", optarg);
		else if (option == 'w')
			s.patient = true;
		else if (option == 'W')
			o.patient = 'W';
		else if (option == 's')
			s.paused = true;
		else if (option == 'x')
			s.reset_after = strtoull(optarg, NULL, 10);
		else if (option == 'X')
			snprintf(o.reset_after, sizeof(o.reset_after), "%s", optarg);
		else
			return 2;
	}
	s.fd = socket(to->ai_family, SOCK_STREAM, 0);
	if (connect(s.fd, to->ai_addr, to->ai_addrlen)) {
		report(o.tag, strerrorname_np(errno), 0, 0, -1);
		return 0;
	}
	if (send(s.fd, &o, sizeof(o), MSG_NOSIGNAL) != sizeof(o)) {
		report(o.tag, "no order", 0, 0, -1);
		return 0;
	}
	exchange(s, o.tag);
	return 0;
}

int main(int argc, char **argv)
{
	prepare();
	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(argv[2]);
	if (argc >= 4 && !strcmp(argv[1], "call"))
		return call(argc - 1, argv + 1);
	fprintf(stderr, "stream: what to do? see the head of stream.c\n");
	return 2;
}
