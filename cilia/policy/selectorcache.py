"""Selectors and identities, each indexed so that a change touches only what it can match.

A selector is filed under one label it cannot match without (its anchor); identities are filed under
every label they carry; prefixes by their bits. So adding an identity looks at the selectors
anchored at its labels, and adding a selector at the identities that carry its anchor.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final, Generic, TypeVar

from cilia.identity import cidr_prefix
from cilia.labels import CLUSTER_KEY, NAMESPACE_KEY, SOURCE_ANY, SOURCE_CIDR, Labels
from cilia.policy.api import CidrSelector, EndpointSelector, Network, Requirement

CacheSelector = EndpointSelector | CidrSelector
T = TypeVar("T")
K = TypeVar("K")
U = TypeVar("U")
V = TypeVar("V")

# Nearly every endpoint of a place shares these, so they are the worst labels to file under.
_COMMON_KEYS: Final = frozenset((NAMESPACE_KEY, CLUSTER_KEY))


def anchor(selector: EndpointSelector) -> Requirement | None:
    """The requirement to file a selector under: one that needs a label, the rarest by its looks."""
    needing = [x for x in selector.requirements if x.positive]
    if not needing:
        return None
    return min(
        needing,
        key=lambda x: (x.operator != "In", x.key in _COMMON_KEYS, len(x.values)),
    )


class AnchorIndex(Generic[T]):
    """Things that have a label selector, found by the labels that the selector may match."""

    def __init__(self) -> None:
        self._by_label: Final[dict[tuple[str, str], dict[T, None]]] = {}
        self._by_key: Final[dict[str, dict[T, None]]] = {}
        self._unanchored: Final[dict[T, None]] = {}

    def _homes(self, selector: EndpointSelector) -> Iterator[tuple[object, object]]:
        found = anchor(selector)
        if found is None:
            return
        if found.operator == "In":
            for value in found.values:
                yield self._by_label, (found.key, value)
        else:
            yield self._by_key, found.key

    def add(self, selector: EndpointSelector, item: T) -> None:
        homeless = True
        for index, key in self._homes(selector):
            index.setdefault(key, {})[item] = None  # type: ignore[attr-defined]  # two indexes, two key types
            homeless = False
        if homeless:
            self._unanchored[item] = None

    def remove(self, selector: EndpointSelector, item: T) -> None:
        self._unanchored.pop(item, None)
        for index, key in self._homes(selector):
            items = index.get(key, {})  # type: ignore[attr-defined]  # as above
            items.pop(item, None)
            if not items:
                index.pop(key, None)  # type: ignore[attr-defined]  # as above

    def candidates(self, labels: Labels) -> dict[T, None]:
        """A superset of the things whose selector matches, in a stable order."""
        found = dict(self._unanchored)
        for label in labels:
            found.update(self._by_label.get((label.key, label.value), {}))
            found.update(self._by_key.get(label.key, {}))
        return found


@dataclass(slots=True)
class _Cached(Generic[U, V]):
    users: dict[U, V] = field(default_factory=dict)
    identities: set[int] = field(default_factory=set)


class LabelIndex(Generic[T]):
    """Things that have labels, found by the selectors that may match them."""

    def __init__(self) -> None:
        self._by_label: Final[dict[tuple[str, str], set[T]]] = {}
        self._by_key: Final[dict[str, set[T]]] = {}

    def add(self, labels: Labels, item: T) -> None:
        for label in labels:
            if label.source == SOURCE_CIDR:
                continue  # each has its own: see `candidates`
            self._by_label.setdefault((label.key, label.value), set()).add(item)
            self._by_key.setdefault(label.key, set()).add(item)

    def remove(self, labels: Labels, item: T) -> None:
        for label in labels:
            _discard(self._by_label, (label.key, label.value), item)
            _discard(self._by_key, label.key, item)

    def candidates(self, selector: EndpointSelector, everything: Collection[T]) -> Collection[T]:
        """A superset of what the selector matches: of what carries its rarest label.

        Prefixes are not filed as labels, for that is not how rules select them.
        """
        best = everything
        for requirement in selector.requirements:
            if requirement.source in (SOURCE_CIDR, SOURCE_ANY) and _is_prefix(requirement.key):
                continue
            match requirement.operator:
                case "In" if len(requirement.values) == 1:
                    found = self._by_label.get((requirement.key, requirement.values[0]), set())
                case "In" | "Exists":
                    found = self._by_key.get(requirement.key, set())
                case _:
                    continue
            if len(found) < len(best):
                best = found
        return best


_Place = tuple[int, int, int]


class SelectorCache(Generic[U, V]):
    """Which identities each selector in use selects, kept current as both come and go.

    Its users are told apart by what they are; each keeps a word of its own with a selector.
    """

    def __init__(self) -> None:
        self._selectors: Final[dict[CacheSelector, _Cached[U, V]]] = {}
        self._index: Final[AnchorIndex[EndpointSelector]] = AnchorIndex()
        self._prefixes: Final[dict[tuple[int, int], dict[int, dict[CidrSelector, None]]]] = {}
        self._labels: Final[dict[int, Labels]] = {}
        self._ids: Final[LabelIndex[int]] = LabelIndex()
        # (first address, length, identity), sorted, a list for each family
        self._networks: Final[dict[int, list[_Place]]] = {4: [], 6: []}

    # ---- identities

    def labels(self, identity: int) -> Labels | None:
        return self._labels.get(identity)

    def identities(self) -> Mapping[int, Labels]:
        return self._labels

    def add_identity(self, identity: int, labels: Labels) -> tuple[CacheSelector, ...]:
        """Enter an identity; gives the selectors that select it. The same again changes nothing.

        An identity's labels never change; if they do all the same, remove it first.
        """
        if identity in self._labels:
            if self._labels[identity] != labels:
                raise ValueError(f"identity {identity} has other labels already")
            return ()
        self._labels[identity] = labels
        self._ids.add(labels, identity)
        if (network := cidr_prefix(labels)) is not None:
            insort(
                self._networks[network.version],
                (int(network.network_address), network.prefixlen, identity),
            )
        matched = tuple(self.matching(labels))
        for selector in matched:
            self._selectors[selector].identities.add(identity)
        return matched

    def remove_identity(self, identity: int) -> tuple[CacheSelector, ...]:
        """Forget an identity; gives the selectors that selected it."""
        labels = self._labels.pop(identity, None)
        if labels is None:
            return ()
        self._ids.remove(labels, identity)
        if (network := cidr_prefix(labels)) is not None:
            networks = self._networks[network.version]
            entry = (int(network.network_address), network.prefixlen, identity)
            del networks[bisect_left(networks, entry)]
        matched = tuple(self.matching(labels))
        for selector in matched:
            self._selectors[selector].identities.discard(identity)
        return matched

    # ---- selectors

    def __len__(self) -> int:
        return len(self._selectors)

    def acquire(self, selector: CacheSelector, user: U, word: V) -> Set[int]:
        """Use a selector, or keep another word with it; gives what it selects, a set kept
        current."""
        cached = self._selectors.get(selector)
        if cached is None:
            cached = self._selectors[selector] = _Cached()
            if isinstance(selector, EndpointSelector):
                self._index.add(selector, selector)
            else:
                prefix = selector.prefix
                home = self._prefixes.setdefault((prefix.version, prefix.prefixlen), {})
                home.setdefault(int(prefix.network_address), {})[selector] = None
            cached.identities.update(self.search(selector))
        cached.users[user] = word
        return cached.identities

    def selected(self, selector: CacheSelector) -> Set[int]:
        """What a selector in use selects, a set kept current."""
        return self._selectors[selector].identities

    def users(self, selector: CacheSelector) -> Mapping[U, V]:
        """Who uses a selector, each with the word that it keeps."""
        return self._selectors[selector].users

    def word(self, selector: CacheSelector, user: U) -> V | None:
        """What a user keeps with a selector; None where it does not use it."""
        cached = self._selectors.get(selector)
        return cached.users.get(user) if cached is not None else None

    def release(self, selector: CacheSelector, user: U) -> None:
        cached = self._selectors[selector]
        del cached.users[user]
        if cached.users:
            return
        del self._selectors[selector]
        if isinstance(selector, EndpointSelector):
            self._index.remove(selector, selector)
            return
        prefix = selector.prefix
        home = self._prefixes[prefix.version, prefix.prefixlen]
        found = home[int(prefix.network_address)]
        del found[selector]
        if not found:
            del home[int(prefix.network_address)]
        if not home:
            del self._prefixes[prefix.version, prefix.prefixlen]

    def selections(self, selector: CacheSelector) -> frozenset[int]:
        cached = self._selectors.get(selector)
        return frozenset(cached.identities) if cached else frozenset()

    def search(self, selector: CacheSelector) -> Iterator[int]:
        """What a selector selects, in use or not."""
        if isinstance(selector, CidrSelector):
            return self._inside(selector)
        near = self._ids.candidates(selector, self._labels.keys())
        return (identity for identity in near if selector.matches(self._labels[identity]))

    def matching(self, labels: Labels) -> Iterator[CacheSelector]:
        """The selectors in use that match these labels."""
        for selector in self._index.candidates(labels):
            if selector.matches(labels):
                yield selector
        network = cidr_prefix(labels)
        if network is not None:
            yield from self.covering(network)

    def covering(self, network: Network) -> Iterator[CidrSelector]:
        """The selectors of prefixes in use that select all of a network."""
        address, bits = int(network.network_address), network.max_prefixlen
        for (version, length), home in self._prefixes.items():
            if version != network.version or length > network.prefixlen:
                continue
            for candidate in home.get(address >> (bits - length) << (bits - length), ()):
                if candidate.contains(network):
                    yield candidate

    def _inside(self, selector: CidrSelector) -> Iterator[int]:
        prefix = selector.prefix
        networks = self._networks[prefix.version]
        first = int(prefix.network_address)
        last = first | ((1 << (prefix.max_prefixlen - prefix.prefixlen)) - 1)
        for i in range(bisect_left(networks, (first,)), len(networks)):
            address, length, identity = networks[i]
            if address > last:
                return
            if selector.contains_bits(prefix.version, address, length):
                yield identity


def _is_prefix(key: str) -> bool:
    if "/" not in key:
        return False
    try:
        ip_network(key)
    except ValueError:
        return False
    return True


def _discard(index: dict[K, set[T]], key: K, item: T) -> None:
    found = index.get(key)
    if found is not None:
        found.discard(item)
        if not found:
            del index[key]
