# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Structs and constants of the kernel's interfaces, from its headers: rtnetlink, socket options, packets; see _linux.pyi."""

from mesh._layout cimport constants, layouts, mesh_constant, mesh_layout


cdef extern from "mesh/_linux_members.h":
    const mesh_layout linux_layouts[]
    const mesh_constant linux_constants[]


LAYOUTS = layouts(linux_layouts, __name__)

globals().update(constants(linux_constants))
for layout in LAYOUTS.values():
    globals()[layout.record.__name__] = layout.record
    globals()[layout.record.__name__.upper()] = layout
del layout
