"""Kubernetes' NetworkPolicy (networking.k8s.io/v1) as one rule.

Kubernetes' words mean other things than Cilium's: an empty list of peers or ports is everyone and
everything, a peer without a namespace selector is of the policy's own namespace, and `policyTypes`
alone isolate. What is refused here, Kubernetes' API server refuses too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cilia.labels import (
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    NAMESPACE_NAME_KEY,
    SOURCE_K8S,
)
from cilia.policy.api import (
    L4,
    MAX_PORT,
    CidrSelector,
    Element,
    EndpointSelector,
    NamedPort,
    Origin,
    PeerSelector,
    PortRule,
    Requirement,
    Rule,
)
from cilia.policy.language.networks import MAX_EXCEPTS, Cidr, cidr_except
from cilia.policy.language.ports import PROTOCOLS, of_any, port_name
from cilia.policy.language.selectors import KUBERNETES_SELECTOR
from cilia.policy.schema import (
    INVALID,
    Checking,
    Choice,
    Either,
    Int,
    ListOf,
    Object,
    Text,
    kind_of,
    shown,
)
from cilia.policy.tree import Node

API_VERSION: Final = "networking.k8s.io/v1"
MAX_RULES: Final = 10_000  # in one list
MAX_PEERS: Final = 10_000  # of one rule
MAX_PORTS: Final = 1_000  # of one rule
_NAMESPACE_EXISTS: Final = Requirement(SOURCE_K8S, NAMESPACE_KEY, "Exists")
_DIRECTIONS: Final = ("Ingress", "Egress")


# ---- ports


class _Port:
    """A number, or the name of a port: text is always a name, as in Kubernetes."""

    number: Final = Int(1, MAX_PORT)
    name: Final = Text(port_name)
    model: Final = Either((number, name))

    def check(self, node: Node, path: str, c: Checking) -> Any:
        value = node.value
        if isinstance(value, str):
            if value.isascii() and value.isdigit():
                c.fault(
                    path, node, f"{shown(value)} is text, so a name: write {value} without quotes"
                )
                return INVALID
            return self.name.check(node, path, c)
        if isinstance(value, bool) or not isinstance(value, int):
            c.fault(path, node, f"must be a number or a name, not {kind_of(value)}")
            return INVALID
        return self.number.check(node, path, c)


def _build_port(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    proto = PROTOCOLS[v.get("protocol", "TCP")]
    port, end = v.get("port"), v.get("endPort")
    if end is not None:
        at = node.value["endPort"]
        if port is None:
            if "port" not in node.value or node.value["port"].value is None:
                c.fault(f"{path}.endPort", at, "needs port, where the range begins")
            return INVALID
        if isinstance(port, str):
            c.fault(f"{path}.endPort", at, "a named port has no range")
            return INVALID
        if end < port:
            c.fault(f"{path}.endPort", at, f"{end} is below port {port}")
            return INVALID
    if isinstance(port, str):
        return NamedPort(port, proto)
    return L4(proto) if port is None else L4(proto, port, end or port)


_PORTS: Final = ListOf(
    Object(
        {
            "port": _Port(),
            "endPort": Int(1, MAX_PORT),
            "protocol": Choice(("TCP", "UDP", "SCTP"), "protocol"),
        },
        build=_build_port,
        name="NetworkPolicyPort",
    ),
    MAX_PORTS,
    "ports",
)


# ---- peers


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer before the policy's namespace is known."""

    selector: EndpointSelector | CidrSelector
    own_namespace: bool
    path: str
    origin: Origin

    def of(self, namespace: str) -> PeerSelector:
        if not self.own_namespace or not isinstance(self.selector, EndpointSelector):
            return self.selector
        return self.selector.plus(Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,)))


def namespace_requirements(selector: EndpointSelector) -> tuple[Requirement, ...]:
    """A selector of namespaces, as requirements of the endpoints in them.

    A namespace's name is asked of the endpoint itself, which has it whether or not anybody told
    this node of the namespace's labels.
    """
    return (
        *(
            Requirement(SOURCE_K8S, NAMESPACE_KEY, x.operator, x.values)
            if x.key == NAMESPACE_NAME_KEY
            else Requirement(SOURCE_K8S, NAMESPACE_LABELS_PREFIX + x.key, x.operator, x.values)
            for x in selector.requirements
        ),
        _NAMESPACE_EXISTS,
    )


