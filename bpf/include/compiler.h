/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The language we write in: C for the eBPF machine, with libbpf's helpers. */
#ifndef CILIA_COMPILER_H
#define CILIA_COMPILER_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

typedef _Bool bool;
#define true  1
#define false 0

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define memcpy(to, from, n) __builtin_memcpy(to, from, n)
#define memset(to, c, n)    __builtin_memset(to, c, n)

/* A mask that the optimizer cannot prove away: the verifier has to see it. */
#define bounded(x, mask)                                        \
	({                                                      \
		__u64 bounded_ = (x);                           \
		asm volatile("%0 &= %1" : "+r"(bounded_) : "i"(mask)); \
		bounded_;                                       \
	})

/* tc verdicts (linux/pkt_cls.h drags in half of libc's headers). */
#define TC_ACT_OK   0
#define TC_ACT_SHOT 2

#define AF_INET  2
#define AF_INET6 10

#define EEXIST 17

#endif /* CILIA_COMPILER_H */
