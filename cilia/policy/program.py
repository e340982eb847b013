"""What all rules about one subject say, selector by selector, and the rows that follow for a peer.

    StoredRule ──▶ RuleParts (once a rule) ──▶ Layer (once a rule, and whom it is asked for)
                ──▶ Program (once a set of rules: their layers) ──▶ block of rows (once a set of
                                                                     contributions about a peer)

A program holds layers and copies none of them: a rule may name tens of thousands of peers, and the
next program that it is part of costs a pointer.

A row is decided by everything that covers it: the peer's own rules and those for everyone, of the
same L4 prefix and of shorter ones. Three things make rows that no rule names by itself:

- L7. Rules without an L7 part that cover an L7 row add "every request" to it, as the union of rules
  asks; the traffic still goes by the proxy. The openness of a direction that nothing isolates is no
  such rule: L7 rules restrict there, too.
- Denials that are only audited deny nothing: what they cover, as far as it is allowed, gets rows
  that allow and report. The kernel knows no precedence of its own for them.
- Everyone's row of a longer prefix would hide what a peer's own shorter rules say: so the peer gets
  a row of its own there, where it matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cilia.labels import SOURCE_RESERVED, Labels
from cilia.policy.api import (
    Element,
    EndpointSelector,
    L7Rules,
    NamedPort,
    PeerSelector,
    PortRule,
    Requirement,
    RuleID,
    RuleRef,
    unenforced_parts,
)
from cilia.policy.l7 import ConflictError, PortNames, merge
from cilia.policy.mapstate import (
    PLEN_PORT,
    PLEN_PROTO,
    Block,
    L4Key,
    PolicyEntry,
    any_l4,
    l4_keys,
)
from cilia.policy.repository import RuleIDs, StoredRule
from cilia.policy.selectorcache import CacheSelector

NO_RULE: Final = RuleID(0)
IMPLICIT: Final = PolicyEntry(deny=False, rule_id=NO_RULE)
EVERYBODY: Final = EndpointSelector()
_MAX_MEMO: Final = 16384

Order = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Unenforced:
    """A part of a rule that allows nothing because what would enforce it is not there."""

    rule: RuleRef
    why: str


@dataclass(frozen=True, slots=True)
class Unseen:
    """Traffic that a visibility annotation asks to see, and that is not shown to a proxy."""

    egress: bool
    rule: PortRule
    why: str


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one element says about its peers on some ports. Equal only to itself."""

    deny: bool
    audit: bool  # a denial that is reported and not enforced
    keys: tuple[L4Key, ...]
    rule_id: RuleID
    order: Order
    l7: L7Rules | None = None
    named: tuple[NamedPort, ...] = ()  # on egress: ports that each peer names

    def keys_for(self, names: PortNames) -> tuple[L4Key, ...]:
        """Its rows at a peer with these named ports."""
        return (*self.keys, *named_keys(self.named, names, True)) if self.named else self.keys


def named_keys(wanted: Sequence[NamedPort], names: PortNames, egress: bool) -> Iterator[L4Key]:
    """The rows of named ports at an endpoint that calls its ports so."""
    for port in wanted:
        for name, number, proto in names:
            if name == port.name and port.proto in (0, proto):
                yield L4Key(egress, proto, number, PLEN_PORT)


