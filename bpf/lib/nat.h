/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Masquerade: an endpoint that talks to the world does so from the node's
 * address. The conntrack entry knows the forward half, cilia_nat the way back:
 *
 *   endpoint:port -> remote:rport   ct_entry.nat_addr, .nat_port_be
 *   remote:rport -> node:nat_port   cilia_nat -> endpoint:port
 *
 * TCP, UDP and ICMP echo (its identifier is the port) get a port of
 * NAT_PORT_MIN..MAX. SCTP's checksum covers its ports and not the addresses, so
 * only its address is changed. ICMP errors are rewritten with what they quote.
 *
 * Checksums are changed by difference. With CHECKSUM_COMPLETE the kernel's sum
 * of an IPv4 packet stays right by itself (the header sums to nothing); for
 * IPv6 the store of the address corrects what bpf_l4_csum_replace assumes.
 */
#ifndef CILIA_NAT_H
#define CILIA_NAT_H

#include "conntrack.h"

/* Offset of the checksum in the L4 header; 0: none that an address or port enters. */
static __always_inline __u32 l4_check_off(const struct packet *p)
{
	switch (p->proto) {
	case PROTO_TCP:
		return TCP_OFF_CHECK;
	case PROTO_UDP:
		return UDP_OFF_CHECK;
	case PROTO_ICMP:
	case PROTO_ICMPV6:
		return ICMP_OFF_CHECK;
	default:
		return 0;
	}
}

static __always_inline __u64 l4_check_flags(const struct packet *p)
{
	return p->proto == PROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
}

/* Replace the source (or destination) address of the packet itself. */
static __always_inline int rewrite_addr(struct __sk_buff *ctx, const struct packet *p,
					bool source, const union addr *to)
{
	const union addr *from = source ? &p->saddr : &p->daddr;
	__u32 check = l4_check_off(p);
	__u64 flags = l4_check_flags(p) | BPF_F_PSEUDO_HDR;

	/* A later fragment carries no checksum, ICMPv4 has no pseudo header. */
	if (p->flags & PKT_LATER || p->proto == PROTO_ICMP)
		check = 0;
	if (packet_is_ip6(p)) {
		__s64 diff = bpf_csum_diff((__be32 *)from, 16, (__be32 *)to, 16, 0);

		if (check && bpf_l4_csum_replace(ctx, p->l4_off + check, 0, diff, flags))
			return -DROP_CSUM_L4;
		if (bpf_skb_store_bytes(ctx, source ? IP6_OFF_SADDR : IP6_OFF_DADDR, to, 16,
					BPF_F_RECOMPUTE_CSUM))
			return -DROP_WRITE;
		return 0;
	}
	if (check && bpf_l4_csum_replace(ctx, p->l4_off + check, from->w[3], to->w[3], flags | 4))
		return -DROP_CSUM_L4;
	if (bpf_l3_csum_replace(ctx, IP4_OFF_CHECK, from->w[3], to->w[3], 4))
		return -DROP_CSUM_L3;
	if (bpf_skb_store_bytes(ctx, source ? IP4_OFF_SADDR : IP4_OFF_DADDR, &to->w[3], 4, 0))
		return -DROP_WRITE;
	return 0;
}

/* Replace a port, or the identifier of an ICMP echo. */
static __always_inline int rewrite_port(struct __sk_buff *ctx, const struct packet *p,
					bool source, __be16 to)
{
	__be16 from = source ? p->sport_be : p->dport_be;
	__u32 off = p->l4_off + (packet_is_icmp(p) ? ICMP_OFF_ID : source ? 0 : 2);
	__u32 check = l4_check_off(p);

	if (from == to || !check || (p->flags & PKT_LATER))
		return 0;
	if (bpf_l4_csum_replace(ctx, p->l4_off + check, from, to, l4_check_flags(p) | 2))
		return -DROP_CSUM_L4;
	return bpf_skb_store_bytes(ctx, off, &to, 2, 0) ? -DROP_WRITE : 0;
}

/*
 * The same for the packet q that the ICMP error p quotes. Its IPv4 header sums
 * to the same before and after; all else enters the checksum of the error. The
 * quoted L4 checksum is left: it may be cut off, and nobody verifies it.
 */
static __always_inline int rewrite_quoted(struct __sk_buff *ctx, const struct packet *p,
					  const struct packet *q, bool source,
					  const union addr *to_addr, __be16 to_port)
{
	const union addr *from = source ? &q->saddr : &q->daddr;
	__be16 port = source ? q->sport_be : q->dport_be;
	__u32 ip = p->l4_off + ICMP_HLEN, check = p->l4_off + ICMP_OFF_CHECK;
	__u32 port_off = q->l4_off + (packet_is_icmp(q) ? ICMP_OFF_ID : source ? 0 : 2);

	if (packet_is_ip6(p)) {
		__s64 diff = bpf_csum_diff((__be32 *)from, 16, (__be32 *)to_addr, 16, 0);

		if (bpf_l4_csum_replace(ctx, check, 0, diff, 0))
			return -DROP_CSUM_L4;
		if (bpf_skb_store_bytes(ctx, ip + (source ? 8 : 24), to_addr, 16, 0))
			return -DROP_WRITE;
	} else {
		if (bpf_l3_csum_replace(ctx, ip + 10, from->w[3], to_addr->w[3], 4))
			return -DROP_CSUM_L3;
		if (bpf_skb_store_bytes(ctx, ip + (source ? 12 : 16), &to_addr->w[3], 4, 0))
			return -DROP_WRITE;
	}
	if (port == to_port || q->proto == PROTO_SCTP)
		return 0;
	if (bpf_l4_csum_replace(ctx, check, port, to_port, 2))
		return -DROP_CSUM_L4;
	return bpf_skb_store_bytes(ctx, port_off, &to_port, 2, 0) ? -DROP_WRITE : 0;
}

#endif /* CILIA_NAT_H */
