"""Links, addresses, routes, neighbours and sysctls in real namespaces."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from cilia.errors import Kind
from cilia.net import mount, sysctl
from cilia.net.device import ROUTE_PROTOCOL, DeviceAddress, InvalidInterfaceName, Link, Network
from cilia.net.errors import (
    InterfaceExists,
    InterfaceGone,
    NamespaceError,
    NamespaceGone,
    NetworkError,
)
from cilia.net.netns import NetNS, in_netns, netns_cookie
from cilia.net.watch import watch_network

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

_number = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def sweep() -> None:
    """Removes the namespaces of runs that were killed."""
    for path in Path("/run/netns").glob("cilt-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True)


@pytest.fixture
def new_netns() -> Iterator[Callable[[], str]]:
    """Makes namespaces that are removed afterwards; returns their names."""
    names: list[str] = []

    def make() -> str:
        name = f"cilt-{os.getpid()}-{next(_number)}"
        names.append(name)
        subprocess.run(["ip", "netns", "add", name], check=True)
        return name

    try:
        yield make
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def node(new_netns: Callable[[], str]) -> Iterator[NetNS]:
    """Stands for the node: tests must not touch the machine's own namespace."""
    with NetNS.open(f"/run/netns/{new_netns()}") as netns:
        yield netns


@pytest.fixture
def workload(new_netns: Callable[[], str]) -> Iterator[NetNS]:
    with NetNS.open(f"/run/netns/{new_netns()}") as netns:
        yield netns


# ---- namespaces


