/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Out of the node: route, masquerade, neighbour. */
#ifndef CILIA_NETWORK_H
#define CILIA_NETWORK_H

#include "deliver.h"
#include "masquerade.h"

static __always_inline bool is_masqueraded(const struct packet *p, const struct flow *f)
{
	__u32 flag = packet_is_ip6(p) ? RT_F_MASQUERADE6 : RT_F_MASQUERADE4;
	__u32 remote = f->dst_id ?: f->remote_id;

	/* The rest of the cluster sees endpoints as they are; answers go as they were asked. */
	if (f->reply || is_cluster_identity(remote) || remote == ID_HEALTH)
		return false;
	return f->rt_flags & flag;
}

/* Out into the world, or to another node, by the kernel's routes. */
__noinline int to_network(struct __sk_buff *ctx)
{
	struct bpf_fib_lookup fib = {};
	struct work *w = work();
	struct packet *p;
	struct device *dev;
	bool l3 = false;
	__u32 ifindex;
	long err;
	int ret;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	fib.ifindex = ctx->ifindex;
	fib.l4_protocol = p->proto;
	fib.sport = p->sport_be;
	fib.dport = p->dport_be;
	if (packet_is_ip6(p)) {
		fib.family = AF_INET6;
		memcpy(fib.ipv6_src, &p->saddr, 16);
		memcpy(fib.ipv6_dst, &p->daddr, 16);
	} else {
		fib.family = AF_INET;
		fib.ipv4_src = p->saddr.w[3];
		fib.ipv4_dst = p->daddr.w[3];
	}
	err = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);
	if (err == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		/* The stack would fragment it, but with the endpoint's own address. */
		if (!packet_is_ip6(p) && !(p->flags & PKT_DF))
			return -DROP_FRAG_NEEDED;
		return to_stack(ctx, p, &w->f);
	}
	if (err && err != BPF_FIB_LKUP_RET_NO_NEIGH)
		return -DROP_FIB;
	ifindex = fib.ifindex;
	/* Back where it came from: nobody has that address. */
	if (ifindex == ctx->ifindex)
		return -DROP_FIB;
	if (p->ttl <= 1)
		return to_stack(ctx, p, &w->f);

	memset(&w->nat_addr, 0, sizeof(w->nat_addr));
	dev = bpf_map_lookup_elem(&cilia_devices, &ifindex);
	if (dev) {
		l3 = dev->flags & DEV_F_L3;
		addr_copy(&w->nat_addr, packet_is_ip6(p) ? &dev->ip6 : &dev->ip4);
	}
	ret = masquerade(ctx, dev && is_masqueraded(p, &w->f));
	if (ret)
		return ret;
	forwarded(ctx, p, &w->f, TRACE_TO_NETWORK);
	if (!err && !l3) {
		struct {
			__u8 dmac[6], smac[6];
		} macs;

		memcpy(macs.dmac, fib.dmac, 6);
		memcpy(macs.smac, fib.smac, 6);
		ret = rewrite_frame(ctx, p, (const __u8 *)&macs, true);
		return ret ?: bpf_redirect(ifindex, 0);
	} else {
		/* No neighbour yet, or none needed: the kernel resolves and fills in. */
		struct bpf_redir_neigh next = { .nh_family = fib.family };

		memcpy(next.ipv6_nh, fib.ipv6_dst, 16);
		ret = rewrite_frame(ctx, p, NULL, true);
		return ret ?: bpf_redirect_neigh(ifindex, &next, sizeof(next), 0);
	}
}

/* What the workload sent and conntrack let pass. */
static __always_inline int deliver(struct __sk_buff *ctx, const struct packet *p, struct flow *f)
{
	if (unlikely(f->proxy_port_be))
		return to_proxy(ctx, p, f);
	if (likely(end_is_local(&f->dst) && !end_is_host(&f->dst)))
		return to_local(ctx, p, f);
	/* Established: the side that was judged knows who the remote is. */
	if ((f->dst_id ?: f->remote_id) == ID_HOST)
		return to_host(ctx, p, f);
	return to_network(ctx);
}

#endif /* CILIA_NETWORK_H */
