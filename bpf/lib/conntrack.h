/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connections, and what was decided about them.
 *
 * One entry serves both directions. Its two sides hold what the initiator's
 * egress policy and the responder's ingress policy said, with the revision and
 * the ipcache epoch they said it under. While both are current a packet needs
 * neither an identity nor a policy lookup; when one is not, the next packet of
 * either direction has it judged again, so what is revoked is cut at once (and
 * its entry stays, so that what follows is known to belong to it):
 *
 *      initiator ----packet----> responder        initiator <---packet---- responder
 *        side[0] current? side[1] current?          side[0] current? side[1] current?
 *
 * Only a side whose end is a local endpoint is ever judged. A connection that is
 * redirected to a proxy is one entry here, that of the initiator with the proxy
 * (proxy.h); the proxy's own, with the responder, is another, which no side judges.
 */
#ifndef CILIA_CONNTRACK_H
#define CILIA_CONNTRACK_H

#include "host.h"
#include "parse.h"
#include "policy.h"
#include "proxy.h"
#include "time.h"

#define CT_FROM_LO (1u << 0) /* the packet was sent by the lo end */
#define CT_REPLACE (1u << 1) /* an entry exists, and this packet begins anew */

#define CT_NOT_OURS 1 /* neither an endpoint's nor the node's: of from_netdev only */

/* May it belong to a connection? ICMP but for echoes does not, nor what has no ports. */
static __always_inline bool packet_is_trackable(const struct packet *p)
{
	return packet_is_icmp(p) ? p->flags & PKT_ECHO : l4_header_len(p);
}

/* Returns true when the sender of the packet is the lo end. */
static __always_inline bool ct_key_of(struct ct_key *key, const struct packet *p)
{
	__u64 s0 = bpf_be64_to_cpu(p->saddr.d[0]), d0 = bpf_be64_to_cpu(p->daddr.d[0]);
	__u64 s1 = bpf_be64_to_cpu(p->saddr.d[1]), d1 = bpf_be64_to_cpu(p->daddr.d[1]);
	bool from_lo = s0 != d0 ? s0 < d0 :
		       s1 != d1 ? s1 < d1 :
				  bpf_ntohs(p->sport_be) <= bpf_ntohs(p->dport_be);

	if (from_lo) {
		addr_copy(&key->lo, &p->saddr);
		addr_copy(&key->hi, &p->daddr);
		key->lo_port_be = p->sport_be;
		key->hi_port_be = p->dport_be;
	} else {
		addr_copy(&key->lo, &p->daddr);
		addr_copy(&key->hi, &p->saddr);
		key->lo_port_be = p->dport_be;
		key->hi_port_be = p->sport_be;
	}
	key->proto = p->proto;
	key->scope = packet_is_trackable(p) ? 0 : CT_SCOPE_NONE;
	key->pad = 0;
	return from_lo;
}

static __always_inline bool ct_is_reply(const struct ct_entry *e, bool from_lo)
{
	return from_lo != !!(e->flags & CT_F_INIT_LO);
}

/* ---- lifetimes ---- */

static __always_inline bool ct_is_closed(const struct ct_entry *e)
{
	return e->seen[0] & e->seen[1] & CT_SEEN_CLOSING;
}

/*
 * A connection of which only SYN (and SYN-ACK) were seen retires early. The
 * values are the kernel side's own fields of cilia_runtime.
 */
static __always_inline __u32 ct_lifetime_s(const struct ct_entry *e, __u8 proto)
{
	const struct runtime *rt = runtime();

	if (!rt)
		return 0;
	if (proto != PROTO_TCP)
		return rt->ct_any_s;
	if (ct_is_closed(e))
		return rt->ct_tcp_fin_s;
	return (e->seen[0] | e->seen[1]) & CT_SEEN_NON_SYN ? rt->ct_tcp_s : rt->ct_tcp_syn_s;
}

static __always_inline __u8 ct_seen(const struct packet *p)
{
	return (p->tcp_flags & TCP_SYN ? 0 : CT_SEEN_NON_SYN) |
	       (p->tcp_flags & (TCP_FIN | TCP_RST) ? CT_SEEN_CLOSING : 0);
}

#define TCP_REPORTED (TCP_SYN | TCP_FIN | TCP_RST)

/* Is this packet worth a trace event? Remember that it was. */
static __always_inline bool ct_report(const struct packet *p, const struct flow *f,
				      struct ct_entry *e)
{
	__u8 flags = p->tcp_flags & TCP_REPORTED;
	__u32 i = f->reply & 1;

