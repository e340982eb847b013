"""One server connection of gRPC over HTTP/2, without input and output.

    bytes ──▶ receive() ──▶ events            CallBegan, MessageArrived, HalfClosed, CallEnded,
                                              WindowOpened, Closed
    take() ◀── send_headers(), send_trailers(), frames()

h2 keeps the state of streams and windows and makes every frame but DATA. Those are made here, many
at a time: `frames()` wraps as much of a payload as both windows allow and books it with h2.

What a client may do is bounded: calls at a time, bytes of a request, headers, and per second what
costs us more than it costs the client (resets, pings, settings, empty frames). Who goes too far is
told ENHANCE_YOUR_CALM and disconnected.

Sources: RFC 9113 (HTTP/2), and "gRPC over HTTP2" of the gRPC project (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import contextlib
import enum
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.events import (
    Event as H2Event,
)
from h2.exceptions import H2Error, NoSuchStreamError, ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings

PREFIX: Final = struct.Struct(">BI")  # compressed flag, length
_FRAME_HEADER: Final = struct.Struct(">HBBBI")  # length in 3 bytes, type, flags, stream
_DATA: Final = 0
_GOAWAY: Final = 7
# Below this a DATA frame is more header and work than payload: wait for a wider window.
_SMALL_WINDOW: Final = 1024
# RFC 9113 section 6.5.2
_DEFAULT_WINDOW: Final = 65535
_HEADER_TABLE: Final = 4096


class Status(enum.IntEnum):
    """gRPC status codes (google.rpc.Code)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class RpcFailure(Exception):
    """Ends a call with a status other than OK."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask for. Rates are a second's; bursts are ten seconds' worth."""

    calls: int = 100
    header_bytes: int = 16 << 10
    message_bytes: int = 1 << 20
    messages_queued: int = 16
    control_frames_per_s: float = 100.0
    resets_per_s: float = 20.0


# ---- events


@dataclass(frozen=True, slots=True)
class CallBegan:
    stream: int
    path: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MessageArrived:
    stream: int
    message: bytes


@dataclass(frozen=True, slots=True)
class HalfClosed:
    """The client will send no more on this call."""

    stream: int


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The client cancelled, or was refused: nothing may be sent on this stream any more."""

    stream: int


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """More may be sent; on every stream, when `stream` is 0."""

    stream: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over. Write what `take()` gives, then close."""

    reason: str


Event = CallBegan | MessageArrived | HalfClosed | CallEnded | WindowOpened | Closed


@dataclass(slots=True)
class _Bucket:
    """Allows `rate` a second, and ten seconds' worth at once."""

    rate: float
    level: float = 0.0
    at: float | None = None

    def take(self, now: float, cost: float = 1.0) -> bool:
        if self.at is not None:
            self.level = max(0.0, self.level - (now - self.at) * self.rate)
        self.at = now
        self.level += cost
        return self.level <= self.rate * 10


@dataclass(slots=True)
class _Incoming:
    """The request half of a call."""

    buffer: bytearray = field(default_factory=bytearray)
    headers_sent: bool = False


def frame_message(message: bytes) -> bytes:
    """The message with the five bytes in front that make it one of a gRPC stream."""
    return PREFIX.pack(0, len(message)) + message