@dataclass(frozen=True, slots=True)
class _Part:
    """One element: its peers and what it says of them."""

    egress: bool
    deny: bool
    peers: tuple[PeerSelector, ...] | None
    plain: tuple[Contribution, ...]
    named: tuple[tuple[PortRule, Contribution], ...]  # ingress: the subject's own port names


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What one rule says of whom, for subjects with the same port names. Equal only to itself."""

    selectors: Mapping[CacheSelector, tuple[Contribution, ...]]
    everyone: tuple[Contribution, ...]  # what is said of every peer
    said: frozenset[Contribution]  # all that some selector says
    restricts: frozenset[bool]  # directions, egress or not, in which it says which requests pass
    unenforced: tuple[Unenforced, ...]  # for want of a table or of a port's name

    @property
    def uses_names(self) -> bool:
        """Whether what it says depends on the port names of peers."""
        return any(c.named for c in self.said)


@dataclass(slots=True, eq=False)
class RuleParts:
    """One rule, made ready to be put together with others."""

    isolates: tuple[RuleRef | None, RuleRef | None]
    audit: bool
    requires: tuple[tuple[tuple[bool, bool], tuple[Requirement, ...]], ...]
    parts: tuple[_Part, ...]
    unenforced: tuple[Unenforced, ...]
    port_names: frozenset[str]  # of the subject, that rows depend on
    peer_ports: tuple[tuple[RuleRef, str], ...]  # names that peers' ports are asked for by
    serial: int  # never that of others
    _of_names: dict[PortNames, tuple[tuple[Contribution, ...], ...]] = field(default_factory=dict)
    #: What the engine made of it, by the subject's port names and what other rules require.
    layers: dict[object, Layer] = field(default_factory=dict)

    def contributions(self, names: PortNames) -> tuple[tuple[Contribution, ...], ...]:
        """Part by part, for a subject with these named ports."""
        if not self.port_names:
            return tuple(part.plain for part in self.parts)
        known = tuple(x for x in names if x[0] in self.port_names)
        found = self._of_names.get(known)
        if found is None:
            found = tuple(
                (*part.plain, *_resolved(part, known)) if part.named else part.plain
                for part in self.parts
            )
            if len(self._of_names) >= _MAX_MEMO:
                self._of_names.clear()
            self._of_names[known] = found
        return found


def _resolved(part: _Part, names: PortNames) -> Iterator[Contribution]:
    for rule, x in part.named:
        keys = tuple(dict.fromkeys((*x.keys, *named_keys(rule.named, names, part.egress))))
        if keys:
            yield Contribution(x.deny, x.audit, keys, x.rule_id, x.order, x.l7)


def rule_parts(
    stored: StoredRule, ids: RuleIDs, enforcers: frozenset[str], serial: int
) -> RuleParts:
    """Make a rule ready. L7 parts that nobody enforces are left out, and said to be."""
    key, rule, audit = stored.document.key, stored.rule, stored.document.audit
    place = stored.order
    isolates = []
    for direction in (False, True):
        where = rule.isolates(direction)
        isolates.append(ids.ref(ids.number(key, where[0])) if where is not None else None)
    requires: dict[tuple[bool, bool], tuple[Requirement, ...]] = {}
    parts: list[_Part] = []
    unenforced: list[Unenforced] = []
    subject_names = {
        port.name
        for x in rule.elements
        if not x.egress
        for port_rule in x.ports or ()
        for port in port_rule.named
    }
    peer_ports: dict[tuple[RuleRef, str], None] = {}
    for n, x in enumerate(rule.elements):
        for required in x.requires or ():
            side = x.egress, x.deny
            requires[side] = requires.get(side, ()) + required.requirements
        number = ids.number(key, x.path)
        unenforced += [Unenforced(ids.ref(number), why) for why in _absent(x, enforcers)]
        if x.unenforced or x.peers == () or (x.peers is None and x.requires is not None):
            continue
        order: Order = (*place, n)
        report = audit and x.deny
        if x.ports is None:
            if x.peers is None:
                continue
            whole = Contribution(x.deny, report, (any_l4(x.egress),), number, order)
            parts.append(_Part(x.egress, x.deny, x.peers, (whole,), ()))
            continue
        plain_keys: dict[L4Key, None] = {}
        found: list[Contribution] = []
        named: list[tuple[PortRule, Contribution]] = []
        for port_rule in x.ports:
            if port_rule.l7 is not None and port_rule.l7.parser not in enforcers:
                continue
            keys = tuple(dict.fromkeys(k for l4 in port_rule.l4 for k in l4_keys(x.egress, l4)))
            if port_rule.l7 is None and not port_rule.named:
                plain_keys.update(dict.fromkeys(keys))
                continue
            own = Contribution(x.deny, report, keys, number, order, port_rule.l7)
            if port_rule.named and not x.egress:
                named.append((port_rule, own))
                continue
            if keys:
                found.append(own)
            if port_rule.named:  # apart, for these depend on who the peer is, whoever may be it
                found.append(replace(own, keys=(), named=port_rule.named))
                peer_ports.update({(ids.ref(number), port.name): None for port in port_rule.named})
        if plain_keys:
            found.append(Contribution(x.deny, report, tuple(plain_keys), number, order))
        if found or named:
            parts.append(_Part(x.egress, x.deny, x.peers, tuple(found), tuple(named)))
    return RuleParts(
        isolates=(isolates[0], isolates[1]),
        audit=audit,
        requires=tuple(requires.items()),
        parts=tuple(parts),
        unenforced=tuple(unenforced),
        port_names=frozenset(subject_names),
        peer_ports=tuple(peer_ports),
        serial=serial,
    )


def _absent(element: Element, enforcers: frozenset[str]) -> Iterator[str]:
    """Why parts of an element allow nothing, as far as the rule alone says."""
    if element.unenforced:
        yield element.unenforced
    whys = {
        why: None
        for rule in element.ports or ()
        if rule.l7 is not None and rule.l7.parser not in enforcers
        for why in unenforced_parts(rule)
    }
    yield from whys


@dataclass(slots=True, eq=False, weakref_slot=True)
class Program:
    """Everything that one set of rules says, before any identity is looked at."""

    ids: RuleIDs
    ingress_enforced: bool
    egress_enforced: bool
    layers: tuple[Layer, ...]  # by the order of rules
    everyone: tuple[Contribution, ...]  # what is said of every peer
    host_allow: bool = False
    default_deny: tuple[tuple[RuleRef, ...], tuple[RuleRef, ...]] = ((), ())
    # Rules that would isolate if they did not only audit, in a direction nothing else isolates.
    audited: tuple[tuple[RuleRef, ...], tuple[RuleRef, ...]] = ((), ())
    unenforced: tuple[Unenforced, ...] = ()
    unseen: tuple[Unseen, ...] = ()
    peer_ports: tuple[tuple[RuleRef, str], ...] = ()
    wildcard: Block = field(default_factory=dict)  # rows of identity 0
    conflicts: tuple[Unenforced, ...] = ()  # among what is said of every peer
    uses_names: bool = False  # rows depend on the port names of peers
    _by_labels: dict[tuple[Labels, PortNames], Block] = field(default_factory=dict)
    _special: bool = False  # some of `everyone` has an L7 part or only audits

    def __post_init__(self) -> None:
        self.uses_names = any(layer.uses_names for layer in self.layers)
        self._special = any(c.l7 is not None or c.audit for c in self.everyone)
        rows, self.conflicts = self._rows((), (), False)
        for egress in (False, True):
            row = any_l4(egress)
            if (self.egress_enforced if egress else self.ingress_enforced) or row in rows:
                continue
            would = tuple(ref.rule_id for ref in self.audited[egress])
            audit = bool(would)
            rows[row] = PolicyEntry(False, NO_RULE, would, None, True) if audit else IMPLICIT
        self.wildcard = rows

    def selectors(self) -> dict[CacheSelector, tuple[Contribution, ...]]:
        """All layers as one table, made anew each time."""
        found: dict[CacheSelector, tuple[Contribution, ...]] = {}
        for layer in self.layers:
            for selector, said in layer.selectors.items():
                before = found.get(selector)
                found[selector] = said if before is None else (*before, *said)
        return found

    @property
    def bounds(self) -> tuple[bool, bool, bool, bool]:
        return self.ingress_enforced, self.egress_enforced, self.host_allow, self.uses_names

    def same_base(self, other: Program) -> bool:
        """Whether equal contributions about a peer give equal rows under both."""
        return (
            self.everyone == other.everyone
            and self.wildcard == other.wildcard
            and self.bounds == other.bounds
        )

    def block(
        self, own: Iterable[Contribution], names: PortNames, host: bool
    ) -> tuple[Block, tuple[Unenforced, ...]]:
        """A peer's own rows, given what is said of it, and conflicts that were met."""
        own = sorted(own, key=_order)
        implicit = host and self.host_allow
        if self._special or any(c.l7 is not None or c.audit for c in own):
            rows, conflicts = self._rows(own, names, implicit)
        else:
            rows, conflicts = _merge(own, names), ()
            if implicit:
                rows.setdefault(any_l4(False), IMPLICIT)
        for key in [k for k, e in rows.items() if _covered(e, self.wildcard.get(k))]:
            del rows[key]
        return rows, conflicts

    def block_of(self, labels: Labels, names: PortNames = ()) -> Block:
        """The rows of a peer known by its labels only."""
        key = labels, (names if self.uses_names else ())
        found = self._by_labels.get(key)
        if found is None:
            own = {
                c
                for layer in self.layers
                for selector, said in layer.selectors.items()
                if selector.matches(labels)
                for c in said
            }
            found, _ = self.block(own, key[1], is_host(labels))
            if len(self._by_labels) >= _MAX_MEMO:
                self._by_labels.clear()
            self._by_labels[key] = found
        return found

    def _rows(
        self, own: Sequence[Contribution], names: PortNames, implicit: bool
    ) -> tuple[dict[L4Key, PolicyEntry], tuple[Unenforced, ...]]:
        """Rows of a peer (of everyone, if nothing is its own) where L7 or audit comes in."""
        denies: dict[L4Key, list[Contribution]] = {}
        audits: dict[L4Key, list[Contribution]] = {}
        allows: dict[L4Key, list[Contribution]] = {}
        mine: dict[L4Key, None] = {}  # keys that the peer's own rules name
        for c, is_own in [*((c, True) for c in own), *((c, False) for c in self.everyone)]:
            home = allows if not c.deny else audits if c.audit else denies
            for key in c.keys_for(names):
                home.setdefault(key, []).append(c)
                if is_own or not own:
                    mine[key] = None
        if implicit:
            allows.setdefault(any_l4(False), [])
            mine[any_l4(False)] = None
        rows: dict[L4Key, PolicyEntry] = {}
        conflicts: list[Unenforced] = []
        lengths = tuple(sorted({k.plen for k in (*allows, *audits)}))
        for key in dict.fromkeys((*mine, *allows, *audits)):
            found = denies.get(key)
            if found and key in mine:
                rows[key] = _entry(found, deny=True)
                continue
            entry = self._allowed(key, allows, audits, lengths, implicit, conflicts)
            if entry is not None:
                rows[key] = entry
        for key, found in denies.items():
            if key in mine:
                rows[key] = _entry(found, deny=True)
        return rows, tuple(dict.fromkeys(conflicts))

    def _allowed(
        self,
        key: L4Key,
        allows: Mapping[L4Key, list[Contribution]],
        audits: Mapping[L4Key, list[Contribution]],
        lengths: tuple[int, ...],
        implicit: bool,
        conflicts: list[Unenforced],
    ) -> PolicyEntry | None:
        covers = [k for k in _shorter(key, lengths) if k in allows]
        if not covers and not self._open(key.egress):
            return None
        found = [c for k in covers for c in allows[k]]
        l7 = [c for c in found if c.l7 is not None]
        plain = [c for c in found if c.l7 is None]
        would = [c for k in _shorter(key, lengths) for c in audits.get(k, ())]
        free = implicit and not key.egress
        exact = sorted(allows.get(key, ()), key=_order)
        entry: PolicyEntry
        if l7:
            first = min(plain, key=_order).rule_id if plain else NO_RULE if free else None
            try:
                merged = merge(
                    ((c.rule_id, c.l7) for c in l7 if c.l7 is not None), first, key.egress
                )
            except ConflictError as error:
                # No one listener serves both: none of them is granted. A rule of a shorter prefix,
                # or for everyone, may still match, and grants what it says.
                conflicts += [
                    Unenforced(self.ids.ref(c.rule_id), f"it meets other L7 rules and {error}")
                    for c in sorted(l7, key=_order)
                ]
                if not plain and not free:
                    return None
                l7 = []
                exact = [c for c in exact if c.l7 is None] or sorted(plain, key=_order)
                entry = _entry(exact, deny=False) if exact else IMPLICIT
            else:
                named = [c for c in exact if c.l7 is not None] or sorted(l7, key=_order)
                rules = tuple(dict.fromkeys(c.rule_id for c in (*named, *exact)))
                entry = PolicyEntry(False, rules[0], rules, merged)
        elif exact or plain:
            entry = _entry(exact or plain, deny=False)
        else:
            entry = IMPLICIT
        if not would and not plain and found and all(not c.rule_id for c in found):
            # Shown to a proxy, but allowed for no reason of its own.
            by = tuple(ref.rule_id for ref in self.audited[key.egress])
            return replace(entry, rules=by, audit=bool(by))
        if would:
            ids_of = tuple(dict.fromkeys(c.rule_id for c in sorted(would, key=_order)))
            entry = PolicyEntry(False, ids_of[0], ids_of, entry.l7, True)
        return entry

    def _open(self, egress: bool) -> bool:
        """Whether nothing isolates, so that a denial that is only audited meets allowed traffic."""
        return not (self.egress_enforced if egress else self.ingress_enforced)


