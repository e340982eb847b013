"""Real packets through attached programs: two workloads, their node, and a world beyond it.

    a  --veth cila--+                      +--veth up0--  world (the gateway, and 203.0.113.9)
                    |  node: the programs  |
    b  --veth cilb--+                      +

Four network namespaces, each of a thread; nothing is faked, and nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np

from cilia.bpf import Link, attach_tc, constants, layout, probe
from tests.datapath.harness import (
    ALLOW_ALL,
    GATEWAY_MAC,
    IN,
    NODE4,
    NODE6,
    REMOTE4,
    REMOTE6,
    ROUTER4,
    ROUTER6,
    Endpoint,
    Node,
    Rule,
    Thread,
)

PORT: Final = 8080
WAIT_S: Final = 20.0
SHORT_WAIT_S: Final = 1.5
BULK: Final = 1 << 20  # bytes; enough for segments that the kernel cuts late (GSO)

Mode = Literal["tcx", "clsact"]
Direction = Literal["ingress", "egress"]

PLACES: Final[tuple[tuple[str, Direction, str], ...]] = (
    ("cila", "ingress", "from_endpoint"),
    ("cila", "egress", "to_endpoint"),
    ("cilb", "ingress", "from_endpoint"),
    ("cilb", "egress", "to_endpoint"),
    ("up0", "ingress", "from_netdev"),
    ("up0", "egress", "to_netdev"),
)


class Site:
    """The node with its programs attached, and what surrounds it."""

    def __init__(self, mode: Mode) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._setup(mode)
        except BaseException:
            self._stack.close()
            raise

    def _setup(self, mode: Mode) -> None:
        self.node = self._stack.enter_context(Node())
        self.a, self.b, self.world = (self._namespace() for _ in range(3))
        for thread, ep in ((self.a, self.node.a), (self.b, self.node.b)):
            self._workload(thread, ep)
        self._world()
        self._stack.enter_context(self._attached(mode))

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _namespace(self) -> Thread:
        thread = Thread()
        self._stack.callback(thread.close)
        thread.sh("ip link set lo up")
        return thread

    def _move(self, device: str, to: Thread) -> None:
        # The kernel takes a thread for a process here, and a thread is what has the namespace.
        self.node.thread.sh(f"ip link set {device} netns {to.call(threading.get_native_id)}")
        to.sh(f"ip link set {device} up")

    def _workload(self, thread: Thread, ep: Endpoint) -> None:
        device = f"cil{ep.name}w"
        self._move(device, thread)
        # The gateway is asked for by ARP and neighbour discovery: the programs answer.
        thread.sh(
            f"ip addr add {ep.ip4}/32 dev {device}",
            f"ip addr add {ep.ip6}/128 dev {device} nodad",
            f"ip route add {ROUTER4} dev {device} && ip route add default via {ROUTER4}",
            f"ip route add {ROUTER6} dev {device} && ip -6 route add default via {ROUTER6}",
        )
        host = f"cil{ep.name}"
        self.node.thread.sh(
            f"ip addr replace {ROUTER4}/32 dev lo && ip addr replace {ROUTER6}/128 dev lo nodad",
            f"ip route add {ep.ip4}/32 dev {host} src {ROUTER4}",
            f"ip route add {ep.ip6}/128 dev {host} src {ROUTER6}",
            f"ip neigh add {ep.ip4} lladdr {ep.mac} dev {host}",
            f"ip neigh add {ep.ip6} lladdr {ep.mac} dev {host}",
        )

    def _world(self) -> None:
        self._move("up0w", self.world)
        self.world.sh(
            f"ip link set up0w address {GATEWAY_MAC}",
            "ip addr add 192.0.2.254/24 dev up0w && ip addr add 2001:db8::fe/64 dev up0w nodad",
            f"ip addr add {REMOTE4}/32 dev lo && ip addr add {REMOTE6}/128 dev lo nodad",
        )

    @contextlib.contextmanager
    def _attached(self, mode: Mode) -> Iterator[None]:
        path = Path(tempfile.mkdtemp(prefix=f"cilt-{os.getpid()}-", dir="/run"))
        subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
        self.links: list[Link] = []
        try:
            for device, direction, program in PLACES:
                self.links.append(self._attach(mode, path, device, direction, program))
            yield
        finally:
            for link in self.links:
                self.node.thread.call(link.detach)
            subprocess.run(["umount", "-l", str(path)], check=True)
            path.rmdir()

    def _attach(
        self, mode: Mode, path: Path, device: str, direction: Direction, program: str
    ) -> Link:
        return self.node.thread.call(
            lambda: attach_tc(
                socket.if_nametoindex(device),
                direction,
                self.node.programs[program],
                mode=mode,
                pin=path / f"{device}_{direction}",
            )
        )

    def forwarded_by_stack(self) -> int:
        """Packets that the node's own stack forwarded, of both families."""

        def read() -> int:
            v4 = Path("/proc/thread-self/net/snmp").read_text().splitlines()
            names, values = (line.split() for line in v4 if line.startswith("Ip:"))
            total = int(values[names.index("ForwDatagrams")])
            for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
                name, value = line.split()
                if name == "Ip6OutForwDatagrams":
                    total += int(value)
            return total

        return self.node.thread.call(read)


