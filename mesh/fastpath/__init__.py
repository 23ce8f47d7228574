# SPDX-License-Identifier: Apache-2.0
"""The proxy engine in C-level Cython: one extension module per responsibility, no Python object on the data path.

`.pxd` files declare, `.pyx` files implement. A module calls the functions that another one declares; only
`mesh._fastpath`, the Python API, is imported from outside. What may import what, lower layers first:

- sys (kernel and C library), types (all structs)
- address, failure (errno to Failure), pool (memory), epoll, sockopts, counts
- proof (of the swarm's key)
- choose (which backend), peer_acl (who may hand flows over), proto (PROXY protocol and peer protocol), tables
- conns, sessions (where connections and UDP sessions are kept)
- stream (moves bytes), tcp (life of a connection), accept (its beginning), udp (sessions and datagrams)
- worker (the loop of one thread)
"""
