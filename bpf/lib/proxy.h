/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The redirect to an L7 proxy of this node.
 *
 * A policy row may name a proxy's port instead of letting packets pass. Then
 * the initiator talks to the proxy, which answers with the responder's address,
 * and which talks to the responder on a connection of its own:
 *
 *      initiator ==== downstream leg ====> proxy ==== upstream leg ====> responder
 *        judged as every connection, at          from an address of the node's;
 *        both ends; CT_F_PROXY                    CT_F_FROM_PROXY, judged by nobody
 *
 * A packet of the downstream leg is given a mark, by which the node's rules
 * deliver it locally, and the socket that it is for. The socket travels with
 * the packet: whatever became of rules and routes, the kernel delivers it to
 * that socket or drops it (ip_forward() passes on no packet that has a socket).
 * The mark is for netfilter's tproxy, which knows what to do with a connection
 * that begins where another has just ended.
 */
#ifndef CILIA_PROXY_H
#define CILIA_PROXY_H

#include "events.h"
#include "host.h"

#define TCP_STATE_TIME_WAIT    6
#define TCP_STATE_LISTEN       10
#define TCP_STATE_NEW_SYN_RECV 12

static __always_inline bool mark_is_to_proxy(__u32 mark)
{
	return (mark & MARK_MAGIC_MASK) == MARK_TO_PROXY && mark >> 16;
}

/* Marks are given on this node: what comes in brings none of ours. */
static __always_inline void mark_scrub(struct __sk_buff *ctx)
{
	__u32 mark = ctx->mark;

	if (unlikely(mark) && (mark_is_to_proxy(mark) || mark_is_from_proxy(mark)))
		ctx->mark = 0;
}

/* A packet that was to be delivered to the proxy, and is about to leave instead. */
static __always_inline bool proxy_missed(const struct __sk_buff *ctx)
{
	return unlikely(mark_is_to_proxy(ctx->mark)) && ctx->ingress_ifindex;
}

/* Where do the rules of both ends send it? Returns 0, with the port (0: nowhere), or a reason. */
static __always_inline int proxy_choose(__be16 egress_be, __be16 ingress_be, __be16 *port_be)
{
	struct proxy_pair pair = { egress_be, ingress_be };
	struct proxy_listener *both;

	if (!egress_be || !ingress_be) {
		*port_be = egress_be ?: ingress_be;
		return 0;
	}
	both = bpf_map_lookup_elem(&cilia_proxy_pair, &pair);
	if (!both)
		return -DROP_PROXY_PAIR;
	*port_be = both->port_be;
	return 0;
}

/* Whose is a socket that a packet of a redirected connection might go to? */
enum socket_owner {
	SOCKET_OF_LISTENER, /* of the listener that the packet is for, or this listener itself */
	SOCKET_OF_ANOTHER,  /* of another listener of the proxy: other rules */
	SOCKET_OF_STRANGER, /* of a service of this node */
};

/*
 * The mark names the proxy and the listener, whose connections inherit it. To
 * set one takes CAP_NET_ADMIN, or CAP_NET_RAW from Linux 5.17 on.
 */
static __always_inline enum socket_owner socket_owner(__u32 mark, __be16 port_be)
{
	return !mark_is_from_proxy(mark) ? SOCKET_OF_STRANGER :
	       mark >> 16 == port_be	 ? SOCKET_OF_LISTENER :
					   SOCKET_OF_ANOTHER;
}

/* The end of the packet's connection here: one that is open, or is being made. */
static __always_inline enum socket_owner connection_owner(struct bpf_sock *sk, __be16 port_be)
{
	if (sk->state == TCP_STATE_LISTEN || sk->state == TCP_STATE_TIME_WAIT)
		return SOCKET_OF_STRANGER;
	/* One that is being made has no mark yet but that of who listens. */
	sk = sk->state == TCP_STATE_NEW_SYN_RECV ? bpf_get_listener_sock(sk) : bpf_sk_fullsock(sk);
	return sk ? socket_owner(sk->mark, port_be) : SOCKET_OF_STRANGER;
}

static __always_inline bool is_proxy_listener(struct bpf_sock *sk, __be16 port_be)
{
	if (sk->state != TCP_STATE_LISTEN)
		return false;
	sk = bpf_sk_fullsock(sk);
	return sk && socket_owner(sk->mark, port_be) == SOCKET_OF_LISTENER;
}

/* The listener of the proxy's that has this port, in p's family; to be released. */
static __always_inline struct bpf_sock *proxy_listener(struct __sk_buff *ctx,
						       const struct packet *p, __u32 port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;

	if (packet_is_ip6(p)) {
		size = sizeof(tuple.ipv6);
		memcpy(tuple.ipv6.saddr, &p->saddr, 16);
		tuple.ipv6.daddr[3] = bpf_htonl(1);
		tuple.ipv6.sport = p->sport_be;
		tuple.ipv6.dport = bpf_htons(port);
	} else {
		size = sizeof(tuple.ipv4);
		tuple.ipv4.saddr = p->saddr.w[3];
		tuple.ipv4.daddr = bpf_htonl(0x7f000001);
		tuple.ipv4.sport = p->sport_be;
		tuple.ipv4.dport = bpf_htons(port);
	}
	sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return NULL;
	if (is_proxy_listener(sk, bpf_htons(port)))
		return sk;
	bpf_sk_release(sk);
	return NULL;
}

