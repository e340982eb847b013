"""Filters: vectorised against a plain oracle, and everything that cannot be is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from google.protobuf.field_mask_pb2 import FieldMask as PbMask

from cilia.errors import InvalidError
from protos.hubble.v1 import flow_pb2 as pb
from protos.hubble.v1 import observer_pb2
from services.flows import convert
from services.flows.encoder import Encoder
from services.flows.filterspec import FilterInvalid, FlowQuery
from services.flows.matching import _of_kinds, compile_filters
from services.flows.rows import Rows
from services.flows.store import Store
from tests.unit.flows.flowfilters import choices, matches, random_filter, selected
from tests.unit.flows.flowworld import meaning, random_events, store_all

COUNT = 1000


@pytest.fixture(scope="module")
def store() -> Store:
    encoder = Encoder()
    made = Store(capacity=2048, run=77, cel=convert.compile_cel, encode_flows=encoder.flows)
    made.learn(meaning())
    store_all(made, random_events(random.Random(11), COUNT))
    return made


def shown(store: Store, query: FlowQuery) -> list[pb.Flow]:
    encoder = Encoder()
    cursor = store.query(query)
    flows: list[pb.Flow] = []
    while True:
        for item in cursor.read():
            if isinstance(item, Rows):
                flows += [pb.Flow.FromString(raw) for raw in encoder.flows(item)]
        if cursor.state.name in ("DONE", "WAITING"):
            return flows


@pytest.fixture(scope="module")
def flows(store: Store) -> list[pb.Flow]:
    found = shown(store, FlowQuery())
    assert len(found) == COUNT
    return found


def query(whitelist: list[pb.FlowFilter], blacklist: list[pb.FlowFilter]) -> FlowQuery:
    request = observer_pb2.GetFlowsRequest(whitelist=whitelist, blacklist=blacklist)
    return convert.flows_request(request)[0]


def test_every_field_alone_with_every_value(store: Store, flows: list[pb.Flow]) -> None:
    useful = set()
    for name, values in choices([flows[3].uuid, flows[300].uuid]).items():
        for value in values:
            wanted = pb.FlowFilter()
            getattr(wanted, name).append(value)
            got = [flow.uuid for flow in shown(store, query([wanted], []))]
            assert got == selected(flows, [wanted], []), wanted
            if 0 < len(got) < COUNT:
                useful.add(name)
    # These have nothing here to tell apart: no such field is ever filled, or all are of one node.
    assert set(choices([])) - useful <= {
        "source_service", "destination_service", "source_ip_xlated", "encrypted", "ip_trace_id",
        "node_labels", "node_name",
    }  # fmt: skip


def test_every_field_of_the_message_is_tried() -> None:
    assert set(pb.FlowFilter.DESCRIPTOR.fields_by_name) - {"experimental"} == set(choices([]))


@pytest.mark.parametrize("seed", range(5))
def test_random_filters_find_what_the_oracle_finds(
    store: Store, flows: list[pb.Flow], seed: int
) -> None:
    r = random.Random(seed)
    values = choices([flow.uuid for flow in r.sample(flows, 5)])
    some = 0
    for _ in range(50):
        whitelist = [
            random_filter(r, values, fields=r.choice((0, 1, 1, 2, 2, 3)))
            for _ in range(r.choice((0, 1, 1, 2, 3)))
        ]
        blacklist = [
            random_filter(r, values, fields=r.choice((1, 1, 2)))
            for _ in range(r.choice((0, 0, 1, 2)))
        ]
        got = [flow.uuid for flow in shown(store, query(whitelist, blacklist))]
        assert got == selected(flows, whitelist, blacklist), (whitelist, blacklist)
        some += 0 < len(got) < COUNT
    assert some > 7


def test_a_few_rows_are_decided_as_many_are(store: Store, flows: list[pb.Flow]) -> None:
    """Short reads ask of their own pairs only, long ones make a table of all."""
    r = random.Random(99)
    values = choices([flow.uuid for flow in r.sample(flows, 5)])
    for _ in range(60):
        wanted = random_filter(r, values, fields=r.choice((1, 2)))
        matcher = compile_filters([convert.filter_from_proto(wanted)], [])
        for first in r.sample(range(COUNT - 3), 5):
            found = matcher.mask(store.rows(first, 3)).tolist()
            assert found == [matches(wanted, flow) for flow in flows[first : first + 3]], wanted


def test_cel_that_asks_for_no_more_than_pair_and_meta_is_told_apart() -> None:
    shared = ("_flow.verdict == Verdict.DROPPED", "_flow . IP.source == '10.0.0.1' || true", "true")
    own = (
        "_flow.uuid != ''",
        "_flow == Flow{}",
        "[_flow].size() == 1",
        "_flow.verdict == 1 && _flow.l4.TCP.source_port == 1u",
    )
    assert all(_of_kinds(text) for text in shared)
    assert not any(_of_kinds(text) for text in own)


CEL: dict[str, Callable[[pb.Flow], bool]] = {
    "_flow.verdict == Verdict.DROPPED": lambda f: f.verdict == pb.DROPPED,
    '_flow.source.labels.exists(l, l == "k8s:app=xwing")': (
        lambda f: "k8s:app=xwing" in f.source.labels
    ),
    "_flow.l4.TCP.destination_port == 80u && _flow.is_reply == true": (
        lambda f: f.l4.TCP.destination_port == 80 and f.is_reply.value
    ),
    'has(_flow.l7.http) && _flow.l7.http.method == "GET"': (
        lambda f: f.l7.HasField("http") and f.l7.http.method == "GET"
    ),
    "1 / (_flow.l4.TCP.destination_port == 80u ? 0 : 1) == 1": (
        lambda f: f.l4.TCP.destination_port != 80
    ),
}


@pytest.mark.parametrize("expression", CEL)
def test_cel(store: Store, flows: list[pb.Flow], expression: str) -> None:
    wanted = pb.FlowFilter()
    wanted.experimental.cel_expression.append(expression)
    got = [flow.uuid for flow in shown(store, query([wanted], []))]
    assert got == [flow.uuid for flow in flows if CEL[expression](flow)]
    assert 0 < len(got) < COUNT


def refusal(request: observer_pb2.GetFlowsRequest) -> InvalidError:
    def serve() -> None:
        asked, _ = convert.flows_request(request)
        compile_filters(
            asked.whitelist, asked.blacklist, cel=convert.compile_cel, encode=Encoder().flows
        )

    with pytest.raises(InvalidError) as caught:
        serve()
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source_ip", "10.0.0"),
        ("destination_ip", "10.0.0.0/33"),
        ("source_ip_xlated", "x"),
        ("source_pod", ""),
        ("destination_service", ""),
        ("source_fqdn", "a b"),
        ("source_fqdn", ""),
        ("source_label", "a in b"),
        ("source_label", "=x"),
        ("source_label", "!a=b"),
        ("destination_cluster_name", ""),
        ("source_port", "http"),
        ("source_port", "65536"),
        ("source_port", "80-90"),
        ("source_port", "-1"),
        ("protocol", "gre"),
        ("http_status_code", "600"),
        ("http_status_code", "4xx"),
        ("http_status_code", "+"),
        ("http_path", "("),
        ("http_url", "(?=x)"),
        ("dns_query", "[a"),
        ("node_name", "a/b/c"),
        ("node_name", "a b"),
        ("http_path", "a" * 5000),
        ("source_label", "a" * 5000),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: str) -> None:
    wanted = pb.FlowFilter()
    getattr(wanted, field).append(value)
    error = refusal(observer_pb2.GetFlowsRequest(blacklist=[wanted]))
    assert isinstance(error, FilterInvalid)
    assert field in error.message or "label" in field or "a/b/c" in error.message


def test_unknown_fields_are_refused_wherever_they_are() -> None:
    unknown = b"\xf2\x07\x01x"  # field 126, a string
    for request in (
        observer_pb2.GetFlowsRequest.FromString(unknown),
        observer_pb2.GetFlowsRequest(whitelist=[pb.FlowFilter.FromString(unknown)]),
        observer_pb2.GetFlowsRequest(
            whitelist=[pb.FlowFilter(tcp_flags=[pb.TCPFlags.FromString(unknown)])]
        ),
    ):
        assert "126" in refusal(request).message


def test_contradictions_are_refused() -> None:
    assert "first" in refusal(observer_pb2.GetFlowsRequest(first=True, follow=True)).message
    http = pb.FlowFilter(http_method=["GET"], event_type=[pb.EventTypeFilter(type=4)])
    assert "http" in refusal(observer_pb2.GetFlowsRequest(whitelist=[http])).message
    http.event_type.add(type=129)
    convert.flows_request(observer_pb2.GetFlowsRequest(whitelist=[http]))
    assert (
        "NS"
        in refusal(
            observer_pb2.GetFlowsRequest(
                whitelist=[pb.FlowFilter(tcp_flags=[pb.TCPFlags(NS=True)])]
            )
        ).message
    )


@pytest.mark.parametrize("expression", ["_flow.nothing == 1", "1 + 1", "((", "x", "true" * 3000])
def test_cel_that_cannot_be_is_refused(expression: str) -> None:
    wanted = pb.FlowFilter()
    wanted.experimental.cel_expression.append(expression)
    assert "cel_expression" in refusal(observer_pb2.GetFlowsRequest(whitelist=[wanted])).message


def test_too_many_of_anything_is_refused() -> None:
    refusal(observer_pb2.GetFlowsRequest(whitelist=[pb.FlowFilter()] * 1000))
    refusal(observer_pb2.GetFlowsRequest(whitelist=[pb.FlowFilter(source_identity=range(10_000))]))


def test_masks_are_checked() -> None:
    request = observer_pb2.GetFlowsRequest(field_mask=PbMask(paths=["source.pod_name", "IP"]))
    assert convert.flows_request(request)[1].paths == ("source.pod_name", "IP")
    for path in ("nothing", "source.nothing", "source.labels.x", "time.seconds.x", "", "ip"):
        assert (
            "field_mask"
            in refusal(observer_pb2.GetFlowsRequest(field_mask=PbMask(paths=[path]))).message
        )
    # Clients up to 1.16 send it elsewhere.
    old = observer_pb2.GetFlowsRequest()
    old.experimental.field_mask.paths.append("time")
    assert convert.flows_request(old)[1].paths == ("time",)
