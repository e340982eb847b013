"""Endpoints made from what policies speak of, for questions that are given none.

For every selector there is an endpoint that it selects, for pairs of selectors one that both do
where such a one can be, and strangers. Two sets of policies that decide alike about all of them may
still differ about labels in combinations of three or more; with the real endpoints nothing is left
open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Final

from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    SOURCE_ANY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_RESERVED,
    Label,
    LabelError,
    Labels,
)
from cilia.policy.api import Document, EndpointSelector, Requirement
from cilia.policy.questions.inventory import EndpointPort, Inventory, InventoryEndpoint
from cilia.policy.questions.inventory import endpoint_labels as with_place

MAX_ENDPOINTS: Final = 400
TWIN: Final = "'"  # marks the second of two endpoints with equal labels, who may talk too
_FIRST_PORT: Final = 30_000
Wanted = dict[tuple[str, str], str]  # by source and key


def sample(documents: Iterable[Document]) -> Inventory:
    """Endpoints that together meet what the documents tell apart."""
    given = tuple(documents)
    selectors: dict[EndpointSelector, None] = {}
    names: dict[str, int] = {}
    spaces = {"default": None, "elsewhere": None}
    for document in given:
        if document.namespace is not None:
            spaces[document.namespace] = None
        for rule in document.rules:
            selectors[rule.selector] = None
            for element in rule.elements:
                for peer in (*(element.peers or ()), *(element.requires or ())):
                    if isinstance(peer, EndpointSelector):
                        selectors[peer] = None
                for port in element.ports or ():
                    names.update((x.name, x.proto) for x in port.named)
    single = [x for selector in selectors for x in _meeting(selector.requirements)]
    pairs = (merged for a, b in combinations(single, 2) if (merged := _both(a, b)) is not None)
    ports = tuple(
        EndpointPort(name, _FIRST_PORT + i, proto or 6)
        for i, (name, proto) in enumerate(sorted(names.items()))
    )
    found: dict[Labels, None] = {}
    candidates = (
        *({(SOURCE_K8S, NAMESPACE_KEY): x} for x in spaces),
        *(
            {**wanted, (SOURCE_K8S, NAMESPACE_KEY): space}
            for wanted in single
            for space in ([_space(wanted)] if _space(wanted) else spaces)
        ),
    )
    for wanted in (*candidates, *pairs):
        if 2 * len(found) >= MAX_ENDPOINTS:
            break
        labels = _labels(wanted)
        if labels is not None:
            found[labels] = None
    return Inventory(
        endpoints=tuple(
            InventoryEndpoint(
                name=_name(labels, i) + twin,
                namespace=_namespace(labels),
                labels=labels,
                ports=ports,
            )
            for i, labels in enumerate(found)
            for twin in ("", TWIN)
        )
    )


def is_repeat(src: object, dst: object) -> bool:
    """Whether a pair says only what the same pair without twins says."""
    one, other = str(src), str(dst)
    if one.removesuffix(TWIN) == other.removesuffix(TWIN):
        return one.endswith(TWIN)
    return one.endswith(TWIN) or other.endswith(TWIN)


def _meeting(requirements: tuple[Requirement, ...]) -> Iterator[Wanted]:
    """Labels that meet all requirements: one for each value of each list of values."""
    base: Wanted = {}
    for x in requirements:
        source = SOURCE_K8S if x.source == SOURCE_ANY else x.source
        if source in (SOURCE_RESERVED, SOURCE_CIDR):
            return
        match x.operator:
            case "In":
                base[source, x.key] = x.values[0]
            case "Exists":
                base.setdefault((source, x.key), "x")
            case _:
                pass
    yield base
    for x in requirements:
        source = SOURCE_K8S if x.source == SOURCE_ANY else x.source
        if x.operator in ("In", "NotIn"):
            for value in x.values[:8]:
                yield {**base, (source, x.key): value}
        elif x.operator == "DoesNotExist":
            yield {**base, (source, x.key): "x"}


def _both(a: Wanted, b: Wanted) -> Wanted | None:
    if any(b.get(key, value) != value for key, value in a.items()):
        return None
    return {**a, **b}


def _space(wanted: Wanted) -> str:
    return wanted.get((SOURCE_K8S, NAMESPACE_KEY), "")


def _labels(wanted: Wanted) -> Labels | None:
    try:
        given = [Label(source, key, value) for (source, key), value in wanted.items()]
        return with_place(given, _space(wanted) or "default")
    except LabelError:
        return None


def _namespace(labels: Labels) -> str:
    found = labels.get(NAMESPACE_KEY)
    return found.value if found is not None else "default"


def _name(labels: Labels, number: int) -> str:
    """What it stands for; the number tells apart those whose labels of place alone differ."""
    own = [
        x
        for x in labels
        if x.key not in (NAMESPACE_KEY, CLUSTER_KEY)
        and x.key != f"{NAMESPACE_LABELS_PREFIX}kubernetes.io/metadata.name"
    ]
    text = ",".join(f"{x.key}={x.value}" if x.value else x.key for x in own) or "any"
    return f"{text}#{number}"
