/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From bytes to a struct packet: one parse a packet, one shape for both
 * families. Nothing after this header looks at protocol headers again, except
 * to change them.
 */
#ifndef CILIA_PARSE_H
#define CILIA_PARSE_H

#include "flow.h"

/* Walked at most; real packets have one or two. Longer chains are dropped. */
#define IP6_MAX_EXT_HEADERS 6
/* Ports and checksum are reached directly up to here, by bpf_skb_load_bytes beyond. */
#define DIRECT_L4_OFF 0xff

static __always_inline void packet_set_icmp(struct packet *p, __u8 type, __u8 code, __be16 id_be)
{
	bool echo, error;

	p->icmp_type = type;
	p->icmp_code = code;
	if (packet_is_ip6(p)) {
		echo = type == ICMP6_ECHO || type == ICMP6_ECHO_REPLY;
		error = type >= ICMP6_UNREACHABLE && type <= ICMP6_PARAMETER;
	} else {
		echo = type == ICMP4_ECHO || type == ICMP4_ECHO_REPLY;
		error = type == ICMP4_UNREACHABLE || type == ICMP4_TIME_EXCEEDED ||
			type == ICMP4_PARAMETER;
	}
	if (echo) {
		p->flags |= PKT_ECHO;
		p->sport_be = p->dport_be = id_be;
	} else if (error) {
		p->flags |= PKT_ERROR;
	}
}

static __always_inline bool is_ip6_extension(__u8 next)
{
	return next == PROTO_HOPOPTS || next == PROTO_ROUTING || next == PROTO_FRAGMENT ||
	       next == PROTO_AH || next == PROTO_DSTOPTS;
}

static __always_inline int parse_fragment(struct packet *p, __u32 offset, bool more, __u32 length)
{
	if (offset + length > 65535 || !length || (more && (length & 7)))
		return -DROP_INVALID;
	p->flags |= PKT_FRAG | (offset ? PKT_LATER : 0) | (more ? PKT_MORE : 0);
	p->frag_start = offset;
	p->frag_end = offset + length;
	return 0;
}

/*
 * Walk the extension headers from p->proto at p->l4_off to the upper layer.
 * For a later fragment the walk ends at its fragment header.
 */
static __always_inline int walk_ip6_extensions(struct __sk_buff *ctx, struct packet *p)
{
	__u32 off = p->l4_off, left = p->l4_len, size;
	__u8 next = p->proto;
	int i, ret;

	for (i = 0; i < IP6_MAX_EXT_HEADERS && is_ip6_extension(next); i++) {
		/* Every extension header is at least these eight bytes. */
		struct {
			__u8 next, len;
			__be16 offset_be; /* routing: type, segments left */
			__be32 id_be;
		} h;

		if (left < sizeof(h) || bpf_skb_load_bytes(ctx, off, &h, sizeof(h)))
			return p->flags & PKT_FRAG ? -DROP_FRAG_TINY : -DROP_IP6_EXT;
		size = next == PROTO_FRAGMENT ? sizeof(h) :
		       next == PROTO_AH	      ? (h.len + 2u) * 4 :
						(h.len + 1u) * 8;
		if (next == PROTO_HOPOPTS && i)
			return -DROP_IP6_EXT;
		if (next == PROTO_ROUTING && !(bpf_ntohs(h.offset_be) >> 8))
			return -DROP_IP6_EXT; /* type 0, RFC 5095 */
		if (size > left)
			return p->flags & PKT_FRAG ? -DROP_FRAG_TINY : -DROP_IP6_EXT;
		if (next == PROTO_FRAGMENT) {
			__u16 word = bpf_ntohs(h.offset_be);

			if (p->flags & PKT_FRAG)
				return -DROP_IP6_EXT;
			/* An atomic fragment is a whole datagram, RFC 6946. */
			if (word & 0xfff9) {
				p->frag_id_be = h.id_be;
				ret = parse_fragment(p, word & 0xfff8, word & 1, left - size);
				if (ret)
					return ret;
			}
		}
		next = h.next;
		off += size;
		left -= size;
		if (p->flags & PKT_LATER)
			break;
	}
	if (is_ip6_extension(next) && !(p->flags & PKT_LATER))
		return -DROP_IP6_EXT;
	p->proto = next;
	p->l4_off = off;
	p->l4_len = left;
	return 0;
}

__noinline int parse_ip6_extensions(struct __sk_buff *ctx, bool quoted)
{
	struct work *w = work();

	if (!w)
		return -DROP_INVALID;
	return walk_ip6_extensions(ctx, quoted ? &w->quoted : &w->p);
}

