// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The programs on each of the node's devices. from_netdev, on ingress, takes
 * what is for an endpoint, directly or as the answer to a masqueraded packet,
 * and delivers it in one pass. What claims to be from an endpoint of this node
 * is dropped, whomever it is for. All else is the node's, or passes through it:
 * untouched, but while policy is about the node what is for itself is judged, and
 * so is what leaves by to_netdev, on egress.
 */
#include "lib/begin.h"
#include "lib/deliver.h"
#include "lib/frag.h"
#include "lib/unmasquerade.h"

/*
 * Is it an answer to a masqueraded packet? Returns as unmasquerade(). Later
 * fragments are ours when the first one was.
 */
static __always_inline int claim_answer(struct __sk_buff *ctx, struct packet *p)
{
	struct frag_key key;
	int ret;

	if (p->flags & PKT_LATER) {
		frag_key_of(&key, p);
		if (!bpf_map_lookup_elem(&cilia_frag, &key))
			return 0;
		ret = frag_track();
		return ret ?: unmasquerade(ctx);
	}
	if (p->flags & PKT_FRAG) {
		if (!unmasquerade_claims(p))
			return 0;
		/* While the packet still has the address that the rest will have. */
		ret = frag_track();
		if (ret)
			return ret;
	}
	return unmasquerade(ctx);
}

/*
 * What a device received for neither an endpoint nor a mapping of theirs, while
 * the node is a subject of policy. parsed: what parse() said. Returns 0 when it
 * is to be judged, CT_NOT_OURS when it passes untouched, or a drop reason.
 */
static __always_inline int host_receives(struct __sk_buff *ctx, const struct packet *p, int parsed)
{
	/* A protocol without ports is judged by its number alone, packet by packet. */
	if (parsed && parsed != -DROP_CT_PROTO)
		return is_for_node(ctx) ? parsed : CT_NOT_OURS;
	if (host_is_exempt(p, false))
		return CT_NOT_OURS;
	if ((p->flags & PKT_FRAG) && !(p->flags & PKT_JOINED))
		return is_for_node(ctx) ? frag_track() : CT_NOT_OURS;
	return 0;
}

#define VLAN_VID_MASK	  0xfff
#define PRIORITY_TAGS_MAX 2

/*
 * A tag of VLAN 0 says how urgent a frame is (IEEE 802.1Q). After these programs
 * the kernel takes it off, be there several, and what is under it is the
 * device's: so it is taken off before.
 */
static __always_inline int untag_priority(struct __sk_buff *ctx)
{
	int i;

	for (i = 0; i < PRIORITY_TAGS_MAX; i++) {
		if (likely(!ctx->vlan_present) || (ctx->vlan_tci & VLAN_VID_MASK))
			return 0;
		if (bpf_skb_vlan_pop(ctx))
			return -DROP_VLAN;
	}
	return ctx->vlan_present && !(ctx->vlan_tci & VLAN_VID_MASK) ? -DROP_VLAN : 0;
}

