"""What Network keeps and leaves behind: threads, descriptors, processes; and whom it answers to."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import os
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from cilia.net.device import DeviceAddress, Network
from cilia.net.errors import NetworkError
from cilia.net.netns import NetNS, in_netns
from cilia.net.rtnl import open_watcher
from cilia.net.watch import watch_network

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

_number = itertools.count(1)


@pytest.fixture
def new_netns() -> Iterator[Callable[[], NetNS]]:
    """Makes open namespaces that are removed afterwards."""
    made: list[tuple[str, NetNS]] = []

    def make() -> NetNS:
        name = f"cilt-{os.getpid()}-nl{next(_number)}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        netns = NetNS.open(f"/run/netns/{name}")
        made.append((name, netns))
        return netns

    try:
        yield make
    finally:
        for name, netns in made:
            netns.close()
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def node(new_netns: Callable[[], NetNS]) -> NetNS:
    return new_netns()


@pytest.fixture
def workload(new_netns: Callable[[], NetNS]) -> NetNS:
    return new_netns()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> str:
    return "".join(p.read_text() for p in Path("/proc/self/task").glob("*/children"))


def test_200_endpoints_come_and_go_without_a_trace(node: NetNS, workload: NetNS) -> None:
    """As the agent does it: sockets opened and closed for every endpoint."""

    def cycle(number: int) -> None:
        with Network(node) as host, Network(workload) as inside:
            pair = host.ensure_veth("cil00042", inside, "eth0", up=number % 2 == 0)
            own = ip_interface(f"10.217.0.{number % 250 + 2}/32")
            inside.ensure_address(pair.peer_index, own)
            host.ensure_neighbour(pair.host_index, own.ip, pair.peer_mac)
            assert not children()
            assert host.delete_link("cil00042")

    gc.collect()  # the event loops of other tests
    cycle(0)  # what is opened once for all, by imports
    before = descriptors(), threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(200):
            cycle(number)
    assert (descriptors(), threading.active_count()) == before


def test_a_long_lived_socket_does_not_grow(node: NetNS) -> None:
    with Network(node) as host:
        index = host.ensure_host_pair().host_index
        before = descriptors()
        for _ in range(300):
            assert host.link(index).name == "cilia_host"
            assert host.find_link("absent") is None
        assert descriptors() == before
        assert not select.select([host._nl._socket], [], [], 0)[0]  # every answer was taken


def test_any_thread_may_use_it_and_stays_where_it_is(node: NetNS, workload: NetNS) -> None:
    own = Path("/proc/thread-self/ns/net").stat().st_ino
    with ThreadPoolExecutor(1) as other, Network(node) as host:
        host.ensure_veth("cil00042", host, "far")
        found = other.submit(host.links).result()
        assert {link.name for link in found} == {"lo", "cil00042", "far"}
        assert other.submit(Path("/proc/thread-self/ns/net").stat).result().st_ino == own

        # Without a namespace it is the one of the thread that makes the Network.
        def names() -> set[str]:
            with Network() as here:
                return {link.name for link in here.links()}

        assert in_netns(workload, names) == {"lo"}
        assert in_netns(node, names) == {"lo", "cil00042", "far"}


async def test_it_works_below_a_running_loop(node: NetNS) -> None:
    with Network(node) as host:
        host.ensure_host_pair()
        assert host.link("cilia_host").up


def test_closing_may_be_repeated_and_gives_the_namespace_up(node: NetNS) -> None:
    host = Network(node)
    host.close()
    host.close()
    with pytest.raises(NetworkError):
        host.links()


def test_what_cannot_be_opened_leaves_nothing(node: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    Network(node).close()
    before = descriptors(), threading.active_count()

    def refuse(_: NetNS) -> None:
        raise NetworkError("cannot enter", errno.EPERM)

    monkeypatch.setattr("cilia.net.netns.enter", refuse)
    with pytest.raises(NetworkError, match="cannot enter"):
        Network(node)
    assert (descriptors(), threading.active_count()) == before


def test_requests_made_together_are_made_in_order_and_all_are_tried(node: NetNS) -> None:
    with Network(node) as host:
        index = host.ensure_host_pair().host_index
        with host.together():
            host.ensure_address(index, ip_interface("10.9.0.1/32"))
            # The kernel takes no source address that is not there yet.
            host.ensure_route(
                ip_network("10.8.0.0/16"), device=index, source=ip_address("10.9.0.1")
            )
        assert "10.8.0.0/16" in {str(r.destination) for r in host.routes()}

        def one_fails() -> None:
            with host.together():
                host.ensure_route(ip_network("10.7.0.0/16"), device=999)
                host.ensure_address(index, ip_interface("10.9.9.9/32"))
                host.ensure_address(index, ip_interface("10.9.9.9/32"))  # its error is ignored

        with pytest.raises(NetworkError, match=r"route to 10.7"):
            one_fails()
        assert "10.9.9.9" in {str(a.interface.ip) for a in host.addresses(index)}
        assert host.link(index).name == "cilia_host"  # nothing is left to be read

        def none_is_sent() -> None:
            with host.together():
                host.ensure_address(index, ip_interface("10.9.9.8/32"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            none_is_sent()
        assert "10.9.9.8" not in {str(a.interface.ip) for a in host.addresses(index)}


def test_the_library_is_imported_by_the_first_request() -> None:
    code = "import sys, cilia.net.device, cilia.net.watch; sys.exit('pyroute2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_halves_of_the_world_are_routes_too(node: NetNS) -> None:
    """Their network address is all zeros, which the library takes for the default route's."""
    with Network(node) as host:
        host.ensure_host_pair()
        for text in ("0.0.0.0/1", "::/1", "0.0.0.0/0", "::/0"):
            host.ensure_route(ip_network(text), device="cilia_host", priority=7, table=300)
        found = host.routes(table=300)
        assert {str(r.destination) for r in found} == {"0.0.0.0/1", "::/1", "0.0.0.0/0", "::/0"}
        assert {(r.priority, r.table, r.type) for r in found} == {(7, 300, 1)}
        assert not host.routes(table=301)
        assert {r.table for r in host.routes(table=None)} == {254, 255, 300}
        assert host.delete_route(ip_network("0.0.0.0/1"), table=300) is True
        assert host.delete_route(ip_network("::/1"), device="cilia_host", table=300) is True
        assert {r.destination.prefixlen for r in host.routes(table=300)} == {0}


