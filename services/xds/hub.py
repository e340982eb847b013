"""All streams, and who of them cares about what: one change reaches those that asked for it.

    cache commit ─▶ index: type ─▶ name ─▶ streams ─▶ marks, wakes their pumps
    streams' answers ─▶ watchers of the node (acks.py)

A node may have several streams (aggregated, one a type, two proxies under one name); it has
accepted a resource when every stream that asked for it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from cilia.errors import ExhaustedError
from services.xds.cache import Changed, ResourceCache
from services.xds.resources import WILDCARD, NodeID, Resource, TypeURL
from services.xds.stream import Limits, NameState, Stream

MAX_REJECTIONS: Final = 200


class State(Enum):
    PENDING = "pending"
    ACKED = "acked"
    NACKED = "nacked"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a resource stands at a node."""

    state: State
    version: str = ""  # that the node has accepted, or has refused
    reason: str = ""  # of a refusal


class TooManyStreams(ExhaustedError):
    default_cure = "Look for clients that reconnect without end: `cilia xds status`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, for people."""

    claimed_node: str = ""
    cluster: str = ""
    user_agent: str = ""
    address: str = ""
    transport: str = ""
    method: str = ""


@dataclass(eq=False, slots=True)
class Attached:
    """A stream that is connected. `wake` is called when it has something to do."""

    id: int
    stream: Stream
    peer: Peer
    wake: Callable[[], None]
    since: float
    acks: int = 0
    nacks: int = 0


@dataclass(frozen=True, slots=True)
class Rejection:
    node: NodeID
    url: TypeURL
    name: str
    version: str
    reason: str
    time: float


Watcher = Callable[[NodeID], None]


@dataclass(slots=True)
class _Index:
    wildcard: set[Attached] = field(default_factory=set)
    named: dict[str, set[Attached]] = field(default_factory=dict)


