/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Counters and the event ring: metrics are exact, events are what observers
 * asked for, and what could not be written is counted in cilia_lost.
 */
#ifndef CILIA_EVENTS_H
#define CILIA_EVENTS_H

#include "eps.h"

static __always_inline void count(__u8 reason, __u8 direction, __u32 bytes)
{
	__u32 index = (__u32)reason << 2 | (direction & 3);
	struct metric *m = bpf_map_lookup_elem(&cilia_metrics, &index);

	if (m) {
		m->packets++;
		m->bytes += bytes;
	}
}

/*
 * What an event says beyond the packet and the flow, packed to be an argument.
 */
#define NOTICE(type, reason, obs_point, direction) \
	((__u32)(type) << 24 | (__u32)(reason) << 16 | (obs_point) << 8 | (direction))
#define NOTICE_MATCH(match_type, flags) ((match_type) << 8 | (flags))

/* An identity as it is known: asked for, the local end's, or what conntrack admitted. */
static __always_inline __u32 flow_identity(const struct flow *f, __u32 id, const struct end *end)
{
	return id ?: end_is_local(end) ? end->identity : f->remote_id;
}

static __always_inline void fill_event(struct __sk_buff *ctx, struct event *e,
				       const struct packet *p, const struct flow *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	e->time_ns = bpf_ktime_get_ns();
	addr_copy(&e->saddr, &p->saddr);
	addr_copy(&e->daddr, &p->daddr);
	e->src_identity = flow_identity(f, f->src_id, &f->src);
	e->dst_identity = flow_identity(f, f->dst_id, &f->dst);
	e->rule_id = f->rule_id;
	e->policy_rev = f->policy_rev;
	e->ifindex = ctx->ifindex;
	e->length = p->len;
	if (p->proto == PROTO_ICMP || p->proto == PROTO_ICMPV6) {
		e->sport_be = bpf_htons(p->icmp_type);
		e->dport_be = bpf_htons(p->icmp_code);
	} else {
		e->sport_be = p->sport_be;
		e->dport_be = p->dport_be;
	}
	e->proto = p->proto;
	e->tcp_flags = p->tcp_flags;
	e->flags = f->event_flags | (packet_is_ip6(p) ? EVENT_F_IPV6 : 0) |
		   (p->flags & PKT_FRAG ? EVENT_F_FRAGMENT : 0) | (f->reply ? EVENT_F_REPLY : 0) |
		   (f->state == CT_RELATED ? EVENT_F_RELATED : 0);
	if (data + ETH_HLEN <= end) {
		struct eth_header *eth = data;

		memcpy(e->smac, eth->smac, 6);
		memcpy(e->dmac, eth->dmac, 6);
	}
	e->cpu = bpf_get_smp_processor_id();
}

/* Write one event, or count it as lost. notice: NOTICE(), match: NOTICE_MATCH(). */
__noinline int notify(struct __sk_buff *ctx, __u32 notice, int verdict, __u32 match)
{
	__u32 zero = 0;
	__u64 *lost = bpf_map_lookup_elem(&cilia_lost, &zero);
	struct work *w = work();
	struct event *e;

	if (!w || !lost)
		return 0;
	e = bpf_ringbuf_reserve(&cilia_events, sizeof(*e), 0);
	if (!e) {
		(*lost)++;
		return 0;
	}
	memset(e, 0, sizeof(*e));
	fill_event(ctx, e, &w->p, &w->f);
	e->type = notice >> 24;
	e->reason = notice >> 16;
	e->obs_point = notice >> 8;
	e->direction = notice;
	e->verdict = verdict;
	e->match_type = match >> 8;
	e->flags |= match;
	if (w->f.about ? w->f.about == ABOUT_DST : e->direction == DIR_INGRESS) {
		e->ep_id = w->f.dst.id;
		e->peer_ep_id = w->f.src.id;
	} else {
		e->ep_id = w->f.src.id;
		e->peer_ep_id = w->f.dst.id;
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* The one place where a packet ends: counted once, reported once. */
__noinline int drop(struct __sk_buff *ctx, int reason)
{
	struct work *w = work();

	if (!w)
		return TC_ACT_SHOT;
	count(reason, w->f.direction, ctx->len);
	notify(ctx, NOTICE(EVENT_DROP, reason, 0, w->f.direction), -reason, 0);
	return TC_ACT_SHOT;
}

/* Something that is no drop, but ends here: no event, its own counter. */
static __always_inline int ignore(struct __sk_buff *ctx, __u8 direction)
{
	count(REASON_IGNORED, direction, ctx->len);
	return TC_ACT_SHOT;
}

#define AGGREGATE_NONE   0
#define AGGREGATE_LOWEST 1 /* no FROM_* events, except from the network */
#define AGGREGATE_LOW    2
#define AGGREGATE_MEDIUM 3 /* TO_* when conntrack has something new to say */

static __always_inline void trace(struct __sk_buff *ctx, const struct flow *f, __u8 obs_point,
				  __u8 direction)
{
	notify(ctx, NOTICE(EVENT_TRACE, f->state, obs_point, direction), 0, 0);
}

static __always_inline void trace_from(struct __sk_buff *ctx, const struct flow *f,
				       __u8 obs_point, __u8 direction)
{
	__u32 up_to = obs_point == TRACE_FROM_NETWORK ? AGGREGATE_LOW : AGGREGATE_NONE;

	if (unlikely(f->aggregation <= up_to))
		trace(ctx, f, obs_point, direction);
}

/* A packet goes on: counted always, reported as aggregation says. */
static __always_inline void passed(struct __sk_buff *ctx, const struct packet *p,
				   const struct flow *f, __u8 obs_point, __u8 direction)
{
	count(REASON_FORWARDED, direction, p->len);
	if (f->report)
		trace(ctx, f, obs_point, direction);
}

static __always_inline void forwarded(struct __sk_buff *ctx, const struct packet *p,
				      const struct flow *f, __u8 obs_point)
{
	passed(ctx, p, f, obs_point, obs_point == TRACE_TO_ENDPOINT ? DIR_INGRESS : DIR_EGRESS);
}

#endif /* CILIA_EVENTS_H */
