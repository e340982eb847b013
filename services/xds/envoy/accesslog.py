"""Envoy's access log, as records: the service that Envoy streams its log to.

    StreamAccessLogsMessage (a batch) ─▶ convert ─▶ L7Records ─▶ publish
                                           ▲
                            the redirect of the port: rule ids to policies

An allowed request makes two records, of the request and of its response; a denied one makes one. An
entry that cannot be understood is counted and skipped; nothing that is logged can end the stream.
Envoy gives up entries when this service is away, so counts are of what arrived.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.message import DecodeError

from cilia.telemetry import fields
from protos.xds.v1 import xds_pb2 as pb
from services.xds.translate.headers import MISSING, REJECTED
from services.xds.translate.listener import PORT_TAG

log = structlog.get_logger()

_METHOD: Final = "envoy.service.accesslog.v3.AccessLogService"
_RBAC: Final = "envoy.filters.http.rbac"
_MAX_TEXT: Final = 8192
_MAX_HEADERS: Final = 64
_PROTOCOLS: Final = {1: "HTTP/1.0", 2: "HTTP/1.1", 3: "HTTP/2", 4: "HTTP/3"}
_METHODS: Final = {
    1: "GET", 2: "HEAD", 3: "POST", 4: "PUT", 5: "DELETE",
    6: "CONNECT", 7: "OPTIONS", 8: "TRACE", 9: "PATCH",
}  # fmt: skip

Publish = Callable[[Sequence[pb.L7Record]], None]
FindRedirect = Callable[[int], pb.Redirect | None]


@dataclass(slots=True)
class Counts:
    """Of one redirect, since its listener was made."""

    requests: int = 0
    denied: int = 0


class AccessLogReceiver:
    """Receives batches. `find` gives the redirect that a port has now."""

    def __init__(self, *, publish: Publish, find: FindRedirect) -> None:
        self._publish = publish
        self._find = find
        self._policies: dict[int, tuple[str, dict[int, str]]] = {}
        self.counts: dict[int, Counts] = {}
        self.sources = 0
        self.malformed = 0

    def receive(self, batch: Any) -> int:
        """Publishes a batch (StreamAccessLogsMessage); returns how many entries it had."""
        records: list[pb.L7Record] = []
        for entry in batch.http_logs.log_entry:
            try:
                self._add(entry, records)
            except (ValueError, TypeError, OverflowError) as error:
                self._skip(error)
        if records:
            self._publish(records)
        return len(batch.http_logs.log_entry)

    def forget(self, port: int) -> None:
        """The port has another listener now, or none."""
        self.counts.pop(port, None)
        self._policies.pop(port, None)

    def _skip(self, error: Exception) -> None:
        if self.malformed == 0:
            log.warning(
                "An access log entry was not understood; more like it are only counted.",
                **{fields.ERROR: str(error)[:200]},
            )
        self.malformed += 1

    def _add(self, entry: Any, records: list[pb.L7Record]) -> None:
        record = convert(entry)
        port = record.proxy_port
        redirect = self._find(port)
        if redirect is not None:
            record.digest = redirect.digest
            record.direction = redirect.direction
            record.parser = redirect.rules.parser
            record.policy = self._policy(redirect, record.rule_id)
            counts = self.counts.setdefault(port, Counts())
            counts.requests += 1
            counts.denied += record.verdict == pb.L7Record.DENIED
        if record.verdict == pb.L7Record.DENIED:
            records.append(record)
            return
        request = pb.L7Record()
        request.CopyFrom(record)
        request.type = pb.L7Record.REQUEST
        request.verdict = pb.L7Record.FORWARDED
        request.latency_ns = 0
        request.info = ""
        http = request.http
        http.code, http.grpc_status, http.response_bytes = 0, -1, 0
        http.ClearField("response_headers")
        records += (request, record)

    def _policy(self, redirect: pb.Redirect, rule_id: int) -> str:
        if not rule_id:
            return ""
        known = self._policies.get(redirect.port)
        if known is None or known[0] != redirect.digest:
            rules = (*redirect.rules.rules, *redirect.ingress_rules.rules)
            known = (redirect.digest, {rule.rule_id: rule.policy for rule in rules})
            self._policies[redirect.port] = known
        return known[1].get(rule_id, "")

    # ---- the gRPC edge

    def add_to_server(self, server: grpc.aio.Server) -> None:
        handler = grpc.stream_unary_rpc_method_handler(
            self._stream,
            request_deserializer=_parse,
            response_serializer=als_pb2.StreamAccessLogsResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_METHOD, {"StreamAccessLogs": handler}),)
        )

    async def _stream(self, batches: AsyncIterator[Any], _context: object) -> Any:
        self.sources += 1
        try:
            async for batch in batches:
                if isinstance(batch, DecodeError):
                    self._skip(batch)
                else:
                    self.receive(batch)
        finally:
            self.sources -= 1
        return als_pb2.StreamAccessLogsResponse()


def _parse(data: bytes) -> Any:
    """The message, or the error: one bad message must not end a stream of good ones."""
    try:
        return als_pb2.StreamAccessLogsMessage.FromString(data)
    except DecodeError as error:
        return error


def convert(entry: Any) -> pb.L7Record:
    """An entry (HTTPAccessLogEntry) as the record of a response, or of a denied request.

    Raises ValueError for what cannot be.
    """
    common, request, response = entry.common_properties, entry.request, entry.response
    record = pb.L7Record(type=pb.L7Record.RESPONSE)
    record.time_ns = common.start_time.ToNanoseconds()
    record.latency_ns = max(0, common.duration.ToNanoseconds())
    tag = common.custom_tags.get(PORT_TAG, "")
    if tag.isdigit() and len(tag) <= 5:
        record.proxy_port = int(tag)
    _peer(common.downstream_direct_remote_address, record.source)
    _peer(common.downstream_local_address, record.destination)
    if common.HasField("upstream_remote_address"):
        _peer(common.upstream_remote_address, record.upstream)
    record.request_id = _text(request.request_id)

    metadata = common.metadata.filter_metadata
    judged, record.rule_id = _judgement(metadata)
    details = response.response_code_details
    if judged == "denied":
        record.verdict = pb.L7Record.DENIED
    elif details == "via_upstream":
        record.verdict = pb.L7Record.FORWARDED
    elif judged == "allowed":
        record.verdict = pb.L7Record.ERROR
    else:  # refused before any rule was asked: not HTTP, or not as it should be
        record.verdict = pb.L7Record.DENIED
    if record.verdict == pb.L7Record.DENIED:
        record.type = pb.L7Record.REQUEST
        record.rule_id = 0
    record.info = _info(common.response_flags, details)

    http = record.http
    http.method = _METHODS.get(request.request_method, "")
    http.authority = _text(request.authority)
    http.path = _text(request.original_path or request.path)
    http.url = _text(f"{request.scheme or 'http'}://{http.authority}{http.path}")
    http.code = response.response_code.value
    http.protocol = _PROTOCOLS.get(entry.protocol_version, "")
    http.grpc_status = _grpc_status(response)
    http.request_bytes = request.request_body_bytes
    http.response_bytes = response.response_body_bytes
    _headers(_chosen(request), http.headers)
    _headers(response.response_headers.items(), http.response_headers)
    _headers(_noted(metadata, MISSING), http.missing_headers)
    _headers(_noted(metadata, REJECTED), http.rejected_headers)
    return record


def _judgement(metadata: Mapping[str, Any]) -> tuple[str, int]:
    """What the rules said ("allowed", "denied", "" when they were not asked), and which one."""
    if _RBAC not in metadata:
        return "", 0
    said, rule_id = "", 0
    values = metadata[_RBAC].fields
    for prefix in ("egress_", "ingress_"):
        result = values.get(f"{prefix}enforced_engine_result")
        if result is None:
            continue
        said = result.string_value
        name = values.get(f"{prefix}enforced_effective_policy_id")
        if name is not None and name.string_value.isdigit():
            rule_id = int(name.string_value) & 0xFFFF_FFFF
        if said == "denied":
            break
    return said, rule_id


def _peer(address: Any, peer: pb.L7Peer) -> None:
    socket = address.socket_address
    if socket.address:
        peer.address = ipaddress.ip_address(socket.address).packed
        peer.port = socket.port_value & 0xFFFF


def _grpc_status(response: Any) -> int:
    for found in (response.response_trailers, response.response_headers):
        text = found.get("grpc-status", "")
        if text.isdigit() and len(text) <= 3:
            return int(text)
    return -1


def _info(flags: Any, details: str) -> str:
    """`upstream_connection_failure; upstream_reset_before_response_started`."""
    names = [field.name for field, value in flags.ListFields() if value is True]
    if details and details != "via_upstream":
        names.append(details)
    return _text("; ".join(names))


def _chosen(request: Any) -> Iterable[tuple[str, str]]:
    yield from request.request_headers.items()
    if request.user_agent and "user-agent" not in request.request_headers:
        yield "user-agent", request.user_agent


def _noted(metadata: Mapping[str, Any], namespace: str) -> Iterable[tuple[str, str]]:
    if namespace in metadata:
        for name, value in metadata[namespace].fields.items():
            yield name, value.string_value


def _headers(pairs: Iterable[tuple[str, str]], into: Any) -> None:
    for name, value in sorted(pairs)[:_MAX_HEADERS]:
        into.add(name=_text(name), value=_text(value))


def _text(value: str) -> str:
    return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT]
