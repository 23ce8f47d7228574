/* SPDX-License-Identifier: Apache-2.0 */
/* Stand-in for a user's service: static, no shell, PID 1 of its container. Says who it is and whom it sees.
 *
 *   HTTP :8080   GET /               who answers and whom it sees, as JSON
 *                GET /bytes?n=N      N bytes of the pattern (tests/lab/http.py has it too)
 *                GET /slow?seconds=S one line each 100 ms for S seconds
 *                GET /health         200, or 503 after /health/fail until /health/ok
 *                POST                {"bytes": n, "crc32": "..."} of the body
 *   TCP  :8081   echo, until the peer's end of file
 *   UDP  :8082   answers "<identity> <payload>"
 *
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
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 65536

static atomic_bool stopping, unhealthy;
static atomic_int active;
static int stop_fd; /* readable once the server stops */
static char hostname[256], task[256], task_name[256], node[256];
static unsigned char pattern[BLOCK];
static uint32_t crc_table[256];

struct connection {
	int fd;
	bool raw;
	char peer[80], proxied[80];
	char buffer[BLOCK];
	size_t length;
};

static void prepare(void)
{
	uint32_t x = 1;

	for (int i = 0; i < BLOCK; i++) {
		x = x * 1103515245u + 12345u;
		pattern[i] = (unsigned char)(x >> 16);
	}
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;

		for (int k = 0; k < 8; k++)
			c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
		crc_table[i] = c;
	}
}

static bool send_all(int fd, const void *data, size_t n)
{
	const char *p = data;

	while (n > 0) {
		ssize_t done = send(fd, p, n, MSG_NOSIGNAL);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		p += done;
		n -= (size_t)done;
	}
	return true;
}

static bool answer(struct connection *c, int status, const char *body)
{
	char head[4096];
	int n = snprintf(head, sizeof(head), "HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n%s\r\n%s",
			 status, strlen(body), stopping ? "Connection: close\r\n" : "", body);

	return send_all(c->fd, head, (size_t)n);
}

static bool answer_head(struct connection *c, unsigned long long length)
{
	char head[256];
	int n = snprintf(head, sizeof(head), "HTTP/1.1 200 OK\r\nContent-Length: %llu\r\n%s\r\n", length,
			 stopping ? "Connection: close\r\n" : "");

	return send_all(c->fd, head, (size_t)n);
}

static bool serve_bytes(struct connection *c, unsigned long long n)
{
	if (!answer_head(c, n))
		return false;
	while (n > 0) {
		size_t part = n < BLOCK ? (size_t)n : BLOCK;

		if (!send_all(c->fd, pattern, part))
			return false;
		n -= part;
	}
	return true;
}

static bool serve_slow(struct connection *c, double seconds)
{
	unsigned long long lines = (unsigned long long)(seconds * 10);

	if (!answer_head(c, lines * 8))
		return false;
	for (unsigned long long i = 0; i < lines; i++) {
		char line[32];

		usleep(100000);
		snprintf(line, sizeof(line), "%07llu\n", i % 10000000);
		if (!send_all(c->fd, line, 8))
			return false;
	}
	return true;
}

static bool serve_identity(struct connection *c)
{
	char body[2048];

	snprintf(body, sizeof(body),
		 "{\"hostname\": \"%s\", \"task\": \"%s\", \"name\": \"%s\", \"node\": \"%s\", \"peer\": \"%s\", "
		 "\"proxied\": \"%s\"}\n",
		 hostname, task, task_name, node, c->peer, c->proxied);
	return answer(c, 200, body);
}

/* Reads the body, part of which may be in the buffer after `used` bytes, and answers its length and checksum. */
static bool serve_post(struct connection *c, size_t used, unsigned long long length)
{
	unsigned long long done = 0;
	uint32_t crc = ~0u;
	char body[128];

	for (;;) {
		size_t have = c->length - used;

		if (have > length - done)
			have = (size_t)(length - done);
		for (size_t i = 0; i < have; i++)
			crc = crc_table[(crc ^ (unsigned char)c->buffer[used + i]) & 0xff] ^ (crc >> 8);
		used += have;
		done += have;
		if (done == length)
			break;
		ssize_t n = recv(c->fd, c->buffer, BLOCK, 0);

		if (n <= 0)
			return false;
		used = 0;
		c->length = (size_t)n;
	}
	memmove(c->buffer, c->buffer + used, c->length - used);
	c->length -= used;
	snprintf(body, sizeof(body), "{\"bytes\": %llu, \"crc32\": \"%08x\"}\n", done, ~crc);
	return answer(c, 200, body);
}

static bool serve_get(struct connection *c, const char *path)
{
	if (!strncmp(path, "/bytes?n=", 9))
		return serve_bytes(c, strtoull(path + 9, NULL, 10));
	if (!strncmp(path, "/slow?seconds=", 14))
		return serve_slow(c, strtod(path + 14, NULL));
	if (!strcmp(path, "/health/fail"))
		unhealthy = true;
	if (!strcmp(path, "/health/ok"))
		unhealthy = false;
	if (!strcmp(path, "/health"))
		return answer(c, unhealthy ? 503 : 200, unhealthy ? "\"unhealthy\"\n" : "\"ok\"\n");
	return serve_identity(c);
}