	if (f->aggregation >= AGGREGATE_MEDIUM && !(flags & (TCP_FIN | TCP_RST)) &&
	    !(flags & ~e->report_flags[i]) &&
	    p->now_s - e->last_report_s[i] < f->report_interval_s)
		return false;
	e->report_flags[i] |= flags;
	e->last_report_s[i] = p->now_s;
	return true;
}

/*
 * Account for a packet that passes. Each direction writes its own fields with
 * plain stores: a direction is on one CPU, or may lose a count.
 */
static __always_inline void ct_update(const struct packet *p, struct flow *f, struct ct_entry *e)
{
	__u32 i = f->reply & 1, expires_s;
	bool was_closed = ct_is_closed(e);

	e->packets[i]++;
	e->bytes[i] += p->len;
	if (p->proto == PROTO_TCP) {
		__u8 seen = e->seen[i] | ct_seen(p);

		if (seen != e->seen[i])
			e->seen[i] = seen;
	}
	if (!was_closed) {
		expires_s = p->now_s + ct_lifetime_s(e, p->proto);
		if (e->expires_s != expires_s)
			e->expires_s = expires_s;
	}
	f->report = ct_report(p, f, e);
}

/* ---- judging ---- */

/* One half of a side, as it is written: what was admitted under which revision. */
struct admitted {
	__u32 policy_rev, remote_id;
} __attribute__((aligned(8)));

static __always_inline void ct_side_set(struct ct_side *side, __u32 policy_rev, __u32 remote_id,
					__u32 epoch, __u32 rule_id)
{
	struct admitted admitted = { policy_rev, remote_id };

	side->rule_id = rule_id;
	*(volatile __u64 *)&side->policy_rev = *(__u64 *)&admitted;
	*(volatile __u32 *)&side->epoch = epoch;
}

/* Some address changed its identity, but neither the one admitted nor the policy did. */
static __always_inline bool ct_side_still_admits(const struct ct_side *side, const struct end *ep,
						 __u32 remote_id)
{
	const struct policy_meta *meta = policy_meta(ep);
	struct admitted now = { meta ? meta->rev : 0, remote_id };

	return now.policy_rev && *(volatile __u64 *)&side->policy_rev == *(__u64 *)&now;
}

/* What the policy is asked about: where the initiator's first packet went. */
static __always_inline __be16 policy_port(const struct packet *p, bool reply)
{
	if (!packet_is_icmp(p))
		return reply ? p->sport_be : p->dport_be;
	/* The other direction of a tracked ICMP exchange is an echo reply. */
	if (reply)
		return bpf_htons(packet_is_ip6(p) ? ICMP6_ECHO : ICMP4_ECHO);
	return bpf_htons(p->icmp_type);
}

/* An error is asked about by its type, unless it belongs to a connection. */
static __always_inline bool is_path_mtu(const struct packet *p)
{
	if (!(p->flags & PKT_ERROR))
		return false;
	return packet_is_ip6(p) ? p->icmp_type == ICMP6_TOO_BIG :
				  p->icmp_type == ICMP4_UNREACHABLE &&
					  p->icmp_code == ICMP4_FRAG_NEEDED;
}

#define AUDITED 1 /* denied, but only reported */

/* Ask ep's policy. Returns 0, AUDITED, or a negative drop reason. */
static __always_inline int judge(const struct end *ep, struct flow *f, struct judgement *j,
				 int *denied)
{
	const struct policy_meta *meta = policy_meta(ep);

	/* The revision before the rows: rows may be newer than it, never older. */
	f->policy_rev = meta ? *(volatile __u32 *)&meta->rev : 0;
	f->rule_id = 0;
	*denied = 0;
	if (!end_is_open(ep) || !f->policy_rev)
		return -DROP_NOT_OPEN;
	*denied = policy_allows(ep, j);
	f->rule_id = j->rule_id;
	if (*denied && ((ep->flags & EP_F_AUDIT) || (j->row_flags & POLICY_F_AUDIT)))
		return AUDITED;
	return *denied;
}

