"""The other side: calls that hand over the messages of a read as one batch, undecoded.

A peer of ours sends DATA frames of up to a mebibyte to a client that allows them, so a batch is
thousands of flows. Windows are opened as batches are consumed: who reads slowly is sent slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings

from services.flows.http2.connection import PREFIX, RpcFailure, Status, frame_message

_WINDOW_BYTES: Final = 4 << 20
_FRAME_BYTES: Final = 1 << 20
_MAX_MESSAGE_BYTES: Final = 4 << 20
_HEADER_BYTES: Final = 64 << 10


class Response:
    """What a call answers: batches of whole messages, then the end or an RpcFailure."""

    def __init__(self, channel: Channel, stream: int) -> None:
        self.headers: dict[str, str] = {}
        self.began = asyncio.Event()
        self._channel = channel
        self._stream = stream
        self._buffer = bytearray()
        self._batches: deque[tuple[list[bytes], int]] = deque()
        self._arrived = asyncio.Event()
        self._failure: RpcFailure | None = None
        self._ended = False

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        return self._read()

    async def _read(self) -> AsyncIterator[list[bytes]]:
        while True:
            while self._batches:
                messages, length = self._batches.popleft()
                self._channel.consumed(self._stream, length)
                if messages:
                    yield messages
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def cancel(self) -> None:
        self._channel.cancel(self._stream)

    # ---- for the channel

    def on_headers(self, headers: Iterable[tuple[Any, Any]]) -> None:
        self.headers |= {_text(name): _text(value) for name, value in headers}
        self.began.set()

    def on_data(self, data: bytes, length: int) -> None:
        buffer = self._buffer
        buffer += data
        messages = []
        at = 0
        while len(buffer) - at >= PREFIX.size:
            compressed, size = PREFIX.unpack_from(buffer, at)
            if compressed or size > _MAX_MESSAGE_BYTES:
                self.fail(Status.INTERNAL, "the peer sent a message that cannot be read")
                return
            if len(buffer) - at - PREFIX.size < size:
                break
            messages.append(bytes(buffer[at + PREFIX.size : at + PREFIX.size + size]))
            at += PREFIX.size + size
        del buffer[:at]
        self._batches.append((messages, length))
        self._arrived.set()

    def on_end(self) -> None:
        number = self.headers.get("grpc-status", "")
        if not number.isdigit():
            http = self.headers.get(":status", "no status")
            self.fail(Status.UNKNOWN, f"the peer answered without a gRPC status ({http})")
        elif number != "0":
            message = unquote(self.headers.get("grpc-message", ""))
            known = int(number) in Status.__members__.values()
            self.fail(Status(int(number)) if known else Status.UNKNOWN, message)
        self._ended = True
        self.began.set()
        self._arrived.set()

    def fail(self, status: Status, message: str) -> None:
        if self._failure is None and not self._ended:
            self._failure = RpcFailure(status, message)
        self.began.set()
        self._arrived.set()


class Channel(asyncio.Protocol):
    """One connection to one server. `await Channel.connect(...)`; `close()` when done."""

    def __init__(self) -> None:
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        # Not updated but made with them: the first SETTINGS frame says only what holds already.
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW_BYTES,
                SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_BYTES,
                SettingCodes.ENABLE_PUSH: 0,
            },
        )
        self._h2.max_inbound_frame_size = _FRAME_BYTES
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Response] = {}
        self._authority = "localhost"
        self._scheme = "http"
        self.closed = asyncio.Event()

    @staticmethod
    async def connect(
        target: str,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
        timeout_s: float = 5.0,
    ) -> Channel:
        """To "unix:///path" or "host:port". Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            if target.startswith("unix:"):
                path = target.removeprefix("unix:")
                path = path[2:] if path.startswith("//") else path
                _, channel = await loop.create_unix_connection(Channel, path)
            else:
                host, _, port = target.rpartition(":")
                host = host.strip("[]")
                if tls is not None:
                    tls.set_alpn_protocols(["h2"])
                _, channel = await loop.create_connection(
                    Channel,
                    host,
                    int(port),
                    ssl=tls,
                    server_hostname=(server_name or host) if tls else None,
                )
                channel._authority = target
                channel._scheme = "https" if tls else "http"
        return channel

    def call(self, path: str, request: bytes, metadata: Iterable[tuple[str, str]] = ()) -> Response:
        """Start a call with one request message. Raises RpcFailure when the connection is gone."""
        if self.closed.is_set():
            raise RpcFailure(Status.UNAVAILABLE, "the connection is closed")
        try:
            stream = self._h2.get_next_available_stream_id()
            self._h2.send_headers(
                stream,
                [
                    (":method", "POST"),
                    (":scheme", self._scheme),
                    (":authority", self._authority),
                    (":path", path),
                    ("content-type", "application/grpc"),
                    ("te", "trailers"),
                    *metadata,
                ],
            )
            self._h2.send_data(stream, frame_message(request), end_stream=True)
        except ProtocolError as error:
            raise RpcFailure(
                Status.UNAVAILABLE, f"the peer takes no more calls: {error}"
            ) from error
        response = self._calls[stream] = Response(self, stream)
        self._flush()
        return response

    async def unary(
        self,
        path: str,
        request: bytes,
        *,
        timeout_s: float = 5.0,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> bytes:
        """One message for one. Raises RpcFailure or TimeoutError."""
        response = self.call(path, request, metadata)
        answer = b""
        try:
            async with asyncio.timeout(timeout_s):
                async for messages in response:
                    answer = messages[-1]
        finally:
            response.cancel()
        return answer

    def cancel(self, stream: int) -> None:
        if self._calls.pop(stream, None) is not None and not self.closed.is_set():
            with contextlib.suppress(ProtocolError):
                self._h2.reset_stream(stream, ErrorCodes.CANCEL)
            self._flush()

    def consumed(self, stream: int, length: int) -> None:
        if length and not self.closed.is_set():
            with contextlib.suppress(ProtocolError):
                self._h2.acknowledge_received_data(length, stream)
            self._flush()

    def close(self) -> None:
        if self._transport is not None and not self.closed.is_set():
            with contextlib.suppress(ProtocolError):
                self._h2.close_connection()
            self._flush()
            self._transport.close()

    # ---- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW_BYTES)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._h2.receive_data(data)
        except (H2Error, UnicodeError, ValueError) as error:
            self._fail(f"the peer breaks the protocol: {error}")
            return
        for event in events:
            match event:
                case ResponseReceived() | TrailersReceived():
                    if (call := self._calls.get(event.stream_id or 0)) is not None:
                        call.on_headers(event.headers or ())
                case DataReceived():
                    call = self._calls.get(event.stream_id or 0)
                    if call is None:
                        self.consumed(event.stream_id or 0, event.flow_controlled_length or 0)
                    else:
                        call.on_data(event.data or b"", event.flow_controlled_length or 0)
                case StreamEnded():
                    if (call := self._calls.pop(event.stream_id or 0, None)) is not None:
                        call.on_end()
                case StreamReset():
                    if (call := self._calls.pop(event.stream_id or 0, None)) is not None:
                        call.fail(Status.UNAVAILABLE, "the peer reset the call")
                case ConnectionTerminated():
                    if not self._calls and self._transport is not None:
                        self._transport.close()
                case _:
                    pass
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost{f': {exc}' if exc else ''}")

    def _fail(self, message: str) -> None:
        self.closed.set()
        for call in self._calls.values():
            call.fail(Status.UNAVAILABLE, message)
        self._calls.clear()
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is not None and (data := self._h2.data_to_send()):
            self._transport.write(data)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
