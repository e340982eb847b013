"""What a redirect does to the HTTP that is spoken through it, with a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from protos.xds.v1 import xds_pb2 as pb
from services.xds.translate.model import NodeSettings
from tests.integration.certificates import issue
from tests.integration.envoynode import (
    EnvoyNode,
    everything,
    http,
    read_answer,
    redirect,
    until,
)

pytestmark = pytest.mark.usefixtures("need_root", "need_netns", "need_nft")

GET = "GET {} HTTP/1.1\r\nHost: a\r\n\r\n"


def exchange(sock: socket.socket, path: str) -> int:
    """A request on an open connection; its status, 0 when the connection has gone."""
    try:
        sock.sendall(GET.format(path).encode())
        match = re.match(rb"HTTP/1\.1 (\d+)", read_answer(sock))
    except OSError:
        return 0
    return int(match[1]) if match else 0


# ---- rules


async def test_rules_allow_what_they_say_and_the_denial_says_what_it_should() -> None:
    settings = NodeSettings(denied_body="100% no: <ask the empire>")
    async with EnvoyNode("rules", settings) as node:
        backend = node.backend()
        outcome = await node.apply(
            redirect(
                0,
                http(1, method="GET", path="/v1/.*"),
                http(2, method="POST", path="/v1/request-landing"),
                http(3, path="/team", headers=["X-Team: red", "X-Up"]),
            ),
            redirect(1),
            redirect(2, everything(9)),
            redirect(3, http(4, path="/.*"), ingress=[http(5, path="/in")]),
        )
        assert outcome.ok, outcome

        def check() -> None:
            for status, method, path, number, headers in (
                (200, "GET", "/v1/x", 0, ()),
                (200, "POST", "/v1/request-landing", 0, ()),
                (403, "PUT", "/v1/exhaust-port", 0, ()),
                (403, "POST", "/v1/request-landing?now", 0, ()),
                (400, "get", "/v1/x", 0, ()),
                (400, "ODD", "/team", 0, ("x-team: red", "x-up: ")),  # Envoy knows its methods
                (200, "GET", "/team", 0, ("x-team: red", "x-up: ")),
                (403, "GET", "/team", 0, ("x-team: red",)),
                (403, "GET", "/team", 0, ("x-team: blue", "x-up: 1")),
                (403, "GET", "/team", 0, ("x-team: red", "x-team: blue", "x-up: 1")),
                (403, "GET", "/team", 0, ("x-team: blue", "x-team: red", "x-up: 1")),
                (403, "GET", "/team", 0, ("x-team: red,blue", "x-up: 1")),
                (403, "GET", "/team", 0, ("x-team: red", "x_team: blue", "x-up: 1")),
                (403, "GET", "/", 1, ()),
                (200, "PURGE", "/any?thing", 2, ()),
                (200, "GET", "/in", 3, ()),
                (403, "GET", "/out", 3, ()),
            ):
                found = node.status(path, number, *headers, method=method)
                assert found == status, (method, path, number, headers, found)

        await asyncio.to_thread(check)
        assert len(backend.heads) == 5
        answer = await asyncio.to_thread(node.ask, GET.format("/no").encode())
        assert answer.endswith(b"\r\n\r\n100% no: <ask the empire>\r\n")
        assert b"content-type: text/plain" in answer

        # The log says which rule decided, and what was asked.
        records = {
            (r.proxy_port, r.http.method, r.http.path): r
            for r in await node.logged(10, kind=pb.L7Record.REQUEST)
        }
        allowed = records[10_000, "GET", "/v1/x"]
        assert (allowed.verdict, allowed.rule_id, allowed.policy) == (
            pb.L7Record.FORWARDED, 1, "policy 1",
        )  # fmt: skip
        assert allowed.destination.port == 80
        assert socket.inet_ntoa(allowed.destination.address) == "10.9.0.1"
        assert socket.inet_ntoa(allowed.upstream.address) == "10.9.0.1"
        denied = records[10_000, "PUT", "/v1/exhaust-port"]
        assert (denied.verdict, denied.rule_id, denied.http.code) == (pb.L7Record.DENIED, 0, 403)
        assert not denied.HasField("upstream")
        assert records[10_003, "GET", "/in"].rule_id == 5
        (response,) = [
            r
            for r in await node.logged(5, kind=pb.L7Record.RESPONSE)
            if r.http.path == "/any?thing"
        ]
        assert response.http.code == 200
        assert response.http.url == "http://a/any?thing"
        assert response.http.protocol == "HTTP/1.1"
        assert 0 < response.latency_ns < 60e9
        assert node.receiver.counts[10_001].denied == 1
        assert node.receiver.malformed == 0


async def test_a_change_of_rules_is_enforced_on_open_connections_and_breaks_none() -> None:
    async with EnvoyNode("change") as node:
        backend = node.backend()
        keep = http(1, path="/keep")
        await node.apply(redirect(0, keep, http(2, path="/gone")))
        with await asyncio.to_thread(node.connect) as sock:
            assert await asyncio.to_thread(exchange, sock, "/keep") == 200
            assert await asyncio.to_thread(exchange, sock, "/gone") == 200
            for round_ in range(40):
                rules = (keep,) if round_ % 2 == 0 else (keep, http(2, path="/gone"))
                wanted = 403 if round_ % 2 == 0 else 200
                node.put(redirect(0, *rules))
                await asyncio.sleep(0)
                async with asyncio.timeout(10):  # how soon it is, the bench says
                    while await asyncio.to_thread(exchange, sock, "/gone") != wanted:
                        pass
                assert await asyncio.to_thread(exchange, sock, "/keep") == 200
            # A rule set that is emptied, and one that is deleted while it is in use.
            await node.apply(redirect(0))
            assert await asyncio.to_thread(exchange, sock, "/keep") == 403
            await node.apply(redirect(0, keep))
            assert await asyncio.to_thread(exchange, sock, "/keep") == 200
        assert backend.connections == 1  # the server was not connected to anew


async def test_a_redirect_that_goes_lets_nothing_pass() -> None:
    async with EnvoyNode("gone") as node:
        backend = node.backend()
        await node.apply(redirect(0, everything()), redirect(1, everything()))
        with node.connect() as sock:
            assert await asyncio.to_thread(exchange, sock, "/") == 200
            await node.withdraw(10_000)
            await asyncio.sleep(0.2)
            seen = len(backend.heads)
            with pytest.raises(TimeoutError):  # nobody listens, and the rest drops
                await asyncio.to_thread(node.connect, within_s=0.5)
            # Who is connected may still be served by what the rules were, until the drain is over;
            # the datapath cuts him off when it lets go of the row. He is not served for long.
            await until(lambda: exchange(sock, "/") == 0, "the connection ends", within_s=30)
        assert await asyncio.to_thread(node.status, "/", 1) == 200
        assert len(backend.heads) - seen < 10_000


async def test_without_its_control_plane_envoy_goes_on_and_a_new_one_sends_nothing_again() -> None:
    async with EnvoyNode("away") as node:
        backend = node.backend()
        await node.apply(redirect(0, http(path="/a")))
        with node.connect() as sock:
            assert await asyncio.to_thread(exchange, sock, "/a") == 200
            await node.stop_serving()
            assert await asyncio.to_thread(exchange, sock, "/a") == 200
            assert await asyncio.to_thread(exchange, sock, "/b") == 403
            assert await asyncio.to_thread(node.status, "/a") == 200
            await node.serve()
            await until(lambda: bool(node.hub.streams), "Envoy is back")
            await asyncio.sleep(0.5)
            assert await asyncio.to_thread(exchange, sock, "/a") == 200
            # Not one resource: Envoy says what it has, and it is what it should have.
            assert node.bytes_sent() < 500
            await node.apply(redirect(0, http(path="/b")))
            assert await asyncio.to_thread(exchange, sock, "/a") == 403
            assert await asyncio.to_thread(exchange, sock, "/b") == 200
        assert backend.connections >= 1


async def test_a_crash_closes_and_the_next_envoy_has_the_rules() -> None:
    async with EnvoyNode("crash") as node:
        node.backend()
        await node.apply(redirect(0, http(path="/a")))
        with node.connect() as sock:
            assert await asyncio.to_thread(exchange, sock, "/a") == 200
            node.kill_envoy()
            assert await asyncio.to_thread(exchange, sock, "/a") == 0
        seen: dict[str, int] = {}
        opened: list[int] = []

        def serving() -> bool:
            # While nobody listens a connection waits; the kernel would try again in a second.
            for path in ("/b", "/a"):
                try:
                    with node.connect(within_s=0.05) as sock:
                        sock.settimeout(2)
                        seen[path] = exchange(sock, path)
                except OSError:
                    return False
                opened.append(seen["/b"])
            return seen["/a"] == 200

        await until(lambda: serving(), "the next Envoy serves", within_s=30)
        assert set(opened) <= {0, 403}  # at no moment was the path open


async def test_an_envoy_is_replaced_and_who_connects_meanwhile_waits() -> None:
    async with EnvoyNode("replaced") as node:
        node.backend()
        await node.apply(redirect(0, http(path="/a")))
        first = node.supervisor.state.pid
        codes: Counter[int] = Counter()
        done = threading.Event()

        def visit() -> None:
            while not done.is_set():
                for path in ("/a", "/b"):
                    try:
                        codes[node.status(path, 0, "Connection: close")] += 1
                    except OSError:
                        codes[-1] += 1

        visitor = asyncio.to_thread(visit)
        async with asyncio.TaskGroup() as group:
            group.create_task(visitor)
            await node.supervise_anew(max_connections=5000)
            await until(lambda: not Path(f"/proc/{first}/exe").exists(), "the first has ended")
            await until(lambda: node.supervisor.state.state == "running", "the next one runs")
            await asyncio.sleep(0.2)
            done.set()
        assert node.supervisor.state.pid != first
        # The one that was between the kernel and the old Envoy when that stopped listening; those
        # that came after it waited.
        assert codes.pop(0, 0) + codes.pop(-1, 0) <= 1, codes
        assert set(codes) == {200, 403}, codes


async def test_a_request_that_arrived_is_not_made_twice() -> None:
    def hang_up(head: bytes) -> bytes:
        raise ConnectionError

    async with EnvoyNode("once") as node:
        backend = node.backend(hang_up)
        await node.apply(redirect(0, everything()))
        assert await asyncio.to_thread(node.status, "/pay", method="POST") == 503
        assert len(backend.heads) == 1


async def test_identities_come_and_go_without_a_word_to_envoy() -> None:
    # Who may is the kernel's knowledge: a thousand peers of one rule set are one redirect, whose
    # translation does not know them.
    async with EnvoyNode("peers") as node:
        node.backend()
        wanted = redirect(0, http(path="/a"))
        await node.apply(wanted)
        before = node.bytes_sent()
        for _ in range(1000):
            node.put(wanted)
        await asyncio.sleep(0.2)
        assert node.bytes_sent() == before


async def test_a_refused_rule_set_leaves_what_was_in_force() -> None:
    async with EnvoyNode("refused") as node:
        node.backend()
        await node.apply(redirect(0, http(path="/a")))
        from services.xds.translator import Untranslatable

        with pytest.raises(Untranslatable, match="rule 7: the path"):
            node.put(redirect(0, http(7, path="/[a-z]{1000}")))
        assert await asyncio.to_thread(node.status, "/a") == 200


# ---- what is spoken


async def test_http2_and_grpc_stay_what_they_are() -> None:
    async with EnvoyNode("grpc") as node:
        script = str(Path(__file__).with_name("grpcpeer.py"))
        await node.apply(
            redirect(
                0,
                http(1, method="POST", path="/demo.Echo/Say"),
                http(2, path="/demo.Echo/Chat"),
            )
        )
        server = subprocess.Popen(  # noqa: ASYNC220 - it is awaited by what it prints
            node.inside(sys.executable, script, "server"), stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            assert await asyncio.to_thread(server.stdout.readline) == b"ready\n"
            done = await asyncio.to_thread(
                subprocess.run,
                node.inside(sys.executable, script, "client", "10.9.0.1"),
                capture_output=True,
                timeout=30,
            )
        finally:
            server.kill()
            server.wait()
        found = json.loads(done.stdout)
        assert found["Say"] == "HELLO"
        assert found["Chat"] == ["ba", "dc"]
        assert found["Erase"][0] == 7, found  # PERMISSION_DENIED
        assert "Access denied" in found["Erase"][1]
        records = await node.logged(3, kind=pb.L7Record.REQUEST)
        assert {r.http.protocol for r in records} == {"HTTP/2"}
        (denied,) = [r for r in records if r.verdict == pb.L7Record.DENIED]
        assert denied.http.path == "/demo.Echo/Erase"
        assert denied.http.grpc_status == 7
        said = await node.logged(2, kind=pb.L7Record.RESPONSE)
        assert {r.http.grpc_status for r in said} == {0}


async def test_an_upgrade_that_a_rule_allows_is_made_and_no_tunnel_is() -> None:
    def reply(head: bytes) -> bytes:
        if b"websocket" in head.lower():
            return (
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                b"Upgrade: websocket\r\n\r\n"
            )
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    async with EnvoyNode("upgrade") as node:
        backend = node.backend(reply)
        await node.apply(redirect(0, http(path="/chat")), redirect(1, everything()))
        upgrade = "GET {} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {}\r\n\r\n"

        def ask(path: str, what: str, number: int = 0) -> bytes:
            with node.connect(number) as sock:
                sock.sendall(upgrade.format(path, what).encode())
                return sock.recv(4096)

        assert (await asyncio.to_thread(ask, "/chat", "websocket")).startswith(b"HTTP/1.1 101")
        assert len(backend.heads) == 1
        for path, what, number in (
            ("/admin", "websocket", 0),
            ("/chat", "foo", 0),
            ("/chat", "tcp", 1),
        ):
            answer = await asyncio.to_thread(ask, path, what, number)
            assert answer.startswith(b"HTTP/1.1 403"), (path, what)
        connect = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"
        for number in (0, 1):
            answer = await asyncio.to_thread(node.ask, connect, number)
            assert re.match(rb"HTTP/1\.1 4\d\d", answer)
        assert len(backend.heads) == 1

        # What goes through a socket that was upgraded goes both ways.
        def talk() -> bytes:
            with node.connect() as sock:
                sock.sendall(upgrade.format("/chat", "websocket").encode())
                assert b" 101 " in sock.recv(4096)
                sock.sendall(b"GET /frame\r\n\r\n")  # the backend answers what ends so
                return sock.recv(4096)

        assert b"200 OK" in await asyncio.to_thread(talk)


async def test_the_server_sees_the_request_as_it_was() -> None:
    async with EnvoyNode("asis") as node:
        backend = node.backend()
        await node.apply(redirect(0, everything()))
        lines = (
            "X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https", "X-Request-Id: 7",
            "Accept: */*", "x-envoy-upstream-rq-timeout-ms: 1", "x-envoy-retry-on: 5xx",
        )  # fmt: skip
        assert await asyncio.to_thread(node.status, "/p?q=%2F..", 0, *lines) == 200
        (head,) = backend.heads
        got = head.decode().lower().split("\r\n")
        assert got[0] == "get /p?q=%2f.. http/1.1"
        assert {"host: a", *(line.lower() for line in lines[:4])} <= set(got)
        added = {line.split(":")[0] for line in got[1:]} - {
            line.split(":")[0].lower() for line in (*lines, "Host:")
        }
        assert not added
        assert not [line for line in got if line.startswith("x-envoy-")]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
async def test_both_families_arrive_with_the_marks_and_keepalive(family: int) -> None:
    async with EnvoyNode(f"family{int(family)}") as node:
        backend = node.backend()
        # 10,144 is a port whose mark is negative as the kernel takes it.
        assert (await node.apply(redirect(0, everything()), redirect(144, everything()))).ok

        def show(*which: str) -> list[str]:
            return subprocess.run(
                node.inside("ss", "-tnoem", *which), capture_output=True, text=True, check=True
            ).stdout.splitlines()

        with node.connect(family=family) as sock:
            assert await asyncio.to_thread(exchange, sock, "/") == 200
            assert backend.connections == 1
            shown = show("state", "established")
        # Its own connection to the server, and its end of the client's, which names the listener.
        envoys = [line for line in shown if "fwmark:0xa00" in line or "fwmark:0x10270a00" in line]
        assert len(envoys) == 2, shown
        assert len([line for line in envoys if "fwmark:0x10270a00" in line]) == 1, shown
        assert len([line for line in show("-l") if "fwmark:0xa0270a00" in line]) == 2
        assert all("timer:(keepalive" in line for line in envoys), shown


async def test_who_connects_to_the_listener_itself_is_sent_away() -> None:
    async with EnvoyNode("itself") as node:
        backend = node.backend()
        await node.apply(redirect(0, everything()))

        def ask(family: int, address: str) -> bytes:
            with node.make_socket(family) as sock:
                sock.settimeout(3)
                sock.connect((address, 10_000))
                with contextlib.suppress(OSError):
                    sock.sendall(GET.format("/").encode())
                return read_answer(sock)

        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            answer = await asyncio.to_thread(ask, family, address)
            assert answer in (b"<end>", b"<reset>"), answer
        assert not backend.connections
        # Nor does it listen anywhere else.
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(ask, socket.AF_INET, "10.9.0.1")


async def test_a_dead_server_is_an_error_and_not_a_denial() -> None:
    async with EnvoyNode("dead") as node:
        await node.apply(redirect(0, everything(3)))
        assert await asyncio.to_thread(node.status, "/") == 503
        (record,) = await node.logged(1, kind=pb.L7Record.RESPONSE)
        assert (record.verdict, record.rule_id, record.http.code) == (pb.L7Record.ERROR, 3, 503)
        assert "upstream" in record.info


async def test_hundreds_of_redirects_are_taken_together() -> None:
    async with EnvoyNode("hundreds") as node:
        node.backend()
        wanted = []
        for number in range(300):
            one = redirect(0, http(number, path=f"/{number}"))
            one.port = 10_000 + number
            wanted.append(one)
        streams = [attached.stream for attached in node.hub.streams.values()]
        before = sum(stream.responses for stream in streams)
        outcome = await node.apply(*wanted)
        assert outcome.ok
        # All listeners in a response and all routes in another, not one for each redirect.
        assert sum(stream.responses for stream in streams) - before < 10
        assert await asyncio.to_thread(node.status, "/3", 3) == 200
        assert await asyncio.to_thread(node.status, "/4", 3) == 403


# ---- headers


async def test_actions_on_headers_that_do_not_match() -> None:
    def match(name: str, value: str, mismatch: str) -> pb.HeaderMatch:
        return pb.HeaderMatch(name=name, value=value, mismatch=mismatch)

    token = pb.HeaderMatch(name="Authorization", mismatch="REPLACE")
    token.secret.namespace, token.secret.name = "default", "token"
    rule = http(
        1,
        path="/x",
        header_matches=[
            match("X-Add", "v", "ADD"),
            match("X-Replace", "50%", "REPLACE"),
            match("X-Delete", "ok", "DELETE"),
            match("X-Log", "v", "LOG"),
            match("X-Must", "", ""),
            token,
        ],
    )

    def secret(name: tuple[str, str]) -> dict[str, bytes] | None:
        return {"token": b"Bearer s3cret\n"} if name == ("default", "token") else None

    async with EnvoyNode("headers", secrets=secret) as node:
        backend = node.backend()
        await node.apply(redirect(0, rule, http(2, path="/y")))

        def seen(path: str, *headers: str) -> dict[str, list[str]]:
            backend.heads.clear()
            assert node.status(path, 0, *headers) == 200
            found: dict[str, list[str]] = {}
            for line in backend.heads[0].decode().split("\r\n")[1:]:
                name, _, value = line.partition(": ")
                found.setdefault(name, []).append(value)
            return found

        assert await asyncio.to_thread(node.status, "/x") == 403
        got = await asyncio.to_thread(
            seen, "/x", "X-Must: 1", "X-Add: w", "X-Replace: w", "X-Delete: bad", "X-Log: w"
        )
        assert sorted(got["x-add"]) == ["v", "w"]
        assert got["x-replace"] == ["50%"]
        assert "x-delete" not in got
        assert got["x-log"] == ["w"]
        assert got["authorization"] == ["Bearer s3cret"]
        got = await asyncio.to_thread(
            seen, "/x", "X-Must: 1", "X-Add: v", "X-Replace: 50%", "X-Delete: ok", "X-Log: v"
        )
        assert (got["x-add"], got["x-delete"]) == (["v"], ["ok"])
        # Another rule's request is none of its business.
        got = await asyncio.to_thread(seen, "/y", "X-Delete: bad")
        assert got["x-delete"] == ["bad"]
        assert "x-add" not in got

        responses = await node.logged(3, kind=pb.L7Record.RESPONSE)
        first = responses[0].http
        assert {h.name: h.value for h in first.missing_headers} == {
            "x-add": "v", "x-replace": "50%", "x-log": "v", "authorization": "[redacted]",
        }  # fmt: skip
        assert {h.name: h.value for h in first.rejected_headers} == {"x-delete": "ok"}
        assert [h.name for h in responses[1].http.missing_headers] == ["authorization"]
        assert not responses[2].http.missing_headers


# ---- TLS


async def test_tls_is_opened_for_the_rules_and_only_for_them(tmp_path: Path) -> None:
    certificate = issue("api.example")
    files = {
        "tls.crt": certificate.certificate,
        "tls.key": certificate.key,
        "ca.crt": certificate.certificate,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    context = pb.TLSContext(secret=pb.SecretRef(namespace="default", name="api"))
    async with EnvoyNode("tls", secrets=lambda _: files) as node:
        backend = node.backend()
        outcome = await node.apply(
            redirect(0, http(path="/a"), terminating_tls=context, server_names=["api.example"]),
            redirect(1, http(path="/a")),
        )
        assert outcome.ok
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))

        def ask(path: str, name: str = "api.example", number: int = 0) -> bytes:
            with (
                node.connect(number) as plain,
                trusting.wrap_socket(plain, server_hostname=name) as sock,
            ):
                sock.sendall(GET.format(path).encode())
                return sock.recv(4096)

        assert (await asyncio.to_thread(ask, "/a")).startswith(b"HTTP/1.1 200")
        assert (await asyncio.to_thread(ask, "/b")).startswith(b"HTTP/1.1 403")
        # Another name, and TLS where no rule opens it: closed, nothing passes.
        for name, number in (("other.example", 0), ("api.example", 1)):
            with pytest.raises(OSError, match=r"(?i)eof|reset|closed|wrong version|record"):
                await asyncio.to_thread(ask, "/a", name, number)
        assert await asyncio.to_thread(node.status, "/a") == 200  # plain HTTP is the rules' too
        assert len(backend.heads) == 2


async def test_tls_towards_the_server_is_checked(tmp_path: Path) -> None:
    certificate = issue("api.example")
    (tmp_path / "tls.crt").write_bytes(certificate.certificate)
    (tmp_path / "tls.key").write_bytes(certificate.key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    authority = {"ca.crt": certificate.certificate}
    originating = pb.TLSContext(secret=pb.SecretRef(namespace="default", name="api"))
    async with EnvoyNode("tls2", secrets=lambda _: authority) as node:
        backend = node.backend(tls=context)
        await node.apply(
            redirect(0, http(path="/a"), direction=pb.EGRESS, originating_tls=originating)
        )

        def ask(host: str, path: str = "/a") -> bytes:
            return node.ask(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

        assert (await asyncio.to_thread(ask, "api.example")).startswith(b"HTTP/1.1 200")
        assert (await asyncio.to_thread(ask, "api.example", "/b")).startswith(b"HTTP/1.1 403")
        # A server that is not who the request is for.
        assert (await asyncio.to_thread(ask, "other.example")).startswith(b"HTTP/1.1 503")
        assert len(backend.heads) == 1
        # Another authority, and new connections are checked by it.
        authority["ca.crt"] = issue("someone.else").certificate
        await node.apply(
            redirect(0, http(path="/a"), direction=pb.EGRESS, originating_tls=originating)
        )
        await until(
            lambda: ask("new.api.example").startswith(b"HTTP/1.1 503"), "it is checked", within_s=5
        )
