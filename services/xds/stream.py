"""One client's stream, without its wire: requests in, responses out, in either protocol.

    receive(request) ─▶ subscriptions, answers          (raises StreamRefused)
    changed(url, name) ─▶ marks                         by the hub, when the cache changed
    send(now) ─▶ bytes ...                              what may be said now, in order
    wake_at ─▶ when to call send again although nothing happened

For each type a stream knows what the client holds, what is on its way (`outstanding`, by nonce) and
what has to be looked at (`dirty`). One response a type is on its way at a time, so that a burst of
changes becomes one response; a client that does not answer within `patience_s` gets the next one
nevertheless, for Envoy keeps back the answer about clusters while one of them warms.

Order (make before break): clusters, endpoints and secrets first. Listeners, routes and the rest
wait until those are answered, for at most `patience_s`. Removals come last, what refers before what
it refers to.

A refused response says little about each of its resources: Envoy applies the good ones and refuses
the whole. So after a refusal of several, those that the reason names are sent again one at a time,
and the others together before them; a resource counts as refused only when it was refused alone. It
is not sent again in that version until `retry_s` has passed, for some reasons heal (a port in use).
In state-of-the-world responses the last accepted version stands in its place.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cilia.errors import DomainError, Kind
from services.xds.cache import View
from services.xds.resources import (
    CDS,
    EDS,
    MAX_NAME_BYTES,
    WILDCARD,
    NodeID,
    Resource,
    TypeInfo,
    TypeURL,
    delta_response,
    set_sum,
    set_version,
    sotw_response,
    type_info,
)

MAX_OUTSTANDING: Final = 4
MAX_REASON: Final = 1000
RETRY_GROWTH: Final = 2
RETRY_MAX_S: Final = 600.0
CHUNK_BYTES: Final = 2 << 20
"""gRPC clients take 4 MiB a message by default. Only what may be said in parts is."""
_FOREVER: Final = float("inf")


class StreamRefused(DomainError):
    """The client broke a bound or the protocol; its stream ends."""

    default_kind = Kind.INVALID


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one stream may take."""

    types: int = 64
    names: int = 100_000
    patience_s: float = 1.0
    retry_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Stub:
    """What a client says it holds, when that is no resource of today."""

    version: str


Held = Resource | Stub


@dataclass(slots=True)
class Refusal:
    resource: Resource
    reason: str
    time: float
    retry_at: float
    wait_s: float


