"""The engine: documents and identities in, map states and explained verdicts out.

    documents ──▶ Repository ──▶ rules about a subject ──▶ Program ──┐
                                                                     ├──▶ Live ──▶ MapState
    identities ─▶ SelectorCache ─▶ identities of a selector ─────────┘

A *subject* is a set of labels whose traffic policy judges. A *program* is what all rules about it
say, selector by selector; subjects that the same rules are about share it. *Live* is a program
applied to the identities there are, and is changed identity by identity. Pure and synchronous
throughout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from cilia.identity import HOST, identity_name, is_local, is_reserved
from cilia.labels import NAMESPACE_KEY, SOURCE_CIDR, SOURCE_RESERVED, Labels
from cilia.policy.api import (
    PROTO_BY_NAME,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_NAMES,
    AbsentSelector,
    Document,
    DocumentKey,
    Element,
    EndpointSelector,
    EntitySelector,
    FQDNSelector,
    Network,
    PeerSelector,
    Requirement,
    RuleID,
    RuleRef,
    ServiceSelector,
    unenforced_parts,
)
from cilia.policy.mapstate import (
    MATCH_NONE,
    Block,
    L4Key,
    MapState,
    Match,
    PolicyEntry,
    any_l4,
    l4_keys,
    lookup_blocks,
)
from cilia.policy.repository import Repository, RuleIDs, StoredRule
from cilia.policy.selectorcache import CacheSelector, SelectorCache

Mode = Literal["default", "always", "never"]
Direction = Literal["ingress", "egress"]
RuleInfo = RuleRef

_MAX_MEMO: Final = 16384
_MAX_LOG: Final = 1 << 16
_MAX_TRANSIENT: Final = 1024
_NO_RULE: Final = RuleID(0)
_IMPLICIT: Final = PolicyEntry(deny=False, rule_id=_NO_RULE)
# Peers that are no endpoints under policy: nothing judges what they send or receive.
_NOT_SUBJECTS: Final = frozenset(
    ("host", "world", "world-ipv4", "world-ipv6", "unmanaged", "remote-node", "kube-apiserver")
)


@dataclass(frozen=True, slots=True)
class Unenforced:
    """A part of a rule that allows nothing because what would enforce it is not there."""

    rule: RuleRef
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPolicy:
    """What policy means for one subject, as of one revision."""

    subject: Labels
    mode: Mode
    audit: bool
    revision: int
    ingress_enforced: bool
    egress_enforced: bool
    mapstate: MapState
    default_deny_ingress: tuple[RuleRef, ...] = ()
    default_deny_egress: tuple[RuleRef, ...] = ()
    unenforced: tuple[Unenforced, ...] = ()

    @property
    def default_deny_rules(self) -> tuple[RuleRef, ...]:
        """The rules that isolate the subject, in either direction."""
        return self.default_deny_ingress + self.default_deny_egress

    def default_deny(self, egress: bool) -> tuple[RuleRef, ...]:
        return self.default_deny_egress if egress else self.default_deny_ingress

    def enforced(self, egress: bool) -> bool:
        return self.egress_enforced if egress else self.ingress_enforced


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One direction's answer. `reason` is a sentence for people."""

    allowed: bool
    enforced: bool
    reason: str
    rules: tuple[RuleRef, ...] = ()  # that decided
    default_deny: tuple[RuleRef, ...] = ()  # that isolate the subject
    match_type: int = MATCH_NONE  # MATCH_* of types.h
    deny: bool = False  # a deny rule decided

    @property
    def verdict(self) -> str:
        return "allowed" if self.allowed else "denied"


@dataclass(frozen=True, slots=True)
class Trace:
    """Both ends' answers: the connection works only if both allow it."""

    egress: Verdict
    ingress: Verdict

    @property
    def allowed(self) -> bool:
        return self.egress.allowed and self.ingress.allowed


@dataclass(frozen=True, slots=True)
class _Contribution:
    """What one element says about the peers of one selector."""

    deny: bool
    keys: tuple[L4Key, ...]
    rule_id: RuleID
    order: int


