# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""What an errno means: the Failure that is counted, and whether the node itself is out of resources."""

from mesh.fastpath.sys cimport (
    EACCES, EADDRNOTAVAIL, ECONNREFUSED, ECONNRESET, EHOSTDOWN, EHOSTUNREACH, EMFILE, ENETDOWN, ENETUNREACH, ENFILE,
    ENOBUFS, ENOMEM, EPERM, EPIPE, ETIMEDOUT)
from mesh.fastpath.types cimport FAIL_LIMIT, FAIL_OTHER, FAIL_REFUSED, FAIL_RESET, FAIL_TIMEOUT, FAIL_UNREACHABLE


cdef int cause_of(int error) noexcept nogil:
    """The Failure that an errno of a connecting or established socket stands for."""
    if error == ECONNREFUSED:
        return FAIL_REFUSED
    if error == ETIMEDOUT:
        return FAIL_TIMEOUT
    if error == ECONNRESET or error == EPIPE:
        return FAIL_RESET
    if error == EHOSTUNREACH or error == ENETUNREACH or error == ENETDOWN or error == EHOSTDOWN:
        return FAIL_UNREACHABLE
    if error == EACCES or error == EPERM:
        return FAIL_UNREACHABLE
    if is_scarce(error) or error == EADDRNOTAVAIL:
        return FAIL_LIMIT
    return FAIL_OTHER


cdef bint is_scarce(int error) noexcept nogil:
    return error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM
