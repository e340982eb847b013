"""The node itself as a subject of policy: who it is, and what it was doing before policy came.

While a rule with a nodeSelector selects this node, its policy has a slot like an endpoint's, and
the row HOST_ID of the endpoint map tells the programs so (bpf/lib/host.h). Nothing is judged
without that row, so it is the last thing written and the first removed.

Connections that are open when the row is first written have no conntrack entry, and the first
packet that passes need not be the initiator's. So those of the node's TCP sockets are entered
before, each in its own direction and admitted by nobody: their next packet is judged as if they
began now. What policy allows goes on, whoever speaks first; what it denies ends, and is reported.
"""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cilia.bpf import BpfError
from cilia.bpf.constants import (
    CONTROL_PORTS_MAX,
    CT_F_FROM_HOST,
    CT_F_INIT_LO,
    CT_F_OUTSIDE,
    CT_F_TO_HOST,
    CT_SEEN_NON_SYN,
)
from cilia.bpf.layout import CT_ENTRY, CT_KEY, to_addr
from cilia.bpf.uapi import NOEXIST
from cilia.identity import HOST, EndpointID, reserved_labels
from cilia.labels import SOURCE_RESERVED, Label, LabelError, Labels
from cilia.policy import MapState
from services.agent.config import ConfigInvalid, ConntrackLifetimes
from services.agent.datapath import Datapath, monotonic_s

HOST_ID: Final = EndpointID(0)  # no endpoint has it

_TCP: Final = 6
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_LISTEN: Final = 0x0A
# include/net/tcp_states.h: those that exchange data or may still; True: only SYNs so far.
_OPEN: Final = {1: False, 2: True, 3: True, 4: False, 5: False, 8: False, 9: False, 11: False}

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def node_labels(texts: tuple[str, ...]) -> Labels:
    """What nodeSelectors see: `reserved:host` and these labels. Raises ConfigInvalid."""
    found = []
    for text in texts:
        try:
            # As everywhere in policy, what has no source is Kubernetes'.
            label = Label.parse(text if ":" in text.split("=")[0] else f"k8s:{text}")
        except LabelError as error:
            raise ConfigInvalid(f"--node-label {text}: {error}") from error
        if label.source == SOURCE_RESERVED:
            raise ConfigInvalid(f"--node-label {text}: the source reserved is not for giving")
        found.append(label)
    return reserved_labels(HOST).merge(found)


@dataclass(frozen=True, slots=True)
class ControlPort:
    """A port that no policy of the node closes; `egress`: the node is the one who connects."""

    proto: int
    port: int
    egress: bool = False

    @classmethod
    def parse(cls, text: str) -> ControlPort:
        """PROTOCOL/PORT or PROTOCOL/PORT/egress. Raises ConfigInvalid."""
        name, _, rest = text.partition("/")
        port, _, direction = rest.partition("/")
        known = _PROTOCOLS.get(name.lower())
        number = int(port) if port.isascii() and port.isdigit() else 0
        if known is None or not 0 < number < 65536 or direction not in ("", "ingress", "egress"):
            raise ConfigInvalid(
                f"--host-control-port {text}: give a protocol and a port, such as tcp/4240, "
                "and /egress for one that the node connects to"
            )
        return cls(known, number, direction == "egress")


def control_ports(texts: tuple[str, ...], metrics_address: str | None) -> tuple[ControlPort, ...]:
    """Those given, and that of the agent's own metrics. Raises ConfigInvalid."""
    ports = [ControlPort.parse(text) for text in texts]
    _, colon, own = (metrics_address or "").rpartition(":")
    if colon and own.isdigit():
        ports.append(ControlPort(_TCP, int(own)))
    found = tuple(dict.fromkeys(ports))
    if len(found) > CONTROL_PORTS_MAX:
        raise ConfigInvalid(
            f"{len(found)} control ports of the node; {CONTROL_PORTS_MAX} are the most"
        )
    return found


def control_ports_row(ports: tuple[ControlPort, ...]) -> bytes:
    """CONTROL_PORTS of bpf/include/config.h."""
    rows = b"".join(struct.pack("!HBB", x.port, x.proto, x.egress) for x in ports)
    return rows.ljust(4 * CONTROL_PORTS_MAX, b"\0")


