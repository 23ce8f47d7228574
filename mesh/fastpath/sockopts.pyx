# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Socket options: keep-alive, reset on close, and reuse of source ports when the kernel has no free one."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from mesh._maglev cimport mesh_hash_again
from mesh.fastpath.sys cimport (
    EADDRINUSE, IPPROTO_TCP, SOL_SOCKET, SO_KEEPALIVE, SO_LINGER, SO_REUSEADDR, TCP_KEEPCNT,
    TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_USER_TIMEOUT, bind, connect, errno, fp_now, linger, setsockopt, sockaddr, sockaddr_in6)

cdef enum:
    KEEP_IDLE = 60  # seconds without data until the first keep-alive probe
    KEEP_INTERVAL = 15
    KEEP_COUNT = 4
    PROBE_PATIENCE = 5000  # ms; also for a peer that takes no more bytes
    PORT_TRIES = 64


cdef void set_probes(int fd, int idle, int interval, int count) noexcept nogil:
    cdef int on = 1
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count))


cdef void keep_alive(int fd) noexcept nogil:
    set_probes(fd, KEEP_IDLE, KEEP_INTERVAL, KEEP_COUNT)


cdef void probe_now(int fd) noexcept nogil:
    """Find out within seconds whether the peer is there still; else the connection breaks."""
    cdef int patience = PROBE_PATIENCE
    set_probes(fd, 1, 1, KEEP_COUNT)
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience, sizeof(patience))


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
