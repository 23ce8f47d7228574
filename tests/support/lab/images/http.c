/* SPDX-License-Identifier: Apache-2.0 */
/* The HTTP part of the stand-in server; see server.c. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server.h"

static atomic_bool unhealthy;
static unsigned char pattern[BLOCK];
static uint32_t crc_table[256];

void http_prepare(void)
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

bool send_all(int fd, const void *data, size_t n)
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
	int n = snprintf(head, sizeof(head),
			 "HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n%s\r\n%s", status,
			 strlen(body), stopping ? "Connection: close\r\n" : "", body);

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
		 identity.hostname, identity.task, identity.task_name, identity.node, c->peer, c->proxied);
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

	c->served = true;
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

/* More bytes into the buffer. False: end of file, error, or idle while the server stops. A connection that has had no
 * answer yet is not idle: its request may be on the way, for a while. */
static bool fill(struct connection *c)
{
	struct pollfd p[2] = {{.fd = c->fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};

	while (poll(p, c->length == 0 ? 2 : 1, -1) < 0)
		;
	if (!p[0].revents && !c->served)
		while (poll(p, 1, FIRST_REQUEST) < 0)
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

void http_serve(struct connection *c)
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
