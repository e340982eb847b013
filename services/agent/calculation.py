"""From who there is and what policy says to what the kernel should hold. Pure and synchronous.

    documents, identities, prefixes  -->  PolicyEngine  --+
    endpoints (identity, mode, audit) ---> subjects ------+--> PolicyMapRow a subject
                                             slots -------+
    reserved, host addresses, endpoints, prefixes, cluster --> IpcacheRow a prefix

A subject is what endpoints share: identity, enforcement mode, audit. Each has a slot of
cilia_policy for as long as an endpoint, or the kernel's row of one, needs it. The result depends on
current inputs alone; what is dirty only says which subjects need to be resolved again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
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
from cilia.policy import Document, PolicyEngine, ResolvedPolicy
from services.agent.clusterwatch import IpEntry, PolicyName
from services.agent.endpoint import Endpoint, OptionMode, SlotIndex, SubjectKey
from services.agent.identityalloc import CidrIdentities
from services.agent.ipam import host_network
from services.agent.policyrows import PolicyRows
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


@dataclass(frozen=True, slots=True)
class Preview:
    """One subject's policy as documents that are not in force yet would make it."""

    subject: SubjectKey
    users: tuple[str, ...]  # names of endpoints
    rows_now: int
    rows: int


class Calculation:
    """The engine with the inputs it has been given. Owned by the event loop."""

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
    ) -> None:
        self.mode = mode
        self.audit = audit
        self.engine = PolicyEngine(mode=mode, allow_localhost=allow_localhost, cluster_name=cluster)
        self.slots = Slots(slots)
        self.cidrs = cidrs
        self.generation = 0
        self._router = tuple(router)
        self._documents: dict[PolicyName, Document] = {}
        self._identities: dict[NumericIdentity, Labels] = {}
        self._subjects: dict[SubjectKey, Subject] = {}
        self._dirty: set[SubjectKey] = set()
        self._cidr_in_engine: dict[Network, NumericIdentity] = {}
        self.host_addresses: frozenset[IPv4Address | IPv6Address] = frozenset()
        for number in RESERVED:
            self._put_identity(number, reserved_labels(number))

    # ---- inputs

    @property
    def identities(self) -> Mapping[NumericIdentity, Labels]:
        return self._identities

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
        """Change the policy set. The prefixes it names are numbered at once."""
        for name in removed:
            self._documents.pop(name, None)
        self._documents.update(puts)
        self.engine.set_documents(list(self._documents.values()))
        self.cidrs.require(prefix for prefix in self.engine.cidr_prefixes() if prefix.prefixlen > 0)
        numbers = self.cidrs.numbers
        # One that was released and came back has another number: the ipcache's is what counts.
        for prefix, old in list(self._cidr_in_engine.items()):
            if prefix in numbers and numbers[prefix] != old:
                del self._cidr_in_engine[prefix]
                self.remove_identity(old)
        for prefix, number in numbers.items():
            if prefix not in self._cidr_in_engine:
                self._cidr_in_engine[prefix] = number
                self._put_identity(number, cidr_labels(prefix))
        self._dirty.update(self._subjects)
        self.generation += 1

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
        self._mark(self.engine.add_identity(number, labels))

    def remove_identity(self, number: NumericIdentity) -> None:
        if self._identities.pop(number, None) is not None:
            self._mark(self.engine.remove_identity(number))
            self.generation += 1

    def _mark(self, changed: Iterable[Labels]) -> None:
        affected = set(changed)
        if affected:
            self._dirty.update(
                key for key, subject in self._subjects.items() if subject.labels in affected
            )

    def subject_of(self, endpoint: Endpoint) -> SubjectKey | None:
        return endpoint.subject(mode=self.mode, audit=self.audit)

    def set_users(self, endpoints: Iterable[Endpoint]) -> None:
        """Which endpoints there are; subjects follow. Cheap: compares, resolves nothing."""
        wanted: dict[SubjectKey, Subject] = {}
        for endpoint in endpoints:
            key = self.subject_of(endpoint)
            if key is None:
                continue
            subject = wanted.get(key)
            if subject is None:
                subject = wanted[key] = Subject(key, endpoint.identity_labels)
            subject.users[endpoint.id] = endpoint.qualified_name
        for key, subject in wanted.items():
            old = self._subjects.get(key)
            if old is None or old.labels != subject.labels or old.users != subject.users:
                self._dirty.add(key)
                self.generation += 1
        for labels in {s.labels for s in self._subjects.values()} - {
            s.labels for s in wanted.values()
        }:
            self.engine.forget(labels)
        if wanted.keys() != self._subjects.keys():
            self.generation += 1
        self._subjects = wanted
        self._dirty &= wanted.keys()

    # ---- results

    def take_dirty(self) -> set[SubjectKey]:
        dirty, self._dirty = self._dirty, set()
        return dirty

    def mark_dirty(self, subjects: Iterable[SubjectKey]) -> None:
        self._dirty.update(key for key in subjects if key in self._subjects)

    def resolve(self, key: SubjectKey) -> ResolvedPolicy:
        subject = self._subjects[key]
        return self.engine.resolve(subject.labels, mode=key.mode, audit=key.audit)

    def subjects_of(self, documents: Iterable[Document]) -> set[SubjectKey]:
        """Whom on this node one of these documents is about."""
        selectors = [rule.selector for document in documents for rule in document.rules]
        return {
            key
            for key, subject in self._subjects.items()
            if any(selector.matches(subject.labels) for selector in selectors)
        }

    def preview(self, puts: Mapping[PolicyName, Document]) -> Iterator[Preview]:
        """The policies as they would be with these documents put, of whom they are about.

        It changes nothing: prefixes that have no number yet are counted as if each had one.
        """
        for key in sorted(self.subjects_of(puts.values())):
            subject = self._subjects.get(key)
            if subject is None:  # gone since the one before was looked at
                continue
            mode, labels = key.mode, subject.labels
            wanted = [
                document
                for document in {**self._documents, **puts}.values()
                if any(rule.selector.matches(labels) for rule in document.rules)
            ]
            preview = self.engine.preview(wanted)
            fresh = (
                cidr_labels(prefix)
                for prefix in preview.cidr_prefixes()
                if prefix.prefixlen and prefix not in self._cidr_in_engine
            )
            yield Preview(
                subject=key,
                users=tuple(sorted(subject.users.values())),
                rows_now=len(self.resolve(key).mapstate),
                rows=preview.rows(labels, mode=mode, more=fresh),
            )

    def policy_row(self, key: SubjectKey) -> PolicyMapRow:
        """The policy of one subject. Raises SlotsExhausted."""
        resolved = self.resolve(key)
        return PolicyMapRow(
            slot=self.slots.allocate(key),
            subject=key,
            rows=PolicyRows.from_entries(resolved.mapstate.items()),
            users=tuple(sorted(self._subjects[key].users.values())),
            ingress_enforced=resolved.ingress_enforced,
            egress_enforced=resolved.egress_enforced,
            generation=self.generation,
        )

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
