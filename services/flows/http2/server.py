"""The listeners, and calls as coroutines.

    listener ──▶ _Wire (asyncio protocol) ──▶ Connection (h2) ──▶ events ──▶ a task a call
                       ▲                                                         │
                       └── bytes, when the socket has room ◀── Call.send*() ─────┘

A call waits for two things before it sends: for the client's windows and for the socket's buffer.
So what a slow reader costs is its place in the store, never memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket as sockets
import ssl
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from cilia.controller import spawn
from cilia.errors import DomainError
from cilia.rpc.errors import CODE_OF_KIND
from cilia.rpc.server import GROUP, claim_socket_path, open_to_group
from cilia.telemetry import fields
from services.flows.http2.connection import (
    CallBegan,
    CallEnded,
    Closed,
    Connection,
    Event,
    HalfClosed,
    Limits,
    MessageArrived,
    RpcFailure,
    Status,
    WindowOpened,
    frame_message,
)

log = structlog.get_logger()

# One burst: large enough that a system call is little, small enough that others get their turn.
_BURST_BYTES: Final = 256 << 10
_WRITE_BUFFER_BYTES: Final = 512 << 10
_SEND_BUFFER_BYTES: Final = 1 << 20
# What may wait besides payload (acknowledgements, refusals) for a client that does not read.
_MAX_UNREAD_BYTES: Final = 4 << 20
_MAX_CONNECTIONS: Final = 256
_PREFACE_S: Final = 10.0
_KEEPALIVE_S: Final = 30.0
_GRACE_S: Final = 2.0
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

Handler = Callable[["Call"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as the transport knows."""

    address: str
    tls_name: str = ""  # common name of a verified client certificate


class Call:
    """One call. Handlers raise RpcFailure or a DomainError to end it with an error."""

    def __init__(self, wire: _Wire, stream: int, path: str, metadata: Mapping[str, str]) -> None:
        self.path: Final = path
        self.metadata: Final = metadata
        self._wire = wire
        self._stream = stream
        self._messages: deque[bytes] = deque()
        self._ended = False  # the client sends no more
        self._arrived = asyncio.Event()
        self._window = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def peer(self) -> Peer:
        return self._wire.peer

    # ---- the request

    async def message(self) -> bytes:
        """The one request message of a call that has one. Raises RpcFailure when there is none."""
        async for message in self.messages():
            return message
        raise RpcFailure(Status.INTERNAL, "the call carries no request message")

    async def messages(self) -> AsyncIterator[bytes]:
        while True:
            while self._messages:
                yield self._messages.popleft()
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def arrive(self, message: bytes) -> bool:
        """False when the client sends faster than the handler reads."""
        if len(self._messages) >= self._wire.core.limits.messages_queued:
            return False
        self._messages.append(message)
        self._arrived.set()
        return True

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    def open_window(self) -> None:
        self._window.set()

    # ---- the response

    async def start(self) -> None:
        """Send the response's headers at once: a client of a quiet stream waits for them."""
        self._wire.core.send_headers(self._stream, self._wire.server.headers)
        self._wire.flush()

    async def send(self, message: bytes) -> None:
        await self.send_framed(frame_message(message))

    async def send_framed(self, payload: bytes | bytearray | memoryview) -> None:
        """Send whole messages, each with its prefix. The payload may be reused on return."""
        wire, core = self._wire, self._wire.core
        core.send_headers(self._stream, wire.server.headers)
        view = memoryview(payload).cast("B")
        while len(view):
            await wire.writable.wait()
            frames, taken = core.frames(self._stream, view[:_BURST_BYTES])
            if not taken:
                self._window.clear()
                wire.flush()
                await self._window.wait()
                continue
            wire.flush()
            wire.write(frames)
            view = view[taken:]
            if len(view):
                await asyncio.sleep(0)


