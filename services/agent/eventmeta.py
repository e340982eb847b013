"""What the numbers in events mean, for readers of the raw stream: as changes, in step with it.

    endpoints, identities, rules, other nodes' workloads  -->  Teller (one a reader)  -->  Told

A reader that has been told everything so far can name every event that follows: which workload,
which labels, which rule, and what isolates an endpoint when no rule decided. What is new is told
before the events that may carry it; what is gone, after the events that may still carry it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import Labels
from cilia.policy import RuleRef
from services.agent.calculation import Calculation
from services.agent.clusterwatch import ClusterView, IpEntry
from services.agent.endpoint import Endpoint, SubjectKey
from services.agent.endpointtable import Endpoints

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Comparing takes time with tens of thousands of identities: at most this share of it.
_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Isolation:
    """What keeps everything from one endpoint that no rule allows, a direction."""

    mode: str
    ingress: bool
    egress: bool
    ingress_by: tuple[RuleRef, ...]
    egress_by: tuple[RuleRef, ...]


@dataclass(frozen=True, slots=True)
class EndpointNews:
    endpoint: Endpoint
    isolation: Isolation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Changes. `gone_*` hold for what follows the events they are told with."""

    reset: bool
    node: str
    cluster: str
    endpoints: tuple[EndpointNews, ...] = ()
    gone_endpoints: tuple[EndpointID, ...] = ()
    identities: Mapping[NumericIdentity, Labels] = field(default_factory=dict)
    gone_identities: tuple[NumericIdentity, ...] = ()
    rules: tuple[RuleRef, ...] = ()
    addresses: tuple[IpEntry, ...] = ()
    gone_addresses: tuple[str, ...] = ()


class EventMeaning:
    """Makes a `Teller` for each reader."""

    def __init__(
        self,
        *,
        node: str,
        cluster: str,
        endpoints: Endpoints,
        calculation: Calculation,
        view: ClusterView,
    ) -> None:
        self.node = node
        self.cluster = cluster
        self.endpoints = endpoints
        self.calculation = calculation
        self.view = view

    def teller(self, clock: Callable[[], float] = time.monotonic) -> Teller:
        return Teller(self, clock)


class Teller:
    """Remembers what one reader knows."""

    def __init__(self, meaning: EventMeaning, clock: Callable[[], float]) -> None:
        self._of = meaning
        self._clock = clock
        self._stamp: tuple[int, int, int] | None = None
        self._not_before = 0.0
        self._endpoints: dict[EndpointID, EndpointNews] = {}
        self._identities: dict[NumericIdentity, Labels] = {}
        self._rules: dict[int, RuleRef] = {}
        self._addresses: dict[str, IpEntry] = {}

    def tell(self) -> Told | None:
        """What changed since last asked; None when nothing did."""
        of = self._of
        stamp = (of.endpoints.table.revision, of.calculation.generation, of.view.ip_version)
        first = self._stamp is None
        started = self._clock()
        if stamp == self._stamp or (not first and started < self._not_before):
            return None
        self._stamp = stamp
        endpoints, gone_endpoints = _differ(self._endpoints, self._current_endpoints())
        identities, gone_identities = _differ(self._identities, of.calculation.identities)
        rules, _ = _differ(self._rules, {int(ref.rule_id): ref for ref in self._current_rules()})
        addresses, gone_addresses = _differ(
            self._addresses,
            {
                prefix: entry
                for prefix, entry in of.view.ips.items()
                if entry.node != of.node and entry.workload
            },
        )
        self._not_before = self._clock() + (self._clock() - started) / _SHARE
        told = Told(
            reset=first,
            node=of.node,
            cluster=of.cluster,
            endpoints=tuple(endpoints.values()),
            gone_endpoints=gone_endpoints,
            identities=identities,
            gone_identities=gone_identities,
            rules=tuple(rules.values()),
            addresses=tuple(addresses.values()),
            gone_addresses=gone_addresses,
        )
        anything = (
            endpoints or gone_endpoints or identities or gone_identities or rules or addresses
        )
        return told if first or anything or gone_addresses else None

    def _current_endpoints(self) -> dict[EndpointID, EndpointNews]:
        isolations: dict[SubjectKey, Isolation | None] = {}
        current: dict[EndpointID, EndpointNews] = {}
        for endpoint in self._of.endpoints:
            key = self._of.calculation.subject_of(endpoint)
            if key is not None and key not in isolations:
                isolations[key] = self._isolation(key)
            current[endpoint.id] = EndpointNews(
                endpoint, isolations[key] if key is not None else None
            )
        return current

    def _isolation(self, key: SubjectKey) -> Isolation | None:
        if key not in self._of.calculation.subjects:
            return None  # its endpoint is new: the next telling has it
        resolved = self._of.calculation.resolve(key)
        return Isolation(
            mode=key.mode,
            ingress=resolved.ingress_enforced,
            egress=resolved.egress_enforced,
            ingress_by=resolved.default_deny_ingress,
            egress_by=resolved.default_deny_egress,
        )

    def _current_rules(self) -> list[RuleRef]:
        return self._of.calculation.engine.repository.ids.refs()


def _differ(known: dict[K, V], current: Mapping[K, V]) -> tuple[dict[K, V], tuple[K, ...]]:
    """What is new or other, and what is gone; `known` becomes `current`."""
    fresh = {key: value for key, value in current.items() if known.get(key) != value}
    gone = tuple(key for key in known if key not in current)
    known.update(fresh)
    for key in gone:
        del known[key]
    return fresh, gone
