/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the stand-in server share; see server.c. */
#ifndef LAB_SERVER_H
#define LAB_SERVER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define BLOCK         65536
#define FIRST_REQUEST 3000 /* ms that a connection without a request outlives SIGTERM */

struct connection {
	int fd;
	bool raw, served;
	char peer[80], proxied[80];
	char buffer[BLOCK];
	size_t length;
};

struct identity {
	char hostname[256], task[256], task_name[256], node[256];
};

extern struct identity identity;
extern atomic_bool stopping;
extern int stop_fd; /* readable once the server stops */

void http_prepare(void);
void http_serve(struct connection *c);
bool send_all(int fd, const void *data, size_t n);

#endif
