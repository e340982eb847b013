"""What the namespace of a document adds to its selectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from cilia.labels import (
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    NAMESPACE_NAME_KEY,
    SOURCE_ANY,
    SOURCE_K8S,
    SOURCE_RESERVED,
)
from cilia.policy.api import EndpointSelector, Kind, PeerSelector, Requirement, Rule
from cilia.policy.schema import Checking
from cilia.policy.tree import Node

_NAME_LABEL: Final = NAMESPACE_LABELS_PREFIX + NAMESPACE_NAME_KEY
NAMESPACE_EXISTS: Final = Requirement(SOURCE_K8S, NAMESPACE_KEY, "Exists")


def _names_namespace(selector: EndpointSelector) -> bool:
    return any(
        x.source in (SOURCE_K8S, SOURCE_ANY)
        and (x.key == NAMESPACE_KEY or x.key.startswith(NAMESPACE_LABELS_PREFIX))
        for x in selector.requirements
    )


def _scope_subject(
    selector: EndpointSelector, namespace: str, path: str, c: Checking, node: Node
) -> EndpointSelector:
    """A namespaced rule is about endpoints of its own namespace, whatever its selector says."""
    if selector.mentions("init", SOURCE_RESERVED):
        return selector
    own = Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,))
    kept = []
    for requirement in selector.requirements:
        if requirement.key == NAMESPACE_KEY and requirement.source in (SOURCE_K8S, SOURCE_ANY):
            if requirement.operator != "In" or requirement.values != (namespace,):
                c.warn(
                    f"{path}.endpointSelector" if path else "endpointSelector",
                    node,
                    f"names another namespace ({requirement}); "
                    f"the rule stays one of namespace {namespace}",
                )
        else:
            kept.append(requirement)
    return EndpointSelector((*kept, own))


def _scope_peer(
    selector: PeerSelector, kind: str, namespace: str | None, *, reserved_stays: bool
) -> PeerSelector:
    if not isinstance(selector, EndpointSelector) or kind == Kind.RULES:
        return selector
    selector = _by_name(selector)
    if reserved_stays and selector.mentions_source(SOURCE_RESERVED):
        return selector
    if _names_namespace(selector):
        # "not in namespace x" means other endpoints, never the world or the host.
        return selector.plus(NAMESPACE_EXISTS)
    if namespace is None:
        return selector.plus(NAMESPACE_EXISTS)
    return selector.plus(Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,)))


def _by_name(selector: EndpointSelector) -> EndpointSelector:
    """Asks for a namespace by the label of its name as by its name, which every endpoint has."""
    if not selector.mentions(_NAME_LABEL):
        return selector
    return EndpointSelector(
        tuple(
            Requirement(SOURCE_K8S, NAMESPACE_KEY, x.operator, x.values)
            if x.key == _NAME_LABEL and x.source in (SOURCE_K8S, SOURCE_ANY)
            else x
            for x in selector.requirements
        )
    )


def scope_rule(rule: Rule, kind: str, namespace: str | None, c: Checking, node: Node) -> Rule:
    selector = rule.selector
    if rule.node and kind == Kind.CNP:
        c.fault(
            f"{rule.path}.nodeSelector",
            node.value["nodeSelector"],
            f"nodes are in no namespace: write a {Kind.CCNP}",
        )
    init = selector.mentions("init", SOURCE_RESERVED)
    if kind != Kind.RULES:
        selector = _by_name(selector)
    if namespace is not None:
        selector = _scope_subject(selector, namespace, rule.path, c, node)
    elements = []
    for x in rule.elements:
        peers, requires = x.peers, x.requires
        if not (init and kind == Kind.CNP):
            if peers is not None:
                peers = tuple(_scope_peer(p, kind, namespace, reserved_stays=True) for p in peers)
            if requires is not None:
                scoped = (_scope_peer(p, kind, namespace, reserved_stays=False) for p in requires)
                requires = tuple(p for p in scoped if isinstance(p, EndpointSelector))
        elements.append(replace(x, peers=peers, requires=requires))
    return replace(rule, selector=selector, elements=tuple(elements))
