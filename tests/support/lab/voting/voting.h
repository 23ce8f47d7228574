/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the voting application's stand-ins share; see voting.c. */
#ifndef LAB_VOTING_H
#define LAB_VOTING_H

#include <pthread.h>
#include <stdbool.h>

#define LINE 512

/* Another service: one connection, made again when it is lost. */
struct peer {
	const char *host, *port;
	int fd;
	pthread_mutex_t lock;
};

bool send_text(int fd, const char *text);
/* One line without its end; false: end of file, error, or too long. */
bool read_line(int fd, char *line);
/* Ask a peer; `answer` is its line. What may have been done already is not asked twice. */
bool ask(struct peer *p, const char *request, char *answer);

#endif
