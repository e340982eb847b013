/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerade, the way back: whose packet was it that this one answers? */
#ifndef CILIA_UNMASQUERADE_H
#define CILIA_UNMASQUERADE_H

#include "nat.h"

static __always_inline struct nat_value *nat_lookup(const struct nat_key *key, __u32 now_s)
{
	struct nat_value *value = bpf_map_lookup_elem(&cilia_nat, key);

	return value && value->expires_s >= now_s ? value : NULL;
}

/* The mapping of an ICMP error from outside, by the packet of ours that it quotes. */
static __always_inline int unmasquerade_error(struct __sk_buff *ctx, struct work *w)
{
	struct packet *q = &w->quoted;
	struct nat_value *value;
	__be16 port;
	int ret;

	if (!parse_quoted(ctx) || !addr_equal(&q->saddr, &w->p.daddr))
		return 0;
	addr_copy(&w->nat_key.remote, &q->daddr);
	addr_copy(&w->nat_key.local, &q->saddr);
	w->nat_key.remote_port_be = packet_is_icmp(q) ? 0 : q->dport_be;
	w->nat_key.local_port_be = q->sport_be;
	w->nat_key.proto = q->proto;
	value = nat_lookup(&w->nat_key, w->p.now_s);
	if (!value)
		return 0;
	addr_copy(&w->nat_addr, &value->addr);
	port = value->port_be;
	ret = rewrite_quoted(ctx, &w->p, q, true, &w->nat_addr, port);
	if (!ret)
		ret = rewrite_addr(ctx, &w->p, false, &w->nat_addr);
	if (ret)
		return ret;
	addr_copy(&w->p.daddr, &w->nat_addr);
	w->f.answer = true;
	return 1;
}

/*
 * A packet from outside to one of the node's addresses: is it an answer to a
 * masqueraded one? Returns 0 if not, 1 when packet and work()->p are rewritten,
 * or a drop reason.
 */
__noinline int unmasquerade(struct __sk_buff *ctx)
{
	struct work *w = work();
	struct nat_value *value;
	struct packet *p;
	__be16 port;
	int ret;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	memset(&w->nat_key, 0, sizeof(w->nat_key));
	if (p->flags & PKT_ERROR)
		return unmasquerade_error(ctx, w);
	if (packet_is_icmp(p) && (!(p->flags & PKT_ECHO) || packet_is_echo_request(p)))
		return 0;
	addr_copy(&w->nat_key.remote, &p->saddr);
	addr_copy(&w->nat_key.local, &p->daddr);
	w->nat_key.remote_port_be = packet_is_icmp(p) ? 0 : p->sport_be;
	w->nat_key.local_port_be = p->dport_be;
	w->nat_key.proto = p->proto;
	value = nat_lookup(&w->nat_key, p->now_s);
	if (!value)
		return 0;
	addr_copy(&w->nat_addr, &value->addr);
	port = value->port_be;
	ret = rewrite_port(ctx, p, false, port);
	if (!ret)
		ret = rewrite_addr(ctx, p, false, &w->nat_addr);
	if (ret)
		return ret;
	addr_copy(&p->daddr, &w->nat_addr);
	p->dport_be = port;
	if (packet_is_icmp(p))
		p->sport_be = port;
	w->f.answer = true;
	return 1;
}

/* Would unmasquerade() rewrite this packet? Not for ICMP errors. */
static __always_inline bool unmasquerade_claims(const struct packet *p)
{
	struct nat_key key = {
		.remote = p->saddr,
		.local = p->daddr,
		.remote_port_be = packet_is_icmp(p) ? 0 : p->sport_be,
		.local_port_be = p->dport_be,
		.proto = p->proto,
	};

	return !(p->flags & PKT_ERROR) && nat_lookup(&key, p->now_s);
}

/* The connection goes on: so does its mapping. */
static __always_inline void nat_refresh(const struct work *w)
{
	struct nat_value *value = bpf_map_lookup_elem(&cilia_nat, &w->nat_key);
	const struct ct_entry *e = bpf_map_lookup_elem(&cilia_ct, &w->key);

	if (value && e)
		value->expires_s = e->expires_s;
}

#endif /* CILIA_UNMASQUERADE_H */
