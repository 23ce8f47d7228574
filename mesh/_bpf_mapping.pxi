# SPDX-License-Identifier: Apache-2.0
# Part of _bpf.pyx: arrays shared with the programs.

from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap


cdef class Mapping:
    """An array map with MMAPABLE, written by plain stores: no system call, and a word is replaced as a whole.

    Element i starts at byte i * `step` (`value_size` rounded up to 8).
    """

    cdef uint8_t *base
    cdef readonly size_t size, step
    cdef readonly Map map

    def __cinit__(self, Map map not None):
        cdef void *found
        self.map = map
        self.step = (map.value_size + 7) & ~<size_t>7
        self.size = self.step * map.max_entries
        found = mmap(NULL, self.size, PROT_READ | PROT_WRITE, MAP_SHARED, map.fd, 0)
        if found == MAP_FAILED:
            raise failure(-last_error(), "mmap map", map.name)
        self.base = <uint8_t *>found

    def __dealloc__(self):
        if self.base is not NULL:
            munmap(self.base, self.size)

    cdef uint8_t *at(self, size_t offset, size_t length, size_t align) except NULL:
        if offset % align or offset > self.size or length > self.size - offset:
            raise IndexError(f"map {self.map.name}: {length} bytes at {offset} of {self.size}")
        return self.base + offset

    def read(self, size_t offset, size_t length):
        """Bytes as they are now; only aligned words are read as a whole."""
        return self.at(offset, length, 1)[:length]

    def write(self, size_t offset, const uint8_t[::1] data not None):
        """Copy bytes; programs may see any part of them first."""
        cdef size_t length = data.shape[0]
        cdef uint8_t *place = self.at(offset, length, 1)
        mesh_work.stores += 1
        mesh_work.bytes += length
        if length:
            with nogil:
                memcpy(place, &data[0], length)

    def load64(self, size_t offset):
        """An aligned 64-bit word."""
        return mesh_load64(<uint64_t *>self.at(offset, 8, 8))

    def store64(self, size_t offset, uint64_t value):
        """Replace an aligned 64-bit word; all that was written before is seen before it."""
        mesh_work.stores += 1
        mesh_work.bytes += 8
        mesh_store64(<uint64_t *>self.at(offset, 8, 8), value)

    def load32(self, size_t offset):
        """An aligned 32-bit word."""
        return mesh_load32(<uint32_t *>self.at(offset, 4, 4))

    def store32(self, size_t offset, uint32_t value):
        """Replace an aligned 32-bit word; all that was written before is seen before it."""
        mesh_work.stores += 1
        mesh_work.bytes += 4
        mesh_store32(<uint32_t *>self.at(offset, 4, 4), value)
