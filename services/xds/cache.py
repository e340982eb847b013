"""The resources as they should be at the clients, and who is told of a change.

    put, remove ─▶ Change (staged) ─▶ commit ─▶ tables ─▶ listeners(changed)

A resource is for every client, or for named nodes; where both exist under one name, the node's own
wins. Synchronous and free of input and output; one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from google.protobuf.message import Message

from services.xds.resources import (
    NodeID,
    Resource,
    TypeURL,
    make,
    set_sum,
)

Key = tuple[TypeURL, str]


@dataclass(frozen=True, slots=True)
class Changed:
    """What one commit changed. `nodes` None: seen by every client."""

    url: TypeURL
    name: str
    nodes: frozenset[NodeID] | None


Listener = Callable[[Collection[Changed]], None]


class _Table:
    """The resources of one type."""

    __slots__ = ("changes", "common", "of_node", "size")

    def __init__(self) -> None:
        self.common: dict[str, Resource] = {}
        self.of_node: dict[NodeID, dict[str, Resource]] = {}
        self.changes = 0
        self.size = 0

    @property
    def count(self) -> int:
        return len(self.common) + sum(map(len, self.of_node.values()))


class View:
    """The resources of one node: what its clients may see."""

    __slots__ = ("_cache", "node")

    def __init__(self, cache: ResourceCache, node: NodeID) -> None:
        self._cache = cache
        self.node = node

    @property
    def open(self) -> bool:
        """Whether the node's resources are all there. While they are not, nothing is said to its
        clients: they would take what is missing for deleted."""
        return self.node not in self._cache.held and not self._cache.held_all

    def get(self, url: TypeURL, name: str) -> Resource | None:
        table = self._cache.tables.get(url)
        if table is None:
            return None
        own = table.of_node.get(self.node)
        if own is not None and (found := own.get(name)) is not None:
            return found
        return table.common.get(name)

    def names(self, url: TypeURL) -> Collection[str]:
        """Every name; the caller must not keep it over a commit."""
        table = self._cache.tables.get(url)
        if table is None:
            return ()
        own = table.of_node.get(self.node)
        return table.common.keys() | own.keys() if own else table.common.keys()

    def total(self, url: TypeURL) -> int:
        """The sum that identifies all resources of the type (see resources.set_version)."""
        found = (self.get(url, name) for name in self.names(url))
        return set_sum(resource for resource in found if resource is not None)


class Change:
    """Puts and removals that become visible together."""

    def __init__(self) -> None:
        self._staged: dict[tuple[TypeURL, str, NodeID | None], Resource | None] = {}
        self._everywhere: set[Key] = set()

    def put(
        self,
        url: TypeURL,
        name: str,
        value: Message | bytes,
        *,
        nodes: Collection[str] | None = None,
    ) -> Resource:
        """Adds or replaces a resource, for all clients or for those of `nodes`.

        Raises ResourceInvalid.
        """
        resource = make(url, name, value)
        for node in _scopes(nodes):
            self._staged[url, name, node] = resource
        return resource

    def remove(self, url: TypeURL, name: str, *, nodes: Collection[str] | None = None) -> None:
        """Removes a resource wherever it is, or for `nodes` only; an absent one is success."""
        if nodes is None:
            self._everywhere.add((url, name))
            for key in [key for key in self._staged if key[:2] == (url, name)]:
                del self._staged[key]
        else:
            for node in _scopes(nodes):
                self._staged[url, name, node] = None

    def remove_common(self, url: TypeURL, name: str) -> None:
        """Removes the one that is for all; nodes keep their own."""
        self._staged[url, name, None] = None

    def commit(self, tables: dict[TypeURL, _Table]) -> list[Changed]:
        changed: list[Changed] = []
        for url, name in self._everywhere:
            if (table := tables.get(url)) is None:
                continue
            scopes: list[NodeID | None] = [None] if name in table.common else []
            scopes += [node for node, own in table.of_node.items() if name in own]
            for node in scopes:
                self._staged.setdefault((url, name, node), None)
        for (url, name, node), resource in self._staged.items():
            table = tables.get(url)
            if table is None:
                if resource is None:
                    continue
                table = tables[url] = _Table()
            if node is None:
                rows = table.common
            elif resource is None:
                rows = table.of_node.get(node, {})
            else:
                rows = table.of_node.setdefault(node, {})
            before = rows.get(name)
            if resource is None:
                if before is None:
                    continue
                del rows[name]
                table.size -= before.size
                if node is not None and not rows:
                    del table.of_node[node]
            else:
                if before is not None and before.version == resource.version:
                    continue
                rows[name] = resource
                table.size += resource.size - (before.size if before else 0)
            table.changes += 1
            changed.append(Changed(url, name, None if node is None else frozenset((node,))))
        return changed


def _scopes(nodes: Collection[str] | None) -> Iterator[NodeID | None]:
    if nodes is None:
        yield None
    else:
        assert not isinstance(nodes, str), "nodes is a collection of names"
        yield from map(NodeID, nodes)


class ResourceCache:
    """Owns the tables; the only writer."""

    def __init__(self) -> None:
        self.tables: dict[TypeURL, _Table] = {}
        self.held: set[NodeID] = set()
        self.held_all = False
        self._listeners: list[Listener] = []

    @contextmanager
    def transaction(self) -> Iterator[Change]:
        """Everything put and removed in the block becomes visible at its end, or, if it raises,
        nothing."""
        change = Change()
        yield change
        if changed := change.commit(self.tables):
            self._tell(changed)

    def put(
        self,
        url: TypeURL,
        name: str,
        value: Message | bytes,
        *,
        nodes: Collection[str] | None = None,
    ) -> Resource:
        """A transaction of one. Raises ResourceInvalid."""
        with self.transaction() as change:
            return change.put(url, name, value, nodes=nodes)

    def remove(self, url: TypeURL, name: str, *, nodes: Collection[str] | None = None) -> None:
        with self.transaction() as change:
            change.remove(url, name, nodes=nodes)

    def hold(self, node: str | None = None) -> None:
        """Says nothing to a node's clients, or to any, until `release`: its resources are not all
        here yet."""
        if node is None:
            self.held_all = True
        else:
            self.held.add(NodeID(node))

    def release(self, node: str | None = None) -> None:
        if node is None:
            self.held_all = False
        else:
            self.held.discard(NodeID(node))
        self._tell(())

    def view(self, node: NodeID) -> View:
        return View(self, node)

    def listen(self, listener: Listener) -> None:
        """Called after every commit with what changed, and with nothing after a release."""
        self._listeners.append(listener)

    def rows(self) -> Iterator[tuple[Resource, NodeID | None]]:
        """Every resource with the node it is for; None: for all."""
        for table in self.tables.values():
            for resource in table.common.values():
                yield resource, None
            for node, own in table.of_node.items():
                for resource in own.values():
                    yield resource, node

    def _tell(self, changed: Collection[Changed]) -> None:
        for listener in self._listeners:
            listener(changed)
