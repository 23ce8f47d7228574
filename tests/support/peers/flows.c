/* SPDX-License-Identifier: Apache-2.0 */
/* Random flows, TCP and UDP, and who answers them: each answer says who gives it, whom it sees, and what it has got.
 *
 *   flows serve NAME PORT      both protocols, both IP versions
 *   flows call SEED COUNT AT_ONCE LIMIT < what
 *     SEED     of all choices              COUNT    flows in all (0: until SIGTERM)
 *     AT_ONCE  flows at most at a time     LIMIT    seconds after which an exchange counts as silent
 *     what: lines "source ADDRESS SECONDS" (SECONDS: its own limit, 0: LIMIT), "ports FIRST COUNT" (of the sources:
 * few, so that they are the same for several targets), "target SERVICE tcp|udp ADDRESS PORT LARGEST" (bytes of a
 * request or an answer)
 *
 * The caller prints a line for each flow, for UDP one for each exchange of it:
 *   F ID SERVICE PROTOCOL TARGET SOURCE PORT START END UP DOWN ROUNDS SENDS RESULT NAME SEEN SEEN_PORT
 * and every 20 ms "O TIME": all flows that started before TIME are over. Times are of CLOCK_MONOTONIC. RESULT is "ok",
 * or what became of it: an error's name, "closed" (before the answer was complete), "silent", "corrupt", "moved" (a
 * second answer of a connection comes from somebody else).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAGIC   0x4d464c57u
#define LARGEST 65536
#define RESEND  2.0 /* seconds without an answer to a datagram */
#define LATE    "-"
#define LAST    1 /* flag of a request: the server closes after its answer */

struct request {
	uint32_t magic, flags;
	uint64_t id;
	uint32_t up, down; /* bytes that follow, and that are to follow the answer */
};

struct answer {
	uint32_t magic, down;
	uint64_t id;
	uint32_t sum; /* of the request's bytes */
	uint16_t port, pad;
	unsigned char address[16];
	char name[24];
};

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t mix(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* Bytes that only this request, or this answer, has. */
static void fill(unsigned char *into, size_t size, uint64_t seed)
{
	for (size_t i = 0; i < size; i += 8) {
		uint64_t word = mix(&seed);

		memcpy(into + i, &word, size - i < 8 ? size - i : 8);
	}
}

static uint32_t sum(const unsigned char *data, size_t size)
{
	uint64_t h = 14695981039346656037ull;

	for (size_t i = 0; i < size; i += 8) {
		uint64_t word = 0;

		memcpy(&word, data + i, size - i < 8 ? size - i : 8);
		h = (h ^ word) * 1099511628211ull;
		h ^= h >> 29;
	}
	return (uint32_t)(h ^ h >> 32);
}

static uint64_t seed_up(uint64_t id)
{
	return id * 2 + 1;
}

static uint64_t seed_down(uint64_t id)
{
	return ~(id * 2);
}

static void mapped(const struct sockaddr_storage *from, unsigned char address[16], uint16_t *port)
{
	const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)from;
	const struct sockaddr_in *four = (const struct sockaddr_in *)from;

	memset(address, 0, 16);
	if (from->ss_family == AF_INET6) {
		memcpy(address, &six->sin6_addr, 16);
		*port = six->sin6_port;
	} else {
		memset(address + 10, 0xff, 2);
		memcpy(address + 12, &four->sin_addr, 4);
		*port = four->sin_port;
	}
}

static void watch(int fd, int poller, void *of, uint32_t events)
{
	struct epoll_event e = {.events = events, .data.ptr = of};

	epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
}

#include "flows_serve.h"

#include "flows_call.h"

int main(int argc, char **argv)
{
	struct rlimit files = {16384, 16384};

	setrlimit(RLIMIT_NOFILE, &files);
	signal(SIGPIPE, SIG_IGN);
	if (argc == 4 && !strcmp(argv[1], "serve"))
		serve(argv[2], (uint16_t)strtoul(argv[3], NULL, 10));
	if (argc == 6 && !strcmp(argv[1], "call"))
		return call(strtoull(argv[2], NULL, 10), strtoul(argv[3], NULL, 10), strtoul(argv[4], NULL, 10),
			    strtod(argv[5], NULL));
	fprintf(stderr, "flows: what to do? see the head of flows.c\n");
	return 2;
}
