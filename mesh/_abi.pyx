# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""The contract for Python: every struct, constant and verdict of bpf/include/mesh/abi.h and geneve.h; see _abi.pyi.

Nothing is written twice: names are listed in mesh/_abi_members.h, the compiler takes all the rest from the contract.
"""

from libc.stdint cimport uint32_t

from mesh._layout cimport constants, layouts, mesh_constant, mesh_layout


cdef extern from "mesh/_abi_members.h":
    struct mesh_verdict_text:
        const char *name
        const char *help

    const mesh_layout mesh_layouts[]
    const mesh_constant mesh_constants[]
    const mesh_verdict_text mesh_verdict_texts[]
    const uint32_t mesh_table_sizes[]
    const size_t MESH_ADDRESS_SIZE "sizeof(struct mesh_addr)"
    const char *MESH_ABI_DIGEST


cdef tuple verdicts():
    cdef list found = []
    cdef const mesh_verdict_text *entry = mesh_verdict_texts
    while entry.name is not NULL:
        found.append((entry.name.decode(), entry.help.decode()))
        entry += 1
    return tuple(found)


cdef tuple table_sizes():
    cdef list found = []
    cdef const uint32_t *entry = mesh_table_sizes
    while entry[0]:
        found.append(entry[0])
        entry += 1
    return tuple(found)


ABI_DIGEST = MESH_ABI_DIGEST.decode()
ADDRESS_SIZE = MESH_ADDRESS_SIZE
TABLE_SIZES = table_sizes()
VERDICTS = verdicts()
LAYOUTS = layouts(mesh_layouts, __name__)

globals().update(constants(mesh_constants))
for name, layout in LAYOUTS.items():
    globals()[layout.record.__name__] = layout.record
    globals()[name.removeprefix("mesh_").upper()] = layout
del name, layout