@dataclass(slots=True, eq=False)
class _Program:
    """Everything that one set of rules says, before any identity is looked at."""

    ingress_enforced: bool
    egress_enforced: bool
    selectors: tuple[CacheSelector, ...] = ()
    contributions: tuple[tuple[_Contribution, ...], ...] = ()  # by index of the selector
    wildcard: Block = field(default_factory=dict)  # rows of identity 0
    host_allow: bool = False
    default_deny: tuple[tuple[RuleRef, ...], tuple[RuleRef, ...]] = ((), ())
    unenforced: tuple[Unenforced, ...] = ()
    _interned: dict[tuple[int, ...], Block] = field(default_factory=dict)
    _by_labels: dict[Labels, Block] = field(default_factory=dict)

    def block(self, matched: tuple[int, ...], *, host: bool) -> Block:
        """The rows of a peer that these selectors (indexes, ascending) match."""
        key = (*matched, -1) if host and self.host_allow else matched
        if (found := self._interned.get(key)) is not None:
            return found
        block = _merge([c for i in matched for c in self.contributions[i]])
        if key is not matched:
            allow_all = any_l4(False)
            if allow_all not in block:
                block[allow_all] = _IMPLICIT
        for row in [k for k, e in block.items() if _covered(e, self.wildcard.get(k))]:
            del block[row]
        if len(self._interned) >= _MAX_MEMO:
            self._interned.clear()
        self._interned[key] = block
        return block

    def block_of(self, labels: Labels) -> Block:
        """The rows of a peer known by its labels only."""
        found = self._by_labels.get(labels)
        if found is None:
            matched = tuple(i for i, x in enumerate(self.selectors) if x.matches(labels))
            found = self.block(matched, host=_is_host(labels))
            if len(self._by_labels) >= _MAX_MEMO:
                self._by_labels.clear()
            self._by_labels[labels] = found
        return found


def _is_host(labels: Labels) -> bool:
    return labels.get("host", SOURCE_RESERVED) is not None


def _covered(entry: PolicyEntry, wildcard: PolicyEntry | None) -> bool:
    """Whether everyone's row of the same key says the same, or denies anyway."""
    return wildcard is not None and (wildcard.deny or not entry.deny)


def _merge(contributions: list[_Contribution]) -> dict[L4Key, PolicyEntry]:
    """Rows of one peer: deny beats allow on one key; the first rule in order names it."""
    rows: dict[L4Key, tuple[bool, list[_Contribution]]] = {}
    for c in contributions:
        for key in c.keys:
            deny, found = rows.setdefault(key, (c.deny, []))
            if deny == c.deny:
                found.append(c)
            elif c.deny:
                rows[key] = (True, [c])
    block = {}
    for key, (deny, found) in rows.items():
        if len(found) > 1:
            found.sort(key=lambda c: c.order)
        ids = tuple(dict.fromkeys(c.rule_id for c in found))
        block[key] = PolicyEntry(deny=deny, rule_id=ids[0], rules=ids)
    return block


class _Live:
    """A program applied to the identities there are."""

    def __init__(self, program: _Program, cache: SelectorCache) -> None:
        self.program: Final = program
        self.users = 0
        self._blocks: Final[dict[int, Block]] = {}
        self._log: list[int] = []
        self._snapshot: MapState | None = None
        matched: dict[int, list[int]] = {}
        for i, selector in enumerate(program.selectors):
            for identity in cache.acquire(selector):
                matched.setdefault(identity, []).append(i)
        if program.host_allow:
            matched.setdefault(HOST, [])
        for identity, indexes in matched.items():
            self._put(identity, program.block(tuple(indexes), host=identity == HOST))
        if program.wildcard:
            self._blocks[0] = program.wildcard

    def _put(self, identity: int, block: Block) -> bool:
        before = self._blocks.get(identity)
        if before is block or (not block and before is None):
            return False
        if block:
            self._blocks[identity] = block
        else:
            del self._blocks[identity]
        return before != block

    def change(self, identity: int, matched: list[int]) -> bool:
        """Set what selects an identity now. True when rows changed."""
        host = identity == HOST
        if not self._put(identity, self.program.block(tuple(sorted(matched)), host=host)):
            return False
        if len(self._log) >= _MAX_LOG:
            self._log = []  # older snapshots compare in full from now on
        self._log.append(identity)
        self._snapshot = None
        return True

    def snapshot(self) -> MapState:
        if self._snapshot is None:
            self._snapshot = MapState(self._blocks.copy(), log=self._log, seen=len(self._log))
        return self._snapshot


_ProgramKey = tuple[str, tuple[int, ...], bool]


class PolicyEngine:
    """Documents and identities in; map states, verdicts and traces out.

    Subjects that were resolved are kept current as identities come and go, until `forget`.
    """

    def __init__(
        self,
        mode: Mode = "default",
        allow_localhost: bool = True,
        cluster_name: str = "default",
        *,
        rule_ids: RuleIDs | None = None,
    ) -> None:
        self.mode: Mode = mode
        self.allow_localhost: Final = allow_localhost
        self.cluster_name: Final = cluster_name
        self.repository: Final = Repository(rule_ids)
        self.selectors: Final = SelectorCache()
        self._programs: Final[dict[_ProgramKey, _Program]] = {}
        self._subjects: Final[dict[tuple[Labels, Mode], _ProgramKey]] = {}
        self._holders: Final[dict[_ProgramKey, set[tuple[Labels, Mode]]]] = {}
        self._live: Final[dict[_ProgramKey, _Live]] = {}
        # Which live programs use a selector, and under which index.
        self._users: Final[dict[CacheSelector, dict[_ProgramKey, int]]] = {}
        self._transient: Final[OrderedDict[tuple[Labels, Mode], _Program]] = OrderedDict()
        self._expansions: Final[dict[str, tuple[EndpointSelector, ...]]] = {}

    # ---- documents

    @property
    def revision(self) -> int:
        return self.repository.revision

    def documents(self) -> tuple[Document, ...]:
        return self.repository.documents()

    def set_documents(self, documents: Iterable[Document]) -> int:
        """Make these the documents in force; gives the revision."""
        wanted = {document.key: document for document in documents}
        for key in [x for x in self.repository.names() if x not in wanted]:
            self._remove(key)
        # Sorted, so that the engine's state depends on the set alone.
        for key in sorted(wanted):
            self.upsert(wanted[key])
        return self.revision

    def upsert(self, document: Document) -> int:
        changed = self.repository.upsert(document)
        if changed is not None:
            self._policy_changed(changed)
        return self.revision

    def remove(self, kind: str, namespace: str | None, name: str) -> int:
        self._remove(DocumentKey(str(kind), namespace or "", name))
        return self.revision

    def _remove(self, key: DocumentKey) -> None:
        changed = self.repository.delete(key.kind, key.namespace, key.name)
        if changed is not None:
            self._policy_changed(changed)

    def _policy_changed(self, rules: tuple[StoredRule, ...]) -> None:
        """Unlearn every subject that one of these rules is about."""
        self._transient.clear()
        everyone = self.repository.moved
        for held in [
            x
            for x in self._subjects
            if everyone or any(r.rule.selector.matches(x[0]) for r in rules)
        ]:
            self._let_go(held)
        if everyone:
            self._programs.clear()

    def cidr_prefixes(self) -> frozenset[Network]:
        """The prefixes that need an identity on this node, so that rows can tell them."""
        return self.repository.prefixes()

    def rule(self, rule_id: int) -> RuleInfo:
        """Where the rule of this number was written. Raises KeyError."""
        return self.repository.ids.ref(rule_id)

    # ---- identities

    def add_identity(self, identity: int, labels: Labels) -> frozenset[Labels]:
        """Enter an identity; gives the subjects whose map state changed.

        The same again changes nothing; with other labels it replaces the identity.
        """
        known = self.selectors.labels(identity)
        if known is not None and known != labels:
            gone = self.remove_identity(identity)
            return gone | self.add_identity(identity, labels)
        return self._identity_changed(identity, self.selectors.add_identity(identity, labels))

    def remove_identity(self, identity: int) -> frozenset[Labels]:
        """Forget an identity; gives the subjects whose map state changed."""
        return self._identity_changed(identity, self.selectors.remove_identity(identity), gone=True)

    def _identity_changed(
        self, identity: int, selectors: tuple[CacheSelector, ...], *, gone: bool = False
    ) -> frozenset[Labels]:
        matched: dict[_ProgramKey, list[int]] = {}
        for selector in selectors:
            for key, index in self._users.get(selector, {}).items():
                matched.setdefault(key, []).append(index)
        changed: set[Labels] = set()
        for key, indexes in matched.items():
            if self._live[key].change(identity, [] if gone else indexes):
                changed.update(subject for subject, _ in self._holders[key])
        return frozenset(changed)

    # ---- resolution

    def resolve(
        self, subject: Labels, *, mode: Mode | None = None, audit: bool = False
    ) -> ResolvedPolicy:
        """What policy means for a subject. Cheap when nothing changed; held until `forget`.

        Audit changes no row: the kernel reports instead of dropping (EP_F_AUDIT).
        """
        effective = mode or self.mode
        held = (subject, effective)
        key = self._subjects.get(held)
        if key is None:
            key = self._hold(held)
        live = self._live[key]
        program = live.program
        return ResolvedPolicy(
            subject=subject,
            mode=effective,
            audit=audit,
            revision=self.revision,
            ingress_enforced=program.ingress_enforced,
            egress_enforced=program.egress_enforced,
            mapstate=live.snapshot(),
            default_deny_ingress=program.default_deny[False],
            default_deny_egress=program.default_deny[True],
            unenforced=program.unenforced,
        )

    def forget(self, subject: Labels) -> None:
        """Stop keeping a subject current: no endpoint has these labels any more."""
        for held in [x for x in self._subjects if x[0] == subject]:
            self._let_go(held)

    def _hold(self, held: tuple[Labels, Mode]) -> _ProgramKey:
        key, rules = self._rules(*held)
        live = self._live.get(key)
        if live is None:
            program = self._programs.get(key) or self._compile(key, rules)
            self._programs[key] = program
            live = self._live[key] = _Live(program, self.selectors)
            for i, selector in enumerate(program.selectors):
                self._users.setdefault(selector, {})[key] = i
        self._subjects[held] = key
        self._holders.setdefault(key, set()).add(held)
        return key

    def _let_go(self, held: tuple[Labels, Mode]) -> None:
        key = self._subjects.pop(held)
        holders = self._holders[key]
        holders.discard(held)
        if holders:
            return
        del self._holders[key]
        live = self._live.pop(key)
        self._programs.pop(key, None)
        for selector in live.program.selectors:
            self.selectors.release(selector)
            users = self._users[selector]
            del users[key]
            if not users:
                del self._users[selector]

    def _rules(self, subject: Labels, mode: Mode) -> tuple[_ProgramKey, tuple[StoredRule, ...]]:
        rules = () if mode == "never" else self.repository.rules_for(subject)
        init = subject.get("init", SOURCE_RESERVED) is not None
        return (mode, tuple(x.serial for x in rules), init), rules

    def _program(self, subject: Labels, mode: Mode) -> _Program:
        """A subject's program for a question: the live one, or one kept for a while."""
        held = (subject, mode)
        key = self._subjects.get(held)
        if key is not None:
            return self._live[key].program
        program = self._transient.get(held)
        if program is None:
            new_key, rules = self._rules(subject, mode)
            live = self._live.get(new_key)
            program = live.program if live is not None else self._compile(new_key, rules)
            self._transient[held] = program
            if len(self._transient) > _MAX_TRANSIENT:
                self._transient.popitem(last=False)
        return program

    def _compile(self, key: _ProgramKey, rules: tuple[StoredRule, ...]) -> _Program:
        mode, _, init = key
        sources: tuple[list[RuleRef], list[RuleRef]] = ([], [])
        requires: dict[tuple[bool, bool], list[Requirement]] = {}
        ids = self.repository.ids
        for stored in rules:
            for direction in (False, True):
                if (isolation := stored.rule.isolates(direction)) is not None:
                    sources[direction].append(
                        ids.ref(ids.number(stored.document.key, isolation[0]))
                    )
            for x in stored.rule.elements:
                for required in x.requires or ():
                    requires.setdefault((x.egress, x.deny), []).extend(required.requirements)
        always = mode == "always" or (mode == "default" and init)
        enforced = (always or bool(sources[False]), always or bool(sources[True]))
        found: dict[CacheSelector, list[_Contribution]] = {}
        wildcard: list[_Contribution] = []
        unenforced: list[Unenforced] = []
        order = 0
        for stored in rules:
            for x in stored.rule.elements:
                number = ids.number(stored.document.key, x.path)
                unenforced += _unenforced(x, ids.ref(number))
                if x.grants_nothing:
                    continue
                order += 1
                contribution = _Contribution(x.deny, _keys(x), number, order)
                if x.peers is None:
                    wildcard.append(contribution)
                    continue
                extra = requires.get((x.egress, x.deny), [])
                for peer in x.peers:
                    for selector in self._expand(peer, extra):
                        if isinstance(selector, EndpointSelector) and selector.wildcard:
                            wildcard.append(contribution)
                        else:
                            found.setdefault(selector, []).append(contribution)
        everyone = _merge(wildcard)
        for egress in (False, True):
            row = any_l4(egress)
            if not enforced[egress] and row not in everyone:
                everyone[row] = _IMPLICIT
        return _Program(
            ingress_enforced=enforced[False],
            egress_enforced=enforced[True],
            selectors=tuple(found),
            contributions=tuple(tuple(x) for x in found.values()),
            wildcard=everyone,
            host_allow=self.allow_localhost and enforced[False],
            default_deny=(tuple(sources[False]), tuple(sources[True])),
            unenforced=tuple(unenforced),
        )

    def _expand(self, peer: PeerSelector, requires: list[Requirement]) -> tuple[CacheSelector, ...]:
        match peer:
            case EndpointSelector():
                return (peer.plus(*requires) if requires else peer,)
            case EntitySelector(entity):
                found = self._expansions.get(entity)
                if found is None:
                    found = self._expansions[entity] = peer.expand(self.cluster_name)
                return found
            case AbsentSelector() | FQDNSelector() | ServiceSelector():
                return ()
            case _:
                return (peer,)

    def preview(self, documents: Iterable[Document]) -> Preview:
        """What other documents would mean for the identities there are. Enters them nowhere."""
        return Preview(self, documents)

    # ---- questions

    def verdict(
        self,
        subject: Labels,
        peer: int | Labels,
        direction: Direction,
        proto: int | str,
        port: int = 0,
        *,
        mode: Mode | None = None,
    ) -> Verdict:
        """Whether a subject may talk with a peer, and why.

        `direction` is the subject's; `proto` a number or a name; `port` the destination port, of
        ICMP the type. A peer may be an identity the engine knows, or labels. Raises KeyError for an
        identity it does not know, ValueError for a protocol or port that is none.
        """
        egress = direction == "egress"
        number = _protocol(proto)
        if not 0 <= port <= 65535:
            raise ValueError(f"port {port} is outside 0 to 65535")
        program = self._program(subject, mode or self.mode)
        labels = peer if isinstance(peer, Labels) else self.selectors.labels(peer)
        if labels is None:
            raise KeyError(f"identity {peer} is not known")
        own = program.block_of(labels)
        match = lookup_blocks(own, program.wildcard, -1, egress, number, port)
        return self._explain(program, subject, peer, labels, egress, number, port, match, mode)

    def trace(
        self, src: Labels, dst: Labels, proto: int | str, port: int = 0, *, mode: Mode | None = None
    ) -> Trace:
        """Both ends' verdicts about one connection."""
        verdicts = []
        for subject, peer, direction in ((src, dst, "egress"), (dst, src, "ingress")):
            if is_subject(subject):
                egress: Direction = "egress" if direction == "egress" else "ingress"
                verdicts.append(self.verdict(subject, peer, egress, proto, port, mode=mode))
            else:
                reason = f"{describe(subject)} is no endpoint, so no policy judges its {direction}."
                verdicts.append(Verdict(allowed=True, enforced=False, reason=reason))
        return Trace(*verdicts)

    def _explain(
        self,
        program: _Program,
        subject: Labels,
        peer: int | Labels,
        labels: Labels,
        egress: bool,
        proto: int,
        port: int,
        match: Match | None,
        mode: Mode | None,
    ) -> Verdict:
        direction = "egress" if egress else "ingress"
        enforced = program.egress_enforced if egress else program.ingress_enforced
        sources = program.default_deny[egress]
        name = describe(labels)
        if isinstance(peer, int) and (is_reserved(peer) or is_local(peer)):
            name = describe(labels) or identity_name(peer)
        what = (
            f"{describe(subject)} to {name}" if egress else f"{name} to {describe(subject)}"
        ) + f" on {_l4_text(proto, port)}"
        rules: tuple[RuleRef, ...] = ()
        if match is not None:
            rules = tuple(self.rule(x) for x in match.entry.rules)
        by = _listed(rules)
        if match is None:
            if sources:
                why = f"isolated on {direction} by {_listed(sources)}, and no rule allows this"
            elif (mode or self.mode) == "always":
                why = "enforcement mode always isolates every endpoint, and no rule allows this"
            else:
                why = "it has no identity of its own yet (reserved:init), and no rule allows this"
            reason = f"{what}: denied by default: {describe(subject)} is {why}."
            if why.startswith(("enforcement", "it has")):
                reason = f"{what}: denied by default: {why}."
        elif match.entry.deny:
            reason = f"{what}: denied by {by}."
        elif rules:
            reason = f"{what}: allowed by {by}."
        elif not enforced:
            cause = (
                "policy enforcement is off (mode never)"
                if (mode or self.mode) == "never"
                else f"no rule isolates {describe(subject)} on {direction}"
            )
            reason = f"{what}: allowed: {cause}."
        else:
            reason = f"{what}: allowed: the local host may always reach its endpoints."
        return Verdict(
            allowed=match is not None and not match.entry.deny,
            enforced=enforced,
            reason=reason,
            rules=rules,
            default_deny=sources,
            match_type=match.key.match_type if match is not None else MATCH_NONE,
            deny=match is not None and match.entry.deny,
        )


