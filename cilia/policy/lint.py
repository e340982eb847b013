"""What is legal and probably not meant: warnings about documents that were read without a fault.

    contradiction     a selector that nothing can match
    selects nothing   a selector that matches none of the endpoints (only if these are given)
    shadowed          an entry that changes nothing beside another one, or that a deny takes back
    the namespace     `{}` as a peer in a namespaced policy: its namespace, not everyone
    default deny      deny entries alone, which isolate all the same; and rules that isolate
                      endpoints which were open (only if these are given)
    no DNS            toFQDNs where no rule lets the endpoints ask DNS through the proxy
    grants nothing    requirements without peers; and what has no enforcer (if these are given)

Silence is no proof: that one selector covers another is told from their requirements, not from what
values there may be. The cost is about linear in the number of entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from cilia.labels import NAMESPACE_KEY, SOURCE_K8S, SOURCE_RESERVED, Labels
from cilia.policy.api import (
    L4,
    PROTO_TCP,
    AbsentSelector,
    CidrSelector,
    Document,
    Element,
    EndpointSelector,
    EntitySelector,
    Fault,
    FQDNSelector,
    Kind,
    Origin,
    PeerSelector,
    PortRule,
    Requirement,
    Rule,
    ServiceSelector,
    unenforced_parts,
)
from cilia.policy.selectorcache import SelectorCache

MAX_SUBSETS: Final = 6  # requirements of which all subsets are looked up
MAX_CANDIDATES: Final = 32  # entries under one key that one entry is compared with
MAX_COMPARED: Final = 1024  # peers of an entry that is compared at all
MAX_NAMED: Final = 3  # endpoints named in a warning
_EVERYONE: Final = (EndpointSelector(), EntitySelector("all"))
_NO_PORTS: Final = (PortRule(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcers:
    """Who is there to enforce what the kernel cannot."""

    parsers: frozenset[str] = frozenset()  # of L7 rules, as the engine is told
    names: bool = False  # somebody watches DNS
    services: bool = False  # somebody watches services


def lint(
    documents: Iterable[Document],
    endpoints: Mapping[str, Labels] | None = None,
    *,
    before: Iterable[Document] = (),
    enforcers: Enforcers | None = None,
) -> tuple[Fault, ...]:
    """Warnings about documents, in order of document and place.

    `endpoints` (labels by name) are those there are; without them nothing is said that depends on
    them. `before` are the documents in force, of which those of the same name are replaced: with
    them, only endpoints that were open until now are said to become isolated, and what shadows is
    sought among them too; nothing is said about them. `enforcers` is who would enforce them;
    without it everybody is taken to be there.
    """
    given = sorted(documents, key=lambda x: x.key)
    names = {x.key for x in given}
    kept = [x for x in before if x.key not in names]
    found = _Lint(given, kept, dict(endpoints) if endpoints is not None else None, enforcers)
    return tuple(sorted(found.run(), key=lambda x: (x.origin, x.path, x.message)))


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """An element and what it is of. Compared by identity."""

    document: Document
    rule: Rule
    element: Element
    order: int
    given: bool  # whether warnings about it are wanted

    @property
    def shown(self) -> str:
        return f"{self.document.ref} {self.element.path} ({self.element.origin})"


class _Lint:
    def __init__(
        self,
        given: list[Document],
        kept: list[Document],
        endpoints: dict[str, Labels] | None,
        enforcers: Enforcers | None,
    ) -> None:
        self.given, self.kept, self.endpoints = given, kept, endpoints
        self.enforcers = enforcers
        self.entries = [
            _Entry(document, rule, element, order, given=wanted)
            for order, (document, rule, element, wanted) in enumerate(
                (document, rule, element, wanted)
                for documents, wanted in ((kept, False), (given, True))
                for document in documents
                for rule in document.rules
                for element in rule.elements
            )
        ]
        self.faults: list[Fault] = []
        self._names = tuple(endpoints or ())
        self._known: SelectorCache[object, None] = SelectorCache()
        for number, labels in enumerate((endpoints or {}).values()):
            self._known.add_identity(number, labels)

    def warn(self, document: Document, path: str, origin: Origin, message: str) -> None:
        self.faults.append(Fault(document.ref, path, message, origin))

    def run(self) -> list[Fault]:
        for document in self.given:
            for rule in document.rules:
                self.subject(document, rule)
                for element in rule.elements:
                    self.element(document, rule, element)
                for egress in (False, True):
                    self.deny_alone(document, rule, egress=egress)
        self.shadows()
        self.default_deny()
        self.names_without_dns()
        return self.faults

    # ---- selectors

    def nobody(self, selector: EndpointSelector) -> bool:
        """Whether it matches none of the endpoints there are."""
        return self.endpoints is not None and next(self._known.search(selector), None) is None

    def subject(self, document: Document, rule: Rule) -> None:
        what = "nodeSelector" if rule.node else "endpointSelector"
        path = f"{rule.path}.{'podSelector' if document.kind == Kind.NP else what}"
        if (why := contradiction(rule.selector)) is not None:
            self.warn(document, path, rule.origin, f"selects nothing: {why}")
        elif not rule.node and self.nobody(rule.selector):
            self.warn(
                document, path, rule.origin, f"selects none of the endpoints: {rule.selector}"
            )

    def element(self, document: Document, rule: Rule, element: Element) -> None:
        own = Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (document.namespace or "",))
        for peer in element.peers or ():
            if not isinstance(peer, EndpointSelector):
                continue
            if (why := contradiction(peer)) is not None:
                message = f"a peer selects nothing: {why}"
            elif document.kind == Kind.CNP and peer.requirements == (own,):
                side = "to" if element.egress else "from"
                message = (
                    f"{{}} means every endpoint of namespace {document.namespace}, not everyone: "
                    f"that would be {side}Entities: [all]"
                )
            elif not peer.mentions_source(SOURCE_RESERVED) and self.nobody(peer):
                message = f"a peer selects none of the endpoints: {peer}"
            else:
                continue
            self.warn(document, element.path, element.origin, message)
        if element.requires is not None and element.peers is None:
            self.warn(
                document,
                element.path,
                element.origin,
                "requirements only narrow what other entries allow: without peers this one allows "
                "nothing",
            )
        for why in self.missing(element):
            self.warn(document, element.path, element.origin, f"allows nothing: {why}")
        for rule_ in element.ports or ():
            if rule_.l7 is not None and rule_.l7.parser == "dns" and not rule_.named:
                protos = {x.proto for x in rule_.l4}
                if protos == {PROTO_TCP}:
                    self.warn(
                        document,
                        rule_.path,
                        rule_.origin,
                        "dns rules on TCP only: nearly all questions are asked over UDP",
                    )

    def missing(self, element: Element) -> list[str]:
        """Why an entry, or a part of it, has nobody to enforce it."""
        whys: dict[str, None] = {}
        if element.unenforced:
            whys[element.unenforced] = None
        for peer in element.peers or ():
            match peer:
                case AbsentSelector(what):
                    whys[f"{what} cannot be resolved"] = None
                case FQDNSelector() if self.enforcers is not None and not self.enforcers.names:
                    whys["toFQDNs needs DNS answers, and nobody watches DNS"] = None
                case ServiceSelector() if (
                    self.enforcers is not None and not self.enforcers.services
                ):
                    whys["toServices needs services, and nobody watches them"] = None
                case _:
                    pass
        if self.enforcers is not None:
            for rule in element.ports or ():
                if rule.l7 is not None and rule.l7.parser not in self.enforcers.parsers:
                    whys |= dict.fromkeys(unenforced_parts(rule))
        return list(whys)

    # ---- what covers what

    def shadows(self) -> None:
        # Of what is in force only that which somebody here may look for: it may be much more.
        wanted = {
            key
            for entry in self.entries
            if entry.given and len(entry.element.peers or ()) <= MAX_COMPARED
            for peer in entry.element.peers or ()
            for key in _wider(peer)
        } | {None}
        index: dict[tuple[object, ...], list[_Entry]] = {}
        for entry in self.entries:
            if not _covering(entry.element):
                continue
            place = (*_where(entry), frozenset(entry.rule.selector.requirements))
            for peer in _keys(entry.element.peers):
                if peer in wanted:
                    index.setdefault((*place, peer), []).append(entry)
        required = {
            (x.rule.node, x.element.egress) for x in self.entries if x.element.requires is not None
        }
        for entry in self.entries:
            element = entry.element
            if (
                not entry.given
                or element.unenforced
                or (entry.rule.node, element.egress) in required
            ):
                continue  # requirements narrow some entries and not others
            if element.peers is None and element.ports is None:
                continue
            if element.peers is None or 0 < len(element.peers) <= MAX_COMPARED:
                self.shadow(entry, index)

    def shadow(self, entry: _Entry, index: Mapping[tuple[object, ...], list[_Entry]]) -> None:
        ports = _NO_PORTS if entry.element.ports is None else entry.element.ports
        if not any(x.l4 or x.named for x in ports) and entry.element.ports is not None:
            return
        for deny in (True, False):
            if entry.element.deny and not deny:
                continue
            covering = self.covering(entry, index, deny=deny)
            if covering is None:
                continue
            element = entry.element
            plain = all(x.l7 is None for x in ports)
            if deny and not element.deny:
                message = f"allows nothing: {covering.shown} denies all of it"
            elif plain:
                message = f"changes nothing: {covering.shown} covers it"
            else:
                message = (
                    f"its L7 rules restrict nothing: {covering.shown} allows the same peers and "
                    "ports whatever the request"
                )
            self.warn(entry.document, element.path, element.origin, message)
            return

    def covering(
        self, entry: _Entry, index: Mapping[tuple[object, ...], list[_Entry]], *, deny: bool
    ) -> _Entry | None:
        """Another entry that says the same about all of this one's subjects, peers and ports."""
        found: list[_Entry] | None = None
        where = (entry.rule.node, entry.element.egress, deny)
        subjects = list(_subsets(entry.rule.selector.requirements))
        peers = entry.element.peers
        for wider in [list(_wider(peer)) for peer in peers] if peers is not None else [[None]]:
            here: list[_Entry] = []
            for subject in subjects:
                for peer in wider:
                    candidates = index.get((*where, subject, peer), ())
                    here += [
                        x
                        for x in candidates[:MAX_CANDIDATES]
                        if x is not entry and _covers_ports(x.element, entry.element)
                    ]
            found = here if found is None else [x for x in found if x in here]
            if not found:
                return None
        same = entry.element.deny == deny
        # Of two that cover each other the later one is said to be superfluous.
        return next(
            (
                x
                for x in sorted(found or (), key=lambda x: x.order)
                if not same or x.order < entry.order or not _mutual(entry, x)
            ),
            None,
        )

    # ---- default deny

    def deny_alone(self, document: Document, rule: Rule, *, egress: bool) -> None:
        isolation = rule.isolates(egress)
        elements = [x for x in rule.elements if x.egress == egress]
        if isolation is None or not elements or not all(x.deny for x in elements):
            return
        direction = "egress" if egress else "ingress"
        self.warn(
            document,
            isolation[0],
            isolation[1],
            f"deny entries isolate as well: unless another rule allows it, all other {direction} "
            f"is denied too; enableDefaultDeny: {{{direction}: false}} only denies what is listed",
        )

    def default_deny(self) -> None:
        if self.endpoints is None:
            return
        for egress in (False, True):
            isolating = [
                (document, rule, isolation)
                for document in self.given
                for rule in document.rules
                if not rule.node and (isolation := rule.isolates(egress)) is not None
            ]
            isolated: set[int] = set()
            for document in self.kept:
                for rule in document.rules:
                    if not rule.node and rule.isolates(egress) is not None:
                        isolated.update(self._known.search(rule.selector))
            for document, rule, (path, origin) in isolating:
                numbers = [x for x in self._known.search(rule.selector) if x not in isolated]
                if not numbers:
                    continue
                isolated.update(numbers)
                flipped = sorted(self._names[x] for x in numbers)
                more = f" and {len(flipped) - MAX_NAMED} more" if len(flipped) > MAX_NAMED else ""
                direction = "egress from" if egress else "ingress to"
                self.warn(
                    document,
                    path,
                    origin,
                    f"puts {', '.join(flipped[:MAX_NAMED])}{more} in default deny: "
                    f"{direction} them that no rule allows is denied",
                )

    # ---- DNS

    def names_without_dns(self) -> None:
        proxied: list[EndpointSelector] = [
            entry.rule.selector
            for entry in self.entries
            if any(x.l7 is not None and x.l7.parser == "dns" for x in entry.element.ports or ())
        ]
        sets = {frozenset(x.requirements) for x in proxied}
        seen = {x for selector in set(proxied) for x in self._known.search(selector)}
        for entry in self.entries:
            if not entry.given or not any(
                isinstance(x, FQDNSelector) for x in entry.element.peers or ()
            ):
                continue
            selector = entry.rule.selector
            if any(subset in sets for subset in _subsets(selector.requirements)):
                continue
            mine = set(self._known.search(selector))
            if mine and mine <= seen:
                continue
            self.warn(
                entry.document,
                f"{entry.element.path}.toFQDNs",
                entry.element.origin,
                "no rule with dns rules is about these endpoints: their questions are not seen, so "
                "the names never get addresses",
            )


