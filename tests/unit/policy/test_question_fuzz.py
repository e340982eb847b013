"""Files for questions, whatever they hold: an answer or faults, never another exception."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cilia.policy.questions.expectations import TableError, parse_table
from cilia.policy.questions.inventory import Inventory, InventoryError, parse_inventory
from cilia.policy.questions.scene import Scene
from cli.ends import flow
from cli.errors import CliError

WORDS = [
    "name", "namespace", "labels", "ips", "ports", "endpoints", "namespaces", "host",
    "protocol", "port", "tests", "from", "to", "expect", "http", "method", "rule", "policies",
    "allow", "flow", "source", "destination", "l4", "TCP", "IP", "address", "type", "url",
    "icmp", "80/tcp", "k8s:a=b", "10.0.0.1", "reserved:world", "cidr:10.0.0.0/8", "a", "=",
    ":", "l7", "is_reply", "source_port", "destination_port",
]  # fmt: skip
words = st.sampled_from([*WORDS, "\x00"])
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(), inner),
    max_leaves=24,
)
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(values)
def test_endpoints(value: Any) -> None:
    with contextlib.suppress(InventoryError):
        assert isinstance(parse_inventory(json.dumps(value), source="x"), Inventory)


@quick
@given(values)
def test_tables(value: Any) -> None:
    with contextlib.suppress(TableError):
        parse_table(json.dumps(value), source="x")


@quick
@given(st.text() | st.binary(max_size=200))
def test_texts(text: str | bytes) -> None:
    with contextlib.suppress(InventoryError):
        parse_inventory(text, source="x")
    with contextlib.suppress(TableError):
        parse_table(text, source="x")


SCENE = Scene((), Inventory())
ends = st.fixed_dictionaries(
    {},
    optional={
        "address": st.sampled_from(["10.0.0.1", "::1", "x"]) | values,
        "labels": st.lists(words, max_size=3) | values,
        "port": st.integers() | values,
        "pod_name": values,
        "name": values,
    },
)
flows = st.fixed_dictionaries(
    {"source": ends},
    optional={
        "destination": ends | values,
        "protocol": st.sampled_from(["TCP", "ICMP", "x"]) | values,
        "icmp": values,
        "reply": values,
        "l4": st.dictionaries(st.sampled_from(["TCP", "ICMPv4", "SCTP"]), values) | values,
        "IP": st.dictionaries(st.sampled_from(["source", "destination"]), values) | values,
        "l7": st.fixed_dictionaries({"http": values}) | values,
        "http": values,
    },
)


@quick
@given(values | flows | st.fixed_dictionaries({"flow": flows}))
def test_flows(value: Any) -> None:
    with contextlib.suppress(CliError):
        flow(SCENE, json.dumps(value))


def test_aliases_do_not_blow_up() -> None:
    levels = "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(InventoryError) as caught:
        parse_inventory(f"- &a0 [x]\n{levels}", source="x")
    assert "aliases" in caught.value.faults[0].message
