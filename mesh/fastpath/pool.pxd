# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from mesh.fastpath.types cimport pool

cdef void *pool_take(pool *p) noexcept nogil
cdef void pool_give(pool *p, void *thing) noexcept nogil
cdef void pool_free(pool *p) noexcept nogil
