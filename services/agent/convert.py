"""Messages of protos/agent/v1 <-> the agent's values. Total; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from cilia.bpf.probe import Feature
from cilia.controller import ControllerStatus
from cilia.errors import InvalidError
from cilia.identity import NumericIdentity
from cilia.labels import Labels
from cilia.policy import PROTO_BY_NAME, PROTO_NAMES, Origin, RuleRef, Verdict
from cilia.policy.l7 import PortNames
from cilia.rpc.convert import (
    fault_to_proto,
    identity_to_proto,
    labels_from_proto,
    labels_to_proto,
)
from protos.agent.v1 import agent_pb2
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2
from protos.xds.v1 import xds_pb2
from services.agent.clients import Outcome
from services.agent.clusterwatch import PolicyEntry, PolicyName
from services.agent.drift import Drift
from services.agent.dumps import (
    ConntrackDump,
    EndpointDump,
    IpcacheDump,
    MetricDump,
    PolicyDump,
)
from services.agent.endpoint import Endpoint, EndpointOptions, LogEntry, health_of
from services.agent.eventmeta import EndpointNews, Told
from services.agent.ipam import PoolStatus
from services.agent.kernelaudit import Report
from services.agent.lives import AddRequest
from services.agent.monitor import Decoded, Party
from services.agent.notifications import Notification
from services.agent.policydocs import Applied, Source
from services.agent.status import NodeStatus

_CHANGES = {
    "unchanged": identity_pb2.Outcome.UNCHANGED,
    "created": identity_pb2.Outcome.CREATED,
    "configured": identity_pb2.Outcome.CONFIGURED,
    "deleted": identity_pb2.Outcome.DELETED,
}


class RequestInvalid(InvalidError):
    """A field of a request cannot be read."""


def _ipv4(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text) if text else None
    except ValueError as error:
        raise RequestInvalid(f"{text!r} is not an IPv4 address") from error


def _ipv6(text: str) -> IPv6Address | None:
    try:
        return IPv6Address(text) if text else None
    except ValueError as error:
        raise RequestInvalid(f"{text!r} is not an IPv6 address") from error


# ---- endpoints


def add_request(message: agent_pb2.AddEndpointRequest) -> AddRequest:
    """Raises RequestInvalid, InvalidLabel, EndpointInvalid."""
    match message.WhichOneof("netns"):
        case "netns_path":
            netns = message.netns_path
        case "pid":
            netns = f"/proc/{message.pid}/ns/net"
        case _:
            raise RequestInvalid(
                "an endpoint needs a network namespace", cure="Give --netns PATH or --pid PID"
            )
    return AddRequest(
        name=message.name,
        namespace=message.namespace or "default",
        labels=labels_from_proto(message.labels),
        netns=netns,
        interface=message.interface or "eth0",
        ipv4=_ipv4(message.ipv4),
        ipv6=_ipv6(message.ipv6),
        ports=_port_names(message.ports),
        options=EndpointOptions.of_annotations(dict(message.annotations)),
        wait=not message.no_wait,
    )


def endpoint_to_proto(
    endpoint: Endpoint,
    *,
    realised: int,
    desired: int,
    mode: str,
    audit: bool,
    not_shown: Iterable[str],
) -> agent_pb2.Endpoint:
    health = health_of(endpoint)
    return agent_pb2.Endpoint(
        id=endpoint.id,
        name=endpoint.name,
        namespace=endpoint.namespace,
        labels=labels_to_proto(endpoint.labels),
        identity_labels=labels_to_proto(endpoint.identity_labels),
        identity=endpoint.identity or 0,
        ipv4=str(endpoint.ipv4 or ""),
        ipv6=str(endpoint.ipv6 or ""),
        mac=endpoint.mac.hex(":"),
        host_interface=endpoint.host_interface,
        interface=endpoint.interface,
        netns=endpoint.netns,
        state=endpoint.shown_state,
        message=endpoint.message,
        ingress_enforced=endpoint.ingress_enforced,
        egress_enforced=endpoint.egress_enforced,
        policy_revision=realised,
        policy_slot=endpoint.slot,
        policy_entries=endpoint.entries,
        options=endpoint.options.as_text(mode=mode, audit=audit),
        health=agent_pb2.EndpointHealth(
            overall=health.overall,
            bpf=health.bpf,
            policy=health.policy,
            connected=health.connected,
        ),
        desired_policy_revision=desired,
        ports=[
            agent_pb2.NamedPort(name=name, port=port, protocol=PROTO_NAMES[proto])
            for name, port, proto in endpoint.ports
        ],
        visibility=endpoint.options.visibility,
        not_shown=not_shown,
    )


def _port_names(ports: Iterable[agent_pb2.NamedPort]) -> PortNames:
    """Raises RequestInvalid for a protocol that is none; the rest is the domain's."""
    found = []
    for port in ports:
        proto = PROTO_BY_NAME.get((port.protocol or "TCP").upper())
        if proto is None:
            raise RequestInvalid(
                f"port {port.name}: {port.protocol!r} is not a protocol",
                cure="Use TCP, UDP or SCTP",
            )
        found.append((port.name, port.port, proto))
    return tuple(sorted(found))


