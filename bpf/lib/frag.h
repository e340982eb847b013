/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Fragments, of both families. Only the first one names the ports, so it must
 * arrive first; it lends them to the rest. The state also remembers which bytes
 * have come, because overlapping fragments are how one datagram is shown to the
 * policy and another to the receiver (RFC 1858, RFC 5722).
 *
 *      0         contig_end
 *      |=========|      [island]   [island]       |  <- FRAG_F_LAST
 *
 * Two CPUs that carry one datagram at the same moment may miss an overlap; the
 * receive path keeps a flow on one CPU.
 */
#ifndef CILIA_FRAG_H
#define CILIA_FRAG_H

#include "conntrack.h"

#define FRAG_ISLANDS    4
#define FRAG_LIFETIME_S 15

static __always_inline void frag_key_of(struct frag_key *key, const struct packet *p)
{
	memset(key, 0, sizeof(*key));
	addr_copy(&key->saddr, &p->saddr);
	addr_copy(&key->daddr, &p->daddr);
	key->id_be = p->frag_id_be;
	key->proto = p->frag_proto;
}

static __always_inline int frag_begin(const struct packet *p, const struct frag_key *key)
{
	struct frag_value v = {
		.sport_be = p->sport_be,
		.dport_be = p->dport_be,
		.first_end = p->frag_end,
		.contig_end = p->frag_end,
		.expires_s = p->now_s + FRAG_LIFETIME_S,
		.proto = p->proto,
	};

	if (packet_is_icmp(p))
		v.sport_be = bpf_htons((__u16)p->icmp_type << 8 | p->icmp_code);
	return bpf_map_update_elem(&cilia_frag, key, &v, BPF_ANY) ? -DROP_FRAG_STATE : 0;
}

/* Put [start, end) into what has come. */
static __always_inline int frag_insert(struct frag_value *v, __u16 start, __u16 end)
{
	int i, round, free = -1;

	if (start < v->contig_end)
		return -DROP_FRAG_OVERLAP;
	for (i = 0; i < FRAG_ISLANDS; i++) {
		if (!v->island[i].end)
			free = i;
		else if (start < v->island[i].end && v->island[i].start < end)
			return -DROP_FRAG_OVERLAP;
	}
	if (start > v->contig_end) {
		/* An unrolled store: the verifier of 5.10 wants a constant index. */
		for (i = 0; i < FRAG_ISLANDS; i++) {
			if (i == free) {
				v->island[i].start = start;
				v->island[i].end = end;
				return 0;
			}
		}
		return -DROP_FRAG_STATE;
	}
	v->contig_end = end;
	for (round = 0; round < FRAG_ISLANDS; round++) {
		for (i = 0; i < FRAG_ISLANDS; i++) {
			if (v->island[i].end && v->island[i].start == v->contig_end) {
				v->contig_end = v->island[i].end;
				v->island[i].start = v->island[i].end = 0;
			}
		}
	}
	return 0;
}

/* Give the packet the ports of its datagram, or a reason why it may not pass. */
__noinline int frag_track(void)
{
	struct work *w = work();
	struct frag_value *v;
	struct frag_key key;
	struct packet *p;
	bool known;
	int ret;

	if (!w)
		return -DROP_INVALID;
	p = &w->p;
	frag_key_of(&key, p);
	v = bpf_map_lookup_elem(&cilia_frag, &key);
	known = v && v->expires_s >= p->now_s;
	if (!(p->flags & PKT_LATER)) {
		if (!known) {
			p->flags |= PKT_JOINED;
			return frag_begin(p, &key);
		}
		v->flags |= FRAG_F_BAD;
		return -DROP_FRAG_OVERLAP;
	}
	if (!known)
		return -DROP_FRAG_UNKNOWN;
	if (v->flags & FRAG_F_BAD)
		return -DROP_FRAG_OVERLAP;

	p->proto = v->proto;
	if (packet_is_icmp(p)) {
		__u16 type_code = bpf_ntohs(v->sport_be);

		packet_set_icmp(p, type_code >> 8, type_code, v->dport_be);
		/* What an error quotes is in its first fragment. */
		p->flags &= ~PKT_ERROR;
	} else {
		p->sport_be = v->sport_be;
		p->dport_be = v->dport_be;
	}
	ret = frag_insert(v, p->frag_start, p->frag_end);
	if (ret == -DROP_FRAG_OVERLAP)
		v->flags |= FRAG_F_BAD;
	if (ret)
		return ret;
	p->flags |= PKT_JOINED;
	if (!(p->flags & PKT_MORE))
		v->flags |= FRAG_F_LAST;
	/* Complete: forget it, the identifier may come again soon. */
	if ((v->flags & FRAG_F_LAST) &&
	    !(v->island[0].end | v->island[1].end | v->island[2].end | v->island[3].end))
		bpf_map_delete_elem(&cilia_frag, &key);
	return 0;
}

#endif /* CILIA_FRAG_H */