def test_links_without_a_mac_and_names_of_ours(node: NetNS) -> None:
    name = Path(node.name).name
    subprocess.run(["ip", "-n", name, "tuntap", "add", "tun9", "mode", "tun"], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "tun9", "alias", "a tunnel"], check=True)
    with Network(node) as host:
        link = host.link("tun9")
        assert (link.kind, link.mac, link.alias) == ("tun", "", "a tunnel")
        host.rename_link("tun9", "tun8")
        assert host.link(link.index).name == "tun8"
        host.ensure_host_pair()
        host.ensure_neighbour("cilia_host", ip_address("10.9.9.9"), "02:00:00:00:00:0A")
        [neighbour] = [n for n in host.neighbours("cilia_host") if n.permanent]
        assert (str(neighbour.address), neighbour.mac) == ("10.9.9.9", "02:00:00:00:00:0a")


async def test_lost_changes_are_told_and_later_ones_heard(
    node: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's buffer overflows; the watch says so and goes on."""

    def narrow(netns: NetNS | None, groups: int) -> object:
        watcher = open_watcher(netns, groups)
        watcher.setsockopt(1, 8, 2048)  # SOL_SOCKET, SO_RCVBUF
        return watcher

    monkeypatch.setattr("cilia.net.watch.open_watcher", narrow)
    gc.collect()
    before = descriptors()
    with Network(node) as host:
        host.ensure_host_pair()
        async with asyncio.timeout(20), watch_network(node) as batches:
            for number in range(50):
                host.ensure_address("cilia_host", ip_interface(f"10.9.0.{number}/32"))
            batch = await anext(batches)
            assert batch.overrun
            host.ensure_address("cilia_host", ip_interface("10.9.9.9/32"))
            async for batch in batches:
                what = [event.what for event in batch.events]
                assert not batch.overrun
                if any(
                    isinstance(w, DeviceAddress) and str(w.interface.ip) == "10.9.9.9" for w in what
                ):
                    break
    assert descriptors() == before
