"""What the kernel should hold, as table rows: one type a reconciler. Frozen, pure, printable."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from cilia.bpf.constants import POLICY_META_HAS_DENY
from cilia.identity import EndpointID, NumericIdentity
from cilia.policy import MapState, Unenforced, Unseen, visibility_text
from services.agent.endpoint import SlotIndex, SubjectKey
from services.agent.policyrows import Fill, Masks, PolicyRows

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyMapRow:
    """One subject's policy, in one slot of cilia_policy. Equal only to itself: it holds a snapshot,
    not rows."""

    slot: SlotIndex
    subject: SubjectKey
    state: MapState
    fill: Fill  # with ports of those proxies that are ready
    users: tuple[str, ...]  # endpoints that share it, for messages
    generation: int  # of the calculation that made it
    unenforced: tuple[Unenforced, ...] = ()  # parts of rules that allow nothing here, and why
    unseen: tuple[Unseen, ...] = ()  # what the visibility that is asked for does not show

    @property
    def ingress_enforced(self) -> bool:
        return self.fill.ingress_enforced

    @property
    def egress_enforced(self) -> bool:
        return self.fill.egress_enforced

    @property
    def not_shown(self) -> list[str]:
        """What of the visibility asked for is not in force, and why; a sentence each."""
        lines = [f"{visibility_text([x.rule])}: {x.why}" for x in self.unseen]
        lines += [
            f"{'egress' if rules.egress else 'ingress'} {rules.parser}: the proxy is not there, or "
            "a firewall is in its way; connections pass without it"
            for rules in self.state.l7
            if rules.watches and rules.digest not in self.fill.ports
        ]
        return sorted(lines)

    @property
    def complete(self) -> bool:
        """Whether every proxy that it needs is ready, so that each entry is a row."""
        return all(x.digest in self.fill.ports for x in self.state.l7)

    @property
    def rows(self) -> PolicyRows:
        """Made anew each time."""
        return PolicyRows.from_state(self.state, self.fill)

    @property
    def size(self) -> int:
        """The number of rows."""
        if self.complete:
            return len(self.state)
        value = self.fill.value
        return sum(value(key, entry) is not None for key, entry in self.state.items())

    @property
    def masks(self) -> Masks:
        if not self.complete:
            return self.rows.masks()
        (id_in, id_out), (any_in, any_out) = self.state.masks
        deny = POLICY_META_HAS_DENY if self.state.has_deny else 0
        return Masks((id_in | deny, id_out | deny), (any_in | deny, any_out | deny))

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("SLOT", "SUBJECT", "ROWS", "INGRESS", "EGRESS", "USERS")

    def table_row(self) -> tuple[str, ...]:
        return (
            str(self.slot),
            str(self.subject),
            str(self.size),
            "enforced" if self.ingress_enforced else "open",
            "enforced" if self.egress_enforced else "open",
            ",".join(self.users),
        )


@dataclass(frozen=True, slots=True)
class InForceSlot:
    """What the programs find in a slot of cilia_policy now."""

    slot: int
    row: PolicyMapRow | None  # None: rows of an earlier run, or what a failed write left
    proxy_ports: frozenset[int]  # that its rows name


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcacheRow:
    """Who is behind a prefix."""

    prefix: Network
    identity: NumericIdentity
    tunnel: IPv4Address | None = None
    source: Literal["reserved", "host", "endpoint", "cidr", "cluster"] = "cluster"

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("PREFIX", "IDENTITY", "SOURCE", "TUNNEL")

    def table_row(self) -> tuple[str, ...]:
        return (str(self.prefix), str(self.identity), self.source, str(self.tunnel or "-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointMapRow:
    """A local endpoint as the datapath sees it: under its addresses and its interface."""

    id: EndpointID
    ifindex: int
    identity: NumericIdentity
    slot: SlotIndex
    flags: int
    mac: bytes
    node_mac: bytes
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("ID", "IFINDEX", "IDENTITY", "SLOT", "FLAGS", "IPV4", "IPV6")

    def table_row(self) -> tuple[str, ...]:
        return (
            str(self.id),
            str(self.ifindex),
            str(self.identity),
            str(self.slot),
            f"{self.flags:#x}",
            str(self.ipv4 or "-"),
            str(self.ipv6 or "-"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRow:
    """One program on one hook of one interface."""

    hook: str  # names the pinned link
    interface: str
    ifindex: int
    direction: Literal["ingress", "egress"]
    program: str
    quick: bool = False  # by a filter, whatever the mode: nothing is waited for

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("HOOK", "INTERFACE", "IFINDEX", "DIRECTION", "PROGRAM", "BY")

    def table_row(self) -> tuple[str, ...]:
        by = "filter" if self.quick else "mode"
        return (self.hook, self.interface, str(self.ifindex), self.direction, self.program, by)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """A device of the host that leads to the world: where masquerade happens."""

    name: str
    ifindex: int
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    mac: bytes
    l3: bool  # without a link layer header

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("NAME", "IFINDEX", "IPV4", "IPV6")

    def table_row(self) -> tuple[str, ...]:
        return (self.name, str(self.ifindex), str(self.ipv4 or "-"), str(self.ipv6 or "-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRow:
    """The wire of an endpoint: veth pair, addresses, routes and neighbours on both sides."""

    id: EndpointID
    host_interface: str
    interface: str
    netns: str
    netns_inode: int  # what the name meant when the endpoint was added
    ifindex: int
    mac: bytes
    node_mac: bytes
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    mtu: int
    gso_max: int  # bytes of the longest TCP segment

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("ID", "HOST INTERFACE", "NETNS", "INTERFACE", "IPV4", "IPV6", "MTU")

    def table_row(self) -> tuple[str, ...]:
        return (
            str(self.id),
            self.host_interface,
            self.netns,
            self.interface,
            str(self.ipv4 or "-"),
            str(self.ipv6 or "-"),
            str(self.mtu),
        )