def _build_block(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    return cidr_except(v, node, path, c, strict=True)


def _build_peer(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    given = [name for name, child in node.value.items() if child.value is not None]
    if not given:
        c.fault(path, node, "needs podSelector, namespaceSelector or ipBlock")
        return INVALID
    if "ipBlock" in given and len(given) > 1:
        c.fault(path, node, "ipBlock cannot stand with a selector: write two entries")
        return INVALID
    if any(name not in v for name in given):
        return INVALID
    origin = c.mark(path, node)
    if "ipBlock" in v:
        return _Peer(v["ipBlock"], False, path, origin)
    selector: EndpointSelector = v.get("podSelector", EndpointSelector())
    if "namespaceSelector" not in v:
        return _Peer(selector, True, path, origin)
    return _Peer(
        selector.plus(*namespace_requirements(v["namespaceSelector"])), False, path, origin
    )


_PEERS: Final = ListOf(
    Object(
        {
            "podSelector": KUBERNETES_SELECTOR,
            "namespaceSelector": KUBERNETES_SELECTOR,
            "ipBlock": Object(
                {
                    "cidr": Cidr(need_length=True),
                    "except": ListOf(Cidr(need_length=True), MAX_EXCEPTS),
                },
                required=("cidr",),
                build=_build_block,
            ),
        },
        build=_build_peer,
        name="NetworkPolicyPeer",
    ),
    MAX_PEERS,
    "peers",
)


# ---- rules


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of ingress or egress."""

    peers: tuple[_Peer, ...]  # none: everyone
    ports: tuple[PortRule, ...] | None
    path: str
    origin: Origin

    def elements(self, egress: bool, namespace: str) -> tuple[Element, ...]:
        if not self.peers:
            everyone = (EndpointSelector(),)
            return (
                Element(
                    egress=egress,
                    deny=False,
                    path=self.path,
                    origin=self.origin,
                    peers=everyone,
                    ports=self.ports,
                ),
            )
        return tuple(
            Element(
                egress=egress,
                deny=False,
                path=peer.path,
                origin=peer.origin,
                peers=(peer.of(namespace),),
                ports=self.ports,
            )
            for peer in self.peers
        )


def _entries(side: str, other: str) -> ListOf:
    def build(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
        origin = c.mark(path, node)
        ports: tuple[PortRule, ...] | None = None
        if v.get("ports"):
            found = v["ports"]
            ports = (
                PortRule(
                    l4=of_any(found),
                    named=tuple(dict.fromkeys(x for x in found if isinstance(x, NamedPort))),
                    path=f"{path}.ports",
                    origin=origin,
                ),
            )
        return _Entry(tuple(v.get(side, ())), ports, path, origin)

    direction = "ingress" if side == "from" else "egress"
    elsewhere = {
        other: f"in {direction}, peers are listed under `{side}`",
        "toPorts": "is a field of CiliumNetworkPolicy; here it is ports: [{port: ...}]",
        f"{side}Endpoints": "is a field of CiliumNetworkPolicy; "
        f"here it is {side}: [{{podSelector: {{matchLabels: ...}}}}]",
        f"{side}CIDR": f"is a field of CiliumNetworkPolicy; here it is {side}: [{{ipBlock: ...}}]",
    }
    return ListOf(
        Object({side: _PEERS, "ports": _PORTS}, build=build, elsewhere=elsewhere), MAX_RULES
    )


def _isolated(v: dict[str, Any], node: Node, path: str, c: Checking) -> dict[bool, bool]:
    """By direction (egress): whether the policy isolates in it."""
    if types := v.get("policyTypes"):
        found = {False: "Ingress" in types, True: "Egress" in types}
        for egress, name in ((False, "ingress"), (True, "egress")):
            if v.get(name) and not found[egress]:
                c.warn(
                    f"{path}.{name}",
                    node.value[name],
                    f"is ignored: policyTypes does not list {_DIRECTIONS[egress]}",
                )
        return found
    return {False: True, True: bool(v.get("egress"))}


def _build_spec(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    isolated = _isolated(v, node, path, c)
    if "podSelector" not in node.value or node.value["podSelector"].value is None:
        c.warn(path, node, "has no podSelector: it is about every pod of the namespace")
    sources: dict[bool, tuple[str, Origin] | None] = {False: None, True: None}
    for egress, name in ((False, "ingress"), (True, "egress")):
        if not isolated[egress]:
            continue
        at, where = node, path
        for field in (name, "policyTypes"):
            given = node.value.get(field)
            if given is not None and given.value:
                line, column = (node.keys or {}).get(field, (given.line, given.column))
                at, where = Node(None, line, column), f"{path}.{field}"
                break
        sources[egress] = where, c.mark(where, at)
    return _Spec(
        selector=v.get("podSelector", EndpointSelector()),
        entries={
            egress: tuple(v.get(name, ())) if isolated[egress] else ()
            for egress, name in ((False, "ingress"), (True, "egress"))
        },
        isolates=sources,
        path=path,
        origin=c.mark(path, node),
    )


@dataclass(frozen=True, slots=True)
class _Spec:
    selector: EndpointSelector
    entries: dict[bool, tuple[_Entry, ...]]
    isolates: dict[bool, tuple[str, Origin] | None]
    path: str
    origin: Origin


SPEC: Final = Object(
    {
        "podSelector": KUBERNETES_SELECTOR,
        "policyTypes": ListOf(Choice(_DIRECTIONS, "policy type"), 2, "policy types"),
        "ingress": _entries("from", "to"),
        "egress": _entries("to", "from"),
    },
    build=_build_spec,
    elsewhere={
        "endpointSelector": "is a field of CiliumNetworkPolicy; here it is podSelector",
        **dict.fromkeys(
            ("ingressDeny", "egressDeny", "enableDefaultDeny", "nodeSelector"),
            "is a field of CiliumNetworkPolicy; NetworkPolicy has nothing like it",
        ),
    },
    name="NetworkPolicySpec",
)


def read_spec(node: Node, path: str, namespace: str, c: Checking) -> Rule | None:
    """The rule that a `spec` stands for; None when it holds a fault, which is recorded."""
    spec = SPEC.check(node, path, c)
    if spec is INVALID:
        return None
    own = Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,))
    return Rule(
        selector=spec.selector.plus(own),
        elements=tuple(
            element
            for egress in (False, True)
            for entry in spec.entries[egress]
            for element in entry.elements(egress, namespace)
        ),
        path=spec.path,
        origin=spec.origin,
        isolates_ingress=spec.isolates[False],
        isolates_egress=spec.isolates[True],
    )
