"""A node for tests of Envoy: a namespace in which connections to 10.9.N.1 port 80 (and, for N below
10, to fd09::N) are redirected to the listener on port 10000+N, and the real thing in it.

      cilt-<pid>-e-<tag>
      client ──▶ mark 0x200 ──▶ table 2004 ──▶ tproxy ──▶ Envoy ──▶ 10.9.N.1:80, the backend
                                                            ▲ ADS, access log (unix socket)
                                              this process: cache, hub, translator, receiver

The kernel's part is netfilter here and the datapath elsewhere: what is tested is Envoy and what it
is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cilia.net.netns import NetNS, in_netns
from cilia.rpc.server import Server
from protos.xds.v1 import xds_pb2 as pb
from services.xds.acks import Acknowledgements, Outcome
from services.xds.cache import ResourceCache
from services.xds.envoy.accesslog import AccessLogReceiver
from services.xds.envoy.process import Process, account, binary
from services.xds.envoy.supervisor import EnvoySettings, Supervisor
from services.xds.hub import Hub
from services.xds.resources import LDS, RDS
from services.xds.server import DiscoveryServer
from services.xds.translate.http import HttpTranslator
from services.xds.translate.model import NodeSettings, SecretReader, no_secrets

NODE: Final = "envoy-1"
LISTENERS: Final = 10
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def sweep() -> None:
    """Removes what runs of processes that are gone left behind."""
    for path in (*Path("/run/netns").glob("cilt-*-e-*"), *Path("/run").glob("cilt-*-e-*")):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            if path.parent.name == "netns":
                subprocess.run(["ip", "netns", "del", path.name], check=False)
            else:
                for process in Process.find(path / "envoy"):
                    process.signal(signal.SIGKILL)
                    process.close()
                shutil.rmtree(path, ignore_errors=True)


class _Supervisor(Supervisor):
    """Starts Envoy in the namespace."""

    netns: str

    def _spawn(self) -> Process:
        with NetNS.open(f"/run/netns/{self.netns}") as netns:
            return in_netns(netns, super()._spawn)


class Wire:
    """The namespace, and what is at both ends of it."""

    def __init__(self, tag: str) -> None:
        self.base = f"cilt-{os.getpid()}-e-{tag}"
        self.run_dir = Path("/run") / self.base
        self._backends: list[Backend] = []

    def make(self) -> None:
        sweep()
        self.run_dir.mkdir(parents=True)
        self._make_namespace()

    def remove(self) -> None:
        for backend in self._backends:
            backend.close()
        for process in Process.find(self.run_dir / "envoy"):
            process.signal(signal.SIGKILL)
            process.close()
        subprocess.run(["ip", "netns", "del", self.base], capture_output=True, check=False)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _make_namespace(self) -> None:
        name = self.base
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", name, "addr", "add", "10.9.0.1/16", "dev", "lo")
        run("ip", "-n", name, "addr", "add", "fd09::/64", "dev", "lo", "nodad")
        run("ip", "-n", name, "-6", "route", "add", "local", "fd09::/64", "dev", "lo")
        for family in ("-4", "-6"):
            run("ip", "-n", name, family, "rule", "add", "fwmark", "0x200", "lookup", "2004")
            run("ip", "-n", name, family, "route", "add", "local", "default", "dev", "lo",
                "table", "2004")  # fmt: skip
        redirect = "".join(
            f"meta mark 0x200 ip daddr 10.9.{n}.1 meta l4proto tcp"
            f" tproxy ip to 127.0.0.1:{10_000 + n} accept\n"
            f"meta mark 0x200 ip6 daddr fd09::{n} meta l4proto tcp"
            f" tproxy ip6 to [::1]:{10_000 + n} accept\n"
            for n in range(LISTENERS)
        )
        run(
            "ip", "netns", "exec", name, "nft", "-f", "-",
            stdin=f"""table inet cilt {{
                chain out {{
                    type route hook output priority mangle;
                    meta mark != 0 return
                    ip daddr 10.9.0.0/16 ip daddr != 10.9.255.1 tcp dport 80 meta mark set 0x200
                    ip6 daddr fd09::/64 tcp dport 80 meta mark set 0x200
                }}
                chain pre {{
                    type filter hook prerouting priority mangle;
                    {redirect}
                    meta mark 0x200 drop
                }}
            }}""",
        )  # fmt: skip

    def make_socket(self, family: int = socket.AF_INET) -> socket.socket:
        with NetNS.open(f"/run/netns/{self.base}") as netns:
            return in_netns(netns, lambda: socket.socket(family, socket.SOCK_STREAM))

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.base}", *words]

    def backend(
        self,
        reply: Callable[[bytes], bytes] | bytes = OK,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> Backend:
        """Answers at every address on port 80, and remembers what it was sent."""
        backend = Backend(self, reply, tls)
        self._backends.append(backend)
        return backend

    def connect(
        self, number: int = 0, *, family: int = socket.AF_INET, within_s: float = 5
    ) -> socket.socket:
        """A client's connection to what the listener of that number guards."""
        sock = self.make_socket(family)
        sock.settimeout(within_s)
        address = f"10.9.{number}.1" if family == socket.AF_INET else f"fd09::{number}"
        sock.connect((address, 80))
        return sock

    def ask(
        self, data: bytes, number: int = 0, *, family: int = socket.AF_INET, wait_s: float = 3
    ) -> bytes:
        """Sends bytes and returns the answer: up to the end of its body, or all until the end of
        the connection, which shows as `<end>`; `<reset>` and `<silence>` are what they say."""
        with self.connect(number, family=family) as sock:
            sock.settimeout(wait_s)
            sock.sendall(data)
            return read_answer(sock)

    def status(self, path: str, number: int = 0, *headers: str, method: str = "GET") -> int:
        """The status code of a plain request."""
        lines = "".join(f"{h}\r\n" for h in ("Host: a", *headers))
        answer = self.ask(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"), number)
        match = re.match(rb"HTTP/1\.[01] (\d+)", answer)
        return int(match[1]) if match else 0


class EnvoyNode(Wire):
    """`async with EnvoyNode("tag") as node: await node.apply(redirect(...))`."""

    def __init__(
        self,
        tag: str,
        settings: NodeSettings | None = None,
        *,
        secrets: SecretReader = no_secrets,
        concurrency: int = 1,
    ) -> None:
        super().__init__(tag)
        self.settings = settings or NodeSettings()
        self.records: list[pb.L7Record] = []
        self.redirects: dict[int, pb.Redirect] = {}
        self.cache = ResourceCache()
        self.hub = Hub(self.cache)
        self.acks = Acknowledgements(self.hub)
        self.translator = HttpTranslator(self.settings, secrets)
        self.receiver = AccessLogReceiver(publish=self.records.extend, find=self.redirects.get)
        self._concurrency = concurrency
        self._server: Server | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            self.make()
            await self.serve()
            self._group = await self._stack.enter_async_context(asyncio.TaskGroup())
            self._stack.callback(lambda: self._task.cancel())
            self._supervise(
                EnvoySettings(
                    binary=binary(),
                    run_dir=self.run_dir,
                    node_id=NODE,
                    ads_socket=self.run_dir / "ads.sock",
                    concurrency=self._concurrency,
                    log_level="warning",
                    drain_s=1,
                )
            )
            for item in self.translator.base():
                self.cache.put(item.url, item.name, item.value)
            await until(lambda: self.supervisor.state.state == "running", "Envoy is ready")
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._stack.aclose()
            await self.stop_serving()
        finally:
            self.remove()

    def _supervise(self, settings: EnvoySettings) -> None:
        self.supervisor = _Supervisor(settings)
        self.supervisor.netns = self.base
        self._task = self._group.create_task(self.supervisor.run())

    async def supervise_anew(self, **changes: Any) -> None:
        """Leaves Envoy running, as a killed service does, and starts another supervisor."""
        settings = self.supervisor._settings
        self.supervisor._settings = replace(settings, keep=True)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._supervise(replace(settings, **changes))

    # ---- the control plane

    async def serve(self) -> None:
        """Starts the control plane; Envoy comes back to it by itself."""
        self._discovery = DiscoveryServer(hub=self.hub, transport="unix")
        self._server = Server(
            socket=self.run_dir / "ads.sock",
            services=[self._discovery.register, self.receiver.add_to_server],
            group=account("cilia-envoy").gid,
            grace_s=0.1,
        )
        await self._server.start()
        self.run_dir.chmod(0o755)

    async def stop_serving(self) -> None:
        """Ends the control plane; what it knew is kept."""
        if self._server is not None:
            self._discovery.close()
            await self._server.stop()
            self._server = None

    def put(self, *redirects: pb.Redirect) -> None:
        """Translates and serves."""
        with self.cache.transaction() as change:
            for redirect in redirects:
                self.redirects[redirect.port] = redirect
                for item in self.translator.translate(redirect).items:
                    change.put(item.url, item.name, item.value)

    async def apply(self, *redirects: pb.Redirect) -> Outcome:
        """Translates, serves, and waits until Envoy has taken it or not."""
        self.put(*redirects)
        names = [f"redirect-{redirect.port}" for redirect in redirects]
        outcome = await self.acks.acknowledged(NODE, {LDS: names, RDS: names}, timeout_s=30)
        assert not outcome.pending, outcome
        return outcome

    async def withdraw(self, port: int) -> None:
        del self.redirects[port]
        with self.cache.transaction() as change:
            change.remove(LDS, f"redirect-{port}")
            change.remove(RDS, f"redirect-{port}")
        await self.acks.acknowledged(NODE, {LDS: [f"redirect-{port}"]}, timeout_s=10)

    def bytes_sent(self) -> int:
        """Bytes that Envoy's streams were sent since they were opened."""
        return sum(attached.stream.response_bytes for attached in self.hub.streams.values())

    def kill_envoy(self) -> None:
        os.kill(self.supervisor.state.pid, signal.SIGKILL)

    async def logged(
        self, count: int, *, kind: int | None = None, within_s: float = 30
    ) -> list[pb.L7Record]:
        """The records, once there are so many of the kind."""

        def found() -> list[pb.L7Record]:
            return [r for r in self.records if kind is None or r.type == kind]

        await until(lambda: len(found()) >= count, f"{count} records", within_s=within_s)
        return found()


class Backend:
    """A server that understands as little of HTTP as it can: a head, then as many bytes as its
    Content-Length says, then the next head."""

    def __init__(
        self,
        node: Wire,
        reply: Callable[[bytes], bytes] | bytes,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        self.heads: list[bytes] = []
        self.connections = 0
        self.peers: list[Any] = []
        self._reply = reply
        self._listeners: list[socket.socket] = []
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            sock = node.make_socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, 80))
            sock.listen(1024)
            self._listeners.append(sock)
            threading.Thread(target=self._accept, args=(sock,), daemon=True).start()

    @property
    def lines(self) -> list[str]:
        """The request lines."""
        return [head.split(b"\r\n")[0].decode("latin-1") for head in self.heads]

    def close(self) -> None:
        for sock in self._listeners:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError:
                return
            self.connections += 1
            self.peers.append(peer)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _secured(self, sock: socket.socket) -> socket.socket:
        return sock if self._tls is None else self._tls.wrap_socket(sock, server_side=True)

    def _serve(self, sock: socket.socket) -> None:
        buffer = b""
        with contextlib.suppress(OSError), self._secured(sock) as sock:
            while data := sock.recv(65_536):
                buffer += data
                while b"\r\n\r\n" in buffer:
                    head, buffer = buffer.split(b"\r\n\r\n", 1)
                    self.heads.append(head)
                    length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
                    while length and len(buffer) < int(length[1]):
                        buffer += sock.recv(65_536)
                    buffer = buffer[int(length[1]) :] if length else buffer
                    reply = self._reply(head) if callable(self._reply) else self._reply
                    sock.sendall(reply)


