"""From who there is and what policy says to what the kernel should hold. Pure and synchronous.

    documents, identities, prefixes  -->  PolicyEngine  --+
    endpoints (identity, mode, audit) ---> subjects ------+--> PolicyMapRow a subject
                                             slots -------+
    reserved, host addresses, endpoints, prefixes, cluster --> IpcacheRow a prefix

A subject is what endpoints share: identity, enforcement mode, audit, what they call their ports,
what of them is shown to proxies. Each has a slot of
cilia_policy for as long as an endpoint, or the kernel's row of one, needs it. The result depends on
current inputs alone; what is dirty only says which subjects need to be resolved again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

from cilia import policy
from cilia.errors import ExhaustedError
from cilia.identity import (
    HOST,
    RESERVED,
    WORLD_IPV4,
    WORLD_IPV6,
    NumericIdentity,
    cidr_labels,
    reserved_labels,
)
from cilia.labels import Labels
from cilia.policy import (
    Document,
    DocumentKey,
    L7Set,
    PolicyEngine,
    PortRule,
    ResolvedPolicy,
    RuleRef,
    Service,
    is_node,
    parse_visibility,
)
from cilia.policy.api import FQDNSelector
from cilia.policy.l7 import PortNames
from services.agent.clusterwatch import IpEntry, PolicyName
from services.agent.endpoint import Endpoint, OptionMode, SlotIndex, SubjectKey
from services.agent.identityalloc import CidrIdentities
from services.agent.ipam import host_network
from services.agent.policyrows import Fill
from services.agent.rows import IpcacheRow, PolicyMapRow

Network = IPv4Network | IPv6Network

WORLD4: Final = IPv4Network("0.0.0.0/0")
WORLD6: Final = IPv6Network("::/0")


class SlotsExhausted(ExhaustedError):
    default_cure = "Start the agent with a larger --bpf-policy-slots"

    def __init__(self, slots: int) -> None:
        super().__init__(f"all {slots - 1} policy slots are in use by distinct identities")


class Slots:
    """Numbers 1..n-1 of cilia_policy; 0 is never used, so a row that was not filled in drops."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_subject: dict[SubjectKey, SlotIndex] = {}
        self._used: set[int] = set()
        self._held: set[int] = set()  # of no subject, but some endpoint's row leads there
        self._next = 1

    @property
    def held(self) -> bool:
        return bool(self._held)

    def hold(self, slots: Iterable[int]) -> None:
        """Give these to nobody: rows that an earlier run left lead there."""
        self._held |= {slot for slot in slots if 0 < slot < self._size} - self._used
        self._used |= self._held

    def unhold(self, led_to: Collection[int]) -> bool:
        """Free what was held and no row leads to any more; True if there was any."""
        freed = self._held.difference(led_to)
        self._held -= freed
        self._used -= freed
        return bool(freed)

    def get(self, subject: SubjectKey) -> SlotIndex | None:
        return self._by_subject.get(subject)

    def adopt(self, subject: SubjectKey, slot: SlotIndex) -> bool:
        """Keep what the kernel has; False when either is taken otherwise."""
        if subject in self._by_subject:
            return self._by_subject[subject] == slot
        if slot in self._used or not 0 < slot < self._size:
            return False
        self._by_subject[subject] = slot
        self._used.add(slot)
        return True

    def allocate(self, subject: SubjectKey) -> SlotIndex:
        """The subject's slot, a free one if it has none. Raises SlotsExhausted."""
        if (slot := self._by_subject.get(subject)) is not None:
            return slot
        if len(self._used) >= self._size - 1:
            raise SlotsExhausted(self._size)
        number = self._next
        while number in self._used:
            number = number + 1 if number + 1 < self._size else 1
        self._next = number + 1 if number + 1 < self._size else 1
        self._used.add(number)
        self._by_subject[subject] = SlotIndex(number)
        return SlotIndex(number)

    def free(self, subject: SubjectKey) -> None:
        slot = self._by_subject.pop(subject, None)
        if slot is not None:
            self._used.discard(slot)

    def subjects(self) -> frozenset[SubjectKey]:
        return frozenset(self._by_subject)


