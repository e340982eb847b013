"""Removing every trace of a node's agent, while no agent runs.

Traffic of endpoints goes on without an agent, for programs, maps and interfaces are the kernel's.
This takes them away: filters and links, endpoint interfaces with their routes and neighbours, the
router pair, the table and rules that lead to the L7 proxy, pinned maps, the bpffs if it is one of
our own mounts, the socket, and on request the agent's records. What is absent is passed over, so it
may be repeated; what cannot be removed is reported, and the rest is removed all the same.

Works in the network namespace of the caller. The identity service's store is not an agent's: it
stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cilia import statefile
from cilia.bpf.attach import detach_tc, list_attached
from cilia.bpf.constants import MARK_TO_PROXY
from cilia.errors import DomainError, Kind
from cilia.net import nft, tproxy
from cilia.net.device import ROUTE_PROTOCOL, Network
from cilia.net.mount import is_bpffs, umount_bpffs
from cilia.net.rtnl import RouteSocket

HOST_DEVICE: Final = "cilia_host"
_ENDPOINT_LINK: Final = re.compile(r"cil\d{5}\Z")
_DIRECTIONS: Final = ("ingress", "egress")


class AgentRunning(DomainError):
    """Its state directory is locked: what would be removed is in use."""

    default_kind = Kind.CONFLICT
    default_cure = "Stop the agent first"


@dataclass(frozen=True, slots=True)
class Trace:
    """One thing of ours on this host. `error` says why it was not removed; empty: it was."""

    kind: str  # filter, interface, route, rule, table, map, program, mount, socket, state
    name: str
    error: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f": {self.error}" if self.error else "")


def find(
    run_dir: Path, state_dir: Path, *, bpffs: Path | None = None, state: bool = True
) -> list[Trace]:
    """What `cleanup` would remove."""
    return [trace for trace, _ in _plan(run_dir, state_dir, bpffs, state=state)]


def cleanup(
    run_dir: Path, state_dir: Path, *, bpffs: Path | None = None, state: bool = True
) -> list[Trace]:
    """Removes everything of the agent that ran with these directories; returns what it met.

    Raises AgentRunning.
    """
    lock = statefile.DirectoryLock(state_dir / "agent", owner="cleanup")
    locked = (state_dir / "agent").is_dir()
    if locked:
        try:
            lock.acquire()
        except statefile.StateDirectoryLocked as error:
            raise AgentRunning(f"an agent is running: {error.message}") from error
    result: list[Trace] = []
    try:
        for trace, remove in _plan(run_dir, state_dir, bpffs, state=state):
            try:
                remove()
                result.append(trace)
            except (DomainError, OSError) as error:
                result.append(Trace(trace.kind, trace.name, str(error)))
    finally:
        if locked:
            lock.release()
    return result


def _plan(
    run_dir: Path, state_dir: Path, bpffs: Path | None, *, state: bool
) -> Iterator[tuple[Trace, Callable[[], object]]]:
    """Traces with how to remove each; first what forwards, last what remembers."""
    root = bpffs if bpffs is not None else run_dir / "bpf"
    pins = root / "cilia"
    with Network() as host:
        yield from _filters(host, pins / "links")
        yield from _interfaces(host)
        yield from _routes(host)
    yield from _redirect()
    yield from _pins(pins)
    if is_bpffs(root):
        if bpffs is None and root.is_mount():
            yield Trace("mount", str(root)), lambda: _unmount(root)
    elif root.is_dir() and bpffs is None:
        yield Trace("state", str(root)), root.rmdir
    socket = run_dir / "agent.sock"
    if socket.is_socket():
        yield Trace("socket", str(socket)), lambda: socket.unlink(missing_ok=True)
    if state and (state_dir / "agent").is_dir():
        path = state_dir / "agent"
        yield Trace("state", str(path)), lambda: shutil.rmtree(path)
    if run_dir.is_dir():
        # Removed if nobody else has something in it.
        yield from _empty(run_dir)


def _filters(host: Network, links: Path) -> Iterator[tuple[Trace, Callable[[], object]]]:
    for link in host.links():
        if _ENDPOINT_LINK.match(link.name):
            continue  # goes whole
        for direction in _DIRECTIONS:
            pin = links / f"netdev_{link.index}{'_egress' if direction == 'egress' else ''}"
            mark = pin.with_name(f"{pin.name}_clsact")
            ours = any(
                found.ours and found.direction == direction for found in list_attached(link.index)
            )
            if pin.exists() or mark.exists() or ours:
                name = f"{link.name} {direction}"
                yield (
                    Trace("filter", name),
                    lambda index=link.index, direction=direction, pin=pin: detach_tc(  # type: ignore[misc]  # bound now, not when called
                        index, direction, pin
                    ),
                )


def _interfaces(host: Network) -> Iterator[tuple[Trace, Callable[[], object]]]:
    for link in host.links():
        ours = _ENDPOINT_LINK.match(link.name) or link.name == HOST_DEVICE
        if ours and link.kind == "veth":
            yield (
                Trace("interface", link.name),
                lambda name=link.name: host.delete_link(name),  # type: ignore[misc]  # bound now
            )


def _routes(host: Network) -> Iterator[tuple[Trace, Callable[[], object]]]:
    for route in host.routes():
        if route.protocol == ROUTE_PROTOCOL:
            yield (
                Trace("route", str(route.destination)),
                lambda to=route.destination: host.delete_route(to),  # type: ignore[misc]  # bound now
            )


def _redirect() -> Iterator[tuple[Trace, Callable[[], object]]]:
    with RouteSocket() as host:
        if tproxy.any_routing(host):
            yield (
                Trace("rule", f"fwmark {MARK_TO_PROXY:#x}, table {tproxy.ROUTE_TABLE}"),
                lambda: tproxy.delete_routing(host),
            )
    if nft.available() and tproxy.read_table() is not None:
        yield Trace("table", f"{tproxy.FAMILY} {tproxy.TABLE}"), tproxy.delete_table


def _pins(pins: Path) -> Iterator[tuple[Trace, Callable[[], object]]]:
    for kind, name in (("link", "links"), ("program", "progs"), ("map", "maps")):
        directory = pins / name
        if directory.is_dir():
            for pin in sorted(directory.iterdir()):
                yield Trace(kind, pin.name), lambda pin=pin: pin.unlink(missing_ok=True)  # type: ignore[misc]  # bound now
            yield Trace("directory", str(directory)), directory.rmdir
    if pins.is_dir():
        yield Trace("directory", str(pins)), pins.rmdir


def _unmount(root: Path) -> None:
    umount_bpffs(root)
    root.rmdir()


def _empty(directory: Path) -> Iterator[tuple[Trace, Callable[[], object]]]:
    if not any(directory.iterdir()):
        yield Trace("directory", str(directory)), directory.rmdir
