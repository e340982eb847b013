"""Labels: what a workload is, as policy and identity see it.

A label is ``source:key=value``. A set of labels holds one label a key; merging overwrites. Both
types are immutable and hashable, and every length is bounded, because labels arrive from container
runtimes and from people. The canonical form (``source:key=value;`` for each label, sorted by key)
is what identity allocation hashes, so the characters that delimit it are refused inside keys and
values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import total_ordering
from typing import Final

SOURCE_K8S: Final = "k8s"
SOURCE_CONTAINER: Final = "container"
SOURCE_RESERVED: Final = "reserved"
SOURCE_CIDR: Final = "cidr"
SOURCE_UNSPEC: Final = "unspec"
SOURCE_ANY: Final = "any"
SOURCE_GENERATED: Final = "cilium-generated"

NAMESPACE_KEY: Final = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS_PREFIX: Final = "io.cilium.k8s.namespace.labels."
CLUSTER_KEY: Final = "io.cilium.k8s.policy.cluster"

MAX_SOURCE: Final = 63
# A Kubernetes qualified name (253 of prefix, a slash, 63 of name), as a label of a namespace.
MAX_KEY: Final = len(NAMESPACE_LABELS_PREFIX) + 317
NAMESPACE_NAME_KEY: Final = "kubernetes.io/metadata.name"  # every namespace has it, with its name
MAX_VALUE: Final = 1024
MAX_LABELS: Final = 256

_SOURCE_RE: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?\Z")


class LabelError(ValueError):
    """A label that cannot be one; the message names the label and the mistake."""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


@total_ordering
@dataclass(frozen=True, slots=True)
class Label:
    """One label. Ordered by key first, as every printed list of labels is."""

    source: str
    key: str
    value: str = ""

    def __post_init__(self) -> None:
        shown = f"{self.source}:{self.key}"
        if not self.source:
            raise LabelError(f"label {_shown(shown)} has an empty source")
        if len(self.source) > MAX_SOURCE or not _SOURCE_RE.match(self.source):
            raise LabelError(
                f"label {_shown(shown)}: source {_shown(self.source)} must be lower case "
                f"letters, digits and dashes, at most {MAX_SOURCE}"
            )
        if not self.key:
            raise LabelError(f"label {_shown(shown)} has an empty key")
        if len(self.key) > MAX_KEY:
            raise LabelError(f"label {_shown(shown)}: the key is longer than {MAX_KEY} characters")
        if len(self.value) > MAX_VALUE:
            raise LabelError(
                f"label {_shown(shown)}: the value is longer than {MAX_VALUE} characters"
            )
        if "=" in self.key:
            raise LabelError(f"label {_shown(shown)}: a key cannot contain '='")
        for what, text in (("key", self.key), ("value", self.value)):
            if ";" in text:
                raise LabelError(f"label {_shown(shown)}: a {what} cannot contain ';'")
            if not text.isprintable():
                raise LabelError(
                    f"label {_shown(shown)}: the {what} contains a character that cannot be printed"
                )
        if " " in self.key:
            raise LabelError(f"label {_shown(shown)}: a key cannot contain a blank")

    @classmethod
    def parse(cls, text: str) -> Label:
        """Read ``[source:]key[=value]``; without a source it is ``unspec``.

        ``$host`` and ``reserved.host`` are old spellings of ``reserved:host``, and
        ``reserved:=host`` too. Only the first ``:`` splits off the source and only the first ``=``
        the value.
        """
        if not text:
            raise LabelError("a label cannot be empty")
        if text.startswith("$"):
            return cls(SOURCE_RESERVED, text[1:])
        source, key, value = _split(text, SOURCE_UNSPEC)
        if source == SOURCE_RESERVED and not key and value:
            key, value = value, ""
        return cls(source, key, value)

    def matches_source(self, source: str) -> bool:
        """Whether a selector's source covers this label: equal, or ``any``."""
        return source in (SOURCE_ANY, self.source)

    def __str__(self) -> str:
        value = f"={self.value}" if self.value else ""
        return f"{self.source}:{self.key}{value}"

    def __lt__(self, other: Label) -> bool:
        return (self.key, self.source, self.value) < (other.key, other.source, other.value)


def _split(text: str, default_source: str) -> tuple[str, str, str]:
    head, _, value = text.partition("=")
    if head.startswith("reserved."):
        return SOURCE_RESERVED, head.removeprefix("reserved."), value
    source, colon, key = head.partition(":")
    if not colon:
        return default_source, head, value
    return source, key, value


def parse_selector_key(text: str) -> tuple[str, str]:
    """Split a selector's key into (source, key); without a source it is ``any``.

    Raises LabelError.
    """
    if not text:
        raise LabelError("a label key cannot be empty")
    if text.startswith("$"):
        source, key = SOURCE_RESERVED, text[1:]
    elif "=" in text:
        raise LabelError(f"label key {_shown(text)} contains '=': the value goes after the key")
    else:
        source, key, _ = _split(text, SOURCE_ANY)
    Label(source, key)
    return source, key


