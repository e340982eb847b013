"""The server on real sockets: grpcio is the well-behaved client, raw ones are the other kind."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cilia.errors import DomainError, Kind
from services.flows.http2 import Call, GrpcServer, RpcFailure, Status, frame_message
from services.flows.http2.client import Channel

PATH = "/test.Test/"


async def echo(call: Call) -> None:
    await call.send(await call.message())


async def count(call: Call) -> None:
    """So many messages, each of 100 bytes, thousands at a time."""
    number = int(await call.message())
    message = frame_message(bytes(100))
    for start in range(0, number, 2048):
        await call.send_framed(message * min(2048, number - start))


async def quiet(call: Call) -> None:
    await call.start()
    await asyncio.Event().wait()


async def upper(call: Call) -> None:
    async for message in call.messages():
        await call.send(message.upper())


async def refuse(call: Call) -> None:
    raise RpcFailure(Status.INVALID_ARGUMENT, "no such thing: 100 %")


async def refuse_domain(call: Call) -> None:
    raise DomainError("nothing here", kind=Kind.NOT_FOUND, cure="Look elsewhere")


async def crash(call: Call) -> None:
    raise ZeroDivisionError


HANDLERS = {
    PATH + handler.__name__: handler
    for handler in (echo, count, quiet, upper, refuse, refuse_domain, crash)
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(
        HANDLERS,
        socket=tmp_path / "s.sock",
        listen=[("127.0.0.1", 0)],
        headers=[("hubble-server-version", "0.1.0")],
        group=None,
    )
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: GrpcServer, tmp_path: Path) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        yield channel


async def test_unary(channel: Any) -> None:
    call = channel.unary_unary(PATH + "echo")(b"hello")
    assert await call == b"hello"
    metadata = await call.initial_metadata()
    assert metadata is not None
    assert dict(metadata)["hubble-server-version"] == "0.1.0"


async def test_a_long_stream_arrives_whole(channel: Any) -> None:
    sizes = [len(m) async for m in channel.unary_stream(PATH + "count")(b"30000")]
    assert sizes == [100] * 30000


async def test_both_ways(channel: Any) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for word in (b"a", b"bc", b""):
            yield word

    answers = [m async for m in channel.stream_stream(PATH + "upper")(requests())]
    assert answers == [b"A", b"BC", b""]


@pytest.mark.parametrize(
    ("method", "code", "details"),
    [
        ("refuse", grpc.StatusCode.INVALID_ARGUMENT, "no such thing: 100 %"),
        ("refuse_domain", grpc.StatusCode.NOT_FOUND, "nothing here. Look elsewhere"),
        ("crash", grpc.StatusCode.INTERNAL, "the server failed; its log says how"),
        ("absent", grpc.StatusCode.UNIMPLEMENTED, "/test.Test/absent is not served here"),
    ],
)
async def test_errors(channel: Any, method: str, code: grpc.StatusCode, details: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(PATH + method)(b"")
    assert (caught.value.code(), caught.value.details()) == (code, details)


async def test_a_quiet_stream_sends_its_headers_and_can_be_cancelled(
    server: GrpcServer, channel: Any
) -> None:
    call = channel.unary_stream(PATH + "quiet")(b"")
    metadata = await call.initial_metadata()
    assert metadata is not None
    assert dict(metadata)["hubble-server-version"] == "0.1.0"
    call.cancel()
    assert await channel.unary_unary(PATH + "echo")(b"on") == b"on"


async def test_the_deadline_is_the_servers_too(channel: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.unary_stream(PATH + "quiet")(b"", timeout=0.2):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_stopping_ends_calls_and_removes_the_socket(tmp_path: Path) -> None:
    server = GrpcServer(HANDLERS, socket=tmp_path / "t.sock", group=None)
    await server.start()
    channel: Any
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/t.sock") as channel:
        call = channel.unary_stream(PATH + "quiet")(b"")
        await call.initial_metadata()
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not (tmp_path / "t.sock").exists()


async def test_our_own_client_reads_more_than_a_window(server: GrpcServer, tmp_path: Path) -> None:
    channel = await Channel.connect(f"unix://{tmp_path}/s.sock")
    count = 100_000
    got = 0
    async with asyncio.timeout(20):
        async for messages in channel.call(PATH + "count", str(count).encode()):
            got += len(messages)
            assert {len(message) for message in messages} == {100}
    assert got == count
    assert await channel.unary(PATH + "echo", b"still there") == b"still there"
    with pytest.raises(RpcFailure, match="no such thing"):
        await channel.unary(PATH + "refuse", b"")
    channel.close()


# ---- TLS


def _certificate(
    name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


async def test_mutual_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.flows.http2.server._PREFACE_S", 1.0)
    authority = _certificate("authority")
    ca, _ = _pem(*authority)
    own, own_key = _pem(*_certificate("node.default.hubble-grpc.cilium.io", authority))
    theirs, their_key = _pem(*_certificate("relay", authority))
    (tmp_path / "own.pem").write_bytes(own + own_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    context.load_verify_locations(cadata=ca.decode())
    context.verify_mode = ssl.CERT_REQUIRED

    async def who(call: Call) -> None:
        await call.message()
        await call.send(call.peer.tls_name.encode())

    server = GrpcServer(
        {PATH + "who": who, PATH + "count": count}, listen=[("127.0.0.1", 0)], tls=context
    )
    await server.start()
    try:
        target = f"127.0.0.1:{server.ports[0]}"
        options = [("grpc.ssl_target_name_override", "node.default.hubble-grpc.cilium.io")]
        channel: Any
        mutual = grpc.ssl_channel_credentials(ca, their_key, theirs)
        async with grpc.aio.secure_channel(target, mutual, options) as channel:
            assert await channel.unary_unary(PATH + "who")(b"") == b"relay"
            sizes = [len(m) async for m in channel.unary_stream(PATH + "count")(b"5000")]
            assert sizes == [100] * 5000
        async with grpc.aio.secure_channel(
            target, grpc.ssl_channel_credentials(ca), options
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(PATH + "who")(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # Who says nothing is nobody yet, and is not waited for.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports[0])
        async with asyncio.timeout(10):
            assert not await reader.read()
        writer.close()
    finally:
        await server.stop()


# ---- clients of the other kind


class RawClient:
    """Speaks HTTP/2 through h2, and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        )
        self.h2.initiate_connection()

    def call(self, method: str, message: bytes = b"") -> int:
        stream = self.h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", PATH + method),
            ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        self.h2.send_headers(stream, headers)
        self.h2.send_data(stream, frame_message(message), end_stream=True)
        return stream

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def events(self) -> list[h2.events.Event]:
        async with asyncio.timeout(5):
            data = await self.reader.read(1 << 16)
        if not data:
            raise EOFError
        found = self.h2.receive_data(data)
        await self.flush()
        return found