/* Would the proxy get work()->p at this port? */
__noinline int proxy_takes(struct __sk_buff *ctx, __u32 port)
{
	struct work *w = work();
	struct bpf_sock *sk;

	/* On egress nothing that was forwarded can be redirected; a fragment cannot anywhere. */
	if (!w || (w->p.flags & PKT_FRAG) ||
	    (ctx->ingress_ifindex && ctx->ingress_ifindex != ctx->ifindex))
		return 0;
	sk = proxy_listener(ctx, &w->p, port);
	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/*
 * Give work()->p the socket that it is for: its connection's, or the listener's
 * on this port. What the proxy has open was accepted by one listener and obeys
 * its rules until it ends: for packets that are for another one now there is no
 * way but to end it, which a SYN (answered by a question) and a RST do.
 */
__noinline int proxy_assign(struct __sk_buff *ctx, __u32 port)
{
	struct bpf_sock_tuple tuple = {};
	enum socket_owner owner;
	struct work *w = work();
	struct bpf_sock *sk;
	__u32 size;
	long err;

	if (!w)
		return -DROP_INVALID;
	if (packet_is_ip6(&w->p)) {
		size = sizeof(tuple.ipv6);
		memcpy(tuple.ipv6.saddr, &w->p.saddr, 16);
		memcpy(tuple.ipv6.daddr, &w->p.daddr, 16);
		tuple.ipv6.sport = w->p.sport_be;
		tuple.ipv6.dport = w->p.dport_be;
	} else {
		size = sizeof(tuple.ipv4);
		tuple.ipv4.saddr = w->p.saddr.w[3];
		tuple.ipv4.daddr = w->p.daddr.w[3];
		tuple.ipv4.sport = w->p.sport_be;
		tuple.ipv4.dport = w->p.dport_be;
	}
	sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		owner = connection_owner(sk, bpf_htons(port));
		if (owner == SOCKET_OF_ANOTHER && !packet_is_syn(&w->p) &&
		    !(w->p.tcp_flags & TCP_RST)) {
			bpf_sk_release(sk);
			return -DROP_PROXY_OTHER;
		}
		err = owner == SOCKET_OF_STRANGER ? -1 : bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!err)
			return 0;
	}
	sk = proxy_listener(ctx, &w->p, port);
	if (!sk)
		return -DROP_NO_SOCKET;
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return err ? -DROP_SOCKET_ASSIGN : 0;
}

/*
 * Does the packet go where the socket that sent it meant to? Netfilter may lead
 * it elsewhere (DNAT of a published port, of a service's address), to somebody
 * whom nobody has asked about the proxy's client.
 */
static __always_inline bool sent_to_destination(struct __sk_buff *ctx, const struct packet *p)
{
	const volatile struct bpf_sock *sk = ctx->sk;
	union addr to;

	sk = sk ? bpf_sk_fullsock((struct bpf_sock *)sk) : NULL;
	if (!sk || sk->dst_port != p->dport_be)
		return false;
	/* All before any is chosen: the verifier allows no arithmetic with a socket's address. */
	to.w[0] = sk->dst_ip6[0];
	to.w[1] = sk->dst_ip6[1];
	to.w[2] = sk->dst_ip6[2];
	to.w[3] = sk->dst_ip6[3];
	if (!packet_is_ip6(p))
		addr_from_ip4(&to, sk->dst_ip4);
	return addr_equal(&to, &p->daddr);
}

static __always_inline void mark_to_proxy(struct __sk_buff *ctx, __be16 port_be)
{
	ctx->mark = MARK_TO_PROXY | (__u32)port_be << 16;
}

/* To the proxy's socket by the node's stack. Not on egress, where no socket can be given. */
static __always_inline int to_proxy(struct __sk_buff *ctx, const struct packet *p,
				    const struct flow *f)
{
	int ret;

	if (p->proto == PROTO_TCP) {
		/* The stack would put it together, and forget the socket. */
		if (unlikely(p->flags & PKT_FRAG))
			return -DROP_FRAG_PROXY;
		ret = proxy_assign(ctx, bpf_ntohs(f->proxy_port_be));
		if (unlikely(ret))
			return ret;
	}
	mark_to_proxy(ctx, f->proxy_port_be);
	forwarded(ctx, p, f, TRACE_TO_PROXY);
	return TC_ACT_OK;
}

/*
 * The node's own packet to an endpoint, on egress: it enters the node again by
 * cilia_host, where assign_socket finds the socket for it.
 */
static __always_inline int host_to_proxy(struct __sk_buff *ctx, const struct packet *p,
					 const struct flow *f)
{
	const struct runtime *rt = runtime();
	__u8 mac[6];

	/* What was forwarded here should have been redirected by the device that it came in by. */
	if (ctx->ingress_ifindex || p->proto != PROTO_TCP || !rt || !rt->host_ifindex)
		return -DROP_PROXY_MISSED;
	memcpy(mac, rt->host_mac, 6);
	if (bpf_skb_store_bytes(ctx, 0, mac, 6, 0))
		return -DROP_WRITE;
	mark_to_proxy(ctx, f->proxy_port_be);
	forwarded(ctx, p, f, TRACE_TO_PROXY);
	return bpf_redirect(rt->host_ifindex, BPF_F_INGRESS);
}

#endif /* CILIA_PROXY_H */
