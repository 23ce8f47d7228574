/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Measures a program honestly under BPF_PROG_TEST_RUN with `repeat`, which hands every round the packet that the round
 * before has rewritten: here each round first gets its input anew, the next of a list, and then tail-calls the program.
 * The same with the empty program is what is subtracted.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#define FRAME_SIZE 64
#define LONG_SIZE  136

struct frame {
	__u8 bytes[FRAME_SIZE];
};

struct long_frame {
	__u8 bytes[LONG_SIZE];
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} bench_program SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536); /* a power of two */
	__type(key, __u32);
	__type(value, struct frame);
} bench_frames SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536); /* a power of two */
	__type(key, __u32);
	__type(value, struct long_frame);
} bench_long_frames SEC(".maps");

/* Where in the list the next round reads, and how much of the list there is, less one (a power of two, less one). */
struct cursor {
	__u32 next, mask;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cursor);
} bench_cursor SEC(".maps");

SEC("tc")
int bench_rewind(struct __sk_buff *skb)
{
	__u32 zero = 0, index;
	struct cursor *cursor = bpf_map_lookup_elem(&bench_cursor, &zero);
	struct frame *frame;

	if (!cursor)
		return TC_ACT_SHOT;
	index = cursor->next++ & cursor->mask;
	frame = bpf_map_lookup_elem(&bench_frames, &index);
	if (!frame || bpf_skb_store_bytes(skb, 0, frame->bytes, FRAME_SIZE, 0))
		return TC_ACT_SHOT;
	bpf_tail_call_static(skb, &bench_program, 0);
	return TC_ACT_SHOT;
}

/* The same with frames of the tunnel, whose length the program changes: that is undone first, at a cost of its own that
 * is the same with and without a proof. */
SEC("tc")
int bench_rewind_long(struct __sk_buff *skb)
{
	__u32 zero = 0, index;
	struct cursor *cursor = bpf_map_lookup_elem(&bench_cursor, &zero);
	__s32 grown = (__s32)skb->len - LONG_SIZE;
	struct long_frame *frame;

	if (!cursor)
		return TC_ACT_SHOT;
	if (grown && bpf_skb_adjust_room(skb, -grown, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return TC_ACT_SHOT;
	index = cursor->next++ & cursor->mask;
	frame = bpf_map_lookup_elem(&bench_long_frames, &index);
	if (!frame || bpf_skb_store_bytes(skb, 0, frame->bytes, LONG_SIZE, 0))
		return TC_ACT_SHOT;
	bpf_tail_call_static(skb, &bench_program, 0);
	return TC_ACT_SHOT;
}

SEC("tc")
int bench_empty(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

char bench_license[] SEC("license") = "Dual BSD/GPL";
