"""Watching: what is told to each client, and when.

    store ── one watch ──▶ View ──▶ Feed (one a client: a revision) ──▶ frames ──▶ stream
                                        serialised once, shared by all who stand at one revision

`Feed` is sans-I/O: ask it what to send, it answers with messages. `Hub` pumps the store's watch
into the view and the feeds into streams of encoded frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import structlog

from cilia.errors import DomainError
from cilia.errors import Kind as ErrorKind
from cilia.kv.allocator import QUARANTINE_PREFIX
from cilia.kv.backend import Backend, BackendUnavailable, Compacted, KeyValue, Span
from services.identity.keys import ROOT, Kind, kind_of
from services.identity.view import Change, View

log = structlog.get_logger()

EVENTS_A_BATCH = 256
BYTES_A_BATCH = 1 << 20
"""gRPC refuses messages above 4 MB by default; a document alone may have half of one."""

_LIST_PAGE = 2000


@dataclass(frozen=True, slots=True)
class BatchMessage:
    """`reserved`: the fixed identities come first, they are in no store."""

    revision: int
    changes: tuple[Change, ...]
    more: bool
    reserved: bool = False


@dataclass(frozen=True, slots=True)
class SyncedMessage:
    revision: int


@dataclass(frozen=True, slots=True)
class BookmarkMessage:
    revision: int


@dataclass(frozen=True, slots=True)
class ResetMessage:
    revision: int
    reason: str


Message = BatchMessage | SyncedMessage | BookmarkMessage | ResetMessage


class TooManyWatches(DomainError):
    default_kind = ErrorKind.EXHAUSTED

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"there are {limit} watches already", cure="Close some, or raise --max-watches"
        )


class Feed:
    """What one client has been told. `next` says what to tell it now: nothing if it is current."""

    def __init__(
        self, view: View, *, kinds: frozenset[Kind], store_id: int, from_store: int, resume: int
    ) -> None:
        self._view = view
        self._kinds = kinds
        self._told: int | None = None
        self._reset = ""
        self._synced = False
        if resume:
            if from_store != store_id:
                self._reset = "the revision is of another store"
            elif resume > view.revision:
                self._reset = f"revision {resume} lies in the future: the store was taken back"
            elif resume < view.floor:
                self._reset = f"revision {resume} is older than the history kept"
            else:
                self._told = resume

    @property
    def told(self) -> int:
        return self._told or 0

    def next(self) -> tuple[Message, ...]:
        view = self._view
        messages: list[Message] = []
        if self._told is not None and view.floor > self._told:
            self._told, self._synced = None, False
            self._reset = "the client was too slow: more was deleted than is remembered"
        if self._told is None:
            if self._reset:
                messages.append(ResetMessage(view.revision, self._reset))
                self._reset = ""
            reserved = Kind.IDENTITY in self._kinds
            messages += split(view.snapshot(self._kinds), view.revision, reserved=reserved)
        elif self._told < view.revision:
            changes = view.changes_after(self._told, self._kinds)
            assert changes is not None, "the floor was looked at"
            messages += split(changes, view.revision)
        self._told = view.revision
        if not self._synced:
            messages.append(SyncedMessage(view.revision))
            self._synced = True
        return tuple(messages)


def split(
    changes: Sequence[Change], revision: int, *, reserved: bool = False
) -> Iterator[BatchMessage]:
    """Cuts changes into batches of bounded size; all but the last say that more follows."""
    batches: list[list[Change]] = [[]]
    size = 0
    for change in changes:
        cost = len(change.kv.key) + len(change.kv.value)
        if batches[-1] and (len(batches[-1]) == EVENTS_A_BATCH or size + cost > BYTES_A_BATCH):
            batches.append([])
            size = 0
        batches[-1].append(change)
        size += cost
    if not changes and not reserved:
        return
    for number, batch in enumerate(batches):
        yield BatchMessage(
            revision,
            tuple(batch),
            more=number < len(batches) - 1,
            reserved=reserved and number == 0,
        )


class _Frames(list[bytes]):
    """Encoded messages that several streams may be sending; a list that can be weakly held."""

    __slots__ = ("__weakref__",)


class Hub:
    """`history` is how many past revisions are replayed into the view at start, so that clients
    of an earlier run of ours can resume."""

    def __init__(
        self,
        *,
        backend: Backend,
        view: View,
        encode: Callable[[Message], bytes],
        bookmark_s: float = 5.0,
        history: int = 4096,
        max_watches: int = 1024,
    ) -> None:
        self._backend = backend
        self._view = view
        self._encode = encode
        self._bookmark_s = bookmark_s
        self._history = history
        self._max_watches = max_watches
        self._news = asyncio.Event()
        self._ready = asyncio.Event()
        self._stopped = False
        self._shared: WeakValueDictionary[tuple[frozenset[Kind], int, int], _Frames] = (
            WeakValueDictionary()
        )
        self.watches = 0
        self.encoded = 0
        self.resets = 0

    async def wait_ready(self) -> None:
        """Returns when the view has caught up with the store as it was at start."""
        await self._ready.wait()

    def stop(self) -> None:
        """Ends every stream, so that the server can stop without waiting for them."""
        self._stopped = True
        self._announce()

    async def run(self) -> None:
        """Keeps the view current, until cancelled or the store is closed."""
        while True:
            try:
                await self._follow()
            except Compacted as error:
                # Only if we were kept from running for longer than the store keeps history.
                log.warning("The store's watch was lost; listing again.", error=error.message)
            except BackendUnavailable:
                return

    async def _follow(self) -> None:
        target = self._backend.revision
        history = 0 if self._ready.is_set() else self._history
        start = max(target - history, self._backend.compacted, 1)
        kvs = await self._list(start)
        self._view.load(kvs, start)
        async with self._backend.watch(
            Span.prefix(ROOT), start_revision=start + 1, progress_s=self._bookmark_s
        ) as watch:
            while True:
                if self._view.revision >= target and not self._ready.is_set():
                    self._ready.set()
                self._announce()
                if self._view.revision < target or self._ready.is_set():
                    self._view.apply(await watch.next())

    async def _list(self, revision: int) -> list[KeyValue]:
        found: list[KeyValue] = []
        span: Span | None = Span.prefix(ROOT)
        while span is not None:
            page = await self._backend.range(span, revision=revision, limit=_LIST_PAGE)
            found += (
                kv
                for kv in page.kvs
                if kind_of(kv.key) is not None or kv.key.startswith(QUARANTINE_PREFIX)
            )
            span = Span(page.kvs[-1].key + b"\0", span.end) if page.more else None
        return found

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def stream(
        self, *, kinds: frozenset[Kind], from_store: int, resume: int
    ) -> AsyncIterator[bytes]:
        """The encoded messages of one watch, for ever. Raises TooManyWatches."""
        if self.watches >= self._max_watches:
            raise TooManyWatches(self._max_watches)
        self.watches += 1
        try:
            await self._ready.wait()
            feed = Feed(
                self._view,
                kinds=kinds,
                store_id=self._backend.store_id,
                from_store=from_store,
                resume=resume,
            )
            loop = asyncio.get_running_loop()
            sent_s = loop.time()
            while not self._stopped:
                news = self._news
                for frame in self._frames(feed, kinds):
                    yield frame
                    sent_s = loop.time()
                if feed.told < self._view.revision:
                    continue
                try:
                    async with asyncio.timeout_at(sent_s + self._bookmark_s):
                        await news.wait()
                except TimeoutError:
                    yield self._encode(BookmarkMessage(feed.told))
                    sent_s = loop.time()
        finally:
            self.watches -= 1

    def _frames(self, feed: Feed, kinds: frozenset[Kind]) -> _Frames:
        """Deltas between the same two revisions are encoded once for all who need them now."""
        since = feed.told
        messages = feed.next()
        if any(isinstance(message, ResetMessage) for message in messages):
            self.resets += 1
        shareable = len(messages) == 1 and isinstance(messages[0], BatchMessage)
        key = (kinds, since, feed.told)
        frames = self._shared.get(key) if shareable else None
        if frames is None:
            frames = _Frames(self._encode(message) for message in messages)
            self.encoded += len(frames)
            if shareable:
                self._shared[key] = frames
        return frames
