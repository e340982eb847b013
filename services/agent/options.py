"""The agent's command line: a field a flag, and what an AgentConfig is made of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final, Literal, TypeVar

from cilia import settings
from cilia.labels import LabelError, LabelFilter
from cilia.settings import check_logging
from services.agent.config import (
    AgentConfig,
    Aggregation,
    AttachMode,
    ConfigInvalid,
    ConntrackLifetimes,
    EnforcementMode,
    LocalhostMode,
    MapSizes,
    check,
)
from services.agent.hostpolicy import control_ports, node_labels

OnOff = Literal["on", "off"]
NetworkT = TypeVar("NetworkT", IPv4Network, IPv6Network)

_DEFAULT: Final = AgentConfig(node="-")
_SIZES: Final = MapSizes()
_LIFETIMES: Final = ConntrackLifetimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As given; CILIA_AGENT_<FLAG> counts where a flag is not."""

    node_name: str = field(default_factory=socket.gethostname)
    cluster_name: str = _DEFAULT.cluster
    run_dir: Path = _DEFAULT.run_dir
    state_dir: Path = _DEFAULT.state_dir
    bpffs: Path | None = None
    object_dir: Path = _DEFAULT.object_dir
    identity_socket: Path | None = None
    xds_socket: Path | None = None
    group: str = _DEFAULT.socket_group
    metrics_address: str = ""
    ipv4_pool: str = str(_DEFAULT.pool4)
    ipv6_pool: str = str(_DEFAULT.pool6)
    mtu: int = 0
    big_tcp: Literal["auto", "off"] = "auto"
    devices: str = ""
    masquerade_ipv4: OnOff = "on"
    masquerade_ipv6: OnOff = "on"
    nat_ports: str = f"{_DEFAULT.nat_port_min}-{_DEFAULT.nat_port_max}"
    proxy_ports: str = f"{_DEFAULT.proxy_port_min}-{_DEFAULT.proxy_port_max}"
    proxy_release_delay_s: float = _DEFAULT.proxy_release_delay_s
    attach: AttachMode = "auto"
    enable_policy: EnforcementMode = "default"
    allow_localhost: LocalhostMode = "always"
    policy_audit_mode: OnOff = "off"
    node_label: tuple[str, ...] = ()
    host_control_port: tuple[str, ...] = ()
    allow_icmp_frag_needed: OnOff = "on"
    monitor_aggregation: Aggregation = _DEFAULT.aggregation
    monitor_interval_s: int = _DEFAULT.report_interval_s
    bpf_policy_map_max: int = _SIZES.policy
    bpf_policy_slots: int = _SIZES.policy_slots
    bpf_ct_max: int = _SIZES.conntrack
    bpf_nat_max: int = _SIZES.nat
    bpf_ipcache_max: int = _SIZES.ipcache
    bpf_events_bytes: int = _SIZES.events_bytes
    ct_tcp_s: int = _LIFETIMES.tcp_s
    ct_any_s: int = _LIFETIMES.any_s
    labels: str = ""
    lease_ttl_s: int = _DEFAULT.lease_ttl_s
    endpoint_add_timeout_s: float = _DEFAULT.endpoint_add_timeout_s
    identity_timeout_s: float = _DEFAULT.identity_timeout_s
    cidr_release_delay_s: float = _DEFAULT.cidr_release_delay_s
    conntrack_gc_interval_s: float = _DEFAULT.conntrack_gc_interval_s
    resync_interval_s: float = _DEFAULT.resync_interval_s
    log_level: str = _DEFAULT.log_level
    log_format: str = _DEFAULT.log_format