class Connection:
    """The server's side of one connection. Times are monotonic seconds."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits: Final = limits or Limits()
        self._h2 = H2Connection(
            H2Configuration(
                client_side=False, header_encoding="utf-8", validate_inbound_headers=True
            )
        )
        # Not updated but made with them: the first SETTINGS frame says only what holds already.
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: self.limits.calls,
                SettingCodes.MAX_HEADER_LIST_SIZE: self.limits.header_bytes,
                SettingCodes.ENABLE_PUSH: 0,
            },
        )
        self._h2.decoder.max_header_list_size = self.limits.header_bytes
        self._calls: dict[int, _Incoming] = {}
        self._control = _Bucket(self.limits.control_frames_per_s)
        self._resets = _Bucket(self.limits.resets_per_s)
        self._closed = False
        self._goodbye = b""
        self._h2.initiate_connection()

    # ---- receiving

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def open_calls(self) -> int:
        return len(self._calls)

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What the client sent. Never raises: a client at fault is disconnected."""
        if self._closed:
            return []
        out: list[Event] = []
        try:
            for event in self._h2.receive_data(data):
                self._on(event, now, out)
                if self._closed:
                    break
        except (H2Error, UnicodeError, ValueError) as error:
            self._close(out, f"protocol error: {error}", getattr(error, "error_code", None))
        return out

    def _on(self, event: H2Event, now: float, out: list[Event]) -> None:
        match event:
            case RequestReceived():
                self._begin(event, out)
            case DataReceived():
                if not event.data and event.stream_ended is None:
                    self._count(self._control, now, out, "empty DATA frames")
                self._data(event, out)
            case StreamEnded():
                call = self._calls.get(_stream(event))
                if call is not None:
                    if call.buffer:
                        self.fail(
                            _stream(event), Status.INTERNAL, "the request ends inside a message"
                        )
                        out.append(CallEnded(_stream(event)))
                    else:
                        out.append(HalfClosed(_stream(event)))
            case StreamReset():
                if self._calls.pop(_stream(event), None) is not None:
                    out.append(CallEnded(_stream(event)))
                if event.remote_reset:
                    self._count(self._resets, now, out, "cancelled calls")
            case WindowUpdated():
                self._count(self._control, now, out, "window updates", 0.01)
                out.append(WindowOpened(event.stream_id or 0))
            case RemoteSettingsChanged():
                self._count(self._control, now, out, "SETTINGS")
                # The client's word is how large it may be (RFC 7541 section 4.2), and it would be
                # searched for each header of ours.
                encoder = self._h2.encoder
                encoder.header_table_size = min(encoder.header_table_size, _HEADER_TABLE)
                out.append(WindowOpened(0))
            case PingReceived() | PriorityUpdated():
                self._count(self._control, now, out, "PING or PRIORITY frames")
            case ConnectionTerminated():
                # The client starts no more calls; those that are open may end.
                if not self._calls:
                    self._close(out, "the client said goodbye", ErrorCodes.NO_ERROR)
            case _:
                pass

    def _count(
        self, bucket: _Bucket, now: float, out: list[Event], what: str, cost: float = 1.0
    ) -> None:
        if not bucket.take(now, cost):
            self._close(out, f"too many {what}", ErrorCodes.ENHANCE_YOUR_CALM)

    def _close(self, out: list[Event], reason: str, code: Any) -> None:
        if self._closed:
            return
        self._closed = True
        if code is not None:
            with contextlib.suppress(ProtocolError):  # it is closed already, and h2 has said so
                self._h2.close_connection(code)
        out.extend(CallEnded(stream) for stream in self._calls)
        self._calls.clear()
        out.append(Closed(reason))

    def _begin(self, event: RequestReceived, out: list[Event]) -> None:
        stream = _stream(event)
        method = path = content_type = ""
        metadata: dict[str, str] = {}
        for raw_name, raw_value in event.headers or ():
            name, value = _text(raw_name), _text(raw_value)
            if name == ":method":
                method = value
            elif name == ":path":
                path = value
            elif name == "content-type":
                content_type = value
            elif not name.startswith(":"):
                metadata[name] = f"{metadata[name]},{value}" if name in metadata else value
        self._calls[stream] = _Incoming()
        if method != "POST":
            self._refuse(stream, "405", Status.UNIMPLEMENTED, "gRPC calls are POST requests", out)
        elif not (
            content_type == "application/grpc"
            or content_type.startswith(("application/grpc+proto", "application/grpc;"))
        ):
            self._refuse(stream, "415", Status.UNKNOWN, "this server speaks gRPC only", out)
        elif metadata.get("grpc-encoding", "identity") != "identity":
            self._refuse(
                stream, "200", Status.UNIMPLEMENTED, "compressed requests are not supported", out,
                (("grpc-accept-encoding", "identity"),),
            )  # fmt: skip
        else:
            out.append(CallBegan(stream, path, metadata))

    def _data(self, event: DataReceived, out: list[Event]) -> None:
        stream = _stream(event)
        with contextlib.suppress(StreamClosedError, NoSuchStreamError):
            self._h2.acknowledge_received_data(event.flow_controlled_length or 0, stream)
        call = self._calls.get(stream)
        if call is None:
            return
        buffer = call.buffer
        buffer += event.data or b""
        while len(buffer) >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(buffer)
            if compressed:
                self.fail(stream, Status.UNIMPLEMENTED, "compressed requests are not supported")
                out.append(CallEnded(stream))
                return
            if length > self.limits.message_bytes:
                self.fail(
                    stream,
                    Status.RESOURCE_EXHAUSTED,
                    f"a request of {length} bytes; the limit is {self.limits.message_bytes}",
                )
                out.append(CallEnded(stream))
                return
            if len(buffer) < PREFIX.size + length:
                return
            message = bytes(buffer[PREFIX.size : PREFIX.size + length])
            del buffer[: PREFIX.size + length]
            out.append(MessageArrived(stream, message))

    # ---- sending

    def is_open(self, stream: int) -> bool:
        return stream in self._calls

    def send_headers(self, stream: int, metadata: Iterable[tuple[str, str]] = ()) -> None:
        """Begin the response; once a call, and only while `is_open`."""
        call = self._calls[stream]
        if call.headers_sent:
            return
        call.headers_sent = True
        self._h2.send_headers(
            stream, [(":status", "200"), ("content-type", "application/grpc"), *metadata]
        )

    def send_trailers(
        self,
        stream: int,
        status: Status,
        message: str = "",
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        """End the call. Without headers before it, one block says both ("Trailers-Only")."""
        call = self._calls.pop(stream, None)
        if call is None:
            return
        trailers = [("grpc-status", str(int(status)))]
        if message:
            trailers.append(
                ("grpc-message", quote(message[:1024], safe=" !\"#$&'()*+,/:;<=>?@[]{}|~"))
            )
        trailers += metadata
        if not call.headers_sent:
            trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
        self._h2.send_headers(stream, trailers, end_stream=True)
        self._forget_request(stream)

    def fail(self, stream: int, status: Status, message: str) -> None:
        self.send_trailers(stream, status, message)

    def _refuse(
        self,
        stream: int,
        http: str,
        status: Status,
        message: str,
        out: list[Event],
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Answer what is no call of ours."""
        del self._calls[stream]
        self._h2.send_headers(
            stream,
            [
                (":status", http),
                ("content-type", "application/grpc"),
                ("grpc-status", str(int(status))),
                ("grpc-message", quote(message)),
                *metadata,
            ],
            end_stream=True,
        )
        self._forget_request(stream)

    def _forget_request(self, stream: int) -> None:
        """The answer is complete: what the client may still send is of no interest."""
        with contextlib.suppress(KeyError, ProtocolError):
            if not self._h2.streams[stream].closed:
                self._h2.reset_stream(stream, ErrorCodes.NO_ERROR)

    def window(self, stream: int) -> int:
        """Bytes of payload that may be sent now; 0 also while sending would be a waste."""
        h2 = self._h2
        if stream not in self._calls:
            return 0
        window = min(
            h2.outbound_flow_control_window, h2.streams[stream].outbound_flow_control_window
        )
        return max(0, window)

    def frames(self, stream: int, payload: memoryview) -> tuple[bytes, int]:
        """DATA frames with as much of the payload as may go, and how much that is.

        (b"", 0) when the client has to open its window first. What `take()` holds must be written
        before.
        """
        window = self.window(stream)
        total = min(len(payload), window)
        if total < len(payload) and total < min(_SMALL_WINDOW, self._widest_window() // 2):
            return b"", 0
        size = self._h2.max_outbound_frame_size
        if total <= size:
            parts: list[bytes | memoryview] = [_frame_header(total, stream), payload[:total]]
        else:
            whole = _frame_header(size, stream)
            parts = []
            for start in range(0, total - size + 1, size):
                parts.append(whole)
                parts.append(payload[start : start + size])
            if rest := total % size:
                parts.append(_frame_header(rest, stream))
                parts.append(payload[total - rest : total])
        self._h2.outbound_flow_control_window -= total
        self._h2.streams[stream].outbound_flow_control_window -= total
        return b"".join(parts), total

    def _widest_window(self) -> int:
        """As wide as the client's windows are when nothing is outstanding, at least."""
        return min(_DEFAULT_WINDOW, self._h2.remote_settings.initial_window_size)

    def ping(self) -> None:
        self._h2.ping(b"\0" * 8)

    def say_goodbye(self) -> None:
        """No new calls; open ones go on (h2 itself can only end both)."""
        if not self._closed:
            last = self._h2.highest_inbound_stream_id
            self._goodbye = _FRAME_HEADER.pack(0, 8, _GOAWAY, 0, 0) + struct.pack(">II", last, 0)

    def take(self) -> bytes:
        """What is to be written now."""
        goodbye, self._goodbye = self._goodbye, b""
        return self._h2.data_to_send() + goodbye


def _frame_header(length: int, stream: int) -> bytes:
    return _FRAME_HEADER.pack(length >> 8, length & 0xFF, _DATA, 0, stream)


def _stream(event: Any) -> int:
    stream: int = event.stream_id
    return stream


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
