"""The documents in force, found by name, and their rules, found by the endpoints they are about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from cilia.labels import Labels
from cilia.policy.api import (
    CidrSelector,
    Document,
    DocumentKey,
    Network,
    Origin,
    Rule,
    RuleID,
    RuleRef,
)
from cilia.policy.selectorcache import AnchorIndex

_WORDS: Final = re.compile(r"([^\[\].0-9]+)|([0-9]+)")


@dataclass(frozen=True, slots=True, eq=False)
class StoredRule:
    """A rule in force. Equal only to itself: a document put in again has new ones."""

    document: Document
    rule: Rule
    serial: int

    order: tuple[object, ...]  # rules sort by policy and place, however they came


def _order(document: Document, rule: Rule) -> tuple[object, ...]:
    words = _WORDS.findall(rule.path)
    return (document.key, *((int(number or 0), word) for word, number in words))


class RuleIDs:
    """Stable 32-bit numbers of rules: a hash of policy and path, the same on every node.

    Where two hash alike, the one that sorts first keeps its hash and the others probe on, whatever
    the order in which they came. 0 is never given: in the kernel it means that no rule decided.
    """

    def __init__(self, digest: Callable[[str, int], int] | None = None) -> None:
        self._digest: Final = digest or _digest
        self._by_place: Final[dict[tuple[DocumentKey, str], RuleID]] = {}
        self._refs: Final[dict[RuleID, RuleRef]] = {}
        self._displaced = False

    def replace(self, old: Document | None, new: Document | None) -> bool:
        """Swap one document's rules for another's. True when numbers of others moved."""
        fresh: dict[str, Origin] = _places(new) if new is not None else {}
        gone = [(old.key, path) for path in _places(old)] if old is not None else []
        clash = False
        for place in gone:
            if new is not None and new.key == place[0] and place[1] in fresh:
                continue
            number = self._by_place.pop(place)
            del self._refs[number]
        if new is not None:
            for path, origin in fresh.items():
                place = (new.key, path)
                number = self._by_place.get(place) or self._first(place)
                taken = self._refs.get(number)
                if taken is not None and (taken.policy, taken.path) != (new.ref, path):
                    clash = True
                    number = self._free(place)
                self._by_place[place] = number
                self._refs[number] = RuleRef(number, new.ref, path, origin)
        if clash or self._displaced:
            return self._settle()
        return False

    def _first(self, place: tuple[DocumentKey, str]) -> RuleID:
        return RuleID(self._digest(f"{place[0]}\0{place[1]}", 0) or 1)

    def _free(self, place: tuple[DocumentKey, str]) -> RuleID:
        probe = 0
        while True:
            probe += 1
            number = RuleID(self._digest(f"{place[0]}\0{place[1]}", probe) or 1)
            if number not in self._refs:
                return number

    def _settle(self) -> bool:
        """Give all numbers again, in sorted order. Rare: it takes two rules that hash alike."""
        before = dict(self._by_place)
        origins = {place: self._refs[number].origin for place, number in before.items()}
        self._by_place.clear()
        self._refs.clear()
        self._displaced = False
        for place in sorted(before):
            number = self._first(place)
            if number in self._refs:
                number, self._displaced = self._free(place), True
            self._by_place[place] = number
            self._refs[number] = RuleRef(number, str(place[0]), place[1], origins[place])
        return before != self._by_place

    def number(self, key: DocumentKey, path: str) -> RuleID:
        return self._by_place[key, path]

    def refs(self) -> list[RuleRef]:
        """All rules that have a number, each where it was written."""
        return list(self._refs.values())

    def ref(self, number: int) -> RuleRef:
        """Raises KeyError for a number that no rule has."""
        return self._refs[RuleID(number)]

    def get(self, number: int) -> RuleRef | None:
        return self._refs.get(RuleID(number))


class OverlaidIDs(RuleIDs):
    """Numbers of rules that are only looked at, over those of the rules in force."""

    def __init__(self, base: RuleIDs) -> None:
        super().__init__(base._digest)
        self._base: Final = base

    def number(self, key: DocumentKey, path: str) -> RuleID:
        own = self._by_place.get((key, path))
        return own if own is not None else self._base.number(key, path)

    def ref(self, number: int) -> RuleRef:
        own = self._refs.get(RuleID(number))
        return own if own is not None else self._base.ref(number)


def _digest(text: str, probe: int) -> int:
    data = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4, salt=b"%08x" % probe)
    return int.from_bytes(data.digest(), "big")


def _places(document: Document) -> dict[str, Origin]:
    """Every place of a document that a verdict can point at."""
    found: dict[str, Origin] = {}
    for rule in document.rules:
        found[rule.path] = rule.origin
        for isolation in (rule.isolates_ingress, rule.isolates_egress):
            if isolation is not None:
                found[isolation[0]] = isolation[1]
        found.update((x.path, x.origin) for x in rule.elements)
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """What one change of the documents did."""

    gone: tuple[StoredRule, ...]
    came: tuple[StoredRule, ...]
    fresh: frozenset[Network]  # prefixes that rules name now and none did before
    idle: frozenset[Network]  # prefixes that no rule names any more
    moved: bool  # whether rules of other documents have new numbers


class Repository:
    """The set of documents. The revision rises with each change and never with none."""

    def __init__(self, ids: RuleIDs | None = None) -> None:
        self.revision = 1
        self.ids: Final = ids or RuleIDs()
        self._documents: Final[dict[DocumentKey, tuple[Document, tuple[StoredRule, ...]]]] = {}
        self._index: Final[AnchorIndex[StoredRule]] = AnchorIndex()
        self._prefixes: Final[Counter[Network]] = Counter()
        self._serial = 0

    def upsert(self, document: Document) -> Change | None:
        """Put a document in, replacing the one of its name.

        Rules that it shares with the one before stay as they are stored. None when the same
        document is there already.
        """
        old = self._documents.get(document.key)
        if old is not None and old[0] == document:
            return None
        before = old[1] if old is not None else ()
        # A rule's line may move when another's text changes: a reference is part of the rule.
        kept = {x.rule: x for x in before if x.document.audit == document.audit}
        stored = []
        for rule in document.rules:
            item = kept.pop(rule, None)
            if item is None:
                self._serial += 1
                item = StoredRule(document, rule, self._serial, _order(document, rule))
                self._index.add(rule.selector, item)
            stored.append(item)
        staying = frozenset(stored)
        gone = tuple(x for x in before if x not in staying)
        known = frozenset(before)
        came = tuple(x for x in stored if x not in known)
        for item in gone:
            self._index.remove(item.rule.selector, item)
        self._documents[document.key] = document, tuple(stored)
        fresh = self._count_prefixes(came, 1)
        idle = self._count_prefixes(gone, -1)
        moved = self.ids.replace(old[0] if old else None, document)
        self.revision += 1
        return Change(gone, came, fresh, idle, moved)

    def delete(self, kind: str, namespace: str | None, name: str) -> Change | None:
        """Take a document out; None when there is none of this name."""
        key = DocumentKey(str(kind), namespace or "", name)
        old = self._documents.pop(key, None)
        if old is None:
            return None
        document, gone = old
        for item in gone:
            self._index.remove(item.rule.selector, item)
        idle = self._count_prefixes(gone, -1)
        moved = self.ids.replace(document, None)
        self.revision += 1
        return Change(gone, (), frozenset(), idle, moved)

    def _count_prefixes(self, rules: Iterable[StoredRule], by: int) -> frozenset[Network]:
        """Count what rules name; gives what is named now and was not, or no more."""
        changed = set()
        for stored in rules:
            for prefix in _prefixes(stored.rule):
                count = self._prefixes[prefix] = self._prefixes[prefix] + by
                if count == 0:
                    del self._prefixes[prefix]
                    changed.add(prefix)
                elif count == by:
                    changed.add(prefix)
        return frozenset(changed)

    def get(self, kind: str, namespace: str | None, name: str) -> Document | None:
        found = self._documents.get(DocumentKey(str(kind), namespace or "", name))
        return found[0] if found else None

    def documents(self) -> tuple[Document, ...]:
        """All of them, sorted by kind, namespace and name."""
        return tuple(self._documents[key][0] for key in sorted(self._documents))

    def names(self) -> tuple[DocumentKey, ...]:
        return tuple(self._documents)

    def rules_for(self, subject: Labels, *, node: bool = False) -> tuple[StoredRule, ...]:
        """The rules about an endpoint, or about a node, with these labels, sorted by policy and
        place."""
        found = [
            x
            for x in self._index.candidates(subject)
            if x.rule.node is node and x.rule.selector.matches(subject)
        ]
        return tuple(sorted(found, key=lambda x: x.order))

    def rules(self) -> Iterator[StoredRule]:
        for _, rules in self._documents.values():
            yield from rules

    @property
    def named(self) -> Collection[Network]:
        """What `prefixes` gives, as it is from now on."""
        return self._prefixes.keys()

    def prefixes(self) -> frozenset[Network]:
        """The prefixes and exceptions that rules name; not /0, the world of its family."""
        return frozenset(self._prefixes)


def _prefixes(rule: Rule) -> Iterable[Network]:
    for element in rule.elements:
        for peer in element.peers or ():
            if isinstance(peer, CidrSelector):
                yield from (x for x in (peer.prefix, *peer.excepts) if x.prefixlen)
