/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A packet as parsed: one shape for both families. */
#ifndef CILIA_PACKET_H
#define CILIA_PACKET_H

#include "wire.h"

#define PKT_V6    (1u << 0)
#define PKT_FRAG  (1u << 1) /* a fragment */
#define PKT_LATER (1u << 2) /* a fragment, not the first: has no L4 header */
#define PKT_MORE  (1u << 3) /* a fragment, not the last */
#define PKT_DF    (1u << 4)
#define PKT_ECHO  (1u << 5) /* ICMP echo or echo reply: the ports are its identifier */
#define PKT_ERROR (1u << 6) /* an ICMP error, which quotes the packet it is about */
#define PKT_JOINED (1u << 7) /* a fragment that frag_track() has placed */

struct packet {
	union addr saddr, daddr;
	__be16 sport_be, dport_be;
	__u16 l4_off;  /* from the Ethernet header on */
	__u16 flags;   /* PKT_* */
	__u32 l4_len;  /* bytes from l4_off to the end of the IP packet */
	__u32 len;     /* bytes on the wire */
	__be32 frag_id_be;
	__u16 frag_start, frag_end; /* bytes of the datagram's payload */
	__u8 proto, tcp_flags;
	__u8 icmp_type, icmp_code;
	__u8 ttl, frag_proto; /* frag_proto: the protocol that names the datagram */
	__be16 l3_be;         /* EtherType */
	__u32 now_s;
	__u32 pad;
};

static __always_inline bool addr_equal(const union addr *a, const union addr *b)
{
	return a->d[0] == b->d[0] && a->d[1] == b->d[1];
}

static __always_inline bool addr_is_zero(const union addr *a)
{
	return !(a->d[0] | a->d[1]);
}

static __always_inline void addr_copy(union addr *to, const union addr *from)
{
	to->d[0] = from->d[0];
	to->d[1] = from->d[1];
}

static __always_inline void addr_from_ip4(union addr *to, __be32 ip4)
{
	to->d[0] = 0;
	to->w[2] = bpf_htonl(0xffff);
	to->w[3] = ip4;
}

static __always_inline bool addr_is_ip4(const union addr *a)
{
	return !a->d[0] && a->w[2] == bpf_htonl(0xffff);
}

/* Multicast of either family, or the IPv4 limited broadcast. */
static __always_inline bool addr_is_multicast(const union addr *a)
{
	if (addr_is_ip4(a))
		return (a->b[12] & 0xf0) == 0xe0 || a->w[3] == 0xffffffff;
	return a->b[0] == 0xff;
}

static __always_inline bool addr_is_ip6_link_local(const union addr *a)
{
	return a->b[0] == 0xfe && (a->b[1] & 0xc0) == 0x80;
}

static __always_inline bool packet_is_ip6(const struct packet *p)
{
	return p->flags & PKT_V6;
}

static __always_inline bool packet_is_icmp(const struct packet *p)
{
	return p->proto == (packet_is_ip6(p) ? PROTO_ICMPV6 : PROTO_ICMP);
}

/* Neighbour discovery and multicast listener messages. */
static __always_inline bool is_nd(const struct packet *p)
{
	return packet_is_ip6(p) && p->proto == PROTO_ICMPV6 && !(p->flags & PKT_LATER) &&
	       ((p->icmp_type >= ICMP6_MLD_QUERY && p->icmp_type <= ICMP6_REDIRECT) ||
		p->icmp_type == ICMP6_MLD2_REPORT);
}

static __always_inline bool is_igmp(const struct packet *p)
{
	return p->proto == PROTO_IGMP && addr_is_ip4(&p->saddr);
}

static __always_inline bool packet_is_syn(const struct packet *p)
{
	return p->proto == PROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool packet_is_echo_request(const struct packet *p)
{
	return (p->flags & PKT_ECHO) &&
	       p->icmp_type == (packet_is_ip6(p) ? ICMP6_ECHO : ICMP4_ECHO);
}

#endif /* CILIA_PACKET_H */
