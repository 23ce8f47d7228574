/* SPDX-License-Identifier: Apache-2.0 */
/* Command line, threads, result as one line of JSON on standard output.
 *
 * load MODE --target A:P [--target ...] [--source A ...] [--connections N] [--threads N] [--payload BYTES]
 *      [--window N] [--rate PER_SECOND] [--warmup S] [--duration S]
 */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static const struct mode {
	const char *name;
	void (*work)(struct worker *w);
} modes[] = {
	{"connections", work_requests},
	{"requests", work_requests},
	{"rate", work_requests},
	{"down", work_bulk},
	{"up", work_bulk},
	{"datagrams", work_datagrams},
	{"hold", NULL},
};

static const struct mode *mode_of(const char *name)
{
	for (unsigned i = 0; i < sizeof(modes) / sizeof(*modes); i++)
		if (!strcmp(modes[i].name, name))
			return &modes[i];
	return NULL;
}

static void usage(const char *message)
{
	fprintf(stderr, "load: %s\n", message);
	exit(2);
}

static void add_target(struct options *o, char *text)
{
	char *colon = strrchr(text, ':');
	struct sockaddr_in *target = &o->targets[o->n_targets];

	if (o->n_targets == MAX_TARGETS)
		usage("too many targets");
	if (!colon)
		usage("a target is ADDRESS:PORT");
	*colon = 0;
	target->sin_family = AF_INET;
	target->sin_port = htons((uint16_t)atoi(colon + 1));
	if (inet_pton(AF_INET, text, &target->sin_addr) != 1)
		usage("a target's address is IPv4");
	o->n_targets++;
}

static void add_source(struct options *o, const char *text)
{
	if (o->n_sources == MAX_SOURCES || inet_pton(AF_INET, text, &o->sources[o->n_sources++]) != 1)
		usage("too many source addresses, or one that is not IPv4");
}

static void parse(struct options *o, int argc, char **argv)
{
	static const struct option names[] = {
		{"target", 1, 0, 't'},  {"source", 1, 0, 's'}, {"connections", 1, 0, 'c'}, {"threads", 1, 0, 'T'},
		{"payload", 1, 0, 'p'}, {"window", 1, 0, 'W'}, {"rate", 1, 0, 'r'},        {"duration", 1, 0, 'd'},
		{"warmup", 1, 0, 'w'},  {0, 0, 0, 0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (c) {
		case 't':
			add_target(o, optarg);
			break;
		case 's':
			add_source(o, optarg);
			break;
		case 'c':
			o->connections = (unsigned)atoi(optarg);
			break;
		case 'T':
			o->threads = (unsigned)atoi(optarg);
			break;
		case 'p':
			o->payload = (unsigned)atoi(optarg);
			break;
		case 'W':
			o->window = (unsigned)atoi(optarg);
			break;
		case 'r':
			o->rate = atof(optarg);
			break;
		case 'd':
			o->duration = atof(optarg);
			break;
		case 'w':
			o->warmup = atof(optarg);
			break;
		default:
			usage("unknown option");
		}
	}
	if (optind + 1 != argc || !mode_of(argv[optind]))
		usage("one mode: connections, requests, rate, down, up, datagrams or hold");
	o->mode = argv[optind];
	if (!o->n_targets || !o->connections || !o->threads || o->threads > MAX_THREADS)
		usage("a target, connections and threads are needed");
	if (o->payload < 16 || o->payload > MAX_PAYLOAD || o->rate <= 0 || !o->window)
		usage("payload is 16 to 4096 bytes; rate and window are positive");
	if (o->threads > o->connections)
		o->threads = o->connections;
}

static void *thread_main(void *argument)
{
	struct worker *w = argument;

	mode_of(w->options->mode)->work(w);
	return NULL;
}

static void sleep_until(uint64_t t)
{
	struct timespec deadline = {.tv_sec = (time_t)(t / SECOND), .tv_nsec = (long)(t % SECOND)};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, NULL))
		;
}

