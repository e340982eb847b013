"""A node for the datapath's tests: a private network namespace, both objects, and their maps.

A packet is built with Scapy and run through a loaded program by BPF_PROG_TEST_RUN, on behalf of a
real interface. What comes back is the verdict, the packet, the events and the change of the
counters; the next program may take it from there. The namespace belongs to one worker thread, so
the test's own thread never changes its own, and nothing of it outlives the process.
"""

from __future__ import annotations

import functools
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from cilia.bpf import BpfError, Map, Object, RingReader, SkBuffCtx, constants, layout, probe
from cilia.bpf.auditor import Auditor
from cilia.bpf.libbpf import lib
from cilia.bpf.uapi import MapType

REPOSITORY: Final = Path(__file__).resolve().parents[2]
OBJECTS: Final = REPOSITORY / "build" / "bpf"

TC_OK, TC_SHOT, TC_REDIRECT = 0, 2, 7
IN, OUT = constants.DIR_INGRESS, constants.DIR_EGRESS
HOST, WORLD4, WORLD6 = 1, 9, 10
HOST_SLOT = 60
CLONE_NEWNET: Final = 0x40000000
BPF_F_NO_PREALLOC: Final = 1

ROUTER4, ROUTER6, ROUTER_LL = "10.217.0.1", "fd00:c111::1", "fe80::c111"
NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
REMOTE4, REMOTE6 = "203.0.113.9", "2001:db8:9::9"
GATEWAY_MAC = "02:00:00:00:fe:01"
SMALL = {
    "cilia_ipcache": 4096,
    "cilia_ct": 4096,
    "cilia_nat": 4096,
    "cilia_frag": 1024,
    "cilia_policy": 64,
    "cilia_policy_meta": 64,
    "cilia_events": 1 << 20,
}

T = TypeVar("T")


