# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Socket options: keep-alive, reset on close, and reuse of source ports when the kernel has no free one."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from mesh._maglev cimport mesh_hash_again
from mesh.fastpath.sys cimport (
    EADDRINUSE, IPPROTO_TCP, SOL_SOCKET, SO_KEEPALIVE, SO_LINGER, SO_REUSEADDR, TCP_KEEPCNT,
    TCP_KEEPIDLE, TCP_KEEPINTVL, bind, connect, errno, fp_now, linger, setsockopt, sockaddr, sockaddr_in6)

cdef enum:
    KEEP_IDLE = 60  # seconds without data until the first keep-alive probe
    KEEP_INTERVAL = 15
    KEEP_COUNT = 4
    PORT_TRIES = 64


cdef void keep_alive(int fd) noexcept nogil:
    cdef int value = 1
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, sizeof(value))
    value = KEEP_IDLE
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &value, sizeof(value))
    value = KEEP_INTERVAL
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &value, sizeof(value))
    value = KEEP_COUNT
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &value, sizeof(value))


cdef void allow_reuse(int fd) noexcept nogil:
    """Let the port of this socket be reused while it is in TIME_WAIT."""
    cdef int on = 1
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on))


cdef void set_reset(int fd) noexcept nogil:
    """Let close() send a reset."""
    cdef linger hard
    hard.l_onoff = 1
    hard.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard))


cdef int connect_reusing_port(engine *e, int fd, backend *b) noexcept nogil:
    """Connect from a port that is in TIME_WAIT (RFC 6191: timestamps tell the connections apart).

    The kernel allows that only for a port that is named by bind(), whatever net.ipv4.tcp_tw_reuse says.
    Returns 0 or EINPROGRESS; EADDRNOTAVAIL: the port has a connection to this backend, so another socket may try; or
    another errno.
    """
    cdef sockaddr_in6 local
    cdef int i
    cdef uint64_t seed = fp_now()
    cdef uint32_t port
    cdef uint8_t wire[2]
    allow_reuse(fd)
    memset(&local, 0, sizeof(local))
    local.sin6_family = b.address.sin6_family
    for i in range(PORT_TRIES):
        port = e.port_first + <uint32_t>(mesh_hash_again(<uint32_t>seed, <uint32_t>i) % e.port_count)
        wire[0] = <uint8_t>(port >> 8)
        wire[1] = <uint8_t>port
        memcpy(&local.sin6_port, wire, 2)  # at the same place in a sockaddr_in
        if bind(fd, <const sockaddr *>&local, b.length) == 0:
            return 0 if connect(fd, <const sockaddr *>&b.address, b.length) == 0 else errno
        if errno != EADDRINUSE:
            return errno
    return EADDRINUSE