class Preview:
    """How large map states would be under other documents than those in force.

    It reads the engine's identities and writes nothing of the engine.
    """

    def __init__(self, engine: PolicyEngine, documents: Iterable[Document]) -> None:
        self._known: Final = engine.selectors
        self._scratch: Final = PolicyEngine(
            engine.mode, engine.allow_localhost, engine.cluster_name
        )
        for document in documents:
            self._scratch.repository.upsert(document)

    def cidr_prefixes(self) -> frozenset[Network]:
        return self._scratch.cidr_prefixes()

    def rows(self, subject: Labels, *, mode: Mode, more: Iterable[Labels] = ()) -> int:
        """The rows of a subject's map state, with an identity each for `more` label sets."""
        key, rules = self._scratch._rules(subject, mode)
        program = self._scratch._compile(key, rules)
        matched: dict[int, list[int]] = {}
        for i, selector in enumerate(program.selectors):
            for identity in self._known.search(selector):
                matched.setdefault(identity, []).append(i)
        if program.host_allow:
            matched.setdefault(HOST, [])
        count = len(program.wildcard)
        for identity, indexes in matched.items():
            count += len(program.block(tuple(indexes), host=identity == HOST))
        return count + sum(len(program.block_of(labels)) for labels in more)


def _keys(element: Element) -> tuple[L4Key, ...]:
    if element.l4 is None:
        return (any_l4(element.egress),)
    return tuple(dict.fromkeys(key for l4 in element.l4 for key in l4_keys(element.egress, l4)))