def test_a_namespace_is_entered_by_another_thread_only(node: NetNS) -> None:
    before = Path("/proc/thread-self/ns/net").stat().st_ino
    inside = in_netns(node, lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
    assert inside == node.inode[1] != before
    assert Path("/proc/thread-self/ns/net").stat().st_ino == before
    assert not [t for t in threading.enumerate() if t.name == "in-netns"]


def test_what_fails_inside_is_raised_outside(node: NetNS) -> None:
    with pytest.raises(ZeroDivisionError):
        in_netns(node, lambda: 1 // 0)


def test_cookies_tell_namespaces_apart(node: NetNS, workload: NetNS) -> None:
    cookies = {node.cookie, workload.cookie, netns_cookie()}
    assert None not in cookies
    assert len(cookies) == 3


def test_by_pid_is_the_same_namespace(node: NetNS) -> None:
    with subprocess.Popen(
        ["ip", "netns", "exec", Path(node.name).name, "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        process.stdout.readline()  # it is inside by now
        with NetNS.of_pid(process.pid) as found:
            assert found == node
        process.stdin.close()
    with pytest.raises(NamespaceGone, match=f"no process {process.pid}") as caught:
        NetNS.of_pid(process.pid)
    assert "pid" in caught.value.cure


def test_what_is_no_namespace_is_explained(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with pytest.raises(NamespaceError, match="plain is not a network namespace"):
        NetNS.open(tmp_path / "plain")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NamespaceError, match="fifo is not a network namespace"):
        NetNS.open(tmp_path / "fifo")
    with pytest.raises(NamespaceError, match="not a network namespace") as caught:
        NetNS.open("/proc/self/ns/mnt")
    assert "called `net`" in caught.value.cure
    with pytest.raises(NamespaceGone, match="no network namespace /run/netns/cilt-gone"):
        NetNS.open("/run/netns/cilt-gone")
    with pytest.raises(NamespaceError, match="is the node's own"):
        NetNS.open("/proc/self/ns/net")
    with pytest.raises(NamespaceError, match=f"of process {os.getpid()} is the node's own"):
        NetNS.of_pid(os.getpid())


# ---- links


def test_veth_is_made_once_and_adjusted(node: NetNS, workload: NetNS) -> None:
    with Network(node) as host, Network(workload) as inside:
        first = host.ensure_veth("cil00042", inside, "eth0", mtu=1400, peer_mac="02:00:00:00:00:07")
        again = host.ensure_veth("cil00042", inside, "eth0", mtu=1400, peer_mac="02:00:00:00:00:07")
        assert first == again
        assert again.peer_mac == "02:00:00:00:00:07"
        other = host.ensure_veth("cil00042", inside, "eth0", mtu=1450, host_mac="02:00:00:00:00:08")
        assert (other.host_index, other.host_mac) == (first.host_index, "02:00:00:00:00:08")
        link = inside.link("eth0")
        assert (link.kind, link.mtu, link.up, link.carrier) == ("veth", 1450, True, True)
        assert host.link("cil00042").up
        assert {x.name for x in inside.links()} == {"lo", "eth0"}


def test_veth_of_a_replaced_namespace_is_made_anew(
    node: NetNS, new_netns: Callable[[], str]
) -> None:
    with NetNS.open(f"/run/netns/{new_netns()}") as old, Network(node) as host:
        with Network(old) as inside:
            first = host.ensure_veth("cil00042", inside, "eth0")
        with NetNS.open(f"/run/netns/{new_netns()}") as new, Network(new) as inside:
            second = host.ensure_veth("cil00042", inside, "eth0")
            assert second.host_index != first.host_index
            assert inside.link("eth0").link == second.host_index
        with Network(old) as inside:
            assert inside.find_link("eth0") is None


def test_names_of_others_are_refused(node: NetNS, workload: NetNS) -> None:
    with Network(node) as host, Network(workload) as inside:
        inside.ensure_veth("eth0", inside, "other")
        with pytest.raises(InterfaceExists, match=f"eth0 in {workload.name} exists") as caught:
            host.ensure_veth("cil00042", inside, "eth0")
        assert caught.value.kind is Kind.CONFLICT
        assert host.find_link("cil00042") is None
        subprocess.run(
            ["ip", "-n", Path(node.name).name, "link", "add", "cil00043", "type", "bridge"],
            check=True,
        )
        with pytest.raises(InterfaceExists, match="not a veth device"):
            host.ensure_veth("cil00043", inside, "eth1")
        assert host.link("cil00043").kind == "bridge"
        for name in ("", "a" * 16, "a/b", "a b", ".."):
            with pytest.raises(InvalidInterfaceName):
                host.ensure_veth(name, inside, "eth1")


def test_deleting_is_idempotent_and_takes_both_ends(node: NetNS, workload: NetNS) -> None:
    with Network(node) as host, Network(workload) as inside:
        host.ensure_veth("cil00042", inside, "eth0")
        assert host.delete_link("cil00042") is True
        assert host.delete_link("cil00042") is False
        assert inside.find_link("eth0") is None
        with pytest.raises(InterfaceGone, match=f"no interface eth0 in {workload.name}"):
            inside.ensure_address("eth0", ip_interface("10.0.0.1/32"))


def test_host_pair(node: NetNS) -> None:
    with Network(node) as host:
        pair = host.ensure_host_pair(mtu=1500)
        assert host.ensure_host_pair(mtu=1500) == pair
        assert host.link("cilia_host").link == host.link("cilia_net").index == pair.peer_index


def test_a_working_endpoint(node: NetNS, workload: NetNS) -> None:
    """Both families end to end over on-link gateways, without asking for any neighbour."""
    with Network(node) as host, Network(workload) as inside:
        for _ in range(2):  # all of it may be repeated
            pair = host.ensure_veth("cil00042", inside, "eth0", mtu=1500)
            host.ensure_host_pair()
            sysctl.set_device("eth0", sysctl.WORKLOAD, netns=workload)
            sysctl.set_device("cil00042", sysctl.HOST_SIDE, netns=node)
            for router, own in (
                (ip_interface("10.217.0.1/32"), ip_interface("10.217.0.5/32")),
                (ip_interface("fd00:c111::1/128"), ip_interface("fd00:c111::5/128")),
            ):
                host.ensure_address("cilia_host", router)
                inside.ensure_address("eth0", own)
                inside.ensure_route(ip_network(router), device="eth0")
                everywhere = "0.0.0.0/0" if router.version == 4 else "::/0"
                inside.ensure_route(ip_network(everywhere), device="eth0", gateway=router.ip)
                inside.ensure_neighbour("eth0", router.ip, pair.host_mac)
                host.ensure_route(ip_network(own), device="cil00042", source=router.ip)
                host.ensure_neighbour("cil00042", own.ip, pair.peer_mac)
        for gateway, here in (("10.217.0.1", "10.217.0.5"), ("fd00:c111::1", "fd00:c111::5")):
            family = socket.AF_INET6 if ":" in here else socket.AF_INET

            def datagrams(family: int = family) -> socket.socket:
                return socket.socket(family, socket.SOCK_DGRAM)

            def listen(family: int = family, here: str = here) -> socket.socket:
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sock.bind((here, 5000))
                sock.settimeout(5)
                return sock

            with (
                in_netns(workload, listen) as server,
                in_netns(node, datagrams) as client,
            ):
                client.settimeout(5)
                client.sendto(b"hello", (here, 5000))
                data, source = server.recvfrom(100)
                assert data == b"hello"
                assert source[0] == gateway  # the route's source address
                server.sendto(b"world", source)
                assert client.recv(100) == b"world"
        neighbours = host.neighbours("cil00042")
        assert {str(n.address) for n in neighbours if n.permanent} == {"10.217.0.5", "fd00:c111::5"}
        ours = [r for r in host.routes() if r.protocol == ROUTE_PROTOCOL]
        assert {str(r.destination) for r in ours} == {"10.217.0.5/32", "fd00:c111::5/128"}
        assert {str(r.source) for r in ours} == {"10.217.0.1", "fd00:c111::1"}
        defaults = inside.default_routes()
        assert {str(r.gateway) for r in defaults} == {"10.217.0.1", "fd00:c111::1"}


def test_removals_are_idempotent(node: NetNS) -> None:
    with Network(node) as host:
        host.ensure_host_pair()
        for text, router in (("10.9.0.0/24", "10.9.9.9"), ("fd00:9::/64", "fd00:9:9::9")):
            network, address = ip_network(text), ip_address(router)
            host.ensure_address("cilia_host", ip_interface(address))
            host.ensure_route(network, device="cilia_host", source=address, mtu=1400)
            host.ensure_neighbour("cilia_host", address, "02:00:00:00:00:01")
            assert host.delete_route(network, device="cilia_host") is True
            assert host.delete_route(network, device="cilia_host") is False
            assert host.delete_neighbour("cilia_host", address) is True
            assert host.delete_neighbour("cilia_host", address) is False
            assert host.delete_address("cilia_host", ip_interface(address)) is True
            assert host.delete_address("cilia_host", ip_interface(address)) is False
            assert host.delete_route(network, device="absent") is False
            assert host.delete_neighbour("absent", address) is False
            assert host.delete_address("absent", ip_interface(address)) is False


def test_a_route_moves_to_another_device(node: NetNS) -> None:
    with Network(node) as host:
        pair = host.ensure_host_pair()
        for text in ("10.9.0.5/32", "fd00:9::5/128"):
            network = ip_network(text)
            host.ensure_route(network, device="cilia_host")
            host.ensure_route(network, device="cilia_net")
            found = [r.index for r in host.routes() if r.destination == network]
            assert found == [pair.peer_index]


def test_errors_carry_the_kernels_reason(node: NetNS) -> None:
    with Network(node) as host:
        host.ensure_host_pair()
        with pytest.raises(NetworkError, match="cannot change cilia_host") as caught:
            host.ensure_link("cilia_host", mtu=100_000_000)
        assert caught.value.errno == errno.EINVAL
        assert "EINVAL" in caught.value.message
        assert "maximum" in caught.value.message  # from the extended acknowledgement


def test_host_devices_and_pool_overlap(node: NetNS) -> None:
    with Network(node) as host:
        host.ensure_veth("uplink", host, "far")
        host.ensure_host_pair()
        host.ensure_address("cilia_host", ip_interface("10.217.0.1/32"))
        host.ensure_address("uplink", ip_interface("192.0.2.7/24"), prefix_route=True)
        host.ensure_address("uplink", ip_interface("2001:db8::7/64"))
        host.ensure_route(ip_network("0.0.0.0/0"), device="uplink", gateway=ip_address("192.0.2.1"))
        [device] = host.host_devices()
        assert (device.name, device.default_route) == ("uplink", True)
        assert {str(a) for a in device.addresses} == {"192.0.2.7/24", "2001:db8::7/64"}
        [overlap] = host.overlapping_routes(ip_network("192.0.0.0/16"))
        assert str(overlap.destination) == "192.0.2.0/24"
        assert not host.overlapping_routes(ip_network("10.217.0.0/16"))
        assert not host.overlapping_routes(ip_network("192.0.0.0/16"), ignore_devices=["uplink"])


def test_sysctls_are_those_of_the_namespace(node: NetNS, workload: NetNS) -> None:
    with Network(node) as host, Network(workload) as inside:
        host.ensure_veth("cil00042", inside, "cilt-wl0")
    sysctl.set_device("cilt-wl0", sysctl.WORKLOAD, netns=workload)
    assert sysctl.get_device("cilt-wl0", "ipv6/accept_ra", netns=workload) == "0"
    assert sysctl.get_device("cilt-wl0", "ipv6/accept_ra") is None
    sysctl.write("ipv4/ip_forward", "1", netns=workload)
    sysctl.write("ipv4/ip_forward", "0", netns=node)
    assert sysctl.read("ipv4/ip_forward", netns=workload) == "1"
    assert sysctl.read("ipv4/ip_forward", netns=node) == "0"
    with pytest.raises(InterfaceGone, match="no interface eth9"):
        sysctl.set_device("eth9", sysctl.WORKLOAD, netns=workload)


def test_the_socket_outlives_the_namespaces_name(new_netns: Callable[[], str]) -> None:
    name = new_netns()
    with NetNS.open(f"/run/netns/{name}") as netns:
        inside = Network(netns)
    subprocess.run(["ip", "netns", "del", name], check=True)
    with inside:
        assert inside.ensure_host_pair().host_index > 0


async def test_changes_are_heard(node: NetNS) -> None:
    with Network(node) as host:
        async with asyncio.timeout(10), watch_network(node) as batches:
            host.ensure_host_pair()
            host.ensure_address("cilia_host", ip_interface("10.9.9.9/32"))
            host.ensure_route(ip_network("10.9.0.0/24"), device="cilia_host")
            host.delete_link("cilia_host")
            seen: set[str] = set()
            async for batch in batches:
                assert not batch.overrun
                for event in batch.events:
                    if isinstance(event.what, Link):
                        seen.add(f"{'-' if event.deleted else '+'}{event.what.name}")
                    elif isinstance(event.what, DeviceAddress):
                        seen.add(f"+{event.what.interface}")
                    else:
                        seen.add(f"+{event.what.destination}")
                if "-cilia_host" in seen:
                    break
            assert {"+cilia_host", "+cilia_net", "+10.9.9.9/32", "+10.9.0.0/24"} <= seen


# ---- mounts


def test_bpffs_is_mounted_once(tmp_path: Path) -> None:
    root = Path("/run") / f"cilt-{os.getpid()}" / "bpf"
    try:
        assert mount.mount_bpffs(root) is True
        assert mount.mount_bpffs(root) is False
        assert mount.is_bpffs(root)
        (root / "cilia").mkdir()
        assert mount.umount_bpffs(root / "cilia") is False
        assert mount.umount_bpffs(root) is True
        assert mount.umount_bpffs(root) is False
        (root / "precious").touch()
        with pytest.raises(mount.MountError, match="is not empty"):
            mount.mount_bpffs(root)
        (root / "precious").unlink()
    finally:
        subprocess.run(["umount", "-l", str(root)], check=False, capture_output=True)
        root.rmdir()
        root.parent.rmdir()
    assert mount.umount_bpffs(tmp_path / "absent") is False


def test_cgroup2_is_found(tmp_path: Path) -> None:
    assert mount.filesystem_magic(mount.find_cgroup2()) == 0x63677270
    (tmp_path / "mountinfo").write_text("22 1 0:20 / /proc rw - proc proc rw\n")
    with pytest.raises(mount.MountError, match="not mounted"):
        mount.find_cgroup2(tmp_path / "mountinfo")