@dataclass(slots=True)
class Response:
    """On its way. The values are what the client held before."""

    version: str
    upserts: dict[str, tuple[Resource, Held | None]]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client said of some resources, for those who wait for it."""

    url: TypeURL
    names: tuple[str, ...]
    reason: str  # "": accepted


@dataclass(frozen=True, slots=True)
class NameState:
    """What a client holds under one name."""

    accepted: Held | None
    pending: bool
    refusal: Refusal | None


@dataclass(slots=True)
class Subscription:
    """One type on one stream."""

    info: TypeInfo
    wildcard: bool = False
    by_default: bool = False
    """The wildcard came from naming nothing, and names end it (state of the world only)."""
    names: set[str] = field(default_factory=set)
    held: dict[str, Held] = field(default_factory=dict)
    total: int = 0
    dirty: set[str] = field(default_factory=set)
    force: set[str] = field(default_factory=set)
    """To be said again, though held."""
    gone: set[str] = field(default_factory=set)
    """To be removed, when its turn comes."""
    owed: bool = False
    """An answer is due, even an empty one."""
    resume: str = ""
    """The version that a client came back with, until it was compared."""
    refused: dict[str, Refusal] = field(default_factory=dict)
    groups: deque[dict[str, Held | None]] = field(default_factory=deque)
    """To be sent by themselves, to find the bad one of a refused response."""
    proving: bool = False
    outstanding: dict[str, Response] = field(default_factory=dict)
    last_nonce: str = ""
    last_sent: float = 0.0
    sent_version: str = ""
    accepted_version: str = ""
    reason: str = ""
    """Why the last response was refused; "" once one was accepted."""
    refused_at: float = 0.0

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names

    def hold(self, name: str, resource: Held) -> None:
        self.drop(name)
        self.held[name] = resource
        if isinstance(resource, Resource):
            self.total += resource.number

    def drop(self, name: str) -> None:
        before = self.held.pop(name, None)
        if isinstance(before, Resource):
            self.total -= before.number

    def forget(self, name: str) -> None:
        """The client has let go of it by itself."""
        self.drop(name)
        self.dirty.discard(name)
        self.force.discard(name)
        self.gone.discard(name)
        self.refused.pop(name, None)
        for group in self.groups:
            group.pop(name, None)

    def busy_until(self, patience_s: float) -> float:
        """Until when others wait for the answer to what was sent; 0: there is none to wait for."""
        return self.last_sent + patience_s if self.outstanding else 0.0


class Stream:
    """`node` is who the client is to us, whatever it says itself."""

    def __init__(
        self,
        view: View,
        *,
        delta: bool,
        limits: Limits | None = None,
        suspects: Mapping[TypeURL, set[str]] | None = None,
    ) -> None:
        self.view = view
        self.delta = delta
        self.subscriptions: dict[TypeURL, Subscription] = {}
        self.requests = 0
        self.responses = 0
        self.response_bytes = 0
        self.acks = 0
        self.nacks = 0
        self.wake_at: float | None = None
        self.answers: list[Answer] = []
        self.subscribed: list[tuple[TypeURL, str]] = []
        self.unsubscribed: list[tuple[TypeURL, str]] = []
        self._limits = limits or Limits()
        self._suspects = suspects or {}
        self._nonces = 0
        self._names = 0

    @property
    def node(self) -> NodeID:
        return self.view.node

    @property
    def backlog(self) -> int:
        """How many names are to be looked at: about what the next responses will hold."""
        return sum(len(sub.dirty) for sub in self.subscriptions.values())

    @property
    def at_rest(self) -> bool:
        """Whether `send` has nothing to say, now or later, until something happens."""
        for sub in self.subscriptions.values():
            if sub.dirty or sub.gone or sub.groups or sub.owed or sub.resume or sub.refused:
                return False
        return True

    # ---- in

    def receive(self, request: Any, now: float) -> None:
        """A DiscoveryRequest, or of a delta stream a DeltaDiscoveryRequest.

        Raises StreamRefused.
        """
        self.requests += 1
        url = TypeURL(request.type_url)
        if not url:
            raise StreamRefused("a request names no type_url")
        subscription = self.subscriptions.get(url)
        first = subscription is None
        if subscription is None:
            if len(self.subscriptions) >= self._limits.types:
                raise StreamRefused(
                    f"a stream may ask for {self._limits.types} types", kind=Kind.EXHAUSTED
                )
            if len(url) > 512 or not url.isprintable():
                raise StreamRefused("the type_url is not one")
            subscription = Subscription(type_info(url))
        if self.delta:
            self._receive_delta(subscription, request, now, first=first)
        else:
            self._receive_sotw(subscription, request, now, first=first)
        if first:
            self.subscriptions[url] = subscription

    def _receive_sotw(self, sub: Subscription, request: Any, now: float, *, first: bool) -> None:
        if not first and request.response_nonce:
            response = sub.outstanding.pop(request.response_nonce, None)
            current = request.response_nonce == sub.last_nonce
            if response is not None:
                if current:
                    self._supersede(sub)
                self._answered(sub, response, request, now)
            if not current:
                return  # of an older response: what it subscribes to is out of date
        asked = self._checked(request.resource_names)
        wildcard = WILDCARD in asked
        asked.discard(WILDCARD)
        if not request.resource_names:
            by_default = (first and sub.info.legacy_wildcard) or sub.by_default
            wildcard = wildcard or by_default
        else:
            by_default = False
        sub.by_default = by_default
        added = asked - sub.names
        dropped = sub.names - asked
        self._count(len(added) - len(dropped))
        sub.names = asked
        self._set_wildcard(sub, wildcard)
        for name in dropped:
            self.unsubscribed.append((sub.info.url, name))
            if not wildcard:
                sub.forget(name)
        for name in added:
            self.subscribed.append((sub.info.url, name))
            sub.dirty.add(name)
            if sub.info.whole and self.view.get(sub.info.url, name) is None:
                sub.owed = True
        if first:
            sub.owed = sub.owed or wildcard
            if sub.info.url not in self._suspects:
                sub.resume = request.version_info

    def _resume_sotw(self, sub: Subscription) -> None:
        """A client that comes back with what would be sent to it anyway needs nothing."""
        url, version, sub.resume = sub.info.url, sub.resume, ""
        names = set(self.view.names(url)) if sub.wildcard else sub.names
        found = [r for r in (self.view.get(url, name) for name in names) if r is not None]
        if set_version(set_sum(found)) != version:
            return
        for resource in found:
            sub.hold(resource.name, resource)
        sub.dirty.clear()
        sub.owed = False
        sub.sent_version = sub.accepted_version = version
        self.answers.append(Answer(url, tuple(r.name for r in found), ""))

    def _receive_delta(self, sub: Subscription, request: Any, now: float, *, first: bool) -> None:
        if not first and request.response_nonce:
            response = sub.outstanding.pop(request.response_nonce, None)
            if response is not None:
                self._answered(sub, response, request, now)
        url = sub.info.url
        subscribe = self._checked(request.resource_names_subscribe)
        unsubscribe = self._checked(request.resource_names_unsubscribe)
        wildcard = sub.wildcard
        if WILDCARD in subscribe or (first and not subscribe and sub.info.legacy_wildcard):
            wildcard = True
        if WILDCARD in unsubscribe:
            wildcard = False
        subscribe.discard(WILDCARD)
        unsubscribe.discard(WILDCARD)
        if first:
            self._resume_delta(sub, request.initial_resource_versions)
            sub.owed = wildcard and not sub.held
        self._set_wildcard(sub, wildcard)
        self._count(len(subscribe - sub.names) - len(unsubscribe & sub.names))
        for name in subscribe:
            if name not in sub.names:
                sub.names.add(name)
                self.subscribed.append((url, name))
            sub.dirty.add(name)
            if not first:
                sub.force.add(name)
            if not sub.info.patient and self.view.get(url, name) is None:
                sub.force.add(name)  # it is told that there is no such resource
        for name in unsubscribe:
            if name in sub.names:
                sub.names.discard(name)
                self.unsubscribed.append((url, name))
            if sub.wildcard:
                # The client may have let go of it, and is to learn that it still has it.
                sub.dirty.add(name)
                sub.force.add(name)
            else:
                sub.forget(name)
        if first:
            # What the client holds of names that it neither asks for nor gets by wildcard.
            for name in [name for name in sub.held if not sub.wants(name)]:
                sub.drop(name)
            sub.dirty |= sub.held.keys()
            for name in self._suspects.get(url, ()):
                if sub.wants(name) and name not in sub.held:
                    sub.hold(name, Stub(""))
                    sub.dirty.add(name)

    def _resume_delta(self, sub: Subscription, versions: Mapping[str, str]) -> None:
        if len(versions) > self._limits.names:
            raise StreamRefused(
                f"a stream may hold {self._limits.names} resources", kind=Kind.EXHAUSTED
            )
        for name, version in versions.items():
            sub.hold(name, Stub(version))

    def _set_wildcard(self, sub: Subscription, wildcard: bool) -> None:
        if wildcard == sub.wildcard:
            return
        sub.wildcard = wildcard
        if wildcard:
            self.subscribed.append((sub.info.url, WILDCARD))
            sub.dirty.update(self.view.names(sub.info.url))
        else:
            self.unsubscribed.append((sub.info.url, WILDCARD))
            for name in {*sub.held, *sub.dirty, *sub.gone} - sub.names:
                sub.forget(name)

    def _checked(self, names: Iterable[str]) -> set[str]:
        # Many clients name the same: one string of each is enough.
        checked = {sys.intern(name) for name in names}
        for name in checked:
            if len(name) > MAX_NAME_BYTES:
                raise StreamRefused(f"a resource name has {len(name)} characters")
        return checked

    def _count(self, more: int) -> None:
        self._names += more
        if self._names > self._limits.names:
            raise StreamRefused(
                f"a stream may name {self._limits.names} resources", kind=Kind.EXHAUSTED
            )

    # ---- answers

    def _supersede(self, sub: Subscription) -> None:
        """The newest response is answered, so older ones never will be. What a whole state said
        before, the newest said too; of parts we do not know, and say them again."""
        for response in sub.outstanding.values():
            if not sub.info.whole:
                for name, (resource, _) in response.upserts.items():
                    if sub.held.get(name) is resource:
                        sub.drop(name)
                        sub.dirty.add(name)
        sub.outstanding.clear()

    def _answered(self, sub: Subscription, response: Response, request: Any, now: float) -> None:
        sub.proving = False
        names = (*response.upserts, *response.removed)
        if not request.HasField("error_detail"):
            self.acks += 1
            sub.accepted_version = response.version
            sub.reason = ""
            for name, (resource, _) in response.upserts.items():
                refusal = sub.refused.get(name)
                if refusal is not None and sub.held.get(name) is resource:
                    del sub.refused[name]
            self.answers.append(Answer(sub.info.url, names, ""))
            return
        self.nacks += 1
        reason = _readable(request.error_detail.message) or "no reason given"
        sub.reason = reason
        sub.refused_at = now
        if len(response.upserts) == 1:
            [(name, (resource, before))] = response.upserts.items()
            self._roll_back(sub, name, resource, before)
            if not sub.wants(name):
                return
            last = sub.refused.get(name)
            wait_s = self._limits.retry_s
            if last is not None and last.resource.version == resource.version:
                wait_s = min(last.wait_s * RETRY_GROWTH, RETRY_MAX_S)
            sub.refused[name] = Refusal(resource, reason, now, now + wait_s, wait_s)
        elif response.upserts:
            self._isolate(sub, response, reason)
        self.answers.append(Answer(sub.info.url, names, reason))

    def _isolate(self, sub: Subscription, response: Response, reason: str) -> None:
        names = sorted(response.upserts)
        named = [name for name in names if _mentions(reason, name)]
        rest = [name for name in names if name not in named] if named else []
        for name, (resource, before) in response.upserts.items():
            self._roll_back(sub, name, resource, before)
        # The others first: they were most likely applied, and a whole state without them would
        # take them away again.
        if rest:
            sub.groups.append({name: response.upserts[name][1] for name in rest})
        for name in named or names:
            sub.groups.append({name: response.upserts[name][1]})

    def _roll_back(
        self, sub: Subscription, name: str, resource: Resource, before: Held | None
    ) -> None:
        """The client kept what it had."""
        later = False
        for response in sub.outstanding.values():
            if name in response.upserts:
                sent, assumed = response.upserts[name]
                if assumed is resource:
                    response.upserts[name] = (sent, before)
                later = True
        if not later and sub.held.get(name) is resource:
            if before is None:
                sub.drop(name)
            else:
                sub.hold(name, before)

    # ---- news

    def changed(self, url: TypeURL, name: str) -> bool:
        """Marks a name to be looked at; False when the client does not care."""
        sub = self.subscriptions.get(url)
        if sub is None or not sub.wants(name):
            return False
        sub.dirty.add(name)
        return True

    # ---- out

    def send(self, now: float) -> Iterator[bytes]:
        """The responses that are due, in their order; sets `wake_at`."""
        self.wake_at = None
        if not self.view.open:
            return
        ordered = sorted(self.subscriptions.values(), key=_make_order)
        for sub in ordered:
            if sub.resume:
                self._resume_sotw(sub)
            if not sub.info.dependency and self._waits_for(ordered, now, _is_dependency):
                break
            while (data := self._next_upserts(sub, now)) is not None:
                yield data
        for sub in sorted(ordered, key=_break_order):
            if not sub.gone:
                continue
            if self._waits_for(ordered, now, lambda _: True):
                break
            if any(other.dirty or other.groups or other.owed for other in ordered):
                break
            if (data := self._next_removal(sub, now)) is not None:
                yield data

    def _waits_for(self, subs: Iterable[Subscription], now: float, which: Any) -> bool:
        until = max(
            (sub.busy_until(self._limits.patience_s) for sub in subs if which(sub)), default=0.0
        )
        if until > now:
            self._wake(until)
            return True
        return False

    def _wake(self, at: float) -> None:
        if at != _FOREVER and (self.wake_at is None or at < self.wake_at):
            self.wake_at = at

    def _may_send(self, sub: Subscription, now: float) -> bool:
        if not sub.outstanding:
            return True
        if len(sub.outstanding) >= MAX_OUTSTANDING:
            return False
        until = sub.busy_until(self._limits.patience_s)
        if until > now:
            self._wake(until)
            return False
        return True

    def _next_upserts(self, sub: Subscription, now: float) -> bytes | None:
        for name, refusal in list(sub.refused.items()):
            if refusal.retry_at <= now:
                current = self.view.get(sub.info.url, name)
                if current is None or current.version != refusal.resource.version:
                    del sub.refused[name]
                    continue
                refusal.retry_at = _FOREVER
                sub.groups.append({name: sub.held.get(name)})
            self._wake(refusal.retry_at)
        if not (sub.dirty or sub.groups or sub.owed) or not self._may_send(sub, now):
            return None
        while sub.groups:
            if sub.proving and sub.outstanding:
                return None
            group = sub.groups.popleft()
            upserts = self._group(sub, group)
            if upserts:
                sub.proving = True
                return self._respond(sub, now, upserts, ())
        upserts = self._collect(sub, now)
        if not upserts and not sub.owed:
            return None
        sub.owed = False
        return self._respond(sub, now, upserts, ())

    def _group(
        self, sub: Subscription, group: Mapping[str, Held | None]
    ) -> dict[str, tuple[Resource, Held | None]]:
        upserts = {}
        for name, before in group.items():
            resource = self.view.get(sub.info.url, name) if sub.wants(name) else None
            if resource is None:
                sub.dirty.add(name)
            else:
                upserts[name] = (resource, before)
                sub.dirty.discard(name)
        return upserts

    def _collect(self, sub: Subscription, now: float) -> dict[str, tuple[Resource, Held | None]]:
        """What is marked and differs from what the client holds; removals are put aside."""
        url = sub.info.url
        in_parts = self.delta or not sub.info.whole
        upserts: dict[str, tuple[Resource, Held | None]] = {}
        size = 0
        known = []
        while sub.dirty:
            name = sub.dirty.pop()
            forced = name in sub.force
            sub.force.discard(name)
            before = sub.held.get(name)
            resource = self.view.get(url, name) if sub.wants(name) else None
            if resource is None:
                sub.refused.pop(name, None)
                if before is not None or (forced and self.delta):
                    sub.gone.add(name)
                continue
            sub.gone.discard(name)
            if not forced:
                if before is not None and before.version == resource.version:
                    if isinstance(before, Stub):
                        sub.hold(name, resource)
                        known.append(name)
                    if sub.refused.pop(name, None) is not None:
                        known.append(name)  # what was refused is wanted no more
                    continue
                refusal = sub.refused.get(name)
                if refusal is not None and refusal.resource.version == resource.version:
                    self._wake(refusal.retry_at)
                    continue
            upserts[name] = (resource, before)
            size += resource.size
            if in_parts and size > CHUNK_BYTES:
                break
        if known:
            self.answers.append(Answer(url, tuple(known), ""))
        if url == CDS:
            self._warm_again(upserts)
        return upserts

    def _warm_again(self, upserts: Mapping[str, tuple[Resource, Held | None]]) -> None:
        """A changed cluster warms anew and needs its endpoints, though the client holds them."""
        endpoints = self.subscriptions.get(EDS)
        if endpoints is None:
            return
        for resource, before in upserts.values():
            if before is not None and resource.refers in endpoints.held:
                endpoints.dirty.add(resource.refers)
                endpoints.force.add(resource.refers)

    def _next_removal(self, sub: Subscription, now: float) -> bytes | None:
        removed = tuple(sorted(sub.gone))
        sub.gone.clear()
        for name in removed:
            sub.drop(name)
            sub.refused.pop(name, None)
        if not self.delta and not sub.info.whole and sub.held:
            # Parts cannot say that something is gone; who refers to it will stop to.
            self.answers.append(Answer(sub.info.url, removed, ""))
            return None
        return self._respond(sub, now, {}, removed)

    def _respond(
        self,
        sub: Subscription,
        now: float,
        upserts: dict[str, tuple[Resource, Held | None]],
        removed: tuple[str, ...],
    ) -> bytes:
        for name, (resource, _) in upserts.items():
            sub.hold(name, resource)
        self._nonces += 1
        nonce = str(self._nonces)
        version = set_version(sub.total)
        new = [resource for resource, _ in upserts.values()]
        if self.delta:
            data = delta_response(sub.info.url, version, nonce, new, removed)
        else:
            if sub.info.whole:
                new = [held for held in sub.held.values() if isinstance(held, Resource)]
            data = sotw_response(sub.info.url, version, nonce, new)
        sub.outstanding[nonce] = Response(version, upserts, removed)
        sub.last_nonce = nonce
        sub.last_sent = now
        sub.sent_version = version
        self.responses += 1
        self.response_bytes += len(data)
        return data

    # ---- questions

    def state(self, url: TypeURL, name: str) -> NameState | None:
        """What the client holds under a name; None when it has not asked for it."""
        sub = self.subscriptions.get(url)
        if sub is None or not sub.wants(name):
            return None
        refusal = sub.refused.get(name)
        for response in sub.outstanding.values():
            if name in response.upserts:
                return NameState(response.upserts[name][1], True, refusal)
            if name in response.removed:
                return NameState(Stub(""), True, refusal)
        for group in sub.groups:
            if name in group:
                return NameState(group[name], True, refusal)
        pending = name in sub.dirty or name in sub.gone
        return NameState(sub.held.get(name), pending, refusal)

    def suspects(self) -> dict[TypeURL, set[str]]:
        """What the client may hold without saying so when it comes back: resources of a refused
        response that were not proven good or bad."""
        return {
            url: {name for group in sub.groups for name in group}
            | {n for r in sub.outstanding.values() for n in r.upserts if sub.proving}
            for url, sub in self.subscriptions.items()
            if sub.groups or sub.proving
        }


def _make_order(sub: Subscription) -> tuple[int, str]:
    return sub.info.order, sub.info.url


def _break_order(sub: Subscription) -> tuple[int, str]:
    return sub.info.removal_order, sub.info.url


def _is_dependency(sub: Subscription) -> bool:
    return sub.info.dependency


def _readable(text: str) -> str:
    """A client's words, safe to show."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * MAX_REASON])
    shown = " ".join(shown.split())
    return shown if len(shown) <= MAX_REASON else shown[: MAX_REASON - 1] + "…"


def _mentions(reason: str, name: str) -> bool:
    """Whether a reason names a resource as a word of its own."""
    return name in reason and bool(
        re.search(rf"(?<![\w/-])(?<!\w\.){re.escape(name)}(?![\w/-]|\.\w)", reason)
    )
