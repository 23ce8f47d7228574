/* SPDX-License-Identifier: Apache-2.0 */
/* What load.c counts, and the JSON it prints at its end. */
#ifndef TALLY_H
#define TALLY_H

struct tally {
	char cause[64];
	int identity;
	unsigned long count;
};

static char identities[256][64];
static unsigned long answers[256], started, succeeded, failed, requests;
static int identity_count;
static struct tally failures[512];
static int failure_count;
static double longest;
static char (*seen)[24]; /* "[port, identity]" of the i-th connection, for -v */
static unsigned long seen_count;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int identity_of(const char *text, size_t length)
{
	length = length < 63 ? length : 63;
	for (int i = 0; i < identity_count; i++)
		if (strlen(identities[i]) == length && !memcmp(identities[i], text, length))
			return i;
	if (identity_count == 256)
		return 255;
	memcpy(identities[identity_count], text, length);
	return identity_count++;
}

static void count_failure(const char *what, int error, int identity)
{
	char cause[64];
	int i;

	snprintf(cause, sizeof(cause), "%s%s%s", what, error ? ": " : "", error ? strerrorname_np(error) : "");
	for (i = 0; i < failure_count; i++)
		if (failures[i].identity == identity && !strcmp(failures[i].cause, cause))
			break;
	if (i == failure_count && i < 511) {
		failure_count++;
		memcpy(failures[i].cause, cause, sizeof(cause));
		failures[i].identity = identity;
	}
	failures[i].count++;
	failed++;
}

static void report(double took)
{
	printf("{\"started\": %lu, \"ok\": %lu, \"failed\": %lu, \"requests\": %lu, \"seconds\": %.3f, \"longest\": "
	       "%.3f",
	       started, succeeded, failed, requests, took, longest);
	printf(", \"identities\": {");
	for (int i = 0; i < identity_count; i++)
		printf("%s\"%s\": %lu", i ? ", " : "", identities[i], answers[i]);
	printf("}, \"failures\": [");
	for (int i = 0; i < failure_count; i++)
		printf("%s{\"cause\": \"%s\", \"identity\": \"%s\", \"count\": %lu}", i ? ", " : "", failures[i].cause,
		       failures[i].identity < 0 ? "" : identities[failures[i].identity], failures[i].count);
	printf("], \"names\": [");
	for (int i = 0; i < identity_count; i++)
		printf("%s\"%s\"", i ? ", " : "", identities[i]);
	printf("], \"seen\": [");
	for (unsigned long i = 0; i < seen_count; i++)
		printf("%s%s", i ? ", " : "", seen[i]);
	printf("]}\n");
}

#endif