/* Judge one side of a new connection, tell observers, and record it in work()->entry. */
__noinline int ct_judge_new(struct __sk_buff *ctx, bool egress)
{
	struct work *w = work();
	struct judgement j = {};
	const struct end *ep;
	int ret, denied;

	if (!w)
		return -DROP_INVALID;
	ep = egress ? &w->f.src : &w->f.dst;
	if (!end_is_local(ep))
		return 0;
	j.remote_id = egress ? w->f.dst_id : w->f.src_id;
	j.egress = egress;
	j.proto = w->p.proto;
	j.dport_be = policy_port(&w->p, false);
	w->f.direction = egress ? DIR_EGRESS : DIR_INGRESS;

	ret = judge(ep, &w->f, &j, &denied);
	if (ret == -DROP_NOT_OPEN)
		return ret;
	/*
	 * Path MTU discovery must work whatever policy says, unless told otherwise. It is
	 * routers that speak of it; an endpoint could say it about anybody's connections.
	 */
	if (denied && is_path_mtu(&w->p) && w->f.origin != ORIGIN_ENDPOINT &&
	    (w->f.rt_flags & RT_F_ALLOW_FRAG_NEEDED)) {
		w->f.rule_id = 0;
		return 0;
	}
	if (ret == AUDITED)
		count(REASON_AUDITED, w->f.direction, w->p.len);
	policy_notify(ctx, &j, denied, ret == AUDITED ? EVENT_F_AUDITED : 0);
	if (ret < 0)
		return ret;
	ct_side_set(egress ? &w->entry.side[0] : &w->entry.side[1], w->f.policy_rev, j.remote_id,
		    w->f.epoch, j.rule_id);
	if (!denied) {
		if (egress)
			w->entry.proxy_port_be = j.proxy_port_be;
		else
			w->entry.proxy_port1_be = j.proxy_port_be;
		if (j.proxy_port_be && (j.row_flags & POLICY_F_WATCH))
			w->f.watched |= egress ? 1 : 2;
	}
	return 0;
}

/*
 * Which proxy gets the connection that work()->entry is made for? One that only
 * looks on is done without where it is not there, and where its listener is not
 * the other end's as well.
 */
static __always_inline int ct_choose_proxy(struct __sk_buff *ctx, struct work *w)
{
	struct ct_entry *e = &w->entry;
	struct flow *f = &w->f;
	int ret = proxy_choose(e->proxy_port_be, e->proxy_port1_be, &f->proxy_port_be);

	if (likely(!f->watched))
		return ret;
	if (ret) {
		if (f->watched & 1)
			e->proxy_port_be = 0;
		else
			e->proxy_port1_be = 0;
		f->proxy_port_be = e->proxy_port_be ?: e->proxy_port1_be;
	}
	if ((e->proxy_port_be && !(f->watched & 1)) || (e->proxy_port1_be && !(f->watched & 2)) ||
	    proxy_takes(ctx, bpf_ntohs(f->proxy_port_be)))
		return 0;
	e->proxy_port_be = e->proxy_port1_be = f->proxy_port_be = 0;
	return 0;
}

static __always_inline int ct_create(struct work *w, __u32 how)
{
	const struct packet *p = &w->p;
	struct ct_entry *e = &w->entry;
	long err;

	e->flags = (how & CT_FROM_LO ? CT_F_INIT_LO : 0) |
		   (e->proxy_port_be || e->proxy_port1_be ? CT_F_PROXY : 0) |
		   (w->f.from_proxy ? CT_F_FROM_PROXY : 0) |
		   (w->f.origin == ORIGIN_HOST ? CT_F_FROM_HOST : 0) |
		   (w->f.origin == ORIGIN_OUTSIDE ? CT_F_OUTSIDE : 0) |
		   (w->f.dst_id == ID_HOST ? CT_F_TO_HOST : 0) | (w->f.exempt ? CT_F_EXEMPT : 0);
	e->packets[0] = 1;
	e->bytes[0] = p->len;
	e->seen[0] = p->proto == PROTO_TCP ? ct_seen(p) : 0;
	e->report_flags[0] = p->tcp_flags & TCP_REPORTED;
	e->last_report_s[0] = p->now_s;
	e->expires_s = p->now_s + ct_lifetime_s(e, p->proto);
	err = bpf_map_update_elem(&cilia_ct, &w->key, e, how & CT_REPLACE ? BPF_ANY : BPF_NOEXIST);
	/* Another CPU was first with the same connection: as good. */
	if (err && err != -EEXIST)
		return -DROP_CT_INSERT;
	w->f.tracked = true;
	return 0;
}

