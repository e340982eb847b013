"""The connection as a dialogue: a client made of h2 on one side, no sockets in between."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.flows.http2.connection import (
    CallBegan,
    CallEnded,
    Closed,
    Connection,
    HalfClosed,
    Limits,
    MessageArrived,
    Status,
    WindowOpened,
    frame_message,
)

REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "localhost"),
    (":path", "/observer.Observer/GetFlows"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
LIMITS = Limits(calls=4, header_bytes=4096, message_bytes=1000)


class Pair:
    def __init__(self, limits: Limits = LIMITS, **client_settings: int) -> None:
        self.server = Connection(limits)
        self.client = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        )
        self.now = 0.0
        self.client.initiate_connection()
        if client_settings:
            self.client.update_settings(
                {getattr(h2.settings.SettingCodes, k): v for k, v in client_settings.items()}
            )
        self.exchange()

    def exchange(self) -> tuple[list[object], list[object]]:
        """What the server, and what the client was told, until both are silent."""
        at_server: list[object] = []
        at_client: list[object] = []
        while True:
            up, down = self.client.data_to_send(), self.server.take()
            if not up and not down:
                return at_server, at_client
            if up:
                at_server += self.server.receive(up, self.now)
            if down:
                at_client += self.client.receive_data(down)

    def call(self, headers: list[tuple[str, str]] = REQUEST, message: bytes = b"hi") -> int:
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, headers)
        self.client.send_data(stream, frame_message(message), end_stream=True)
        return stream


def _fields(events: list[object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            found |= dict(event.headers or ())  # type: ignore[arg-type]
    return found


def test_a_call_and_its_answer() -> None:
    pair = Pair()
    stream = pair.call([*REQUEST, ("x-who", "me")])
    began, message, end = pair.exchange()[0]
    assert isinstance(began, CallBegan)
    assert (began.path, began.metadata["x-who"]) == ("/observer.Observer/GetFlows", "me")
    assert message == MessageArrived(stream, b"hi")
    assert end == HalfClosed(stream)

    pair.server.send_headers(stream, [("hubble-server-version", "1.0.0")])
    payload = b"".join(frame_message(bytes([i]) * 500) for i in range(100))
    at_client = pair.exchange()[1]
    frames, taken = pair.server.frames(stream, memoryview(payload))
    assert taken == len(payload)
    at_client += pair.client.receive_data(frames)
    pair.server.send_trailers(stream, Status.OK)
    at_client += pair.exchange()[1]
    data = b"".join(e.data for e in at_client if isinstance(e, h2.events.DataReceived))
    assert data == payload
    assert max(len(e.data) for e in at_client if isinstance(e, h2.events.DataReceived)) == 16384
    fields = _fields(at_client)
    assert fields["hubble-server-version"] == "1.0.0"
    assert fields["grpc-status"] == "0"
    assert pair.server.open_calls == 0


def test_the_client_is_told_the_bounds() -> None:
    pair = Pair()
    assert pair.client.remote_settings.max_concurrent_streams == 4
    assert pair.client.remote_settings.max_header_list_size == 4096


def test_windows_are_kept() -> None:
    pair = Pair(INITIAL_WINDOW_SIZE=20_000)
    stream = pair.call()
    pair.exchange()
    pair.server.send_headers(stream)
    pair.exchange()
    payload = memoryview(bytes(100_000))
    frames, taken = pair.server.frames(stream, payload)
    assert taken == 20_000
    pair.client.receive_data(frames)
    assert pair.server.frames(stream, payload[taken:]) == (b"", 0)
    pair.client.increment_flow_control_window(200_000, stream)
    assert pair.exchange()[0] == [WindowOpened(stream)]
    frames, more = pair.server.frames(stream, payload[taken:])
    assert more == 65_535 - 20_000  # now it is the connection's
    pair.client.receive_data(frames)
    pair.client.increment_flow_control_window(100_000)
    assert pair.exchange()[0] == [WindowOpened(0)]
    frames, rest = pair.server.frames(stream, payload[taken + more :])
    assert taken + more + rest == 100_000
    pair.client.receive_data(frames)


def test_a_dribbling_window_waits_for_a_useful_one() -> None:
    pair = Pair(INITIAL_WINDOW_SIZE=0)
    stream = pair.call()
    pair.exchange()
    pair.server.send_headers(stream)
    pair.client.increment_flow_control_window(5, stream)
    pair.exchange()
    # A whole small message fits, however small the window; a piece of a large one is not worth it.
    assert pair.server.frames(stream, memoryview(b"12345"))[1] == 5
    pair.client.increment_flow_control_window(70_000, stream)
    pair.exchange()
    assert pair.server.frames(stream, memoryview(bytes(65_000)))[1] == 65_000


def test_errors_travel_readably() -> None:
    pair = Pair()
    stream = pair.call()
    pair.exchange()
    pair.server.send_trailers(stream, Status.INVALID_ARGUMENT, "bad: 100% ü\nline")
    fields = _fields(pair.exchange()[1])
    assert fields["grpc-status"] == "3"
    assert fields["grpc-message"] == "bad: 100%25 %C3%BC%0Aline"


@pytest.mark.parametrize(
    ("change", "http", "grpc"),
    [
        ((":method", "GET"), "405", "12"),
        (("content-type", "text/html"), "415", "2"),
        (("grpc-encoding", "gzip"), "200", "12"),
    ],
)
def test_what_is_no_call_is_answered(change: tuple[str, str], http: str, grpc: str) -> None:
    pair = Pair()
    headers = [h for h in REQUEST if h[0] != change[0]]
    pair.call(sorted([*headers, change], key=lambda h: not h[0].startswith(":")))
    at_server, at_client = pair.exchange()
    assert not any(isinstance(e, CallBegan | MessageArrived) for e in at_server)
    assert _fields(at_client)[":status"] == http
    assert _fields(at_client)["grpc-status"] == grpc
    assert pair.server.open_calls == 0


def test_a_request_that_is_too_large() -> None:
    pair = Pair()
    stream = pair.call(message=bytes(1001))
    at_server, at_client = pair.exchange()
    assert CallEnded(stream) in at_server
    assert _fields(at_client)["grpc-status"] == "8"
    pair.call()
    assert any(isinstance(e, CallBegan) for e in pair.exchange()[0])


def test_a_request_that_ends_inside_a_message() -> None:
    pair = Pair()
    stream = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream, REQUEST)
    pair.client.send_data(stream, frame_message(b"whole")[:-1], end_stream=True)
    at_server, at_client = pair.exchange()
    assert CallEnded(stream) in at_server
    assert _fields(at_client)["grpc-status"] == "13"


def test_large_headers_end_the_connection() -> None:
    pair = Pair()
    pair.call([*REQUEST, ("x", "y" * 5000)])
    at_server = pair.exchange()[0]
    assert isinstance(at_server[-1], Closed)
    assert pair.server.closed


def test_more_calls_than_allowed_are_refused() -> None:
    pair = Pair()
    for _ in range(4):
        pair.call()
    pair.exchange()
    # A client that ignores the setting.
    pair.client.remote_settings.update({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 99})
    pair.client.remote_settings.acknowledge()
    pair.call()
    assert isinstance(pair.exchange()[0][-1], Closed)


def test_a_flood_of_resets_is_calmed() -> None:
    pair = Pair()
    done = 0
    while done < 1000 and not pair.server.closed:
        pair.client.reset_stream(pair.call())
        pair.exchange()
        done += 1
    assert done == 201  # more than ten seconds' worth


def test_a_client_does_not_size_our_memory_of_headers() -> None:
    """It may allow us a table of 4 GiB; each answer is another one, and searched for."""
    pair = Pair(HEADER_TABLE_SIZE=(1 << 32) - 1)
    for number in range(200):
        stream = pair.call()
        pair.exchange()
        pair.server.fail(stream, Status.UNIMPLEMENTED, f"{number:0200} is not served here")
        assert _fields(pair.exchange()[1])["grpc-status"] == "12"
    table = pair.server._h2.encoder.header_table
    assert sum(32 + len(name) + len(value) for name, value in table.dynamic_entries) <= 4096


def test_cancelling_now_and_then_is_fine() -> None:
    pair = Pair()
    for _ in range(1000):
        stream = pair.call()
        pair.client.reset_stream(stream)
        assert CallEnded(stream) in pair.exchange()[0]
        pair.now += 0.1
    assert not pair.server.closed


def test_a_flood_of_pings_is_calmed() -> None:
    pair = Pair()
    for _ in range(1100):
        pair.client.ping(b"12345678")
        pair.server.receive(pair.client.data_to_send(), pair.now)
    assert pair.server.closed


def test_goodbye_lets_open_calls_end() -> None:
    pair = Pair()
    stream = pair.call()
    pair.exchange()
    pair.server.send_headers(stream)
    pair.server.say_goodbye()
    at_client = pair.exchange()[1]
    assert any(isinstance(e, h2.events.ConnectionTerminated) for e in at_client)
    assert pair.server.frames(stream, memoryview(frame_message(b"last")))[1] == 9
    pair.server.send_trailers(stream, Status.OK)
    assert pair.server.open_calls == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8), st.booleans())
def test_no_bytes_crash_it(chunks: list[bytes], preface: bool) -> None:
    server = Connection(LIMITS)
    if preface:
        client = h2.connection.H2Connection()
        client.initiate_connection()
        server.receive(client.data_to_send(), 0.0)
    for chunk in chunks:
        server.receive(chunk, 0.0)
        server.take()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 255), st.randoms(use_true_random=False))
def test_damaged_requests_crash_nothing(at: int, byte: int, random: object) -> None:
    pair = Pair()
    pair.call(message=b"x" * 100)
    data = bytearray(pair.client.data_to_send())
    data[at % len(data)] = byte
    pair.server.receive(bytes(data), 0.0)
    pair.server.take()
