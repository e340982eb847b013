"""Who is who now: what the agent told of endpoints, identities, rules and addresses.

It turns the numbers in an event into a `Party` and `PolicyRef`s, which are immutable and are kept
by the rows that name them; when something changes, later events get other ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface
from typing import Final

from cilia.bpf.layout import to_addr
from cilia.labels import CLUSTER_KEY, NAMESPACE_KEY

_LOCAL_SCOPE: Final = 1 << 24  # an identity from here on is a prefix that only this node numbers
_MIN_CLUSTER: Final = 256
_NAMESPACE_PREFIX: Final = f":{NAMESPACE_KEY}="
_CLUSTER_PREFIX: Final = f":{CLUSTER_KEY}="


@dataclass(frozen=True, slots=True, order=True)
class PolicyRef:
    """A rule as a flow names it; for default deny, one that isolates."""

    kind: str
    namespace: str
    name: str
    path: str = ""  # spec.ingress[0]
    origin: str = ""  # file:line


@dataclass(frozen=True, slots=True, order=True)
class Workload:
    name: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One end of a flow."""

    ep_id: int = 0  # of an endpoint of this node
    identity: int = 0
    namespace: str = ""
    name: str = ""
    labels: tuple[str, ...] = ()  # source:key=value
    workloads: tuple[Workload, ...] = ()
    cluster: str = ""
    ingress_isolated_by: tuple[PolicyRef, ...] = ()
    egress_isolated_by: tuple[PolicyRef, ...] = ()


NOBODY: Final = Party()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointInfo:
    id: int
    name: str
    namespace: str
    labels: tuple[str, ...]
    identity: int
    addresses: tuple[str, ...] = ()
    ifindex: int = 0
    interface: str = ""  # host side
    mode: str = "default"
    ingress_enforced: bool = False
    egress_enforced: bool = False
    ingress_isolated_by: tuple[int, ...] = ()  # rule numbers
    egress_isolated_by: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteInfo:
    """A workload of another node."""

    prefix: str
    name: str
    namespace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """Changes. What is new holds for the events it comes with, what is gone for those after."""

    reset: bool = False
    node: str = ""
    cluster: str = ""
    endpoints: tuple[EndpointInfo, ...] = ()
    gone_endpoints: tuple[int, ...] = ()
    identities: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    gone_identities: tuple[int, ...] = ()
    rules: Mapping[int, PolicyRef] = field(default_factory=dict)
    addresses: tuple[RemoteInfo, ...] = ()
    gone_addresses: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """DNS names by address; none takes them away."""


@dataclass(slots=True)
class Stale:
    """Numbers that mean something else from now on."""

    everything: bool = False
    endpoints: set[int] = field(default_factory=set)
    identities: set[int] = field(default_factory=set)
    rules: set[int] = field(default_factory=set)
    addresses: set[bytes] = field(default_factory=set)
    interfaces: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.everything or bool(
            self.endpoints or self.identities or self.rules or self.addresses or self.interfaces
        )