def build_objects() -> None:
    """Compile what is older than its sources, as `make bpf` does."""
    subprocess.run(
        ["make", "-s", "bpf-objects"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL
    )


class Thread:
    """A thread in a network namespace of its own, which goes when the thread does."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        self.call(lambda: os_unshare(CLONE_NEWNET))

    def _loop(self) -> None:
        while (item := self._work.get()) is not None:
            function, future = item
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the namespace and return its result."""
        future: Future[T] = Future()
        self._work.put((function, future))
        return future.result(timeout=60)

    def sh(self, *commands: str) -> None:
        """Run shell commands in the namespace; one that fails is an error."""
        for command in commands:
            self.call(
                lambda command=command: subprocess.run(  # type: ignore[misc]
                    command, shell=True, check=True, capture_output=True, text=True
                )
            )

    def close(self) -> None:
        """End the thread; its namespace goes with it."""
        self._work.put(None)
        self._thread.join(timeout=10)


def os_unshare(flags: int) -> None:
    """unshare(2), which Python has from 3.12 on."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


@dataclass(frozen=True)
class Endpoint:
    """One local endpoint of the node."""

    name: str
    id: int
    identity: int
    ip4: str
    ip6: str
    mac: str
    node_mac: str
    ifindex: int
    slot: int

    def ip(self, v6: bool) -> str:
        """Its address of one family."""
        return self.ip6 if v6 else self.ip4


@dataclass(frozen=True)
class Rule:
    """A row of a policy map."""

    egress: bool
    identity: int = 0
    proto: int = 0
    port: int = 0
    plen: int = 0
    deny: bool = False
    audit: bool = False
    id: int = 1
    proxy: int = 0
    watch: bool = False


def allow(egress: bool, **fields: Any) -> Rule:
    """A row that allows, everything unless told."""
    return Rule(egress, **fields)


ALLOW_ALL = (Rule(True, id=101), Rule(False, id=102))


@dataclass
class Result:
    """What a program did with a packet."""

    verdict: int
    raw: bytes
    events: Any
    metrics: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    mark: int = 0

    @property
    def packet(self) -> Packet:
        """The packet as it left."""
        return Ether(self.raw)

    def of(self, kind: int) -> list[Any]:
        """The events of one type, in order."""
        return [e for e in self.events if e["type"] == kind]

    @property
    def drops(self) -> list[int]:
        """The reasons of the drop events."""
        return [int(e["reason"]) for e in self.of(constants.EVENT_DROP)]

    @property
    def verdicts(self) -> list[Any]:
        """The policy verdict events."""
        return self.of(constants.EVENT_VERDICT)

    @property
    def traces(self) -> list[int]:
        """The observation points of the trace events."""
        return [int(e["obs_point"]) for e in self.of(constants.EVENT_TRACE)]


def mac_bytes(mac: str) -> bytes:
    """Six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


class Node:
    """Both objects loaded in a namespace with endpoints `a`, `b` and an uplink."""

    def __init__(self, *, rodata: dict[str, bytes | int] | None = None, **sizes: int) -> None:
        self.thread = Thread()
        try:
            self._setup(rodata or {}, sizes)
        except BaseException:
            self.thread.close()
            raise

    def _setup(self, rodata: dict[str, bytes | int], sizes: dict[str, int]) -> None:
        self._links()
        values: dict[str, bytes | int] = {
            "ROUTER_IP4": layout.to_addr(ROUTER4),
            "ROUTER_IP6": layout.to_addr(ROUTER6),
            "ROUTER_LL6": layout.to_addr(ROUTER_LL),
            "HAVE_KTIME_COARSE": int(probe.has_helper("bpf_ktime_get_coarse_ns")),
            **rodata,
        }
        map_sizes = SMALL | sizes
        # A bpffs for as long as the second object needs to find the first one's maps.
        self.bpffs = Path(f"/run/cilt-{os.getpid()}-{id(self):x}")
        self.bpffs.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", str(self.bpffs)], check=True)
        try:
            self.objects = []
            for name in ("bpf_lxc", "bpf_host", "bpf_audit"):
                path = OBJECTS / f"{name}.o"
                with Object.open(path) as bare:  # constants that it uses; others are an error
                    used = bare.rodata()
                obj = Object.open(
                    path,
                    rodata={key: value for key, value in values.items() if key in used},
                    pin_dir=self.bpffs,
                    map_sizes=map_sizes,
                    layouts=layout.CILIA,
                    unpinned=("cilia_work",),
                )
                self.configure(obj)
                obj.load()
                self.objects.append(obj)
        finally:
            subprocess.run(["umount", "-l", str(self.bpffs)], check=True)
            self.bpffs.rmdir()
        lxc, host, audit = self.objects
        self.programs = {
            "from_endpoint": lxc.program("from_endpoint"),
            "to_endpoint": lxc.program("to_endpoint"),
            "from_netdev": host.program("from_netdev"),
            "to_netdev": host.program("to_netdev"),
            "assign_socket": host.program("assign_socket"),
        }
        self.lxc = lxc
        self.auditor = Auditor(audit.program("audit_policy"), audit.program("audit_selftest"))
        self.ring = RingReader(lxc.map("cilia_events"), layout.EVENT, lost=lxc.map("cilia_lost"))
        self._inner: dict[int, Map] = {}
        self._rev = 0
        self.reset()

    def configure(self, obj: Object) -> None:
        """What a test wants otherwise, before an object is loaded."""

    def close(self) -> None:
        """Let go of everything."""
        self.ring.close()
        for obj in self.objects:
            obj.close()
        self.thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the namespace

    def _links(self) -> None:
        self.thread.sh(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
            " net.ipv6.conf.default.accept_dad=0",
            "ip link set lo up",
        )
        for name, address in (("cila", "0a"), ("cilb", "0b"), ("cilc", "0c"), ("up0", "01")):
            self.thread.sh(
                f"ip link add {name} address 02:00:00:00:{address}:01 type veth"
                f" peer name {name}w address 02:00:00:00:{address}:02",
                f"ip link set {name} up && ip link set {name}w up",
            )
        self.thread.sh(
            f"ip addr add {NODE4}/24 dev up0",
            f"ip addr add {NODE6}/64 dev up0 nodad",
            "ip route add default via 192.0.2.254 dev up0",
            "ip -6 route add default via 2001:db8::fe dev up0",
            f"ip neigh add 192.0.2.254 lladdr {GATEWAY_MAC} dev up0",
            f"ip neigh add 2001:db8::fe lladdr {GATEWAY_MAC} dev up0",
            "ip route add blackhole 198.51.100.0/24",
            "ip -6 route add blackhole 2001:db8:bad::/48",
        )

    def ifindex(self, name: str) -> int:
        """The number of a device of the namespace."""
        import socket

        return self.thread.call(lambda: socket.if_nametoindex(name))

    # ---- the state

    def reset(self) -> None:
        """Two open endpoints that allow everything; world, host and router in the ipcache."""
        for name in (
            "cilia_lxc", "cilia_ifindex", "cilia_ipcache", "cilia_ct", "cilia_nat",
            "cilia_proxy_pair",
        ):  # fmt: skip
            table = self.map(name)
            for key in list(table.keys()):
                table.delete(key)
        for key in list(self.map("cilia_frag").keys()):
            self.map("cilia_frag").delete(key)
        self.up = self.ifindex("up0")
        self.runtime()
        self.ipcache("0.0.0.0/0", WORLD4)
        self.ipcache("::/0", WORLD6)
        for prefix in (f"{NODE4}/32", f"{NODE6}/128", f"{ROUTER4}/32", f"{ROUTER6}/128"):
            self.ipcache(prefix, HOST)
        self.device(self.up, NODE4, NODE6)
        self.a = self.endpoint("a", 11, 1001)
        self.b = self.endpoint("b", 12, 1002)
        self.policy(self.a, ALLOW_ALL)
        self.policy(self.b, ALLOW_ALL)
        self.drain()

    def map(self, name: str) -> Map:
        """A map of the node."""
        return self.lxc.map(name)

    def runtime(self, **fields: int) -> None:
        """Write cilia_runtime: the defaults of the agent, and `fields`."""
        row = np.zeros(1, layout.RUNTIME)
        values = {
            "ipcache_epoch": 1,
            "flags": constants.RT_F_ALLOW_FRAG_NEEDED
            | constants.RT_F_MASQUERADE4
            | constants.RT_F_MASQUERADE6,
            "aggregation": 0,
            "report_interval_s": 5,
            "ct_tcp_s": 21600,
            "ct_tcp_syn_s": 60,
            "ct_tcp_fin_s": 10,
            "ct_any_s": 60,
        } | fields
        for name, value in values.items():
            row[name] = value
        self.map("cilia_runtime").update(bytes(4), row.tobytes())

    def endpoint(self, name: str, id: int, identity: int, *, flags: int | None = None) -> Endpoint:
        """Add endpoint `name` (its host side is device cil<name>), or change it."""
        octet = {"a": "0a", "b": "0b", "c": "0c"}[name]
        ep = Endpoint(
            name=name,
            id=id,
            identity=identity,
            ip4=f"10.217.0.{id}",
            ip6=f"fd00:c111::{id}",
            mac=f"02:00:00:00:{octet}:02",
            node_mac=f"02:00:00:00:{octet}:01",
            ifindex=self.ifindex(f"cil{name}"),
            slot=id,
        )
        row = np.zeros(1, layout.ENDPOINT)
        row["ifindex"], row["identity"], row["policy_slot"] = ep.ifindex, identity, ep.slot
        row["id"], row["flags"] = id, constants.EP_F_OPEN if flags is None else flags
        row["mac"], row["node_mac"] = mac_bytes(ep.mac), mac_bytes(ep.node_mac)
        row["ip4"], row["ip6"] = layout.to_addr(ep.ip4), layout.to_addr(ep.ip6)
        raw = row.tobytes()
        self.map("cilia_ifindex").update(ep.ifindex.to_bytes(4, "little"), raw)
        self.map("cilia_lxc").update(layout.to_addr(ep.ip4), raw)
        self.map("cilia_lxc").update(layout.to_addr(ep.ip6), raw)
        self.ipcache(f"{ep.ip4}/32", identity)
        self.ipcache(f"{ep.ip6}/128", identity)
        return ep

    def host(self, rules: Iterable[Rule] = (), *, flags: int = constants.EP_F_OPEN) -> Endpoint:
        """Make the node itself a subject of policy, with these rows."""
        host = Endpoint("host", 0, HOST, NODE4, NODE6, "", "", 1, HOST_SLOT)
        self.policy(host, rules)
        row = np.zeros(1, layout.ENDPOINT)
        row["ifindex"], row["identity"], row["policy_slot"] = 1, HOST, HOST_SLOT
        row["flags"] = flags | constants.EP_F_HOST
        self.map("cilia_ifindex").update(bytes(4), row.tobytes())
        return host

    def no_host(self) -> None:
        """No policy is about the node any more."""
        self.map("cilia_ifindex").delete(bytes(4))

    def device(self, ifindex: int, ip4: str | None, ip6: str | None, flags: int = 0) -> None:
        """Add a device with addresses to masquerade with."""
        row = np.zeros(1, layout.DEVICE)
        if ip4:
            row["ip4"] = layout.to_addr(ip4)
        if ip6:
            row["ip6"] = layout.to_addr(ip6)
        row["flags"] = flags
        self.map("cilia_devices").update(ifindex.to_bytes(4, "little"), row.tobytes())

    def ipcache(self, prefix: str, identity: int) -> None:
        """Give a prefix an identity."""
        address, _, bits = prefix.partition("/")
        key = np.zeros(1, layout.IPCACHE_KEY)
        key["prefixlen"] = int(bits) + (0 if ":" in address else 96)
        key["addr"] = layout.to_addr(address)
        value = np.zeros(1, layout.IPCACHE_VALUE)
        value["identity"] = identity
        self.map("cilia_ipcache").update(key.tobytes(), value.tobytes())

    def policy(self, ep: Endpoint, rules: Iterable[Rule], *, rev: int | None = None) -> int:
        """Replace the policy of an endpoint's slot, as the agent does. Returns the revision."""
        rules = tuple(rules)
        inner = Map.create(
            MapType.HASH, "policy", layout.POLICY_KEY.itemsize, layout.POLICY_VALUE.itemsize,
            16384, BPF_F_NO_PREALLOC,
        )  # fmt: skip
        meta = np.zeros(1, layout.POLICY_META)
        for rule in rules:
            key = np.zeros(1, layout.POLICY_KEY)
            key["identity"], key["proto"], key["dport_be"] = rule.identity, rule.proto, rule.port
            key["l4_plen_egress"] = layout.plen_egress(rule.plen, rule.egress)
            value = np.zeros(1, layout.POLICY_VALUE)
            value["rule_id"] = rule.id
            value["proxy_port_be"] = rule.proxy
            value["flags"] = (
                (constants.POLICY_F_DENY if rule.deny else 0)
                | (constants.POLICY_F_AUDIT if rule.audit else 0)
                | (constants.POLICY_F_WATCH if rule.watch else 0)
            )
            inner.update(key.tobytes(), value.tobytes())
            masks = meta["plens_id"] if rule.identity else meta["plens_any"]
            masks[0, int(rule.egress)] |= 1 << rule.plen
            if rule.deny:
                masks[0, int(rule.egress)] |= constants.POLICY_META_HAS_DENY
        self.map("cilia_policy").set_inner(ep.slot, inner)
        self._inner[ep.slot] = inner
        if rev is None:
            self._rev += 1
            rev = self._rev
        meta["rev"] = rev
        self.map("cilia_policy_meta").update(ep.slot.to_bytes(4, "little"), meta.tobytes())
        return rev

    def hits(self, ep: Endpoint, rule_id: int) -> int:
        """How often the row of rule `rule_id` decided."""
        _, values = self._inner[ep.slot].items_np(layout.POLICY_KEY, layout.POLICY_VALUE)
        return int(values["hits"][values["rule_id"] == rule_id].sum())

    # ---- looking

    def rows(self, name: str, key: Any, value: Any) -> list[tuple[Any, Any]]:
        """All rows of a map."""
        keys, values = self.map(name).items_np(key, value)
        return list(zip(keys, values, strict=True))

    def ct(self) -> list[tuple[Any, Any]]:
        """All conntrack rows."""
        return self.rows("cilia_ct", layout.CT_KEY, layout.CT_ENTRY)

    def nat(self) -> list[tuple[Any, Any]]:
        """All masquerade rows."""
        return self.rows("cilia_nat", layout.NAT_KEY, layout.NAT_VALUE)

    def frags(self) -> list[tuple[Any, Any]]:
        """All rows of unfinished datagrams."""
        return self.rows("cilia_frag", layout.FRAG_KEY, layout.FRAG_VALUE)

    def patch_ct(self, **fields: Any) -> None:
        """Change fields of the only conntrack row."""
        ((key, value),) = self.ct()
        value = value.copy()
        for name, what in fields.items():
            value[name] = what
        self.map("cilia_ct").update(key.tobytes(), value.tobytes())

    def metrics(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(reason, direction) -> (packets, bytes), of all CPUs."""
        _, values = self.map("cilia_metrics").items_np(np.dtype("u4"), layout.METRIC)
        keys, _ = self.map("cilia_metrics").items_np(np.dtype("u4"), layout.METRIC)
        found = {}
        for key, row in zip(keys.ravel(), values, strict=True):
            packets = int(row["packets"].sum())
            if packets:
                found[int(key) >> 2, int(key) & 3] = (packets, int(row["bytes"].sum()))
        return found

    def drain(self) -> Any:
        """Take all events off the ring."""
        return self.ring.read(1 << 16)

    # ---- running

    def run(
        self,
        program: str,
        packet: Packet | bytes,
        ifindex: int,
        *,
        ingress_ifindex: int = 0,
        gso_size: int = 0,
        mark: int = 0,
    ) -> Result:
        """Run a packet through a program on behalf of an interface."""
        if ingress_ifindex and not takes_ingress_ifindex():
            pytest.skip("a test run takes no ingress_ifindex on this kernel, as Linux 5.10")
        raw = bytes(packet)
        before = self.metrics()
        ctx = SkBuffCtx(
            ifindex=ifindex,
            ingress_ifindex=ingress_ifindex,
            mark=mark,
            gso_size=gso_size,
            gso_segs=2 if gso_size else 0,
        )
        run = self.thread.call(lambda: self.programs[program].test_run(raw, ctx=ctx))
        changed = {}
        for key, (packets, size) in self.metrics().items():
            old = before.get(key, (0, 0))
            if (packets, size) != old:
                changed[key] = (packets - old[0], size - old[1])
        mark_out = run.ctx_out.mark if run.ctx_out is not None else 0
        return Result(run.retval, run.data_out, self.drain(), changed, mark_out)

    def send(self, ep: Endpoint, packet: Packet | bytes, **ctx: int) -> Result:
        """The workload of `ep` sends an IP packet, or a whole frame."""
        return self.run(
            "from_endpoint", self._frame(packet, ep.mac, ep.node_mac), ep.ifindex, **ctx
        )

    def stack_sends(self, ep: Endpoint, packet: Packet, *, came_in: int = 0) -> Result:
        """The node's stack passes an IP packet to the workload of `ep`."""
        frame = self._frame(packet, ep.node_mac, ep.mac)
        return self.run("to_endpoint", frame, ep.ifindex, ingress_ifindex=came_in)

    def wire_sends(self, packet: Packet | bytes) -> Result:
        """A packet comes in by the uplink."""
        frame = self._frame(packet, GATEWAY_MAC, "02:00:00:00:01:01")
        return self.run("from_netdev", frame, self.up)

    def node_sends(self, packet: Packet | bytes, *, came_in: int = 0, mark: int = 0) -> Result:
        """The node's stack sends a packet out by the uplink."""
        frame = self._frame(packet, "02:00:00:00:01:01", GATEWAY_MAC)
        return self.run("to_netdev", frame, self.up, ingress_ifindex=came_in, mark=mark)

    def _frame(self, packet: Packet | bytes, src: str, dst: str) -> Packet | bytes:
        if isinstance(packet, IP | IPv6):
            return Ether(src=src, dst=dst) / packet
        return packet


@functools.cache
def takes_ingress_ifindex() -> bool:
    """Whether BPF_PROG_TEST_RUN can say by which device a packet came in."""
    program = probe.load_program(probe.insn(0xB7) + probe.insn(0x95))  # r0 = 0; exit
    try:
        program.test_run(bytes(64), ctx=SkBuffCtx(ingress_ifindex=1))
    except BpfError:
        return False
    finally:
        program.close()
    return True


def now_s() -> int:
    """The clock of the datapath."""
    return int(time.clock_gettime(time.CLOCK_MONOTONIC))


def warm() -> None:
    """Load libbpf outside of the worker thread."""
    lib()