def log_to_proto(entries: Iterable[LogEntry]) -> agent_pb2.EndpointLog:
    return agent_pb2.EndpointLog(
        entries=[
            agent_pb2.LogEntry(
                time_ns=entry.time_ns,
                code=entry.code,
                state=str(entry.state),
                message=entry.message,
            )
            for entry in entries
        ]
    )


# ---- policy


def sources(message: agent_pb2.ApplyRequest) -> list[Source]:
    return [Source(document.source or "-", document.text) for document in message.documents]


def policy_name(message: identity_pb2.PolicyName) -> PolicyName:
    return PolicyName(message.kind, message.namespace, message.name)


def outcomes_to_proto(outcomes: Iterable[Outcome]) -> list[identity_pb2.Outcome]:
    return [
        identity_pb2.Outcome(
            kind=outcome.kind,
            namespace=outcome.namespace,
            name=outcome.name,
            change=_CHANGES[outcome.change],
        )
        for outcome in outcomes
    ]


def applied_to_proto(applied: Applied) -> agent_pb2.ApplyResponse:
    return agent_pb2.ApplyResponse(
        revision=applied.revision,
        outcomes=outcomes_to_proto(applied.outcomes),
        warnings=[fault_to_proto(warning) for warning in applied.warnings],
        realised=applied.realised,
        confirm_within_s=applied.confirm_within_s,
    )


def confirmed_to_proto(names: Iterable[PolicyName]) -> agent_pb2.ConfirmResponse:
    return agent_pb2.ConfirmResponse(
        names=[
            identity_pb2.PolicyName(kind=x.kind, namespace=x.namespace, name=x.name) for x in names
        ]
    )


def _origin(origin: Origin) -> common_pb2.Origin:
    return common_pb2.Origin(source=origin.source, line=origin.line, column=origin.column)


def policy_to_proto(entry: PolicyEntry) -> identity_pb2.Policy:
    return identity_pb2.Policy(
        kind=entry.name.kind,
        namespace=entry.name.namespace,
        name=entry.name.name,
        document=entry.document,
        origin=_origin(Origin(*entry.origin)),
        rule_origins=[
            identity_pb2.RuleOrigin(path=path, origin=_origin(Origin(*where)))
            for path, where in entry.rule_origins
        ],
        revision=entry.revision,
    )


def rule_to_proto(rule: RuleRef) -> agent_pb2.RuleRef:
    return agent_pb2.RuleRef(
        rule_id=rule.rule_id, policy=rule.policy, path=rule.path, origin=_origin(rule.origin)
    )


