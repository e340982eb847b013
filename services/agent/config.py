"""What an agent can be told, with every default in sight."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Final, Literal

from cilia.errors import InvalidError

AttachMode = Literal["auto", "tcx", "clsact"]
EnforcementMode = Literal["default", "always", "never"]
LocalhostMode = Literal["always", "policy"]
Aggregation = Literal["none", "lowest", "low", "medium", "maximum"]

# The gateway's link-local address: the same on every node, as its link is each endpoint's own.
ROUTER_LINK_LOCAL: Final = IPv6Address("fe80::c111:1")

DEFAULT_POOL4: Final = IPv4Network("10.217.0.0/16")
DEFAULT_POOL6: Final = IPv6Network("fd00:c111::/64")

AGGREGATION_LEVEL: Final[dict[str, int]] = {
    "none": 0,
    "lowest": 1,
    "low": 2,
    "medium": 3,
    "maximum": 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSizes:
    """Entries a map holds. A changed size migrates a pinned map at the next start."""

    endpoints: int = 16384
    interfaces: int = 8192
    ipcache: int = 512_000
    policy_slots: int = 16384
    policy: int = 16384  # --bpf-policy-map-max: rows of one identity's policy
    conntrack: int = 262_144
    nat: int = 131_072
    fragments: int = 8192
    devices: int = 256
    events_bytes: int = 16 * 1024 * 1024

    def by_map(self) -> dict[str, int]:
        """Sizes under the names the maps have in bpf/lib/maps.h."""
        return {
            "cilia_lxc": self.endpoints,
            "cilia_ifindex": self.interfaces,
            "cilia_ipcache": self.ipcache,
            "cilia_policy": self.policy_slots,
            "cilia_policy_meta": self.policy_slots,
            "cilia_ct": self.conntrack,
            "cilia_nat": self.nat,
            "cilia_frag": self.fragments,
            "cilia_devices": self.devices,
            "cilia_events": self.events_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackLifetimes:
    """Seconds without a packet after which a connection is forgotten."""

    tcp_s: int = 21600
    tcp_syn_s: int = 60
    tcp_fin_s: int = 10
    any_s: int = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One node's agent. Built by `__main__` from the command line; read-only ever after."""

    node: str
    cluster: str = "default"

    run_dir: Path = Path("/run/cilia")
    state_dir: Path = Path("/var/lib/cilia")
    bpffs: Path | None = None  # None: run_dir/bpf
    object_dir: Path = Path("build/bpf")
    identity_socket: Path | None = None  # None: run_dir/identity.sock
    xds_socket: Path | None = None  # None: run_dir/xds.sock
    socket_group: str = "cilia"
    metrics_address: str | None = None  # host:port of the Prometheus page; None: off

    pool4: IPv4Network = DEFAULT_POOL4
    pool6: IPv6Network = DEFAULT_POOL6
    mtu: int = 0  # 0: that of the device with the default route, else 1500
    big_tcp: bool = True  # as far as kernel and devices have it
    devices: tuple[str, ...] = ()  # empty: every device with a global address
    masquerade4: bool = True
    masquerade6: bool = True
    nat_port_min: int = 61000
    nat_port_max: int = 65535

    proxy_port_min: int = 10000  # of the L7 proxy's listeners
    proxy_port_max: int = 20000
    proxy_release_delay_s: float = 300.0  # a listener that no rule needs is kept this long

    attach: AttachMode = "auto"
    enforcement: EnforcementMode = "default"
    allow_localhost: LocalhostMode = "always"
    policy_audit: bool = False
    node_labels: tuple[str, ...] = ()  # by which nodeSelectors know this node
    control_ports: tuple[
        str, ...
    ] = ()  # that policy of the node never closes: tcp/4240, .../egress
    allow_frag_needed: bool = True
    aggregation: Aggregation = "medium"
    report_interval_s: int = 5
    map_sizes: MapSizes = field(default_factory=MapSizes)
    conntrack: ConntrackLifetimes = field(default_factory=ConntrackLifetimes)

    label_rules: tuple[str, ...] = ()  # empty: the default filter

    lease_ttl_s: int = 900  # how long this node's announcements outlive its agent
    endpoint_add_timeout_s: float = 30.0  # until policy is in force, before Add gives up and undoes
    identity_timeout_s: float = 5.0  # one call to the identity service
    identity_retry_s: float = 1.0
    policy_wait_timeout_s: float = 60.0
    cidr_release_delay_s: float = 60.0  # a prefix no rule names keeps its number this long
    conntrack_gc_interval_s: float = 30.0
    resync_interval_s: float = 60.0  # maps compared with what they should hold
    stop_grace_s: float = 2.0

    log_level: str = "info"
    log_format: str = "auto"

    @property
    def bpffs_root(self) -> Path:
        return self.bpffs if self.bpffs is not None else self.run_dir / "bpf"

    @property
    def pin_root(self) -> Path:
        return self.bpffs_root / "cilia"

    @property
    def socket(self) -> Path:
        return self.run_dir / "agent.sock"

    @property
    def identity_socket_path(self) -> Path:
        return self.identity_socket if self.identity_socket else self.run_dir / "identity.sock"

    @property
    def xds_socket_path(self) -> Path:
        return self.xds_socket if self.xds_socket else self.run_dir / "xds.sock"

    @property
    def agent_dir(self) -> Path:
        return self.state_dir / "agent"


class ConfigInvalid(InvalidError):
    """The command line asks for something that cannot be; the message says what would do."""


def check(config: AgentConfig) -> None:
    """Refuse settings that contradict one another. Raises ConfigInvalid."""
    for pool, least in ((config.pool4, 29), (config.pool6, 125)):
        if pool.prefixlen > least:
            raise ConfigInvalid(f"pool {pool} is too small: give at most a /{least}")
    if not 1024 <= config.nat_port_min < config.nat_port_max <= 65535:
        raise ConfigInvalid(
            f"NAT ports {config.nat_port_min}-{config.nat_port_max}: give a rising range "
            "inside 1024-65535"
        )
    if not 1024 <= config.proxy_port_min <= config.proxy_port_max <= 65535:
        raise ConfigInvalid(
            f"proxy ports {config.proxy_port_min}-{config.proxy_port_max}: give a rising range "
            "inside 1024-65535"
        )
    if not config.node or "/" in config.node:
        raise ConfigInvalid("the node needs a name without '/': give --node-name")
    if config.map_sizes.policy_slots < 2:
        raise ConfigInvalid("--bpf-policy-slots must be at least 2")
    if config.map_sizes.policy < 1:
        raise ConfigInvalid("--bpf-policy-map-max must be at least 1")