class _Wire(asyncio.Protocol):
    """One connection's socket, timers and calls."""

    def __init__(self, server: GrpcServer) -> None:
        self.server = server
        self.core = Connection(server.limits)
        self.peer = Peer("")
        self.writable = asyncio.Event()
        self.writable.set()
        self._calls: dict[int, Call] = {}
        self._transport: asyncio.Transport | None = None
        self._spoke = False
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # ---- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self.server.admit(self):
            transport.abort()
            return
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        sock: sockets.socket = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.peer = Peer(_peer_address(transport), _common_name(transport))
        self._heard = time.monotonic()
        self._timer = self.server.loop.call_later(_PREFACE_S, self._tick)
        self.flush()

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        self._spoke = True
        for event in self.core.receive(data, self._heard):
            self._on(event)
        self.flush()
        if self._transport is not None and self._unread() > _MAX_UNREAD_BYTES:
            self._drop("it does not read what it asks for")

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        for call in self._calls.values():
            if call.task is not None:
                call.task.cancel()
        self._calls.clear()
        self.writable.set()
        self.server.forget(self)

    # ---- events

    def _on(self, event: Event) -> None:
        match event:
            case CallBegan():
                call = Call(self, event.stream, event.path, event.metadata)
                self._calls[event.stream] = call
                call.task = self.server.spawn(self._run(call, event.stream), event.path)
            case MessageArrived():
                call_ = self._calls.get(event.stream)
                if call_ is not None and not call_.arrive(event.message):
                    self.core.fail(
                        event.stream, Status.RESOURCE_EXHAUSTED, "too many unread request messages"
                    )
                    self._cancel(event.stream)
            case HalfClosed():
                if (call_ := self._calls.get(event.stream)) is not None:
                    call_.end()
            case CallEnded():
                self._cancel(event.stream)
            case WindowOpened(stream=0):
                for call_ in self._calls.values():
                    call_.open_window()
            case WindowOpened():
                if (call_ := self._calls.get(event.stream)) is not None:
                    call_.open_window()
            case Closed():
                self._drop(event.reason)

    def _cancel(self, stream: int) -> None:
        call = self._calls.pop(stream, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    async def _run(self, call: Call, stream: int) -> None:
        status, message = Status.OK, ""
        try:
            async with asyncio.timeout(_timeout_s(call.metadata)):
                await self.server.handler(call.path)(call)
        except RpcFailure as failure:
            status, message = failure.status, failure.message
        except TimeoutError:
            status, message = Status.DEADLINE_EXCEEDED, "the client's deadline has passed"
        except DomainError as error:
            number: int = CODE_OF_KIND[error.kind].value[0]
            status = Status(number)
            message = f"{error.message}. {error.cure}" if error.cure else error.message
        except asyncio.CancelledError:
            status, message = Status.UNAVAILABLE, "the server is stopping"
            if stream not in self._calls:
                raise
        except Exception:
            log.exception("A call failed.", **{fields.METHOD: call.path})
            status, message = Status.INTERNAL, "the server failed; its log says how"
        if self._calls.pop(stream, None) is not None and self.core.is_open(stream):
            self.core.send_trailers(stream, status, message, self.server.headers)
            self.flush()

    # ---- the socket

    def write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def flush(self) -> None:
        self.write(self.core.take())

    def _unread(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def _drop(self, reason: str) -> None:
        log.debug("A client was disconnected.", **{fields.PEER: self.peer.address, "why": reason})
        for stream in list(self._calls):
            self._cancel(stream)
        if self._transport is not None:
            self.flush()
            if self._unread() > _MAX_UNREAD_BYTES:
                self._transport.abort()
            else:
                self._transport.close()

    def _tick(self) -> None:
        """Who has not spoken yet is sent away; who is silent is pinged, and then sent away."""
        silent_s = time.monotonic() - self._heard
        if not self._spoke or silent_s > 2.5 * _KEEPALIVE_S:
            if self._transport is not None:
                self._transport.abort()
            return
        if silent_s > _KEEPALIVE_S and not self.core.closed:
            self.core.ping()
            self.flush()
        self._timer = self.server.loop.call_later(_KEEPALIVE_S, self._tick)

    def say_goodbye(self) -> None:
        self.core.say_goodbye()
        self.flush()

    def stop_calls(self) -> list[asyncio.Task[None]]:
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        for task in tasks:
            task.cancel()
        return tasks

    def close(self) -> None:
        if self._transport is not None:
            self.flush()
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class GrpcServer:
    """Serves `handlers` (by path: "/observer.Observer/GetFlows") on unix sockets and TCP.

    A lifecycle part: start() listens, stop() ends calls with UNAVAILABLE. `headers` go with every
    response.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        socket: Path | None = None,
        listen: Sequence[tuple[str, int]] = (),
        tls: ssl.SSLContext | None = None,
        headers: Iterable[tuple[str, str]] = (),
        group: str | None = GROUP,
        limits: Limits | None = None,
    ) -> None:
        self.headers: Final = tuple(headers)
        self.limits: Final = limits or Limits()
        self._handlers: Final = dict(handlers)
        self._socket = socket
        self._listen = tuple(listen)
        self._tls = tls
        self._group = group
        self._wires: set[_Wire] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._servers: list[asyncio.Server] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._inode: tuple[int, int] | None = None
        self.loop: asyncio.AbstractEventLoop
        self.calls_total = 0

    @property
    def connections(self) -> int:
        return len(self._wires)

    @property
    def ports(self) -> tuple[int, ...]:
        """TCP ports in use, once started; they differ from those asked for where these were 0."""
        return tuple(
            s.getsockname()[1]
            for server in self._servers
            for s in server.sockets
            if s.family in (sockets.AF_INET, sockets.AF_INET6)
        )

    # ---- lifecycle

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        tasks = asyncio.TaskGroup()
        await tasks.__aenter__()
        self._tasks = tasks
        if self._tls is not None:
            self._tls.set_alpn_protocols(["h2"])
        if self._socket is not None:
            gid = claim_socket_path(self._socket, self._group)
            old_umask = os.umask(0o177)
            try:
                listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
                listener.bind(str(self._socket))
            finally:
                os.umask(old_umask)
            open_to_group(self._socket, gid)
            status = self._socket.stat()
            self._inode = (status.st_dev, status.st_ino)
            self._servers.append(
                await self.loop.create_unix_server(self._wire, sock=listener, backlog=128)
            )
            log.info("The server is listening.", **{fields.SOCKET: str(self._socket)})
        for host, port in self._listen:
            server = await self.loop.create_server(
                self._wire,
                host,
                port,
                ssl=self._tls,
                # Before that nobody is counted as a connection.
                ssl_handshake_timeout=_PREFACE_S if self._tls is not None else None,
            )
            self._servers.append(server)
            log.info("The server is listening.", **{fields.ADDRESS: f"{host}:{port}"})

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for wire in tuple(self._wires):
            wire.say_goodbye()
        running = [task for wire in tuple(self._wires) for task in wire.stop_calls()]
        if running:
            await asyncio.wait(running, timeout=_GRACE_S)
        for wire in tuple(self._wires):
            wire.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await self._empty.wait()
        for wire in tuple(self._wires):
            wire.abort()
        if self._tasks is not None:
            await self._tasks.__aexit__(None, None, None)
        if self._socket is not None:
            with contextlib.suppress(FileNotFoundError):
                status = self._socket.stat()
                if (status.st_dev, status.st_ino) == self._inode:
                    self._socket.unlink()

    # ---- for connections

    def _wire(self) -> _Wire:
        return _Wire(self)

    def admit(self, wire: _Wire) -> bool:
        if len(self._wires) >= _MAX_CONNECTIONS:
            log.warning(
                "Too many connections: one was refused.", **{fields.COUNT: _MAX_CONNECTIONS}
            )
            return False
        self._wires.add(wire)
        self._empty.clear()
        return True

    def forget(self, wire: _Wire) -> None:
        self._wires.discard(wire)
        if not self._wires:
            self._empty.set()

    def handler(self, path: str) -> Handler:
        """Raises RpcFailure for a method that is not served."""
        found = self._handlers.get(path)
        if found is None:
            raise RpcFailure(Status.UNIMPLEMENTED, f"{path[:200]} is not served here")
        return found

    def spawn(self, work: Coroutine[Any, Any, None], path: str) -> asyncio.Task[None]:
        assert self._tasks is not None, "not started"
        self.calls_total += 1
        return spawn(self._tasks, work, path)


def _timeout_s(metadata: Mapping[str, str]) -> float | None:
    """The call's deadline in seconds; an unreadable one is none."""
    text = metadata.get("grpc-timeout", "")
    if len(text) < 2 or len(text) > 9 or not text[:-1].isdecimal() or text[-1] not in _UNITS:
        return None
    return int(text[:-1]) * _UNITS[text[-1]]


def _peer_address(transport: asyncio.Transport) -> str:
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix"


def _common_name(transport: asyncio.Transport) -> str:
    certificate = transport.get_extra_info("peercert") or {}
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""