def verdict_to_proto(verdict: Verdict) -> agent_pb2.DirectionVerdict:
    return agent_pb2.DirectionVerdict(
        verdict=verdict.verdict,
        enforced=verdict.enforced,
        reason=verdict.reason,
        rules=[rule_to_proto(rule) for rule in verdict.rules],
        default_deny=[rule_to_proto(rule) for rule in verdict.default_deny],
    )


def audit_to_proto(
    report: Report, rule_of: Callable[[int], RuleRef | None], selftest: str
) -> agent_pb2.AuditKernelResponse:
    return agent_pb2.AuditKernelResponse(
        rows=report.rows,
        policies=report.policies,
        cells=report.cells,
        skipped=report.skipped,
        drifted=report.drifted,
        repaired=report.repaired,
        drifts=[_drift(drift, rule_of(drift.rule_id)) for drift in report.drifts],
        seconds=report.seconds,
        selftest=selftest,
    )


def _drift(drift: Drift, rule: RuleRef | None) -> agent_pb2.KernelDrift:
    return agent_pb2.KernelDrift(
        map=drift.map,
        row=drift.row,
        expected=drift.expected,
        found=drift.found,
        subject=str(drift.subject) if drift.subject is not None else "",
        endpoints=drift.users,
        rule=rule_to_proto(rule) if rule is not None else None,
    )


# ---- dumps


def policy_row(row: PolicyDump) -> agent_pb2.PolicyRow:
    message = agent_pb2.PolicyRow(
        slot=row.slot,
        direction="egress" if row.egress else "ingress",
        identity=row.identity,
        labels=labels_to_proto(row.labels or ()),
        protocol=row.protocol,
        port=row.port,
        end_port=row.end_port,
        deny=row.deny,
        proxy_port=row.proxy_port,
        hits=row.hits,
    )
    if row.rule is not None:
        message.rule.CopyFrom(rule_to_proto(row.rule))
    return message


def conntrack_row(row: ConntrackDump) -> agent_pb2.ConntrackRow:
    return agent_pb2.ConntrackRow(
        protocol=row.protocol,
        source=row.source,
        source_port=row.source_port,
        destination=row.destination,
        destination_port=row.destination_port,
        expires_in_s=row.expires_in_s,
        flags=row.flags,
        packets_out=row.packets[0],
        packets_back=row.packets[1],
        bytes_out=row.octets[0],
        bytes_back=row.octets[1],
        source_identity=row.source_identity,
        destination_identity=row.destination_identity,
        nat=row.nat,
    )


def ipcache_row(row: IpcacheDump) -> agent_pb2.IpcacheRow:
    return agent_pb2.IpcacheRow(
        prefix=row.prefix,
        identity=row.identity,
        labels=labels_to_proto(row.labels or ()),
        tunnel=row.tunnel,
    )


def endpoint_row(row: EndpointDump) -> agent_pb2.EndpointRow:
    return agent_pb2.EndpointRow(
        address=row.address,
        id=row.id,
        identity=row.identity,
        ifindex=row.ifindex,
        policy_slot=row.slot,
        policy_rev=row.rev,
        mac=row.mac,
        node_mac=row.node_mac,
        flags=row.flags,
    )


def metric_row(row: MetricDump) -> agent_pb2.MetricRow:
    return agent_pb2.MetricRow(
        reason=row.reason,
        reason_text=row.text,
        direction=row.direction,
        packets=row.packets,
        bytes=row.octets,
    )


def feature_to_proto(feature: Feature) -> agent_pb2.Feature:
    effect = feature.effect
    if not feature.present and feature.cure:
        effect = f"{effect}; {feature.cure}" if effect else feature.cure
    return agent_pb2.Feature(
        name=feature.name,
        present=feature.present,
        required=feature.required,
        detail=feature.detail,
        effect=effect,
    )


# ---- monitor


def notification_to_proto(note: Notification) -> agent_pb2.Notification:
    return agent_pb2.Notification(subtype=int(note.subtype), time_ns=note.time_ns, json=note.json)


