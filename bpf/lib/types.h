/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every structure that the kernel side shares with the agent.
 *
 * The layout is the contract: explicit padding, asserted sizes, and the same
 * shapes in cilia/bpf/layout.py, which is compared with this object's BTF in a
 * test and again each time an object is loaded. A mismatch refuses to start.
 *
 * Addresses are 16 bytes for both families. An IPv4 address is written in the
 * IPv4-mapped form of RFC 4291 section 2.5.5.2 (::ffff:a.b.c.d), so one code
 * path, one conntrack table and one ipcache serve both families.
 *
 * Byte order: addresses and fields named *_be are in network order; everything
 * else, identities included, is in host order.
 */
#ifndef CILIA_TYPES_H
#define CILIA_TYPES_H

union addr {
	__u8 b[16];
	__be32 w[4];
	__u64 d[2];
};

/* ---- endpoints ------------------------------------------------------- */

#define EP_F_OPEN  (1u << 0) /* policy is in force: packets may pass */
#define EP_F_AUDIT (1u << 1) /* report what policy would drop, drop nothing by policy */
#define EP_F_HOST  (1u << 2) /* the node itself; its only key is interface 0, its ifindex 1 */

/*
 * One local endpoint. The same row is stored under each of its addresses
 * (cilia_lxc) and under its host-side interface (cilia_ifindex).
 */
struct endpoint {
	__u32 ifindex;     /* host side of the veth pair */
	__u32 identity;
	__u32 policy_slot; /* index into cilia_policy and cilia_policy_meta; 0 is never used */
	__u16 id;          /* 1..4095 */
	__u16 flags;       /* EP_F_* */
	__u8 mac[6];       /* the workload's interface */
	__u8 node_mac[6];  /* the host side */
	__u32 pad;
	union addr ip4;    /* IPv4-mapped; all zero when the endpoint has none */
	union addr ip6;
};
_Static_assert(sizeof(struct endpoint) == 64, "struct endpoint");

/* ---- ipcache --------------------------------------------------------- */

/* Packed: the kernel's trie takes every byte behind prefixlen for the prefix, a gap as well. */
struct ipcache_key {
	__u32 prefixlen;   /* bits of addr: an IPv4 /24 is 96 + 24 */
	union addr addr;
} __attribute__((packed, aligned(4)));
_Static_assert(sizeof(struct ipcache_key) == 20, "struct ipcache_key");

struct ipcache_value {
	__u32 identity;
	__u32 tunnel_be;   /* IPv4 address of the node that hosts it; 0: not tunnelled */
	__u32 flags;
	__u32 pad;
};
_Static_assert(sizeof(struct ipcache_value) == 16, "struct ipcache_value");

/* ---- policy ---------------------------------------------------------- */

/*
 * One row of a policy map. L4 is a prefix of the 24 bits protocol:8, port:16.
 *
 *   l4_plen  0   any protocol, any port        (proto 0, dport 0)
 *            8   one protocol, any port        (dport 0)
 *       9..24    one protocol, a port prefix   (8 + prefix bits of the port)
 *
 * A port range is covered by the fewest such prefixes. identity 0 means every
 * peer. Precedence among the rows that match a packet: a deny row wins; else
 * the longest l4_plen; on equal length the row with the identity.
 */
struct policy_key {
	__u32 identity;
	__be16 dport_be;   /* masked to the prefix; ICMP: the type, as a port number */
	__u8 proto;
	__u8 l4_plen : 7, egress : 1; /* bits 0..6 prefix length, bit 7 direction */
};
_Static_assert(sizeof(struct policy_key) == 8, "struct policy_key");

#define POLICY_F_DENY  (1u << 0)
#define POLICY_F_AUDIT (1u << 1) /* allows, and reports what would be denied: by rule_id; 0: by default */
#define POLICY_F_WATCH (1u << 2) /* the proxy only looks on: without it, directly */

struct policy_value {
	__u32 rule_id;     /* 0: no rule (implicit allow) */
	__be16 proxy_port_be; /* not 0: allowed by way of the proxy that listens there (TCP only) */
	__u8 flags;        /* POLICY_F_* */
	__u8 pad;
	__u64 hits;        /* verdicts given by this row, not packets */
};
_Static_assert(sizeof(struct policy_value) == 16, "struct policy_value");