# ---- conversations


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _listen(address: str, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(_family(address), kind)
    sock.settimeout(WAIT_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, PORT))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def _connect(address: str, timeout_s: float = WAIT_S) -> socket.socket:
    sock = socket.socket(_family(address), socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect((address, PORT))
    except BaseException:
        sock.close()
        raise
    return sock


def _send_all(sock: socket.socket, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=sock.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (chunk := sock.recv(1 << 16)):
        data += chunk
    return bytes(data)


def _tcp(client: Thread, server: Thread, address: str) -> str:
    """A megabyte each way. Returns the client's address as the server saw it."""
    payload = os.urandom(BULK)
    # A socket stays in the namespace it was made in; it may be used from any thread.
    with (
        server.call(lambda: _listen(address, socket.SOCK_STREAM)) as listener,
        client.call(lambda: _connect(address)) as one,
    ):
        two, peer = listener.accept()
        two.settimeout(WAIT_S)
        with two:
            for sender, receiver in ((one, two), (two, one)):
                sending = _send_all(sender, payload)
                assert _receive(receiver, BULK) == payload, "bytes differ"
                sending.join(WAIT_S)
    return str(peer[0])


def _udp(client: Thread, server: Thread, address: str, size: int) -> None:
    """One datagram there and back."""
    payload = os.urandom(size)

    def dial() -> socket.socket:
        sock = socket.socket(_family(address), socket.SOCK_DGRAM)
        sock.settimeout(WAIT_S)
        sock.connect((address, PORT))
        return sock

    with (
        server.call(lambda: _listen(address, socket.SOCK_DGRAM)) as listener,
        client.call(dial) as sock,
    ):
        sock.send(payload)
        data, peer = listener.recvfrom(1 << 16)
        assert data == payload, "bytes differ"
        listener.sendto(data, peer)
        assert sock.recv(1 << 16) == payload, "bytes differ"


def _ping(client: Thread, address: str) -> None:
    client.sh(f"ping -n -c 2 -i 0.2 -W 10 {address}")


# ---- the checks


def _locals(site: Site) -> None:
    a, b = site.node.a, site.node.b
    for v6 in (False, True):
        _ping(site.a, b.ip(v6))
        assert _tcp(site.a, site.b, b.ip(v6)) == a.ip(v6)
        _udp(site.a, site.b, b.ip(v6), 100)
        _udp(site.a, site.b, b.ip(v6), 4000)  # three fragments
    assert site.forwarded_by_stack() == 0, "the stack forwarded what bpf_redirect_peer should have"


def _host(site: Site) -> None:
    for v6 in (False, True):
        router, ep = (ROUTER6, site.node.a) if v6 else (ROUTER4, site.node.a)
        _ping(site.a, router)
        _tcp(site.a, site.node.thread, router)
        _ping(site.node.thread, ep.ip(v6))
        assert _tcp(site.node.thread, site.a, ep.ip(v6)) == router


def _beyond(site: Site) -> None:
    for remote, node in ((REMOTE4, NODE4), (REMOTE6, NODE6)):
        _ping(site.a, remote)
        assert _tcp(site.a, site.world, remote) == node, "not masqueraded"
        _udp(site.a, site.world, remote, 100)
    # No neighbour entry: bpf_redirect_neigh has the kernel resolve it.
    site.node.thread.sh("ip neigh del 192.0.2.254 dev up0", "ip neigh del 2001:db8::fe dev up0")
    for remote, node in ((REMOTE4, NODE4), (REMOTE6, NODE6)):
        assert _tcp(site.a, site.world, remote) == node, "not masqueraded"
    assert site.forwarded_by_stack() == 0, "the stack forwarded what the programs should have"


def _revoked(site: Site) -> None:
    """A connection that policy no longer allows ends, and a new one does not begin."""
    node = site.node
    address = node.b.ip4
    before = node.metrics().get((133, IN), (0, 0))[0]
    with site.b.call(lambda: _listen(address, socket.SOCK_STREAM)) as listener:
        with site.a.call(lambda: _connect(address)) as one:
            two, _ = listener.accept()
            with two:
                one.sendall(b"before")
                assert two.recv(6) == b"before"
                node.policy(node.b, [Rule(True, id=1)])
                two.settimeout(SHORT_WAIT_S)
                one.sendall(b"after")
                with contextlib.suppress(TimeoutError):
                    raise AssertionError(f"{two.recv(5)!r} arrived after its policy was revoked")
        with contextlib.suppress(TimeoutError):
            site.a.call(lambda: _connect(address, SHORT_WAIT_S)).close()
            raise AssertionError("a connection was made against the policy")
    drops = node.metrics().get((133, IN), (0, 0))[0] - before
    assert drops >= 2, f"{drops} drops were counted"
    node.policy(node.b, ALLOW_ALL)
    _tcp(site.a, site.b, address)


def _fails(client: Thread, address: str) -> bool:
    try:
        client.sh(f"ping -n -c 1 -W 1 {address}")
    except subprocess.CalledProcessError:
        return True
    return False


def _node_policy(site: Site) -> None:
    """The node's own policy, on the way in and out, and what its endpoints do regardless."""
    node = site.node
    node.host([Rule(False, 0, 6, PORT, 24, id=1)])
    try:
        for mine, remote, via in (
            (NODE4, REMOTE4, "192.0.2.254"),
            (NODE6, REMOTE6, "2001:db8::fe"),
        ):
            _tcp(site.world, node.thread, mine)
            assert _fails(site.world, mine), f"{mine} answered against its policy"
            assert _fails(node.thread, via), "the node pinged against its policy"
            assert _tcp(site.a, site.world, remote) == mine, "not masqueraded"
        assert _fails(site.a, ROUTER4), "an endpoint pinged the node against its policy"
    finally:
        node.no_host()
    _ping(site.world, NODE4)


def _audited(site: Site) -> None:
    """Questions are answered as packets are, and the self-test is heard."""
    node = site.node
    cells = np.zeros(100, layout.AUDIT_CELL)
    cells["policy_slot"], cells["proto"], cells["dport_be"] = node.a.slot, 6, range(100)
    cells["ep_flags"], cells["egress"] = constants.EP_F_OPEN | constants.EP_F_AUDIT, 1
    node.policy(node.a, [Rule(True, 0, 6, 80, 24, id=8)])
    try:
        answers = node.auditor.ask(cells)
        assert [int(x) for x in np.flatnonzero(answers["verdict"] == 0)] == [80]
        assert (answers["rule_id"] != 0).sum() == 1
        node.drain()
        node.auditor.try_aloud(cells[:1])
        assert [int(e["flags"]) & 0xFF for e in node.drain()] == [
            constants.EVENT_F_AUDITED | constants.EVENT_F_SELFTEST
        ]
    finally:
        node.policy(node.a, ALLOW_ALL)


def _replaced(site: Site) -> None:
    """Programs are put in place of themselves under traffic, and no byte is lost."""
    done = threading.Event()
    rounds = 0

    def once() -> None:
        for link, (_, _, program) in zip(site.links, PLACES, strict=True):
            link.replace(site.node.programs[program])

    def replace() -> None:
        nonlocal rounds
        while not done.is_set():
            site.node.thread.call(once)
            rounds += 1

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for v6 in (False, True):
            _tcp(site.a, site.b, site.node.b.ip(v6))
    finally:
        done.set()
        thread.join()
    assert rounds, "nothing was replaced meanwhile"


CHECKS: Final[tuple[tuple[str, Callable[[Site], None]], ...]] = (
    ("between endpoints", _locals),
    ("with the host", _host),
    ("to the world", _beyond),
    ("revocation", _revoked),
    ("policy of the node", _node_policy),
    ("questions to policy", _audited),
    ("replacement under traffic", _replaced),
)


def modes() -> list[Mode]:
    """The ways of attaching that this kernel has."""
    present = {feature.name for feature in probe.features() if feature.present}
    every: tuple[Mode, ...] = ("clsact", "tcx")
    return [mode for mode in every if mode in present]