def meaning_to_proto(told: Told) -> agent_pb2.EventMeaning:
    return agent_pb2.EventMeaning(
        reset=told.reset,
        node=told.node,
        cluster=told.cluster,
        endpoints=[_event_endpoint(news) for news in told.endpoints],
        gone_endpoints=told.gone_endpoints,
        identities=[identity_to_proto(*entry) for entry in told.identities.items()],
        gone_identities=told.gone_identities,
        rules=[rule_to_proto(rule) for rule in told.rules],
        addresses=[
            agent_pb2.EventAddress(
                prefix=entry.prefix,
                identity=entry.identity,
                name=entry.workload,
                namespace=entry.namespace,
                node=entry.node,
            )
            for entry in told.addresses
        ],
        gone_addresses=told.gone_addresses,
    )


def _event_endpoint(news: EndpointNews) -> agent_pb2.EventEndpoint:
    endpoint, isolation = news.endpoint, news.isolation
    message = agent_pb2.EventEndpoint(
        id=endpoint.id,
        name=endpoint.name,
        namespace=endpoint.namespace,
        labels=labels_to_proto(endpoint.labels),
        identity=endpoint.identity or 0,
        addresses=[str(address) for address in endpoint.addresses],
        ifindex=endpoint.ifindex,
        host_interface=endpoint.host_interface,
    )
    if isolation is not None:
        message.mode = isolation.mode
        message.ingress_enforced = isolation.ingress
        message.egress_enforced = isolation.egress
        message.ingress_isolated_by.extend(rule.rule_id for rule in isolation.ingress_by)
        message.egress_isolated_by.extend(rule.rule_id for rule in isolation.egress_by)
    return message


def notification_event(note: Notification) -> agent_pb2.MonitorEvent:
    payload = json.loads(note.json)
    what = note.subtype.name.lower().replace("_", " ")
    who = payload.get("pod-name") or ", ".join(payload.get("labels", ()))
    return agent_pb2.MonitorEvent(
        time_ns=note.time_ns,
        type="agent",
        notification=notification_to_proto(note),
        explanation=f"{what}: {who}" if who else what,
    )


def _peer(party: Party) -> agent_pb2.Peer:
    return agent_pb2.Peer(
        address=party.address,
        port=party.port,
        identity=party.identity,
        labels=labels_to_proto(party.labels or ()),
        ep_id=party.ep_id,
        name=party.name,
    )


def event_to_proto(event: Decoded) -> agent_pb2.MonitorEvent:
    message = agent_pb2.MonitorEvent(
        time_ns=event.time_ns,
        type=event.type,
        verdict=event.verdict,
        direction=event.direction,
        reason=event.reason,
        reason_code=event.reason_code,
        observation_point=event.observation_point,
        ct_state=event.ct_state,
        source=_peer(event.source),
        destination=_peer(event.destination),
        protocol=event.protocol,
        tcp_flags=event.tcp_flags,
        length=event.length,
        default_deny=[rule_to_proto(rule) for rule in event.default_deny],
        match=event.match,
        reply=event.reply,
        ep_id=event.ep_id,
        explanation=event.explanation,
        icmp_type=event.icmp_type,
        icmp_code=event.icmp_code,
    )
    if event.rule is not None:
        message.rule.CopyFrom(rule_to_proto(event.rule))
    return message


_L7_VERDICTS = {
    xds_pb2.L7Record.FORWARDED: "FORWARDED",
    xds_pb2.L7Record.DENIED: "DENIED",
    xds_pb2.L7Record.ERROR: "ERROR",
}
_L7_DIRECTIONS = {xds_pb2.INGRESS: "ingress", xds_pb2.EGRESS: "egress", xds_pb2.BOTH: "both"}


def l7_concerns(record: xds_pb2.L7Record, *, endpoints: Collection[int], denied_only: bool) -> bool:
    if denied_only and record.verdict != xds_pb2.L7Record.DENIED:
        return False
    ends = (record.source.endpoint_id, record.destination.endpoint_id)
    return not endpoints or any(number in endpoints for number in ends if number)