def contradiction(selector: EndpointSelector) -> str | None:
    """Why no labels can match, as far as two requirements on one key tell; None: they can."""
    by_key: dict[tuple[str, str], list[Requirement]] = {}
    for x in selector.requirements:
        by_key.setdefault((x.source, x.key), []).append(x)
    for requirements in by_key.values():
        if len(requirements) < 2:
            continue
        absent = [x for x in requirements if x.operator == "DoesNotExist"]
        present = [x for x in requirements if x.positive]
        if absent and present:
            return f"{present[0]} contradicts {absent[0]}"
        allowed: set[str] | None = None
        for x in present:
            if x.operator == "In":
                allowed = set(x.values) if allowed is None else allowed & set(x.values)
        if allowed is None:
            continue
        for x in requirements:
            if x.operator == "NotIn":
                allowed -= set(x.values)
        if not allowed:
            return " contradicts ".join(str(x) for x in requirements[:2])
    return None


def _where(entry: _Entry) -> tuple[bool, bool, bool]:
    return entry.rule.node, entry.element.egress, entry.element.deny


def _keys(peers: tuple[PeerSelector, ...] | None) -> Iterator[object]:
    """What an entry's peers are filed under."""
    if peers is None:
        yield None
        return
    for peer in dict.fromkeys(peers):
        yield from (None,) if _everyone(peer) else (_key(peer),)


