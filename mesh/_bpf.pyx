# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False
"""libbpf for Python: object files, maps, programs and links as owned file descriptors.

Every call that enters the kernel runs without the GIL. Every failure is a `mesh.errors.BpfError` that names the call,
the object and the errno; a failed load carries the end of the verifier's log. Sizes are bytes, values are raw bytes:
`mesh.datapath.kernel.codec` gives them their meaning.
"""

import errno as errnos
import os
import sys
from typing import NamedTuple

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from mesh._libbpf cimport *

from mesh.errors import BpfError

HASH = BPF_MAP_TYPE_HASH
ARRAY = BPF_MAP_TYPE_ARRAY
PERCPU_HASH = BPF_MAP_TYPE_PERCPU_HASH
PERCPU_ARRAY = BPF_MAP_TYPE_PERCPU_ARRAY
LRU_HASH = BPF_MAP_TYPE_LRU_HASH
LPM_TRIE = BPF_MAP_TYPE_LPM_TRIE
ARRAY_OF_MAPS = BPF_MAP_TYPE_ARRAY_OF_MAPS
HASH_OF_MAPS = BPF_MAP_TYPE_HASH_OF_MAPS
MMAPABLE = BPF_F_MMAPABLE
NO_PREALLOC = BPF_F_NO_PREALLOC
INNER_MAP = BPF_F_INNER_MAP
ANY, NOEXIST, EXIST = 0, 1, 2

cdef set PER_CPU = {BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_LRU_PERCPU_HASH}
cdef enum:
    CHUNK = 4096  # entries per batch call
    LOG_TAIL = 4096  # characters of a verifier log that an error carries


cdef object failure(int code, str call, str what, bint log=False):
    """The BpfError of a negative errno."""
    cdef str text = f"{call} {what}: {errnos.errorcode.get(-code, -code)} ({os.strerror(-code)})"
    cdef str tail
    if log:
        tail = mesh_log_text().decode("utf-8", "replace").strip()[-LOG_TAIL:]
        text = f"{text}\n{tail}" if tail else text
    error = BpfError(text)
    error.errno = -code
    return error


def possible_cpus():
    """How many values a per-CPU map has per key."""
    return libbpf_num_possible_cpus()


def map_work():
    """What the calling thread has done to maps so far: (system calls, stores to mapped arrays, bytes stored)."""
    return mesh_work.calls, mesh_work.stores, mesh_work.bytes


cdef class Handle:
    """An owned file descriptor of the bpf file system's kind; closed with the object."""

    cdef int fd
    cdef readonly str name

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close_fd(self.fd)

    def close(self):
        """Give the descriptor back; the kernel's object lives on while it is pinned or attached."""
        if self.fd >= 0:
            close_fd(self.fd)
            self.fd = -1

    def fileno(self):
        return self.fd

    def pin(self, str path not None):
        """Pin under a path of a bpf file system."""
        cdef bytes where = os.fsencode(path)
        cdef const char *raw = where
        cdef int err
        with nogil:
            err = bpf_obj_pin(self.fd, raw)
        if err:
            raise failure(err, "pin", f"{self.name} at {path}")


cdef int pinned(str path) except -1:
    cdef bytes where = os.fsencode(path)
    cdef const char *raw = where
    cdef int fd
    with nogil:
        fd = bpf_obj_get(raw)
    if fd < 0:
        raise failure(fd, "open pin", path)
    return fd