def read_answer(sock: socket.socket) -> bytes:
    """One answer with a Content-Length, or all until the end."""
    answer = b""
    try:
        while data := sock.recv(65_536):
            answer += data
            head, found, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            if found and length and len(body) >= int(length[1]):
                return answer
        answer += b"<end>"
    except TimeoutError:
        answer += b"<silence>"
    except ConnectionError:
        answer += b"<reset>"
    return answer


def run(*words: str, stdin: str | None = None) -> None:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"


async def until(check: Callable[[], object], what: str, *, within_s: float = 30) -> None:
    """Polls what has no event to wait for."""
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


def http(
    rule_id: int = 1, *, method: str = "", path: str = "", host: str = "", **more: Any
) -> pb.L7Rule:
    rule = pb.HTTPRule(method=method, path=path, host=host, **more)
    return pb.L7Rule(rule_id=rule_id, policy=f"policy {rule_id}", http=rule)


def everything(rule_id: int = 1) -> pb.L7Rule:
    return pb.L7Rule(rule_id=rule_id, policy=f"policy {rule_id}")


def redirect(
    number: int,
    *rules: pb.L7Rule,
    direction: pb.Direction.ValueType = pb.INGRESS,
    ingress: Iterable[pb.L7Rule] | None = None,
    **more: Any,
) -> pb.Redirect:
    """The redirect whose listener has that number; with `ingress` one of both ends' rules."""
    message = pb.Redirect(
        port=10_000 + number,
        digest=f"digest-{number}-{len(rules)}",
        direction=direction if ingress is None else pb.BOTH,
        rules=pb.RuleSet(parser="http", rules=rules, **more),
    )
    if ingress is not None:
        message.ingress_rules.CopyFrom(pb.RuleSet(parser="http", rules=ingress))
    return message