def _everyone(peer: PeerSelector) -> bool:
    return not isinstance(peer, CidrSelector) and peer in _EVERYONE


def _covering(element: Element) -> bool:
    """Whether an entry holds plain ports of some peers, so that it may cover another."""
    if element.unenforced or element.requires is not None or element.peers == ():
        return False
    if element.ports is None:
        return element.peers is not None
    return any(x.l7 is None and (x.l4 or x.named) for x in element.ports)


def _key(peer: PeerSelector) -> object:
    match peer:
        case EndpointSelector():
            return frozenset(peer.requirements)
        case CidrSelector(prefix, ()):
            return prefix.version, prefix.prefixlen, int(prefix.network_address)
        case _:
            return peer


def _wider(peer: PeerSelector) -> Iterator[object]:
    """The keys of all peers that surely select what this one selects, itself included."""
    yield None
    match peer:
        case EndpointSelector():
            if not peer.wildcard:
                yield from (x for x in _subsets(peer.requirements) if x)
        case CidrSelector(prefix, excepts):
            if excepts:
                yield peer
            address, bits = int(prefix.network_address), prefix.max_prefixlen
            for length in range(prefix.prefixlen + 1):
                yield prefix.version, length, address >> (bits - length) << (bits - length)
            yield EntitySelector("world")
            yield EntitySelector(f"world-ipv{prefix.version}")
        case EntitySelector(entity):
            yield peer
            if entity.startswith("world-"):
                yield EntitySelector("world")
        case _:
            yield peer