class Hub:
    """Owns the streams. One thread; no input and output."""

    def __init__(
        self,
        cache: ResourceCache,
        *,
        limits: Limits | None = None,
        max_streams: int = 4096,
        max_streams_a_node: int = 64,
    ) -> None:
        self.cache = cache
        self.limits = limits or Limits()
        self.streams: dict[int, Attached] = {}
        self.rejections: dict[tuple[NodeID, TypeURL, str], Rejection] = {}
        self.opened = 0
        self.acks = 0
        self.nacks = 0
        self._max_streams = max_streams
        self._max_streams_a_node = max_streams_a_node
        self._of_node: dict[NodeID, list[Attached]] = {}
        self._index: dict[TypeURL, _Index] = {}
        self._suspects: dict[NodeID, dict[TypeURL, set[str]]] = {}
        self._watchers: list[Watcher] = []
        cache.listen(self._on_change)

    # ---- streams

    def attach(
        self, node: NodeID, *, delta: bool, peer: Peer, wake: Callable[[], None], time: float
    ) -> Attached:
        """Raises TooManyStreams."""
        if len(self.streams) >= self._max_streams:
            raise TooManyStreams(f"{self._max_streams} streams are open, and no more are served")
        mine = self._of_node.setdefault(node, [])
        if len(mine) >= self._max_streams_a_node:
            raise TooManyStreams(f"the node {node} has {len(mine)} streams open, and gets no more")
        self.opened += 1
        stream = Stream(
            self.cache.view(node),
            delta=delta,
            limits=self.limits,
            suspects=self._suspects.pop(node, None),
        )
        attached = Attached(self.opened, stream, peer, wake, time)
        self.streams[attached.id] = attached
        mine.append(attached)
        return attached

    def detach(self, attached: Attached) -> None:
        """An absent one is success."""
        if self.streams.pop(attached.id, None) is None:
            return
        stream = attached.stream
        mine = self._of_node[stream.node]
        mine.remove(attached)
        if not mine:
            del self._of_node[stream.node]
        for url, sub in stream.subscriptions.items():
            if (index := self._index.get(url)) is None:
                continue
            for name in sub.names:
                self._leave(index, name, attached)
            index.wildcard.discard(attached)
            if not index.wildcard and not index.named:
                del self._index[url]
        if suspects := stream.suspects():
            self._suspects[stream.node] = suspects
            while len(self._suspects) > MAX_REJECTIONS:
                del self._suspects[next(iter(self._suspects))]
        self._notify(stream.node)

    def settle(self, attached: Attached, time: float) -> None:
        """Takes up what the stream learnt from its client: subscriptions and answers."""
        stream = attached.stream
        news = bool(stream.subscribed or stream.unsubscribed or stream.answers)
        for url, name in stream.subscribed:
            index = self._index.setdefault(url, _Index())
            if name == WILDCARD:
                index.wildcard.add(attached)
            else:
                index.named.setdefault(name, set()).add(attached)
        stream.subscribed.clear()
        for url, name in stream.unsubscribed:
            if (left := self._index.get(url)) is None:
                continue
            sub = stream.subscriptions.get(url)
            # Left and entered again within one step: what counts is how it stands now.
            if name == WILDCARD:
                if sub is None or not sub.wildcard:
                    left.wildcard.discard(attached)
            elif sub is None or name not in sub.names:
                self._leave(left, name, attached)
        stream.unsubscribed.clear()
        for answer in stream.answers:
            self._record(stream, answer.url, answer.names, time)
        stream.answers.clear()
        self.acks += stream.acks - attached.acks
        self.nacks += stream.nacks - attached.nacks
        attached.acks, attached.nacks = stream.acks, stream.nacks
        if news:
            self._notify(stream.node)

    def _leave(self, index: _Index, name: str, attached: Attached) -> None:
        streams = index.named.get(name)
        if streams is not None:
            streams.discard(attached)
            if not streams:
                del index.named[name]

    def _record(self, stream: Stream, url: TypeURL, names: Iterable[str], time: float) -> None:
        sub = stream.subscriptions.get(url)
        if sub is None or not (sub.refused or self.rejections):
            return
        for name in names:
            key = (stream.node, url, name)
            refusal = sub.refused.get(name)
            if refusal is None:
                self.rejections.pop(key, None)
                continue
            self.rejections.pop(key, None)  # the newest last
            self.rejections[key] = Rejection(
                stream.node, url, name, refusal.resource.version, refusal.reason, time
            )
            while len(self.rejections) > MAX_REJECTIONS:
                del self.rejections[next(iter(self.rejections))]

    # ---- changes

    def _on_change(self, changed: Collection[Changed]) -> None:
        if not changed:  # a hold was released
            for attached in self.streams.values():
                attached.wake()
            for node in list(self._of_node):
                self._notify(node)
            return
        self._forget_rejections(changed)
        woken: set[Attached] = set()
        for change in changed:
            if (asked := self._index.get(change.url)) is None:
                continue
            for streams in (asked.wildcard, asked.named.get(change.name, ())):
                for attached in streams:
                    if change.nodes is not None and attached.stream.node not in change.nodes:
                        continue
                    if attached.stream.changed(change.url, change.name):
                        woken.add(attached)
        for attached in woken:
            attached.wake()

    def _forget_rejections(self, changed: Collection[Changed]) -> None:
        """Those of resources that are no more."""
        if not self.rejections:
            return
        names = {(change.url, change.name) for change in changed}
        for key in [key for key in self.rejections if key[1:] in names]:
            node, url, name = key
            if self.cache.view(node).get(url, name) is None:
                del self.rejections[key]

    # ---- questions

    def watch(self, watcher: Watcher) -> None:
        """Called with a node whenever its clients may stand differently than before."""
        self._watchers.append(watcher)

    def _notify(self, node: NodeID) -> None:
        for watcher in self._watchers:
            watcher(node)

    def nodes(self) -> Collection[NodeID]:
        """Those that are connected."""
        return self._of_node.keys()

    def asked(self, node: NodeID, url: TypeURL, name: str) -> bool:
        """Whether a client of the node has asked for it."""
        return bool(self._states(node, url, name))

    def standing(self, node: NodeID, url: TypeURL, name: str) -> Standing:
        """Whether the node's clients have what they should have under this name.

        A resource that is not (any more) there stands ACKED when a client is connected that speaks
        of its type and none of them holds it.
        """
        desired = self.cache.view(node).get(url, name)
        states = self._states(node, url, name)
        if desired is None:
            speaks = any(url in a.stream.subscriptions for a in self._of_node.get(node, ()))
            gone = all(state.accepted is None and not state.pending for state in states)
            return Standing(State.ACKED if speaks and gone else State.PENDING)
        for state in states:
            refusal = state.refusal
            if refusal is not None and refusal.resource.version == desired.version:
                return Standing(State.NACKED, desired.version, refusal.reason)
        if states and all(_has(state, desired) for state in states):
            return Standing(State.ACKED, desired.version)
        held = next((s.accepted.version for s in states if s.accepted is not None), "")
        return Standing(State.PENDING, held)

    def _states(self, node: NodeID, url: TypeURL, name: str) -> list[NameState]:
        found = (a.stream.state(url, name) for a in self._of_node.get(node, ()))
        return [state for state in found if state is not None]


def _has(state: NameState, desired: Resource) -> bool:
    return state.accepted is not None and state.accepted.version == desired.version
