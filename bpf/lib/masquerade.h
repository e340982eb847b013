/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerade, the way out: find a port on the node, and send from it. */
#ifndef CILIA_MASQUERADE_H
#define CILIA_MASQUERADE_H

#include "nat.h"

#define NAT_TRIES 32

/* Would an answer to this port meet a socket of the node's own? */
static __always_inline bool nat_port_is_nodes(struct __sk_buff *ctx, const struct nat_key *key)
{
	bool ip6 = !addr_is_ip4(&key->remote);
	struct bpf_sock_tuple tuple = {};
	__u32 size = ip6 ? sizeof(tuple.ipv6) : sizeof(tuple.ipv4);
	struct bpf_sock *sk;

	if (ip6) {
		memcpy(tuple.ipv6.saddr, &key->remote, 16);
		memcpy(tuple.ipv6.daddr, &key->local, 16);
		tuple.ipv6.sport = key->remote_port_be;
		tuple.ipv6.dport = key->local_port_be;
	} else {
		tuple.ipv4.saddr = key->remote.w[3];
		tuple.ipv4.daddr = key->local.w[3];
		tuple.ipv4.sport = key->remote_port_be;
		tuple.ipv4.dport = key->local_port_be;
	}
	if (key->proto == PROTO_TCP)
		sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (key->proto == PROTO_UDP)
		sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		return false;
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/*
 * Take the port for the flow of work()->nat_key and nat_value, or refresh it if
 * it is that flow's already. Returns 0 when somebody else has it.
 */
__noinline int nat_take(struct __sk_buff *ctx, __u32 port)
{
	struct work *w = work();
	struct nat_value *old;

	if (!w)
		return 0;
	w->nat_key.local_port_be = bpf_htons(port);
	old = bpf_map_lookup_elem(&cilia_nat, &w->nat_key);
	if (old && old->expires_s >= w->p.now_s) {
		if (!addr_equal(&old->addr, &w->nat_value.addr) ||
		    old->port_be != w->nat_value.port_be)
			return 0;
		old->expires_s = w->nat_value.expires_s;
		return 1;
	}
	if (nat_port_is_nodes(ctx, &w->nat_key))
		return 0;
	return !bpf_map_update_elem(&cilia_nat, &w->nat_key, &w->nat_value,
				    old ? BPF_ANY : BPF_NOEXIST);
}

/* Find a port for the flow of work()->nat_key; the port it wants is in nat_value. */
static __always_inline int nat_allocate(struct __sk_buff *ctx, struct work *w, bool has, __u32 wanted)
{
	__u32 n = NAT_PORT_MAX - NAT_PORT_MIN + 1, start, stride;
	int i;

	if (has || w->p.proto == PROTO_SCTP ||
	    (wanted >= NAT_PORT_MIN && wanted <= NAT_PORT_MAX)) {
		if (nat_take(ctx, wanted))
			return 0;
	}
	if (w->p.proto == PROTO_SCTP || !n)
		return -DROP_NAT_NO_PORT;
	/* Odd, so that neighbours in time do not follow each other; small ranges are swept. */
	start = bpf_get_prandom_u32() % n;
	stride = n <= NAT_TRIES ? 1 : (bpf_get_prandom_u32() & 0xff) | 1;
	for (i = 0; i < NAT_TRIES; i++) {
		if (nat_take(ctx, NAT_PORT_MIN + start))
			return 0;
		start = (start + stride) % n;
	}
	return -DROP_NAT_NO_PORT;
}

/* An endpoint's ICMP error about an answer that came to it through the mapping of e. */
static __always_inline int masquerade_error(struct __sk_buff *ctx, struct work *w,
					    const struct ct_entry *e)
{
	__be16 port = e->nat_port_be;
	int ret;

	addr_copy(&w->nat_addr, &e->nat_addr);
	ret = rewrite_quoted(ctx, &w->p, &w->quoted, false, &w->nat_addr, port);
	return ret ?: rewrite_addr(ctx, &w->p, true, &w->nat_addr);
}

/*
 * The packet leaves by a device whose address is work()->nat_addr (zero: it has
 * none): send it from there. A connection keeps its address when the route
 * changes, and what was never masqueraded is not from now on.
 */
__noinline int masquerade(struct __sk_buff *ctx, bool wanted)
{
	struct work *w = work();
	struct ct_entry *e;
	bool has;
	int ret;

	if (!w)
		return -DROP_INVALID;
	/* The key is that of the packet, or of the one that it quotes. */
	e = bpf_map_lookup_elem(&cilia_ct, &w->key);
	has = e && (e->flags & CT_F_NAT);
	if (w->f.state == CT_RELATED)
		return has ? masquerade_error(ctx, w, e) : 0;
	if (!has && !wanted)
		return 0;
	if (!e)
		return packet_is_icmp(&w->p) ? -DROP_NAT_PROTO : -DROP_NAT_NO_PORT;
	if (has)
		addr_copy(&w->nat_addr, &e->nat_addr);
	else if (addr_is_zero(&w->nat_addr))
		return -DROP_NAT_NO_PORT;

	memset(&w->nat_key, 0, sizeof(w->nat_key));
	memset(&w->nat_value, 0, sizeof(w->nat_value));
	addr_copy(&w->nat_key.remote, &w->p.daddr);
	addr_copy(&w->nat_key.local, &w->nat_addr);
	w->nat_key.remote_port_be = packet_is_icmp(&w->p) ? 0 : w->p.dport_be;
	w->nat_key.proto = w->p.proto;
	addr_copy(&w->nat_value.addr, &w->p.saddr);
	w->nat_value.port_be = w->p.sport_be;
	w->nat_value.expires_s = e->expires_s;
	ret = nat_allocate(ctx, w, has, bpf_ntohs(has ? e->nat_port_be : w->p.sport_be));
	if (ret) {
		bpf_map_delete_elem(&cilia_ct, &w->key);
		return ret;
	}
	if (!has || e->nat_port_be != w->nat_key.local_port_be) {
		addr_copy(&e->nat_addr, &w->nat_addr);
		e->nat_port_be = w->nat_key.local_port_be;
		e->flags |= CT_F_NAT;
	}
	ret = rewrite_port(ctx, &w->p, true, w->nat_key.local_port_be);
	return ret ?: rewrite_addr(ctx, &w->p, true, &w->nat_addr);
}

#endif /* CILIA_MASQUERADE_H */