/* Is the policy of those ends in force that are local? */
static __always_inline bool flow_is_open(const struct flow *f)
{
	const struct end *ep = end_is_local(&f->dst) ? &f->dst : &f->src;
	const struct policy_meta *meta = policy_meta(ep);

	return end_is_open(ep) && meta && meta->rev;
}

/*
 * The proxy connects to an endpoint, on behalf of somebody whose own connection
 * is judged where it comes in. It does so from an address of the node's: what it
 * sends with another is an answer of a connection that is not known any more.
 */
static __always_inline int ct_admit_proxy(struct __sk_buff *ctx, struct work *w, __u32 how)
{
	if (end_is_local(&w->f.src) || identity_of_destination(&w->p.saddr) != ID_HOST ||
	    !sent_to_destination(ctx, &w->p))
		return -DROP_NOT_PROXY;
	if (!flow_is_open(&w->f))
		return -DROP_NOT_OPEN;
	memset(&w->entry, 0, sizeof(w->entry));
	w->entry.side[1].remote_id = ID_HOST;
	return ct_create(w, how);
}

/*
 * Whose are the ends that no endpoint has? The node's, if it is a subject of
 * policy. Returns 0, CT_NOT_OURS for what a device received and the kernel will
 * forward, or a drop reason.
 */
static __always_inline int host_admit(struct __sk_buff *ctx, const struct packet *p, struct flow *f)
{
	if (f->received && !end_is_local(&f->dst) && !is_for_node(ctx))
		return CT_NOT_OURS;
	/* The node's addresses, as endpoints', exist only on this side of the device. */
	if (f->received && identity_of_destination(&p->saddr) == ID_HOST)
		return -DROP_SOURCE_IP;
	flow_identities(p, f);
	if (f->received && !end_is_local(&f->dst))
		f->dst_id = ID_HOST;
	if (f->origin == ORIGIN_HOST) {
		f->exempt = is_from_proxy(ctx) || is_control_port(p, true);
		if (!f->exempt)
			end_set_host(&f->src);
	}
	if (f->dst_id == ID_HOST) {
		f->exempt = is_control_port(p, false);
		if (!f->exempt)
			end_set_host(&f->dst);
	}
	return 0;
}

/*
 * The proxy connects to wherever its client meant to, as the node. By a name of
 * the node that policy does not know as the node's (127.0.0.1 with route_localnet,
 * a local route to a prefix) that would be one of its services; directly such a
 * packet finds no route either.
 */
static __always_inline bool proxy_would_stay(struct __sk_buff *ctx, const struct flow *f)
{
	return f->origin == ORIGIN_ENDPOINT && !end_is_local(&f->dst) && f->dst_id != ID_HOST &&
	       is_for_node(ctx);
}

/*
 * A packet that belongs to no connection: judged at every local end; if all
 * allow, an entry is made for what can be a connection.
 */
