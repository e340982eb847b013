"""What this service counts. Names follow Cilium's stems where it has the same thing."""

from __future__ import annotations

from cilia.telemetry.metrics import Metrics

_ENDPOINT = Metrics("endpoint")
_POLICY = Metrics("policy")
_DATAPATH = Metrics("datapath")
_PROXY = Metrics("proxy")
_IPAM = Metrics("ipam")
_MONITOR = Metrics("monitor")

ENDPOINTS = _ENDPOINT.gauge("state_count", "Endpoints of this node, by state.", ["state"])
REGENERATIONS = _ENDPOINT.counter(
    "regenerations_total", "Policies brought into force, by outcome.", ["outcome"]
)
REGENERATION_SECONDS = _ENDPOINT.histogram(
    "regeneration_seconds", "From inputs to the kernel, one flush for all that changed."
)
ADD_SECONDS = _ENDPOINT.histogram("add_seconds", "From the request until policy is in force.")
POLICIES = _POLICY.gauge("count", "Policy documents in force.")
POLICY_REVISION = _POLICY.gauge("max_revision", "Store revision of the newest policy change.")
CONNTRACK_ENTRIES = _DATAPATH.gauge("conntrack_entries_count", "Connections after the last GC.")
CONNTRACK_COLLECTED = _DATAPATH.counter(
    "conntrack_gc_entries_total", "Expired connections that the GC removed."
)
REDIRECTS = _PROXY.gauge("redirects_count", "Listeners of the L7 proxy, by state.", ["state"])
REDIRECT_RESTORED = _PROXY.counter(
    "routing_restored_total", "Times that somebody else had changed what leads to the proxy."
)
L7_RECORDS = _PROXY.counter("records_total", "Requests the proxy told of, by verdict.", ["verdict"])
L7_LOST = _PROXY.counter("records_lost_total", "Requests the proxy could not tell of.")
KERNEL_DRIFT = _DATAPATH.gauge(
    "kernel_drift", "Rows and verdicts of the kernel that are wrong and could not be repaired."
)
KERNEL_DRIFTS = _DATAPATH.counter(
    "kernel_drifts_total", "Rows and verdicts that were found otherwise than written.", ["map"]
)
KERNEL_CELLS = _DATAPATH.counter(
    "kernel_audit_cells_total", "Policy cells whose verdict was compared with the engine's."
)
AUDIT_SELFTESTS = _POLICY.counter(
    "audit_selftests_total", "Trials of the audit path, by outcome: heard or silent.", ["outcome"]
)
IPAM_ADDRESSES = _IPAM.gauge("addresses_count", "Addresses in use.", ["family"])
EVENTS = _MONITOR.counter("events_total", "Events read from the ring.")
EVENTS_LOST = _MONITOR.gauge("events_lost_count", "Events the programs could not write.")
