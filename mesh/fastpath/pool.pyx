# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, cdivision=True
"""Pools of objects of one size: allocated in chunks of CHUNK, returned to the C library when the thread ends."""

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from mesh.fastpath.types cimport CHUNK


cdef bint pool_grow(pool *p) noexcept nogil:
    cdef char *block = <char *>calloc(1, sizeof(void *) + CHUNK * p.size)
    cdef int i
    if block is NULL:
        return False
    (<void **>block)[0] = p.chunks
    p.chunks = block
    for i in range(CHUNK):
        pool_give(p, block + sizeof(void *) + i * p.size)
    return True


cdef void *pool_take(pool *p) noexcept nogil:
    """A zeroed object, or NULL: no memory."""
    cdef void *thing
    if p.free is NULL and not pool_grow(p):
        return NULL
    thing = p.free
    p.free = (<void **>thing)[0]
    memset(thing, 0, p.size)
    return thing


cdef void pool_give(pool *p, void *thing) noexcept nogil:
    (<void **>thing)[0] = p.free
    p.free = thing


cdef void pool_free(pool *p) noexcept nogil:
    """Free all chunks, including objects that were not given back."""
    cdef void *block
    while p.chunks is not NULL:
        block = p.chunks
        p.chunks = (<void **>block)[0]
        free(block)
    p.free = NULL
