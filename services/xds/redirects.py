"""The agent's redirects: what it wants, what the proxy has been given, and what came of it.

    SyncRequest ─▶ Session.apply ─▶ rows ─▶ Translator ─▶ cache (of the local proxy's node)
                                     ▲                        │
    SyncResponse ◀─ Session.news ◀───┴──── standings ◀── hub ◀┘

A row is one port. It is ACKED when the proxy has accepted everything that the rules need, and stays
so while the proxy is away: then nobody listens at the port, and nothing passes. Removed rows are
kept until the proxy has let go of the listener.

Until the agent has completed its first snapshot nothing is said to the proxy, which keeps enforcing
what it has; when the agent goes away, everything stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

import structlog

from cilia.errors import DomainError, InvalidError, Kind
from cilia.telemetry import fields
from protos.xds.v1 import xds_pb2 as pb
from services.xds.cache import Change, Key, ResourceCache
from services.xds.hub import Hub, State
from services.xds.resources import NodeID
from services.xds.translator import Item, Translation, Translator, Untranslatable

log = structlog.get_logger()

MAX_REDIRECTS: Final = 20_000
MAX_RULES: Final = 100_000
MAX_DIGEST: Final = 256


class Superseded(DomainError):
    """A newer session took this one's place."""

    default_kind = Kind.ABORTED


class BadRedirect(InvalidError):
    """What the agent asked for cannot be meant."""


@dataclass(slots=True)
class Row:
    """One port."""

    redirect: pb.Redirect
    sequence: int
    translation: Translation | None = None
    state: int = pb.RedirectState.PENDING
    message: str = ""
    version: str = ""
    removing: bool = False

    def to_proto(self) -> pb.RedirectState:
        return pb.RedirectState(
            port=self.redirect.port,
            digest=self.redirect.digest,
            state=pb.RedirectState.State.ValueType(self.state),
            message=self.message,
            version=self.version,
            sequence=self.sequence,
        )


@dataclass(slots=True)
class Session:
    """One stream of the agent's. `wake` is called when `Redirects.news` may have something."""

    node: pb.Node
    wake: Callable[[], None]
    since: float
    synced: bool = False
    superseded: bool = False
    snapshot: dict[int, tuple[pb.Redirect, int]] = field(default_factory=dict)
    untold: set[int] = field(default_factory=set)


