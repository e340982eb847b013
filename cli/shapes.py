"""Messages as the JSON documented in docs/cli.md. Keys are stable; additions are allowed.

Times are RFC 3339 in UTC. An absent thing is null, not a zero. Labels are strings
`source:key=value`, sorted as the service sent them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from protos.agent.v1 import agent_pb2
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2

NS_PER_S = 1_000_000_000

# Labels that every workload has, or that say where and not what: left out of the short form.
BORING = ("k8s:io.kubernetes.pod.namespace=", "k8s:io.cilium.k8s.", "k8s:io.kubernetes.pod.")


def label_text(label: common_pb2.Label) -> str:
    """`source:key=value`; without a value `source:key`."""
    source = label.source or "unspec"
    return f"{source}:{label.key}={label.value}" if label.value else f"{source}:{label.key}"


def labels(items: Iterable[common_pb2.Label]) -> list[str]:
    """Labels as strings."""
    return [label_text(item) for item in items]


def short_labels(items: list[str]) -> str:
    """The labels that tell workloads apart, without `k8s:`."""
    kept = [text.removeprefix("k8s:") for text in items if not text.startswith(BORING)]
    return ",".join(kept)


def time_text(time_ns: int) -> str | None:
    """RFC 3339 with microseconds; null for 0 (never)."""
    if not time_ns:
        return None
    seconds, rest_ns = divmod(time_ns, NS_PER_S)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{stamp}.{rest_ns // 1000:06d}Z"


def identity(item: common_pb2.Identity, nodes: Iterable[str] | None = None) -> dict[str, Any]:
    """{id, labels[, nodes]}"""
    shape: dict[str, Any] = {"id": item.id, "labels": labels(item.labels)}
    if nodes is not None:
        shape["nodes"] = list(nodes)
    return shape


def rule(item: agent_pb2.RuleRef) -> dict[str, Any] | None:
    """{id, name, path, file, line, column}; null when no rule is named."""
    if not (item.rule_id or item.policy):
        return None
    return {
        "id": item.rule_id,
        "name": item.policy,
        "path": item.path,
        "file": item.origin.source or None,
        "line": item.origin.line or None,
        "column": item.origin.column or None,
    }


def rules(items: Iterable[agent_pb2.RuleRef]) -> list[dict[str, Any]]:
    """Rules that are named."""
    return [shape for shape in map(rule, items) if shape is not None]


def rule_place(shape: dict[str, Any]) -> str:
    """`file:line:column` of a rule shape; empty when unknown."""
    if not shape["file"]:
        return ""
    place = str(shape["file"])
    for part in (shape["line"], shape["column"]):
        if part is None:
            break
        place += f":{part}"
    return place


def rule_text(shape: dict[str, Any]) -> str:
    """`CiliumNetworkPolicy default/rule1 spec.ingress[0] (file:line:column)`."""
    text = " ".join(part for part in (shape["name"], shape["path"]) if part)
    place = rule_place(shape)
    return f"{text} ({place})" if place else text


def endpoint(item: agent_pb2.Endpoint) -> dict[str, Any]:
    """One endpoint."""
    return {
        "id": item.id,
        "name": item.name,
        "namespace": item.namespace,
        "state": item.state,
        "message": item.message,
        "labels": labels(item.labels),
        "identity": item.identity or None,
        "identity_labels": labels(item.identity_labels),
        "ipv4": item.ipv4 or None,
        "ipv6": item.ipv6 or None,
        "mac": item.mac or None,
        "host_interface": item.host_interface or None,
        "interface": item.interface or None,
        "netns": item.netns or None,
        "policy": {
            "ingress_enforced": item.ingress_enforced,
            "egress_enforced": item.egress_enforced,
            "revision": item.policy_revision,
            "desired_revision": item.desired_policy_revision,
            "slot": item.policy_slot,
            "entries": item.policy_entries,
        },
        "options": dict(sorted(item.options.items())),
        "ports": [{"name": x.name, "port": x.port, "protocol": x.protocol} for x in item.ports],
        "visibility": {"annotation": item.visibility or None, "not_shown": list(item.not_shown)},
        "health": endpoint_health(item.health),
    }


def endpoint_health(item: agent_pb2.EndpointHealth) -> dict[str, Any]:
    """{overall, bpf, policy, connected}"""
    return {
        "overall": item.overall,
        "bpf": item.bpf,
        "policy": item.policy,
        "connected": item.connected,
    }


def log_entry(item: agent_pb2.LogEntry) -> dict[str, Any]:
    """{time, code, state, message}"""
    return {
        "time": time_text(item.time_ns),
        "code": item.code,
        "state": item.state,
        "message": item.message,
    }


def outcome(item: identity_pb2.Outcome) -> dict[str, Any]:
    """{kind, namespace, name, change}; change is unchanged, created, configured or deleted."""
    return {
        "kind": item.kind,
        "namespace": item.namespace or None,
        "name": item.name,
        "change": identity_pb2.Outcome.Change.Name(item.change).lower(),
    }


def fault(item: common_pb2.Fault) -> dict[str, Any]:
    """One fault or warning of a document."""
    return {
        "file": item.origin.source,
        "line": item.origin.line,
        "column": item.origin.column,
        "document": item.document,
        "path": item.path,
        "message": item.message,
    }


def policy(item: identity_pb2.Policy) -> dict[str, Any]:
    """A stored policy with its document and where each rule was written."""
    try:
        document = json.loads(item.document) if item.document else None
    except ValueError:
        document = item.document.decode("utf-8", "replace")
    return {
        "kind": item.kind,
        "namespace": item.namespace or None,
        "name": item.name,
        "revision": item.revision,
        "file": item.origin.source or None,
        "line": item.origin.line or None,
        "rules": [
            {"path": o.path, "file": o.origin.source or None, "line": o.origin.line or None}
            for o in item.rule_origins
        ],
        "document": document,
    }


def direction_verdict(item: agent_pb2.DirectionVerdict) -> dict[str, Any]:
    """One side of a trace."""
    return {
        "verdict": item.verdict,
        "enforced": item.enforced,
        "reason": item.reason,
        "rules": rules(item.rules),
        "default_deny": rules(item.default_deny),
    }


def trace(item: agent_pb2.TraceResponse) -> dict[str, Any]:
    """{verdict, egress, ingress}"""
    return {
        "verdict": "allowed" if item.allowed else "denied",
        "egress": direction_verdict(item.egress),
        "ingress": direction_verdict(item.ingress),
    }


def kernel_audit(item: agent_pb2.AuditKernelResponse) -> dict[str, Any]:
    """{rows, policies, cells, skipped, drifted, repaired, drifts, seconds, selftest}"""
    return {
        "rows": item.rows,
        "policies": item.policies,
        "cells": item.cells,
        "skipped": list(item.skipped),
        "drifted": item.drifted,
        "repaired": item.repaired if item.drifted else None,
        "drifts": [
            {
                "map": drift.map,
                "row": drift.row,
                "expected": drift.expected,
                "found": drift.found,
                "subject": drift.subject or None,
                "endpoints": list(drift.endpoints),
                "rule": rule(drift.rule),
            }
            for drift in item.drifts
        ],
        "seconds": round(item.seconds, 3),
        "selftest": item.selftest,
    }


def policy_row(item: agent_pb2.PolicyRow) -> dict[str, Any]:
    """A row of a policy map."""
    return {
        "slot": item.slot,
        "direction": item.direction,
        "identity": item.identity or None,
        "labels": labels(item.labels),
        "protocol": item.protocol,
        "port": item.port or None,
        "end_port": item.end_port or None,
        "deny": item.deny,
        "proxy_port": item.proxy_port or None,
        "hits": item.hits,
        "rule": rule(item.rule),
    }


def conntrack_row(item: agent_pb2.ConntrackRow) -> dict[str, Any]:
    """A connection."""
    return {
        "protocol": item.protocol,
        "source": item.source,
        "source_port": item.source_port,
        "source_identity": item.source_identity or None,
        "destination": item.destination,
        "destination_port": item.destination_port,
        "destination_identity": item.destination_identity or None,
        "expires_in_s": item.expires_in_s,
        "flags": list(item.flags),
        "packets_out": item.packets_out,
        "bytes_out": item.bytes_out,
        "packets_back": item.packets_back,
        "bytes_back": item.bytes_back,
        "nat": item.nat or None,
    }


def ipcache_row(item: agent_pb2.IpcacheRow) -> dict[str, Any]:
    """A prefix and the identity behind it."""
    return {
        "prefix": item.prefix,
        "identity": item.identity,
        "labels": labels(item.labels),
        "tunnel": item.tunnel or None,
    }


def endpoint_row(item: agent_pb2.EndpointRow) -> dict[str, Any]:
    """A row of the endpoint map, as the kernel has it."""
    return {
        "address": item.address,
        "id": item.id,
        "identity": item.identity,
        "ifindex": item.ifindex,
        "policy_slot": item.policy_slot,
        "policy_revision": item.policy_rev,
        "mac": item.mac,
        "node_mac": item.node_mac,
        "flags": list(item.flags),
    }


def metric_row(item: agent_pb2.MetricRow) -> dict[str, Any]:
    """Packets and bytes for one reason and direction."""
    return {
        "reason": item.reason,
        "reason_text": item.reason_text,
        "direction": item.direction,
        "packets": item.packets,
        "bytes": item.bytes,
    }


def peer(item: agent_pb2.Peer) -> dict[str, Any]:
    """One end of a packet."""
    return {
        "address": item.address or None,
        "port": item.port or None,
        "identity": item.identity or None,
        "labels": labels(item.labels),
        "endpoint_id": item.ep_id or None,
        "name": item.name or None,
    }


def event(item: agent_pb2.MonitorEvent) -> dict[str, Any]:
    """A monitor event; agent notifications and losses have their own, shorter forms."""
    if item.type == "lost":
        return {"time": time_text(item.time_ns), "type": "lost", "lost": item.lost}
    if item.type == "agent":
        note = item.notification
        return {
            "time": time_text(item.time_ns or note.time_ns),
            "type": "agent",
            "subtype": note.subtype,
            "notification": _parsed(note.json),
            "explanation": item.explanation,
        }
    if item.type == "l7":
        return _request(item)
    icmp = item.protocol.upper().startswith("ICMP")
    return {
        "time": time_text(item.time_ns),
        "type": item.type,
        "verdict": item.verdict or None,
        "direction": item.direction or None,
        "reason": item.reason or None,
        "reason_code": item.reason_code or None,
        "observation_point": item.observation_point or None,
        "ct_state": item.ct_state or None,
        "protocol": item.protocol or None,
        "tcp_flags": item.tcp_flags or None,
        "icmp": {"type": item.icmp_type, "code": item.icmp_code} if icmp else None,
        "length": item.length,
        "reply": item.reply,
        "endpoint_id": item.ep_id or None,
        "source": peer(item.source),
        "destination": peer(item.destination),
        "match": item.match or None,
        "rule": rule(item.rule),
        "default_deny": rules(item.default_deny),
        "explanation": item.explanation,
    }


def _request(item: agent_pb2.MonitorEvent) -> dict[str, Any]:
    """A request that the proxy told of."""
    record, http = item.l7, item.l7.http
    return {
        "time": time_text(item.time_ns),
        "type": "l7",
        "record": {1: "request", 2: "response"}.get(record.type),
        "verdict": item.verdict or None,
        "direction": item.direction or None,
        "protocol": item.protocol or None,
        "source": peer(item.source),
        "destination": peer(item.destination),
        "proxy_port": record.proxy_port,
        "policy": record.policy or None,
        "latency_ns": record.latency_ns or None,
        "http": {
            "method": http.method,
            "url": http.url,
            "code": http.code or None,
            "protocol": http.protocol,
            "grpc_status": http.grpc_status if http.grpc_status >= 0 else None,
            "headers": [{"name": h.name, "value": h.value} for h in http.headers],
        }
        if record.HasField("http")
        else None,
        "fields": dict(record.fields),
        "explanation": item.explanation,
    }


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def ipam(item: agent_pb2.IpamStatus) -> dict[str, Any] | None:
    """A pool; null when the family is off."""
    if not item.pool:
        return None
    return {
        "pool": item.pool,
        "router": item.router,
        "allocated": item.allocated,
        "capacity": item.capacity,
        "quarantined": item.quarantined,
    }


def controller(item: agent_pb2.Controller) -> dict[str, Any]:
    """A controller's counters and last error (null when the last run succeeded)."""
    return {
        "name": item.name,
        "success_count": item.success_count,
        "failure_count": item.failure_count,
        "consecutive_failures": item.consecutive_failures,
        "last_success": time_text(item.last_success_ns),
        "last_failure": time_text(item.last_failure_ns),
        "last_error": item.last_error or None,
    }


