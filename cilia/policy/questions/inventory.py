"""The endpoints that a question is about.

A file holds a list of endpoints, or a mapping that also gives namespaces their labels and the node
its own:

    namespaces: {shop: {team: red}}
    host: {labels: {rack: r7}}
    endpoints:
    - {name: web, namespace: shop, labels: {app: web}, ips: [10.0.0.5],
       ports: [{name: http, port: 80, protocol: TCP}]}

Labels get what every endpoint has: its namespace, its cluster, and the labels of its namespace,
among them the name, as every Kubernetes namespace carries it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Literal

from cilia.identity import HOST, reserved_labels
from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    SOURCE_K8S,
    SOURCE_RESERVED,
    SOURCE_UNSPEC,
    Label,
    LabelError,
    Labels,
    parse_selector_key,
)
from cilia.labels import namespace_labels as space_labels
from cilia.policy.api import MAX_PORT, PROTO_BY_NAME, Fault, Origin
from cilia.policy.schema import INVALID, Checking, Choice, Int, ListOf, MapOf, Object, Text, shown
from cilia.policy.tree import Node, TreeError, parse_text

MAX_ENDPOINTS: Final = 100_000
MAX_NAMESPACES: Final = 100_000
DEFAULT_CLUSTER: Final = "default"
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?\Z")

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, order=True)
class EndpointPort:
    """A port of an endpoint, known by a name to rules that name ports."""

    name: str
    port: int
    proto: int


def port_names(ports: Iterable[EndpointPort]) -> tuple[tuple[str, int, int], ...]:
    """Those that have a name, as the engine takes them."""
    return tuple(sorted({(x.name, x.port, x.proto) for x in ports if x.name}))


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryEndpoint:
    """One workload: the labels that make its identity, and what is known beside them."""

    name: str
    namespace: str
    labels: Labels
    ips: tuple[Address, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    mode: Literal["default", "always", "never"] | None = None  # its own; None: that of all

    @property
    def ref(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Every endpoint of a question, in the order given, and the node they run on."""

    endpoints: tuple[InventoryEndpoint, ...] = ()
    host: Labels = field(default_factory=lambda: reserved_labels(HOST))

    def find(self, ref: str, namespace: str = "default") -> InventoryEndpoint | None:
        """By `namespace/name`, by `name` in the namespace given, or by address."""
        wanted = ref if "/" in ref else f"{namespace}/{ref}"
        for endpoint in self.endpoints:
            if endpoint.ref == wanted:
                return endpoint
        try:
            address = ip_address(ref)
        except ValueError:
            return None
        return next((x for x in self.endpoints if address in x.ips), None)


def endpoint_labels(
    given: Iterable[Label],
    namespace: str,
    namespace_labels: Mapping[str, str] | None = None,
    cluster: str = DEFAULT_CLUSTER,
) -> Labels:
    """An endpoint's own labels with those that its place gives it. Raises LabelError."""
    mine = list(given)
    keys = {x.key for x in mine}
    place = (
        Label(SOURCE_K8S, CLUSTER_KEY, cluster),
        *space_labels(namespace, namespace_labels),
    )
    return Labels((*mine, *(x for x in place if x.key not in keys)))


# ---- reading


class _Labels:
    """`{app: web}`, or `["k8s:app=web"]`. Without a source a label is of source k8s."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, list):
            texts = ListOf(Text(max_length=1500), 256, "labels").check(node, path, c)
            if texts is INVALID:
                return INVALID
            pairs = [(text, node) for text in texts]
        else:
            values = MapOf(_Value(), 256, _key).check(node, path, c)
            if values is INVALID:
                return INVALID
            pairs = [(f"{k}={v}", node.value[k]) for k, v in values.items()]
        found = []
        for text, at in pairs:
            try:
                label = Label.parse(text)
                if label.source == SOURCE_UNSPEC:
                    label = Label(SOURCE_K8S, label.key, label.value)
                found.append(label)
            except LabelError as error:
                c.fault(path, at, str(error))
                return INVALID
        return found


class _Value:
    """A label's value; numbers and truth values are taken as their text."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        match node.value:
            case None:
                return ""
            case bool():
                return "true" if node.value else "false"
            case _:
                return Text(number_ok=True).check(node, path, c)


def _key(text: str) -> tuple[str, str]:
    return parse_selector_key(text)


def _name(text: str) -> str:
    if not _NAME.match(text):
        raise ValueError(
            f"{shown(text)} is not a name: letters, digits, '-', '_' and '.', beginning and ending "
            "with a letter or digit"
        )
    return text


def _address(text: str) -> Address:
    try:
        return ip_address(text.partition("/")[0])
    except ValueError:
        raise ValueError(f"{shown(text)} is not an IPv4 or IPv6 address") from None


