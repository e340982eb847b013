/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * IPv6 neighbour discovery and multicast housekeeping from a workload. Each
 * message has a stated verdict:
 *
 *   NS for the gateway                        answered
 *   NS from ::, that is DAD (RFC 4862)        ignored: addresses are assigned, not negotiated
 *   NS for anybody else                       dropped, 150
 *   NA of the workload's own address, unicast to the node (it was asked): passed
 *   NA unicast to anybody else                dropped, 150: the node would route it
 *   NA to all nodes, RS, MLD                  ignored
 *   RA, redirect, or any of these fragmented (RFC 6980)   dropped, 176
 *   hop limit not 255 (RFC 4861)              dropped, 134
 */
#ifndef CILIA_ND_H
#define CILIA_ND_H

#include "events.h"
#include "ipcache.h"

struct na_frame {
	struct eth_header eth;
	struct ip6_header ip;
	struct nd_header nd;
	struct nd_option opt;
} __attribute__((packed, aligned(2)));
_Static_assert(sizeof(struct na_frame) == 86, "struct na_frame");

static __always_inline int nd_answer(struct __sk_buff *ctx, const struct packet *p,
				     const struct end *ep)
{
	struct {
		union addr saddr, daddr;
		__be32 len_be, next_be;
		struct nd_header nd;
		struct nd_option opt;
	} pseudo = {
		.len_be = bpf_htonl(sizeof(struct nd_header) + sizeof(struct nd_option)),
		.next_be = bpf_htonl(PROTO_ICMPV6),
		.nd = { .type = ICMP6_NA, .flags = NA_ROUTER | NA_SOLICITED | NA_OVERRIDE },
		.opt = { .type = ND_OPT_TARGET_LL, .units = 1 },
	};
	struct eth_header eth;
	struct ip6_header ip = {
		.version_tc = 6 << 4,
		.payload_len_be = bpf_htons(sizeof(struct nd_header) + sizeof(struct nd_option)),
		.next = PROTO_ICMPV6,
		.hop_limit = 255,
	};
	__s64 sum;

	if (bpf_skb_load_bytes(ctx, 0, &eth, sizeof(eth)) ||
	    bpf_skb_load_bytes(ctx, p->l4_off + 8, &pseudo.nd.target, sizeof(pseudo.nd.target)))
		return -DROP_INVALID;
	addr_copy(&pseudo.saddr, &pseudo.nd.target);
	addr_copy(&pseudo.daddr, &p->saddr);
	memcpy(pseudo.opt.mac, ep->node_mac, 6);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	pseudo.nd.check = ~sum;

	addr_copy(&ip.saddr, &pseudo.saddr);
	addr_copy(&ip.daddr, &pseudo.daddr);
	memcpy(eth.dmac, eth.smac, 6);
	memcpy(eth.smac, ep->node_mac, 6);
	/* The question may lack the option that the answer carries (RFC 4861 section 4.3). */
	if (bpf_skb_change_tail(ctx, sizeof(struct na_frame), 0) ||
	    bpf_skb_store_bytes(ctx, 0, &eth, sizeof(eth), 0) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), 0) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN + IP6_HLEN, &pseudo.nd,
				sizeof(pseudo.nd) + sizeof(pseudo.opt), BPF_F_INVALIDATE_HASH))
		return -DROP_WRITE;
	count(REASON_ANSWERED, DIR_EGRESS, ctx->len);
	return bpf_redirect(ctx->ifindex, 0);
}

__noinline int handle_nd(struct __sk_buff *ctx)
{
	const struct endpoint *owner;
	struct work *w = work();
	const struct packet *p;
	union addr target;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	if (p->flags & PKT_FRAG)
		return -DROP_ICMP6;
	switch (p->icmp_type) {
	case ICMP6_RA:
	case ICMP6_REDIRECT:
		return -DROP_ICMP6;
	case ICMP6_NS:
	case ICMP6_NA:
		break;
	default: /* RS, MLD */
		return ignore(ctx, DIR_EGRESS);
	}
	if (p->ttl != 255 || p->l4_len < sizeof(struct nd_header) || p->icmp_code ||
	    bpf_skb_load_bytes(ctx, p->l4_off + 8, &target, sizeof(target)))
		return -DROP_INVALID;
	if (addr_is_zero(&p->saddr))
		return ignore(ctx, DIR_EGRESS);
	owner = endpoint_by_addr(&p->saddr);
	if (!(owner && owner->ifindex == ctx->ifindex) && !addr_is_ip6_link_local(&p->saddr))
		return -DROP_SOURCE_IP;
	if (p->icmp_type == ICMP6_NA) {
		if (addr_is_multicast(&p->daddr))
			return ignore(ctx, DIR_EGRESS);
		if (!addr_equal(&target, &p->saddr))
			return -DROP_SOURCE_IP;
		if (!addr_is_ip6_link_local(&p->daddr) &&
		    identity_of_destination(&p->daddr) != ID_HOST)
			return -DROP_UNKNOWN_TARGET;
		count(REASON_FORWARDED, DIR_EGRESS, p->len);
		return TC_ACT_OK;
	}
	if (addr_is_zero(&target) || !is_router(&target) || addr_is_ip4(&target))
		return -DROP_UNKNOWN_TARGET;
	return nd_answer(ctx, p, &w->f.src);
}

#endif /* CILIA_ND_H */