def table(item: agent_pb2.Table) -> dict[str, Any]:
    """One of the agent's tables."""
    return {
        "name": item.name,
        "header": list(item.header),
        "rows": [list(row.cells) for row in item.rows],
    }


def status(item: agent_pb2.StatusResponse) -> dict[str, Any]:
    """The agent's status."""
    return {
        "state": item.state,
        "message": item.message,
        "node": item.node,
        "version": item.version,
        "started": time_text(item.started_ns),
        "components": [
            {"name": c.name, "state": c.state, "message": c.message} for c in item.components
        ],
        "policies": item.policies,
        "policy_revision": item.policy_revision,
        "realised_revision": item.realised_revision,
        "identities": item.identities,
        "endpoint_states": dict(sorted(item.endpoint_states.items())),
        "ipam": {"ipv4": ipam(item.ipv4), "ipv6": ipam(item.ipv6)},
        "attach_mode": item.attach_mode,
        "enforcement_mode": item.enforcement_mode,
        "devices": list(item.devices),
        "events_lost": item.events_lost,
        "controllers": [controller(c) for c in item.controllers],
        "tables": [table(t) for t in item.tables],
    }


def store_status(item: identity_pb2.StatusResponse) -> dict[str, Any]:
    """The identity service's store."""
    return {
        "backend": item.backend,
        "store_id": f"{item.store_id:016x}",
        "revision": item.revision,
        "compacted": item.compacted,
        "keys": item.keys,
        "size_bytes": item.size_bytes,
        "identities": item.identities,
        "quarantined": item.quarantined,
        "message": item.message,
        "sessions": [
            {
                "node": s.node,
                "lease_id": f"{s.lease_id:x}",
                "lease_ttl_s": s.lease_ttl_s,
                "lease_remaining_s": s.lease_remaining_s,
                "connected": s.connected,
            }
            for s in item.sessions
        ],
    }


def feature(item: agent_pb2.Feature) -> dict[str, Any]:
    """A kernel feature."""
    return {
        "name": item.name,
        "present": item.present,
        "required": item.required,
        "detail": item.detail,
        "effect": item.effect,
    }