@dataclass(frozen=True, slots=True)
class Stream:
    """One TCP connection of the node's own."""

    local: IPAddress
    local_port: int
    remote: IPAddress
    remote_port: int
    inbound: bool  # somebody connected to the node
    opening: bool  # no more than SYNs have been exchanged

    def row(self, now_s: int, lifetimes: ConntrackLifetimes) -> tuple[bytes, bytes]:
        """The entry: of whom it is known who began, and admitted by nobody."""
        near = (to_addr(self.local), self.local_port)
        far = (to_addr(self.remote), self.remote_port)
        key, value = np.zeros(1, CT_KEY), np.zeros(1, CT_ENTRY)
        lo, hi = min(near, far), max(near, far)
        key["lo"], key["lo_port_be"] = np.void(lo[0]), lo[1]
        key["hi"], key["hi_port_be"] = np.void(hi[0]), hi[1]
        key["proto"] = _TCP
        began = far if self.inbound else near
        value["flags"] = (CT_F_INIT_LO if began == lo else 0) | (
            CT_F_TO_HOST | CT_F_OUTSIDE if self.inbound else CT_F_FROM_HOST
        )
        value["seen"] = 0 if self.opening else CT_SEEN_NON_SYN
        value["expires_s"] = now_s + (lifetimes.tcp_syn_s if self.opening else lifetimes.tcp_s)
        return key.tobytes(), value.tobytes()


def _address(text: str) -> IPAddress:
    """As /proc/net/tcp writes it: words in the machine's order, in hexadecimal."""
    raw = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    if len(raw) == 4:
        return ipaddress.IPv4Address(raw)
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


def parse_streams(*tables: str) -> Iterator[Stream]:
    """The connections in /proc/net/tcp and tcp6, but for those of loopback."""
    rows = []
    listening = set()
    for table in tables:
        for line in table.splitlines()[1:]:
            words = line.split()
            if len(words) < 4:
                continue
            local, remote, state = words[1], words[2], int(words[3], 16)
            port = int(local.rpartition(":")[2], 16)
            if state == _LISTEN:
                listening.add(port)
            elif state in _OPEN:
                rows.append((local, remote, state, port))
    for local, remote, state, port in rows:
        near, far = (_address(text.rpartition(":")[0]) for text in (local, remote))
        if near.is_loopback or far.is_loopback:
            continue
        yield Stream(
            local=near,
            local_port=port,
            remote=far,
            remote_port=int(remote.rpartition(":")[2], 16),
            inbound=port in listening,
            opening=_OPEN[state],
        )


def streams() -> list[Stream]:
    """The connections of this network namespace."""
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    return list(parse_streams(*(path.read_text() for path in tables if path.exists())))


def ending(
    open_now: Iterable[Stream], state: MapState, identity_of: Callable[[IPAddress], int]
) -> list[Stream]:
    """The connections that a policy of the node would end: what its author should know first.

    `identity_of`: who an address outside is to policy. Control ports are not looked at.
    """
    return [
        stream
        for stream in open_now
        if not state.allows(
            identity_of(stream.remote),
            not stream.inbound,
            _TCP,
            stream.local_port if stream.inbound else stream.remote_port,
        )
    ]


class HostConnections:
    """Enters what the node's stack was doing into conntrack."""

    def __init__(self, datapath: Datapath, lifetimes: ConntrackLifetimes) -> None:
        self._datapath = datapath
        self._lifetimes = lifetimes

    async def enter(self) -> int:
        """Enter what has no entry; the number of those. Raises BpfError."""
        return await self._datapath.run(self._enter)

    def _enter(self) -> int:
        table = self._datapath.map("cilia_ct")
        lxc = self._datapath.map("cilia_lxc")
        now, entered = monotonic_s(), 0
        for stream in streams():
            if lxc.lookup(to_addr(stream.remote)) is not None:
                continue  # endpoints' connections are tracked by their own programs
            try:
                table.update(*stream.row(now, self._lifetimes), NOEXIST)
                entered += 1
            except BpfError as error:
                if error.errno != errno.EEXIST:
                    raise
        return entered
