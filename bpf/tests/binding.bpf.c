/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A harness for the Python binding: maps of each kind that the datapath uses,
 * constants of each size, programs whose result tells what they saw, and every
 * shared structure, so that the layout check has all of them to compare.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "../lib/types.h"

#ifndef VALUE_EXTRA
#define VALUE_EXTRA 0
#endif
#ifndef ROWS
#define ROWS 64
#endif
#ifndef GENERATION
#define GENERATION 1
#endif

const volatile __u32 NUMBER = 1;
const volatile __u8 SMALL;
const volatile union addr ADDRESS;

struct row {
	__u32 a;
#ifdef RENAMED
	__u32 c;
#else
	__u32 b;
#endif
#if VALUE_EXTRA
	__u64 extra[VALUE_EXTRA];
#endif
};

struct more_metric {
	__u64 packets, bytes, more;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ROWS);
	__type(key, __u32);
	__type(value, struct row);
} t_hash SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, ROWS);
	__type(key, __u64);
	__type(value, struct row);
} t_lru SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
#if VALUE_EXTRA
	__type(value, struct more_metric);
#else
	__type(value, struct metric);
#endif
} t_percpu SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 8);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_HASH);
		__uint(map_flags, BPF_F_NO_PREALLOC);
		__uint(max_entries, 32);
		__uint(key_size, sizeof(struct policy_key));
		__uint(value_size, sizeof(struct policy_value) + 8 * VALUE_EXTRA);
	});
} t_outer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 14);
} t_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} t_lost SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} t_scratch SEC(".maps");

/* One of each, so that BTF has them all. */
struct every {
	struct endpoint endpoint;
	struct ipcache_key ipcache_key;
	struct ipcache_value ipcache_value;
	struct policy_key policy_key;
	struct policy_value policy_value;
	struct policy_meta policy_meta;
	struct ct_key ct_key;
	struct ct_entry ct_entry;
	struct nat_key nat_key;
	struct nat_value nat_value;
	struct device device;
	struct frag_key frag_key;
	struct frag_value frag_value;
	struct proxy_pair proxy_pair;
	struct proxy_listener proxy_listener;
	struct runtime runtime;
	struct metric metric;
	struct event event;
	struct audit_cell audit_cell;
};
struct every every;

/* Accepts, and says by the mark which build and which configuration it is. */
SEC("tc")
int generation(struct __sk_buff *skb)
{
	__u32 key = 0, slot = skb->mark;
	struct row *row = bpf_map_lookup_elem(&t_hash, &key);
	struct metric *count = bpf_map_lookup_elem(&t_percpu, &key);

	if (row)
		__sync_fetch_and_add(&row->a, 1);
	if (count)
		count->packets++;
	skb->mark = GENERATION;
	skb->cb[0] = NUMBER;
	skb->cb[1] = SMALL;
	skb->cb[2] = ADDRESS.w[3];
	skb->priority = slot;
#ifdef REFUSED
	/* reads beyond the packet without a check: the verifier must refuse */
	return *(volatile __u8 *)(unsigned long)(skb->data_end + 100);
#endif
	return TC_ACT_OK;
}

/* The value stored under the key that an inner map has in the slot named by the mark. */
SEC("tc")
int look_inside(struct __sk_buff *skb)
{
	struct policy_key key = { .identity = 7 };
	__u32 slot = skb->mark;
	struct policy_value *value;
	void *inner = bpf_map_lookup_elem(&t_outer, &slot);

	if (!inner)
		return TC_ACT_SHOT;
	value = bpf_map_lookup_elem(inner, &key);
	return value ? (int)value->rule_id : TC_ACT_SHOT;
}

static __always_inline int one_event(struct __sk_buff *skb, int discard)
{
	__u32 zero = 0;
	__u64 *lost = bpf_map_lookup_elem(&t_lost, &zero);
	__u64 *next = bpf_map_lookup_elem(&t_scratch, &zero);
	struct event *event = bpf_ringbuf_reserve(&t_ring, sizeof(*event), 0);

	if (!event) {
		if (lost)
			(*lost)++;
		return TC_ACT_SHOT;
	}
	__builtin_memset(event, 0, sizeof(*event));
	if (next)
		event->time_ns = (*next)++;
	event->length = skb->len;
	event->verdict = -133;
	event->type = EVENT_DROP;
	if (discard)
		bpf_ringbuf_discard(event, 0);
	else
		bpf_ringbuf_submit(event, 0);
	return TC_ACT_OK;
}

SEC("tc")
int emit(struct __sk_buff *skb)
{
	return one_event(skb, 0);
}

SEC("tc")
int emit_discarded(struct __sk_buff *skb)
{
	return one_event(skb, 1);
}

/* A record of a size that readers of events do not expect. */
SEC("tc")
int emit_odd(struct __sk_buff *skb)
{
	__u64 *odd = bpf_ringbuf_reserve(&t_ring, 20, 0);

	if (!odd)
		return TC_ACT_SHOT;
	*odd = skb->len;
	bpf_ringbuf_submit(odd, 0);
	return TC_ACT_OK;
}

SEC("cgroup/connect4")
int refuse_connect4(struct bpf_sock_addr *ctx)
{
	return ctx->user_port == __builtin_bswap16(NUMBER) ? 0 : 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
