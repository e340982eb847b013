"""The engine: documents and identities in, map states and explained verdicts out.

    documents ──▶ Repository ──▶ rules about a subject ──▶ Program ──┐
                                                                     ├──▶ Live ──▶ MapState
    identities ─▶ SelectorCache ─▶ identities of a selector ─────────┘

A *subject* is a set of labels whose traffic policy judges (with what its endpoint brings: mode,
port names, visibility). A *program* is what all rules about it say, selector by selector; subjects
that the same rules are about share it. *Live* is a program applied to the identities there are; an
identity that comes changes it by one entry, a rule by the peers of that rule. Pure and synchronous
throughout.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple
from weakref import WeakValueDictionary

from cilia.identity import (
    WORLD_IPV4,
    WORLD_IPV6,
    identity_name,
    is_local,
    is_reserved,
    reserved_labels,
)
from cilia.labels import NAMESPACE_KEY, SOURCE_CIDR, SOURCE_RESERVED, Labels
from cilia.policy.api import (
    PROTO_BY_NAME,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_NAMES,
    AbsentSelector,
    CidrSelector,
    Document,
    DocumentKey,
    EndpointSelector,
    EntitySelector,
    FQDNSelector,
    Network,
    PeerSelector,
    PortRule,
    Requirement,
    Rule,
    RuleRef,
    ServiceSelector,
)
from cilia.policy.compiled import CompiledPolicy
from cilia.policy.l7 import L7Set, PortNames, port_names
from cilia.policy.live import Live, Newcomer, Said
from cilia.policy.mapstate import MATCH_NONE, MapState, Match, l4_keys, lookup_blocks
from cilia.policy.program import (
    EVERYBODY,
    NO_RULE,
    Contribution,
    Layer,
    Program,
    RuleParts,
    Unenforced,
    Unseen,
    is_host,
    rule_parts,
)
from cilia.policy.repository import OverlaidIDs, Repository, RuleIDs, StoredRule
from cilia.policy.selectorcache import CacheSelector, LabelIndex, SelectorCache

Mode = Literal["default", "always", "never"]
Direction = Literal["ingress", "egress"]
RuleInfo = RuleRef

_MAX_TRANSIENT: Final = 1024
_MAX_LAYERS: Final = 1024  # of one rule
_LAST: Final = DocumentKey("~", "", "")  # sorts after every policy
# Peers that are no endpoints under policy: nothing judges what they send or receive.
_NOT_SUBJECTS: Final = frozenset(
    ("host", "world", "world-ipv4", "world-ipv6", "unmanaged", "remote-node", "kube-apiserver")
)


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
    # Rules that only audit, and would isolate the subject where nothing else does.
    audited_ingress: tuple[RuleRef, ...] = ()
    audited_egress: tuple[RuleRef, ...] = ()
    unenforced: tuple[Unenforced, ...] = ()
    unseen: tuple[Unseen, ...] = ()  # of the visibility asked for

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
    audit: bool = False  # allowed, but reported: `rules` would deny it, if they did not only audit
    l7: L7Set | None = None  # allowed as far as this allows the request

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
class Subject:
    """Whose policy is asked for: all that it depends on besides rules and identities."""

    labels: Labels
    mode: Mode
    names: PortNames = ()
    visibility: tuple[PortRule, ...] = ()

    @property
    def node(self) -> bool:
        """A node itself, known by `reserved:host`: rules about nodes are about it, no others."""
        return is_node(self.labels)


@dataclass(frozen=True, slots=True)
class Service:
    """A service as rules may name it. Only one without a selector has backends that count here:
    those of the others are endpoints, and have labels."""

    namespace: str
    name: str
    labels: Labels = field(default_factory=Labels)
    backends: frozenset[Network] = frozenset()


class Changed(NamedTuple):
    """What a change of documents touched."""

    revision: int
    subjects: frozenset[Labels]  # held ones that rules that came or went are about
    fresh: frozenset[Network]  # prefixes that need an identity now
    idle: frozenset[Network]  # prefixes that need none any more


_ProgramKey = tuple[object, ...]


class PolicyEngine:
    """Documents and identities in; map states, verdicts and traces out.

    Subjects that were resolved are kept current as identities come and go, until `forget`. Rules
    that change are folded in when a subject that they are about is resolved again.
    """

    def __init__(
        self,
        mode: Mode = "default",
        allow_localhost: bool = True,
        cluster_name: str = "default",
        *,
        rule_ids: RuleIDs | None = None,
        enforcers: Iterable[str] = (),
    ) -> None:
        self.mode: Mode = mode
        self.allow_localhost: Final = allow_localhost
        self.cluster_name: Final = cluster_name
        self.repository: Final = Repository(rule_ids)
        self.selectors: Final[SelectorCache[Live, Said]] = SelectorCache()
        self._enforcers = frozenset(enforcers)
        self._parts: Final[dict[StoredRule, RuleParts]] = {}
        self._programs: Final[WeakValueDictionary[_ProgramKey, Program]] = WeakValueDictionary()
        self._subjects: Final[dict[Subject, _ProgramKey]] = {}
        self._by_labels: Final[dict[Labels, set[Subject]]] = {}
        self._labels: Final[LabelIndex[Labels]] = LabelIndex()  # of subjects
        self._holders: Final[dict[_ProgramKey, set[Subject]]] = {}
        self._live: Final[dict[_ProgramKey, Live]] = {}
        self._stale: Final[set[Subject]] = set()
        self._transient: Final[OrderedDict[Subject, Program]] = OrderedDict()
        self._expansions: Final[dict[str, tuple[EndpointSelector, ...]]] = {}
        self._names: Final[dict[int, PortNames]] = {}
        self._known_names: Final[Counter[str]] = Counter()
        self._fqdn: dict[FQDNSelector, frozenset[Network]] | None = None
        self._services: dict[tuple[str, str], Service] | None = None
        self._serial = 0  # of parts
        #: Raised with everything that may change an answer.
        self.version = 0

    # ---- documents

    @property
    def revision(self) -> int:
        return self.repository.revision

    def documents(self) -> tuple[Document, ...]:
        return self.repository.documents()

    def set_documents(self, documents: Iterable[Document]) -> int:
        """Make these the documents in force; gives the revision."""
        wanted = {document.key: document for document in documents}
        gone = [x for x in self.repository.names() if x not in wanted]
        # Sorted, so that the engine's state depends on the set alone.
        return self.apply([wanted[key] for key in sorted(wanted)], gone).revision

    def upsert(self, document: Document) -> int:
        return self.apply((document,)).revision

    def remove(self, kind: str, namespace: str | None, name: str) -> int:
        return self.apply((), (DocumentKey(str(kind), namespace or "", name),)).revision

    def apply(self, puts: Iterable[Document], removed: Iterable[DocumentKey] = ()) -> Changed:
        """Put documents in and take others out. Costs what it changes."""
        subjects: set[Labels] = set()
        fresh: set[Network] = set()
        idle: set[Network] = set()
        changes = [self.repository.delete(x.kind, x.namespace, x.name) for x in removed]
        changes += [self.repository.upsert(document) for document in puts]
        for change in changes:
            if change is None:
                continue
            fresh |= change.fresh
            idle = (idle - change.fresh) | change.idle
            fresh -= change.idle
            for stored in change.gone:
                self._parts.pop(stored, None)
            if change.moved:
                self._parts.clear()
                subjects.update(self._by_labels)
            else:
                for stored in (*change.gone, *change.came):
                    subjects.update(self._subjects_of(stored.rule))
        if any(change is not None for change in changes):
            self._unlearn(subjects)
        tables = self._table_prefixes() if idle or fresh else frozenset()
        return Changed(
            self.revision, frozenset(subjects), frozenset(fresh - tables), frozenset(idle - tables)
        )

    def _subjects_of(self, rule: Rule) -> Iterator[Labels]:
        """The held subjects that a rule is about."""
        for labels in self._labels.candidates(rule.selector, self._by_labels.keys()):
            if rule.node is is_node(labels) and rule.selector.matches(labels):
                yield labels

    def _unlearn(self, subjects: Iterable[Labels]) -> None:
        """What rules say of these must be looked at again."""
        self.version += 1
        self._transient.clear()
        for labels in subjects:
            self._stale.update(self._by_labels[labels])

    def _rules_changed(self, concerned: Callable[[Rule], bool]) -> frozenset[Labels]:
        """Rules say something else now than they did, though their text is the same."""
        subjects: set[Labels] = set()
        for stored in self.repository.rules():
            if concerned(stored.rule):
                self._parts.pop(stored, None)
                subjects.update(self._subjects_of(stored.rule))
        self._unlearn(subjects)
        return frozenset(subjects)

    def cidr_prefixes(self) -> frozenset[Network]:
        """The prefixes that need an identity on this node, so that rows can tell them: those that
        rules name, and those that the tables of names and services give."""
        return self.repository.prefixes() | self._table_prefixes()

    def _table_prefixes(self) -> frozenset[Network]:
        services = self._services.values() if self._services else ()
        return frozenset().union(*(self._fqdn or {}).values(), *(x.backends for x in services))

    def rule(self, rule_id: int) -> RuleInfo:
        """Where the rule of this number was written. Raises KeyError."""
        return self.repository.ids.ref(rule_id)

    # ---- what rules need besides documents

    @property
    def watched(self) -> tuple[bool, bool]:
        """Whether there are a table of DNS names, and one of services."""
        return self._fqdn is not None, self._services is not None

    @property
    def enforcers(self) -> frozenset[str]:
        """The L7 parsers that somebody enforces; port rules of others allow nothing."""
        return self._enforcers

    @enforcers.setter
    def enforcers(self, parsers: Iterable[str]) -> None:
        self.set_enforcers(parsers)

    def set_enforcers(self, parsers: Iterable[str]) -> frozenset[Labels]:
        """Gives the subjects whom it concerns."""
        found = frozenset(parsers)
        changed, self._enforcers = found ^ self._enforcers, found
        if not changed:
            return frozenset()

        def concerned(rule: Rule) -> bool:
            ports = (port for x in rule.elements for port in x.ports or ())
            return any(port.l7 is not None and port.l7.parser in changed for port in ports)

        return self._rules_changed(concerned) | self._looking()

    def _looking(self) -> frozenset[Labels]:
        """The subjects with visibility, for whom L7 comes in without a rule."""
        found = frozenset(x.labels for x in self._subjects if x.visibility)
        self._unlearn(found)
        return found

    def set_fqdn(
        self, selector: FQDNSelector | None, networks: Iterable[Network] = ()
    ) -> frozenset[Labels]:
        """The addresses (as /32 and /128) that DNS gave for a selector, all of them.

        None only says that there is a DNS table: names that were never asked for are then no part
        that nobody enforces. Gives the subjects whom it concerns. Addresses need identities, like
        the prefixes of rules (`cidr_prefixes`).
        """
        first = self._fqdn is None
        table = self._fqdn = self._fqdn if self._fqdn is not None else {}
        wanted = frozenset(networks)
        if selector is None or table.get(selector, frozenset()) == wanted:
            if not first:
                return frozenset()
        elif wanted:
            table[selector] = wanted
        else:
            table.pop(selector, None)

        def concerned(rule: Rule) -> bool:
            peers = (peer for x in rule.elements for peer in x.peers or ())
            return any(
                peer == selector if not first else isinstance(peer, FQDNSelector) for peer in peers
            )

        return self._rules_changed(concerned)

    def set_services(self, services: Iterable[Service]) -> frozenset[Labels]:
        """All services there are; gives the subjects whom the difference concerns."""
        table = {(x.namespace, x.name): x for x in services}
        if table == self._services:
            return frozenset()
        self._services = table

        def concerned(rule: Rule) -> bool:
            peers = (peer for x in rule.elements for peer in x.peers or ())
            return any(isinstance(peer, ServiceSelector) for peer in peers)

        return self._rules_changed(concerned)

    def set_port_names(
        self, identity: int, names: Mapping[str, tuple[int, int]] | PortNames
    ) -> frozenset[Labels]:
        """What endpoints of an identity call their ports, {name: (port, protocol number)}, for
        rules about going there; gives the subjects whose map state changed."""
        wanted = port_names(names)
        old = self._names.get(identity, ())
        if old == wanted:
            return frozenset()
        self.version += 1
        self._known_names.subtract(x[0] for x in old)
        self._known_names.update(x[0] for x in wanted)
        if wanted:
            self._names[identity] = wanted
        else:
            del self._names[identity]
        changed: set[Labels] = set()
        for key, live in self._live.items():
            if live.program.uses_names and live.rename(identity):
                changed.update(x.labels for x in self._holders[key])
        return frozenset(changed)

    # ---- identities

    def add_identity(self, identity: int, labels: Labels) -> frozenset[Labels]:
        """Enter an identity; gives the subjects whose map state changed.

        The same again changes nothing; with other labels it replaces the identity.
        """
        known = self.selectors.labels(identity)
        if known == labels:
            return frozenset()
        if known is not None:
            gone = self.remove_identity(identity)
            return gone | self.add_identity(identity, labels)
        return self._identity_changed(identity, self.selectors.add_identity(identity, labels))

    def remove_identity(self, identity: int) -> frozenset[Labels]:
        """Forget an identity; gives the subjects whose map state changed."""
        return self._identity_changed(identity, self.selectors.remove_identity(identity), gone=True)

    def _identity_changed(
        self, identity: int, selectors: tuple[CacheSelector, ...], *, gone: bool = False
    ) -> frozenset[Labels]:
        self.version += 1
        matched: dict[Live, list[Said]] = {}
        for selector in selectors:
            for live, said in self.selectors.users(selector).items():
                matched.setdefault(live, []).append(said)
        changed: set[Labels] = set()
        for live, found in matched.items():
            if live.change(identity, () if gone else found):
                changed.update(x.labels for x in self._holders[live.key])
        return frozenset(changed)

    # ---- resolution

    def resolve(
        self,
        subject: Labels,
        *,
        mode: Mode | None = None,
        audit: bool = False,
        named_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
        visibility: Iterable[PortRule] = (),
    ) -> ResolvedPolicy:
        """What policy means for a subject. Cheap when nothing changed; held until `forget`.

        `audit` is the endpoint's own: it changes no row, for the kernel then reports instead of
        dropping (EP_F_AUDIT). `named_ports` are the subject's, {name: (port, protocol number)}.
        `visibility` shows traffic to proxies in directions in which policy neither isolates nor has
        L7 rules; each port rule's path is "ingress" or "egress". A subject with `reserved:host` is
        a node.
        """
        held = Subject(subject, mode or self.mode, port_names(named_ports), tuple(visibility))
        live = self.live(held)
        program = live.program
        return ResolvedPolicy(
            subject=subject,
            mode=held.mode,
            audit=audit,
            revision=self.revision,
            ingress_enforced=program.ingress_enforced,
            egress_enforced=program.egress_enforced,
            mapstate=live.snapshot(),
            default_deny_ingress=program.default_deny[False],
            default_deny_egress=program.default_deny[True],
            audited_ingress=program.audited[False],
            audited_egress=program.audited[True],
            unenforced=(*live.unenforced(), *self._unnamed(program)),
            unseen=program.unseen,
        )

    def live(self, held: Subject) -> Live:
        """A subject's rows, kept current from now on until `forget`."""
        if held in self._stale:
            self._refresh(held)
        key = self._subjects.get(held)
        return self._live[self._hold(held) if key is None else key]

    def state(self, subject: Subject) -> MapState | None:
        """The rows of a subject that is held, or None if it is not, or if its rules changed since
        it was resolved. For many subjects, where peers came and went."""
        key = self._subjects.get(subject)
        if key is None or subject in self._stale:
            return None
        return self._live[key].snapshot()

    def _unnamed(self, program: Program) -> Iterator[Unenforced]:
        for ref, name in program.peer_ports:
            if self._known_names[name] <= 0:
                yield Unenforced(ref, f"no endpoint has a port named {name!r}")

    def forget(self, subject: Labels) -> None:
        """Stop keeping a subject current: no endpoint has these labels any more."""
        for held in list(self._by_labels.get(subject, ())):
            self._let_go(held)

    def _hold(self, held: Subject) -> _ProgramKey:
        key, rules = self._rules(held)
        if key not in self._live:
            program = self._programs.get(key) or self._compile(held, rules)
            self._programs[key] = program
            live = self._live[key] = Live(program, self.selectors, self._names)
            live.key = key
        self._enter(held, key)
        return key

    def _enter(self, held: Subject, key: _ProgramKey) -> None:
        self._subjects[held] = key
        self._holders.setdefault(key, set()).add(held)
        if held.labels not in self._by_labels:
            self._labels.add(held.labels, held.labels)
        self._by_labels.setdefault(held.labels, set()).add(held)

    def _let_go(self, held: Subject) -> None:
        self._stale.discard(held)
        of_labels = self._by_labels[held.labels]
        of_labels.discard(held)
        if not of_labels:
            del self._by_labels[held.labels]
            self._labels.remove(held.labels, held.labels)
        self._leave(held)

    def _leave(self, held: Subject) -> None:
        key = self._subjects.pop(held)
        holders = self._holders[key]
        holders.discard(held)
        if not holders:
            del self._holders[key]
            self._live.pop(key).close()

    def _refresh(self, held: Subject) -> None:
        """Fold changed rules in. Where all who share a live map agree on what it is to become, and
        none is there yet, the map itself is changed; otherwise the subject moves to another."""
        key = self._subjects[held]
        group = self._holders[key]
        self._stale.discard(held)
        wanted, rules = self._rules(held)
        together = wanted == key or (
            wanted not in self._live
            and all(x == held or (x in self._stale and self._rules(x)[0] == wanted) for x in group)
        )
        if not together:
            self._leave(held)
            self._hold(held)
            return
        self._stale.difference_update(group)
        program = self._compile(held, rules)
        live = self._live.pop(key)
        self._live[wanted] = live
        live.key = wanted
        self._holders[wanted] = self._holders.pop(key)
        for x in self._holders[wanted]:
            self._subjects[x] = wanted
        self._programs[wanted] = program
        live.update(program)

    def _rules(self, held: Subject) -> tuple[_ProgramKey, tuple[StoredRule, ...]]:
        rules = self._rules_about(held)
        init = held.labels.get("init", SOURCE_RESERVED) is not None
        wanted = frozenset().union(*(self._parts_of(x).port_names for x in rules))
        names = tuple(x for x in held.names if x[0] in wanted)
        shown = (held.visibility, self._enforcers) if held.visibility else ()
        parts = tuple(self._parts_of(x).serial for x in rules)
        return (held.mode, parts, init, held.node, names, shown), rules

    def _rules_about(self, held: Subject) -> tuple[StoredRule, ...]:
        if held.mode == "never":
            return ()
        return self.repository.rules_for(held.labels, node=held.node)

    def _parts_of(self, stored: StoredRule) -> RuleParts:
        found = self._parts.get(stored)
        if found is None:
            self._serial += 1
            found = rule_parts(stored, self.repository.ids, self._enforcers, self._serial)
            self._parts[stored] = found
        return found

    def _program(self, held: Subject) -> Program:
        """A subject's program for a question: the live one, or one kept for a while."""
        if held in self._stale:
            self._refresh(held)
        key = self._subjects.get(held)
        if key is not None:
            return self._live[key].program
        program = self._transient.get(held)
        if program is None:
            new_key, rules = self._rules(held)
            known = self._programs.get(new_key)
            program = known if known is not None else self._compile(held, rules)
            self._programs[new_key] = program
            self._transient[held] = program
            if len(self._transient) > _MAX_TRANSIENT:
                self._transient.popitem(last=False)
        return program

    def _compile(self, held: Subject, rules: tuple[StoredRule, ...]) -> Program:
        init = held.labels.get("init", SOURCE_RESERVED) is not None
        parts = [self._parts_of(x) for x in rules]
        sources: tuple[list[RuleRef], list[RuleRef]] = ([], [])
        audited: tuple[list[RuleRef], list[RuleRef]] = ([], [])
        requires: dict[tuple[bool, bool], list[Requirement]] = {}
        unenforced: list[Unenforced] = []
        everyone: list[Contribution] = []
        for x in parts:
            for direction in (False, True):
                if (ref := x.isolates[direction]) is not None:
                    (audited if x.audit else sources)[direction].append(ref)
            for side, required in x.requires:
                requires.setdefault(side, []).extend(required)
            unenforced += x.unenforced
        # A node is isolated by rules about it and by nothing else: a mode must lock nobody out.
        always = not held.node and (held.mode == "always" or (held.mode == "default" and init))
        enforced = (always or bool(sources[False]), always or bool(sources[True]))
        restricted = [False, False]  # directions in which some rule says which requests may pass
        layers = []
        for x, stored in zip(parts, rules, strict=True):
            layer = self._layer(stored, x, held.names, requires)
            unenforced += layer.unenforced
            everyone += layer.everyone
            for egress in layer.restricts:
                restricted[egress] = True
            if layer.selectors:
                layers.append(layer)
        unseen: list[Unseen] = []
        for rule in held.visibility:
            egress = rule.path == "egress"
            if rule.l7 is None or rule.l7.parser not in self._enforcers:
                parser = rule.l7.parser if rule.l7 is not None else "this"
                unseen.append(Unseen(egress, rule, f"no proxy here shows {parser}"))
            elif enforced[egress]:
                unseen.append(Unseen(egress, rule, "policy isolates this direction"))
            elif restricted[egress]:
                unseen.append(Unseen(egress, rule, "policy has L7 rules in this direction"))
            else:
                keys = tuple(k for l4 in rule.l4 for k in l4_keys(egress, l4))
                everyone.append(Contribution(False, False, keys, NO_RULE, (_LAST,), rule.l7))
        return Program(
            ids=self.repository.ids,
            ingress_enforced=enforced[False],
            egress_enforced=enforced[True],
            layers=tuple(layers),
            everyone=tuple(dict.fromkeys(everyone)),
            host_allow=self.allow_localhost
            and (enforced[False] or bool(audited[False]))
            and not held.node,
            default_deny=(tuple(sources[False]), tuple(sources[True])),
            audited=(
                () if enforced[False] else tuple(audited[False]),
                () if enforced[True] else tuple(audited[True]),
            ),
            unenforced=tuple(sorted(set(unenforced), key=lambda x: (x.rule.policy, x.rule.path))),
            unseen=tuple(unseen),
            peer_ports=tuple(dict.fromkeys(x for part in parts for x in part.peer_ports)),
        )

    def _layer(
        self,
        stored: StoredRule,
        parts: RuleParts,
        names: PortNames,
        requires: Mapping[tuple[bool, bool], list[Requirement]],
    ) -> Layer:
        """What one rule says of whom. The same again for subjects that it means the same for."""
        names = tuple(x for x in names if x[0] in parts.port_names)
        key = names, tuple((side, tuple(found)) for side, found in requires.items())
        layer = parts.layers.get(key)
        if layer is None:
            if len(parts.layers) >= _MAX_LAYERS:
                parts.layers.clear()
            layer = parts.layers[key] = self._make_layer(stored, parts, names, requires)
        return layer

    def _make_layer(
        self,
        stored: StoredRule,
        parts: RuleParts,
        names: PortNames,
        requires: Mapping[tuple[bool, bool], list[Requirement]],
    ) -> Layer:
        found: dict[CacheSelector, Said] = {}
        everyone: list[Contribution] = []
        restricts: set[bool] = set()
        for part, said in zip(parts.parts, parts.contributions(names), strict=True):
            if not said:
                continue
            if any(c.l7 is not None for c in said):
                restricts.add(part.egress)
            extra = requires.get((part.egress, part.deny), [])
            for peer in part.peers if part.peers is not None else (None,):
                selectors = (EVERYBODY,) if peer is None else self._expand(peer, extra)
                for selector in selectors:
                    if selector == EVERYBODY:
                        everyone += [c for c in said if not c.named]
                        # What a port's name means is each peer's own affair.
                        own: Said = tuple(c for c in said if c.named)
                        if not own:
                            continue
                    else:
                        own = said
                    before = found.get(selector)
                    if before is None:
                        found[selector] = own
                    elif before[-len(own) :] != own:  # it may be named twice
                        found[selector] = (*before, *own)
        return Layer(
            selectors=found,
            everyone=tuple(everyone),
            said=frozenset().union(*found.values()),
            restricts=frozenset(restricts),
            unenforced=tuple(self._missing(stored, names)),
        )

    def _missing(self, stored: StoredRule, names: PortNames) -> Iterator[Unenforced]:
        """What of a rule allows nothing, for want of a table or of a name."""
        number = self.repository.ids.number
        for x in stored.rule.elements:
            whys: dict[str, None] = {}
            for peer in x.peers or ():
                match peer:
                    case AbsentSelector(what):
                        whys[f"{what} is not resolved yet"] = None
                    case FQDNSelector() if self._fqdn is None:
                        whys["toFQDNs needs DNS answers, and nobody watches DNS"] = None
                    case ServiceSelector() if self._services is None:
                        whys["toServices needs services, and nobody watches them"] = None
                    case _:
                        pass
            for rule in x.ports or ():
                for port in rule.named:
                    if not x.egress and not any(
                        name == port.name and port.proto in (0, proto) for name, _, proto in names
                    ):
                        whys[f"the endpoint has no port named {port.name!r}"] = None
            if whys:
                ref = self.repository.ids.ref(number(stored.document.key, x.path))
                yield from (Unenforced(ref, why) for why in whys)

    def _expand(self, peer: PeerSelector, requires: list[Requirement]) -> tuple[CacheSelector, ...]:
        match peer:
            case EndpointSelector():
                return (peer.plus(*requires) if requires else peer,)
            case EntitySelector(entity):
                found = self._expansions.get(entity)
                if found is None:
                    found = self._expansions[entity] = peer.expand(self.cluster_name)
                return found
            case FQDNSelector():
                addresses = (self._fqdn or {}).get(peer, frozenset())
                return tuple(map(CidrSelector, sorted(addresses, key=str)))
            case ServiceSelector():
                backends: set[Network] = set()
                for service in (self._services or {}).values():
                    if peer.namespace not in ("", service.namespace):
                        continue
                    if (
                        peer.selector.matches(service.labels)
                        if peer.selector is not None
                        else peer.name == service.name
                    ):
                        backends |= service.backends
                return tuple(map(CidrSelector, sorted(backends, key=str)))
            case AbsentSelector():
                return ()
            case _:
                return (peer,)

    def program(
        self,
        subject: Labels,
        *,
        mode: Mode | None = None,
        named_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
    ) -> Program:
        """What the rules say of a subject, before any peer is looked at. Holds nothing."""
        return self._program(Subject(subject, mode or self.mode, port_names(named_ports)))

    def compile(self, *, mode: Mode | None = None) -> CompiledPolicy:
        """The policies as they are now, made ready for many questions."""
        return CompiledPolicy(self, mode=mode)

    def preview(
        self, documents: Iterable[Document], numbered: Collection[Network] | None = None
    ) -> Preview:
        """What it would mean to put these documents. Enters them nowhere.

        `numbered` are the prefixes that have identities; by default those that rules name now.
        """
        return Preview(self, documents, self.repository.named if numbered is None else numbered)

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
        named_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
        peer_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
    ) -> Verdict:
        """Whether a subject may talk with a peer, and why.

        `direction` is the subject's; `proto` a number or a name; `port` the destination port, of
        ICMP the type. A peer may be an identity the engine knows, or labels. `named_ports` are the
        subject's, {name: (port, protocol number)}, `peer_ports` the peer's (of an identity, by
        default, those that were set). Raises KeyError for an identity it does not know, ValueError
        for a protocol or port that is none.
        """
        egress = direction == "egress"
        number = _protocol(proto)
        if not 0 <= port <= 65535:
            raise ValueError(f"port {port} is outside 0 to 65535")
        program = self._program(Subject(subject, mode or self.mode, port_names(named_ports)))
        labels = peer if isinstance(peer, Labels) else self.selectors.labels(peer)
        if labels is None:
            raise KeyError(f"identity {peer} is not known")
        names = port_names(peer_ports)
        if peer_ports is None and not isinstance(peer, Labels):
            names = self._names.get(peer, ())
        own = program.block_of(labels, names)
        match = lookup_blocks(own, program.wildcard, -1, egress, number, port)
        return self._explain(program, subject, peer, labels, egress, number, port, match, mode)

    def judges(self, labels: Labels) -> bool:
        """Whether policy judges the traffic of such a peer: an endpoint, or a node that rules are
        about."""
        if is_node(labels):
            return bool(self.repository.rules_for(labels, node=True))
        return is_subject(labels)

    def trace(
        self,
        src: Labels,
        dst: Labels,
        proto: int | str,
        port: int = 0,
        *,
        mode: Mode | None = None,
        dst_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
    ) -> Trace:
        """Both ends' verdicts about one connection. `dst_ports`: what the destination calls its
        ports, {name: (port, protocol number)}."""
        verdicts = []
        for subject, peer, direction in ((src, dst, "egress"), (dst, src, "ingress")):
            if self.judges(subject):
                egress: Direction = "egress" if direction == "egress" else "ingress"
                verdicts.append(
                    self.verdict(
                        subject,
                        peer,
                        egress,
                        proto,
                        port,
                        mode=mode,
                        named_ports=dst_ports if direction == "ingress" else None,
                        peer_ports=dst_ports or () if direction == "egress" else (),
                    )
                )
            else:
                reason = f"{describe(subject)} is no endpoint, so no policy judges its {direction}."
                verdicts.append(Verdict(allowed=True, enforced=False, reason=reason))
        return Trace(*verdicts)

    def _explain(
        self,
        program: Program,
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
        elif match.entry.audit:
            reason = (
                f"{what}: allowed, but reported: {by} would deny it, and only audits."
                if match.entry.rule_id
                else f"{what}: allowed, but reported: it would be denied by default, because of "
                f"{by}, which only audits."
            )
        elif match.entry.l7 is not None and not match.entry.l7.allows_all:
            reason = (
                f"{what}: requests are allowed as the {match.entry.l7.parser} rules say of {by}."
            )
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
            audit=match is not None and match.entry.audit,
            l7=match.entry.l7 if match is not None else None,
        )


