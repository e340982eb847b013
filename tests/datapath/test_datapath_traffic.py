r"""Real packets: workloads, a node and the world as namespaces, the programs attached.

The node's FORWARD chain drops everything and the world has no route to the endpoints, so what
arrives got there by redirection and masquerade alone. With clsact the uplink computes and verifies
checksums in software, with tcx they are left to the end (CHECKSUM_PARTIAL), as between containers.

    a (eth0)---cila \                                  up0w 192.0.2.254, 203.0.113.9
                      node (up0 192.0.2.1)--------------- world
    b (eth0)---cilb /
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from cilia.bpf import Link, attach_tc, dropreason
from tests.datapath.harness import (
    ALLOW_ALL,
    GATEWAY_MAC,
    IN,
    NODE4,
    NODE6,
    OUT,
    REMOTE4,
    REMOTE6,
    ROUTER4,
    ROUTER6,
    ROUTER_LL,
    Endpoint,
    Node,
    Rule,
    Thread,
)

Mode = Literal["tcx", "clsact"]

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h
NEEDS_CHECKSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM


def software_checksums(device: str) -> None:
    """Make a device compute and verify checksums, which a veth pair else only promises."""
    for command in (0x15, 0x17):  # ETHTOOL_SRXCSUM, ETHTOOL_STXCSUM
        value = ctypes.create_string_buffer(struct.pack("=II", command, 0), 8)
        request = struct.pack("16sQ", device.encode(), ctypes.addressof(value)).ljust(40, b"\0")
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, 0x8946, request)  # SIOCETHTOOL


class Live(Node):
    """A node whose endpoints and world are namespaces of their own."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.spaces = {name: Thread() for name in ("a", "b", "c", "world")}
        self.links: list[Link] = []
        self.pins = Path(f"/run/cilt-{os.getpid()}-{id(self):x}-links")
        try:
            super().__init__()
        except BaseException:
            self._end_spaces()
            raise
        try:
            self._attach()
            # Whatever neighbour resolution went before is not part of a test.
            self.drain()
        except BaseException:
            self.close()
            raise

    def _end_spaces(self) -> None:
        for space in self.spaces.values():
            space.close()

    def close(self) -> None:
        for link in self.links:
            with contextlib.suppress(OSError):
                self.thread.call(link.detach)
        super().close()
        self._end_spaces()
        subprocess.run(["umount", "-l", str(self.pins)], check=False, stderr=subprocess.DEVNULL)
        with contextlib.suppress(OSError):
            self.pins.rmdir()

    def _links(self) -> None:
        self.thread.sh(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
            " net.ipv6.conf.default.accept_dad=0",
            "ip link set lo up",
            "ip link add cilia_host type veth peer name cilia_net",
            "ip link set cilia_host up && ip link set cilia_net up",
            f"ip addr add {ROUTER4}/32 dev cilia_host",
            f"ip addr add {ROUTER6}/128 dev cilia_host nodad",
            "nft add table inet firewall",
            "nft 'add chain inet firewall forward"
            " { type filter hook forward priority 0; policy drop; }'",
        )
        for name, octet in (("a", "0a"), ("b", "0b"), ("c", "0c"), ("world", "01")):
            device = "up0" if name == "world" else f"cil{name}"
            tid = self.spaces[name].call(threading.get_native_id)
            mac = GATEWAY_MAC if name == "world" else f"02:00:00:00:{octet}:02"
            self.thread.sh(
                f"ip link add {device} address 02:00:00:00:{octet}:01 type veth"
                f" peer name eth0 address {mac} netns {tid}",
                f"ip link set {device} up",
            )
            self.spaces[name].sh(
                "sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0",
                "ip link set lo up && ip link set eth0 up",
            )
        for name, number, octet in (("a", 11, "0a"), ("b", 12, "0b"), ("c", 13, "0c")):
            self.spaces[name].sh(
                f"ip addr add 10.217.0.{number}/32 dev eth0",
                f"ip addr add fd00:c111::{number}/128 dev eth0 nodad",
                f"ip route add default via {ROUTER4} dev eth0 onlink",
                f"ip -6 route add default via {ROUTER6} dev eth0 onlink",
            )
            self.thread.sh(
                f"ip route add 10.217.0.{number}/32 dev cil{name} src {ROUTER4}",
                f"ip -6 route add fd00:c111::{number}/128 dev cil{name} src {ROUTER6}",
                f"ip neigh add 10.217.0.{number} lladdr 02:00:00:00:{octet}:02 dev cil{name}",
                f"ip neigh add fd00:c111::{number} lladdr 02:00:00:00:{octet}:02 dev cil{name}",
            )
        self.thread.sh(
            f"ip addr add {NODE4}/24 dev up0 && ip addr add {NODE6}/64 dev up0 nodad",
            "ip route add default via 192.0.2.254 && ip -6 route add default via 2001:db8::fe",
        )
        self.spaces["world"].sh(
            "ip addr add 192.0.2.254/24 dev eth0 && ip addr add 2001:db8::fe/64 dev eth0 nodad",
            f"ip addr add {REMOTE4}/32 dev lo && ip addr add {REMOTE6}/128 dev lo nodad",
            "sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0",
        )

        if self.mode == "clsact":
            self.thread.call(lambda: software_checksums("up0"))
            self.spaces["world"].call(lambda: software_checksums("eth0"))

    def _attach(self) -> None:
        self.pins.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", str(self.pins)], check=True)
        for name, direction, program in (
            ("cila", "ingress", "from_endpoint"),
            ("cila", "egress", "to_endpoint"),
            ("cilb", "ingress", "from_endpoint"),
            ("cilb", "egress", "to_endpoint"),
            ("up0", "ingress", "from_netdev"),
            ("up0", "egress", "to_netdev"),
        ):
            ifindex = self.ifindex(name)
            pin = self.pins / f"{name}_{direction}"
            link = self.thread.call(
                lambda i=ifindex, d=direction, p=program, pin=pin: attach_tc(  # type: ignore[misc]
                    i, d, self.programs[p], mode=self.mode, pin=pin
                )
            )
            self.links.append(link)

    # ---- traffic

    def ping(self, space: str, target: str, *options: str) -> tuple[int, str]:
        """Exit code and output."""
        thread = self.thread if space == "node" else self.spaces[space]
        run = thread.call(
            lambda: subprocess.run(
                ["ping", "-n", "-c", "2", "-i", "0.01", "-W", "1", *options, target],
                capture_output=True,
                text=True,
                check=False,
            )
        )
        return run.returncode, run.stdout

    def socket(self, space: str, kind: int, bind: str | None, port: int = 0) -> socket.socket:
        """A socket in a namespace, with a timeout of two seconds."""
        thread = self.thread if space == "node" else self.spaces[space]

        def make() -> socket.socket:
            family = socket.AF_INET6 if bind and ":" in bind else socket.AF_INET
            made = socket.socket(family, kind)
            made.settimeout(2)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if bind:
                made.bind((bind, port))
            if kind == socket.SOCK_STREAM and port:
                made.listen()
            return made

        return thread.call(make)


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def live(
    request: pytest.FixtureRequest,
    objects: None,
    need_redirect_peer: None,
    need_nft: None,
    need_ping: None,
) -> Iterator[Live]:
    if request.param == "tcx":
        request.getfixturevalue("need_tcx")
    node = Live(request.param)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def net(live: Live) -> Live:
    live.reset()
    live.runtime(aggregation=3)
    return live


