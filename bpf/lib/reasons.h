/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Why a packet was dropped: Cilium's numbers where it has one, ours from 230.
 * Functions return them negated; drop.h counts and reports each exactly once.
 * Texts are in cilia/bpf/dropreason.py.
 */
#ifndef CILIA_REASONS_H
#define CILIA_REASONS_H

/* Not drops: outcomes that have a counter. */
#define REASON_FORWARDED 0
#define REASON_ANSWERED  100 /* ARP, neighbour discovery */
#define REASON_IGNORED   101 /* DAD probe, MLD, IGMP, router solicitation */
#define REASON_AUDITED   102 /* passed although policy denies it, as it is only audited */

#define DROP_SOURCE_IP      132
#define DROP_POLICY         133
#define DROP_INVALID        134
#define DROP_CT_HEADER      135
#define DROP_FRAG_NEEDED    136
#define DROP_CT_PROTO       137
#define DROP_CT_CREATE      138
#define DROP_L3_PROTO       139
#define DROP_WRITE          141
#define DROP_UNKNOWN_TARGET 150
#define DROP_CSUM_L3        153
#define DROP_CSUM_L4        154
#define DROP_CT_INSERT      155
#define DROP_IP6_EXT        156
#define DROP_FRAG_PROXY     157
#define DROP_L2_PROTO       166
#define DROP_NAT_NO_PORT    167
#define DROP_NAT_PROTO      168
#define DROP_FIB            169
#define DROP_FRAG_UNKNOWN   175
#define DROP_ICMP6          176
#define DROP_NO_SOCKET      178
#define DROP_SOCKET_ASSIGN  179
#define DROP_PROXY_PROTO    180
#define DROP_POLICY_DENY    181
#define DROP_VLAN           182

#define DROP_ARP_TARGET   230
#define DROP_FRAG_TINY    231
#define DROP_FRAG_OVERLAP 232
#define DROP_MULTICAST    233
#define DROP_FRAG_STATE   234
#define DROP_NOT_OPEN     235
#define DROP_PROXY_MISSED 236 /* on its way to the proxy, and about to leave by a device */
#define DROP_PROXY_PAIR   237 /* both ends have L7 rules, and no listener enforces both */
#define DROP_PROXY_OTHER  238 /* the connection is not where its rules are enforced now */
#define DROP_NOT_PROXY    239 /* sent as a proxied connection's end, but not by the proxy */

#endif /* CILIA_REASONS_H */