def l7_event(record: xds_pb2.L7Record) -> agent_pb2.MonitorEvent:
    verdict = _L7_VERDICTS.get(record.verdict, "")
    http = record.http
    said = f"{http.method} {http.url}" if record.HasField("http") else record.parser
    if http.code:
        said += f" => {http.code}"
    if record.HasField("http") and http.grpc_status >= 0 and "grpc" in _content_type(http):
        said += f" grpc-status {http.grpc_status}"
    if record.latency_ns:
        said += f", {record.latency_ns / 1e6:.1f} ms"
    if record.verdict == xds_pb2.L7Record.DENIED:
        said += f"; no rule allows it: {record.policy}" if record.policy else "; no rule allows it"
    elif record.policy:
        said += f"; rule {record.policy}"
    return agent_pb2.MonitorEvent(
        time_ns=record.time_ns,
        type="l7",
        verdict=verdict,
        direction=_L7_DIRECTIONS.get(record.direction, ""),
        source=_l7_peer(record.source),
        destination=_l7_peer(record.destination),
        protocol=record.parser,
        explanation=said,
        l7=record,
    )


def _content_type(http: xds_pb2.HTTPRecord) -> str:
    found = next((h.value for h in http.headers if h.name.lower() == "content-type"), "")
    return found or ("grpc" if http.grpc_status > 0 else "")


def _l7_peer(peer: xds_pb2.L7Peer) -> agent_pb2.Peer:
    return agent_pb2.Peer(
        address=str(ip_address(peer.address)) if peer.address else "",
        port=peer.port,
        identity=peer.identity,
        labels=peer.labels,
        ep_id=peer.endpoint_id,
        name=peer.endpoint_name,
    )


# ---- status


def controller_to_proto(status: ControllerStatus) -> agent_pb2.Controller:
    return agent_pb2.Controller(
        name=status.name,
        success_count=status.success_count,
        failure_count=status.failure_count,
        consecutive_failures=status.consecutive_failures,
        last_success_ns=int(status.last_success_s * 1e9),
        last_failure_ns=int(status.last_error_s * 1e9),
        last_error=status.last_error,
    )


def pool_to_proto(pool: PoolStatus) -> agent_pb2.IpamStatus:
    return agent_pb2.IpamStatus(
        pool=str(pool.pool),
        router=str(pool.router),
        allocated=pool.allocated,
        capacity=min(pool.capacity, 2**64 - 1),
        quarantined=pool.quarantined,
    )


def status_to_proto(
    status: NodeStatus,
    *,
    policy: agent_pb2.PolicySettings,
    node: str,
    version: str,
    attach_mode: str,
    enforcement_mode: str,
    started_ns: int,
    all_controllers: bool,
) -> agent_pb2.StatusResponse:
    return agent_pb2.StatusResponse(
        state=status.state,
        message=status.message,
        components=[
            agent_pb2.Component(name=c.name, state=c.state, message=c.message)
            for c in status.components
        ],
        controllers=[
            controller_to_proto(c) for c in status.controllers if all_controllers or not c.healthy
        ],
        ipv4=pool_to_proto(status.ipv4),
        ipv6=pool_to_proto(status.ipv6),
        endpoint_states=status.endpoint_states,
        node=node,
        version=version,
        policy_revision=status.policy_revision,
        realised_revision=status.realised_revision,
        policies=status.policies,
        identities=status.identities,
        attach_mode=attach_mode,
        enforcement_mode=enforcement_mode,
        tables=[
            agent_pb2.Table(
                name=table.name,
                header=table.header,
                rows=[agent_pb2.Row(cells=row) for row in table.rows],
            )
            for table in status.tables
        ],
        started_ns=started_ns,
        events_lost=status.events_lost,
        devices=status.devices,
        policy=policy,
    )


def identity_of(number: int) -> NumericIdentity:
    return NumericIdentity(number)


def labels_of(messages: Iterable[common_pb2.Label]) -> Labels:
    return labels_from_proto(messages)