cdef class Map(Handle):
    """A map. `stride`: bytes of one value as read: `value_size`, or for a per-CPU map all CPUs' values, each padded to
    8 bytes."""

    cdef readonly uint32_t kind, id, key_size, value_size, max_entries, flags
    cdef readonly size_t stride
    cdef readonly bint per_cpu

    @staticmethod
    cdef Map own(int fd):
        cdef Map map = Map.__new__(Map)
        cdef bpf_map_info info
        cdef uint32_t size = sizeof(info)
        cdef int err
        memset(&info, 0, sizeof(info))
        map.fd = fd
        with nogil:
            err = bpf_obj_get_info_by_fd(fd, &info, &size)
        if err:
            raise failure(err, "map info", f"of descriptor {fd}")
        map.name = info.name.decode()
        map.kind, map.id, map.flags = info.type, info.id, info.map_flags
        map.key_size, map.value_size, map.max_entries = info.key_size, info.value_size, info.max_entries
        map.per_cpu = info.type in PER_CPU
        map.stride = info.value_size
        if map.per_cpu:
            map.stride = ((info.value_size + 7) & ~7) * libbpf_num_possible_cpus()
        return map

    @staticmethod
    def create(int kind, str name not None, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
               uint32_t flags=0, Map inner=None):
        """A new map. `inner`: for a map of maps, a map like those it will hold."""
        cdef bytes raw = name.encode()[:15]
        cdef const char *text = raw
        cdef int fd, inner_fd = -1 if inner is None else inner.fd
        mesh_work.calls += 1
        with nogil:
            fd = mesh_map_create(kind, text, key_size, value_size, max_entries, flags, inner_fd)
        if fd < 0:
            raise failure(fd, "create map", name)
        return Map.own(fd)

    @staticmethod
    def open(str path not None):
        """The map pinned at `path`."""
        return Map.own(pinned(path))

    @staticmethod
    def by_id(uint32_t id):
        """The map with the kernel's id (what reading a map of maps gives)."""
        cdef int fd = bpf_map_get_fd_by_id(id)
        if fd < 0:
            raise failure(fd, "open map", f"with id {id}")
        return Map.own(fd)

    cdef object check(self, const uint8_t[::1] data, size_t size, str what):
        if <size_t>data.shape[0] != size:
            raise ValueError(f"map {self.name}: a {what} is {size} bytes, not {data.shape[0]}")

    def lookup(self, const uint8_t[::1] key not None):
        """The value of `key` (`stride` bytes), or None."""
        cdef bytearray value = bytearray(self.stride)
        cdef uint8_t[::1] out = value
        cdef int err
        self.check(key, self.key_size, "key")
        mesh_work.calls += 1
        with nogil:
            err = bpf_map_lookup_elem(self.fd, &key[0], &out[0])
        if err == -ENOENT:
            return None
        if err:
            raise failure(err, "look up in map", self.name)
        return bytes(value)

    def update(self, const uint8_t[::1] key not None, const uint8_t[::1] value not None, uint64_t flags=0):
        """Store one value. For a map of maps the value is the inner map's descriptor, 4 bytes in host order."""
        cdef int err
        self.check(key, self.key_size, "key")
        self.check(value, self.stride, "value")
        mesh_work.calls += 1
        with nogil:
            err = bpf_map_update_elem(self.fd, &key[0], &value[0], flags)
        if err:
            raise failure(err, "update map", self.name)

    def delete(self, const uint8_t[::1] key not None):
        """Delete a key. Returns whether it was there."""
        cdef int err
        self.check(key, self.key_size, "key")
        mesh_work.calls += 1
        with nogil:
            err = bpf_map_delete_elem(self.fd, &key[0])
        if err and err != -ENOENT:
            raise failure(err, "delete from map", self.name)
        return err == 0

    def update_batch(self, const uint8_t[::1] keys not None, const uint8_t[::1] values not None):
        """Store many values by one system call (one RCU grace period for a map of maps)."""
        cdef uint32_t count = <uint32_t>(keys.shape[0] // self.key_size)
        cdef int err
        if count == 0:
            return
        self.check(keys, <size_t>count * self.key_size, "batch of keys")
        self.check(values, count * self.stride, "batch of values")
        mesh_work.calls += 1
        with nogil:
            err = mesh_batch_update(self.fd, &keys[0], &values[0], &count)
        if err:
            raise failure(err, "batch update map", f"{self.name}, after {count} entries")

    def delete_batch(self, const uint8_t[::1] keys not None):
        """Delete many keys; those that are not there are left out. Returns how many were deleted."""
        cdef uint32_t total = <uint32_t>(keys.shape[0] // self.key_size), done = 0, count
        cdef uint32_t deleted = 0
        cdef int err
        while done < total:
            count = total - done
            mesh_work.calls += 1
            with nogil:
                err = mesh_batch_delete(self.fd, &keys[done * self.key_size], &count)
            if err and err != -ENOENT:
                raise failure(err, "batch delete from map", self.name)
            deleted += count
            done += count + (1 if err else 0)
        return deleted

    def dump(self, uint32_t limit=0xffffffff):
        """All entries, or about the first `limit` of an array.

        Returns:
            (keys, values): count x key_size and count x stride bytes. Concurrent changes may or may not be seen.
        """
        cdef uint32_t chunk = min(<uint32_t>CHUNK, limit, max(1, self.max_entries)), count, total = 0
        cdef bytearray keys = bytearray(), values = bytearray()
        cdef uint8_t *k = NULL
        cdef uint8_t *v = NULL
        cdef uint8_t token[256]
        cdef bint first = True
        cdef int err = 0
        if limit == 0:
            return b"", b""
        try:
            while err != -ENOENT and total < limit:
                if k is NULL:
                    k = <uint8_t *>malloc(<size_t>chunk * self.key_size)
                    v = <uint8_t *>malloc(chunk * self.stride)
                    if k is NULL or v is NULL:
                        raise MemoryError
                count = min(chunk, limit - total)
                mesh_work.calls += 1
                with nogil:
                    err = bpf_map_lookup_batch(self.fd, NULL if first else token, token, k, v, &count, NULL)
                if err == -ENOSPC:  # one bucket of the hash does not fit: a larger chunk
                    free(k)
                    free(v)
                    k = v = NULL
                    chunk *= 2
                    limit = max(limit, total + chunk)
                    continue
                if err == -EINTR:
                    continue
                if err and err != -ENOENT:
                    raise failure(err, "batch look-up in map", self.name)
                keys += k[:<size_t>count * self.key_size]
                values += v[:count * self.stride]
                total += count
                first = False
        finally:
            free(k)
            free(v)
        return bytes(keys), bytes(values)

    def rows(self):
        """Iterate over all entries, each (key, value) bytes; see `dump`."""
        keys, values = self.dump()
        cdef Py_ssize_t k = self.key_size, v = self.stride, i
        for i in range(len(keys) // k):
            yield keys[i * k:(i + 1) * k], values[i * v:(i + 1) * v]

    def sums(self, uint32_t limit=0xffffffff):
        """As `dump`, each value a row of u64 summed over the CPUs: (keys, count x value_size bytes)."""
        cdef bytes keys, raw
        cdef size_t words = self.value_size // 8, count, i, j, cpu, cpus
        cdef uint64_t *out
        cdef const uint64_t *row
        cdef bytearray total
        if not self.per_cpu or self.value_size % 8:
            raise ValueError(f"map {self.name} is not a per-CPU map of u64 counters")
        keys, raw = self.dump(limit)
        cpus = self.stride // self.value_size
        count = len(raw) // self.stride
        total = bytearray(count * self.value_size)
        if count:
            out = <uint64_t *><char *>total
            row = <const uint64_t *><const char *>raw
            with nogil:
                for i in range(count):
                    for cpu in range(cpus):
                        for j in range(words):
                            out[i * words + j] += row[(i * cpus + cpu) * words + j]
        return keys, bytes(total)

    def freeze(self):
        """Make it read-only for user space, for good."""
        cdef int err
        with nogil:
            err = bpf_map_freeze(self.fd)
        if err:
            raise failure(err, "freeze map", self.name)


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


class RunResult(NamedTuple):
    """What a test run gave: return code, packet and context afterwards, mean nanoseconds per round."""

    retval: int
    data: bytes
    ctx: bytes
    nanoseconds: int


cdef class Program(Handle):
    """A loaded program."""

    cdef readonly uint32_t kind, id
    cdef readonly bytes tag

    @staticmethod
    cdef Program own(int fd):
        cdef Program program = Program.__new__(Program)
        program.fd = fd
        program.statistics()
        return program

    @staticmethod
    def open(str path not None):
        """The program pinned at `path`."""
        return Program.own(pinned(path))

    @staticmethod
    def by_id(uint32_t id):
        """The program with the kernel's id."""
        cdef int fd = bpf_prog_get_fd_by_id(id)
        if fd < 0:
            raise failure(fd, "open program", f"with id {id}")
        return Program.own(fd)

    @staticmethod
    def passing():
        """A tc program that passes every packet on, to find out whether attaching works."""
        cdef int fd
        mesh_log_start()
        with nogil:
            fd = mesh_passing()
        if fd < 0:
            raise failure(fd, "load", "an empty program", log=True)
        return Program.own(fd)

    def statistics(self):
        """(nanoseconds, runs) while `Statistics` were on."""
        cdef bpf_prog_info info
        cdef uint32_t size = sizeof(info)
        cdef int err
        memset(&info, 0, sizeof(info))
        with nogil:
            err = bpf_obj_get_info_by_fd(self.fd, &info, &size)
        if err:
            raise failure(err, "program info", self.name or f"of descriptor {self.fd}")
        self.name = info.name.decode()
        self.kind, self.id, self.tag = info.type, info.id, info.tag[:8]
        return info.run_time_ns, info.run_cnt

    def test_run(self, bytes data=b"", bytes ctx=b"", int repeat=1, uint32_t room=512, uint32_t flags=0):
        """Run with a packet and a context (such as __sk_buff) by BPF_PROG_TEST_RUN.

        Args:
            repeat: rounds; each sees what the one before it has written.
            room: bytes by which the packet may grow.

        Returns:
            RunResult.
        """
        cdef uint32_t size = <uint32_t>len(data), out_size = size + room, ctx_size = <uint32_t>len(ctx)
        cdef uint32_t retval = 0, nanoseconds = 0
        cdef bytearray out = bytearray(out_size or 1), ctx_out = bytearray(ctx_size or 1)
        cdef const char *raw = data
        cdef const char *ctx_raw = ctx
        cdef char *out_raw = out
        cdef char *ctx_out_raw = ctx_out
        cdef int err
        with nogil:
            err = mesh_test_run(self.fd, raw, size, out_raw if size else NULL, &out_size, ctx_raw, ctx_out_raw,
                                &ctx_size, repeat, flags, &retval, &nanoseconds)
        if err:
            raise failure(err, "test run of", self.name)
        return RunResult(retval, bytes(out[:out_size if size else 0]), bytes(ctx_out[:ctx_size]), nanoseconds)


cdef class Link(Handle):
    """An attachment that lives while it is open or pinned; `update` replaces its program without a gap."""

    @staticmethod
    def create(Program program not None, int target, int kind, uint32_t flags=0):
        """Attach by BPF_LINK_CREATE. `target`: a descriptor (cgroup), or for tcx and XDP an interface's index."""
        cdef Link link = Link.__new__(Link)
        with nogil:
            link.fd = mesh_link(program.fd, target, kind, flags)
        link.name = program.name
        if link.fd < 0:
            raise failure(link.fd, "attach", f"{program.name} to target {target}, attach type {kind}")
        return link

    @staticmethod
    def open(str path not None):
        """The link pinned at `path`."""
        cdef Link link = Link.__new__(Link)
        link.fd = pinned(path)
        link.name = os.path.basename(path)
        return link

    def update(self, Program program not None):
        """Replace the program, atomically."""
        cdef int err
        with nogil:
            err = bpf_link_update(self.fd, program.fd, NULL)
        if err:
            raise failure(err, "update link", self.name)

    def detach(self):
        """Detach although others may hold the link."""
        cdef int err
        with nogil:
            err = bpf_link_detach(self.fd)
        if err:
            raise failure(err, "detach link", self.name)

    def info(self):
        """(program id, interface index): the index is 0 once the interface is gone; for other kinds meaningless."""
        cdef bpf_link_info info
        cdef uint32_t size = sizeof(info)
        cdef int err
        memset(&info, 0, sizeof(info))
        with nogil:
            err = bpf_obj_get_info_by_fd(self.fd, &info, &size)
        if err:
            raise failure(err, "link info", self.name)
        return info.prog_id, info.xdp.ifindex


class Statistics(Handle):
    """While it is open the kernel counts run time and runs of all programs (some 20 ns a run)."""

    def __init__(self):
        statistics_on(self)


cdef statistics_on(Handle handle):
    handle.fd = bpf_enable_stats(0)
    handle.name = "statistics"
    if handle.fd < 0:
        raise failure(handle.fd, "enable", "run-time statistics")


def tc_attach(Program program not None, int ifindex, bint ingress, uint32_t handle, uint32_t priority):
    """Attach as a direct-action filter of clsact, or replace the one of that handle and priority in place.

    Returns:
        Whether the clsact qdisc was created by this call.
    """
    cdef int created = 0, err
    mesh_log_start()
    with nogil:
        err = mesh_tc(program.fd, ifindex, ingress, handle, priority, 1, &created)
    if err:
        raise failure(err, "attach", f"{program.name} to clsact of interface {ifindex}", log=True)
    return created != 0


def tc_detach(int ifindex, bint ingress, uint32_t handle, uint32_t priority):
    """Remove a clsact filter. Returns whether it was there."""
    cdef int created = 0, err
    mesh_log_start()
    with nogil:
        err = mesh_tc(-1, ifindex, ingress, handle, priority, 0, &created)
    return err == 0


def tc_clear(int ifindex):
    """Remove the clsact qdisc with all its filters."""
    cdef int err
    with nogil:
        err = mesh_tc_clear(ifindex)
    if err:
        raise failure(err, "remove", f"clsact of interface {ifindex}")


def tc_program(int ifindex, bint ingress, uint32_t handle, uint32_t priority):
    """The id of the program of a clsact filter; 0: there is none."""
    cdef uint32_t id = 0
    cdef int err
    mesh_log_start()
    with nogil:
        err = mesh_tc_program(ifindex, ingress, handle, priority, &id)
    return 0 if err else id


cdef class Object:
    """An object file: opened, adjusted (`set`, `resize`, `reuse`, `skip`), then loaded."""

    cdef bpf_object *object
    cdef readonly str path
    cdef readonly bint loaded

    def __cinit__(self, str path not None):
        cdef bytes where = os.fsencode(path)
        cdef const char *raw = where
        cdef bpf_map *map = NULL
        self.path = path
        mesh_log_start()
        with nogil:
            self.object = bpf_object__open_file(raw, NULL)
        if self.object is NULL:
            raise failure(-last_error(), "open object", path, log=True)
        while True:  # pins are this package's own business: see mesh.datapath.kernel_maps
            map = bpf_object__next_map(self.object, map)
            if map is NULL:
                break
            bpf_map__set_pin_path(map, NULL)

    def __dealloc__(self):
        if self.object is not NULL:
            bpf_object__close(self.object)

    def maps(self):
        """Names of the maps, global data's included."""
        cdef list names = []
        cdef bpf_map *map = bpf_object__next_map(self.object, NULL)
        while map is not NULL:
            names.append(bpf_map__name(map).decode())
            map = bpf_object__next_map(self.object, map)
        return names

    def programs(self):
        """Section by program name."""
        cdef dict found = {}
        cdef bpf_program *program = bpf_object__next_program(self.object, NULL)
        while program is not NULL:
            found[bpf_program__name(program).decode()] = bpf_program__section_name(program).decode()
            program = bpf_object__next_program(self.object, program)
        return found

    cdef uint8_t *variable(self, str name, str section, uint32_t *size) except NULL:
        cdef bytes n = name.encode(), s = section.encode()
        cdef uint32_t offset = 0
        cdef size_t room = 0
        cdef uint8_t *data
        if mesh_variable(self.object, s, n, &offset, size):
            raise failure(-ENOENT, "find variable", f"{name} of {section} in {self.path}")
        data = <uint8_t *>mesh_section(self.object, s, &room)
        if data is NULL or offset + size[0] > room:
            raise failure(-ENOENT, "find section", f"{section} in {self.path}")
        return data + offset

    def set(self, str name not None, value, str section=".rodata"):
        """Set a global variable before the load: an int (host order, its size) or bytes of just its size."""
        cdef uint32_t size = 0
        cdef uint8_t *place = self.variable(name, section, &size)
        cdef bytes raw = value if isinstance(value, bytes) else int(value).to_bytes(size, sys.byteorder)
        if self.loaded or len(raw) != size:
            raise ValueError(f"{name}: set it before the load, with {size} bytes")
        memcpy(place, <const char *>raw, size)

    def get(self, str name not None, str section=".rodata"):
        """A global variable as it will be loaded, raw bytes."""
        cdef uint32_t size = 0
        cdef uint8_t *place = self.variable(name, section, &size)
        return place[:size]

    cdef bpf_map *find(self, str name) except NULL:
        cdef bytes raw = name.encode()
        cdef bpf_map *map = bpf_object__find_map_by_name(self.object, raw)
        if map is NULL:
            raise failure(-ENOENT, "find map", f"{name} in {self.path}")
        return map

    cdef bpf_program *find_program(self, str name) except NULL:
        cdef bytes raw = name.encode()
        cdef bpf_program *program = bpf_object__find_program_by_name(self.object, raw)
        if program is NULL:
            raise failure(-ENOENT, "find program", f"{name} in {self.path}")
        return program

    def resize(self, str name not None, uint32_t entries):
        """Set a map's number of entries before the load."""
        cdef int err = bpf_map__set_max_entries(self.find(name), entries)
        if err:
            raise failure(err, "resize map", name)

    def reuse(self, str name not None, Map map not None):
        """Take an existing map instead of creating this one."""
        cdef int err = bpf_map__reuse_fd(self.find(name), map.fd)
        if err:
            raise failure(err, "reuse map", name)

    def skip(self, str program not None):
        """Leave a program out of the load."""
        bpf_program__set_autoload(self.find_program(program), False)

    def load(self):
        """Create the maps and load the programs."""
        cdef int err
        mesh_log_start()
        with nogil:
            err = bpf_object__load(self.object)
        if err:
            raise failure(err, "load", self.path, log=True)
        self.loaded = True

    def map(self, str name not None):
        """A map of the loaded object; it outlives this object."""
        cdef int fd = mesh_dup(bpf_map__fd(self.find(name)))
        if fd < 0:
            raise failure(-last_error(), "open map", f"{name} of {self.path}")
        cdef Map map = Map.own(fd)
        map.name = name  # the kernel keeps 15 characters only
        return map

    def program(self, str name not None):
        """A program of the loaded object; it outlives this object."""
        cdef int fd = mesh_dup(bpf_program__fd(self.find_program(name)))
        if fd < 0:
            raise failure(-last_error(), "open program", f"{name} of {self.path}")
        return Program.own(fd)