def of(ep: Endpoint | str, v6: bool) -> str:
    return ep if isinstance(ep, str) else ep.ip(v6)


def remote(v6: bool) -> str:
    return REMOTE6 if v6 else REMOTE4


def test_ping(net: Live, v6: bool) -> None:
    router = ROUTER6 if v6 else ROUTER4
    for space, target in (
        ("a", net.b.ip(v6)),
        ("b", net.a.ip(v6)),
        ("a", remote(v6)),
        ("a", router),
        ("a", NODE6 if v6 else NODE4),
        ("node", net.a.ip(v6)),
    ):
        for size in ("56", "3000", "20000"):
            code, output = net.ping(space, target, "-s", size)
            assert code == 0, (space, target, size, output)


def test_the_gateway_answers_link_local(net: Live) -> None:
    """Neighbour discovery of the router's link-local address, by the workload's kernel."""
    net.ping("a", f"{ROUTER_LL}%eth0", "-c", "1")
    output = net.spaces["a"].call(
        lambda: subprocess.run(
            ["ip", "-6", "neigh", "show", ROUTER_LL], capture_output=True, text=True, check=True
        )
    )
    assert net.a.node_mac in output.stdout


def exchange(client: socket.socket, server: socket.socket, target: str, port: int) -> str:
    """Megabytes each way, checked; returns the client's address as the server sees it."""
    blob = os.urandom(1 << 16) * 48
    got = bytearray()

    def serve() -> None:
        connection, peer = server.accept()
        with connection:
            connection.settimeout(5)
            seen.append(peer[0])
            while len(got) < len(blob):
                got.extend(connection.recv(1 << 16))
            connection.sendall(got)

    seen: list[str] = []
    worker = threading.Thread(target=serve)
    worker.start()
    try:
        client.settimeout(5)
        client.connect((target, port))
        client.sendall(blob)
        back = bytearray()
        while len(back) < len(blob):
            chunk = client.recv(1 << 16)
            if not chunk:
                break
            back.extend(chunk)
    finally:
        worker.join(timeout=10)
    assert bytes(got) == blob
    assert bytes(back) == blob
    return seen[0]


