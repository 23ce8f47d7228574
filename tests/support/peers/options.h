/* SPDX-License-Identifier: Apache-2.0 */
/* Command line of load.c.
 *
 *   load [options] ADDRESS PORT
 *     -n N   connections in all, 0: until SIGTERM        -c N  at most so many at once
 *     -r N   connections per second, 0: unlimited        -t N  seconds at most
 *     -k MS  keep: open -c connections, one request on each every MS ms, until SIGTERM; -e: and once more after it
 *     -u S   path            -T S  seconds until a connection counts as timed out
 *     -b A   source address  -p N  bind to ports N, N + 1, ...    -v  print port and identity of each
 *     -L FD  a file of 8 bytes that holds the number of answers so far, for who maps it too
 */
#ifndef OPTIONS_H
#define OPTIONS_H

static unsigned long total, limit = 1, rate, seconds, keep;
static double timeout = 20;
static int first_port;
static bool verbose, ask_again;
static const char *path = "/", *source;
static unsigned long unseen, *answers_so_far = &unseen;
static struct addrinfo *target, *local;

static void options(int argc, char **argv)
{
	int option;

	while ((option = getopt(argc, argv, "n:c:r:t:k:u:T:b:p:L:ve")) != -1)
		switch (option) {
		case 'n':
			total = strtoul(optarg, NULL, 10);
			break;
		case 'c':
			limit = strtoul(optarg, NULL, 10);
			break;
		case 'r':
			rate = strtoul(optarg, NULL, 10);
			break;
		case 't':
			seconds = strtoul(optarg, NULL, 10);
			break;
		case 'k':
			keep = strtoul(optarg, NULL, 10);
			break;
		case 'u':
			path = optarg;
			break;
		case 'T':
			timeout = strtod(optarg, NULL);
			break;
		case 'b':
			source = optarg;
			break;
		case 'p':
			first_port = (int)strtol(optarg, NULL, 10);
			break;
		case 'L':
			answers_so_far = mmap(NULL, sizeof(*answers_so_far), PROT_READ | PROT_WRITE, MAP_SHARED,
					      (int)strtol(optarg, NULL, 10), 0);
			if (answers_so_far == MAP_FAILED) {
				perror("load: -L");
				exit(2);
			}
			break;
		case 'v':
			verbose = true;
			break;
		case 'e':
			ask_again = true;
			break;
		default:
			exit(2);
		}
	struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};

	if (argc - optind != 2 || getaddrinfo(argv[optind], argv[optind + 1], &hints, &target) ||
	    (source && getaddrinfo(source, "0", &hints, &local)) || !limit || (verbose && !total)) {
		fprintf(stderr, "load: what to do? see the head of load.c\n");
		exit(2);
	}
}

#endif
