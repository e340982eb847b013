// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The programs on each of the node's devices. from_netdev, on ingress, takes
 * what is for an endpoint, directly or as the answer to a masqueraded packet,
 * and delivers it in one pass. What claims to be from an endpoint of this node
 * is dropped, whomever it is for. All else is the node's, and passes untouched.
 * to_netdev, on egress, sees the last of whatever leaves.
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

static __always_inline int handle_from_netdev(struct __sk_buff *ctx, struct work *w)
{
	const struct endpoint *dst;
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	int ret, parsed;

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
		if (parsed || addr_is_multicast(&p->daddr))
			return TC_ACT_OK;
		ret = claim_answer(ctx, p);
		if (ret <= 0)
			return ret;
		dst = endpoint_by_addr(&p->daddr);
		if (!dst)
			return -DROP_UNKNOWN_TARGET;
		end_set(&f->dst, dst);
	}

	/* The node's addresses, as endpoints' above, exist only on this side of the device. */
	if (identity_of_destination(&p->saddr) == ID_HOST)
		return -DROP_SOURCE_IP;
	trace_from(ctx, f, TRACE_FROM_NETWORK, DIR_INGRESS);
	ret = ct_track(ctx, w);
	if (ret)
		return ret;
	if (f->answer && f->tracked)
		nat_refresh(w);
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

SEC("tc")
int to_netdev(struct __sk_buff *ctx)
{
	(void)ctx; /* nothing to say about it yet */
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
