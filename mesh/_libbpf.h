/* SPDX-License-Identifier: Apache-2.0 */
/* libbpf for _bpf.pyx: its headers, and wrappers for calls that take option structs. */
#ifndef MESH_LIBBPF_H
#define MESH_LIBBPF_H

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

/* What libbpf prints (warnings, and with them the verifier's log), per thread, until `mesh_log_take`. */
#define MESH_LOG_SIZE (256 * 1024)
static __thread char mesh_log[MESH_LOG_SIZE];
static __thread size_t mesh_log_used;

static inline int mesh_print(enum libbpf_print_level level, const char *format, va_list args)
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

static inline void mesh_log_start(void)
{
	mesh_log_used = 0;
	libbpf_set_print(mesh_print);
}

static inline const char *mesh_log_text(void)
{
	mesh_log[mesh_log_used] = 0;
	return mesh_log;
}

static inline int mesh_map_create(enum bpf_map_type type, const char *name, __u32 key, __u32 value, __u32 entries,
				  __u32 flags, int inner)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);
	if (inner >= 0)
		opts.inner_map_fd = inner;
	return bpf_map_create(type, name, key, value, entries, &opts);
}

/* What this thread has done to maps: system calls; stores to mapped arrays, and their bytes. */
struct mesh_work {
	unsigned long long calls, stores, bytes;
};
static __thread struct mesh_work mesh_work;

static inline int mesh_batch_update(int fd, const void *keys, const void *values, __u32 *count)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	return bpf_map_update_batch(fd, keys, values, count, &opts);
}

static inline int mesh_batch_delete(int fd, const void *keys, __u32 *count)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts);
	return bpf_map_delete_batch(fd, keys, count, &opts);
}

static inline int mesh_tc(int fd, int ifindex, int ingress, __u32 handle, __u32 priority, int attach, int *created)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
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

static inline int mesh_passing(void)
{
	const struct bpf_insn code[] = {
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = -1}, /* TC_ACT_UNSPEC */
		{.code = BPF_JMP | BPF_EXIT},
	};

	return bpf_prog_load(BPF_PROG_TYPE_SCHED_CLS, "mesh_passing", "Dual BSD/GPL", code, 2, NULL);
}

static inline int mesh_link(int program, int target, int kind, __u32 flags)
{
	LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

	return bpf_link_create(program, target, kind, &opts);
}

static inline int mesh_tc_clear(int ifindex)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS);

	return bpf_tc_hook_destroy(&hook);
}

static inline int mesh_tc_program(int ifindex, int ingress, __u32 handle, __u32 priority, __u32 *id)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);
	int err = bpf_tc_query(&hook, &opts);

	*id = opts.prog_id;
	return err;
}

static inline int mesh_test_run(int fd, const void *in, __u32 in_size, void *out, __u32 *out_size, const void *ctx_in,
				void *ctx_out, __u32 *ctx_size, int repeat, __u32 flags, __u32 *retval,
				__u32 *nanoseconds)
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
static inline int mesh_variable(struct bpf_object *object, const char *section, const char *name, __u32 *offset,
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

static inline void *mesh_section(struct bpf_object *object, const char *section, size_t *size)
{
	struct bpf_map *map = bpf_object__find_map_by_name(object, section);
	return map ? (void *)bpf_map__initial_value(map, size) : NULL;
}

static inline uint64_t mesh_load64(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline unsigned int mesh_load32(const __u32 *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void mesh_store64(uint64_t *p, uint64_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline void mesh_store32(__u32 *p, __u32 value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static inline int mesh_errno(void)
{
	return errno;
}

static inline int mesh_dup(int fd)
{
	return fcntl(fd, F_DUPFD_CLOEXEC, 3);
}

#endif
