# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""C-level names of libbpf 1.x and bpf(2) for `_bpf`, with wrappers for the calls that take option structs."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <stdarg.h>
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    #include <fcntl.h>
    #include <linux/bpf.h>
    #include <bpf/bpf.h>
    #include <bpf/btf.h>
    #include <bpf/libbpf.h>
    #include "mesh/abi.h"

    #define MESH_VERDICT_TEXT(name, help) {#name, help},
    static const struct mesh_text { const char *name, *help; } mesh_verdicts[] = {
        MESH_VERDICTS(MESH_VERDICT_TEXT) {NULL, NULL},
    };
    #define MESH_SIZE(name) {#name, sizeof(struct mesh_##name)}
    static const struct mesh_size { const char *name; size_t size; } mesh_sizes[] = {
        MESH_SIZE(table), MESH_SIZE(frontend), MESH_SIZE(frontend_key), MESH_SIZE(backend), MESH_SIZE(acl_key),
        MESH_SIZE(flow), MESH_SIZE(note), {"reply", sizeof(struct mesh_revnat)}, MESH_SIZE(counts), MESH_SIZE(config), {NULL, 0},
    };

    /* What libbpf prints (warnings, and with them the verifier's log), per thread, until `mesh_log_take`. */
    #define MESH_LOG_SIZE (256 * 1024)
    static __thread char mesh_log[MESH_LOG_SIZE];
    static __thread size_t mesh_log_used;

    static int mesh_print(enum libbpf_print_level level, const char *format, va_list args)
    {
        size_t room = MESH_LOG_SIZE - mesh_log_used;
        int n;

        if (level > LIBBPF_WARN)
            return 0;
        if (room < MESH_LOG_SIZE / 2) { /* the end of a verifier log is what tells: keep the last half */
            memmove(mesh_log, mesh_log + mesh_log_used - MESH_LOG_SIZE / 4, MESH_LOG_SIZE / 4);
            mesh_log_used = MESH_LOG_SIZE / 4;
            room = MESH_LOG_SIZE - mesh_log_used;
        }
        n = vsnprintf(mesh_log + mesh_log_used, room, format, args);
        if (n > 0)
            mesh_log_used += (size_t)n < room ? (size_t)n : room - 1;
        return 0;
    }
    static void mesh_log_start(void) { mesh_log_used = 0; libbpf_set_print(mesh_print); }
    static const char *mesh_log_text(void) { mesh_log[mesh_log_used] = 0; return mesh_log; }

    static int mesh_map_create(enum bpf_map_type type, const char *name, __u32 key, __u32 value, __u32 entries,
                               __u32 flags, int inner)
    {
        LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);
        if (inner >= 0)
            opts.inner_map_fd = inner;
        return bpf_map_create(type, name, key, value, entries, &opts);
    }
    /* What this thread has done to maps: system calls; stores to mapped arrays, and their bytes. */
    struct mesh_work { unsigned long long calls, stores, bytes; };
    static __thread struct mesh_work mesh_work;

    static int mesh_batch_update(int fd, const void *keys, const void *values, __u32 *count)
    {
        LIBBPF_OPTS(bpf_map_batch_opts, opts);
        return bpf_map_update_batch(fd, keys, values, count, &opts);
    }
    static int mesh_batch_delete(int fd, const void *keys, __u32 *count)
    {
        LIBBPF_OPTS(bpf_map_batch_opts, opts);
        return bpf_map_delete_batch(fd, keys, count, &opts);
    }
    static int mesh_tc(int fd, int ifindex, int ingress, __u32 handle, __u32 priority, int attach, int *created)
    {
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
                    .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
        LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);
        int err;

        if (!attach)
            return bpf_tc_detach(&hook, &opts);
        err = bpf_tc_hook_create(&hook);
        if (err && err != -EEXIST)
            return err;
        *created = !err;
        opts.prog_fd = fd;
        opts.flags = BPF_TC_F_REPLACE;
        return bpf_tc_attach(&hook, &opts);
    }
    static int mesh_passing(void)
    {
        const struct bpf_insn code[] = {
            {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = -1}, /* TC_ACT_UNSPEC */
            {.code = BPF_JMP | BPF_EXIT},
        };

        return bpf_prog_load(BPF_PROG_TYPE_SCHED_CLS, "mesh_passing", "Dual BSD/GPL", code, 2, NULL);
    }
    static int mesh_link(int program, int target, int kind, __u32 flags)
    {
        LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

        return bpf_link_create(program, target, kind, &opts);
    }
    static int mesh_tc_clear(int ifindex)
    {
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS);

        return bpf_tc_hook_destroy(&hook);
    }
    static int mesh_tc_program(int ifindex, int ingress, __u32 handle, __u32 priority, __u32 *id)
    {
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
                    .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
        LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);
        int err = bpf_tc_query(&hook, &opts);

        *id = opts.prog_id;
        return err;
    }
    static int mesh_test_run(int fd, const void *in, __u32 in_size, void *out, __u32 *out_size, const void *ctx_in,
                             void *ctx_out, __u32 *ctx_size, int repeat, __u32 flags, __u32 *retval, __u32 *nanoseconds)
    {
        LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = in_size ? in : NULL, .data_out = out, .data_size_in = in_size,
                    .data_size_out = *out_size, .repeat = repeat, .flags = flags);
        int err;

        if (*ctx_size) {
            opts.ctx_in = ctx_in;
            opts.ctx_out = ctx_out;
            opts.ctx_size_in = opts.ctx_size_out = *ctx_size;
        }
        err = bpf_prog_test_run_opts(fd, &opts);
        *out_size = opts.data_size_out;
        *ctx_size = opts.ctx_size_out;
        *retval = opts.retval;
        *nanoseconds = opts.duration;
        return err;
    }
    /* A variable of a map of global data, from the object's BTF. */
    static int mesh_variable(struct bpf_object *object, const char *section, const char *name, __u32 *offset,
                             __u32 *size)
    {
        struct btf *btf = bpf_object__btf(object);
        int id = btf ? btf__find_by_name_kind(btf, section, BTF_KIND_DATASEC) : -ENOENT, i;
        const struct btf_type *t = id > 0 ? btf__type_by_id(btf, id) : NULL;
        const struct btf_var_secinfo *v = t ? btf_var_secinfos(t) : NULL;

        for (i = 0; t && i < btf_vlen(t); i++, v++) {
            if (strcmp(btf__name_by_offset(btf, btf__type_by_id(btf, v->type)->name_off), name))
                continue;
            *offset = v->offset;
            *size = v->size;
            return 0;
        }
        return -ENOENT;
    }
    static void *mesh_section(struct bpf_object *object, const char *section, size_t *size)
    {
        struct bpf_map *map = bpf_object__find_map_by_name(object, section);
        return map ? (void *)bpf_map__initial_value(map, size) : NULL;
    }
    static uint64_t mesh_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static unsigned int mesh_load32(const __u32 *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static void mesh_store64(uint64_t *p, uint64_t value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
    static void mesh_store32(__u32 *p, __u32 value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
    static int mesh_errno(void) { return errno; }
    static int mesh_dup(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 3); }
    """
    struct mesh_text:
        const char *name
        const char *help
    const mesh_text *mesh_verdicts
    struct mesh_size:
        const char *name
        size_t size
    const mesh_size *mesh_sizes
    void mesh_log_start() nogil
    const char *mesh_log_text() nogil
    int mesh_map_create(int type, const char *name, uint32_t key, uint32_t value, uint32_t entries, uint32_t flags,
                        int inner) nogil
    struct mesh_work_counts "mesh_work":
        uint64_t calls
        uint64_t stores
        uint64_t bytes
    mesh_work_counts mesh_work
    int mesh_batch_update(int fd, const void *keys, const void *values, uint32_t *count) nogil
    int mesh_batch_delete(int fd, const void *keys, uint32_t *count) nogil
    int mesh_tc(int fd, int ifindex, int ingress, uint32_t handle, uint32_t priority, int attach, int *created) nogil
    int mesh_passing() nogil
    int mesh_link(int program, int target, int kind, uint32_t flags) nogil
    int mesh_tc_clear(int ifindex) nogil
    int mesh_tc_program(int ifindex, int ingress, uint32_t handle, uint32_t priority, uint32_t *id) nogil
    int mesh_test_run(int fd, const void *data, uint32_t size, void *out, uint32_t *out_size, const void *ctx,
                      void *ctx_out, uint32_t *ctx_size, int repeat, uint32_t flags, uint32_t *retval,
                      uint32_t *nanoseconds) nogil
    int mesh_variable(bpf_object *object, const char *section, const char *name, uint32_t *offset, uint32_t *size) nogil
    void *mesh_section(bpf_object *object, const char *section, size_t *size) nogil
    uint64_t mesh_load64(const uint64_t *p) nogil
    uint32_t mesh_load32(const uint32_t *p) nogil
    void mesh_store64(uint64_t *p, uint64_t value) nogil
    void mesh_store32(uint32_t *p, uint32_t value) nogil
    int mesh_dup(int fd) nogil
    int last_error "mesh_errno"() nogil

    struct bpf_object:
        pass
    struct bpf_map:
        pass
    struct bpf_program:
        pass
    struct bpf_map_info:
        uint32_t type, id, key_size, value_size, max_entries, map_flags
        char *name
    struct bpf_prog_info:
        uint32_t type, id
        uint8_t *tag
        char *name
        uint64_t run_time_ns, run_cnt
    struct link_xdp:
        uint32_t ifindex
    struct bpf_link_info:
        uint32_t type, id, prog_id
        link_xdp xdp

    bpf_object *bpf_object__open_file(const char *path, const void *opts) nogil
    int bpf_object__load(bpf_object *object) nogil
    void bpf_object__close(bpf_object *object) nogil
    bpf_map *bpf_object__next_map(const bpf_object *object, const bpf_map *map) nogil
    bpf_map *bpf_object__find_map_by_name(const bpf_object *object, const char *name) nogil
    bpf_program *bpf_object__next_program(const bpf_object *object, bpf_program *program) nogil
    bpf_program *bpf_object__find_program_by_name(const bpf_object *object, const char *name) nogil
    const char *bpf_map__name(const bpf_map *map) nogil
    int bpf_map__fd(const bpf_map *map) nogil
    int bpf_map__reuse_fd(bpf_map *map, int fd) nogil
    int bpf_map__set_max_entries(bpf_map *map, uint32_t entries) nogil
    int bpf_map__set_pin_path(bpf_map *map, const char *path) nogil
    const char *bpf_program__name(const bpf_program *program) nogil
    const char *bpf_program__section_name(const bpf_program *program) nogil
    int bpf_program__fd(const bpf_program *program) nogil
    int bpf_program__set_autoload(bpf_program *program, bint on) nogil

    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *size) nogil
    int bpf_obj_pin(int fd, const char *path) nogil
    int bpf_obj_get(const char *path) nogil
    int bpf_map_lookup_elem(int fd, const void *key, void *value) nogil
    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags) nogil
    int bpf_map_delete_elem(int fd, const void *key) nogil
    int bpf_map_lookup_batch(int fd, void *into, void *out, void *keys, void *values, uint32_t *count,
                             const void *opts) nogil
    int bpf_map_freeze(int fd) nogil
    int bpf_map_get_fd_by_id(uint32_t id) nogil
    int bpf_prog_get_fd_by_id(uint32_t id) nogil
    int bpf_link_update(int link, int program, const void *opts) nogil
    int bpf_link_detach(int link) nogil
    int bpf_enable_stats(int type) nogil
    int libbpf_num_possible_cpus() nogil

    enum:
        BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY
        BPF_MAP_TYPE_LRU_HASH, BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_LPM_TRIE
        BPF_MAP_TYPE_ARRAY_OF_MAPS, BPF_MAP_TYPE_HASH_OF_MAPS
        BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_F_INNER_MAP, BPF_F_RDONLY_PROG
        ENOENT, ENOSPC, EINTR


cdef extern from "unistd.h" nogil:
    int close_fd "close"(int fd)
