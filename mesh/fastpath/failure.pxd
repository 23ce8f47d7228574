# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

cdef int cause_of(int error) noexcept nogil
cdef bint is_scarce(int error) noexcept nogil