/*
 * One row a slot of cilia_policy. The masks name the L4 prefix lengths that
 * occur, so that a lookup probes only those: bit n set means that some row has
 * l4_plen n. Index 0 ingress, 1 egress.
 *
 * Writer's order, so that no reader ever allows what neither the old nor the
 * new policy allows: masks = old | new | HAS_DENY; rows (or the swap of the
 * inner map); masks = new; and last rev, by a write that changes nothing else.
 */
#define POLICY_META_HAS_DENY (1u << 31) /* some row denies: look at every match */

struct policy_meta {
	__u32 rev;           /* unique on the node and never reused; 0: not resolved, drop */
	__u32 flags;
	__u32 plens_id[2];   /* rows with an identity; bit 31 POLICY_META_HAS_DENY (either mask) */
	__u32 plens_any[2];  /* rows with identity 0 */
};
_Static_assert(sizeof(struct policy_meta) == 24, "struct policy_meta");

/* ---- the node -------------------------------------------------------- */

/*
 * skb->mark, Cilium's numbers: what a packet says of itself within the node.
 * What is to be delivered to the proxy has its port in the upper half, in
 * network order; what the proxy's own sockets send has a mark of theirs, and
 * those of a listener and of what it accepted have its port there.
 */
#define MARK_MAGIC_MASK         0x0f00u
#define MARK_OWNER_MASK         0xffffu /* of the proxy's own marks, which say nothing else there */
#define MARK_TO_PROXY           0x0200u
#define MARK_FROM_INGRESS_PROXY 0x0a00u
#define MARK_FROM_EGRESS_PROXY  0x0b00u

/* A port that policy of the node never closes. */
struct control_port {
	__be16 port_be;    /* the responder's; 0: no port */
	__u8 proto;
	__u8 egress;       /* 1: the node is the one who connects */
};
_Static_assert(sizeof(struct control_port) == 4, "struct control_port");
#define CONTROL_PORTS_MAX 8

/* ---- conntrack ------------------------------------------------------- */

/*
 * One entry a connection, whichever way its packets go: the two ends of the
 * tuple are sorted (as big-endian byte strings: address, then port), and the
 * entry remembers which end began.
 *
 * ICMP echo: both ports are the identifier. Other ICMP is no connection: its
 * packets look for a scope that no entry has, so that none rides on an echo of
 * identifier 0.
 */
struct ct_key {
	union addr lo, hi;
	__be16 lo_port_be, hi_port_be;
	__u8 proto;
	__u8 scope;        /* 0, or CT_SCOPE_NONE */
	__u16 pad;
};
_Static_assert(sizeof(struct ct_key) == 40, "struct ct_key");

#define CT_SCOPE_NONE 2

/* ct_entry.flags: written once, before the entry is visible (CT_F_NAT: before the first packet leaves). */
#define CT_F_INIT_LO   (1u << 0) /* the lo end sent the first packet */
#define CT_F_NAT       (1u << 1) /* nat_addr, nat_port_be are set */
#define CT_F_PROXY     (1u << 2) /* the initiator talks to the proxy, which answers as the responder */
#define CT_F_FROM_HOST (1u << 3) /* the initiator is this node's own stack */
#define CT_F_OUTSIDE   (1u << 4) /* the initiator came in from outside: never host, node or endpoint identity */
#define CT_F_TO_HOST   (1u << 5) /* the responder is this node's own stack */
#define CT_F_EXEMPT    (1u << 6) /* the node's policy is not asked: a control port, or a proxy's connection */
#define CT_F_FROM_PROXY (1u << 7) /* the initiator is the proxy: judged on the leg before it */

/* ct_entry.seen[direction]: each direction writes its own byte, so two CPUs need no atomics (5.10 has none that or). */
#define CT_SEEN_NON_SYN (1u << 0) /* a packet without SYN */
#define CT_SEEN_CLOSING (1u << 1) /* FIN or RST */

/*
 * What one end's policy said of this connection, and what it was told. The
 * first two fields are written as one 64-bit word: whatever pair is read, that
 * identity was admitted under that revision.
 */
struct ct_side {
	__u32 policy_rev;  /* policy_meta.rev then; 0: never judged */
	__u32 remote_id;
	__u32 epoch;       /* runtime.ipcache_epoch, read before the identity was */
	__u32 rule_id;
};

