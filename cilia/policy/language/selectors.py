"""Label selectors: Cilium's, whose keys may name a source, and Kubernetes', whose keys may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from cilia.labels import (
    SOURCE_ANY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_UNSPEC,
    Label,
    LabelError,
    parse_selector_key,
)
from cilia.policy.api import EndpointSelector, Requirement
from cilia.policy.schema import (
    INVALID,
    Checking,
    Choice,
    Either,
    ListOf,
    MapOf,
    Null,
    Object,
    Text,
    shown,
)
from cilia.policy.tree import Node

DNS_SUBDOMAIN: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z"
)
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
_KUBERNETES_SOURCES: Final = (SOURCE_ANY, SOURCE_K8S, SOURCE_UNSPEC)
MAX_KEYS: Final = 256
MAX_VALUES: Final = 1024

Key = tuple[str, str]  # source, key


def _check_kubernetes_key(key: str, text: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if slash and not DNS_SUBDOMAIN.match(prefix):
        raise ValueError(f"label key {shown(text)}: the part before '/' must be a DNS subdomain")
    if not _LABEL_NAME.match(name):
        raise ValueError(
            f"label key {shown(text)} must be letters, digits, '-', '_' and '.', begin and "
            "end with a letter or digit, at most 63 characters"
        )


def selector_key(text: str) -> Key:
    """``source:key`` or ``key`` (of any source). Raises ValueError."""
    source, key = parse_selector_key(text)
    if source == SOURCE_CIDR:
        raise ValueError("prefixes are selected with fromCIDR, toCIDR, fromCIDRSet and toCIDRSet")
    if source in _KUBERNETES_SOURCES:
        _check_kubernetes_key(key, text)
    return source, key


def kubernetes_key(text: str) -> Key:
    """A label key of Kubernetes: of source k8s. Raises ValueError."""
    if ":" in text:
        raise ValueError(f"label key {shown(text)}: a key of Kubernetes names no source")
    if not text:
        raise ValueError("a label key cannot be empty")
    _check_kubernetes_key(text, text)
    return SOURCE_K8S, text


def _wrong_value(text: str, source: str) -> str | None:
    """Why the text cannot be the value of a label of this source; None when it can."""
    if source in _KUBERNETES_SOURCES and not _LABEL_VALUE.match(text):
        return (
            f"label value {shown(text)} must be letters, digits, '-', '_' and '.', begin and end "
            "with a letter or digit, at most 63 characters"
        )
    try:
        Label(SOURCE_ANY, "key", text)
    except LabelError as error:
        return str(error).partition(": ")[2] or str(error)
    return None


def _build_expression(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "key" not in v or "operator" not in v:
        return INVALID
    source, key = v["key"]
    values = v.get("values", [])
    if v["operator"] in ("In", "NotIn"):
        if not values:
            if not (given := node.value.get("values")) or not given.value:
                c.fault(f"{path}.values", node, f"{v['operator']} needs at least one value")
            return INVALID
        for i, value in enumerate(values):
            if wrong := _wrong_value(value, source):
                c.fault(f"{path}.values[{i}]", node.value["values"].value[i], wrong)
                return INVALID
        return Requirement(source, key, v["operator"], tuple(sorted(set(values))))
    if values:
        c.fault(f"{path}.values", node.value["values"], f"{v['operator']} takes no values")
        return INVALID
    return Requirement(source, key, v["operator"])


class _LabelText:
    """A value of matchLabels; null is the empty one, as in `reserved:host:` unquoted."""

    model: Final = Either((Text(), Null()))

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if node.value is None:
            return ""
        return self.model.types[0].check(node, path, c)


def _selector(name: str, parse_key: Callable[[str], Key]) -> Object:
    def build(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
        requirements = []
        for name, value in v.get("matchLabels", {}).items():
            source, key = parse_key(name)
            if wrong := _wrong_value(value, source):
                at = node.value["matchLabels"].value[name]
                c.fault(f"{path}.matchLabels[{name[:80]}]", at, wrong)
            requirements.append(Requirement(source, key, "In", (value,)))
        requirements += v.get("matchExpressions", [])
        return EndpointSelector(tuple(dict.fromkeys(requirements)))

    expression = Object(
        {
            "key": Text(parse_key),
            "operator": Choice(("In", "NotIn", "Exists", "DoesNotExist"), "operator"),
            "values": ListOf(Text(), MAX_VALUES, "values"),
        },
        required=("key", "operator"),
        build=_build_expression,
    )
    return Object(
        {
            "matchLabels": MapOf(_LabelText(), max_items=MAX_KEYS, key=parse_key),
            "matchExpressions": ListOf(expression, MAX_KEYS),
        },
        build=build,
        name=name,
    )


SELECTOR: Final = _selector("Selector", selector_key)
KUBERNETES_SELECTOR: Final = _selector("KubernetesSelector", kubernetes_key)
