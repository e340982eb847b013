/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What every program begins with: a clean slate, the time, the settings of the moment. */
#ifndef CILIA_BEGIN_H
#define CILIA_BEGIN_H

#include "flow.h"
#include "time.h"

/* Returns NULL only if a map of one row has none, which does not happen. */
static __always_inline struct work *begin(struct __sk_buff *ctx, __u8 origin, __u8 direction)
{
	const struct runtime *rt = runtime();
	struct work *w = work();

	if (!w || !rt)
		return NULL;
	memset(&w->p, 0, sizeof(w->p));
	memset(&w->f, 0, sizeof(w->f));
	w->p.len = ctx->len;
	w->p.now_s = now_s();
	w->f.origin = origin;
	w->f.direction = direction;
	/* Before any identity is looked up: what is learnt later may be newer, never older. */
	w->f.epoch = *(volatile __u32 *)&rt->ipcache_epoch;
	w->f.rt_flags = rt->flags;
	w->f.aggregation = rt->aggregation;
	w->f.report_interval_s = rt->report_interval_s;
	return w;
}

#endif /* CILIA_BEGIN_H */