def _unenforced(element: Element, ref: RuleRef) -> Iterable[Unenforced]:
    if element.unenforced:
        yield Unenforced(ref, element.unenforced)
    for rule in element.ports or ():
        for why in unenforced_parts(rule):
            yield Unenforced(ref, why)
    names: dict[str, None] = {}
    for peer in element.peers or ():
        match peer:
            case AbsentSelector(what):
                names[what] = None
            case FQDNSelector():
                names["toFQDNs"] = None
            case ServiceSelector():
                names["toServices"] = None
            case _:
                pass
    for name in names:
        yield Unenforced(ref, f"{name} is not resolved yet")


def _protocol(proto: int | str) -> int:
    if isinstance(proto, str):
        number = PROTO_BY_NAME.get(proto.upper())
        if number is None:
            raise ValueError(f"{proto!r} is not a protocol: use {', '.join(PROTO_NAMES.values())}")
        return number
    if not 0 <= proto <= 255:
        raise ValueError(f"protocol {proto} is outside 0 to 255")
    return proto


def _l4_text(proto: int, port: int) -> str:
    name = PROTO_NAMES.get(proto, f"protocol {proto}")
    if proto in (PROTO_ICMP, PROTO_ICMPV6):
        return f"{name} type {port}"
    return f"{port}/{name}" if port else name


