# SPDX-License-Identifier: Apache-2.0
# Part of _bpf.pyx: object files.

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
