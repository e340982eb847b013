"""One entry of ingress, egress, ingressDeny or egressDeny: peers, ports, and what cannot stand
together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from cilia.policy.api import (
    ENTITIES,
    AbsentSelector,
    Element,
    EntitySelector,
    PeerSelector,
    PortRule,
    ServiceSelector,
)
from cilia.policy.language.networks import CIDR_RULE, CidrPeer
from cilia.policy.language.ports import DENY_PORT_RULES, ICMPS, NO_ORIGIN, PORT_RULES
from cilia.policy.language.requests import FQDN_PEER
from cilia.policy.language.selectors import SELECTOR
from cilia.policy.schema import (
    INVALID,
    Anything,
    Checking,
    Choice,
    ListOf,
    Object,
    Text,
    Type,
    canonical,
)
from cilia.policy.tree import Node

MAX_PEERS: Final = 100_000  # a CIDRSet may be long


class _Absent:
    """A peer that is checked and carried, and that nothing can resolve yet."""

    def __init__(self, what: str, item: Type) -> None:
        self.what, self.model = what, item

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if self.model.check(node, path, c) is INVALID:
            return INVALID
        return AbsentSelector(self.what, canonical(node))


def _given(node: Node, name: str) -> bool:
    return name in node.value and node.value[name].value is not None


def _build_service(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    names = ("k8sService", "k8sServiceSelector")
    if sum(_given(node, name) for name in names) != 1:
        c.fault(path, node, f"needs either {' or '.join(names)}")
        return INVALID
    return next((v[name] for name in names if name in v), INVALID)


_SERVICE: Final = Object(
    {
        "k8sService": Object(
            {"serviceName": Text(max_length=253), "namespace": Text(max_length=63)},
            required=("serviceName",),
            build=lambda v, node, path, c: ServiceSelector(
                v.get("namespace", ""), name=v.get("serviceName", "")
            ),
        ),
        "k8sServiceSelector": Object(
            {"selector": SELECTOR, "namespace": Text(max_length=63)},
            required=("selector",),
            build=lambda v, node, path, c: ServiceSelector(
                v.get("namespace", ""), selector=v.get("selector")
            ),
        ),
    },
    build=_build_service,
)


def _peer_fields(side: str) -> dict[str, Type]:
    return {
        f"{side}Endpoints": ListOf(SELECTOR, MAX_PEERS),
        f"{side}CIDR": ListOf(CidrPeer(), MAX_PEERS),
        f"{side}CIDRSet": ListOf(CIDR_RULE, MAX_PEERS),
        f"{side}Entities": ListOf(_Entity(), 64),
        f"{side}Groups": ListOf(_Absent(f"{side}Groups", Anything()), 1000),
        f"{side}Nodes": ListOf(_Absent(f"{side}Nodes", SELECTOR), 1000),
    }


class _Entity:
    model: Final = Choice(ENTITIES, "entity")

    def check(self, node: Node, path: str, c: Checking) -> Any:
        word = self.model.check(node, path, c)
        return word if word is INVALID else EntitySelector(word)


class ElementType:
    """One entry of a rule's list. Gives an Element whose selectors are not yet scoped."""

    def __init__(self, *, egress: bool, deny: bool) -> None:
        self.egress, self.deny = egress, deny
        side = "to" if egress else "from"
        other = "from" if egress else "to"
        peers = _peer_fields(side)
        elsewhere = {
            name: (
                f"belongs to {'ingress' if egress else 'egress'}; "
                f"here it is {side}{name[len(other) :]}"
            )
            for name in (*_peer_fields(other), f"{other}Requires")
        }
        elsewhere |= {
            side: f"is a field of NetworkPolicy; here it is {side}Endpoints: [{{matchLabels: "
            f"...}}], {side}CIDR or another one of {side}...",
            "ports": "belongs below toPorts: toPorts: [{ports: [...]}]",
        }
        if egress:
            peers["toServices"] = ListOf(_SERVICE, 1000)
            if not deny:
                peers["toFQDNs"] = ListOf(FQDN_PEER, MAX_PEERS)
            else:
                elsewhere["toFQDNs"] = "a deny rule cannot name FQDNs"
        else:
            elsewhere |= {
                "toServices": "belongs to egress",
                "toFQDNs": "belongs to egress: where a peer may connect to",
            }
        self.peer_kinds = tuple(peers)
        self.requires = f"{side}Requires"
        fields: dict[str, Type] = {
            **peers,
            self.requires: ListOf(SELECTOR, 1000),
            "toPorts": DENY_PORT_RULES if deny else PORT_RULES,
            "icmps": ICMPS,
        }
        if not deny:
            fields["authentication"] = Object(
                {"mode": Choice(("disabled", "required", "test-always-fail"), "mode")},
                required=("mode",),
            )
        name = f"{'Egress' if egress else 'Ingress'}{'Deny' if deny else ''}Entry"
        self.model = Object(fields, build=self.build, elsewhere=elsewhere, name=name)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return self.model.check(node, path, c)

    def build(self, v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
        origin = c.mark(path, node)
        given = [name for name in self.peer_kinds if name in v]
        for name in given[1:]:
            c.fault(
                f"{path}.{name}",
                node.value[name],
                f"{given[0]} and {name} cannot stand together: write two entries",
            )
        peers: tuple[PeerSelector, ...] | None = tuple(v[given[0]]) if given else None
        ports: tuple[PortRule, ...] | None = None
        port_rules, icmps = v.get("toPorts"), v.get("icmps")
        if port_rules and icmps:
            c.fault(
                f"{path}.icmps",
                node.value["icmps"],
                "icmps and toPorts cannot stand together: write two entries",
            )
        for rule in port_rules or ():
            self.check_parser(rule, node.value["toPorts"], c)
        if port_rules or icmps:  # an empty list is like none
            ports = tuple(
                replace(x, origin=origin) if x.origin is NO_ORIGIN else x
                for x in (*(port_rules or ()), *(icmps or ()))
            )
        unenforced = ""
        mode = v.get("authentication", {}).get("mode", "disabled")
        if mode == "required":
            unenforced = "mutual authentication is not supported yet"
        elif mode == "test-always-fail":
            unenforced = "authentication mode test-always-fail never lets anything pass"
        if self.deny:
            self.check_denials(peers or (), node, path, c)
        element = Element(
            egress=self.egress,
            deny=self.deny,
            path=path,
            origin=origin,
            peers=peers,
            ports=ports,
            requires=tuple(v[self.requires]) if self.requires in v else None,
            unenforced=unenforced,
        )
        if given and peers == ():
            c.warn(f"{path}.{given[0]}", node.value[given[0]], "is empty: it selects nobody")
        elif self.deny and peers is None and ports is None and element.requires is None:
            c.warn(path, node, "has neither peers nor ports: it denies nothing")
        return element

    def check_parser(self, rule: PortRule, at: Node, c: Checking) -> None:
        if rule.l7 is not None and rule.l7.parser == "dns" and not self.egress:
            c.fault(
                f"{rule.path}.rules.dns", at, "dns rules belong to egress: what may be asked for"
            )

    def check_denials(
        self, peers: tuple[PeerSelector, ...], node: Node, path: str, c: Checking
    ) -> None:
        """Peers that nothing may ever resolve are a fault here: to ignore them would open."""
        named = [
            x.what if isinstance(x, AbsentSelector) else "toServices"
            for x in peers
            if isinstance(x, AbsentSelector | ServiceSelector)
        ]
        for what in dict.fromkeys(named):
            message = "is not supported in a deny rule: while nobody knows them, it denies nothing"
            c.fault(f"{path}.{what}", node.value.get(what) or node, message)