class _Overlay(PolicyEngine):
    """An engine as it would be with other documents put; its rules only, and no identities."""

    def __init__(self, base: PolicyEngine, documents: Iterable[Document]) -> None:
        super().__init__(
            base.mode,
            base.allow_localhost,
            base.cluster_name,
            rule_ids=OverlaidIDs(base.repository.ids),
            enforcers=base.enforcers,
        )
        self._base: Final = base
        self._fqdn, self._services = base._fqdn, base._services
        for document in documents:
            self.repository.upsert(document)
        self._put: Final = frozenset(self.repository.names())

    def _rules_about(self, held: Subject) -> tuple[StoredRule, ...]:
        left = (x for x in self._base._rules_about(held) if x.document.key not in self._put)
        return tuple(sorted((*left, *super()._rules_about(held)), key=lambda x: x.order))

    def _parts_of(self, stored: StoredRule) -> RuleParts:
        """What is in force is ready, and need not be made again."""
        mine = stored.document.key in self._put
        return super()._parts_of(stored) if mine else self._base._parts_of(stored)

    def compile_for(self, held: Subject) -> Program:
        return self._compile(held, self._rules_about(held))


class Preview:
    """How large map states would be with other documents put than those in force.

    It reads what the engine knows, adds what the documents would change, and leaves no trace.
    """

    def __init__(
        self, engine: PolicyEngine, documents: Iterable[Document], numbered: Collection[Network]
    ) -> None:
        self._engine: Final = engine
        self._overlay: Final = _Overlay(engine, documents)
        fresh = [x for x in self._overlay.repository.prefixes() if x not in numbered]
        self._fresh = self._selectors_of(fresh)
        self._counted: Final[dict[tuple[object, ...], int]] = {}

    def _selectors_of(self, prefixes: list[Network]) -> dict[int, Newcomer]:
        """Numbers that nobody has, and the selectors of prefixes that select them."""
        added: SelectorCache[None, None] = SelectorCache()
        for stored in self._overlay.repository.rules():
            for element in stored.rule.elements:
                for peer in element.peers or ():
                    if isinstance(peer, CidrSelector):
                        added.acquire(peer, None, None)
        present = self._engine.selectors
        return {
            -1 - n: (
                reserved_labels(WORLD_IPV4 if prefix.version == 4 else WORLD_IPV6),
                [*present.covering(prefix), *added.covering(prefix)],
            )
            for n, prefix in enumerate(prefixes)
        }

    def rows(
        self,
        subject: Labels,
        *,
        mode: Mode,
        named_ports: Mapping[str, tuple[int, int]] | PortNames | None = None,
        visibility: Iterable[PortRule] = (),
    ) -> int:
        """The rows of a subject's map state, with identities for all prefixes of rules. The subject
        is held from now on."""
        held = Subject(subject, mode, port_names(named_ports), tuple(visibility))
        live = self._engine.live(held)
        program = self._overlay.compile_for(held)
        key = (live, program.layers, program.everyone, *program.bounds)
        if key not in self._counted:
            self._counted[key] = live.rows_under(program, self._fresh)
        return self._counted[key]


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


def is_node(labels: Labels) -> bool:
    """Whether these are a node's own labels: `reserved:host`, and others that name it."""
    return is_host(labels)


def is_subject(labels: Labels) -> bool:
    """Whether policy judges the traffic of such a peer: an endpoint, not the host or the world."""
    return not any(
        x.source == SOURCE_CIDR or (x.source == SOURCE_RESERVED and x.key in _NOT_SUBJECTS)
        for x in labels
    )