_ENDPOINT: Final = Object(
    {
        "name": Text(_name, max_length=253, number_ok=True),
        "namespace": Text(_name, max_length=63, number_ok=True),
        "labels": _Labels(),
        "ips": ListOf(Text(_address, max_length=64), 64, "addresses"),
        "ports": ListOf(
            Object(
                {
                    "name": Text(max_length=63),
                    "port": Int(1, MAX_PORT),
                    "protocol": Choice(("TCP", "UDP", "SCTP"), "protocol", any_case=True),
                },
                required=("port",),
            ),
            1000,
            "ports",
        ),
    },
    required=("name",),
)
_ENDPOINTS: Final = ListOf(_ENDPOINT, MAX_ENDPOINTS, "endpoints")


class _NamespaceLabels:
    """Labels of a namespace; nothing is none."""

    labels: Final = MapOf(_Value(), 256)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return {} if node.value is None else self.labels.check(node, path, c)


_NAMESPACES: Final = MapOf(_NamespaceLabels(), MAX_NAMESPACES)
_HOST: Final = Object({"labels": _Labels()})


class InventoryError(ValueError):
    """A file of endpoints that is none; `faults` says why."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(map(str, faults[:5])))
        self.faults = faults


def parse_inventory(text: bytes | str, *, source: str) -> Inventory:
    """Read a list of endpoints, YAML or JSON. Raises InventoryError with every fault there is."""
    try:
        nodes = parse_text(text)
    except TreeError as error:
        fault = Fault("endpoints", "", error.message, Origin(source, error.line, error.column))
        raise InventoryError((fault,)) from None
    if len(nodes) > 1:
        c = Checking(source, "endpoints")
        c.fault("", nodes[1], "there is a second document: endpoints are one list")
        raise InventoryError(tuple(c.faults))
    return read_inventory(nodes[0] if nodes else Node([], 0, 0), source=source)


def read_inventory(node: Node, *, source: str, path: str = "") -> Inventory:
    """Read endpoints that stand inside of another file, under `path`. Raises InventoryError."""
    c = Checking(source, "endpoints")
    namespaces: Any = {}
    host: Any = {}
    at, where = node, path
    if isinstance(node.value, dict):
        top = Object(
            {"namespaces": _NAMESPACES, "host": _HOST, "endpoints": _Later()},
            required=("endpoints",),
        ).check(node, path, c)
        if top is not INVALID:
            namespaces, host = top.get("namespaces", {}), top.get("host", {})
            at, where = node.value["endpoints"], f"{path}.endpoints" if path else "endpoints"
    found = _ENDPOINTS.check(at, where, c) if not c.faults else []
    endpoints: list[InventoryEndpoint] = []
    seen: dict[str, int] = {}
    if not c.faults:
        for i, item in enumerate(found):
            child = at.value[i]
            built = _build(item, child, f"{where}[{i}]", namespaces, c)
            if built is None:
                continue
            if built.ref in seen:
                line = at.value[seen[built.ref]].line
                message = f"{built.ref} is also the name of the one in line {line}"
                c.fault(f"{where}[{i}]", child, message)
            seen[built.ref] = i
            endpoints.append(built)
    own = Labels((*reserved_labels(HOST), *host.get("labels", ())))
    if c.faults:
        raise InventoryError(tuple(c.faults))
    return Inventory(endpoints=tuple(endpoints), host=own)


class _Later:
    """Checked by its own rules afterwards."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return node


def _build(
    item: dict[str, Any], node: Node, path: str, namespaces: Mapping[str, Any], c: Checking
) -> InventoryEndpoint | None:
    namespace = item.get("namespace", "default")
    given: list[Label] = item.get("labels", [])
    space = next((x for x in given if x.key == NAMESPACE_KEY), None)
    if space is not None and space.value != namespace:
        c.fault(
            f"{path}.labels",
            node,
            f"the label {space} contradicts the namespace {namespace}",
        )
        return None
    try:
        # A reserved identity is no workload: it is in no namespace.
        labels = (
            Labels(given)
            if any(x.source == SOURCE_RESERVED for x in given)
            else endpoint_labels(given, namespace, namespaces.get(namespace))
        )
    except LabelError as error:
        c.fault(f"{path}.labels", node, str(error))
        return None
    ports = [
        EndpointPort(x.get("name", ""), x["port"], PROTO_BY_NAME[x.get("protocol", "TCP")])
        for x in item.get("ports", [])
    ]
    return InventoryEndpoint(
        name=item["name"],
        namespace=namespace,
        labels=labels,
        ips=tuple(item.get("ips", ())),
        ports=tuple(ports),
    )
