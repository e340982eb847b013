"""What the cluster told this node: identities, addresses and policies, as one watch delivers them.

`ClusterView` is sans-I/O: it is fed the messages of a list-then-watch stream and returns what
changed. Its dialogue:

    >> ClusterEvents ...   (the snapshot, in pieces)      collected, nothing changes yet
    >> Synced              the snapshot is whole          changes = snapshot against what was held
    >> ClusterEvents       later news                     applied at once
    >> Reset               a snapshot follows             collect again; the old stays in force
    >> Bookmark            nothing new                    the resume point moves

Until the first Synced the view holds what was loaded from disk, or nothing; it never holds half a
snapshot, so a policy that has not arrived yet is never mistaken for one that was deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cilia.identity import NumericIdentity
from cilia.labels import Labels
from cilia.policy import Document, Origin, document_from_parts


@dataclass(frozen=True, slots=True, order=True)
class PolicyName:
    kind: str
    namespace: str  # empty: clusterwide
    name: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.namespace}/{self.name}"
            if self.namespace
            else (f"{self.kind} {self.name}")
        )


Where = tuple[str, int, int]  # source, line, column


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """A stored document: JSON as given, and where each part of it was written."""

    name: PolicyName
    document: bytes
    origin: Where = ("", 0, 0)
    rule_origins: tuple[tuple[str, Where], ...] = ()  # by path
    revision: int = field(default=0, compare=False)  # store revision of its last change

    @classmethod
    def of(cls, document: Document) -> PolicyEntry:
        return cls(
            PolicyName(document.kind, document.namespace or "", document.name),
            document.body,
            (document.origin.source, document.origin.line, document.origin.column),
            tuple((path, (o.source, o.line, o.column)) for path, o in document.origins),
        )

    def parse(self) -> Document:
        """Raises DocumentError."""
        return document_from_parts(
            kind=self.name.kind,
            namespace=self.name.namespace or None,
            name=self.name.name,
            body=self.document,
            origin=Origin(*self.origin),
            origins={path: Origin(*where) for path, where in self.rule_origins},
        )


@dataclass(frozen=True, slots=True)
class IdentityEntry:
    id: NumericIdentity
    labels: Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class IpEntry:
    prefix: str
    identity: NumericIdentity
    node: str = ""
    host_ip: str = ""
    namespace: str = ""
    workload: str = ""


@dataclass(slots=True)
class ClusterEvents:
    """One batch: None under a key means it was deleted."""

    store_id: int
    revision: int
    more: bool = False  # the same revision goes on in the next message
    identities: dict[NumericIdentity, IdentityEntry | None] = field(default_factory=dict)
    ips: dict[str, IpEntry | None] = field(default_factory=dict)
    policies: dict[PolicyName, PolicyEntry | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Synced:
    store_id: int
    revision: int


@dataclass(frozen=True, slots=True)
class Bookmark:
    store_id: int
    revision: int


@dataclass(frozen=True, slots=True)
class Reset:
    store_id: int
    revision: int
    reason: str


WatchMessage = ClusterEvents | Synced | Bookmark | Reset


@dataclass(slots=True)
class Changes:
    """What is different after a message; empty sets when nothing is."""

    identities: set[NumericIdentity] = field(default_factory=set)
    ips: set[str] = field(default_factory=set)
    policies: set[PolicyName] = field(default_factory=set)
    synced: bool = False  # the first whole snapshot arrived with this message

    def __bool__(self) -> bool:
        return bool(self.identities or self.ips or self.policies or self.synced)


class ClusterView:
    """Current state of the cluster as this node knows it."""

    def __init__(self) -> None:
        self._identities: dict[NumericIdentity, IdentityEntry] = {}
        self._ips: dict[str, IpEntry] = {}
        self._policies: dict[PolicyName, PolicyEntry] = {}
        self._snapshot: ClusterEvents | None = ClusterEvents(0, 0)  # being collected
        self._partial: ClusterEvents | None = None  # a revision that came in pieces
        self.store_id = 0
        self.resume_revision = 0
        self.live = False  # a snapshot was received from the service in this run
        self.loaded = False  # a saved policy set was loaded from disk
        self.policy_revision = 0  # of the newest policy change known
        self.policy_version = 0  # raised whenever the policy set changes here
        self.ip_version = 0  # raised whenever `ips` changes

    @property
    def identities(self) -> Mapping[NumericIdentity, IdentityEntry]:
        return MappingProxyType(self._identities)

    @property
    def ips(self) -> Mapping[str, IpEntry]:
        return MappingProxyType(self._ips)

    @property
    def policies(self) -> Mapping[PolicyName, PolicyEntry]:
        return MappingProxyType(self._policies)

    @property
    def synced(self) -> bool:
        """Whether the policy set is whole: live, or as it was last saved."""
        return self.live or self.loaded

    def load(
        self,
        *,
        policies: Iterable[PolicyEntry] | None,
        policy_revision: int,
        identities: Iterable[IdentityEntry],
        store_id: int,
    ) -> None:
        """What was saved by an earlier run; `policies` None when no whole set was ever saved."""
        self._identities = {entry.id: entry for entry in identities}
        self.store_id = store_id
        if policies is not None:
            self._policies = {entry.name: entry for entry in policies}
            self.policy_revision = policy_revision
            self.loaded = True

    def resume_point(self) -> tuple[int, int]:
        """(store id, revision) to ask the next watch to resume from; zeros ask for a snapshot."""
        return (self.store_id, self.resume_revision) if self.live else (0, 0)

    def begin(self) -> None:
        """A new stream starts. One that resumes sends changes only, without a Reset."""
        self._snapshot = None if self.live else ClusterEvents(0, 0)
        self._partial = None

    def feed(self, message: WatchMessage) -> Changes:
        match message:
            case ClusterEvents():
                if self._snapshot is not None:
                    _merge(self._snapshot, message)
                    return Changes()
                if self._partial is not None:
                    _merge(self._partial, message)
                    message, self._partial = self._partial, None
                if message.more:
                    self._partial = message
                    return Changes()
                changes = self._apply(message)
                self._resume(message.store_id, message.revision)
                return changes
            case Reset():
                self._snapshot = ClusterEvents(message.store_id, message.revision)
                return Changes()
            case Synced():
                changes = self._replace(self._snapshot) if self._snapshot else Changes()
                self._snapshot = None
                self._resume(message.store_id, message.revision)
                if not self.live:
                    self.live = True
                    changes.synced = True
                return changes
            case Bookmark():
                if self._snapshot is None:
                    self._resume(message.store_id, message.revision)
                return Changes()

    def _resume(self, store_id: int, revision: int) -> None:
        self.store_id = store_id
        self.resume_revision = revision

    def _apply(self, events: ClusterEvents) -> Changes:
        changes = Changes()
        for number, identity in events.identities.items():
            if identity != self._identities.get(number):
                changes.identities.add(number)
            if identity is None:
                self._identities.pop(number, None)
            else:
                self._identities[number] = identity
        for prefix, ip in events.ips.items():
            if ip != self._ips.get(prefix):
                changes.ips.add(prefix)
            if ip is None:
                self._ips.pop(prefix, None)
            else:
                self._ips[prefix] = ip
        if changes.ips:
            self.ip_version += 1
        if events.policies:
            self.policy_version += 1
        for name, policy in events.policies.items():
            if policy != self._policies.get(name):
                changes.policies.add(name)
            if policy is None:
                self._policies.pop(name, None)
                self.policy_revision = max(self.policy_revision, events.revision)
            else:
                self._policies[name] = policy
                self.policy_revision = max(self.policy_revision, policy.revision)
        return changes

    def _replace(self, snapshot: ClusterEvents) -> Changes:
        for number in self._identities:
            snapshot.identities.setdefault(number, None)
        for prefix in self._ips:
            snapshot.ips.setdefault(prefix, None)
        for name in self._policies:
            snapshot.policies.setdefault(name, None)
        # Another store counts from its own beginning.
        if snapshot.store_id != self.store_id:
            self.policy_revision = 0
        return self._apply(snapshot)


def _merge(into: ClusterEvents, more: ClusterEvents) -> None:
    into.store_id, into.revision, into.more = more.store_id, more.revision, more.more
    into.identities.update(more.identities)
    into.ips.update(more.ips)
    into.policies.update(more.policies)
