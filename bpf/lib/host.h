/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The node itself as a subject of policy. Its row is that of an endpoint, in
 * cilia_ifindex under HOST_KEY; while there is none, nobody here is asked about
 * the node, and the programs on its devices end with that one lookup.
 *
 *      world --from_netdev--> ingress -.        .-> egress --to_netdev--> world
 *                                       the node
 *   endpoint --from_endpoint-> ingress -'        '-> egress --to_endpoint-> endpoint
 *
 * An end of a connection becomes the node's when it is admitted, and by
 * CT_F_FROM_HOST and CT_F_TO_HOST ever after: the connections of endpoints among
 * themselves and with the world never look here. Loopback is nobody's business.
 */
#ifndef CILIA_HOST_H
#define CILIA_HOST_H

#include "ipcache.h"

#define HOST_KEY 0 /* no interface has this index */

static __always_inline const struct endpoint *host_row(void)
{
	return endpoint_by_ifindex(HOST_KEY);
}

static __always_inline void end_set_host(struct end *end)
{
	const struct endpoint *host;

	if (end_is_local(end))
		return;
	host = host_row();
	if (host)
		end_set(end, host);
}

static __always_inline bool end_is_host(const struct end *end)
{
	return end->flags & EP_F_HOST;
}

static __always_inline bool mark_is_from_proxy(__u32 mark)
{
	/* All of the lower half: 0xca6c, a tunnel's by wg-quick, has the proxy's bits too. */
	mark &= MARK_OWNER_MASK;
	return mark == MARK_FROM_INGRESS_PROXY || mark == MARK_FROM_EGRESS_PROXY;
}

/* Has the proxy sent it, on behalf of a connection that was judged when it came in? */
static __always_inline bool is_from_proxy(const struct __sk_buff *ctx)
{
	return mark_is_from_proxy(ctx->mark);
}

/*
 * What keeps the node on its network, and the network reachable, is never the
 * policy's: neighbour discovery and multicast housekeeping, and the node's own
 * DHCP leases (RFC 2131, RFC 8415). ARP is no IP packet. A node that serves DHCP
 * needs a rule.
 */
static __always_inline bool host_is_exempt(const struct packet *p, bool egress)
{
	__u16 near = bpf_ntohs(egress ? p->sport_be : p->dport_be);
	__u16 far = bpf_ntohs(egress ? p->dport_be : p->sport_be);

	/* From a neighbour alone: what was routed has lost a hop (RFC 4861; MLD is sent with one). */
	if (is_nd(p))
		return (p->ttl == 255 || p->ttl == 1) && !(p->flags & PKT_FRAG);
	if (is_igmp(p))
		return true;
	if (p->proto != PROTO_UDP || (p->flags & PKT_FRAG))
		return false;
	return packet_is_ip6(p) ? near == DHCP6_CLIENT && far == DHCP6_SERVER :
				  near == DHCP4_CLIENT && far == DHCP4_SERVER;
}

/*
 * The node's control ports stay open whatever its policy says: who locks itself
 * out can still be told better. Asked of the first packet of a connection.
 */
static __always_inline bool is_control_port(const struct packet *p, bool egress)
{
	int i;

	for (i = 0; i < CONTROL_PORTS_MAX; i++) {
		if (CONTROL_PORTS[i].proto == p->proto &&
		    CONTROL_PORTS[i].port_be == p->dport_be &&
		    CONTROL_PORTS[i].egress == egress)
			return CONTROL_PORTS[i].port_be;
	}
	return false;
}

/*
 * Is a packet that a device received the node's own, or only to be forwarded?
 * The kernel's routes know: what they would not forward is local, broadcast or
 * anycast. What they refuse stays the kernel's to refuse.
 */
__noinline int is_for_node(struct __sk_buff *ctx)
{
	struct bpf_fib_lookup fib = {};
	struct work *w = work();
	const struct packet *p;
	long err;

	if (!w)
		return true;
	p = &w->p;
	if (addr_is_multicast(&p->daddr) || identity_of_destination(&p->daddr) == ID_HOST)
		return true;
	/* To 0.0.0.0: with that as its source too, a broadcast to the kernel. */
	if (addr_is_ip4(&p->daddr) && !p->daddr.w[3])
		return true;
	fib.ifindex = ctx->ifindex;
	fib.l4_protocol = p->proto;
	if (packet_is_ip6(p)) {
		fib.family = AF_INET6;
		memcpy(fib.ipv6_src, &p->saddr, 16);
		memcpy(fib.ipv6_dst, &p->daddr, 16);
	} else {
		fib.family = AF_INET;
		fib.ipv4_src = p->saddr.w[3];
		fib.ipv4_dst = p->daddr.w[3];
	}
	err = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);
	return err < 0 || err == BPF_FIB_LKUP_RET_NOT_FWDED || err == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

#endif /* CILIA_HOST_H */