class World:
    """Owned by the event loop."""

    def __init__(self, *, node: str = "", cluster: str = "default") -> None:
        self._reset(node, cluster)

    def _reset(self, node: str, cluster: str) -> None:
        self.node = node
        self.cluster = cluster
        self._endpoints: dict[int, EndpointInfo] = {}
        self._identities: dict[int, tuple[str, ...]] = {}
        self._rules: dict[int, PolicyRef] = {}
        self._remote: dict[bytes, RemoteInfo] = {}
        self._local: dict[bytes, int] = {}  # address -> endpoint
        self._names: dict[bytes, tuple[str, ...]] = {}
        self._interfaces: dict[int, str] = {}

    @property
    def node_name(self) -> str:
        """As flows name it: cluster/node."""
        return f"{self.cluster or 'default'}/{self.node}"

    @property
    def has_names(self) -> bool:
        return bool(self._names)

    # ---- being told

    def learn(self, meaning: Meaning) -> Stale:
        """What is new; `forget` is for what is gone, once the events are in."""
        stale = Stale()
        if meaning.reset:
            self._reset(meaning.node, meaning.cluster)
            stale.everything = True
        if meaning.node:
            self.node, self.cluster = meaning.node, meaning.cluster
        for number, ref in meaning.rules.items():
            if self._rules.get(number) != ref:
                stale.rules.add(number)
                self._rules[number] = ref
        for number, labels in meaning.identities.items():
            if self._identities.get(number) != labels:
                stale.identities.add(number)
                self._identities[number] = labels
        for endpoint in meaning.endpoints:
            self._drop_endpoint(endpoint.id, stale)
            self._endpoints[endpoint.id] = endpoint
            for address in endpoint.addresses:
                raw = to_addr(address)
                self._local[raw] = endpoint.id
                stale.addresses.add(raw)
            if endpoint.ifindex:
                self._interfaces[endpoint.ifindex] = endpoint.interface
                stale.interfaces.add(endpoint.ifindex)
        for entry in meaning.addresses:
            raw = _raw(entry.prefix)
            self._remote[raw] = entry
            stale.addresses.add(raw)
        for address, names in meaning.names.items():
            raw = to_addr(address)
            if names:
                self._names[raw] = names
            else:
                self._names.pop(raw, None)
            stale.addresses.add(raw)
        # Rules of an endpoint's isolation are looked up when a party is made.
        for endpoint in self._endpoints.values():
            if not stale.rules.isdisjoint(
                endpoint.ingress_isolated_by
            ) or not stale.rules.isdisjoint(endpoint.egress_isolated_by):
                stale.endpoints.add(endpoint.id)
        return stale

    def forget(self, meaning: Meaning) -> Stale:
        stale = Stale()
        for number in meaning.gone_endpoints:
            self._drop_endpoint(number, stale)
        for number in meaning.gone_identities:
            if self._identities.pop(number, None) is not None:
                stale.identities.add(number)
        for prefix in meaning.gone_addresses:
            raw = _raw(prefix)
            if self._remote.pop(raw, None) is not None:
                stale.addresses.add(raw)
        return stale

    def _drop_endpoint(self, number: int, stale: Stale) -> None:
        old = self._endpoints.pop(number, None)
        stale.endpoints.add(number)
        if old is None:
            return
        for address in old.addresses:
            raw = to_addr(address)
            stale.addresses.add(raw)
            if self._local.get(raw) == number:
                del self._local[raw]
        if self._interfaces.get(old.ifindex) == old.interface:
            self._interfaces.pop(old.ifindex, None)
            stale.interfaces.add(old.ifindex)

    # ---- being asked

    def interface(self, ifindex: int) -> str:
        return self._interfaces.get(ifindex, "")

    def names(self, address: bytes) -> tuple[str, ...]:
        return self._names.get(address, ())

    def rule(self, number: int) -> PolicyRef:
        """The rule; one that was never told has its number for a name."""
        return self._rules.get(number) or PolicyRef("", "", f"rule {number}")

    @staticmethod
    def may_be_workload(identity: int) -> bool:
        """Whether an address of this identity may be that of a workload we know by address."""
        return identity == 0 or _MIN_CLUSTER <= identity < _LOCAL_SCOPE or identity in (4, 5)

    def endpoint_at(self, address: bytes) -> int:
        """The endpoint of this node that has the address; 0: none."""
        return self._local.get(address, 0)

    def remote_at(self, address: bytes) -> RemoteInfo | None:
        return self._remote.get(address)

    def party(self, ep_id: int, identity: int, remote: RemoteInfo | None = None) -> Party:
        """Who an endpoint or an identity is."""
        endpoint = self._endpoints.get(ep_id)
        labels = self._identities.get(identity, ())
        namespace = _labelled(labels, _NAMESPACE_PREFIX)
        cluster = _labelled(labels, _CLUSTER_PREFIX)
        if not cluster and _MIN_CLUSTER <= identity < _LOCAL_SCOPE:
            cluster = self.cluster
        if endpoint is None:
            name = ""
            if remote is not None:
                name, namespace = remote.name, remote.namespace or namespace
            return Party(
                ep_id=ep_id,
                identity=identity,
                namespace=namespace,
                name=name,
                labels=labels,
                workloads=_workloads(name),
                cluster=cluster,
            )
        return Party(
            ep_id=ep_id,
            identity=identity,
            namespace=endpoint.namespace or namespace,
            name=endpoint.name,
            labels=labels or endpoint.labels,
            workloads=_workloads(endpoint.name),
            cluster=cluster or self.cluster,
            ingress_isolated_by=self._isolation(
                endpoint.mode, endpoint.ingress_enforced, endpoint.ingress_isolated_by
            ),
            egress_isolated_by=self._isolation(
                endpoint.mode, endpoint.egress_enforced, endpoint.egress_isolated_by
            ),
        )

    def _isolation(self, mode: str, enforced: bool, rules: Iterable[int]) -> tuple[PolicyRef, ...]:
        found = tuple(dict.fromkeys(self.rule(number) for number in rules))
        if found or not enforced:
            return found
        # Nothing but the mode, or having no identity yet, isolates it.
        return (PolicyRef("EnforcementMode", "", mode or "default"),)


def _raw(prefix: str) -> bytes:
    return to_addr(ip_interface(prefix).ip)


def _labelled(labels: tuple[str, ...], infix: str) -> str:
    for label in labels:
        _, found, value = label.partition(infix)
        if found:
            return value
    return ""


def _workloads(name: str) -> tuple[Workload, ...]:
    return (Workload(name, "Workload"),) if name else ()
