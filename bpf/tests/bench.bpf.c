// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * For tests/bench: gives a frame another tuple before each run of the program
 * under test, which is tail-called, so that one BPF_PROG_TEST_RUN measures
 * distinct packets. The frame is Ethernet, IPv4 without options, TCP. Checksums
 * are not kept: the datapath changes them by difference.
 */
#include "include/compiler.h"
#include "include/wire.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} bench_target SEC(".maps");

struct bench_state {
	__u32 step;
	__u32 ports; /* low bits of the step that make the source port */
	__u8 macs[12];
	__u32 dport; /* of step 0; counted up when the source ports have all been used */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bench_state);
} bench_state SEC(".maps");

SEC("tc")
int bench_next(struct __sk_buff *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ip4_header *ip = data + ETH_HLEN;
	__be16 *ports = (void *)(ip + 1);
	struct bench_state *state;
	__u32 zero = 0, n;

	state = bpf_map_lookup_elem(&bench_state, &zero);
	if (!state || (void *)(ports + 2) > end)
		return -1;
	/* Odd multiplier: visits every port once, and never in the order of memory. */
	n = state->step++;
	memcpy(data, state->macs, 12);
	ip->ttl = 64;
	ports[0] = bpf_htons((n * 40503u) & state->ports);
	ports[1] = bpf_htons(state->dport + n / (state->ports + 1));
	bpf_tail_call(ctx, &bench_target, 0);
	return -1;
}

SEC("tc")
int bench_nothing(struct __sk_buff *ctx)
{
	(void)ctx;
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