def _listed(refs: tuple[RuleRef, ...], limit: int = 3) -> str:
    shown = " and ".join(map(str, refs[:limit]))
    return f"{shown} and {len(refs) - limit} more" if len(refs) > limit else shown


def describe(labels: Labels) -> str:
    """Labels as people name a peer: no sources, and no namespace when it is default."""
    cidr = next((x for x in labels if x.source == SOURCE_CIDR), None)
    if cidr is not None:
        return cidr.key
    reserved = [x.key for x in labels if x.source == SOURCE_RESERVED]
    if reserved:
        return f"reserved:{max(reserved, key=len)}"
    namespace = labels.get(NAMESPACE_KEY)
    parts = [
        f"{x.key}={x.value}" if x.value else x.key
        for x in labels
        if not x.key.startswith(("io.kubernetes.pod.", "io.cilium.k8s."))
    ]
    text = ",".join(parts) or "an endpoint without labels"
    return (
        text if namespace is None or namespace.value == "default" else f"{namespace.value}/{text}"
    )


def is_subject(labels: Labels) -> bool:
    """Whether policy judges the traffic of such a peer: an endpoint, not the host or the world."""
    return not any(
        x.source == SOURCE_CIDR or (x.source == SOURCE_RESERVED and x.key in _NOT_SUBJECTS)
        for x in labels
    )
