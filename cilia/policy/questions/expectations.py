"""A table of what policy shall allow and deny, to be asked of the engine, the kernel and a lab.

policies: [../policies/star-wars]         # paths relative to this file
endpoints: ../endpoints/star-wars.yaml    # or the list itself
enforcement: default
tests:
- name: ships of the empire land
  from: tiefighter                        # an endpoint, address, reserved:host, or {label: value}
  to: [deathstar-1, deathstar-2]          # each of them
  port: 80/tcp                            # or a list; of ICMP the type: 8/icmp
  http: {method: POST, path: /v1/request-landing}
  expect: allow
  rule: deathstar-landing spec.ingress[0] # optional: one of those that decide
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cilia.policy.api import (
    PROTO_BY_NAME,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_TCP,
    Fault,
    Origin,
    RuleRef,
)
from cilia.policy.questions.inventory import (
    Inventory,
    InventoryError,
    read_inventory,
)
from cilia.policy.questions.requests import HTTPRequest
from cilia.policy.schema import (
    INVALID,
    Checking,
    Choice,
    ListOf,
    MapOf,
    Object,
    Text,
    shown,
)
from cilia.policy.tree import Node, TreeError, parse_text

MAX_TESTS: Final = 100_000
MAX_SIDES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """One connection and what shall become of it. Sides are texts as on the command line; several
    texts of one side are labels."""

    name: str
    src: tuple[str, ...]
    dst: tuple[str, ...]
    proto: int
    port: int
    request: HTTPRequest | None
    allow: bool
    rule: str
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file of expectations. `endpoints` is a path, or the endpoints themselves."""

    policies: tuple[str, ...]
    endpoints: str | Inventory | None
    mode: str
    tests: tuple[Expectation, ...]


class TableError(ValueError):
    """A file of expectations that is none; `faults` says why."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(map(str, faults[:5])))
        self.faults = faults


def names_rule(wanted: str, ref: RuleRef) -> bool:
    """Whether a rule is the one named: a policy (with or without kind and namespace), or one with
    the path in it."""
    policy = ref.policy
    spaced = policy.partition(" ")[2]
    names = (policy, spaced, spaced.rpartition("/")[2])
    return wanted in names or wanted in tuple(f"{x} {ref.path}" for x in names)


# ---- reading


class _Side:
    """A text, labels as a mapping, or a list of those. Gives a list of tuples of texts."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, list):
            if len(node.value) > MAX_SIDES or not node.value:
                c.fault(path, node, f"needs 1 to {MAX_SIDES} entries")
                return INVALID
            found = [self._one(x, f"{path}[{i}]", c) for i, x in enumerate(node.value)]
            return INVALID if INVALID in found else found
        one = self._one(node, path, c)
        return one if one is INVALID else [one]

    def _one(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, dict):
            labels = MapOf(Text(number_ok=True), 256).check(node, path, c)
            if labels is INVALID or not labels:
                if labels is not INVALID:
                    c.fault(path, node, "names no labels")
                return INVALID
            return tuple(f"{k}={v}" for k, v in labels.items())
        text = Text(max_length=4096).check(node, path, c)
        return text if text is INVALID else (text,)


def _port(text: str) -> tuple[int, int]:
    number, _, protocol = text.partition("/")
    proto = PROTO_BY_NAME.get(protocol.upper()) if protocol else PROTO_TCP
    if not (number.isascii() and number.isdigit()) or int(number) > 65535 or not proto:
        raise ValueError(
            f"{shown(text)} is not a port: write 80, 80/tcp, 53/udp, or of ICMP the type: 8/icmp"
        )
    if proto in (PROTO_ICMP, PROTO_ICMPV6) and int(number) > 255:
        raise ValueError(f"{shown(text)}: types of ICMP are 0 to 255")
    return proto, int(number)


class _Ports:
    """`80/tcp`, or a list of those."""

    item: Final = Text(_port, max_length=32, number_ok=True)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, list):
            found = ListOf(self.item, MAX_SIDES, "ports").check(node, path, c)
            if found == []:
                c.fault(path, node, "is empty")
                return INVALID
            return found
        one = self.item.check(node, path, c)
        return one if one is INVALID else [one]


_TEST: Final = Object(
    {
        "name": Text(max_length=1024),
        "from": _Side(),
        "to": _Side(),
        "port": _Ports(),
        "http": Object(
            {
                "method": Text(max_length=64),
                "path": Text(max_length=8192),
                "host": Text(max_length=255),
                "headers": MapOf(Text(max_length=8192, number_ok=True), 256),
            }
        ),
        "expect": Choice(("allow", "deny"), "expectation"),
        "rule": Text(max_length=1024),
    },
    required=("name", "from", "to", "port", "expect"),
)


class _Given:
    """A path, or endpoints written out; read later."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return node if not isinstance(node.value, str) else node.value


_TABLE: Final = Object(
    {
        "policies": ListOf(Text(max_length=4096), 1000),
        "endpoints": _Given(),
        "enforcement": Choice(("default", "always", "never"), "mode"),
        "tests": ListOf(_TEST, MAX_TESTS, "tests"),
    },
    required=("tests",),
)


def parse_table(text: bytes | str, *, source: str) -> Table:
    """Read a file of expectations, YAML or JSON. Raises TableError with every fault there is."""
    c = Checking(source, "expectations")
    try:
        nodes = parse_text(text)
    except TreeError as error:
        fault = Fault("expectations", "", error.message, Origin(source, error.line, error.column))
        raise TableError((fault,)) from None
    if len(nodes) != 1:
        at = nodes[1] if nodes else Node(None, 1, 1)
        c.fault("", at, "must be one document")
        raise TableError(tuple(c.faults))
    (node,) = nodes
    value = _TABLE.check(node, "", c)
    if c.faults or value is INVALID:
        raise TableError(tuple(c.faults))
    endpoints: str | Inventory | None = value.get("endpoints")
    if isinstance(endpoints, Node):
        try:
            endpoints = read_inventory(endpoints, source=source, path="endpoints")
        except InventoryError as error:
            raise TableError(error.faults) from None
    return Table(
        policies=tuple(value.get("policies", ())),
        endpoints=endpoints,
        mode=value.get("enforcement", "default"),
        tests=tuple(
            x
            for item, child in zip(value["tests"], node.value["tests"].value, strict=True)
            for x in _tests(item, child, source)
        ),
    )


def _tests(item: dict[str, Any], node: Node, source: str) -> list[Expectation]:
    """One entry: every source with every destination on every port."""
    http = item.get("http")
    request = None
    if http is not None:
        request = HTTPRequest(
            http.get("method", "GET"),
            http.get("path", "/"),
            http.get("host", ""),
            tuple(http.get("headers", {}).items()),
        )
    return [
        Expectation(
            name=item["name"],
            src=src,
            dst=dst,
            proto=proto,
            port=port,
            request=request,
            allow=item["expect"] == "allow",
            rule=item.get("rule", ""),
            origin=Origin(source, node.line, node.column),
        )
        for src in item["from"]
        for dst in item["to"]
        for proto, port in item["port"]
    ]
