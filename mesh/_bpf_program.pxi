# SPDX-License-Identifier: Apache-2.0
# Part of _bpf.pyx: programs.

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