static __always_inline __u32 l4_header_len(const struct packet *p)
{
	switch (p->proto) {
	case PROTO_TCP:
		return TCP_HLEN;
	case PROTO_SCTP:
		return SCTP_HLEN;
	case PROTO_UDP:
		return UDP_HLEN;
	case PROTO_ICMP:
		return packet_is_ip6(p) ? 0 : ICMP_HLEN;
	case PROTO_ICMPV6:
		return packet_is_ip6(p) ? ICMP_HLEN : 0;
	default:
		return 0;
	}
}

/* The first bytes of any upper layer that we know. */
struct l4_start {
	__be16 sport_be, dport_be; /* ICMP: type, code, checksum */
	__be16 id_be, seq_be;
	__u8 unused[4];
	__u8 data_off, tcp_flags;
	__u8 unused2[2];
};
_Static_assert(sizeof(struct l4_start) == 16, "struct l4_start");

static __always_inline void packet_set_l4(struct packet *p, const struct l4_start *h)
{
	if (packet_is_icmp(p)) {
		__u16 type_code = bpf_ntohs(h->sport_be);

		packet_set_icmp(p, type_code >> 8, type_code, h->id_be);
	} else {
		p->sport_be = h->sport_be;
		p->dport_be = h->dport_be;
	}
}

static __always_inline int parse_l4(struct __sk_buff *ctx, struct packet *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 need = l4_header_len(p);
	struct l4_start buf = {}, *h = &buf;
	__u64 off = p->l4_off;
	bool direct;
	void *l4;

	if (p->flags & PKT_LATER)
		return 0;
	if (unlikely(!need))
		return -DROP_CT_PROTO;
	if (unlikely(p->l4_len < need))
		return p->flags & PKT_FRAG ? -DROP_FRAG_TINY : -DROP_CT_HEADER;
	direct = off <= DIRECT_L4_OFF;
	l4 = data + bounded(off, DIRECT_L4_OFF);
	if (likely(p->proto == PROTO_TCP)) {
		if (likely(direct && l4 + sizeof(*h) <= end))
			h = l4;
		else if (bpf_skb_load_bytes(ctx, off, &buf, sizeof(buf)))
			return -DROP_CT_HEADER;
		if (h->data_off < 5 << 4 || p->l4_len < (h->data_off >> 4) * 4u)
			return p->flags & PKT_FRAG ? -DROP_FRAG_TINY : -DROP_CT_HEADER;
		p->tcp_flags = h->tcp_flags;
		p->sport_be = h->sport_be;
		p->dport_be = h->dport_be;
		return 0;
	}
	if (likely(direct && l4 + 8 <= end))
		h = l4;
	else if (bpf_skb_load_bytes(ctx, off, &buf, 8))
		return -DROP_CT_HEADER;
	packet_set_l4(p, h);
	return 0;
}

static __always_inline int parse_ip4(struct __sk_buff *ctx, struct packet *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ip4_header *ip = data + ETH_HLEN;
	__u32 header_len, total, frag;
	int ret;

	if ((void *)(ip + 1) > end)
		return -DROP_INVALID;
	header_len = (ip->version_ihl & 0xf) * 4;
	total = bpf_ntohs(ip->total_len_be);
	/* BIG TCP: too long for the field, which is then 0 (kernel 6.3). */
	if (!total && ctx->gso_size)
		total = ctx->len - ETH_HLEN;
	if (ip->version_ihl >> 4 != 4 || header_len < sizeof(*ip) || total < header_len ||
	    total > ctx->len - ETH_HLEN)
		return -DROP_INVALID;

	addr_from_ip4(&p->saddr, ip->saddr);
	addr_from_ip4(&p->daddr, ip->daddr);
	p->proto = ip->proto;
	p->ttl = ip->ttl;
	p->l4_off = ETH_HLEN + header_len;
	p->l4_len = total - header_len;
	frag = bpf_ntohs(ip->frag_be);
	if (frag & IP4_DF)
		p->flags |= PKT_DF;
	if (unlikely(frag & (IP4_MF | IP4_OFFSET_MASK))) {
		p->frag_id_be = bpf_htonl(bpf_ntohs(ip->id_be));
		p->frag_proto = ip->proto;
		ret = parse_fragment(p, (frag & IP4_OFFSET_MASK) * 8, frag & IP4_MF, p->l4_len);
		if (ret)
			return ret;
		/* RFC 1858: nothing legitimate splits the first bytes of TCP. */
		if (p->proto == PROTO_TCP && p->frag_start == 8)
			return -DROP_FRAG_TINY;
	}
	return 0;
}

