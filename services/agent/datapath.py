"""The kernel side of this node: programs, maps and the runtime row.

Starting loads both objects as one step. When the verifier refuses them and programs of an earlier
run are pinned, those stay in place and the agent goes on with them, saying so in its status; with
none there is nothing to go on with, and the start fails.

Every call that may wait in the kernel runs on this adapter's bounded executor. Writing a few rows
of a hash map or an array does not: it is done at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np
import structlog

from cilia.bpf import (
    BpfError,
    LayoutError,
    Map,
    MigrationRefused,
    Object,
    Program,
    load_all,
    probe,
)
from cilia.bpf.constants import RT_F_ALLOW_FRAG_NEEDED, RT_F_MASQUERADE4, RT_F_MASQUERADE6
from cilia.bpf.layout import CILIA, RUNTIME, to_addr
from cilia.errors import DomainError, Kind
from cilia.net.device import Network
from cilia.net.mount import mount_bpffs, umount_bpffs
from cilia.telemetry import fields
from services.agent.config import AGGREGATION_LEVEL, ROUTER_LINK_LOCAL, AgentConfig

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

PROGRAMS: Final = {
    "bpf_lxc.o": ("from_endpoint", "to_endpoint"),
    "bpf_audit.o": ("audit_policy", "audit_selftest"),
    "bpf_host.o": ("from_netdev", "to_netdev", "assign_socket"),
}
MAPS: Final = (
    "cilia_lxc",
    "cilia_ifindex",
    "cilia_ipcache",
    "cilia_policy",
    "cilia_policy_meta",
    "cilia_ct",
    "cilia_nat",
    "cilia_frag",
    "cilia_devices",
    "cilia_runtime",
    "cilia_proxy_pair",
    "cilia_metrics",
    "cilia_events",
    "cilia_lost",
)


class DatapathUnusable(DomainError):
    """The kernel does not do what this node needs."""

    default_kind = Kind.PRECONDITION


class Datapath:
    """A lifecycle part: loads on start, closes descriptors on stop, and leaves all pins."""

    def __init__(self, config: AgentConfig, *, control_ports: bytes = bytes(32)) -> None:
        self._config = config
        self.control_ports = control_ports  # as bpf/include/config.h has them
        self._executor = ThreadPoolExecutor(max_workers=3, thread_name_prefix="datapath")
        self._thread = threading.local()
        self._networks: list[Network] = []
        self._maps: dict[str, Map] = {}
        self._programs: dict[str, Program] = {}
        self._runtime = np.zeros(1, RUNTIME)
        self._runtime_lock = asyncio.Lock()
        self.mounted_bpffs = False
        self.load_error = ""  # why the programs of an earlier run are in use
        self.migrations: tuple[str, ...] = ()

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that blocks in the kernel, on the executor."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: fn(*args, **kwargs))

    def host_network(self) -> Network:
        """This executor thread's socket in the node's namespace; opening one takes milliseconds.

        Only for functions that `run` calls; it is not to be closed.
        """
        network: Network | None = getattr(self._thread, "network", None)
        if network is None:
            network = self._thread.network = Network()
            self._networks.append(network)
        return network

    def map(self, name: str) -> Map:
        return self._maps[name]

    def program(self, name: str) -> Program:
        return self._programs[name]

    @property
    def maps_dir(self) -> Path:
        return self._config.pin_root / "maps"

    @property
    def links_dir(self) -> Path:
        return self._config.pin_root / "links"

    @property
    def programs_dir(self) -> Path:
        return self._config.pin_root / "progs"

    async def start(self) -> None:
        await self.run(self._load)
        await self._write_runtime()

    async def stop(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        for network in self._networks:
            network.close()
        self._networks.clear()
        for pinned in self._maps.values():
            pinned.close()
        for program in self._programs.values():
            program.close()
        self._maps.clear()
        self._programs.clear()

    # ---- loading

    def _rodata(self) -> dict[str, bytes | int]:
        config = self._config
        return {
            "ROUTER_IP4": to_addr(config.pool4.network_address + 1),
            "ROUTER_IP6": to_addr(config.pool6.network_address + 1),
            "ROUTER_LL6": to_addr(ROUTER_LINK_LOCAL),
            "NAT_PORT_MIN": config.nat_port_min,
            "NAT_PORT_MAX": config.nat_port_max,
            "CONTROL_PORTS": self.control_ports,
            "HAVE_KTIME_COARSE": int(probe.has_helper("bpf_ktime_get_coarse_ns")),
        }

    def _load(self) -> None:
        self.mounted_bpffs = mount_bpffs(self._config.bpffs_root)
        try:
            self._load_objects()
        except BaseException:
            if self.mounted_bpffs:  # so nothing of an earlier run is in it
                umount_bpffs(self._config.bpffs_root)
            raise

    def _load_objects(self) -> None:
        for directory in (self.maps_dir, self.links_dir, self.programs_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        objects: list[Object] = []
        try:
            try:
                for name in PROGRAMS:
                    objects.append(self._open(name))  # noqa: PERF401 -- closed one by one below
                migrations = load_all(objects)
            except (LayoutError, MigrationRefused):
                raise
            except BpfError as error:
                self._fall_back(error)
                return
            for migration in migrations:
                log.info(
                    "A pinned map was migrated.",
                    **{fields.MAP: migration.name, fields.REASON: migration.text},
                )
            self.migrations = tuple(f"{m.name}: {m.text}" for m in migrations)
            for obj in objects:
                for name in PROGRAMS[obj.path.name]:
                    program = obj.program(name)
                    program.pin(self.programs_dir / name)
                    self._programs[name] = program
            by_name = {name: obj for obj in objects for name in obj.definitions()}
            for name in MAPS:
                if name in by_name:
                    self._maps[name] = by_name[name].map(name)
                else:
                    self._maps[name] = Map.open_pinned(self.maps_dir / name)
        finally:
            for obj in objects:
                obj.close()

    def _open(self, name: str) -> Object:
        path = self._config.object_dir / name
        rodata = self._rodata()
        # Constants an object does not use are optimised away; naming them would be an error.
        with Object.open(path) as bare:
            known = set(bare.rodata())
        return Object.open(
            path,
            rodata={key: value for key, value in rodata.items() if key in known},
            pin_dir=self.maps_dir,
            unpinned=("cilia_work",),  # scratch: nothing in it outlives a packet
            map_sizes=self._config.map_sizes.by_map(),
            layouts=CILIA,
        )

    def _fall_back(self, error: BpfError) -> None:
        """Keep what an earlier run left in place, if it left all of it."""
        names = [name for group in PROGRAMS.values() for name in group]
        try:
            self._programs = {name: Program.open_pinned(self.programs_dir / name) for name in names}
            self._maps = {name: Map.open_pinned(self.maps_dir / name) for name in MAPS}
        except BpfError:
            raise DatapathUnusable(
                f"the eBPF programs cannot be loaded: {error}",
                cure=error.cure or "See `cilia bpf probe` for what this kernel lacks",
            ) from error
        self.load_error = f"the new programs were refused, the old ones stay in place: {error}"
        log.error("The new programs were refused; the old ones stay.", **{fields.ERROR: str(error)})

    # ---- the runtime row

    async def _write_runtime(self) -> None:
        """Settings of this run, on top of the epoch of the last one."""
        config = self._config
        raw = await self.run(self.map("cilia_runtime").lookup, bytes(4))
        row = self._runtime
        if raw:
            row[:] = np.frombuffer(raw, RUNTIME)
        row["ipcache_epoch"] = max(int(row[0]["ipcache_epoch"]), 1)
        row["flags"] = (
            (RT_F_MASQUERADE4 if config.masquerade4 else 0)
            | (RT_F_MASQUERADE6 if config.masquerade6 else 0)
            | (RT_F_ALLOW_FRAG_NEEDED if config.allow_frag_needed else 0)
        )
        row["aggregation"] = AGGREGATION_LEVEL[config.aggregation]
        row["report_interval_s"] = config.report_interval_s
        row["ct_tcp_s"] = config.conntrack.tcp_s
        row["ct_tcp_syn_s"] = config.conntrack.tcp_syn_s
        row["ct_tcp_fin_s"] = config.conntrack.tcp_fin_s
        row["ct_any_s"] = config.conntrack.any_s
        row["boot_offset_ns"] = wall_offset_ns()
        await self.run(self.map("cilia_runtime").update, bytes(4), row.tobytes())

    @property
    def epoch(self) -> int:
        return int(self._runtime[0]["ipcache_epoch"])

    async def set_host_device(self, ifindex: int, mac: bytes) -> None:
        """Where the node's own packets enter that go to the proxy."""
        async with self._runtime_lock:
            self._runtime["host_ifindex"] = ifindex
            self._runtime["host_mac"] = np.frombuffer(mac, "u1")
            await self.run(self.map("cilia_runtime").update, bytes(4), self._runtime.tobytes())

    async def raise_epoch(self) -> None:
        """Every live connection looks its peers' identities up again at its next packet."""
        async with self._runtime_lock:
            # 0 would mean "never judged" to a conntrack side; after 2^32 changes skip it.
            self._runtime["ipcache_epoch"] = (self.epoch + 1) & 0xFFFFFFFF or 1
            self._runtime["boot_offset_ns"] = wall_offset_ns()
            # One array element: written before a thread would have been woken.
            self.map("cilia_runtime").update(bytes(4), self._runtime.tobytes())


def wall_offset_ns() -> int:
    """Wall clock minus CLOCK_MONOTONIC, in ns: what to add to an event's time."""
    return time.time_ns() - time.monotonic_ns()


def monotonic_s() -> int:
    """The clock that conntrack entries expire by: whole seconds of CLOCK_MONOTONIC."""
    return int(time.monotonic())
