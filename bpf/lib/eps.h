/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Local endpoints, by address and by the host side of their veth pair. */
#ifndef CILIA_EPS_H
#define CILIA_EPS_H

#include "flow.h"

static __always_inline struct endpoint *endpoint_by_addr(const union addr *addr)
{
	return bpf_map_lookup_elem(&cilia_lxc, addr);
}

static __always_inline struct endpoint *endpoint_by_ifindex(__u32 ifindex)
{
	return bpf_map_lookup_elem(&cilia_ifindex, &ifindex);
}

static __always_inline void end_set(struct end *end, const struct endpoint *ep)
{
	memcpy(end, ep, sizeof(*end));
}

static __always_inline bool end_is_local(const struct end *end)
{
	return end->ifindex;
}

static __always_inline bool end_is_open(const struct end *end)
{
	return end->flags & EP_F_OPEN;
}

/* An endpoint without an address of the family owns none of it: the row is zero, addr is not. */
static __always_inline bool endpoint_owns(const struct endpoint *ep, const union addr *addr)
{
	return addr_equal(addr_is_ip4(addr) ? &ep->ip4 : &ep->ip6, addr) && !addr_is_zero(addr);
}

#endif /* CILIA_EPS_H */
