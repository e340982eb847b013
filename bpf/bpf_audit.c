// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Two programs that no packet ever meets: they are loaded, attached to nothing,
 * and run by BPF_PROG_TEST_RUN alone. They ask the maps in force with the code
 * that judges packets, so what they answer is what a packet would have met.
 *
 *   audit_policy     answers cells, and leaves no trace: no entry, event, counter
 *                    or hit
 *   audit_selftest   judges one cell aloud: where it is denied and only audited,
 *                    an event says so, as of a packet, marked EVENT_F_SELFTEST
 */
#include "lib/begin.h"
#include "lib/conntrack.h"

/*
 * Answer the cell at off, aloud if it is denied and only audited. Returns 0, or 1 when there is
 * none. A global function of scalars, so that the verifier looks at it once.
 */
__noinline int answer(struct __sk_buff *ctx, __u32 off, bool aloud)
{
	struct judgement j = {};
	struct work *w = work();
	struct audit_cell c;
	struct end ep = {};
	int ret, denied;

	if (!w || bpf_skb_load_bytes(ctx, off, &c, sizeof(c)) || !c.policy_slot)
		return 1;
	ep.ifindex = 1;
	ep.identity = c.identity;
	ep.policy_slot = c.policy_slot;
	ep.id = c.ep_id;
	ep.flags = c.ep_flags;
	j.remote_id = c.remote_id;
	j.egress = (c.egress & 1) | POLICY_QUIET;
	j.proto = c.proto;
	j.dport_be = c.dport_be;
	ret = judge(&ep, &w->f, &j, &denied);
	c.verdict = ret == AUDITED ? denied : ret ?: bpf_ntohs(j.proxy_port_be);
	c.rule_id = w->f.rule_id;
	c.policy_rev = w->f.policy_rev;
	c.match_type = j.match_type;
	c.row_flags = j.row_flags;
	c.audited = ret == AUDITED;
	c.answered = 1;
	if (aloud && ret == AUDITED) {
		w->p.proto = c.proto;
		w->p.dport_be = c.dport_be;
		j.egress = c.egress & 1;
		memcpy(j.egress ? &w->f.src : &w->f.dst, &ep, sizeof(ep));
		w->f.src_id = j.egress ? c.identity : c.remote_id;
		w->f.dst_id = j.egress ? c.remote_id : c.identity;
		policy_notify(ctx, &j, denied, EVENT_F_AUDITED | EVENT_F_SELFTEST);
	}
	return bpf_skb_store_bytes(ctx, off, &c, sizeof(c), 0) != 0;
}

SEC("tc")
int audit_policy(struct __sk_buff *ctx)
{
	__u32 i;

	if (!begin(ctx, ORIGIN_HOST, DIR_NONE))
		return TC_ACT_SHOT;
	for (i = 0; i < AUDIT_CELLS; i++) {
		if (answer(ctx, ETH_HLEN + i * sizeof(struct audit_cell), false))
			break;
	}
	return TC_ACT_SHOT;
}

SEC("tc")
int audit_selftest(struct __sk_buff *ctx)
{
	if (begin(ctx, ORIGIN_HOST, DIR_NONE))
		answer(ctx, ETH_HLEN, true);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
