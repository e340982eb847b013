// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The two programs on the host side of each endpoint's veth pair. One copy
 * serves all endpoints: who is who is in maps.
 *
 *      workload --eth0====veth--> from_endpoint  parse, source, conntrack,
 *                                                policy of both ends, deliver
 *      workload <--eth0===veth--- to_endpoint    what this node's stack sends
 *
 * A packet between two endpoints of this node sees only from_endpoint: the
 * destination's policy is asked in the same pass, and bpf_redirect_peer puts
 * the packet straight into its namespace.
 */
#include "lib/arp.h"
#include "lib/begin.h"
#include "lib/frag.h"
#include "lib/nd.h"
#include "lib/network.h"

static __always_inline int handle_from_endpoint(struct __sk_buff *ctx, struct work *w)
{
	const struct endpoint *src, *dst;
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	int ret;

	mark_scrub(ctx);
	src = endpoint_by_ifindex(ctx->ifindex);
	if (!src)
		return -DROP_NOT_OPEN;
	end_set(&f->src, src);
	ret = parse(ctx, p);
	if (unlikely(ret))
		return is_igmp(p) ? ignore(ctx, DIR_EGRESS) : ret;
	if (unlikely(p->l3_be == bpf_htons(ETH_P_ARP)))
		return handle_arp(ctx);
	if (unlikely(is_nd(p)))
		return handle_nd(ctx);

	if (unlikely(!endpoint_owns(src, &p->saddr)))
		return -DROP_SOURCE_IP;
	if (unlikely(addr_is_multicast(&p->daddr)))
		return -DROP_MULTICAST;
	if (unlikely(p->flags & PKT_FRAG)) {
		ret = frag_track();
		if (ret)
			return ret;
	}

	dst = endpoint_by_addr(&p->daddr);
	if (dst)
		end_set(&f->dst, dst);
	trace_from(ctx, f, TRACE_FROM_ENDPOINT, DIR_EGRESS);
	ret = ct_track(ctx, w);
	if (unlikely(ret))
		return ret;
	return deliver(ctx, p, f);
}

SEC("tc")
int from_endpoint(struct __sk_buff *ctx)
{
	struct work *w = begin(ctx, ORIGIN_ENDPOINT, DIR_EGRESS);
	int ret;

	if (!w)
		return TC_ACT_SHOT;
	ret = handle_from_endpoint(ctx, w);
	return likely(ret >= 0) ? ret : drop(ctx, -ret);
}

/*
 * Who sent what the stack passes to an endpoint: this node itself, or its proxy,
 * maybe in the name of an endpoint; an endpoint, whose packet the stack
 * forwarded; or somebody outside.
 */
static __always_inline int find_sender(struct __sk_buff *ctx, const struct packet *p,
				       struct flow *f)
{
	const struct endpoint *owner;

	if (!ctx->ingress_ifindex) {
		f->from_proxy = mark_is_from_proxy(ctx->mark);
		if (!f->from_proxy)
			return 0;
		owner = endpoint_by_addr(&p->saddr);
		if (owner)
			end_set(&f->src, owner);
		return 0;
	}
	owner = endpoint_by_addr(&p->saddr);
	if (!owner) {
		f->origin = ORIGIN_OUTSIDE;
		return 0;
	}
	if (owner->ifindex != ctx->ingress_ifindex)
		return -DROP_SOURCE_IP;
	f->origin = ORIGIN_ENDPOINT;
	end_set(&f->src, owner);
	return 0;
}

static __always_inline int handle_to_endpoint(struct __sk_buff *ctx, struct work *w)
{
	const struct endpoint *dst;
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	int ret;

	dst = endpoint_by_ifindex(ctx->ifindex);
	if (!dst)
		return -DROP_NOT_OPEN;
	end_set(&f->dst, dst);
	ret = parse(ctx, p);
	if (unlikely(ret))
		return is_igmp(p) ? ignore(ctx, DIR_INGRESS) : ret;
	/* The node's own neighbour resolution, and from_endpoint's answers. */
	if (p->l3_be == bpf_htons(ETH_P_ARP))
		return TC_ACT_OK;
	if (is_nd(p)) {
		if (p->icmp_type != ICMP6_NS && p->icmp_type != ICMP6_NA)
			return ignore(ctx, DIR_INGRESS);
		/* Neighbours are one link apart: what was routed here is no such message. */
		if (ctx->ingress_ifindex && ctx->ingress_ifindex != ctx->ifindex)
			return -DROP_ICMP6;
		return TC_ACT_OK;
	}
	if (addr_is_multicast(&p->daddr))
		return -DROP_MULTICAST;
	if (proxy_missed(ctx))
		return -DROP_PROXY_MISSED;
	if (!endpoint_owns(dst, &p->daddr))
		return -DROP_UNKNOWN_TARGET;
	if (p->flags & PKT_FRAG) {
		ret = frag_track();
		if (ret)
			return ret;
	}

	ret = find_sender(ctx, p, f);
	if (ret)
		return ret;
	ret = ct_track(ctx, w);
	if (unlikely(ret))
		return ret;
	if (unlikely(f->proxy_port_be))
		return host_to_proxy(ctx, p, f);
	forwarded(ctx, p, f, TRACE_TO_ENDPOINT);
	return TC_ACT_OK;
}

SEC("tc")
int to_endpoint(struct __sk_buff *ctx)
{
	struct work *w = begin(ctx, ORIGIN_HOST, DIR_INGRESS);
	int ret;

	if (!w)
		return TC_ACT_SHOT;
	ret = handle_to_endpoint(ctx, w);
	return likely(ret >= 0) ? ret : drop(ctx, -ret);
}

char _license[] SEC("license") = "Dual BSD/GPL";