HELP: Final[Mapping[str, str]] = {
    "node_name": "this node in the cluster (default: the host's name)",
    "cluster_name": "the cluster's name in policy",
    "run_dir": "sockets",
    "state_dir": "records that survive",
    "bpffs": "root of the bpffs (default: RUN_DIR/bpf)",
    "object_dir": "compiled eBPF objects",
    "identity_socket": "of the identity service (default: RUN_DIR/identity.sock)",
    "xds_socket": "of the xds service (default: RUN_DIR/xds.sock)",
    "group": "owns the socket, if it exists",
    "metrics_address": "/a/path or host:port; empty: not served",
    "ipv4_pool": "endpoints' IPv4 addresses",
    "ipv6_pool": "endpoints' IPv6 addresses",
    "mtu": "0: that of the default route's device",
    "big_tcp": "endpoints' TCP segments beyond 64 KiB, if every device of the node takes them",
    "devices": "comma separated; empty: all with a global address",
    "masquerade_ipv4": "hide endpoints from the world",
    "masquerade_ipv6": "hide endpoints from the world",
    "nat_ports": "ports for masquerade",
    "proxy_ports": "where the L7 proxy may listen, on the loopback addresses",
    "proxy_release_delay_s": "seconds that a listener of the proxy is kept when no rule needs it",
    "attach": "how programs hang",
    "enable_policy": "when endpoints are isolated",
    "allow_localhost": "whether the node may always reach its endpoints",
    "policy_audit_mode": "report, drop nothing by policy",
    "node_label": "KEY=VALUE, by which policies of nodes (nodeSelector) select this one",
    "host_control_port": "PROTO/PORT[/egress] that stays open whatever policy of the node says",
    "allow_icmp_frag_needed": "path MTU discovery works",
    "monitor_aggregation": "how much traces are thinned",
    "monitor_interval_s": "seconds between traces of a flow",
    "bpf_policy_map_max": "rows of one policy",
    "bpf_policy_slots": "distinct policies",
    "bpf_ct_max": "connections",
    "bpf_nat_max": "masqueraded connections",
    "bpf_ipcache_max": "known prefixes",
    "bpf_events_bytes": "event ring",
    "ct_tcp_s": "seconds after which an idle TCP connection is forgotten",
    "ct_any_s": "the same of any other protocol",
    "labels": "label filter, e.g. 'k8s:app !tmp'",
    "lease_ttl_s": "seconds that other nodes know our endpoints after we are gone",
    "endpoint_add_timeout_s": "seconds until policy is in force, before an endpoint is taken back",
    "identity_timeout_s": "seconds of one call to the identity service",
    "cidr_release_delay_s": "seconds that a prefix keeps its number when no rule names it",
    "conntrack_gc_interval_s": "seconds between removals of connections that are over",
    "resync_interval_s": "seconds between comparisons of the kernel with what it should hold",
    "log_level": "the least that is logged: debug, info, warning or error",
    "log_format": "auto (for people on a terminal, else JSON), json or console",
}


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> AgentConfig:
    """Raises ConfigError, ConfigInvalid; argparse ends the process for --help, for flags that do
    not exist and for values of the wrong type."""
    return config_of(
        settings.parse(
            Options,
            argv,
            environ,
            service="agent",
            description="The node's datapath service.",
            help_of=HELP,
        )
    )


def config_of(o: Options) -> AgentConfig:
    """Raises ConfigError, ConfigInvalid."""
    check_logging(o)
    nat_ports = _port_range("--nat-ports", o.nat_ports, "61000-65535")
    proxy_ports = _port_range("--proxy-ports", o.proxy_ports, "10000-20000")
    try:
        LabelFilter.parse(o.labels)
    except LabelError as error:
        raise ConfigInvalid(f"--labels: {error}") from error
    config = AgentConfig(
        node=o.node_name,
        cluster=o.cluster_name,
        run_dir=o.run_dir,
        state_dir=o.state_dir,
        bpffs=o.bpffs,
        object_dir=o.object_dir,
        identity_socket=o.identity_socket,
        xds_socket=o.xds_socket,
        socket_group=o.group,
        metrics_address=o.metrics_address or None,
        pool4=_network("--ipv4-pool", o.ipv4_pool, IPv4Network),
        pool6=_network("--ipv6-pool", o.ipv6_pool, IPv6Network),
        mtu=o.mtu,
        big_tcp=o.big_tcp == "auto",
        devices=tuple(name for name in o.devices.split(",") if name),
        masquerade4=o.masquerade_ipv4 == "on",
        masquerade6=o.masquerade_ipv6 == "on",
        nat_port_min=nat_ports[0],
        nat_port_max=nat_ports[1],
        proxy_port_min=proxy_ports[0],
        proxy_port_max=proxy_ports[1],
        proxy_release_delay_s=o.proxy_release_delay_s,
        attach=o.attach,
        enforcement=o.enable_policy,
        allow_localhost=o.allow_localhost,
        policy_audit=o.policy_audit_mode == "on",
        node_labels=o.node_label,
        control_ports=o.host_control_port,
        allow_frag_needed=o.allow_icmp_frag_needed == "on",
        aggregation=o.monitor_aggregation,
        report_interval_s=o.monitor_interval_s,
        map_sizes=MapSizes(
            policy=o.bpf_policy_map_max,
            policy_slots=o.bpf_policy_slots,
            conntrack=o.bpf_ct_max,
            nat=o.bpf_nat_max,
            ipcache=o.bpf_ipcache_max,
            events_bytes=o.bpf_events_bytes,
        ),
        conntrack=ConntrackLifetimes(tcp_s=o.ct_tcp_s, any_s=o.ct_any_s),
        label_rules=tuple(o.labels.split()),
        lease_ttl_s=o.lease_ttl_s,
        endpoint_add_timeout_s=o.endpoint_add_timeout_s,
        identity_timeout_s=o.identity_timeout_s,
        cidr_release_delay_s=o.cidr_release_delay_s,
        conntrack_gc_interval_s=o.conntrack_gc_interval_s,
        resync_interval_s=o.resync_interval_s,
        log_level=o.log_level,
        log_format=o.log_format,
    )
    check(config)
    node_labels(config.node_labels)
    control_ports(config.control_ports, config.metrics_address)
    return config


def _network(flag: str, text: str, kind: type[NetworkT]) -> NetworkT:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigInvalid(f"{flag} {text}: {error}") from error


def _port_range(flag: str, text: str, such_as: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (dash and low.isdigit() and high.isdigit()):
        raise ConfigInvalid(f"{flag} {text}: give a range, such as {such_as}")
    return int(low), int(high)
