"""Which listener of the proxy enforces which L7 rules: ports given, shared, changed, taken back.

    wanted sets, pairs of sets  ->  Redirects  ->  listeners by port  ->  xds, nft
                                        ^ what the proxy acknowledged       |
                                        +-----------------------------------+
    ports for policy rows, rows of cilia_proxy_pair: only of what is enforced

A listener is known by its port. Its rules may change while it lives: when all who used one set use
another one now, the port stays and the proxy swaps the rules, so open connections go on under the
new ones. A port is named to the kernel only while the proxy is known to enforce exactly the rules
that are wanted there; a listener that nobody needs is kept for a while, and its port is given to
another only when the proxy has said that it is closed.

Pure but for the file: what was acknowledged is written down before it can become untrue, so that a
restart believes nothing that it should not.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import structlog

from cilia import statefile
from cilia.policy import L7Set
from cilia.telemetry import fields
from services.agent.endpoint import SubjectKey

log = structlog.get_logger()

_TRIES: Final = 3  # other ports for a listener that the proxy refuses from the first

Content = tuple[str, str]  # digests of the sets for egress and for ingress; "" for none
Pair = tuple[L7Set, L7Set]  # of an egress and of an ingress policy that meet on a connection


class State(enum.Enum):
    PENDING = "pending"  # the proxy has not said that it enforces the rules
    READY = "ready"
    FAILED = "failed"  # the proxy refused them
    LEAVING = "leaving"  # nobody needs it, and the proxy was told to close it


@dataclass(slots=True, kw_only=True)
class Listener:
    """One port of the proxy."""

    port: int
    content: Content
    egress: L7Set | None = None
    ingress: L7Set | None = None
    enforced: str = ""  # digest of what the proxy said it enforces, unless it was told otherwise
    state: State = State.PENDING
    message: str = ""
    version: str = ""
    idle_since: float | None = None  # nobody needs it from then on
    proven: bool = False  # the proxy had this port open at some time
    tries: int = 0  # ports before this one that the proxy could not have
    sent: int = 0  # sequence of the request that last spoke of it, in this stream
    users: int = 0

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    @property
    def direction(self) -> Literal["egress", "ingress", "both"]:
        egress, ingress = self.content
        return "both" if egress and ingress else "egress" if egress else "ingress"

    @property
    def ready(self) -> bool:
        return self.enforced == self.digest and self.state is not State.LEAVING

    @property
    def watches(self) -> bool:
        return all(x is None or x.watches for x in (self.egress, self.ingress))

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("PORT", "DIRECTION", "RULES", "STATE", "MESSAGE")

    def table_row(self) -> tuple[str, ...]:
        shown = "idle" if self.idle_since is not None and self.ready else self.state.value
        return (str(self.port), self.direction, self.digest[:16], shown, self.message)


def digest_of(content: Content) -> str:
    return "+".join(digest for digest in content if digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerState:
    """What the proxy says of a port."""

    port: int
    digest: str
    state: Literal["pending", "acked", "failed", "removed"]
    message: str = ""
    version: str = ""
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class InForce:
    """What policy rows in the kernel say, whatever is wanted next: they are written after the
    proxy was told, and some that cannot be written stay."""

    ports: frozenset[int] = frozenset()  # of the proxy, that rows name
    may_swap: Callable[[str, str], bool] = lambda _old, _new: True
    """May the proxy enforce the second set (digests) where rows mean the first?"""


class Redirects:
    """Owner of the listeners. Called from the event loop only."""

    def __init__(
        self,
        path: Path,
        *,
        ports: range,
        release_delay_s: float,
        busy: Callable[[], Collection[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._range = ports
        self._release_delay_s = release_delay_s
        self._busy = busy
        self._clock = clock
        self._listeners: dict[int, Listener] = {}
        self._by_content: dict[Content, Listener] = {}
        self._used: dict[SubjectKey, frozenset[str]] = {}  # digests by subject, when last asked
        self._changed: set[int] = set()  # ports that the proxy has to hear about
        self._removed: set[int] = set()
        self._saved: dict[str, dict[str, str]] = {}
        self._in_force = InForce()
        self.problem = ""  # why a set has no listener
        self.watching = True  # whether connections that are only to be seen go to the proxy

    # ---- what others see

    @property
    def listeners(self) -> Mapping[int, Listener]:
        return self._listeners

    def port(self, rules: L7Set) -> int | None:
        """Where the proxy enforces this set now; None while it does not."""
        if rules.watches and not self.watching:
            return None
        listener = self._by_content.get(_content_of(rules))
        return listener.port if listener is not None and listener.ready else None

    def pairs(self) -> dict[tuple[int, int], int]:
        """Rows of cilia_proxy_pair: (egress port, ingress port) -> the port for both."""
        rows = {}
        for listener in self._listeners.values():
            egress, ingress = listener.content
            if not (egress and ingress and listener.ready):
                continue
            one, other = self._by_content.get((egress, "")), self._by_content.get(("", ingress))
            if one is not None and other is not None:
                rows[one.port, other.port] = listener.port
        return rows

    @property
    def ports(self) -> frozenset[int]:
        """Of listeners to which packets may be delivered."""
        return frozenset(self._listeners)

    def waiting(self) -> list[Listener]:
        """Those that somebody needs and that do not enforce what is wanted."""
        return [x for x in self._by_content.values() if x.idle_since is None and not x.ready]

    # ---- what is wanted

    def want(
        self,
        used: Mapping[SubjectKey, frozenset[L7Set]],
        pairs: Collection[Pair],
        in_force: InForce,
    ) -> bool:
        """All L7 sets that policies need, by subject, and the pairs that may meet on a connection.

        True when the proxy has to be told something.
        """
        self.problem = ""
        self._in_force = in_force
        sets = {rules.digest: rules for group in used.values() for rules in group}
        wanted: dict[Content, tuple[L7Set | None, L7Set | None]] = {}
        for rules in sets.values():
            wanted[_content_of(rules)] = (rules, None) if rules.egress else (None, rules)
        for egress, ingress in pairs:
            wanted[egress.digest, ingress.digest] = (egress, ingress)
        digests = {key: frozenset(x.digest for x in group) for key, group in used.items()}
        successors = self._successors(digests, sets)
        self._used = digests

        for old, new in self._renamed(successors, wanted).items():
            listener = self._by_content.pop(old)
            listener.content = new
            listener.enforced = ""
            self._by_content[new] = listener
            self._tell(listener)
        for content, (egress_set, ingress_set) in wanted.items():
            known = self._by_content.get(content)
            if known is None:
                known = self._open(content)
                if known is None:
                    continue
            known.egress, known.ingress = egress_set, ingress_set
            known.users = sum(1 for x in digests.values() if set(content) - {""} <= x)
            if known.idle_since is not None:
                known.idle_since = None
            if known.state is State.LEAVING:
                known.enforced = ""
                self._tell(known)
        now = self._clock()
        for content, listener in self._by_content.items():
            if content not in wanted and listener.idle_since is None:
                listener.idle_since, listener.users = now, 0
        return self.unsent

    def _successors(
        self, now: Mapping[SubjectKey, frozenset[str]], sets: Mapping[str, L7Set]
    ) -> dict[str, str]:
        """Sets that nobody uses any more, with the set that all who did use instead.

        Only where it is plain: each subject that changed, changed one set of a direction. And only
        where it is safe, for the proxy has the new rules before the kernel has the new rows, and
        for as long as this process is dead in between.
        """
        found: dict[str, set[str]] = {}
        still = {digest for group in now.values() for digest in group}
        for subject, before in self._used.items():
            after = now.get(subject)
            if after is None:
                continue
            for egress in (True, False):
                gone = [d for d in before - after if self._direction(d) is egress]
                come = [d for d in after - before if sets[d].egress is egress]
                for old in gone:
                    found.setdefault(old, set()).update(come if len(gone) == 1 else ())
                    if len(gone) != 1 or len(come) != 1:
                        found[old].add("")  # not plain
        return {
            old: next(iter(new))
            for old, new in found.items()
            if len(new) == 1
            and "" not in new
            and old not in still
            and self._in_force.may_swap(old, next(iter(new)))
        }

    def _direction(self, digest: str) -> bool | None:
        return (
            True
            if (digest, "") in self._by_content
            else False
            if ("", digest) in self._by_content
            else None
        )

    def _renamed(
        self, successors: Mapping[str, str], wanted: Collection[Content]
    ) -> dict[Content, Content]:
        """Listeners that go on with other rules."""
        renamed: dict[Content, Content] = {}
        for old, listener in self._by_content.items():
            if old in wanted or listener.state is State.LEAVING:
                continue
            new = (successors.get(old[0], old[0]), successors.get(old[1], old[1]))
            if new != old and new in wanted and new not in self._by_content:
                renamed[old] = new
        # One heir each: which of two went on would not be plain.
        heirs = list(renamed.values())
        return {old: new for old, new in renamed.items() if heirs.count(new) == 1}

    def _open(self, content: Content) -> Listener | None:
        free = [p for p in self._range if p not in self._listeners and p not in self._removed]
        busy = self._in_force.ports | frozenset(self._busy())
        free = [port for port in free if port not in busy]
        if not free:
            self.problem = (
                f"no port of {self._range.start}-{self._range.stop - 1} is free for a listener of "
                "the proxy (give a larger --proxy-ports)"
            )
            return None
        listener = Listener(port=random.choice(free), content=content)
        self._listeners[listener.port] = listener
        self._by_content[content] = listener
        self._tell(listener)
        return listener

    def _tell(self, listener: Listener) -> None:
        listener.state, listener.message = State.PENDING, ""
        self._changed.add(listener.port)
        self._removed.discard(listener.port)

    def release_due(self, named: Collection[int]) -> bool:
        """Have listeners closed that nobody needed for long enough, and no row in the kernel names.
        True if there are any.
        """
        limit = self._clock() - self._release_delay_s
        due = False
        for listener in self._listeners.values():
            if (
                listener.idle_since is not None
                and listener.idle_since <= limit
                and listener.port not in named
                and listener.state is not State.LEAVING
            ):
                listener.state, listener.enforced = State.LEAVING, ""
                self._changed.discard(listener.port)
                self._removed.add(listener.port)
                due = True
        return due

    # ---- the proxy

    @property
    def unsent(self) -> bool:
        return bool(self._changed or self._removed)

    def snapshot(self) -> tuple[list[Listener], list[int]]:
        """All listeners, for a proxy that may know anything or nothing."""
        self._changed.clear()
        self._removed.clear()
        known = []
        for listener in list(self._listeners.values()):
            if listener.state is State.LEAVING or (listener.egress, listener.ingress) == (
                None,
                None,
            ):
                self._forget(listener)  # it is not in the snapshot, so it is closed
            else:
                known.append(listener)
        return known, []

    def take_changes(self) -> tuple[list[Listener], list[int]]:
        """Listeners to make or change, and ports to close, since last asked."""
        changed = [self._listeners[port] for port in sorted(self._changed)]
        removed = sorted(self._removed)
        self._changed.clear()
        self._removed.clear()
        return changed, removed

    def feed(self, states: Iterable[ListenerState]) -> frozenset[str]:
        """What the proxy says. Returns the digests of sets whose port is another now."""
        moved: set[str] = set()
        for said in states:
            listener = self._listeners.get(said.port)
            if listener is None:
                continue
            if said.state == "removed":
                if listener.state is State.LEAVING:
                    self._forget(listener)
                continue
            if listener.state is State.LEAVING or said.digest != listener.digest:
                continue
            if said.sequence < listener.sent or listener.port in self._changed:
                continue  # about rules that are being replaced
            listener.version = said.version
            if said.state == "acked":
                listener.state, listener.message, listener.proven = State.READY, "", True
                if listener.enforced != said.digest:
                    listener.enforced = said.digest
                    moved.update(digest for digest in listener.content if digest)
            elif said.state == "failed":
                if listener.state is not State.FAILED or listener.message != said.message:
                    log.error(
                        "The proxy refused L7 rules.",
                        **{fields.ADDRESS: said.port, fields.ERROR: said.message},
                    )
                listener.state, listener.message = State.FAILED, said.message
                if not listener.proven and listener.tries < _TRIES:
                    self._elsewhere(listener)
            elif not listener.ready:
                listener.state, listener.message = State.PENDING, said.message
        return frozenset(moved)

    def _elsewhere(self, listener: Listener) -> None:
        """It may be the port that the proxy cannot have: somebody bound it before."""
        del self._by_content[listener.content]
        other = self._open(listener.content)
        if other is None:
            self._by_content[listener.content] = listener
            return
        other.egress, other.ingress, other.users = listener.egress, listener.ingress, listener.users
        other.idle_since, other.tries = listener.idle_since, listener.tries + 1
        other.message = listener.message
        listener.state = State.LEAVING
        self._changed.discard(listener.port)
        self._removed.add(listener.port)

    def _forget(self, listener: Listener) -> None:
        del self._listeners[listener.port]
        if self._by_content.get(listener.content) is listener:
            del self._by_content[listener.content]

    # ---- what survives

    def load(self) -> None:
        """Listeners of an earlier run. Raises StateFileDamaged, StateFileUnreadable. Blocking."""
        content = statefile.read_json(self._path)
        if content is None:
            return
        try:
            found = [
                Listener(
                    port=int(port),
                    content=(str(row["egress"]), str(row["ingress"])),
                    enforced=str(row["enforced"]),
                    idle_since=self._clock(),
                )
                for port, row in content["listeners"].items()
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise statefile.StateFileDamaged(self._path, str(error)) from error
        for listener in found:
            if listener.ready:
                listener.state, listener.proven = State.READY, True
            self._listeners[listener.port] = listener
            self._by_content[listener.content] = listener

    @property
    def unsaved(self) -> bool:
        return self._state() != self._saved

    def save(self) -> None:
        """Before the proxy is told, and after it acknowledged. Blocking."""
        state = self._state()
        if state != self._saved:
            statefile.write_json(self._path, {"listeners": state})
            self._saved = state

    def _state(self) -> dict[str, dict[str, str]]:
        return {
            str(port): {
                "egress": listener.content[0],
                "ingress": listener.content[1],
                "enforced": listener.enforced,
            }
            for port, listener in sorted(self._listeners.items())
            if listener.state is not State.LEAVING
        }


def _content_of(rules: L7Set) -> Content:
    return (rules.digest, "") if rules.egress else ("", rules.digest)


# ---- which pairs may meet


@dataclass(frozen=True, slots=True)
class Proxied:
    """A row that leads to a proxy."""

    peer: int  # identity; 0: anybody
    first: int  # ports
    last: int
    rules: L7Set


@dataclass(slots=True)
class SubjectRows:
    """What of one local identity's policy leads to a proxy."""

    identity: int
    egress: list[Proxied] = field(default_factory=list)
    ingress: list[Proxied] = field(default_factory=list)


def meeting_pairs(subjects: Collection[SubjectRows]) -> frozenset[Pair]:
    """Egress and ingress sets of local identities that may meet on one connection."""
    inward = [subject for subject in subjects if subject.ingress]
    found: set[Pair] = set()
    for source in subjects:
        if not source.egress:
            continue
        for target in inward:
            found |= {
                (out.rules, into.rules)
                for out in source.egress
                if out.peer in (0, target.identity)
                for into in target.ingress
                if into.peer in (0, source.identity)
                and out.first <= into.last
                and into.first <= out.last
            }
    return frozenset(found)
