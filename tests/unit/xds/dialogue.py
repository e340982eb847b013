"""Dialogues with a stream, as text: what the client says, and all that the server must say.

    == put CDS a=1 b=1        the server's resources change, in one transaction (-a removes a)
    >> CDS *                  the client asks; names, `*`, or nothing for the old wildcard
    << CDS a=1 b=1            the response that must come, resources in any order
    >> CDS ack                the newest response of the type is accepted (names: the new wish)
    >> CDS nack "b is bad"    or refused
    << nothing                silence, as after every line that no response follows
    == wait 2                 seconds pass
    == reconnect              the stream breaks; the client comes back as Envoy does
    == restart                so does the server, with the same resources in a new process

Delta requests are `>> CDS +a -b`; a delta response names removals as `-a`.
"""

from __future__ import annotations

import shlex
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2 as pb

from services.xds.cache import ResourceCache
from services.xds.hub import Attached, Hub, Peer
from services.xds.resources import NodeID, TypeURL, by_short_name, type_info
from services.xds.stream import Limits

LIMITS = Limits(patience_s=1.0, retry_s=30.0, names=1000, types=8)


class Dialogue:
    """A server with one client, `n1`, unless `node` says otherwise."""

    def __init__(self, *, delta: bool, node: str = "n1") -> None:
        self.delta = delta
        self.node = NodeID(node)
        self.now = 100.0
        self.cache = ResourceCache()
        self.hub = Hub(self.cache, limits=LIMITS)
        self.heard: list[Any] = []
        self.last: dict[str, Any] = {}
        self.names: dict[str, list[str]] = {}
        self.wild: set[str] = set()
        self.accepted: dict[str, str] = {}
        self.held: dict[str, dict[str, str]] = {}
        self.attached: Attached = self._attach()

    def _attach(self) -> Attached:
        return self.hub.attach(
            self.node, delta=self.delta, peer=Peer(), wake=lambda: None, time=self.now
        )

    # ---- the play

    def play(self, text: str) -> Dialogue:
        for number, raw in enumerate(text.strip().splitlines(), 1):
            line = raw.split("#")[0].strip()
            if not line:
                continue
            who, _, rest = line.partition(" ")
            where = f"line {number}: {line}"
            match who:
                case "==":
                    self._silent(where)
                    self._stage(rest)
                case ">>":
                    self._silent(where)
                    self._say(rest)
                case "<<" if rest == "nothing":
                    self._silent(where)
                case "<<":
                    self._hear(rest, where)
                case _:
                    raise AssertionError(f"not a line of a dialogue: {line}")
        self._silent("the end")
        return self

    def _silent(self, where: str) -> None:
        assert not self.heard, (
            f"{where}: unexpected before it: {[self._show(m) for m in self.heard]}"
        )

    def _stage(self, rest: str) -> None:
        verb, *words = shlex.split(rest)
        match verb:
            case "put":
                url = by_short_name(words[0])
                with self.cache.transaction() as change:
                    for word in words[1:]:
                        if word in ("CDS", "EDS", "SDS", "LDS", "RDS", "ECDS", "NPDS"):
                            url = by_short_name(word)
                        elif word.startswith("-"):
                            change.remove(url, word[1:])
                        else:
                            name, _, value = word.partition("=")
                            name, _, owner = name.partition("@")
                            change.put(
                                url,
                                name,
                                f"{name}={value}".encode(),
                                nodes=[owner] if owner else None,
                            )
            case "wait":
                self.now += float(words[0])
            case "hold":
                self.cache.hold(self.node)
            case "release":
                self.cache.release(self.node)
            case "reconnect":
                self.hub.detach(self.attached)
                self._come_back()
            case "restart":
                fresh = ResourceCache()
                with fresh.transaction() as change:
                    for resource, node in self.cache.rows():
                        change.put(
                            resource.url,
                            resource.name,
                            resource.value(),
                            nodes=None if node is None else [node],
                        )
                self.cache = fresh
                self.hub = Hub(fresh, limits=LIMITS)
                self._come_back()
            case _:
                raise AssertionError(f"no such stage direction: {rest}")
        self._pump()

    def _come_back(self) -> None:
        self.attached = self._attach()
        self.last.clear()
        for short in [*self.names]:
            request: Any
            url = by_short_name(short)
            if self.delta:
                request = pb.DeltaDiscoveryRequest(
                    type_url=url, initial_resource_versions=self.held.get(short, {})
                )
                request.resource_names_subscribe.extend(self.names[short])
                if short in self.wild and self.names[short]:
                    request.resource_names_subscribe.append("*")
            else:
                request = pb.DiscoveryRequest(
                    type_url=url,
                    version_info=self.accepted.get(short, ""),
                    resource_names=self.names[short],
                )
            self._receive(request)

    def _say(self, rest: str) -> None:
        short, *words = shlex.split(rest)
        url = by_short_name(short)
        answer = words.pop(0) if words and words[0] in ("ack", "nack") else ""
        reason = words.pop(0) if answer == "nack" else ""
        last = self.last.get(short)
        request: Any
        if self.delta:
            names = self.names.setdefault(short, [])
            request = pb.DeltaDiscoveryRequest(type_url=url)
            if not answer and not words:
                self.wild.add(short)
            for word in words:
                sign, name = word[0], word[1:]
                if sign == "+":
                    request.resource_names_subscribe.append(name)
                    names.append(name)
                else:
                    request.resource_names_unsubscribe.append(name)
                    if name in names:
                        names.remove(name)
                    self.held.get(short, {}).pop(name, None)
        else:
            if words or not answer:
                self.names[short] = words
            request = pb.DiscoveryRequest(
                type_url=url,
                resource_names=self.names[short],
                version_info=self.accepted.get(short, ""),
            )
        if last is not None:
            request.response_nonce = last.nonce
        if answer:
            assert last is not None, "nothing was said that could be answered"
            if answer == "nack":
                request.error_detail.code = 13
                request.error_detail.message = reason
            elif self.delta:
                held = self.held.setdefault(short, {})
                held.update({r.name: r.version for r in last.resources})
                for name in last.removed_resources:
                    held.pop(name, None)
            else:
                self.accepted[short] = request.version_info = last.version_info
        elif self.delta:
            request.response_nonce = ""
        self._receive(request)

    def _receive(self, request: Any) -> None:
        # Through the wire's own bytes, as a client's.
        self.attached.stream.receive(
            type(request).FromString(request.SerializeToString()), self.now
        )
        self._pump()

    def _pump(self) -> None:
        stream = self.attached.stream
        self.hub.settle(self.attached, self.now)
        for data in stream.send(self.now):
            response: Any = (
                pb.DeltaDiscoveryResponse if self.delta else pb.DiscoveryResponse
            ).FromString(data)
            self.heard.append(response)
        self.hub.settle(self.attached, self.now)

    def _hear(self, expected: str, where: str) -> None:
        assert self.heard, f"{where}: nothing came"
        response = self.heard.pop(0)
        short, *words = expected.split()
        assert self._show(response) == " ".join([short, *sorted(words)]), where
        self.last[short] = response

    def _show(self, response: Any) -> str:
        short = type_info(TypeURL(response.type_url)).short
        if self.delta:
            for resource in response.resources:
                assert resource.resource.value.decode().startswith(f"{resource.name}=")
            words = [r.resource.value.decode() for r in response.resources]
            words += [f"-{name}" for name in response.removed_resources]
        else:
            words = [resource.value.decode() for resource in response.resources]
        return " ".join([short, *sorted(words)])

    # ---- questions

    def standing(self, short: str, name: str) -> str:
        found = self.hub.standing(self.node, by_short_name(short), name)
        return f"{found.state.value} {found.reason}".strip()