class Redirects:
    """Owns the rows; `node` is the local proxy's node id."""

    def __init__(
        self,
        *,
        cache: ResourceCache,
        hub: Hub,
        make_translator: Callable[[pb.Node], Translator],
        node: NodeID,
    ) -> None:
        self.node = node
        self.rows: dict[int, Row] = {}
        self.session: Session | None = None
        self.synced = False
        self._cache = cache
        self._hub = hub
        self._make_translator = make_translator
        self._translator: Translator | None = None
        self._about: pb.Node | None = None
        self._pending: set[int] = set()
        self._users: dict[Key, set[int]] = {}
        self._removed: list[Callable[[int], None]] = []
        hub.watch(self._on_news)

    def on_removed(self, callback: Callable[[int], None]) -> None:
        """Called with a port that nobody listens at any more."""
        self._removed.append(callback)

    def prepare(self) -> None:
        """Keeps the proxy waiting for the first snapshot."""
        self._cache.hold(self.node)

    # ---- sessions

    def find(self, port: int) -> pb.Redirect | None:
        """The redirect that a port has now."""
        row = self.rows.get(port)
        return row.redirect if row is not None and not row.removing else None

    def open(self, node: pb.Node, wake: Callable[[], None], time: float) -> Session:
        """Starts a session; the one before it ends."""
        if self.session is not None:
            self.session.superseded = True
            self.session.wake()
        self.session = Session(node, wake, time)
        return self.session

    def close(self, session: Session) -> None:
        """An ended one is success."""
        if self.session is session:
            self.session = None

    def apply(self, session: Session, request: pb.SyncRequest) -> None:
        """Raises BadRedirect, and then nothing of the request is applied; Superseded."""
        if session.superseded:
            raise Superseded("another session of the agent's has begun")
        for redirect in request.upserts:
            _check(redirect)
        if not session.synced:
            for redirect in request.upserts:
                session.snapshot[redirect.port] = (redirect, request.sequence)
            for port in request.removed:
                session.snapshot.pop(port, None)
            _bound(len(session.snapshot))
            if not request.synced:
                return
            wanted, session.snapshot = session.snapshot, {}
            session.synced = True
            self._learn(session.node)
            absent = [port for port in self.rows if port not in wanted]
            self._change(wanted, dict.fromkeys(absent, request.sequence))
            session.untold |= self.rows.keys()
            if not self.synced:
                self.synced = True
                self._cache.release(self.node)
                log.info(
                    "The agent's redirects are complete.",
                    **{fields.COUNT: len(wanted), fields.NODE: session.node.name},
                )
        else:
            new = {r.port for r in request.upserts} - self.rows.keys()
            _bound(len(self.rows) + len(new))
            self._change(
                {r.port: (r, request.sequence) for r in request.upserts},
                dict.fromkeys(request.removed, request.sequence),
            )
        self._judge()

    def news(self, session: Session) -> list[pb.RedirectState]:
        """The states that the session has not been told. Raises Superseded."""
        if session.superseded:
            raise Superseded("another session of the agent's has begun")
        if not session.synced:
            return []
        self._judge()
        told = []
        for port in sorted(session.untold):
            row = self.rows.get(port)
            if row is None:
                continue
            told.append(row.to_proto())
            if row.state == pb.RedirectState.REMOVED:
                self._drop(port)
        session.untold.clear()
        return told

    def refresh(self) -> None:
        """Translates everything again, because what rules refer to (secrets) may have changed."""
        with self._cache.transaction() as change:
            for item in self._translator.base() if self._translator is not None else ():
                change.put(item.url, item.name, item.value, nodes=[self.node])
            for row in list(self.rows.values()):
                if not row.removing:
                    redirect, sequence = row.redirect, row.sequence
                    row.redirect = pb.Redirect()
                    self._upsert(redirect, sequence, change)
        if self.session is not None:
            self.session.wake()

    # ---- rows

    def _learn(self, node: pb.Node) -> None:
        if node == self._about:
            return
        self._about = node
        self._translator = self._make_translator(node)
        self.refresh()

    def _change(self, upserts: dict[int, tuple[pb.Redirect, int]], removed: dict[int, int]) -> None:
        with self._cache.transaction() as change:
            for port, sequence in removed.items():
                row = self.rows.get(port)
                if row is None:
                    # Nobody has it: the agent is told so, and may use the port.
                    row = self.rows[port] = Row(pb.Redirect(port=port), sequence)
                self._remove(row, sequence, change)
            for redirect, sequence in upserts.values():
                self._upsert(redirect, sequence, change)

    def _upsert(self, redirect: pb.Redirect, sequence: int, change: Change) -> None:
        port = redirect.port
        row = self.rows.get(port)
        if row is not None and not row.removing and row.redirect == redirect:
            row.sequence = sequence
            self._tell(port)
            return
        before = row.translation if row is not None else None
        row = self.rows[port] = Row(redirect, sequence, before)
        self._tell(port)
        assert self._translator is not None, "a session begins with its node"
        try:
            translation = self._translator.translate(redirect)
        except Untranslatable as error:
            # What was in force on this port stays in force; the agent decides.
            self._settle(row, pb.RedirectState.FAILED, error.explain())
            return
        row.translation = translation
        self._replace(port, before, translation.items, change)
        self._pending.add(port)

    def _remove(self, row: Row, sequence: int, change: Change) -> None:
        row.sequence = sequence
        row.removing = True
        row.state = pb.RedirectState.PENDING
        row.message = row.version = ""
        self._replace(row.redirect.port, row.translation, (), change)
        self._pending.add(row.redirect.port)
        self._tell(row.redirect.port)

    def _replace(
        self, port: int, before: Translation | None, items: Collection[Item], change: Change
    ) -> None:
        now: set[Key] = set()
        for item in items:
            key = (item.url, item.name)
            now.add(key)
            self._users.setdefault(key, set()).add(port)
            change.put(item.url, item.name, item.value, nodes=[self.node])
        for item in before.items if before is not None else ():
            key = (item.url, item.name)
            if key in now or key not in self._users:
                continue
            self._users[key].discard(port)
            if not self._users[key]:
                del self._users[key]
                change.remove(item.url, item.name, nodes=[self.node])

    # ---- what came of it

    def _on_news(self, node: NodeID) -> None:
        if node == self.node and self.session is not None:
            self.session.wake()

    def _judge(self) -> None:
        for port in list(self._pending):
            row = self.rows.get(port)
            if row is None:
                self._pending.discard(port)
            elif row.removing:
                self._judge_removal(row)
            else:
                self._judge_rules(row)
        # What was accepted once may be refused by a proxy that was started anew.
        for rejection in list(self._hub.rejections.values()):
            if rejection.node != self.node:
                continue
            for port in self._users.get((rejection.url, rejection.name), ()):
                row = self.rows.get(port)
                if row is not None and row.state == pb.RedirectState.ACKED:
                    self._judge_rules(row)

    def _judge_rules(self, row: Row) -> None:
        assert row.translation is not None, "a row without translation has failed"
        state, version = State.ACKED, ""
        for item in row.translation.items:
            standing = self._hub.standing(self.node, item.url, item.name)
            if standing.state is State.NACKED:
                self._settle(row, pb.RedirectState.FAILED, standing.reason)
                # It is tried again by itself, and may be accepted then.
                self._pending.add(row.redirect.port)
                return
            if standing.state is State.PENDING:
                state = State.PENDING
            if (item.url, item.name) == row.translation.rules:
                version = standing.version
        if state is State.ACKED:
            self._settle(row, pb.RedirectState.ACKED, "", version)

    def _judge_removal(self, row: Row) -> None:
        items = row.translation.items if row.translation is not None else ()
        gone = all(
            self._hub.standing(self.node, item.url, item.name).state is State.ACKED
            for item in items
            if (item.url, item.name) not in self._users
        )
        if gone:
            self._settle(row, pb.RedirectState.REMOVED, "")

    def _settle(self, row: Row, state: int, message: str, version: str = "") -> None:
        port = row.redirect.port
        self._pending.discard(port)
        if (row.state, row.message, row.version) == (state, message, version):
            return
        row.state, row.message, row.version = state, message, version
        self._tell(port)
        if state == pb.RedirectState.FAILED:
            log.warning("A redirect failed.", **{fields.PORT: port, fields.REASON: message})
        elif state == pb.RedirectState.REMOVED and self.session is None:
            self._drop(port)

    def _drop(self, port: int) -> None:
        del self.rows[port]
        for callback in self._removed:
            callback(port)

    def _tell(self, port: int) -> None:
        if self.session is not None and self.session.synced:
            self.session.untold.add(port)


def _bound(count: int) -> None:
    if count > MAX_REDIRECTS:
        raise BadRedirect(f"{count} redirects are more than {MAX_REDIRECTS}", kind=Kind.EXHAUSTED)


def _check(redirect: pb.Redirect) -> None:
    where = f"the redirect on port {redirect.port}"
    if not 0 < redirect.port < 65_536:
        raise BadRedirect(f"{where}: the port is outside 1 to 65535")
    if not 0 < len(redirect.digest) <= MAX_DIGEST:
        raise BadRedirect(f"{where}: the digest has {len(redirect.digest)} characters")
    if redirect.direction not in (pb.INGRESS, pb.EGRESS, pb.BOTH):
        raise BadRedirect(f"{where}: direction {redirect.direction} is unknown")
    if not redirect.HasField("rules"):
        raise BadRedirect(f"{where}: it has no rules")
    if redirect.HasField("ingress_rules") != (redirect.direction == pb.BOTH):
        raise BadRedirect(f"{where}: ingress_rules are of direction BOTH, and only of it")
    if len(redirect.rules.rules) + len(redirect.ingress_rules.rules) > MAX_RULES:
        raise BadRedirect(f"{where}: it has more than {MAX_RULES} rules", kind=Kind.EXHAUSTED)
