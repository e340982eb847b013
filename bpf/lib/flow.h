/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is known of a packet beyond its headers: whose it is, whom it concerns,
 * and what was decided. Filled step by step, read by events.
 */
#ifndef CILIA_FLOW_H
#define CILIA_FLOW_H

#include "maps.h"
#include "packet.h"
#include "reasons.h"

/* Where the packet came from: decides which identities its source may have. */
#define ORIGIN_ENDPOINT 0
#define ORIGIN_HOST     1 /* this node's own stack */
#define ORIGIN_OUTSIDE  2 /* a device: never host, node or endpoint identity */

#define ID_UNKNOWN        0
#define ID_HOST           1
#define ID_WORLD          2
#define ID_HEALTH         4
#define ID_KUBE_APISERVER 7
#define ID_WORLD_IP4      9
#define ID_WORLD_IP6      10
#define ID_CLUSTER_MIN    256
#define ID_LOCAL_BIT      (1u << 24) /* identities of CIDRs, known on this node only */

/* A local end of the packet: the head of its struct endpoint. ifindex 0: not local. */
struct end {
	__u32 ifindex, identity, policy_slot;
	__u16 id, flags;
	__u8 mac[6], node_mac[6];
	__u32 pad;
};
_Static_assert(sizeof(struct end) == __builtin_offsetof(struct endpoint, ip4), "struct end");

/* Ingress is about the destination, egress about the source; but not when an answer is judged. */
#define ABOUT_DIRECTION 0
#define ABOUT_SRC       1
#define ABOUT_DST       2

struct flow {
	struct end src, dst;
	__u32 src_id, dst_id;       /* ID_UNKNOWN until somebody asks */
	__u32 remote_id;            /* of the sender's side, as conntrack admitted it */
	__u32 rt_flags, aggregation, report_interval_s; /* of cilia_runtime */
	__u32 epoch;                /* of the ipcache, read before any identity */
	__u32 rule_id, policy_rev;  /* of the last judgement */
	__u8 origin;                /* ORIGIN_* */
	__u8 state;                 /* CT_* */
	__u8 reply;                 /* 1: from the responder to the initiator */
	__u8 report;                /* a trace event is due */
	__u8 direction;             /* DIR_* that a drop is counted in */
	__u8 event_flags;           /* EVENT_F_* */
	__u8 tracked;               /* the packet belongs to a conntrack entry */
	__u8 answer;                /* it came back through a mapping of cilia_nat */
	__u8 about;                 /* ABOUT_*: whose event it is */
	__u8 exempt;                /* the node's policy is not asked */
	__u8 received;              /* just now, by a device of the node: not forwarded to here */
	__u8 from_proxy;            /* sent by a socket of the proxy */
	__u8 watched;               /* sides whose row sends it to a proxy that only looks on: 1 << side */
	__be16 proxy_port_be;       /* it is to be delivered to the proxy that listens there */
};

/*
 * One packet's working state, a CPU each: a tc program is never interrupted by
 * another. It lies in a map rather than on the stack, so that the slow paths
 * can be global functions, which the verifier checks once each and not once for
 * every state of every caller.
 */
struct work {
	struct packet p;
	struct packet quoted; /* by the ICMP error p */
	struct flow f;
	struct ct_key key;    /* of p, or of quoted */
	struct ct_entry entry; /* while one is made */
	struct nat_key nat_key;
	struct nat_value nat_value;
	union addr nat_addr;  /* of the node when sending, of the endpoint on the way back */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} cilia_work SEC(".maps");

static __always_inline struct work *work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&cilia_work, &zero);
}

static __always_inline struct runtime *runtime(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&cilia_runtime, &zero);
}

#endif /* CILIA_FLOW_H */