static __always_inline int parse_ip6(struct __sk_buff *ctx, struct packet *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ip6_header *ip = data + ETH_HLEN;
	__u32 payload;

	if ((void *)(ip + 1) > end)
		return -DROP_INVALID;
	payload = bpf_ntohs(ip->payload_len_be);
	/* BIG TCP, as for IPv4. */
	if (!payload && ctx->gso_size)
		payload = ctx->len - ETH_HLEN - IP6_HLEN;
	if (ip->version_tc >> 4 != 6 || payload > ctx->len - ETH_HLEN - IP6_HLEN)
		return -DROP_INVALID;

	p->flags |= PKT_V6;
	addr_copy(&p->saddr, &ip->saddr);
	addr_copy(&p->daddr, &ip->daddr);
	/* ::ffff:a.b.c.d is how IPv4 is written here; no IPv6 packet may claim it. */
	if (unlikely(addr_is_ip4(&p->saddr) || addr_is_ip4(&p->daddr)))
		return -DROP_INVALID;
	p->proto = ip->next;
	p->ttl = ip->hop_limit;
	p->l4_off = ETH_HLEN + IP6_HLEN;
	p->l4_len = payload;
	if (unlikely(is_ip6_extension(p->proto)))
		return parse_ip6_extensions(ctx, false);
	return 0;
}

/*
 * Are the first bytes in the linear part, or can they be pulled there? Ask for
 * no more than is read directly: what TCP sends has its headers there and its
 * payload in pages, and is a clone, so that pulling one byte too many would
 * copy the head of every packet.
 */
static __always_inline bool in_reach(struct __sk_buff *ctx, __u32 bytes)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	return likely(data + bytes <= end) ||
	       (ctx->len >= bytes && !bpf_skb_pull_data(ctx, bytes));
}

/*
 * Fill p. A negative return is a drop reason; p->l3_be is set in any case.
 * ARP is only recognised, not parsed.
 */
static __always_inline int parse(struct __sk_buff *ctx, struct packet *p)
{
	struct eth_header *eth;
	int ret;

	if (unlikely(ctx->vlan_present))
		return -DROP_VLAN;
	if (!in_reach(ctx, ETH_HLEN))
		return -DROP_INVALID;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return -DROP_INVALID;
	p->l3_be = eth->type_be;
	switch (p->l3_be) {
	case bpf_htons(ETH_P_IP):
		ret = in_reach(ctx, ETH_HLEN + sizeof(struct ip4_header)) ? parse_ip4(ctx, p) :
									    -DROP_INVALID;
		break;
	case bpf_htons(ETH_P_IPV6):
		ret = in_reach(ctx, ETH_HLEN + IP6_HLEN) ? parse_ip6(ctx, p) : -DROP_INVALID;
		break;
	case bpf_htons(ETH_P_ARP):
		return 0;
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return -DROP_VLAN;
	default:
		return bpf_ntohs(p->l3_be) < ETH_P_802_3_MIN ? -DROP_L2_PROTO : -DROP_L3_PROTO;
	}
	if (ret < 0)
		return ret;
	return parse_l4(ctx, p);
}

/*
 * Parse the packet that the ICMP error quotes into work()->quoted. It may be cut off after eight
 * bytes of its upper layer. Returns false when it cannot be related to anything.
 */
__noinline int parse_quoted(struct __sk_buff *ctx)
{
	struct work *w = work();
	struct l4_start h = {};
	struct packet *p, *q;
	__u32 off;

	if (!w)
		return false;
	p = &w->p;
	q = &w->quoted;
	off = p->l4_off + ICMP_HLEN;
	memset(q, 0, sizeof(*q));
	q->now_s = p->now_s;
	if (packet_is_ip6(p)) {
		struct ip6_header ip;

		if (bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)) || ip.version_tc >> 4 != 6)
			return false;
		q->flags = PKT_V6;
		addr_copy(&q->saddr, &ip.saddr);
		addr_copy(&q->daddr, &ip.daddr);
		q->proto = ip.next;
		q->l4_off = off + sizeof(ip);
		q->l4_len = bpf_ntohs(ip.payload_len_be);
		if (is_ip6_extension(q->proto) && parse_ip6_extensions(ctx, true))
			return false;
	} else {
		struct ip4_header ip;

		if (bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)) || ip.version_ihl >> 4 != 4 ||
		    (ip.version_ihl & 0xf) < 5)
			return false;
		addr_from_ip4(&q->saddr, ip.saddr);
		addr_from_ip4(&q->daddr, ip.daddr);
		q->proto = ip.proto;
		q->l4_off = off + (ip.version_ihl & 0xf) * 4;
		if (ip.frag_be & bpf_htons(IP4_OFFSET_MASK))
			return false;
	}
	if ((q->flags & PKT_LATER) || !l4_header_len(q) ||
	    bpf_skb_load_bytes(ctx, q->l4_off, &h, 8))
		return false;
	packet_set_l4(q, &h);
	return !(q->flags & PKT_ERROR); /* never an error about an error */
}

#endif /* CILIA_PARSE_H */
