/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The last step: to a local endpoint, to this node's stack, or out by a device.
 * None of it passes netfilter's FORWARD hook.
 */
#ifndef CILIA_DELIVER_H
#define CILIA_DELIVER_H

#include "conntrack.h"

/*
 * Addresses of the frame and, if asked to, one hop less. Direct writes: tc
 * makes the head writable on entry of a program that contains any.
 */
static __always_inline int rewrite_frame(struct __sk_buff *ctx, const struct packet *p,
					 const __u8 *macs, bool hop)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	if (data + ETH_HLEN + sizeof(struct ip4_header) > end)
		return -DROP_WRITE;
	if (macs)
		memcpy(data, macs, 12);
	if (!hop)
		return 0;
	if (packet_is_ip6(p)) {
		struct ip6_header *ip = data + ETH_HLEN;

		ip->hop_limit--;
	} else {
		struct ip4_header *ip = data + ETH_HLEN;
		__u32 check = ip->check + bpf_htons(0x0100);

		ip->check = check + (check >= 0xffff);
		ip->ttl--;
	}
	return 0;
}

/* Let the kernel answer: it drops the packet, with an ICMP error where one is due. */
static __always_inline int to_stack(struct __sk_buff *ctx, const struct packet *p, struct flow *f)
{
	forwarded(ctx, p, f, TRACE_TO_STACK);
	return TC_ACT_OK;
}

static __always_inline int to_host(struct __sk_buff *ctx, const struct packet *p, struct flow *f)
{
	forwarded(ctx, p, f, TRACE_TO_HOST);
	return TC_ACT_OK;
}

/* Into the endpoint's namespace, past the host side of its veth pair. */
static __always_inline int to_local(struct __sk_buff *ctx, const struct packet *p, struct flow *f)
{
	int ret;

	/* The node is a hop, except where it answers for the endpoint (masquerade). */
	if (unlikely(p->ttl <= 1 && !f->answer))
		return to_stack(ctx, p, f);
	/* The report first: it shows the frame as it came. mac and node_mac are adjacent. */
	forwarded(ctx, p, f, TRACE_TO_ENDPOINT);
	ret = rewrite_frame(ctx, p, f->dst.mac, !f->answer);
	if (ret)
		return ret;
	return bpf_redirect_peer(f->dst.ifindex, 0);
}

#endif /* CILIA_DELIVER_H */
