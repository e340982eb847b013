"""The numbers of bpf/lib/types.h that both sides of the kernel boundary speak.

Exactly the header's: a test compares the two, name by name.
"""

from __future__ import annotations

from typing import Final

# struct endpoint.flags
EP_F_OPEN: Final = 1 << 0
EP_F_AUDIT: Final = 1 << 1
EP_F_HOST: Final = 1 << 2

# struct policy_value.flags
POLICY_F_DENY: Final = 1 << 0
POLICY_F_AUDIT: Final = 1 << 1
POLICY_F_WATCH: Final = 1 << 2

# struct policy_meta.plens_id, plens_any
POLICY_META_HAS_DENY: Final = 1 << 31

# struct ct_entry.flags
CT_F_INIT_LO: Final = 1 << 0
CT_F_NAT: Final = 1 << 1
CT_F_PROXY: Final = 1 << 2
CT_F_FROM_HOST: Final = 1 << 3
CT_F_OUTSIDE: Final = 1 << 4
CT_F_TO_HOST: Final = 1 << 5
CT_F_EXEMPT: Final = 1 << 6
CT_F_FROM_PROXY: Final = 1 << 7

CT_SCOPE_NONE: Final = 2

# skb->mark
MARK_MAGIC_MASK: Final = 0x0F00
MARK_OWNER_MASK: Final = 0xFFFF
MARK_TO_PROXY: Final = 0x0200
MARK_FROM_INGRESS_PROXY: Final = 0x0A00
MARK_FROM_EGRESS_PROXY: Final = 0x0B00

CONTROL_PORTS_MAX: Final = 8

# struct ct_entry.seen
CT_SEEN_NON_SYN: Final = 1 << 0
CT_SEEN_CLOSING: Final = 1 << 1

# struct frag_value.flags
FRAG_F_LAST: Final = 1 << 0
FRAG_F_BAD: Final = 1 << 1

# struct device.flags
DEV_F_L3: Final = 1 << 0

# struct runtime.flags
RT_F_MASQUERADE4: Final = 1 << 0
RT_F_MASQUERADE6: Final = 1 << 1
RT_F_ALLOW_FRAG_NEEDED: Final = 1 << 2

# struct audit_cell, how many a run answers
AUDIT_CELLS: Final = 64

# struct event.type
EVENT_DROP: Final = 1
EVENT_TRACE: Final = 4
EVENT_VERDICT: Final = 5

# struct event.flags
EVENT_F_IPV6: Final = 1 << 0
EVENT_F_REPLY: Final = 1 << 1
EVENT_F_AUDITED: Final = 1 << 2
EVENT_F_FRAGMENT: Final = 1 << 3
EVENT_F_RELATED: Final = 1 << 4
EVENT_F_REJUDGED: Final = 1 << 5
EVENT_F_SELFTEST: Final = 1 << 6

# struct event.direction, and the low bits of an index into cilia_metrics
DIR_NONE: Final = 0
DIR_INGRESS: Final = 1
DIR_EGRESS: Final = 2

# struct event.obs_point
TRACE_TO_ENDPOINT: Final = 0
TRACE_TO_PROXY: Final = 1
TRACE_TO_HOST: Final = 2
TRACE_TO_STACK: Final = 3
TRACE_TO_OVERLAY: Final = 4
TRACE_FROM_ENDPOINT: Final = 5
TRACE_FROM_PROXY: Final = 6
TRACE_FROM_HOST: Final = 7
TRACE_FROM_STACK: Final = 8
TRACE_FROM_OVERLAY: Final = 9
TRACE_FROM_NETWORK: Final = 10
TRACE_TO_NETWORK: Final = 11

# struct event.match_type
MATCH_NONE: Final = 0
MATCH_L3: Final = 1
MATCH_L3_L4: Final = 2
MATCH_L4: Final = 3
MATCH_ALL: Final = 4
MATCH_L3_PROTO: Final = 5
MATCH_PROTO: Final = 6

# conntrack states: struct event.reason of EVENT_TRACE
CT_NEW: Final = 0
CT_ESTABLISHED: Final = 1
CT_REPLY: Final = 2
CT_RELATED: Final = 3