@pytest.mark.parametrize("pair", ["a-b", "a-world", "a-node", "node-a"])
def test_tcp(net: Live, v6: bool, pair: str) -> None:
    one, other = pair.split("-")
    address = {
        "a": net.a.ip(v6), "b": net.b.ip(v6), "world": remote(v6), "node": NODE6 if v6 else NODE4
    }  # fmt: skip
    bound = address[one] if one != "node" else (ROUTER6 if v6 else ROUTER4)
    with (
        net.socket(other, socket.SOCK_STREAM, address[other], 8000) as server,
        net.socket(one, socket.SOCK_STREAM, bound) as client,
    ):
        seen = exchange(client, server, address[other], 8000)
    expected = (NODE6 if v6 else NODE4) if other == "world" else bound
    assert seen == expected
    drops = {key: n for key, n in net.metrics().items() if key[0] >= 130}
    assert not {key for key in drops if key[0] in (133, 153, 154, 156, 169)}


@pytest.mark.parametrize("other", ["b", "world"])
@pytest.mark.parametrize("size", [1, 1400, 3000, 30000])
def test_udp(net: Live, v6: bool, other: str, size: int) -> None:
    target = net.b.ip(v6) if other == "b" else remote(v6)
    with (
        net.socket(other, socket.SOCK_DGRAM, target, 9000) as server,
        net.socket("a", socket.SOCK_DGRAM, net.a.ip(v6)) as client,
    ):
        data = os.urandom(size)
        client.sendto(data, (target, 9000))
        got, peer = server.recvfrom(65535)
        assert got == data
        server.sendto(got[::-1], peer)
        back, sender = client.recvfrom(65535)
        assert back == data[::-1]
        assert sender[0] == target