/* One request from the buffer, whose head ends before `end`. False: close the connection. */
static bool serve_request(struct connection *c, char *end)
{
	char method[8] = "", path[256] = "";
	size_t used = (size_t)(end - c->buffer);
	char saved = *end;
	bool close_after, ok;

	*end = 0;
	sscanf(c->buffer, "%7s %255s", method, path);
	close_after = strcasestr(c->buffer, "\r\nconnection: close") || strstr(c->buffer, " HTTP/1.0\r\n");
	const char *field = strcasestr(c->buffer, "\r\ncontent-length:");
	unsigned long long length = field ? strtoull(field + 17, NULL, 10) : 0;

	if (strcasestr(c->buffer, "\r\nexpect: 100-continue"))
		send_all(c->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25);
	*end = saved;
	if (strncmp(path, "/health", 7)) {
		printf("peer=%s proxied=%s %s %s\n", c->peer, c->proxied, method, path);
		fflush(stdout);
	}
	if (!strcmp(method, "POST") || !strcmp(method, "PUT")) {
		ok = serve_post(c, used, length);
	} else {
		memmove(c->buffer, end, c->length - used);
		c->length -= used;
		ok = serve_get(c, path);
	}
	return ok && !close_after && !stopping;
}

/* More bytes into the buffer. False: end of file, error, or idle while the server stops. */
static bool fill(struct connection *c)
{
	struct pollfd p[2] = {{.fd = c->fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};

	while (poll(p, c->length == 0 ? 2 : 1, -1) < 0)
		;
	if (!p[0].revents)
		return false;
	ssize_t n = recv(c->fd, c->buffer + c->length, sizeof(c->buffer) - 1 - c->length, 0);

	if (n <= 0)
		return false;
	c->length += (size_t)n;
	return true;
}

/* A PROXY protocol v2 header, if the connection begins with one. */
static bool read_proxy(struct connection *c)
{
	static const unsigned char signature[12] = "\r\n\r\n\0\r\nQUIT\n";
	const unsigned char *b = (const unsigned char *)c->buffer;
	char text[INET6_ADDRSTRLEN] = "";
	size_t size;
	unsigned port = 0;

	while (c->length < 16) {
		if (c->length > 0 && memcmp(b, signature, c->length < 12 ? c->length : 12))
			return true;
		if (!fill(c))
			return false;
	}
	if (memcmp(b, signature, 12))
		return true;
	size = 16 + ((size_t)b[14] << 8 | b[15]);
	while (c->length < size)
		if (size > BLOCK / 2 || !fill(c))
			return false;
	if (b[13] >> 4 == 1) {
		inet_ntop(AF_INET, b + 16, text, sizeof(text));
		port = (unsigned)b[24] << 8 | b[25];
	} else if (b[13] >> 4 == 2) {
		inet_ntop(AF_INET6, b + 16, text, sizeof(text));
		port = (unsigned)b[48] << 8 | b[49];
	}
	snprintf(c->proxied, sizeof(c->proxied), strchr(text, ':') ? "[%s]:%u" : "%s:%u", text, port);
	memmove(c->buffer, c->buffer + size, c->length - size);
	c->length -= size;
	return true;
}

static void serve_http(struct connection *c)
{
	if (!read_proxy(c))
		return;
	for (;;) {
		char *end;

		c->buffer[c->length] = 0;
		end = strstr(c->buffer, "\r\n\r\n");
		if (end ? !serve_request(c, end + 4) : !fill(c))
			return;
	}
}

static void *serve(void *argument)
{
	struct connection *c = argument;
	ssize_t n;

	if (c->raw)
		while ((n = recv(c->fd, c->buffer, BLOCK, 0)) > 0 && send_all(c->fd, c->buffer, (size_t)n))
			;
	else
		serve_http(c);
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
	int fd = listener(SOCK_STREAM, l->port);
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
	}
	close(fd);
	l->done = true;
	return NULL;
}

static void *udp_loop(void *argument)
{
	int fd = listener(SOCK_DGRAM, 8082);
	static char data[BLOCK + 512];

	(void)argument;
	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof(from);
		int head = snprintf(data, 512, "%s ", task[0] ? task : hostname);
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

static void identity(char *into, const char *variable)
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
	prepare();
	gethostname(hostname, sizeof(hostname) - 1);
	identity(task, "TASK_ID");
	identity(task_name, "TASK_NAME");
	identity(node, "NODE");
	stop_fd = eventfd(0, EFD_CLOEXEC);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	pthread_create(&thread, NULL, accept_loop, &http);
	pthread_create(&thread, NULL, accept_loop, &echo);
	pthread_create(&thread, NULL, udp_loop, NULL);
	printf("started %s\n", hostname);
	fflush(stdout);
	sigwait(&signals, &caught);
	stopping = true;
	eventfd_write(stop_fd, 1);
	while (!http.done || !echo.done || active > 0)
		usleep(10000);
	printf("stopped %s\n", hostname);
	return 0;
}
