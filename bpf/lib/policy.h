/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * One judgement of one endpoint's policy.
 *
 * A row is keyed by identity and an L4 prefix (types.h). A lookup probes, from
 * the longest prefix to the shortest, only the lengths that occur in this
 * policy, so its cost is that of the policy's shape and not of its size:
 *
 *      length   24 (proto, port)  23..9 (ranges)  8 (proto)  0 (all)
 *   with id      (1)                (3)             (5)       (7)
 *   any peer     (2)                (4)             (6)       (8)
 *
 * The first hit decides, unless some row of the policy denies: then all are
 * looked at, and a deny wins wherever it stands.
 */
#ifndef CILIA_POLICY_H
#define CILIA_POLICY_H

#include "events.h"
#include "ipcache.h"

struct judgement {
	__u32 remote_id;   /* in */
	__u8 egress;       /* in: 1, or 0 for ingress; or POLICY_QUIET */
	__u8 proto;        /* in */
	__be16 dport_be;   /* in; ICMP: the type */
	__u32 rule_id;     /* out */
	__u8 match_type;   /* out: MATCH_* */
	__u8 row_flags;    /* out: POLICY_F_* */
	__be16 proxy_port_be; /* out; 0: directly */
};

static __always_inline struct policy_meta *policy_meta(const struct end *ep)
{
	__u32 slot = ep->policy_slot;

	return bpf_map_lookup_elem(&cilia_policy_meta, &slot);
}

static __always_inline __u8 policy_match_type(__u32 l4_plen, bool any_peer)
{
	if (!l4_plen)
		return any_peer ? MATCH_ALL : MATCH_L3;
	if (l4_plen == 8)
		return any_peer ? MATCH_PROTO : MATCH_L3_PROTO;
	return any_peer ? MATCH_L4 : MATCH_L3_L4;
}

static __always_inline struct policy_value *policy_probe(void *rows, __u32 identity, __u32 plen,
							 __u32 egress, __u32 proto, __u32 port)
{
	struct policy_key key = { .identity = identity, .l4_plen = plen, .egress = egress };

	if (plen)
		key.proto = proto;
	if (plen > 8)
		key.dport_be = bpf_htons(port & (0xffff0000u >> (plen - 8)));
	return bpf_map_lookup_elem(rows, &key);
}

/* Or'd to the direction: this is a question of an auditor, and leaves no trace in the row. */
#define POLICY_QUIET 2

#define POLICY_HIT (1ULL << 44)

/*
 * Returns 0 (no row), or proxy port << 48 | POLICY_HIT | row flags << 40 | any peer << 39 |
 * l4_plen << 32 | rule.
 *
 * A global function of scalars: the verifier looks at it once, not once for
 * each caller and each state they may be in.
 */
__noinline __u64 policy_lookup(__u32 slot, __u32 egress, __u32 identity, __u32 proto, __u32 port)
{
	struct policy_meta *meta = bpf_map_lookup_elem(&cilia_policy_meta, &slot);
	void *rows = bpf_map_lookup_elem(&cilia_policy, &slot);
	__u32 plens_id, plens_any, best_plen = 0, any, i;
	struct policy_value *best = NULL, *row;
	__u32 best_any = 0;
	bool has_deny, quiet = egress & POLICY_QUIET;

	if (!rows || !meta)
		return 0;
	egress &= 1;
	plens_id = egress ? meta->plens_id[1] : meta->plens_id[0];
	plens_any = egress ? meta->plens_any[1] : meta->plens_any[0];
	has_deny = (plens_id | plens_any) & POLICY_META_HAS_DENY;

	for (i = 0; i < 18; i++) {
		__u32 plen = i == 17 ? 0 : 24 - i;

		for (any = 0; any < 2; any++) {
			if (!((any ? plens_any : plens_id) & (1u << plen)))
				continue;
			row = policy_probe(rows, any ? 0 : identity, plen, egress, proto, port);
			if (!row || (best && !(row->flags & POLICY_F_DENY)))
				continue;
			best = row;
			best_plen = plen;
			best_any = any;
			if (!has_deny || (row->flags & POLICY_F_DENY))
				goto found;
		}
	}
	if (!best)
		return 0;
found:
	if (!quiet)
		__sync_fetch_and_add(&best->hits, 1);
	/* The match type is left to the caller: a branch here would multiply states. */
	return (__u64)best->proxy_port_be << 48 | POLICY_HIT | (__u64)(best->flags & 0xf) << 40 |
	       (__u64)best_any << 39 | (__u64)best_plen << 32 | best->rule_id;
}

/*
 * Returns 0 (allowed), -DROP_POLICY (no row), -DROP_POLICY_DENY or -DROP_PROXY_PROTO. With
 * POLICY_F_AUDIT in row_flags that is what policy would do, if all of it were enforced: to be
 * reported only.
 */
static __always_inline int policy_allows(const struct end *ep, struct judgement *j)
{
	__u64 found = policy_lookup(ep->policy_slot, j->egress, j->remote_id, j->proto,
				    bpf_ntohs(j->dport_be));

	if (!found)
		return -DROP_POLICY;
	j->rule_id = found;
	j->match_type = policy_match_type((found >> 32) & 0x7f, found >> 39 & 1);
	j->row_flags = (found >> 40) & 0xf;
	if (j->row_flags & POLICY_F_AUDIT)
		return j->rule_id ? -DROP_POLICY_DENY : -DROP_POLICY;
	if (j->row_flags & POLICY_F_DENY)
		return -DROP_POLICY_DENY;
	j->proxy_port_be = found >> 48;
	/* No proxy takes anything else, and to pass it by would not be what the rules say. */
	return j->proxy_port_be && j->proto != PROTO_TCP ? -DROP_PROXY_PROTO : 0;
}

static __always_inline void policy_notify(struct __sk_buff *ctx, const struct judgement *j,
					  int denied, __u8 flags)
{
	__u8 direction = j->egress ? DIR_EGRESS : DIR_INGRESS;

	notify(ctx, NOTICE(EVENT_VERDICT, -denied, 0, direction),
	       flags & EVENT_F_AUDITED ? 0 : denied ?: bpf_ntohs(j->proxy_port_be),
	       NOTICE_MATCH(j->match_type, flags));
}

#endif /* CILIA_POLICY_H */
