/* SPDX-License-Identifier: Apache-2.0 */
/* Floods from invented addresses of one /16, at a steady rate. For use inside network namespaces.
 *
 * flood SOURCE_NETWORK TARGET_ADDRESS PORT RATE SECONDS [KIND]
 * KIND: syn (default), ack, fin or rst, each from another address; pair: a SYN and an ACK that guesses what it
 * acknowledges, acks: two ACKs, udp: two datagrams, each two packets from one address.
 * Prints one line of JSON: {"sent": N, "failed": N}.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
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
	union {
		struct tcphdr tcp;
		struct udphdr udp;
	};
};

struct kind {
	const char *name;
	uint8_t flags[2]; /* of the TCP header, of both packets from one address; the second 0: there is one */
	uint8_t udp;
};

static const struct kind kinds[] = {
	{"syn", {TH_SYN}, 0}, {"ack", {TH_ACK}, 0},          {"fin", {TH_FIN | TH_ACK}, 0},
	{"rst", {TH_RST}, 0}, {"pair", {TH_SYN, TH_ACK}, 0}, {"acks", {TH_ACK, TH_ACK}, 0},
	{"udp", {0, 1}, 1},
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

/* xorshift64 (G. Marsaglia). */
static uint32_t draw(void)
{
	static uint64_t x = 88172645463325252ull;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return (uint32_t)(x >> 16);
}

/* The sum of 16-bit words in network order, as long as the size is even. */
static uint32_t add(uint32_t sum, const void *data, size_t size)
{
	const uint8_t *bytes = data;

	for (size_t i = 0; i < size; i += 2)
		sum += (uint32_t)bytes[i] << 8 | bytes[i + 1];
	return sum;
}

/* The checksum of a transport header with its pseudo header (RFC 9293, RFC 768), in network order. */
static uint16_t checksum(const struct iphdr *ip, const void *header, size_t size)
{
	uint32_t sum = add(ip->protocol + (uint32_t)size, &ip->saddr, 2 * sizeof(ip->saddr));

	sum = add(sum, header, size);
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	sum = ~sum & 0xffff;
	return htons((uint16_t)(sum || ip->protocol == IPPROTO_TCP ? sum : 0xffff));
}

/* A packet from this address and port. Returns its size. */
static size_t fill(struct segment *s, const struct kind *kind, uint8_t flags, uint32_t source, uint16_t from)
{
	size_t size = kind->udp ? sizeof(s->udp) : sizeof(s->tcp);

	memset(s, 0, sizeof(*s));
	s->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = kind->udp ? IPPROTO_UDP : IPPROTO_TCP};
	s->ip.saddr = htonl(source);
	s->ip.daddr = target.sin_addr.s_addr;
	s->ip.tot_len = htons((uint16_t)(sizeof(s->ip) + size));
	if (kind->udp) {
		s->udp.source = htons(from);
		s->udp.dest = port;
		s->udp.len = htons((uint16_t)size);
		s->udp.check = checksum(&s->ip, &s->udp, size);
	} else {
		s->tcp.source = htons(from);
		s->tcp.dest = port;
		s->tcp.seq = htonl(draw());
		s->tcp.ack_seq = flags & TH_ACK ? htonl(draw()) : 0;
		s->tcp.doff = 5;
		s->tcp.th_flags = flags;
		s->tcp.window = htons(65535);
		s->tcp.check = checksum(&s->ip, &s->tcp, size);
	}
	return sizeof(s->ip) + size;
}

/* The packets of one call, two by two from one address where the kind says so. */
static void fill_all(const struct kind *kind, uint32_t network)
{
	uint32_t source = 0;
	uint16_t from = 0;

	for (unsigned i = 0; i < BATCH; i++) {
		unsigned second = kind->flags[1] ? i & 1 : 0;

		if (!second) {
			source = (network & 0xffff0000u) | (draw() & 0xffff);
			from = (uint16_t)(1024 + draw() % 60000);
		}
		vectors[i].iov_len = fill(&segments[i], kind, kind->flags[second], source, from);
	}
}

static void flood(int fd, const struct kind *kind, uint32_t network, double rate, double seconds)
{
	uint64_t start = now(), stop = start + (uint64_t)(seconds * (double)SECOND);
	uint64_t sent = 0, failed = 0, t;

	while ((t = now()) < stop) {
		uint64_t due = (uint64_t)((double)(t - start) / (double)SECOND * rate);

		if (sent + failed >= due) {
			usleep(500);
			continue;
		}
		fill_all(kind, network);
		int n = sendmmsg(fd, messages, BATCH, 0);

		sent += n > 0 ? (uint64_t)n : 0;
		failed += n < BATCH ? (uint64_t)(BATCH - (n > 0 ? n : 0)) : 0;
	}
	printf("{\"sent\": %llu, \"failed\": %llu}\n", (unsigned long long)sent, (unsigned long long)failed);
}

static const struct kind *find_kind(const char *name)
{
	for (unsigned i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		if (!strcmp(kinds[i].name, name))
			return &kinds[i];
	return NULL;
}

int main(int argc, char **argv)
{
	const struct kind *kind = find_kind(argc > 6 ? argv[6] : "syn");
	struct in_addr network;
	int one = 1;
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);

	if (argc < 6 || argc > 7 || !kind || inet_pton(AF_INET, argv[1], &network) != 1 ||
	    inet_pton(AF_INET, argv[2], &target.sin_addr) != 1) {
		fprintf(stderr, "usage: flood SOURCE_NETWORK TARGET_ADDRESS PORT RATE SECONDS [KIND]\n");
		return 2;
	}
	if (fd < 0 || setsockopt(fd, IPPROTO_IP, IP_HDRINCL, &one, sizeof(one))) {
		perror("flood: raw socket");
		return 1;
	}
	for (unsigned i = 0; i < BATCH; i++) {
		vectors[i].iov_base = &segments[i];
		messages[i].msg_hdr = (struct msghdr){
			.msg_name = &target, .msg_namelen = sizeof(target), .msg_iov = &vectors[i], .msg_iovlen = 1};
	}
	port = htons((uint16_t)atoi(argv[3]));
	flood(fd, kind, ntohl(network.s_addr), atof(argv[4]), atof(argv[5]));
	return 0;
}
