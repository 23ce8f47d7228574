/* SPDX-License-Identifier: Apache-2.0 */
/* Stand-in for a user's service: static, no shell, PID 1 of its container. Says who it is and whom it sees.
 *
 *   HTTP :8080   GET /               who answers and whom it sees, as JSON
 *                GET /bytes?n=N      N bytes of a pattern (images.pattern is the same)
 *                GET /slow?seconds=S one line each 100 ms for S seconds
 *                GET /health         200, or 503 after /health/fail until /health/ok
 *                POST                {"bytes": n, "crc32": "..."} of the body
 *   TCP  :8081   echo, until the peer's end of file
 *   UDP  :8082   answers "<identity> <payload>", without DF whatever the size
 *
 * LATE=S in the environment: :8080 opens S seconds after the others.
 * A PROXY protocol v2 header on :8080 is understood and shown as "proxied". SIGTERM: accepts nothing new, finishes
 * what is in flight, exits. `server --check`: exit code of GET /health, for a HEALTHCHECK.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server.h"

struct identity identity;
atomic_bool stopping;
int stop_fd;

static atomic_int active;

static void *serve(void *argument)
{
	struct connection *c = argument;
	ssize_t n;

	if (c->raw)
		while ((n = recv(c->fd, c->buffer, BLOCK, 0)) > 0 && send_all(c->fd, c->buffer, (size_t)n))
			;
	else
		http_serve(c);
	close(c->fd);
	free(c);
	active--;
	return NULL;
}

static int listener(int type, uint16_t port)
{
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), one = 1;
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&a, sizeof(a)) || (type == SOCK_STREAM && listen(fd, 4096))) {
		perror("listen");
		exit(1);
	}
	return fd;
}

static void start(int fd, const struct sockaddr_in *from, bool raw)
{
	struct connection *c = calloc(1, sizeof(*c));
	pthread_attr_t attributes;
	pthread_t thread;
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 128 * 1024);
	if (c) {
		c->fd = fd;
		c->raw = raw;
		snprintf(c->peer, sizeof(c->peer), "%s:%u", inet_ntoa(from->sin_addr), ntohs(from->sin_port));
		active++;
		if (!pthread_create(&thread, &attributes, serve, c))
			return;
		active--;
		free(c);
	}
	close(fd);
}

struct listening {
	uint16_t port;
	bool raw;
	atomic_bool done;
};

/* Accepts until the server stops, and then what is still queued: a connection that was made is never reset. */
static void *accept_loop(void *argument)
{
	struct listening *l = argument;
	const char *late = l->raw ? NULL : getenv("LATE");
	struct pollfd stopped = {.fd = stop_fd, .events = POLLIN};
	int fd;

	if (late)
		poll(&stopped, 1, atoi(late) * 1000);
	fd = listener(SOCK_STREAM, l->port);
	struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};

	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof(from);

		if (poll(p, 2, -1) < 0)
			continue;
		if (!p[0].revents)
			break;
		int peer = accept(fd, (struct sockaddr *)&from, &size);

		if (peer >= 0)
			start(peer, &from, l->raw);
		else if (errno == EINVAL) /* somebody has closed the port from outside */
			poll(&p[1], 1, -1);
	}
	close(fd);
	l->done = true;
	return NULL;
}

static void *udp_loop(void *argument)
{
	int fd = listener(SOCK_DGRAM, 8082), omit = IP_PMTUDISC_OMIT;
	static char data[BLOCK + 512];

	(void)argument;
	setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &omit, sizeof(omit));
	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof(from);
		int head = snprintf(data, 512, "%s ", identity.task[0] ? identity.task : identity.hostname);
		ssize_t n = recvfrom(fd, data + head, BLOCK - 1024, 0, (struct sockaddr *)&from, &size);

		if (n >= 0)
			sendto(fd, data, (size_t)(n + head), 0, (struct sockaddr *)&from, size);
	}
	return NULL;
}

static int check(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(8080)};
	static const char request[] = "GET /health HTTP/1.0\r\n\r\n";
	char reply[16] = "";

	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (struct sockaddr *)&a, sizeof(a)) || !send_all(fd, request, sizeof(request) - 1))
		return 1;
	if (recv(fd, reply, sizeof(reply) - 1, MSG_WAITALL) < 12)
		return 1;
	return strncmp(reply + 9, "200", 3) != 0;
}

static void identify(char *into, const char *variable)
{
	const char *value = getenv(variable);

	snprintf(into, 256, "%s", value ? value : "");
}

int main(int argc, char **argv)
{
	static struct listening http = {.port = 8080}, echo = {.port = 8081, .raw = true};
	sigset_t signals;
	pthread_t thread;
	int caught;

	if (argc > 1 && !strcmp(argv[1], "--check"))
		return check();
	http_prepare();
	gethostname(identity.hostname, sizeof(identity.hostname) - 1);
	identify(identity.task, "TASK_ID");
	identify(identity.task_name, "TASK_NAME");
	identify(identity.node, "NODE");
	stop_fd = eventfd(0, EFD_CLOEXEC);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	pthread_create(&thread, NULL, accept_loop, &http);
	pthread_create(&thread, NULL, accept_loop, &echo);
	pthread_create(&thread, NULL, udp_loop, NULL);
	printf("started %s\n", identity.hostname);
	fflush(stdout);
	sigwait(&signals, &caught);
	stopping = true;
	eventfd_write(stop_fd, 1);
	while (!http.done || !echo.done || active > 0)
		usleep(10000);
	printf("stopped %s\n", identity.hostname);
	return 0;
}