/* The machine's CPU time so far: the numbers of the first line of /proc/stat, in ticks. */
static void read_cpu(char *line, size_t size)
{
	FILE *f = fopen("/proc/stat", "r");
	char *p;

	if (!f || !fgets(line, (int)size, f))
		strcpy(line, "cpu 0 0 0 0 0 0 0 0\n");
	if (f)
		fclose(f);
	line[strcspn(line, "\n")] = 0;
	for (p = line + strlen(line); p > line && p[-1] == ' '; p--)
		p[-1] = 0;
	p = line + strspn(line, "cpu ");
	memmove(line, p, strlen(p) + 1);
	for (p = line; *p; p++)
		if (*p == ' ')
			*p = ',';
}

static void report(const struct options *o, const struct tally *t, const char *before, const char *after)
{
	const struct histogram *h = &t->latency;

	printf("{\"mode\": \"%s\", \"seconds\": %.3f, \"operations\": %llu, \"bytes\": %llu, ", o->mode, o->duration,
	       (unsigned long long)t->operations, (unsigned long long)t->bytes);
	print_errors(t);
	if (h->total) {
		static const struct {
			const char *name;
			double share;
		} marks[] = {{"p50", .5}, {"p90", .9}, {"p99", .99}, {"p999", .999}};

		printf(", \"latency_us\": {");
		for (unsigned i = 0; i < sizeof(marks) / sizeof(*marks); i++)
			printf("\"%s\": %.3f, ", marks[i].name, (double)histogram_percentile(h, marks[i].share) / 1e3);
		printf("\"mean\": %.3f, \"max\": %.3f}", (double)h->sum / (double)h->total / 1e3, (double)h->max / 1e3);
	}
	printf(", \"cpu_before\": [%s], \"cpu_after\": [%s], \"ticks_per_second\": %ld}\n", before, after,
	       sysconf(_SC_CLK_TCK));
}

static int measure(const struct options *o, struct worker *workers)
{
	static struct tally total;
	pthread_t threads[MAX_THREADS];
	char before[256], after[256];

	for (unsigned i = 0; i < o->threads; i++)
		if (pthread_create(&threads[i], NULL, thread_main, &workers[i]))
			usage("cannot start a thread");
	sleep_until(workers[0].start);
	read_cpu(before, sizeof(before));
	sleep_until(workers[0].stop);
	read_cpu(after, sizeof(after));
	for (unsigned i = 0; i < o->threads; i++) {
		pthread_join(threads[i], NULL);
		total.operations += workers[i].tally->operations;
		total.bytes += workers[i].tally->bytes;
		for (unsigned e = 0; e < ERROR_COUNT; e++)
			total.errors[e] += workers[i].tally->errors[e];
		histogram_merge(&total.latency, &workers[i].tally->latency);
	}
	report(o, &total, before, after);
	return 0;
}

int main(int argc, char **argv)
{
	struct options o = {.connections = 1,
			    .threads = 1,
			    .payload = 64,
			    .window = 16,
			    .rate = 1000,
			    .duration = 1,
			    .warmup = 0.2};
	static struct worker workers[MAX_THREADS];
	struct rlimit files;
	uint64_t start;

	parse(&o, argc, argv);
	o.seed = now();
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	start = now() + (uint64_t)(o.warmup * (double)SECOND);
	for (unsigned i = 0; i < o.threads; i++) {
		workers[i] = (struct worker){.options = &o, .index = i, .start = start, .rate = o.rate / o.threads};
		workers[i].connections = o.connections / o.threads + (i < o.connections % o.threads);
		workers[i].stop = start + (uint64_t)(o.duration * (double)SECOND);
		workers[i].tally = calloc(1, sizeof(*workers[i].tally));
	}
	if (!mode_of(o.mode)->work) {
		workers[0].connections = o.connections;
		return hold(&workers[0]);
	}
	return measure(&o, workers);
}