struct ct_entry {
	struct ct_side side[2];  /* [0] the initiator's egress, [1] the responder's ingress */
	__u64 packets[2];        /* [0] from the initiator, [1] replies */
	__u64 bytes[2];
	__u32 expires_s;         /* monotonic seconds */
	__u32 last_report_s[2];  /* trace aggregation, a direction each */
	__u8 report_flags[2];    /* TCP flags already reported */
	__u8 seen[2];            /* CT_SEEN_*, a direction each */
	union addr nat_addr;     /* the address the world sees (masquerade) */
	__be16 nat_port_be;
	__be16 proxy_port_be;    /* of the row that admitted side[0]; 0: none */
	__u8 flags;              /* CT_F_* */
	__u8 pad;
	__be16 proxy_port1_be;   /* of the row that admitted side[1]; 0: none */
};
_Static_assert(sizeof(struct ct_entry) == 104, "struct ct_entry");

/* ---- masquerade ------------------------------------------------------ */

/* Reply half only: the forward half is in the conntrack entry. */
struct nat_key {
	union addr remote, local; /* local: the node's address */
	__be16 remote_port_be, local_port_be;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct nat_key) == 40, "struct nat_key");

struct nat_value {
	union addr addr;   /* the endpoint */
	__be16 port_be;
	__u16 pad;
	__u32 expires_s;
};
_Static_assert(sizeof(struct nat_value) == 24, "struct nat_value");

/* A host device: its addresses for masquerade. Key: ifindex. */
#define DEV_F_L3 (1u << 0) /* no link layer header */

struct device {
	union addr ip4, ip6;  /* all zero: no address of that family */
	__u8 mac[6];
	__u16 flags;
};
_Static_assert(sizeof(struct device) == 40, "struct device");

/* ---- fragments ------------------------------------------------------- */

struct frag_key {
	union addr saddr, daddr;
	__be32 id_be;
	__u8 proto;        /* IPv4 only (RFC 791); IPv6 datagrams are told apart without it (RFC 8200) */
	__u8 pad[3];
};
_Static_assert(sizeof(struct frag_key) == 40, "struct frag_key");

struct frag_range {
	__u16 start, end;  /* bytes of the datagram's payload, end exclusive; 0,0 unused */
};

#define FRAG_F_LAST (1u << 0) /* the last fragment has been seen */
#define FRAG_F_BAD  (1u << 1) /* overlapped: the rest of the datagram is dropped too (RFC 5722) */

struct frag_value {
	__be16 sport_be, dport_be;   /* ICMP: sport is type << 8 | code, dport the echo identifier */
	__u16 first_end;   /* end of the first fragment */
	__u16 contig_end;  /* everything below has arrived */
	__u32 expires_s;
	struct frag_range island[4]; /* ranges beyond contig_end */
	__u8 proto;                  /* the upper layer's */
	__u8 flags;                  /* FRAG_F_* */
	__u16 pad;
};
_Static_assert(sizeof(struct frag_value) == 32, "struct frag_value");

/* ---- runtime --------------------------------------------------------- */

/* The one row of cilia_runtime: what may change while programs run. */
struct runtime {
	__u32 ipcache_epoch;  /* raised after each change of any address's identity */
	__u32 flags;          /* RT_F_* */
	__u32 aggregation;    /* 0 none, 1 lowest, 2 low, 3 medium (= maximum) */
	__u32 report_interval_s;
	__u32 ct_tcp_s, ct_tcp_syn_s, ct_tcp_fin_s, ct_any_s; /* conntrack lifetimes */
	__u64 boot_offset_ns; /* wall clock minus monotonic, for readers without a clock of their own */
	__u32 host_ifindex;   /* cilia_host: where the node's own packets enter that go to the proxy */
	__u8 host_mac[6];
	__u16 pad;
	__u32 pad2;
};
#define RT_F_MASQUERADE4       (1u << 0)
#define RT_F_MASQUERADE6       (1u << 1)
#define RT_F_ALLOW_FRAG_NEEDED (1u << 2) /* ICMP type 3 code 4 and ICMPv6 type 2 pass whatever policy says */
_Static_assert(sizeof(struct runtime) == 56, "struct runtime");

/* ---- proxy ----------------------------------------------------------- */

/* cilia_proxy_pair: the listener of a connection whose both ends have L7 rules. */
struct proxy_pair {
	__be16 egress_be, ingress_be; /* what the rows of the two ends name */
};
_Static_assert(sizeof(struct proxy_pair) == 4, "struct proxy_pair");

struct proxy_listener {
	__be16 port_be;
	__u16 pad;
};
_Static_assert(sizeof(struct proxy_listener) == 4, "struct proxy_listener");

/* ---- metrics --------------------------------------------------------- */

/* cilia_metrics, per CPU, index = reason << 2 | direction (0 none, 1 ingress, 2 egress). */
struct metric {
	__u64 packets, bytes;
};

