/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which identity has an address. */
#ifndef CILIA_IPCACHE_H
#define CILIA_IPCACHE_H

#include "config.h"
#include "eps.h"

static __always_inline __u32 identity_of_world(const union addr *addr)
{
	return addr_is_ip4(addr) ? ID_WORLD_IP4 : ID_WORLD_IP6;
}

static __always_inline __u32 ipcache_identity(const union addr *addr)
{
	struct ipcache_key key = { .prefixlen = 128 };
	struct ipcache_value *value;

	memcpy(&key.addr, addr, sizeof(key.addr));
	value = bpf_map_lookup_elem(&cilia_ipcache, &key);
	return value && value->identity ? value->identity : identity_of_world(addr);
}

static __always_inline bool is_router(const union addr *addr)
{
	return (addr->d[0] == ROUTER_IP4.d[0] && addr->d[1] == ROUTER_IP4.d[1]) ||
	       (addr->d[0] == ROUTER_IP6.d[0] && addr->d[1] == ROUTER_IP6.d[1]) ||
	       (addr->d[0] == ROUTER_LL6.d[0] && addr->d[1] == ROUTER_LL6.d[1]);
}

static __always_inline __u32 identity_of_destination(const union addr *addr)
{
	return is_router(addr) ? ID_HOST : ipcache_identity(addr);
}

static __always_inline bool is_cluster_identity(__u32 id)
{
	return id >= ID_CLUSTER_MIN && !(id & ID_LOCAL_BIT);
}

/*
 * A sender outside chooses its own source address: whatever the ipcache says,
 * it is the world, an API server, or what a CIDR of some policy calls it; never
 * host, node, health or endpoint.
 */
static __always_inline __u32 identity_of_outsider(const union addr *addr)
{
	__u32 id = ipcache_identity(addr);

	if (id == ID_WORLD || id == ID_KUBE_APISERVER || (id & ID_LOCAL_BIT))
		return id;
	return identity_of_world(addr);
}

static __always_inline void flow_identities(const struct packet *p, struct flow *f)
{
	if (end_is_local(&f->src))
		f->src_id = f->src.identity;
	else if (f->origin == ORIGIN_HOST)
		f->src_id = ID_HOST;
	else
		f->src_id = identity_of_outsider(&p->saddr);
	f->dst_id = end_is_local(&f->dst) ? f->dst.identity : identity_of_destination(&p->daddr);
}

#endif /* CILIA_IPCACHE_H */