static __always_inline int handle_from_netdev(struct __sk_buff *ctx, struct work *w)
{
	const struct endpoint *dst;
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	int ret, parsed;

	f->received = true;
	mark_scrub(ctx);
	ret = untag_priority(ctx);
	if (unlikely(ret))
		return ret;
	parsed = parse(ctx, p);
	/* No IP, tagged, or so broken that nobody knows whom it is for. */
	if (addr_is_zero(&p->daddr))
		return TC_ACT_OK;
	dst = endpoint_by_addr(&p->daddr);
	if (dst) {
		end_set(&f->dst, dst);
		if (parsed)
			return parsed;
		if (p->flags & PKT_FRAG) {
			ret = frag_track();
			if (ret)
				return ret;
		}
		if (endpoint_by_addr(&p->saddr))
			return -DROP_SOURCE_IP;
	} else {
		/* Nor may it be an endpoint to the node, whose answer would go there as the node's. */
		if (endpoint_by_addr(&p->saddr))
			return -DROP_SOURCE_IP;
		ret = parsed || addr_is_multicast(&p->daddr) ? 0 : claim_answer(ctx, p);
		if (ret < 0)
			return ret;
		if (!ret) {
			ret = host_row() ? host_receives(ctx, p, parsed) : CT_NOT_OURS;
			if (ret)
				return ret == CT_NOT_OURS ? TC_ACT_OK : ret;
		} else {
			dst = endpoint_by_addr(&p->daddr);
			if (!dst)
				return -DROP_UNKNOWN_TARGET;
			end_set(&f->dst, dst);
		}
	}

	if (dst)
		trace_from(ctx, f, TRACE_FROM_NETWORK, DIR_INGRESS);
	ret = ct_track(ctx, w);
	if (ret)
		return ret == CT_NOT_OURS ? TC_ACT_OK : ret;
	if (!dst) {
		passed(ctx, p, f, TRACE_TO_HOST, DIR_INGRESS);
		return TC_ACT_OK;
	}
	if (f->answer && f->tracked)
		nat_refresh(w);
	if (unlikely(f->proxy_port_be))
		return to_proxy(ctx, p, f);
	return to_local(ctx, p, f);
}

SEC("tc")
int from_netdev(struct __sk_buff *ctx)
{
	struct work *w = begin(ctx, ORIGIN_OUTSIDE, DIR_INGRESS);
	int ret;

	if (!w)
		return TC_ACT_OK;
	ret = handle_from_netdev(ctx, w);
	return ret >= 0 ? ret : drop(ctx, -ret);
}

static __always_inline int handle_to_netdev(struct __sk_buff *ctx, struct work *w)
{
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	int ret, parsed;

	/* An endpoint's: judged where it came in. */
	if (ctx->ingress_ifindex && endpoint_by_ifindex(ctx->ingress_ifindex))
		return TC_ACT_OK;
	parsed = parse(ctx, p);
	if (addr_is_zero(&p->daddr))
		return TC_ACT_OK;
	/* Forwarded for somebody else, unless by the node's address (netfilter's masquerade). */
	if (ctx->ingress_ifindex && identity_of_destination(&p->saddr) != ID_HOST)
		return TC_ACT_OK;
	if (parsed && parsed != -DROP_CT_PROTO)
		return parsed;
	if (host_is_exempt(p, true))
		return TC_ACT_OK;
	if (p->flags & PKT_FRAG) {
		ret = frag_track();
		if (ret)
			return ret;
	}
	ret = ct_track(ctx, w);
	if (ret)
		return ret;
	passed(ctx, p, f, TRACE_TO_NETWORK, DIR_EGRESS);
	return TC_ACT_OK;
}

SEC("tc")
int to_netdev(struct __sk_buff *ctx)
{
	struct work *w;
	bool missed;
	int ret;

	missed = proxy_missed(ctx);
	if (likely(!missed && !host_row()))
		return TC_ACT_OK;
	w = begin(ctx, ORIGIN_HOST, DIR_EGRESS);
	if (!w)
		return missed ? TC_ACT_SHOT : TC_ACT_OK;
	if (missed) {
		parse(ctx, &w->p);
		return drop(ctx, DROP_PROXY_MISSED);
	}
	ret = handle_to_netdev(ctx, w);
	return ret >= 0 ? ret : drop(ctx, -ret);
}

/*
 * On cilia_host's ingress: what to_endpoint sent here, to be delivered to the
 * proxy. Nothing else comes in by this device.
 */
SEC("tc")
int assign_socket(struct __sk_buff *ctx)
{
	struct work *w = begin(ctx, ORIGIN_HOST, DIR_INGRESS);
	int ret;

	if (!w)
		return TC_ACT_SHOT;
	if (!mark_is_to_proxy(ctx->mark))
		return TC_ACT_OK;
	ret = parse(ctx, &w->p);
	if (!ret)
		ret = proxy_assign(ctx, bpf_ntohs(ctx->mark >> 16));
	return ret ? drop(ctx, -ret) : TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