@dataclass(slots=True)
class Subject:
    """What endpoints share, and who they are."""

    key: SubjectKey
    labels: Labels
    users: dict[int, str] = field(default_factory=dict)  # endpoint id -> name
    policy: policy.Subject | None = None  # as the engine knows it
    row: PolicyMapRow | None = None  # its last
    visibility: tuple[PortRule, ...] = ()  # what the key asks for

    def __post_init__(self) -> None:
        self.visibility = parse_visibility(self.key.visibility)


@dataclass(frozen=True, slots=True)
class Preview:
    """One subject's policy as documents that are not in force yet would make it."""

    subject: SubjectKey
    users: tuple[str, ...]  # names of endpoints
    rows_now: int
    rows: int


def _no_proxy(_: L7Set) -> int | None:
    return None


class Calculation:
    """The engine with the inputs it has been given. Owned by the event loop.

    `ports` says at which port a proxy enforces an L7 set, once it does; rows that need one that is
    not ready are absent.
    """

    def __init__(
        self,
        *,
        mode: OptionMode,
        audit: bool,
        allow_localhost: bool,
        cluster: str,
        slots: int,
        cidrs: CidrIdentities,
        router: Iterable[IPv4Address | IPv6Address],
        ports: Callable[[L7Set], int | None] = _no_proxy,
        enforcers: Iterable[str] = (),
    ) -> None:
        self.mode = mode
        self.audit = audit
        self.engine = PolicyEngine(
            mode=mode, allow_localhost=allow_localhost, cluster_name=cluster, enforcers=enforcers
        )
        self.slots = Slots(slots)
        self.cidrs = cidrs
        self.ports = ports
        self.generation = 0
        self._router = tuple(router)
        self._documents: dict[PolicyName, Document] = {}
        self._identities: dict[NumericIdentity, Labels] = {}
        self._subjects: dict[SubjectKey, Subject] = {}
        self._by_labels: dict[Labels, set[SubjectKey]] = {}
        self._node: Subject | None = None
        self._dirty: set[SubjectKey] = set()
        self._touched: set[SubjectKey] = set()
        self._l7_of: dict[SubjectKey, frozenset[L7Set]] = {}
        self._cidr_in_engine: dict[Network, NumericIdentity] = {}
        self._unnumbered: set[Network] = set()
        self._adopted = False
        self._port_names: dict[NumericIdentity, PortNames] = {}
        self.host_addresses: frozenset[IPv4Address | IPv6Address] = frozenset()
        for number in RESERVED:
            self._put_identity(number, reserved_labels(number))

    # ---- inputs

    @property
    def identities(self) -> Mapping[NumericIdentity, Labels]:
        return self._identities

    def rule_of(self, rule_id: int) -> RuleRef | None:
        """Where a rule was written; None of 0, and of one that is not known any more."""
        try:
            return self.engine.rule(rule_id) if rule_id else None
        except KeyError:
            return None

    def labels_of(self, identity: NumericIdentity) -> Labels | None:
        return self._identities.get(identity)

    @property
    def subjects(self) -> Mapping[SubjectKey, Subject]:
        return self._subjects

    @property
    def documents(self) -> Mapping[PolicyName, Document]:
        return self._documents

    def set_documents(
        self, puts: Mapping[PolicyName, Document], removed: Iterable[PolicyName] = ()
    ) -> None:
        """Change the policy set. The prefixes it names are numbered at once.

        Raises LocalIdentitiesExhausted.
        """
        gone = [
            DocumentKey(name.kind, name.namespace, name.name)
            for name in removed
            if self._documents.pop(name, None) is not None
        ]
        self._documents.update(puts)
        if not self._adopted:
            # Prefixes of an earlier run are in the ipcache, whether or not rules name them still.
            self._adopted = True
            for prefix, number in self.cidrs.numbers.items():
                self._cidr_in_engine[prefix] = number
                self._put_identity(number, cidr_labels(prefix))
        changed = self.engine.apply(puts.values(), gone)
        self._number(changed.fresh, changed.idle)
        self._mark(changed.subjects, self._dirty)
        self.generation += 1

    def _number(self, fresh: Iterable[Network], idle: Iterable[Network]) -> None:
        """Give prefixes identities, in the kernel's numbers and in the engine."""
        self._unnumbered.update(fresh)
        self._unnumbered.difference_update(idle)
        # Sorted: whoever keeps them in order then appends.
        wanted = sorted(
            self._unnumbered, key=lambda x: (x.version, int(x.network_address), x.prefixlen)
        )
        self.cidrs.change(wanted, idle)
        numbers = self.cidrs.numbers
        for prefix in wanted:
            number, old = numbers[prefix], self._cidr_in_engine.get(prefix)
            if number == old:
                continue
            if old is not None:
                # Released and back, with another number: the ipcache's is what counts.
                self.remove_identity(old)
            self._cidr_in_engine[prefix] = number
            self._put_identity(number, cidr_labels(prefix))
        self._unnumbered.clear()

    def release_prefixes(self, gone: Mapping[Network, NumericIdentity]) -> None:
        """Prefixes that left the ipcache: no packet carries their identity any more."""
        for prefix, number in gone.items():
            self._cidr_in_engine.pop(prefix, None)
            self.remove_identity(number)

    def put_identity(self, number: NumericIdentity, labels: Labels) -> None:
        if self._identities.get(number) != labels:
            self._put_identity(number, labels)
            self.generation += 1

    def _put_identity(self, number: NumericIdentity, labels: Labels) -> None:
        self._identities[number] = labels
        self._mark(self.engine.add_identity(number, labels), self._touched)

    def remove_identity(self, number: NumericIdentity) -> None:
        if self._identities.pop(number, None) is not None:
            self._mark(self.engine.remove_identity(number), self._touched)
            self.generation += 1

    def _mark(self, changed: Iterable[Labels], where: set[SubjectKey]) -> None:
        for labels in changed:
            where.update(self._by_labels.get(labels, ()))

    def set_enforcers(self, parsers: Iterable[str]) -> None:
        """Which L7 parsers a proxy here enforces."""
        self._mark(self.engine.set_enforcers(parsers), self._dirty)

    def set_fqdn(self, selector: FQDNSelector | None, addresses: Iterable[Network] = ()) -> None:
        """What DNS gave for a selector; None: that there is somebody who watches DNS."""
        before = self.engine.cidr_prefixes()
        self._mark(self.engine.set_fqdn(selector, addresses), self._touched)
        after = self.engine.cidr_prefixes()
        self._number(after - before, before - after)

    def set_services(self, services: Iterable[Service]) -> None:
        before = self.engine.cidr_prefixes()
        self._mark(self.engine.set_services(services), self._touched)
        after = self.engine.cidr_prefixes()
        self._number(after - before, before - after)

    def proxies_changed(self, digests: Collection[str]) -> None:
        """`ports` answers otherwise than it did for these L7 sets."""
        for key, sets in self._l7_of.items():
            if any(x.digest in digests for x in sets):
                self._touched.add(key)

    def l7_sets(self) -> frozenset[L7Set]:
        """All that proxies have to enforce for the policies that were made last."""
        return frozenset().union(*self._l7_of.values())

    def set_node(
        self, labels: Labels | None, *, mode: OptionMode | None = None, audit: bool | None = None
    ) -> SubjectKey | None:
        """Judge the node itself (`reserved:host` and the labels that rules about nodes select it
        by); None: nobody does. Gives the subject whose slot holds its policy."""
        if labels is None:
            self._node = None
            return None
        key = SubjectKey(HOST, mode or self.mode, self.audit if audit is None else audit)
        if self._node is None or (self._node.key, self._node.labels) != (key, labels):
            self._node = Subject(key, labels, {0: "the node"})
        return key

    def subject_of(self, endpoint: Endpoint) -> SubjectKey | None:
        return endpoint.subject(mode=self.mode, audit=self.audit)

    def set_users(self, endpoints: Iterable[Endpoint]) -> None:
        """Which endpoints there are; subjects follow. Cheap: compares, resolves nothing."""
        wanted: dict[SubjectKey, Subject] = {}
        names: dict[NumericIdentity, set[tuple[str, int, int]]] = {}
        for endpoint in endpoints:
            key = self.subject_of(endpoint)
            if key is None:
                continue
            subject = wanted.get(key)
            if subject is None:
                subject = wanted[key] = Subject(key, endpoint.identity_labels)
            subject.users[endpoint.id] = endpoint.qualified_name
            if key.ports:
                names.setdefault(key.identity, set()).update(key.ports)
        if self._node is not None:
            wanted[self._node.key] = self._node
        if wanted.keys() != self._subjects.keys():
            self.generation += 1
        for key, subject in wanted.items():
            old = self._subjects.get(key)
            if old is not None and old.labels == subject.labels and old.users == subject.users:
                wanted[key] = old
            if old is None or old.labels != subject.labels or old.users != subject.users:
                self._dirty.add(key)
                self.generation += 1
            if old is None or old.labels != subject.labels:
                if old is not None:
                    self._by_labels[old.labels].discard(key)
                self._by_labels.setdefault(subject.labels, set()).add(key)
        for key in self._subjects.keys() - wanted.keys():
            self._by_labels[self._subjects[key].labels].discard(key)
            self._l7_of.pop(key, None)
        self._subjects = wanted
        for labels in [x for x, keys in self._by_labels.items() if not keys]:
            del self._by_labels[labels]
            self.engine.forget(labels)
        self._dirty &= wanted.keys()
        self._touched &= wanted.keys()
        self._name_ports({number: tuple(sorted(found)) for number, found in names.items()})

    def _name_ports(self, wanted: Mapping[NumericIdentity, PortNames]) -> None:
        """What peers call their ports, for rules about going there by name."""
        if wanted == self._port_names:
            return
        for number in wanted.keys() | self._port_names.keys():
            found = wanted.get(number, ())
            if found != self._port_names.get(number, ()):
                self._mark(self.engine.set_port_names(number, found), self._touched)
        self._port_names = dict(wanted)

    # ---- results

    def take_dirty(self) -> set[SubjectKey]:
        """Those whose rules changed, or who are new."""
        dirty, self._dirty = self._dirty, set()
        self._touched -= dirty
        return dirty

    def take_touched(self) -> set[SubjectKey]:
        """Those whose rules stayed the same, but for whom peers came or went."""
        touched, self._touched = self._touched, set()
        return touched

    def mark_dirty(self, subjects: Iterable[SubjectKey]) -> None:
        self._dirty.update(key for key in subjects if key in self._subjects)

    def resolve(self, key: SubjectKey) -> ResolvedPolicy:
        subject = self._subjects[key]
        return self.engine.resolve(
            subject.labels,
            mode=key.mode,
            audit=key.audit,
            named_ports=key.ports,
            visibility=subject.visibility,
        )

    def subjects_of(self, documents: Iterable[Document]) -> set[SubjectKey]:
        """Whom on this node one of these documents is about."""
        rules = [rule for document in documents for rule in document.rules]
        return {
            key
            for key, subject in self._subjects.items()
            if any(
                rule.node is is_node(subject.labels) and rule.selector.matches(subject.labels)
                for rule in rules
            )
        }

    def preview(self, puts: Mapping[PolicyName, Document]) -> Iterator[Preview]:
        """The policies as they would be with these documents put, of whom they are about.

        It changes nothing: prefixes that have no number yet are counted as if each had one.
        """
        preview = self.engine.preview(puts.values(), self._cidr_in_engine)
        for key in sorted(self.subjects_of(puts.values())):
            subject = self._subjects.get(key)
            if subject is None:  # gone since the one before was looked at
                continue
            yield Preview(
                subject=key,
                users=tuple(sorted(subject.users.values())),
                rows_now=len(self.resolve(key).mapstate),
                rows=preview.rows(
                    subject.labels,
                    mode=key.mode,
                    named_ports=key.ports,
                    visibility=subject.visibility,
                ),
            )

    def policy_row(self, key: SubjectKey) -> PolicyMapRow:
        """The policy of one subject. Raises SlotsExhausted."""
        resolved = self.resolve(key)
        state = resolved.mapstate
        ports = {}
        if state.l7:
            self._l7_of[key] = state.l7
            for needed in state.l7:
                if (port := self.ports(needed)) is not None:
                    ports[needed.digest] = port
        else:
            self._l7_of.pop(key, None)
        subject = self._subjects[key]
        subject.policy = policy.Subject(subject.labels, key.mode, key.ports, subject.visibility)
        subject.row = PolicyMapRow(
            slot=self.slots.allocate(key),
            subject=key,
            state=state,
            fill=Fill(ports, resolved.ingress_enforced, resolved.egress_enforced),
            users=tuple(sorted(subject.users.values())),
            generation=self.generation,
            unenforced=resolved.unenforced,
            unseen=resolved.unseen,
        )
        return subject.row

    def newer_row(self, key: SubjectKey) -> PolicyMapRow:
        """As policy_row, for a subject that only peers changed for. Raises SlotsExhausted."""
        subject = self._subjects[key]
        state = self.engine.state(subject.policy) if subject.policy is not None else None
        row = subject.row
        if row is None or state is None or state.l7 or row.state.l7:
            return self.policy_row(key)
        subject.row = PolicyMapRow(
            slot=row.slot,
            subject=key,
            state=state,
            fill=row.fill,
            users=row.users,
            generation=self.generation,
            unenforced=row.unenforced,
            unseen=row.unseen,
        )
        return subject.row

    def ipcache(
        self, *, node: str, endpoints: Iterable[Endpoint], cluster: Mapping[str, IpEntry]
    ) -> dict[Network, IpcacheRow]:
        """Who is behind each prefix. Where sources disagree the nearer one wins:

        reserved < prefixes of policy < other nodes' announcements < own endpoints < own addresses.
        """
        rows: dict[Network, IpcacheRow] = {
            WORLD4: IpcacheRow(prefix=WORLD4, identity=WORLD_IPV4, source="reserved"),
            WORLD6: IpcacheRow(prefix=WORLD6, identity=WORLD_IPV6, source="reserved"),
        }
        for prefix, number in self.cidrs.numbers.items():
            rows[prefix] = IpcacheRow(prefix=prefix, identity=number, source="cidr")
        for text, entry in cluster.items():
            if entry.node == node:
                continue
            network = ip_network(text)
            host_ip = ip_address(entry.host_ip) if entry.host_ip else None
            rows[network] = IpcacheRow(
                prefix=network,
                identity=entry.identity,
                tunnel=host_ip if isinstance(host_ip, IPv4Address) else None,
                source="cluster",
            )
        for endpoint in endpoints:
            rows.update((row.prefix, row) for row in self.ipcache_of(endpoint))
        for address in (*self.host_addresses, *self._router):
            network = host_network(address)
            rows[network] = IpcacheRow(prefix=network, identity=HOST, source="host")
        return rows

    @staticmethod
    def ipcache_of(endpoint: Endpoint) -> list[IpcacheRow]:
        """What `ipcache` says of one endpoint, where nothing of higher rank speaks."""
        if endpoint.realised_identity is None:
            return []
        return [
            IpcacheRow(
                prefix=host_network(address),
                identity=endpoint.realised_identity,
                source="endpoint",
            )
            for address in endpoint.addresses
        ]