/* ---- audit ----------------------------------------------------------- */

/*
 * One question to the programs of bpf_audit.c, which no packet ever meets, and
 * its answer. A run takes a frame: Ethernet header, then cells up to one with
 * policy_slot 0, the end of the frame, or AUDIT_CELLS.
 */
struct audit_cell {
	__u32 policy_slot;   /* asked: whose policy; 0 ends the list */
	__u32 identity;      /* for events, as ep_id */
	__u32 remote_id;
	__be16 dport_be;     /* ICMP: the type */
	__u8 proto;
	__u8 egress;         /* 1, or 0 for ingress */
	__u16 ep_id;
	__u16 ep_flags;      /* EP_F_* */
	__s32 verdict;       /* answered as in struct event; what is audited only is denied here */
	__u32 rule_id;
	__u32 policy_rev;
	__u8 match_type;
	__u8 row_flags;      /* POLICY_F_* */
	__u8 audited;        /* 1: reported, and let pass */
	__u8 answered;       /* 1 */
};
_Static_assert(sizeof(struct audit_cell) == 36, "struct audit_cell");
#define AUDIT_CELLS 64

/* ---- events ---------------------------------------------------------- */

#define EVENT_DROP    1
#define EVENT_TRACE   4
#define EVENT_VERDICT 5

#define EVENT_F_IPV6     (1u << 0)
#define EVENT_F_REPLY    (1u << 1)
#define EVENT_F_AUDITED  (1u << 2)
#define EVENT_F_FRAGMENT (1u << 3)
#define EVENT_F_RELATED  (1u << 4) /* an ICMP error about a tracked connection */
#define EVENT_F_REJUDGED (1u << 5) /* verdict about a live connection, after a change */
#define EVENT_F_SELFTEST (1u << 6) /* about no packet: the audit path was tried */

#define DIR_NONE    0
#define DIR_INGRESS 1
#define DIR_EGRESS  2

/* trace observation points, Cilium's numbers */
#define TRACE_TO_ENDPOINT   0
#define TRACE_TO_PROXY      1
#define TRACE_TO_HOST       2
#define TRACE_TO_STACK      3
#define TRACE_TO_OVERLAY    4
#define TRACE_FROM_ENDPOINT 5
#define TRACE_FROM_PROXY    6
#define TRACE_FROM_HOST     7
#define TRACE_FROM_STACK    8
#define TRACE_FROM_OVERLAY  9
#define TRACE_FROM_NETWORK  10
#define TRACE_TO_NETWORK    11

/* policy match types, Cilium's numbers */
#define MATCH_NONE     0
#define MATCH_L3       1
#define MATCH_L3_L4    2
#define MATCH_L4       3
#define MATCH_ALL      4
#define MATCH_L3_PROTO 5
#define MATCH_PROTO    6

/* ct states, Cilium's numbers */
#define CT_NEW         0
#define CT_ESTABLISHED 1
#define CT_REPLY       2
#define CT_RELATED     3

/* Exactly 128 bytes, all of one size: readers view the ring as an array. */
struct event {
	__u64 time_ns;        /* CLOCK_MONOTONIC */
	union addr saddr, daddr;
	__u32 src_identity, dst_identity;
	__u32 rule_id;        /* the row that decided; 0: none did */
	__u32 policy_rev;
	__u32 ifindex;        /* where the packet was seen */
	__u32 length;         /* bytes on the wire */
	__s32 verdict;        /* 0 allow, > 0 proxy port, < 0 minus the drop reason */
	__be16 sport_be, dport_be; /* ICMP: type in sport, code in dport (host order numbers, stored big-endian) */
	__u16 ep_id;          /* whose policy or whose packet; 0: the host's */
	__u16 peer_ep_id;     /* the local endpoint at the other end, if any */
	__u8 type;            /* EVENT_* */
	__u8 reason;          /* drop reason (positive), or for EVENT_TRACE the ct state */
	__u8 obs_point;       /* TRACE_* */
	__u8 direction;       /* DIR_*, as seen from ep_id */
	__u8 proto;
	__u8 tcp_flags;
	__u8 match_type;      /* MATCH_* */
	__u8 flags;           /* EVENT_F_* */
	__u8 smac[6], dmac[6];
	__u32 cpu;
	__u32 orig_len;       /* reserved: L7 and proxy correlation */
	__u8 pad[20];
};
_Static_assert(sizeof(struct event) == 128, "struct event");

#endif /* CILIA_TYPES_H */
