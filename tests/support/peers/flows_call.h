/* SPDX-License-Identifier: Apache-2.0 */
/* The calling side of flows.c. */
#ifndef FLOWS_CALL_H
#define FLOWS_CALL_H

enum state { FREE, CONNECTING, WRITING, READING, PAUSED };

struct source {
	char text[INET6_ADDRSTRLEN];
	struct sockaddr_storage address;
	double limit;
};

struct target {
	char service[24], text[INET6_ADDRSTRLEN];
	bool udp;
	struct sockaddr_storage address;
	socklen_t length;
	uint16_t port;
	uint32_t largest;
};

struct flow {
	enum state state;
	int fd;
	uint64_t id;
	const struct source *source;
	const struct target *target;
	uint16_t port;
	double start, since, until; /* of the flow, of the exchange or what it waits for, and when a pause ends */
	unsigned rounds, round, sends, end; /* end: 0 we close, 1 the server does, 2 we reset */
	uint32_t up, down;
	size_t sent, have;
	char name[24], seen[INET6_ADDRSTRLEN];
	uint16_t seen_port;
	unsigned char out[sizeof(struct request) + LARGEST], in[sizeof(struct answer) + LARGEST];
};

#define MOST 256
static struct source sources[MOST];
static struct target targets[MOST];
static unsigned source_count, target_count, first_port, port_count = 1;
static struct flow *flows;
static unsigned long at_once, started;
static uint64_t chance;
static double patience;
static int poller_of_calls;
static volatile sig_atomic_t told_to_stop;

static void told(int signal)
{
	(void)signal;
	told_to_stop = 1;
}

static unsigned below(unsigned limit)
{
	return limit ? (unsigned)(mix(&chance) % limit) : 0;
}

static socklen_t address_of(const char *text, uint16_t port, struct sockaddr_storage *into)
{
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)into;
	struct sockaddr_in *four = (struct sockaddr_in *)into;

	memset(into, 0, sizeof(*into));
	if (strchr(text, ':')) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		inet_pton(AF_INET6, text, &six->sin6_addr);
		return sizeof(*six);
	}
	four->sin_family = AF_INET;
	four->sin_port = htons(port);
	inet_pton(AF_INET, text, &four->sin_addr);
	return sizeof(*four);
}

static void read_what(void)
{
	char line[256], protocol[8];

	while (fgets(line, sizeof(line), stdin)) {
		struct source *s = &sources[source_count];
		struct target *t = &targets[target_count];

		if (sscanf(line, "source %45s %lf", s->text, &s->limit) == 2) {
			address_of(s->text, 0, &s->address);
			source_count++;
		} else if (sscanf(line, "target %23s %7s %45s %hu %u", t->service, protocol, t->text, &t->port,
				  &t->largest) == 5) {
			t->udp = !strcmp(protocol, "udp");
			t->length = address_of(t->text, t->port, &t->address);
			target_count++;
		} else if (sscanf(line, "ports %u %u", &first_port, &port_count) != 2) {
			fprintf(stderr, "flows: what is %s", line);
			exit(2);
		}
	}
}

static const char *outcome(int error)
{
	return error == EAGAIN ? "silent" : strerrorname_np(error);
}

/* Says what became of a flow, or of an exchange by datagrams. */
static void say(const struct flow *f, const char *result)
{
	printf("F %llu %s %s %s %s %u %.6f %.6f %u %u %u %u %s %s %s %u\n", (unsigned long long)f->id,
	       f->target->service, f->target->udp ? "udp" : "tcp", f->target->text, f->source->text, f->port,
	       f->target->udp ? f->since : f->start, now(), f->up, f->down, f->round, f->sends, result,
	       f->name[0] ? f->name : LATE, f->seen[0] ? f->seen : LATE, f->seen_port);
}

