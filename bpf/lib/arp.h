/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ARP from a workload: the gateway is answered for, nobody else exists. */
#ifndef CILIA_ARP_H
#define CILIA_ARP_H

#include "events.h"
#include "ipcache.h"

static __always_inline __be32 arp_ip(const __u8 *ip)
{
	__be32 value;

	memcpy(&value, ip, 4);
	return value;
}

static __always_inline int arp_answer(struct __sk_buff *ctx, const struct end *ep)
{
	struct {
		struct eth_header eth;
		struct arp_header arp;
	} __attribute__((packed)) frame;
	__u8 asker[4];

	if (bpf_skb_load_bytes(ctx, 0, &frame, sizeof(frame)))
		return -DROP_INVALID;
	memcpy(asker, frame.arp.sender_ip, 4);
	memcpy(frame.eth.dmac, frame.arp.sender_mac, 6);
	memcpy(frame.eth.smac, ep->node_mac, 6);
	frame.arp.op_be = bpf_htons(ARP_REPLY);
	memcpy(frame.arp.target_mac, frame.arp.sender_mac, 6);
	memcpy(frame.arp.sender_mac, ep->node_mac, 6);
	memcpy(frame.arp.sender_ip, frame.arp.target_ip, 4);
	memcpy(frame.arp.target_ip, asker, 4);
	if (bpf_skb_store_bytes(ctx, 0, &frame, sizeof(frame), 0))
		return -DROP_WRITE;
	count(REASON_ANSWERED, DIR_EGRESS, ctx->len);
	return bpf_redirect(ctx->ifindex, 0);
}

__noinline int handle_arp(struct __sk_buff *ctx)
{
	const struct endpoint *owner;
	struct work *w = work();
	struct arp_header arp;
	__be32 sender, target;
	struct packet *p;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &arp, sizeof(arp)))
		return -DROP_INVALID;
	if (arp.hw_type_be != bpf_htons(1) || arp.proto_type_be != bpf_htons(ETH_P_IP) ||
	    arp.hw_len != 6 || arp.proto_len != 4)
		return -DROP_INVALID;
	sender = arp_ip(arp.sender_ip);
	target = arp_ip(arp.target_ip);
	addr_from_ip4(&p->saddr, sender);
	addr_from_ip4(&p->daddr, target);
	/* A probe (RFC 5227) or an announcement asks for nothing that we would answer. */
	if (arp.op_be == bpf_htons(ARP_REQUEST) && (!sender || sender == target))
		return ignore(ctx, DIR_EGRESS);
	owner = endpoint_by_addr(&p->saddr);
	if (!owner || owner->ifindex != ctx->ifindex)
		return -DROP_SOURCE_IP;
	/* The answer to a question of the node's own. */
	if (arp.op_be == bpf_htons(ARP_REPLY)) {
		count(REASON_FORWARDED, DIR_EGRESS, ctx->len);
		return TC_ACT_OK;
	}
	if (arp.op_be != bpf_htons(ARP_REQUEST))
		return -DROP_INVALID;
	if (p->daddr.d[0] != ROUTER_IP4.d[0] || p->daddr.d[1] != ROUTER_IP4.d[1])
		return -DROP_ARP_TARGET;
	return arp_answer(ctx, &w->f.src);
}

#endif /* CILIA_ARP_H */
