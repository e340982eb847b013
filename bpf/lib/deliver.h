/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The last step: to a local endpoint, to this node's stack, or out by a device.
 * None of it passes netfilter's FORWARD hook.
 */
#ifndef CILIA_DELIVER_H
#define CILIA_DELIVER_H

#include "conntrack.h"

/*
 * Addresses of the frame and, if asked to, one hop less. By helper, not by
 * direct writes: a program that contains any of those has the whole linear
 * part made its own before it starts, and TCP's packets are all clones, so each
 * would be copied. The helper asks only for the bytes up to those it writes,
 * which a clone of TCP owns already (skb_clone_writable() in the kernel).
 */
static __always_inline int rewrite_frame(struct __sk_buff *ctx, const struct packet *p,
					 const __u8 *macs, bool hop)
{
	struct {
		__u8 ttl, proto;
		__be16 check;
	} line;
	__u32 check;

	if (macs && bpf_skb_store_bytes(ctx, 0, macs, 12, 0))
		return -DROP_WRITE;
	if (!hop)
		return 0;
	if (packet_is_ip6(p)) {
		line.ttl = p->ttl - 1;
		return bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct ip6_header, hop_limit),
					   &line.ttl, 1, BPF_F_RECOMPUTE_CSUM) ?
			       -DROP_WRITE :
			       0;
	}
	if (bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct ip4_header, ttl), &line,
			       sizeof(line)))
		return -DROP_WRITE;
	/* RFC 1624: the sum of the header, and so of the packet, stays as it is. */
	check = line.check + bpf_htons(0x0100);
	line.check = check + (check >= 0xffff);
	line.ttl--;
	return bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct ip4_header, ttl), &line,
				   sizeof(line), 0) ?
		       -DROP_WRITE :
		       0;
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

/*
 * The sender's TCP keeps a clone of each segment, so the receiver could not take
 * over the pages of one that came straight from it: it would count a reference a
 * page. Growing the head by nothing makes it the packet's own, as forwarding does
 * (skb_cow() in bpf_skb_change_head()). It pays for large segments only.
 */
static __always_inline void own_large_head(struct __sk_buff *ctx)
{
	if (ctx->gso_size)
		bpf_skb_change_head(ctx, 0, 0);
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
	own_large_head(ctx);
	ret = rewrite_frame(ctx, p, f->dst.mac, !f->answer);
	if (ret)
		return ret;
	return bpf_redirect_peer(f->dst.ifindex, 0);
}

#endif /* CILIA_DELIVER_H */