@pytest.mark.parametrize("other", ["b", "world", "node"])
def test_errors_reach_the_socket(net: Live, v6: bool, other: str) -> None:
    """A closed port: the workload's socket hears it, across masquerade as well."""
    target = {"b": net.b.ip(v6), "world": remote(v6), "node": NODE6 if v6 else NODE4}[other]
    rules = [Rule(True), Rule(False, 999)]
    net.policy(net.a, rules)  # no ICMP is let in by policy
    with net.socket("a", socket.SOCK_DGRAM, net.a.ip(v6)) as client:
        client.connect((target, 9))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
    with (
        net.socket("a", socket.SOCK_STREAM, net.a.ip(v6)) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect((target, 9))


def test_hop_limits(net: Live, v6: bool) -> None:
    for target in (net.b.ip(v6), remote(v6)):
        code, output = net.ping("a", target, "-t", "1")
        assert code == 1
        assert "ime to live exceeded" in output or "Hop limit" in output, output
    assert net.ping("a", remote(v6), "-t", "2")[0] == 0


def test_path_mtu(net: Live, v6: bool) -> None:
    net.thread.sh("ip link set up0 mtu 1300")
    try:
        with net.socket("a", socket.SOCK_DGRAM, net.a.ip(v6)) as client:
            option = (41, 23) if v6 else (0, 10)  # IPV6_MTU_DISCOVER, IP_MTU_DISCOVER
            client.setsockopt(*option, 2)  # always, and tell
            client.connect((remote(v6), 9000))
            client.send(bytes(1400))
            with pytest.raises(OSError, match="Message too long") as raised:
                client.recv(1)  # the error that the node's kernel sent
            assert raised.value.errno == errno.EMSGSIZE
    finally:
        net.thread.sh("ip link set up0 mtu 1500")
        net.spaces["a"].sh("ip route flush cache", "ip -6 route flush cache")


def test_revoking_cuts_a_stream(net: Live, v6: bool) -> None:
    with (
        net.socket("b", socket.SOCK_STREAM, net.b.ip(v6), 8000) as server,
        net.socket("a", socket.SOCK_STREAM, net.a.ip(v6)) as client,
    ):
        client.connect((net.b.ip(v6), 8000))
        connection, _ = server.accept()
        with connection:
            connection.settimeout(0.5)
            client.send(b"before")
            assert connection.recv(100) == b"before"
            net.policy(net.b, [Rule(True)])
            client.send(b"after")
            with pytest.raises(TimeoutError):
                connection.recv(100)
            net.policy(net.b, ALLOW_ALL)
            connection.settimeout(3)
            assert connection.recv(100) == b"after"  # retransmitted, picked up again


def test_denied_connections_are_counted(net: Live, v6: bool) -> None:
    net.policy(net.b, [])
    before = net.metrics().get((133, IN), (0, 0))[0]
    with net.socket("a", socket.SOCK_STREAM, net.a.ip(v6)) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.connect((net.b.ip(v6), 8000))
    assert net.metrics()[133, IN][0] > before


def test_a_tagged_packet_is_dropped(net: Live) -> None:
    """The tag is in the packet's metadata, where a test run cannot put it."""
    before = net.metrics().get((182, OUT), (0, 0))[0]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            inner = IP(src=net.a.ip4, dst=net.b.ip4) / UDP(sport=1, dport=2)
            raw.send(bytes(Ether(src=net.a.mac, dst=net.a.node_mac) / Dot1Q(vlan=5) / inner))

    net.spaces["a"].call(send)
    assert net.metrics()[182, OUT][0] == before + 1


@pytest.mark.parametrize("tags", [1, 2, 3])
def test_a_tag_of_vlan_0_hides_nothing(net: Live, v6: bool, tags: int) -> None:
    """The kernel takes such tags off after the programs have run: the packet is the node's."""
    node, world = (NODE6, "2001:db8::fe") if v6 else (NODE4, "192.0.2.254")
    header: Packet = IPv6(src=world, dst=node) if v6 else IP(src=world, dst=node)
    for _ in range(tags):
        header = Dot1Q(vlan=0, prio=5) / header
    frame = Ether(src=GATEWAY_MAC, dst="02:00:00:00:01:01") / header / UDP(sport=1, dport=7777)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            raw.send(bytes(frame / b"tagged"))

    net.ping("node", world)  # who is where
    with net.socket("node", socket.SOCK_DGRAM, node, 7777) as server:
        server.settimeout(0.3)
        net.host([Rule(True)])
        net.spaces["world"].call(send)
        with pytest.raises(TimeoutError):
            server.recv(64)
        net.host([Rule(True), Rule(False)])
        net.spaces["world"].call(send)
        if tags < 3:
            assert server.recv(64) == b"tagged"


def test_world_cannot_reach_in_by_the_stack(net: Live, v6: bool) -> None:
    """With a route to the endpoint the world is let in by policy, past the FORWARD chain."""
    prefix = "fd00:c111::/64" if v6 else "10.217.0.0/16"
    via = "2001:db8::1" if v6 else "192.0.2.1"
    net.spaces["world"].sh(f"ip route replace {prefix} via {via}")
    try:
        assert net.ping("world", net.a.ip(v6))[0] == 0
        net.policy(net.a, [Rule(True), Rule(False, net.b.identity)])
        assert net.ping("world", net.a.ip(v6))[0] != 0
    finally:
        net.spaces["world"].sh(f"ip route del {prefix}")


def test_an_answer_that_cannot_be_written(net: Live) -> None:
    """A solicitation whose sender leaves a checksum to the device, beyond where the answer ends:
    the kernel does not cut such a packet short."""
    question = (
        Ether(src=net.a.mac, dst=net.a.node_mac)
        / IPv6(src=net.a.ip6, dst=ROUTER6, hlim=255)
        / ICMPv6ND_NS(tgt=ROUTER6)
        / ICMPv6NDOptSrcLLAddr(lladdr=net.a.mac)
        / Raw(struct.pack("BB", 14, 16) + bytes(126))  # a nonce (RFC 3971), long
    )

    def send(start: int) -> None:
        header = struct.pack("=BBHHHH", NEEDS_CHECKSUM if start else 0, 0, 0, 0, start, 0)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            raw.bind(("eth0", 0))
            raw.send(header + bytes(question))

    def dropped() -> int:
        found = net.metrics().items()
        return sum(n for (reason, _), (n, _) in found if reason == dropreason.WRITE_ERROR)

    net.spaces["a"].call(lambda: send(0))
    assert dropped() == 0
    net.spaces["a"].call(lambda: send(150))
    assert dropped() == 1
