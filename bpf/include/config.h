/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the loader decides before a program is verified. The values are
 * read-only from then on, so the verifier prunes the branches they rule out.
 * What may change under running programs is in cilia_runtime instead.
 */
#ifndef CILIA_CONFIG_H
#define CILIA_CONFIG_H

#include "compiler.h"
#include "lib/types.h"

/* The gateway as workloads see it. The IPv4 address is IPv4-mapped. */
const volatile union addr ROUTER_IP4 = {};
const volatile union addr ROUTER_IP6 = {};
const volatile union addr ROUTER_LL6 = {};

/*
 * Ports (and ICMP identifiers) of masqueraded flows, inclusive. Above
 * net.ipv4.ip_local_port_range, so that the node's own sockets do not meet them.
 */
const volatile __u32 NAT_PORT_MIN = 61000;
const volatile __u32 NAT_PORT_MAX = 65535;

/* Stay open whatever the node's own policy says. */
const volatile struct control_port CONTROL_PORTS[CONTROL_PORTS_MAX] = {};

/* bpf_ktime_get_coarse_ns exists (kernel 5.11). */
const volatile __u32 HAVE_KTIME_COARSE = 0;

#endif /* CILIA_CONFIG_H */
