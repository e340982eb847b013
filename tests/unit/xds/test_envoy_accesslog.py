"""Entries of Envoy's access log become records; what cannot is counted, and harms nobody."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from hypothesis import given
from hypothesis import strategies as st

from protos.xds.v1 import xds_pb2 as pb
from services.xds.envoy.accesslog import AccessLogReceiver, _parse, convert


def entry(
    *, said: str = "allowed", rule: str = "7", details: str = "via_upstream", code: int = 200
) -> Any:
    made = accesslog_pb2.HTTPAccessLogEntry(protocol_version=2)
    common = made.common_properties
    common.start_time.FromNanoseconds(1_700_000_000_123_456_789)
    common.duration.FromNanoseconds(5_000_000)
    common.custom_tags["cilia.port"] = "10000"
    for address, text, port in (
        (common.downstream_direct_remote_address, "10.0.0.1", 40_000),
        (common.downstream_local_address, "fd00::2", 80),
    ):
        address.socket_address.address = text
        address.socket_address.port_value = port
    if said:
        metadata = common.metadata.filter_metadata["envoy.filters.http.rbac"]
        metadata["ingress_enforced_engine_result"] = said
        metadata["ingress_enforced_effective_policy_id"] = rule
    made.request.request_method = 3
    made.request.authority = "a:80"
    made.request.path = "/p?q"
    made.request.scheme = "http"
    made.request.request_headers["x-b"] = "2"
    made.request.user_agent = "curl"
    made.response.response_code.value = code
    made.response.response_code_details = details
    return made


def receiver() -> tuple[AccessLogReceiver, list[pb.L7Record]]:
    records: list[pb.L7Record] = []
    redirect = pb.Redirect(port=10_000, digest="d", direction=pb.INGRESS)
    redirect.rules.parser = "http"
    redirect.rules.rules.add(rule_id=7, policy="CiliumNetworkPolicy default/x")
    made = AccessLogReceiver(
        publish=records.extend, find=lambda port: redirect if port == 10_000 else None
    )
    return made, records


def batch(*entries: Any) -> Any:
    message = als_pb2.StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(entries)
    return message


def test_an_allowed_request_is_a_request_and_a_response() -> None:
    made, records = receiver()
    assert made.receive(batch(entry())) == 1
    request, response = records
    assert (request.type, response.type) == (pb.L7Record.REQUEST, pb.L7Record.RESPONSE)
    assert (request.http.code, response.http.code) == (0, 200)
    assert (request.latency_ns, response.latency_ns) == (0, 5_000_000)
    for record in records:
        assert record.verdict == pb.L7Record.FORWARDED
        assert record.rule_id == 7
        assert record.policy == "CiliumNetworkPolicy default/x"
        assert (record.proxy_port, record.digest, record.parser) == (10_000, "d", "http")
        assert record.time_ns == 1_700_000_000_123_456_789
        assert socket.inet_ntop(socket.AF_INET, record.source.address) == "10.0.0.1"
        assert socket.inet_ntop(socket.AF_INET6, record.destination.address) == "fd00::2"
        assert record.http.method == "POST"
        assert record.http.url == "http://a:80/p?q"
        assert record.http.protocol == "HTTP/1.1"
        assert [(h.name, h.value) for h in record.http.headers] == [
            ("user-agent", "curl"), ("x-b", "2"),
        ]  # fmt: skip


def test_what_a_verdict_is_made_of() -> None:
    for said, details, verdict, rule_id in (
        ("allowed", "via_upstream", pb.L7Record.FORWARDED, 7),
        ("denied", "rbac_access_denied_matched_policy[none]", pb.L7Record.DENIED, 0),
        ("allowed", "upstream_reset_before_response_started", pb.L7Record.ERROR, 7),
        ("", "http1.codec_error", pb.L7Record.DENIED, 0),
        ("", "path_normalization_failed", pb.L7Record.DENIED, 0),
    ):
        record = convert(entry(said=said, details=details))
        assert (record.verdict, record.rule_id) == (verdict, rule_id), details


def test_of_both_ends_the_one_that_denied_decides() -> None:
    made = entry()
    metadata = made.common_properties.metadata.filter_metadata["envoy.filters.http.rbac"]
    metadata["egress_enforced_engine_result"] = "denied"
    metadata["egress_enforced_effective_policy_id"] = "none"
    assert convert(made).verdict == pb.L7Record.DENIED


def test_denials_and_requests_are_counted() -> None:
    made, records = receiver()
    made.receive(batch(entry(), entry(said="denied"), entry(said="denied")))
    assert (made.counts[10_000].requests, made.counts[10_000].denied) == (3, 2)
    assert len(records) == 4
    made.forget(10_000)
    assert made.counts == {}


def test_what_is_odd_is_bounded_or_skipped() -> None:
    made, records = receiver()
    bad_address, bad_time, long = entry(), entry(), entry()
    bad_address.common_properties.downstream_local_address.socket_address.address = "no address"
    bad_time.common_properties.start_time.seconds = 1 << 62
    long.request.path = "/" + "x" * 100_000
    for number in range(200):
        long.request.request_headers[f"h{number}"] = "v"
    made.receive(batch(bad_address, bad_time, entry(rule="x" * 50), entry(rule="9" * 30), long))
    assert made.malformed == 2
    assert [r.rule_id for r in records[::2]] == [0, int("9" * 30) & 0xFFFF_FFFF, 7]
    assert len(records[-1].http.path) <= 8192
    assert len(records[-1].http.headers) <= 64


def test_an_entry_of_an_unknown_port_is_a_record_of_no_redirect() -> None:
    made, records = receiver()
    for tag in ("", "-", "99999999", "10001"):
        strange = entry()
        strange.common_properties.custom_tags["cilia.port"] = tag
        made.receive(batch(strange))
    assert [r.proxy_port for r in records[::2]] == [0, 0, 0, 10_001]
    assert {r.digest for r in records} == {""}
    assert made.counts == {}


@given(st.binary(max_size=300))
def test_no_message_ends_a_stream(data: bytes) -> None:
    made, records = receiver()
    good = batch(entry()).SerializeToString()

    async def messages() -> AsyncIterator[Any]:
        for raw in (data, good, data + good, good[:-1]):
            yield _parse(raw)

    asyncio.run(made._stream(messages(), None))
    assert made.sources == 0
    assert len(records) >= 2