Dial = Callable[[], Awaitable[RawClient]]


@pytest.fixture
async def dial(server: GrpcServer, tmp_path: Path) -> AsyncIterator[Dial]:
    clients: list[RawClient] = []

    async def connect() -> RawClient:
        client = RawClient(*await asyncio.open_unix_connection(str(tmp_path / "s.sock")))
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.writer.close()


async def test_a_client_without_a_window_holds_nothing_up(
    server: GrpcServer, dial: Dial, channel: Any
) -> None:
    raw = await dial()
    raw.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    stream = raw.call("count", b"1000")
    await raw.flush()
    seen: list[h2.events.Event] = []
    while not any(isinstance(e, h2.events.ResponseReceived) for e in seen):
        seen += await raw.events()
    assert await channel.unary_unary(PATH + "echo")(b"served") == b"served"
    assert not any(isinstance(e, h2.events.DataReceived) for e in seen)
    raw.h2.increment_flow_control_window(1 << 20, stream)
    raw.h2.increment_flow_control_window(1 << 20)
    await raw.flush()
    length = 0
    while not any(isinstance(e, h2.events.StreamEnded) for e in seen):
        seen = await raw.events()
        length += sum(len(e.data) for e in seen if isinstance(e, h2.events.DataReceived))
    assert length == 1000 * 105


async def test_a_client_that_never_reads_costs_no_memory(
    server: GrpcServer, dial: Dial, channel: Any
) -> None:
    raw = await dial()
    raw.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
    raw.h2.increment_flow_control_window((1 << 31) - 1 - 65535)
    raw.call("count", b"100000000")
    await raw.flush()
    for _ in range(20):
        assert await channel.unary_unary(PATH + "echo")(b"served") == b"served"
    held = [w._transport.get_write_buffer_size() for w in server._wires if w._transport]
    assert max(held) < 2 << 20


async def test_a_flood_of_resets_is_cut_off(server: GrpcServer, dial: Dial, channel: Any) -> None:
    raw = await dial()

    async def flood() -> None:
        for _ in range(20000):
            raw.h2.reset_stream(raw.call("quiet"))
            await raw.flush()

    with pytest.raises(ConnectionError):
        await flood()
    assert server.calls_total < 1000
    assert await channel.unary_unary(PATH + "echo")(b"served") == b"served"


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\0" * 64, b"\xff" * 9])
async def test_what_is_not_http2_is_disconnected(
    server: GrpcServer, tmp_path: Path, noise: bytes
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s.sock"))
    writer.write(noise)
    async with asyncio.timeout(5):
        await reader.read(-1)
    writer.close()


async def test_pings_without_reading_do_not_pile_up(dial: Dial, channel: Any) -> None:
    raw = await dial()
    with contextlib.suppress(ConnectionError):
        for _ in range(5000):
            raw.h2.ping(b"12345678")
        await raw.flush()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            await raw.events()
    assert await channel.unary_unary(PATH + "echo")(b"served") == b"served"
