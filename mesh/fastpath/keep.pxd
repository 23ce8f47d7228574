# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Socket options of the backends' side: keep-alive, and source ports when the kernel has no fresh one."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from mesh.fastpath.sys cimport (
    AF_INET, EADDRINUSE, EADDRNOTAVAIL, EINPROGRESS, IPPROTO_TCP, SOL_SOCKET, SO_KEEPALIVE, SO_REUSEADDR, TCP_KEEPCNT,
    TCP_KEEPIDLE, TCP_KEEPINTVL, bind, connect, errno, fp_now, setsockopt, sockaddr, sockaddr_in, sockaddr_in6)
from mesh.fastpath.types cimport backend

cdef enum:
    KEEP_IDLE = 60  # seconds of silence until a peer is asked whether it lives
    KEEP_INTERVAL = 15
    KEEP_COUNT = 4
    PORT_FIRST = 32768
    PORT_COUNT = 28000
    PORT_TRIES = 32


cdef inline void keep_alive(int fd) noexcept nogil:
    cdef int value = 1
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, sizeof(value))
    value = KEEP_IDLE
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &value, sizeof(value))
    value = KEEP_INTERVAL
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &value, sizeof(value))
    value = KEEP_COUNT
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &value, sizeof(value))


cdef inline int bind_reusing(int fd, backend *b, uint32_t salt) noexcept nogil:
    """Connect from a port that is in TIME_WAIT. The kernel takes one (RFC 6191: the timestamps tell the connections
    apart) only where the port was asked for, whatever net.ipv4.tcp_tw_reuse says.

    Returns 0 or EINPROGRESS, or the errno of the last try.
    """
    cdef sockaddr_in6 local
    cdef int one = 1
    cdef int i
    cdef int error = EADDRNOTAVAIL
    cdef uint32_t port
    cdef uint8_t wire[2]
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one))
    memset(&local, 0, sizeof(local))
    local.sin6_family = b.address.sin6_family
    for i in range(PORT_TRIES):
        port = PORT_FIRST + <uint32_t>(((fp_now() >> 6) * 48271 + salt + <uint32_t>i * 7919) % PORT_COUNT)
        wire[0] = <uint8_t>(port >> 8)
        wire[1] = <uint8_t>port
        memcpy(&local.sin6_port, wire, 2)  # at the same place in a sockaddr_in
        if bind(fd, <const sockaddr *>&local, b.length) != 0:
            error = errno
            if error != EADDRINUSE:
                return error
            continue
        if connect(fd, <const sockaddr *>&b.address, b.length) == 0:
            return 0
        return errno
    return error
