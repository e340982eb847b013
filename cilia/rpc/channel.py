"""Client channels on unix sockets: default deadlines, and errors that say what to do.

    channel = connect(Path("/run/cilia/agent.sock"), service="agent")
    stub = agent_pb2_grpc.EndpointServiceStub(channel)
    try:
        endpoint = await stub.Get(ref)            # default deadline; or timeout=...
    except RpcError as error:
        print(error.message, error.cure)

The channel is a `grpc.aio.Channel` for generated stubs. Its calls raise `RpcError` instead of
`AioRpcError`; a unary call without a timeout gets `deadline_s`, a streaming call none.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from cilia.errors import Kind
from cilia.rpc.errors import DETAILS_KEY, KIND_OF_CODE, RpcError, from_status
from cilia.rpc.server import MAX_MESSAGE_BYTES, listening_pid

DEADLINE_S: Final = 10.0


class Channel:
    """A connection to one service, made on first use and renewed by itself; closed by `close()`."""

    def __init__(
        self,
        socket: Path,
        *,
        service: str,
        deadline_s: float = DEADLINE_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.socket = socket
        self.service = service
        self._deadline_s = deadline_s
        self._channel: Any = grpc.aio.insecure_channel(
            f"unix:{socket}",
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                # A service that restarts is back within a second; grpc would wait up to 2 minutes.
                ("grpc.initial_reconnect_backoff_ms", 100),
                # Despite its name also the least time that one attempt is given: a busy machine
                # may take longer than the first backoff to answer with its SETTINGS.
                ("grpc.min_reconnect_backoff_ms", 5_000),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                # A hung peer is noticed on idle watch streams too.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.use_local_subchannel_pool", 1),
                # Our own authority: a unix path is none, and some servers refuse the default.
                ("grpc.default_authority", "localhost"),
            ],
        )

    # What generated stubs call.

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._unary(method, self._channel.unary_unary(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._unary(method, self._channel.stream_unary(method, *args, **kwargs))

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._stream(method, self._channel.unary_stream(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._stream(method, self._channel.stream_stream(method, *args, **kwargs))

    def _unary(self, method: str, inner: Any) -> Any:
        def call(request: Any = None, timeout: float | None = None, **kwargs: Any) -> _UnaryCall:
            limit_s = self._deadline_s if timeout is None else timeout
            return _UnaryCall(self, method, inner(request, timeout=limit_s, **kwargs))

        return call

    def _stream(self, method: str, inner: Any) -> Any:
        def call(request: Any = None, timeout: float | None = None, **kwargs: Any) -> _StreamCall:
            return _StreamCall(self, method, inner(request, timeout=timeout, **kwargs))

        return call

    async def wait_ready(self) -> None:
        """Returns when the service can be reached; bound it with asyncio.timeout."""
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def start(self) -> None:
        """Nothing to do: the connection is made on first use."""

    async def stop(self) -> None:
        await self.close()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def explain(self, error: grpc.aio.AioRpcError, method: str) -> RpcError:
        """What the failure of a call means to the person who made it."""
        raw: Any = error
        for key, value in raw.trailing_metadata() or ():
            if key == DETAILS_KEY:
                try:
                    return from_status(status_pb2.Status.FromString(value), method)
                except DecodeError:
                    break
        code = raw.code()
        kind = KIND_OF_CODE.get(code, Kind.INTERNAL)
        details = raw.details() or ""
        message = f"{method.rpartition('/')[2]} failed: {details or code.name}"
        cure = ""
        match kind:
            case Kind.UNAVAILABLE:
                message, cure = self._explain_unreachable(details)
            case Kind.DEADLINE:
                message = (
                    f"the {self.service} service did not answer {method.rpartition('/')[2]} in time"
                )
                cure = "It may be busy or stopped: see `cilia status` and its log"
            case Kind.UNIMPLEMENTED:
                message = f"the {self.service} service does not know {method}"
                cure = "It may be of another version: restart it after an upgrade"
            case _:
                pass
        return RpcError(message, kind=kind, method=method, cure=cure)

    def _explain_unreachable(self, details: str) -> tuple[str, str]:
        where = f"the {self.service} service at {self.socket}"
        if not self.socket.exists():
            if not os.access(self.socket.parent, os.X_OK) and self.socket.parent.exists():
                return self._explain_forbidden(where)
            return (
                f"cannot reach {where}: there is no such socket",
                f"Is the {self.service} running?",
            )
        try:
            alive, _ = listening_pid(self.socket)
        except PermissionError:
            return self._explain_forbidden(where)
        except OSError as error:
            return f"cannot reach {where}: {error.strerror}", f"Is the {self.service} running?"
        if not alive:
            return f"cannot reach {where}: nobody listens on it", f"Is the {self.service} running?"
        return f"the connection to {where} broke: {details}", "It may be restarting: try again"

    def _explain_forbidden(self, where: str) -> tuple[str, str]:
        return f"not allowed to connect to {where}", "Use root, or a user of the group cilia"


def connect(socket: Path, *, service: str, deadline_s: float = DEADLINE_S) -> grpc.aio.Channel:
    """A channel for generated stubs; connects on first use. It is a `Channel` (also a lifecycle
    part).
    """
    return cast(grpc.aio.Channel, Channel(socket, service=service, deadline_s=deadline_s))


class _Call:
    """A call under way; everything but awaiting and reading it is the inner call's own."""

    def __init__(self, channel: Channel, method: str, inner: Any) -> None:
        self._channel = channel
        self._method = method
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _UnaryCall(_Call):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        try:
            return await self._inner
        except grpc.aio.AioRpcError as error:
            raise self._channel.explain(error, self._method) from error

    async def write(self, request: Any) -> None:
        await _write(self, request)


class _StreamCall(_Call):
    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for response in self._inner:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._channel.explain(error, self._method) from error

    async def read(self) -> Any:
        """The next message, or grpc.aio.EOF."""
        try:
            return await self._inner.read()
        except grpc.aio.AioRpcError as error:
            raise self._channel.explain(error, self._method) from error

    async def write(self, request: Any) -> None:
        await _write(self, request)


async def _write(call: _Call, request: Any) -> None:
    try:
        await call._inner.write(request)
    except grpc.aio.AioRpcError as error:
        raise call._channel.explain(error, call._method) from error
    except asyncio.InvalidStateError as error:
        # The stream has ended; why, its status says.
        code = await call._inner.code()
        details = await call._inner.details()
        raise RpcError(
            f"{call._method.rpartition('/')[2]} has ended: {details or code.name}",
            kind=KIND_OF_CODE.get(code, Kind.UNAVAILABLE),
            method=call._method,
        ) from error
