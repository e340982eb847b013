"""One rule (a spec): whom it is about, its lists, and which directions it isolates."""

from __future__ import annotations

from typing import Any, Final

from cilia.labels import SOURCE_GENERATED, SOURCE_UNSPEC, Label, LabelError, Labels
from cilia.policy.api import Element, Origin, Rule
from cilia.policy.language.elements import ElementType
from cilia.policy.language.selectors import SELECTOR
from cilia.policy.schema import INVALID, Bool, Checking, Either, ListOf, Object, Text
from cilia.policy.tree import Node

MAX_ELEMENTS: Final = 10_000  # in one list of one rule


class _RuleLabels:
    text: Final = Text()
    mapping: Final = Object({"key": Text(), "value": Text(), "source": Text()}, required=("key",))
    model: Final = Either((text, mapping))

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, dict):
            v = self.mapping.check(node, path, c)
            if v is INVALID:
                return INVALID
            text = f"{v.get('source') or SOURCE_UNSPEC}:{v['key']}={v.get('value', '')}"
        else:
            text = self.text.check(node, path, c)
            if text is INVALID:
                return INVALID
        try:
            label = Label.parse(text)
        except LabelError as error:
            c.fault(path, node, str(error))
            return INVALID
        if label.source == SOURCE_GENERATED:
            c.fault(path, node, f"labels of source {SOURCE_GENERATED} cannot be given by users")
            return INVALID
        return label


def _given(node: Node, name: str) -> bool:
    return name in node.value and node.value[name].value is not None


def _check_host(elements: tuple[Element, ...], node: Node, c: Checking) -> None:
    for element in elements:
        for rule in element.ports or ():
            if rule.l7 is not None:
                c.fault(rule.path, node, "a rule about nodes has ports only: no proxy stands there")


_LISTS: Final = ("ingress", "ingressDeny", "egress", "egressDeny")


def _build_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    isolates: dict[bool, tuple[str, Origin] | None] = {False: None, True: None}
    switch = v.get("enableDefaultDeny", {})
    for name in _LISTS:
        egress = name.startswith("egress")
        at = node.value.get(name)
        if at is None or not at.value:
            continue
        wanted = switch.get("egress" if egress else "ingress")
        if wanted is not False and isolates[egress] is None:
            where = f"{path}.{name}" if path else name
            line, column = (node.keys or {}).get(name, (at.line, at.column))
            isolates[egress] = where, c.mark(where, Node(None, line, column))
    elements = tuple(x for name in _LISTS for x in v.get(name, []))
    if not any(node.value.get(name) and node.value[name].value for name in _LISTS):
        c.warn(path, node, "has neither ingress nor egress rules: it has no effect")
    which = [x for x in ("endpointSelector", "nodeSelector") if _given(node, x)]
    where = f"{path}.{which[-1] if which else 'endpointSelector'}".removeprefix(".")
    if len(which) == 2:
        c.fault(
            where, node.value[which[1]], "cannot stand beside endpointSelector: write two rules"
        )
        return INVALID
    if not which:
        if "podSelector" in node.value:
            return INVALID  # which is a fault, and says what to write instead
        c.fault(where, node, "is missing; {} selects every endpoint")
        return INVALID
    host = which == ["nodeSelector"]
    if host:
        _check_host(elements, node, c)
    if which[0] not in v:
        return INVALID
    try:
        labels = Labels(v.get("labels", []))
    except LabelError as error:
        c.fault(f"{path}.labels", node, str(error))
        labels = Labels()
    return Rule(
        selector=v[which[0]],
        node=host,
        elements=elements,
        path=path,
        origin=c.mark(path, node),
        isolates_ingress=isolates[False],
        isolates_egress=isolates[True],
        labels=labels,
        description=v.get("description", ""),
    )


RULE: Final = Object(
    {
        "endpointSelector": SELECTOR,
        "nodeSelector": SELECTOR,
        **{
            name: ListOf(
                ElementType(egress=name.startswith("egress"), deny=name.endswith("Deny")),
                MAX_ELEMENTS,
            )
            for name in _LISTS
        },
        "enableDefaultDeny": Object({"ingress": Bool(), "egress": Bool()}),
        "labels": ListOf(_RuleLabels(), 256),
        "description": Text(max_length=64 << 10),
        "log": Object({"value": Text(max_length=1024)}),
    },
    build=_build_rule,
    elsewhere={
        "podSelector": "is a field of NetworkPolicy; here it is endpointSelector",
        "policyTypes": "is a field of NetworkPolicy; here a rule isolates in the directions that "
        "it has entries for",
    },
    name="Rule",
)