def is_host(labels: Labels) -> bool:
    return labels.get("host", SOURCE_RESERVED) is not None


def _order(c: Contribution) -> Order:
    return c.order


def _shorter(key: L4Key, lengths: Iterable[int]) -> Iterator[L4Key]:
    """The key itself and those of these lengths that cover it."""
    for plen in lengths:
        if plen > key.plen:
            return
        if plen == key.plen:
            yield key
        elif plen <= PLEN_PROTO:
            yield L4Key(key.egress, key.proto if plen else 0, 0, plen)
        else:
            spare = PLEN_PORT - plen
            yield L4Key(key.egress, key.proto, key.port >> spare << spare, plen)


def _entry(found: Iterable[Contribution], *, deny: bool) -> PolicyEntry:
    ids = tuple(dict.fromkeys(c.rule_id for c in sorted(found, key=_order)))
    return PolicyEntry(deny, ids[0], ids)


def _covered(entry: PolicyEntry, wildcard: PolicyEntry | None) -> bool:
    """Whether everyone's row of the same key says the same, or denies anyway."""
    return wildcard is not None and (wildcard.deny or entry.same_effect(wildcard))


def _merge(own: Iterable[Contribution], names: PortNames) -> dict[L4Key, PolicyEntry]:
    """Rows of one peer: deny beats allow on one key; the first rule in order names it."""
    rows: dict[L4Key, tuple[bool, list[Contribution]]] = {}
    for c in own:
        for key in c.keys_for(names):
            deny, found = rows.setdefault(key, (c.deny, []))
            if deny == c.deny:
                found.append(c)
            elif c.deny:
                rows[key] = (True, [c])
    return {
        key: PolicyEntry(deny, found[0].rule_id, (found[0].rule_id,))
        if len(found) == 1
        else _entry(found, deny=deny)
        for key, (deny, found) in rows.items()
    }
