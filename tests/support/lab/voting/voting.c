/* SPDX-License-Identifier: Apache-2.0 */
/* Stand-ins for the five images of Docker's example voting application: static, one binary, the role is its argument.
 *
 *   vote    HTTP :80   GET / who answers and whom it sees, as JSON; GET /vote/CHOICE also leaves a vote with redis
 *   redis   :6379      inline commands RPUSH LIST VALUE and LPOP LIST, answers as the real one gives them
 *   worker  takes votes from redis and adds them to db, none twice and none lost while both live
 *   db      :5432      lines: "add CHOICE" -> "ok", "count" -> "A B"
 *   result  HTTP :80   GET / {"a": A, "b": B}
 *
 * Peers are called as `tasks.NAME`, which Docker's DNS answers with the tasks' own addresses: `NAME` is a virtual one
 * that needs IPVS in the kernel. HTTP has one request per connection. SIGTERM: nothing new is accepted, what is in
 * flight is finished.
 */
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "voting.h"

typedef void serve_line(char *line, char *answer);

struct caller {
	int fd;
	struct sockaddr_in from;
};

static char name[256];
static int stop_fd;
static atomic_bool stopping;
static atomic_int active;

static struct peer redis = {"tasks.redis", "6379", -1, PTHREAD_MUTEX_INITIALIZER};
static struct peer db = {"tasks.db", "5432", -1, PTHREAD_MUTEX_INITIALIZER};

/* ---- redis and db: lines ---- */

static pthread_mutex_t store = PTHREAD_MUTEX_INITIALIZER;

struct vote {
	struct vote *next;
	char value[LINE];
};

static struct vote *first, **last = &first;
static unsigned long pending, counts[2];

static void redis_line(char *line, char *answer)
{
	char verb[16] = "", list[64] = "", value[LINE] = "";
	struct vote *vote;

	sscanf(line, "%15s %63s %511s", verb, list, value);
	if (!strcmp(verb, "RPUSH")) {
		vote = calloc(1, sizeof(*vote));
		snprintf(vote->value, sizeof(vote->value), "%s", value);
		*last = vote;
		last = &vote->next;
		snprintf(answer, LINE, ":%lu\r\n", ++pending);
		return;
	}
	vote = first;
	if (strcmp(verb, "LPOP") || !vote) {
		snprintf(answer, LINE, "%s\r\n", strcmp(verb, "LPOP") ? "-ERR unknown command" : "$-1");
		return;
	}
	snprintf(answer, LINE, "$%zu\r\n%.400s\r\n", strlen(vote->value), vote->value);
	first = vote->next;
	last = first ? last : &first;
	pending--;
	free(vote);
}

static void db_line(char *line, char *answer)
{
	if (!strcmp(line, "add a") || !strcmp(line, "add b")) {
		counts[line[4] - 'a']++;
		snprintf(answer, LINE, "ok\n");
	} else {
		snprintf(answer, LINE, "%lu %lu\n", counts[0], counts[1]);
	}
}

/* ---- vote and result: HTTP ---- */

static void reply(int fd, int status, const char *body)
{
	char text[2 * LINE];

	snprintf(
		text, sizeof(text),
		"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n%s",
		status, strlen(body), body);
	send_text(fd, text);
}

static void serve_vote(const struct caller *c, const char *path)
{
	char body[LINE], request[LINE], answer[LINE] = "";

	if (!strncmp(path, "/vote/", 6)) {
		snprintf(request, sizeof(request), "RPUSH votes %.1s\r\n", path + 6);
		if (!ask(&redis, request, answer) || answer[0] != ':') {
			reply(c->fd, 503, "\"the vote could not be left with redis\"\n");
			return;
		}
	}
	snprintf(body, sizeof(body), "{\"task\": \"%s\", \"peer\": \"%s:%u\"}\n", name, inet_ntoa(c->from.sin_addr),
		 ntohs(c->from.sin_port));
	reply(c->fd, 200, body);
}

static void serve_result(const struct caller *c)
{
	char body[LINE], answer[LINE];
	unsigned long a, b;

	if (!ask(&db, "count\n", answer) || sscanf(answer, "%lu %lu", &a, &b) != 2) {
		reply(c->fd, 503, "\"db does not answer\"\n");
		return;
	}
	snprintf(body, sizeof(body), "{\"task\": \"%s\", \"a\": %lu, \"b\": %lu}\n", name, a, b);
	reply(c->fd, 200, body);
}

/* ---- roles ---- */

static const struct role {
	const char *name;
	uint16_t port;
	serve_line *line; /* NULL: HTTP */
} roles[] = {
	{"vote", 80, NULL},    {"result", 80, NULL}, {"redis", 6379, redis_line},
	{"db", 5432, db_line}, {"worker", 0, NULL},
};
static const struct role *role;

static void serve_http(const struct caller *c)
{
	char line[LINE], path[LINE] = "/";

	if (!read_line(c->fd, line))
		return;
	sscanf(line, "%*s %511s", path);
	while (read_line(c->fd, line) && line[0])
		;
	if (role == &roles[0])
		serve_vote(c, path);
	else
		serve_result(c);
}

static void *serve(void *argument)
{
	char line[LINE], answer[LINE];
	struct caller *c = argument;
	bool ok = true;

	if (!role->line)
		serve_http(c);
	while (role->line && ok && read_line(c->fd, line)) {
		pthread_mutex_lock(&store);
		role->line(line, answer);
		pthread_mutex_unlock(&store);
		ok = send_text(c->fd, answer);
	}
	close(c->fd);
	free(c);
	active--;
	return NULL;
}

static void start(int fd, const struct sockaddr_in *from)
{
	struct caller *c = malloc(sizeof(*c));
	pthread_attr_t attributes;
	pthread_t thread;

	*c = (struct caller){fd, *from};
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	active++;
	if (pthread_create(&thread, &attributes, serve, c)) {
		active--;
		close(fd);
		free(c);
	}
}

/* Accepts until the stop, and then what is still queued. */
static void *listen_loop(void *argument)
{
	struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = htons(role->port)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};
	socklen_t size = sizeof(from);

	(void)argument;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&from, sizeof(from)) || listen(fd, 4096)) {
		perror("listen");
		exit(1);
	}
	while (poll(p, 2, -1) < 0 || p[0].revents || !p[1].revents) {
		int peer = p[0].revents ? accept(fd, (struct sockaddr *)&from, &size) : -1;

		if (peer >= 0)
			start(peer, &from);
	}
	close(fd);
	return NULL;
}

static void *work_loop(void *argument)
{
	char vote[LINE], request[LINE + 8], answer[LINE];

	(void)argument;
	while (!stopping) {
		if (!ask(&redis, "LPOP votes\r\n", vote) || vote[0] == '$') {
			usleep(10000);
			continue;
		}
		snprintf(request, sizeof(request), "add %.1s\n", vote);
		while (!stopping && !ask(&db, request, answer))
			usleep(10000);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	sigset_t signals;
	pthread_t thread;
	int caught;

	for (size_t i = 0; i < sizeof(roles) / sizeof(*roles); i++)
		role = argc > 1 && !strcmp(argv[1], roles[i].name) ? &roles[i] : role;
	if (!role)
		return 2;
	gethostname(name, sizeof(name) - 1);
	stop_fd = eventfd(0, EFD_CLOEXEC);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	pthread_create(&thread, NULL, role->port ? listen_loop : work_loop, NULL);
	sigwait(&signals, &caught);
	stopping = true;
	eventfd_write(stop_fd, 1);
	pthread_join(thread, NULL);
	while (!role->line && active > 0)
		usleep(10000);
	return 0;
}
