# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3

from mesh.fastpath.types cimport side, worker

cdef bint watch(worker *w, side *s) noexcept nogil
cdef void read_urgent(side *s) noexcept nogil
cdef void mute(worker *w, side *s) noexcept nogil
cdef void unmute(worker *w, side *s) noexcept nogil
