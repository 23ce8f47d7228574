# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""C-level names of libbpf 1.x and bpf(2) for `_bpf`. Declares only; _libbpf.h has the C."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "mesh/_libbpf.h":
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
