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

from mesh._libbpf cimport *

from mesh.errors import BpfError

cdef tuple verdicts():
    """(name, help) of every verdict, in the order of its counter."""
    cdef list found = []
    cdef const mesh_text *entry = mesh_verdicts
    while entry.name is not NULL:
        found.append((entry.name.decode(), entry.help.decode()))
        entry += 1
    return tuple(found)


cdef dict sizes():
    """Sizes of the contract's structs as this extension was compiled, by name."""
    cdef dict found = {}
    cdef const mesh_size *entry = mesh_sizes
    while entry.name is not NULL:
        found[entry.name.decode()] = entry.size
        entry += 1
    return found


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

VERDICTS = verdicts()
LAYOUT = sizes()

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


include "_bpf_mapping.pxi"
include "_bpf_object.pxi"
include "_bpf_program.pxi"