class Labels:
    """An immutable set of labels, one a key, iterated in order of key."""

    __slots__ = ("_by_key", "_hash")
    _by_key: dict[str, Label]
    _hash: int

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        by_key = {label.key: label for label in labels}
        if len(by_key) > MAX_LABELS:
            raise LabelError(f"{len(by_key)} labels are more than the {MAX_LABELS} allowed")
        self._by_key = {key: by_key[key] for key in sorted(by_key)}
        self._hash = hash(tuple(self._by_key.values()))

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Labels:
        """Read labels; a key given twice with different sources or values is an error."""
        seen: dict[str, Label] = {}
        for text in texts:
            label = Label.parse(text)
            if (before := seen.setdefault(label.key, label)) != label:
                raise LabelError(f"labels {before} and {label} have the same key")
        return cls(seen.values())

    @classmethod
    def from_canonical(cls, data: bytes) -> Labels:
        """Undo canonical(). Raises LabelError."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise LabelError("canonical labels are not UTF-8") from error
        if text and not text.endswith(";"):
            raise LabelError(f"canonical labels {_shown(text)} do not end in ';'")
        labels = []
        for part in text.split(";")[:-1]:
            source, key, value = _split(part, "")
            labels.append(Label(source, key, value))
        return cls(labels)

    def canonical(self) -> bytes:
        """``source:key=value;`` for each label by order of key; '=' is always written."""
        return "".join(f"{x.source}:{x.key}={x.value};" for x in self).encode()

    def sorted(self) -> tuple[Label, ...]:
        return tuple(self._by_key.values())

    def get(self, key: str, source: str | None = None) -> Label | None:
        """The label of this key, if it has this source (None or ``any``: every source)."""
        label = self._by_key.get(key)
        if label is None or (source is not None and not label.matches_source(source)):
            return None
        return label

    def has_source(self, source: str) -> bool:
        return any(label.source == source for label in self)

    def merge(self, other: Iterable[Label]) -> Labels:
        """Both sets; where a key is in both, the other's label stays."""
        return Labels((*self, *other))

    def without(self, keys: Iterable[str]) -> Labels:
        dropped = set(keys)
        return Labels(label for label in self if label.key not in dropped)

    def __iter__(self) -> Iterator[Label]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, label: object) -> bool:
        return isinstance(label, Label) and self._by_key.get(label.key) == label

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Labels):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._by_key == other._by_key)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return ",".join(str(label) for label in self)

    def __repr__(self) -> str:
        return f"Labels({str(self)!r})"


@dataclass(frozen=True, slots=True)
class FilterRule:
    """Labels of `source` (None: any) whose key begins with a match of `regex`."""

    regex: str
    source: str | None = None
    ignore: bool = False

    def match_length(self, label: Label) -> int:
        """Characters of the key that match from its start; 0 when none do."""
        if self.source is not None and self.source != label.source:
            return 0
        found = re.match(self.regex, label.key)
        return found.end() if found else 0


DEFAULT_RULES: Final = (
    FilterRule(r"io\.kubernetes\.pod\.namespace"),
    FilterRule(r"io\.cilium\.k8s\.namespace\.labels"),
    FilterRule(r"app\.kubernetes\.io"),
    *(
        FilterRule(regex, ignore=True)
        for regex in (
            r"io\.kubernetes",
            r"kubernetes\.io",
            r".*beta\.kubernetes\.io",
            r"k8s\.io",
            r"pod-template-generation",
            r"pod-template-hash",
            r"controller-revision-hash",
            r"annotation.*",
            r"etcd_node",
        )
    ),
)


class LabelFilter:
    """Splits labels into those that make an identity and those that only inform.

    The longest include match is weighed against the shortest ignore match. A user rule that
    includes switches to whitelist mode: only what is included makes identity. Labels of source
    ``reserved`` and ``cidr`` always do, or an endpoint could shed its reserved identity by
    configuration.
    """

    def __init__(self, user_rules: Iterable[FilterRule] = ()) -> None:
        user = tuple(user_rules)
        self.rules: Final = DEFAULT_RULES + user
        self.whitelist: Final = any(not rule.ignore for rule in user)

    @classmethod
    def parse(cls, text: str) -> LabelFilter:
        """Read rules like ``k8s:app !k8s:foo k8s:!bar !foo``. Raises LabelError."""
        rules = []
        for word in text.split():
            ignore = word.startswith("!")
            source, colon, regex = word.removeprefix("!").partition(":")
            if not colon:
                source, regex = "", source
            if regex.startswith("!"):
                ignore, regex = True, regex[1:]
            if not regex:
                raise LabelError(f"label filter rule {_shown(word)} has no pattern")
            try:
                re.compile(regex)
            except re.error as error:
                raise LabelError(f"label filter rule {_shown(word)}: {error}") from error
            rules.append(FilterRule(regex, source or None, ignore))
        return cls(rules)

    def is_identity(self, label: Label) -> bool:
        if label.source in (SOURCE_RESERVED, SOURCE_CIDR):
            return True
        lengths = [(rule.ignore, rule.match_length(label)) for rule in self.rules]
        included = max((n for ignore, n in lengths if not ignore), default=0)
        ignored = min((n for ignore, n in lengths if ignore and n), default=0)
        return (not self.whitelist and ignored == 0) or included > ignored

    def split(self, labels: Labels) -> tuple[Labels, Labels]:
        """(labels that make the identity, labels that only inform)."""
        identity = [label for label in labels if self.is_identity(label)]
        return Labels(identity), labels.without(label.key for label in identity)


def namespace_labels(name: str, labels: Mapping[str, str] | None = None) -> Labels:
    """What an endpoint is labelled with for being in a namespace: its name, and its own labels.

    Kubernetes' API server gives every namespace a label with its name; so does this. Raises
    LabelError.
    """
    own = {**(labels or {}), NAMESPACE_NAME_KEY: name}
    return Labels(
        (
            Label(SOURCE_K8S, NAMESPACE_KEY, name),
            *(Label(SOURCE_K8S, NAMESPACE_LABELS_PREFIX + key, x) for key, x in own.items()),
        )
    )


def labels_from_mapping(values: Mapping[str, str], source: str = SOURCE_K8S) -> Labels:
    """Labels of one source from a key to value mapping, as Kubernetes and Docker give them."""
    return Labels(Label(source, key, value) for key, value in values.items())
