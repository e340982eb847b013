"""Who the nodes are, and a connection to each that is made again when it is lost.

Peers come from a file, read again when it changes, or from a node's Peer service, whose
notifications are followed. A peer's state is that of its connection, with the reason when it has
none.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from cilia.controller import spawn
from cilia.errors import DomainError, Kind
from cilia.telemetry import fields
from services.flows.http2.client import Channel
from services.flows.http2.connection import RpcFailure
from services.flows.relay.convert import apply_notification
from services.flows.relay.info import PeerInfo, with_port
from services.flows.watched import changes, read_yaml

log = structlog.get_logger()

_MAX_PEERS: Final = 4096
_RETRY_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class PeersUnreadable(DomainError):
    """The file of peers is absent, or says nothing that makes sense."""

    default_kind = Kind.INVALID
    default_cure = 'Write a list of {name: NODE, address: "HOST:PORT"}, tls_server_name optional'


@dataclass(slots=True)
class Peer:
    info: PeerInfo
    channel: Channel | None = None
    message: str = "not connected yet"
    task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self.channel is not None


def read_peers(path: Path) -> tuple[PeerInfo, ...]:
    """The peers that a file lists. Raises PeersUnreadable."""
    listed = read_yaml(path, PeersUnreadable)
    if not isinstance(listed, list) or len(listed) > _MAX_PEERS:
        raise PeersUnreadable(f"{path} is not a list of at most {_MAX_PEERS} peers")
    found: dict[str, PeerInfo] = {}
    for number, entry in enumerate(listed, 1):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) and entry[key] for key in ("name", "address")
        ):
            raise PeersUnreadable(f"{path}: peer {number} lacks a name or an address")
        unknown = set(entry) - {"name", "address", "tls_server_name"}
        if unknown:
            raise PeersUnreadable(f"{path}: peer {number} has an unknown field {min(unknown)}")
        info = PeerInfo(
            entry["name"], with_port(entry["address"]), str(entry.get("tls_server_name", ""))
        )
        if info.name in found:
            raise PeersUnreadable(f"{path}: peer {info.name} is listed twice")
        found[info.name] = info
    return tuple(found.values())


class Peers:
    """The nodes there are now. A lifecycle part."""

    def __init__(
        self,
        *,
        file: Path | None = None,
        service: str = "",
        tls: ssl.SSLContext | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = file
        self._service = service
        self._tls = tls
        self._on_change = on_change
        self._peers: dict[str, Peer] = {}
        self._group: asyncio.TaskGroup | None = None
        self._source: asyncio.Task[None] | None = None
        self.problem = ""

    def all(self) -> tuple[Peer, ...]:
        """By name."""
        return tuple(self._peers[name] for name in sorted(self._peers))

    def get(self, name: str) -> Peer | None:
        return self._peers.get(name)

    # ---- lifecycle

    async def start(self) -> None:
        group = asyncio.TaskGroup()
        await group.__aenter__()
        self._group = group
        if self._file is not None:
            self._set(read_peers(self._file))
            self._source = spawn(group, self._watch_file(self._file), "peers-file")
        elif self._service:
            self._source = spawn(group, self._watch_service(self._service), "peers-service")

    async def stop(self) -> None:
        if self._source is not None:
            self._source.cancel()
        self._set(())
        group, self._group = self._group, None
        if group is not None:
            await group.__aexit__(None, None, None)

    # ---- sources

    async def _watch_file(self, path: Path) -> None:
        async for _ in changes(path):
            try:
                self._set(read_peers(path))
                self.problem = ""
            except PeersUnreadable as error:
                self.problem = error.message
                self._on_change()
                log.warning("The peers stay as they were.", **{fields.ERROR: error.message})

    async def _watch_service(self, address: str) -> None:
        known: dict[str, PeerInfo] = {}
        failures = 0
        while True:
            try:
                channel = await Channel.connect(with_port(address), tls=self._tls)
                try:
                    known = {}
                    response = channel.call("/peer.Peer/Notify", b"")
                    self.problem = ""
                    async for messages in response:
                        failures = 0
                        for message in messages:
                            apply_notification(known, message)
                        self._set(tuple(known.values()))
                finally:
                    channel.close()
            except (OSError, TimeoutError, RpcFailure, ValueError) as error:
                self.problem = f"the peer service {address} is away: {error}"
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1

    def _set(self, infos: tuple[PeerInfo, ...]) -> None:
        wanted = {info.name: info for info in infos[:_MAX_PEERS]}
        for name, peer in list(self._peers.items()):
            if wanted.get(name) != peer.info:
                del self._peers[name]
                if peer.task is not None:
                    peer.task.cancel()
        for name, info in wanted.items():
            if name not in self._peers and self._group is not None:
                peer = self._peers[name] = Peer(info)
                peer.task = spawn(self._group, self._keep(peer), f"peer-{name}")
        self._on_change()

    async def _keep(self, peer: Peer) -> None:
        """Connected, and connected again."""
        info, failures = peer.info, 0
        try:
            while True:
                try:
                    tls = self._tls if not info.address.startswith("unix:") else None
                    channel = await Channel.connect(
                        info.address, tls=tls, server_name=info.tls_server_name
                    )
                except TimeoutError:
                    peer.message = f"{info.address} does not answer"
                except (OSError, ValueError) as error:
                    peer.message = f"cannot connect to {info.address}: {error}"
                else:
                    failures = 0
                    peer.channel, peer.message = channel, ""
                    self._on_change()
                    try:
                        await channel.closed.wait()
                    finally:
                        peer.channel = None
                        channel.close()
                    peer.message = f"the connection to {info.address} was lost"
                    self._on_change()
                await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
        finally:
            if peer.channel is not None:
                peer.channel.close()
