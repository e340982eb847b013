/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Protocol headers as they lie on the wire, and the numbers in them. Only what
 * the datapath reads: the uapi headers that define the rest include libc's.
 */
#ifndef CILIA_WIRE_H
#define CILIA_WIRE_H

#include "compiler.h"
#include "lib/types.h"

/* ---- Ethernet ---- */
#define ETH_HLEN        14
#define ETH_P_802_3_MIN 0x0600 /* below: a length, not a type */
#define ETH_P_IP        0x0800
#define ETH_P_ARP       0x0806
#define ETH_P_8021Q     0x8100
#define ETH_P_IPV6      0x86DD
#define ETH_P_8021AD    0x88A8

struct eth_header {
	__u8 dmac[6], smac[6];
	__be16 type_be;
};

/* ---- ARP for IPv4 over Ethernet, RFC 826 ---- */
#define ARP_REQUEST 1
#define ARP_REPLY   2

struct arp_header {
	__be16 hw_type_be, proto_type_be;
	__u8 hw_len, proto_len;
	__be16 op_be;
	__u8 sender_mac[6];
	__u8 sender_ip[4]; /* not aligned to 4 */
	__u8 target_mac[6];
	__u8 target_ip[4];
};
_Static_assert(sizeof(struct arp_header) == 28, "struct arp_header");

/* ---- IPv4, RFC 791 ---- */
#define IP4_DF          0x4000
#define IP4_MF          0x2000
#define IP4_OFFSET_MASK 0x1FFF

struct ip4_header {
	__u8 version_ihl, tos;
	__be16 total_len_be, id_be, frag_be;
	__u8 ttl, proto;
	__u16 check;
	__be32 saddr, daddr;
};
_Static_assert(sizeof(struct ip4_header) == 20, "struct ip4_header");

#define IP4_OFF_CHECK (ETH_HLEN + 10)
#define IP4_OFF_SADDR (ETH_HLEN + 12)
#define IP4_OFF_DADDR (ETH_HLEN + 16)

/* ---- IPv6, RFC 8200 ---- */
struct ip6_header {
	__u8 version_tc, tc_flow, flow[2];
	__be16 payload_len_be;
	__u8 next, hop_limit;
	union addr saddr, daddr;
};

#define IP6_HLEN      40
#define IP6_OFF_SADDR (ETH_HLEN + 8)
#define IP6_OFF_DADDR (ETH_HLEN + 24)

/* ---- protocol numbers; the first five and AH are IPv6 extension headers ---- */
#define PROTO_HOPOPTS  0
#define PROTO_ROUTING  43
#define PROTO_FRAGMENT 44
#define PROTO_AH       51
#define PROTO_DSTOPTS  60
#define PROTO_NONE     59
#define PROTO_ICMP     1
#define PROTO_IGMP     2
#define PROTO_TCP      6
#define PROTO_UDP      17
#define PROTO_ICMPV6   58
#define PROTO_SCTP     132

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define TCP_HLEN  20
#define UDP_HLEN  8
#define SCTP_HLEN 12
#define ICMP_HLEN 8

#define TCP_OFF_CHECK  16
#define UDP_OFF_CHECK  6
#define ICMP_OFF_CHECK 2
#define ICMP_OFF_ID    4

/* ---- ICMP, RFC 792 ---- */
#define ICMP4_ECHO_REPLY    0
#define ICMP4_UNREACHABLE   3
#define ICMP4_FRAG_NEEDED   4 /* code of the former */
#define ICMP4_ECHO          8
#define ICMP4_TIME_EXCEEDED 11
#define ICMP4_PARAMETER     12

/* ---- ICMPv6, RFC 4443, 4861 (neighbour discovery), 2710 and 3810 (MLD) ---- */
#define ICMP6_UNREACHABLE   1
#define ICMP6_TOO_BIG       2
#define ICMP6_TIME_EXCEEDED 3
#define ICMP6_PARAMETER     4
#define ICMP6_ECHO          128
#define ICMP6_ECHO_REPLY    129
#define ICMP6_MLD_QUERY     130
#define ICMP6_MLD_REPORT    131
#define ICMP6_MLD_DONE      132
#define ICMP6_RS            133
#define ICMP6_RA            134
#define ICMP6_NS            135
#define ICMP6_NA            136
#define ICMP6_REDIRECT      137
#define ICMP6_MLD2_REPORT   143

#define ND_OPT_SOURCE_LL 1
#define ND_OPT_TARGET_LL 2
#define NA_ROUTER        0x80
#define NA_SOLICITED     0x40
#define NA_OVERRIDE      0x20

struct nd_header { /* NS and NA */
	__u8 type, code;
	__u16 check;
	__u8 flags, reserved[3];
	union addr target;
};
_Static_assert(sizeof(struct nd_header) == 24, "struct nd_header");

/* ---- DHCP: the client's UDP port and the server's, RFC 2131 and 8415 ---- */
#define DHCP4_SERVER 67
#define DHCP4_CLIENT 68
#define DHCP6_CLIENT 546
#define DHCP6_SERVER 547

struct nd_option {
	__u8 type, units; /* of 8 bytes */
	__u8 mac[6];
};

#endif /* CILIA_WIRE_H */
