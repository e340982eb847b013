/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Lifetimes are counted in whole seconds of CLOCK_MONOTONIC. */
#ifndef CILIA_TIME_H
#define CILIA_TIME_H

#include "config.h"

#define NSEC_PER_SEC 1000000000ULL

/* The coarse clock is a memory read; it lags the exact one by a tick. */
static __always_inline __u32 now_s(void)
{
	__u64 ns = HAVE_KTIME_COARSE ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns();

	return ns / NSEC_PER_SEC;
}

#endif /* CILIA_TIME_H */