def _subsets(requirements: tuple[Requirement, ...]) -> Iterator[frozenset[Requirement]]:
    """Every set of fewer requirements, and all of them; of many only all and none."""
    if len(requirements) > MAX_SUBSETS:
        yield frozenset(requirements)
        yield frozenset()
        return
    for size in range(len(requirements), -1, -1):
        yield from map(frozenset, combinations(requirements, size))


def _covers_ports(wider: Element, narrower: Element) -> bool:
    """Whether the plain ports of one hold all ports of the other."""
    if wider.ports is None:
        return True
    if narrower.ports is None:
        return False
    plain = [x for x in wider.ports if x.l7 is None]
    named = {x for rule in plain for x in rule.named}
    wanted = [x for rule in narrower.ports for x in rule.l4]
    return all(x in named for rule in narrower.ports for x in rule.named) and all(
        _held(x, [y for rule in plain for y in rule.l4]) for x in wanted
    )


def _held(wanted: L4, ports: list[L4]) -> bool:
    return any(
        x.proto == wanted.proto and x.first <= wanted.first and wanted.last <= x.last for x in ports
    )


def _mutual(entry: _Entry, other: _Entry) -> bool:
    """Whether two entries, of which the other covers the one, cover each other."""
    return (
        entry.rule.selector.requirements == other.rule.selector.requirements
        and entry.element.peers == other.element.peers
        and _covers_ports(entry.element, other.element)
        and all(x.l7 is None for x in entry.element.ports or ())
    )


__all__ = ["Enforcers", "contradiction", "lint"]