static void over(struct flow *f, const char *result)
{
	struct linger hard = {1, 0};

	if (result)
		say(f, result);
	if (f->end == 2)
		setsockopt(f->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	close(f->fd);
	f->state = FREE;
}

static void wants(struct flow *f, uint32_t events)
{
	struct epoll_event e = {.events = events, .data.ptr = f};

	epoll_ctl(poller_of_calls, EPOLL_CTL_MOD, f->fd, &e);
}

/* Sizes at which something changes: nothing, a word, a segment, several, all. */
static uint32_t a_size(uint32_t largest)
{
	static const uint32_t edges[] = {0,    1,    7,    512,  1180, 1220, 1336, 1372,
					 1400, 1448, 1460, 1472, 2896, 4096, 16384};
	uint32_t found = edges[below(sizeof(edges) / sizeof(*edges))] + below(3);

	switch (below(8)) {
	case 0:
		found = below(largest + 1);
		break;
	case 1:
		found = largest - below(3);
		break;
	case 2:
	case 3:
		found = below(300);
		break;
	}
	return found < largest ? found : largest;
}

static void ask(struct flow *f)
{
	struct request r = {.magic = MAGIC};
	uint32_t head = f->target->udp ? sizeof(r) : 0, back = f->target->udp ? sizeof(struct answer) : 0;

	f->round++;
	f->up = a_size(f->target->largest - head);
	f->down = a_size(f->target->largest - back);
	r.id = f->id + ((uint64_t)f->round << 56);
	r.up = f->up;
	r.down = f->down;
	r.flags = f->round == f->rounds && f->end == 1 ? LAST : 0;
	memcpy(f->out, &r, sizeof(r));
	fill(f->out + sizeof(r), f->up, seed_up(r.id));
	f->sent = f->have = 0;
	f->sends = 1;
	f->since = now();
	f->state = WRITING;
	if (f->target->udp) {
		f->name[0] = f->seen[0] = 0;
		f->state = READING;
		f->until = f->since + RESEND;
		if (send(f->fd, f->out, sizeof(r) + f->up, 0) < 0 && errno != EAGAIN)
			over(f, outcome(errno));
	}
}

/* An answer is complete. */
static void answered(struct flow *f)
{
	static unsigned char expected[LARGEST];
	struct answer a;
	uint64_t id = f->id + ((uint64_t)f->round << 56);

	memcpy(&a, f->in, sizeof(a));
	fill(expected, f->up, seed_up(id));
	if (a.magic != MAGIC || a.id != id || a.down != f->down || f->have != sizeof(a) + f->down ||
	    a.sum != sum(expected, f->up)) {
		over(f, "corrupt");
		return;
	}
	fill(expected, f->down, seed_down(id));
	if (memcmp(expected, f->in + sizeof(a), f->down)) {
		over(f, "corrupt");
		return;
	}
	a.name[sizeof(a.name) - 1] = 0;
	if (f->name[0] && strcmp(f->name, a.name)) {
		over(f, "moved");
		return;
	}
	memcpy(f->name, a.name, sizeof(f->name));
	inet_ntop(AF_INET6, a.address, f->seen, sizeof(f->seen));
	f->seen_port = ntohs(a.port);
	if (f->round == f->rounds) {
		over(f, "ok");
		return;
	}
	if (f->target->udp)
		say(f, "ok");
	f->state = PAUSED;
	f->until = now() + (double)below(4) * below(100) / 1000;
	wants(f, EPOLLIN);
}

static void reads(struct flow *f)
{
	size_t whole = sizeof(struct answer) + f->down;

	for (;;) {
		ssize_t n = f->target->udp ? recv(f->fd, f->in, sizeof(f->in), 0)
					   : recv(f->fd, f->in + f->have, whole - f->have, 0);

		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0 || (!n && !f->target->udp)) {
			over(f, n < 0 ? outcome(errno) : "closed");
			return;
		}
		if (f->target->udp) {
			uint64_t id;

			memcpy(&id, f->in + offsetof(struct answer, id), sizeof(id));
			if (f->state == PAUSED || id != f->id + ((uint64_t)f->round << 56))
				continue; /* of an earlier exchange of these ports, which was answered twice */
			f->have = (size_t)n;
			answered(f);
			return;
		}
		if (f->state == PAUSED) {
			over(f, "corrupt");
			return;
		}
		f->have += (size_t)n;
		if (f->have == whole) {
			answered(f);
			return;
		}
	}
}

static void writes(struct flow *f)
{
	size_t whole = sizeof(struct request) + f->up;

	while (f->sent < whole) {
		ssize_t n = send(f->fd, f->out + f->sent, whole - f->sent, MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) {
			over(f, outcome(errno));
			return;
		}
		f->sent += (size_t)n;
	}
	f->state = READING;
	wants(f, EPOLLIN);
}

static void happens(struct flow *f, uint32_t events)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (f->state == FREE)
		return;
	if (f->state == CONNECTING) {
		getsockopt(f->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error) {
			over(f, outcome(error));
			return;
		}
		ask(f);
	}
	if (f->state == WRITING && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
		writes(f);
	else if (f->state == READING || f->state == PAUSED)
		reads(f);
}

