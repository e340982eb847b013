"""Between messages of flows and what exports are made of."""

from __future__ import annotations

from google.protobuf import json_format

from protos.hubble.v1 import flow_pb2, observer_pb2
from services.flows import convert
from services.flows.exporters.settings import ExportsInvalid, Selection
from services.flows.fieldmask import FieldMask
from services.flows.filterspec import FilterSpec, FlowQuery


def query_of(name: str, selection: Selection) -> tuple[FlowQuery, FieldMask]:
    """What an export asks of the store, from now on. Raises InvalidError."""
    request = observer_pb2.GetFlowsRequest()
    request.field_mask.paths.extend(selection.paths)
    query = FlowQuery(
        whitelist=tuple(_filter(name, "includeFilters", item) for item in selection.include),
        blacklist=tuple(_filter(name, "excludeFilters", item) for item in selection.exclude),
        follow=True,
        until_ns=selection.end_ns,
    )
    return query, convert.mask_from_proto(request.field_mask)


def _filter(name: str, where: str, text: str) -> FilterSpec:
    try:
        message = json_format.Parse(text, flow_pb2.FlowFilter())
    except json_format.ParseError as error:
        raise ExportsInvalid(f"export {name}: {where}: {error}") from error
    return convert.filter_from_proto(message)


def json_line(message: bytes) -> bytes:
    """A GetFlowsResponse as one line of an exporter's file: ExportEvent in protobuf's JSON."""
    event = observer_pb2.ExportEvent.FromString(message)
    text = json_format.MessageToJson(event, preserving_proto_field_name=True, indent=None)
    return text.encode() + b"\n"


def log_record(message: bytes) -> tuple[int, str, dict[str, str | int | bool]]:
    """Time in ns, a sentence, and attributes by OpenTelemetry's names where it has them."""
    response = observer_pb2.GetFlowsResponse.FromString(message)
    flow = response.flow
    verdict = flow_pb2.Verdict.Name(flow.verdict)
    given: dict[str, str | int | bool | None] = {
        "event.name": "flow",
        "flow.uuid": flow.uuid,
        "flow.verdict": verdict,
        "flow.type": flow.event_type.type,
        "flow.direction": flow_pb2.TrafficDirection.Name(flow.traffic_direction).lower(),
        "flow.summary": flow.Summary,
        "k8s.node.name": response.node_name,
        "source.address": flow.IP.source,
        "destination.address": flow.IP.destination,
        "network.type": {1: "ipv4", 2: "ipv6"}.get(flow.IP.ipVersion),
        "http.request.method": flow.l7.http.method,
        "url.full": flow.l7.http.url,
        "http.response.status_code": flow.l7.http.code or None,
        "dns.question.name": flow.l7.dns.query,
    }
    if flow.HasField("is_reply"):
        given["flow.is_reply"] = flow.is_reply.value
    if flow.drop_reason_desc:
        given["flow.drop_reason"] = flow.drop_reason_desc
    kind = flow.l4.WhichOneof("protocol")
    if kind:
        given["network.transport"] = kind.lower()
        l4 = getattr(flow.l4, kind)
        if kind in ("TCP", "UDP", "SCTP"):
            given["source.port"], given["destination.port"] = l4.source_port, l4.destination_port
    for side, end in (("source", flow.source), ("destination", flow.destination)):
        given[f"{side}.identity"] = end.identity or None
        given[f"{side}.namespace"] = end.namespace
        given[f"{side}.name"] = end.pod_name
        given[f"{side}.labels"] = ",".join(end.labels)
    for field in (
        "egress_allowed_by",
        "ingress_allowed_by",
        "egress_denied_by",
        "ingress_denied_by",
    ):
        given[f"flow.{field}"] = ",".join(
            f"{p.namespace}/{p.name}" if p.namespace else p.name for p in getattr(flow, field)
        )
    source = flow.source.pod_name or flow.IP.source or "?"
    destination = flow.destination.pod_name or flow.IP.destination or "?"
    body = f"{source} -> {destination} {verdict} ({flow.Summary})"
    attributes = {key: value for key, value in given.items() if value is not None and value != ""}
    return response.time.ToNanoseconds(), body, attributes