__noinline int ct_admit(struct __sk_buff *ctx, __u32 how)
{
	struct work *w = work();
	struct packet *p;
	struct flow *f;
	bool track;
	int ret;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	f = &w->f;
	/* The answer to a masqueraded packet belongs to a connection, or to nobody. */
	if (f->answer)
		return -DROP_NAT_NO_PORT;
	f->state = CT_NEW;
	f->reply = 0;
	f->report = 1;
	ret = host_admit(ctx, p, f);
	if (ret)
		return ret;
	track = packet_is_trackable(p);
	if (p->proto == PROTO_TCP) {
		if ((p->tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
			return -DROP_CT_CREATE;
		/* The end of something we do not know: nothing to remember. */
		if (p->tcp_flags & (TCP_RST | TCP_FIN))
			track = false;
	} else if (packet_is_icmp(p)) {
		track = packet_is_echo_request(p);
	}
	if (unlikely(f->from_proxy) && p->proto == PROTO_TCP)
		return ct_admit_proxy(ctx, w, how);
	memset(&w->entry, 0, sizeof(w->entry));
	ret = ct_judge_new(ctx, true);
	if (ret)
		return ret;
	ret = ct_judge_new(ctx, false);
	if (ret)
		return ret;
	ret = ct_choose_proxy(ctx, w);
	if (ret)
		return ret;
	if (unlikely(f->proxy_port_be) && proxy_would_stay(ctx, f))
		return -DROP_FIB;
	return track ? ct_create(w, how) : 0;
}

/*
 * Judged again, a side names another proxy than when the connection began. One
 * end of TCP is where it is: it cannot move. But one that policy would let pass
 * directly now, or only wants to be seen, may go on where it is, if that is this
 * side's doing alone, or the other's proxy looks on as well: a row that names a
 * proxy and is of no rule.
 */
static __always_inline bool ct_may_stay(const struct ct_entry *e, __u32 which, __be16 now_be,
					bool watched)
{
	__be16 began_be = which & 1 ? e->proxy_port1_be : e->proxy_port_be;
	__be16 other_be = which & 1 ? e->proxy_port_be : e->proxy_port1_be;
	__u32 others_rule = which & 1 ? e->side[0].rule_id : e->side[1].rule_id;

	if (now_be == began_be)
		return true;
	return (!now_be || watched) && (!began_be || !other_be || !others_rule);
}

/*
 * A side is not current: ask again whether the connection would be admitted.
 * which is 0 for the initiator's egress, 1 for the responder's ingress. The
 * packet is p, or the one that the ICMP error p quotes: that goes the other way.
 */
__noinline int ct_rejudge(struct __sk_buff *ctx, __u32 which, bool quoted)
{
	struct work *w = work();
	struct judgement j = {};
	const struct packet *p;
	const union addr *remote_addr;
	const struct end *ep, *remote;
	struct ct_side *side;
	struct ct_entry *e;
	bool judged_sends;
	int ret, denied;

	if (!w)
		return -DROP_INVALID;
	e = bpf_map_lookup_elem(&cilia_ct, &w->key);
	if (!e)
		return -DROP_POLICY;
	p = quoted ? &w->quoted : &w->p;
	/* side[0] is the initiator's: the sender's, unless this is a reply. */
	judged_sends = w->f.reply == (which & 1);
	ep = judged_sends != quoted ? &w->f.src : &w->f.dst;
	remote = judged_sends != quoted ? &w->f.dst : &w->f.src;
	remote_addr = judged_sends ? &p->daddr : &p->saddr;
	side = which & 1 ? &e->side[1] : &e->side[0];

	j.egress = !(which & 1);
	j.proto = p->proto;
	j.dport_be = policy_port(p, w->f.reply);
	if (end_is_local(remote))
		j.remote_id = remote->identity;
	else if (j.egress)
		j.remote_id = identity_of_destination(remote_addr);
	else if (e->flags & CT_F_FROM_HOST)
		j.remote_id = ID_HOST;
	else
		j.remote_id = identity_of_outsider(remote_addr);
	w->f.remote_id = j.remote_id;
	w->f.direction = j.egress ? DIR_EGRESS : DIR_INGRESS;
	w->f.about = ep == &w->f.src ? ABOUT_SRC : ABOUT_DST;

	if (end_is_open(ep) && ct_side_still_admits(side, ep, j.remote_id)) {
		*(volatile __u32 *)&side->epoch = w->f.epoch;
		w->f.about = ABOUT_DIRECTION;
		return 0;
	}
	ret = judge(ep, &w->f, &j, &denied);
	if (ret == -DROP_NOT_OPEN)
		return ret;
	if (ret >= 0 && p->proto == PROTO_TCP &&
	    !ct_may_stay(e, which, denied ? 0 : j.proxy_port_be, j.row_flags & POLICY_F_WATCH))
		ret = denied = -DROP_PROXY_OTHER;
	if (ret == AUDITED)
		count(REASON_AUDITED, w->f.direction, w->p.len);
	if (ret)
		policy_notify(ctx, &j, denied, (ret == AUDITED ? EVENT_F_AUDITED : 0) | EVENT_F_REJUDGED);
	if (ret >= 0) {
		ct_side_set(side, w->f.policy_rev, j.remote_id, w->f.epoch, j.rule_id);
		w->f.about = ABOUT_DIRECTION;
		return 0;
	}
	/*
	 * The entry stays, admitted by nobody: what is still under way belongs to
	 * the revoked connection. Without it the responder's next packet would
	 * begin a connection of its own, which its egress policy may well allow.
	 * So only the responder keeps it from expiring.
	 */
	if (w->f.reply && !quoted)
		e->expires_s = p->now_s + ct_lifetime_s(e, p->proto);
	return ret;
}

static __always_inline bool ct_side_is_current(const struct ct_side *side, const struct end *ep,
					       __u32 epoch)
{
	const struct policy_meta *meta;

	if (!end_is_local(ep))
		return true;
	meta = policy_meta(ep);
	return end_is_open(ep) && meta && meta->rev && side->policy_rev == meta->rev &&
	       side->epoch == epoch;
}

/* Do all local ends of the connection still admit it? */
static __always_inline int ct_check(struct __sk_buff *ctx, const struct flow *f,
				    const struct ct_entry *e, bool quoted)
{
	const struct end *sender = quoted ? &f->dst : &f->src, *receiver = quoted ? &f->src : &f->dst;
	const struct ct_side *senders = f->reply ? &e->side[1] : &e->side[0];
	const struct ct_side *receivers = f->reply ? &e->side[0] : &e->side[1];
	int ret = 0;

	if (unlikely(e->flags & CT_F_FROM_PROXY))
		return flow_is_open(f) ? 0 : -DROP_NOT_OPEN;
	if (unlikely(!ct_side_is_current(senders, sender, f->epoch)))
		ret = ct_rejudge(ctx, f->reply, quoted);
	if (!ret && unlikely(!ct_side_is_current(receivers, receiver, f->epoch)))
		ret = ct_rejudge(ctx, !f->reply, quoted);
	return ret;
}

/*
 * The ends of a connection that are the node's, if its policy is in force. The
 * packet that the entry is about is ours, or the one that our ICMP error quotes.
 */
static __always_inline void ct_host_ends(struct flow *f, const struct ct_entry *e, bool quoted)
{
	bool from_initiator = f->reply == quoted;

	if (likely(!(e->flags & (CT_F_FROM_HOST | CT_F_TO_HOST))) || (e->flags & CT_F_EXEMPT))
		return;
	if (e->flags & CT_F_FROM_HOST)
		end_set_host(from_initiator ? &f->src : &f->dst);
	if (e->flags & CT_F_TO_HOST)
		end_set_host(from_initiator ? &f->dst : &f->src);
}

/*
 * Does a packet that matches an entry begin a connection of its own? A SYN does
 * when the old connection is closing, or when the responder sends it: the entry
 * admits its answers, and a SYN is none. Nor is an echo request. Nor has one
 * that the proxy never answered begun: the next attempt may find another there.
 */
static __always_inline bool ct_begins_anew(const struct packet *p, const struct flow *f,
					   const struct ct_entry *e)
{
	if (p->proto == PROTO_TCP)
		return packet_is_syn(p) &&
		       (f->reply || ((e->seen[0] | e->seen[1]) & CT_SEEN_CLOSING) ||
			((e->flags & CT_F_PROXY) && !e->packets[1]));
	if (p->flags & PKT_ECHO)
		return packet_is_echo_request(p) == f->reply;
	return false;
}

/*
 * From outside, somebody pretends to be an end that is not outside: the entry
 * was made by, or for, this node's own stack.
 */
static __always_inline bool ct_is_spoofed(const struct flow *f, const struct ct_entry *e)
{
	if (f->origin != ORIGIN_OUTSIDE)
		return false;
	return f->reply ? e->flags & CT_F_TO_HOST : !(e->flags & CT_F_OUTSIDE);
}

#define CT_BEGINS_ANEW 1

/*
 * On either leg of a redirected connection one end is the proxy: what the proxy
 * does not send is not that end's. Returns 0, with f->proxy_port_be set for what
 * goes to the proxy, CT_BEGINS_ANEW, or a drop reason.
 */
static __always_inline int ct_proxied(const struct packet *p, struct flow *f,
				      const struct ct_entry *e)
{
	bool fits;

	if (e->flags & CT_F_FROM_PROXY) {
		/* The kernel's own reset of a connection whose socket is gone has no mark. */
		fits = f->reply ? f->origin == ORIGIN_ENDPOINT :
				  f->from_proxy || (f->origin == ORIGIN_HOST && (p->tcp_flags & TCP_RST));
	} else if (e->flags & CT_F_PROXY) {
		fits = f->reply ? f->origin == ORIGIN_HOST : !f->from_proxy;
	} else {
		fits = !f->from_proxy;
	}
	if (!fits)
		return packet_is_syn(p) ? CT_BEGINS_ANEW : -DROP_NOT_PROXY;
	if (f->reply || !(e->flags & CT_F_PROXY))
		return 0;
	return proxy_choose(e->proxy_port_be, e->proxy_port1_be, &f->proxy_port_be);
}

/* The same for an ICMP error about a packet of the connection; f->reply is that packet's. */
static __always_inline int ct_proxied_error(struct flow *f, const struct ct_entry *e)
{
	if (!(e->flags & CT_F_PROXY))
		return 0;
	/* What the initiator sent has reached nobody but the proxy. */
	if (!f->reply)
		return f->origin == ORIGIN_HOST ? 0 : -DROP_NOT_PROXY;
	return proxy_choose(e->proxy_port_be, e->proxy_port1_be, &f->proxy_port_be);
}

/*
 * An ICMP error concerns the connection of the packet that it quotes. Returns 1
 * when it does and the connection is still allowed, 0 when it is to be judged as
 * plain ICMP, or a drop reason.
 */
__noinline int ct_related(struct __sk_buff *ctx)
{
	struct work *w = work();
	struct packet *p, *q;
	struct ct_entry *e;
	struct flow *f;
	bool from_lo;
	int ret;

	if (!w || !parse_quoted(ctx))
		return 0;
	p = &w->p;
	q = &w->quoted;
	f = &w->f;
	/* It goes to whoever sent the quoted packet; an endpoint complains only of what it got. */
	if (!addr_equal(&q->saddr, &p->daddr) ||
	    (end_is_local(&f->src) && !addr_equal(&q->daddr, &p->saddr)))
		return 0;
	from_lo = ct_key_of(&w->key, q);
	e = bpf_map_lookup_elem(&cilia_ct, &w->key);
	if (!e || e->expires_s < p->now_s)
		return 0;
	/* Nobody outside has seen a packet between two local ends. */
	if (f->origin == ORIGIN_OUTSIDE &&
	    (endpoint_by_addr(&q->daddr) || identity_of_destination(&q->daddr) == ID_HOST))
		return 0;
	if (f->received && identity_of_destination(&p->saddr) == ID_HOST)
		return -DROP_SOURCE_IP;

	f->reply = ct_is_reply(e, from_lo);
	ct_host_ends(f, e, true);
	ret = ct_proxied_error(f, e);
	if (!ret)
		ret = ct_check(ctx, f, e, true);
	f->reply = !f->reply;
	flow_identities(p, f);
	if (ret)
		return ret;
	f->state = CT_RELATED;
	f->report = 1;
	return 1;
}

/* Returns 0 when the packet may pass, with f->state set, CT_NOT_OURS, or a drop reason. */
static __always_inline int ct_track(struct __sk_buff *ctx, struct work *w)
{
	struct packet *p = &w->p;
	struct flow *f = &w->f;
	struct ct_entry *e;
	__u32 how;
	int ret;

	if (unlikely(p->flags & PKT_ERROR)) {
		ret = ct_related(ctx);
		if (ret)
			return ret < 0 ? ret : 0;
	}
	how = ct_key_of(&w->key, p) ? CT_FROM_LO : 0;
	e = bpf_map_lookup_elem(&cilia_ct, &w->key);
	if (unlikely(!e))
		return ct_admit(ctx, how);
	if (unlikely(e->expires_s < p->now_s))
		return ct_admit(ctx, how | CT_REPLACE);
	f->reply = ct_is_reply(e, how & CT_FROM_LO);
	if (unlikely(ct_begins_anew(p, f, e)))
		return ct_admit(ctx, how | CT_REPLACE);
	if (unlikely(ct_is_spoofed(f, e)))
		return -DROP_SOURCE_IP;
	if (unlikely((e->flags & (CT_F_PROXY | CT_F_FROM_PROXY)) || f->from_proxy)) {
		ret = ct_proxied(p, f, e);
		if (ret == CT_BEGINS_ANEW)
			return ct_admit(ctx, how | CT_REPLACE);
		if (ret)
			return ret;
	}
	f->state = f->reply ? CT_REPLY : CT_ESTABLISHED;
	ct_host_ends(f, e, false);
	ret = ct_check(ctx, f, e, false);
	/* It can only be made anew, and this may be the attempt. */
	if (unlikely(ret == -DROP_PROXY_OTHER) && !f->reply && packet_is_syn(p))
		return ct_admit(ctx, how | CT_REPLACE);
	if (unlikely(ret))
		return ret;
	ct_update(p, f, e);
	f->tracked = true;
	f->remote_id = end_is_local(&f->src) == f->reply ? e->side[1].remote_id :
							   e->side[0].remote_id;
	return 0;
}


#endif /* CILIA_CONNTRACK_H */