/* Whether a flow of these ends is under way. */
static bool is_taken(const struct flow *like)
{
	for (unsigned long i = 0; i < at_once; i++)
		if (&flows[i] != like && flows[i].state != FREE && flows[i].source == like->source &&
		    flows[i].target == like->target && flows[i].port == like->port)
			return true;
	return false;
}

/* A socket with the flow's source; in half of all cases at one of the few ports, if that is free. */
static bool opened(struct flow *f)
{
	struct sockaddr_storage from;
	socklen_t size = sizeof(from);
	int one = 1;

	for (unsigned attempt = 0; attempt < 2; attempt++) {
		f->port = !attempt && below(2) ? (uint16_t)(first_port + below(port_count)) : 0;
		if (f->port && is_taken(f))
			continue;
		f->fd = socket(f->source->address.ss_family,
			       (f->target->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);
		from = f->source->address;
		((struct sockaddr_in *)&from)->sin_port = htons(f->port);
		if (f->port)
			setsockopt(f->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		else
			setsockopt(f->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		setsockopt(f->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (!bind(f->fd, (struct sockaddr *)&from, f->target->length) &&
		    (!connect(f->fd, (const struct sockaddr *)&f->target->address, f->target->length) ||
		     errno == EINPROGRESS)) {
			size = sizeof(from);
			getsockname(f->fd, (struct sockaddr *)&from, &size);
			f->port = ntohs(((struct sockaddr_in *)&from)->sin_port);
			return true;
		}
		if (errno != EADDRINUSE && errno != EADDRNOTAVAIL)
			perror("flows: connect");
		close(f->fd);
	}
	return false;
}

static void begin(struct flow *f)
{
	f->id = (uint64_t)started;
	f->source = &sources[below(source_count)];
	do
		f->target = &targets[below(target_count)];
	while (f->target->address.ss_family != f->source->address.ss_family);
	f->rounds = below(3) ? 1 : 2 + below(3);
	f->round = 0;
	f->end = f->target->udp ? 0 : below(3);
	f->name[0] = f->seen[0] = 0;
	f->seen_port = 0;
	f->start = f->since = now();
	if (!opened(f))
		return;
	started++;
	f->state = CONNECTING;
	watch(f->fd, poller_of_calls, f, f->target->udp ? EPOLLIN : EPOLLIN | EPOLLOUT);
	if (f->target->udp)
		ask(f);
}

/* What is due by the clock. */
static void tick(unsigned long count)
{
	double t = now(), oldest = t;
	static double said;

	for (unsigned long i = 0; i < at_once; i++) {
		struct flow *f = &flows[i];
		double limit = f->state == FREE || f->source->limit == 0 ? patience : f->source->limit;

		if (f->state == FREE) {
			if (!told_to_stop && (!count || started < count))
				begin(f);
		} else if (f->state == PAUSED && t >= f->until) {
			ask(f);
			if (f->state == WRITING) {
				wants(f, EPOLLIN | EPOLLOUT);
				writes(f);
			}
		} else if (f->state != PAUSED && t - f->since > limit) {
			over(f, "silent");
		} else if (f->state == READING && f->target->udp && t > f->until) {
			f->sends++;
			f->until = t + RESEND;
			if (send(f->fd, f->out, sizeof(struct request) + f->up, 0) < 0 && errno != EAGAIN)
				over(f, outcome(errno));
		}
		if (f->state != FREE && f->start < oldest)
			oldest = f->start;
	}
	if (t - said > 0.02) {
		printf("O %.6f\n", oldest);
		fflush(stdout);
		said = t;
	}
}

static bool busy(void)
{
	for (unsigned long i = 0; i < at_once; i++)
		if (flows[i].state != FREE)
			return true;
	return false;
}

static int call(uint64_t seed, unsigned long count, unsigned long limit, double seconds)
{
	struct epoll_event events[256];

	read_what();
	chance = seed;
	at_once = limit;
	patience = seconds;
	flows = calloc(limit, sizeof(*flows));
	poller_of_calls = epoll_create1(0);
	signal(SIGTERM, told);
	for (double last = 0; busy() || (!told_to_stop && (!count || started < count));) {
		int n = epoll_wait(poller_of_calls, events, 256, 2);

		for (int i = 0; i < n; i++)
			happens(events[i].data.ptr, events[i].events);
		if (now() - last >= 0.002) {
			last = now();
			tick(count);
		}
	}
	printf("O %.6f\n", now());
	return 0;
}

#endif
