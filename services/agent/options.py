"""The agent's command line: flags, then CILIA_AGENT_<NAME>, then config.py's defaults."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cilia.labels import LabelError, LabelFilter
from services.agent.config import (
    AGGREGATION_LEVEL,
    AgentConfig,
    ConfigInvalid,
    ConntrackLifetimes,
    MapSizes,
    check,
    parse_networks,
)
from services.agent.hostpolicy import control_ports, node_labels

ENV_PREFIX = "CILIA_AGENT_"
_DEFAULT = AgentConfig(node="-")
_SIZES = MapSizes()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show: none of None, and none of nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, ""):
            return action.help
        return super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="agent",
        description="The node's datapath service.",
        formatter_class=_Help,
    )
    add = p.add_argument
    add("--node-name", default=socket.gethostname(), help="this node in the cluster")
    add("--cluster-name", default=_DEFAULT.cluster, help="the cluster's name in policy")
    add("--run-dir", type=Path, default=_DEFAULT.run_dir, help="sockets")
    add("--state-dir", type=Path, default=_DEFAULT.state_dir, help="records that survive")
    add("--bpffs", type=Path, help="root of the bpffs (default: RUN_DIR/bpf)")
    add("--object-dir", type=Path, default=_DEFAULT.object_dir, help="compiled eBPF objects")
    add(
        "--identity-socket",
        type=Path,
        help="of the identity service (default: RUN_DIR/identity.sock)",
    )
    add("--xds-socket", type=Path, help="of the xds service (default: RUN_DIR/xds.sock)")
    add("--group", default=_DEFAULT.socket_group, help="owns the socket, if it exists")
    add("--metrics-address", default="", help="/a/path or host:port; empty: not served")
    add("--ipv4-pool", default=str(_DEFAULT.pool4), help="endpoints' IPv4 addresses")
    add("--ipv6-pool", default=str(_DEFAULT.pool6), help="endpoints' IPv6 addresses")
    add("--mtu", type=int, default=0, help="0: that of the default route's device")
    add(
        "--big-tcp",
        choices=["auto", "off"],
        default="auto",
        help="endpoints' TCP segments beyond 64 KiB, if every device of the node takes them",
    )
    add("--devices", default="", help="comma separated; empty: all with a global address")
    on_off = ["on", "off"]
    add("--masquerade-ipv4", choices=on_off, default="on", help="hide endpoints from the world")
    add("--masquerade-ipv6", choices=on_off, default="on", help="hide endpoints from the world")
    add(
        "--nat-ports",
        default=f"{_DEFAULT.nat_port_min}-{_DEFAULT.nat_port_max}",
        help="ports for masquerade",
    )
    add(
        "--proxy-ports",
        default=f"{_DEFAULT.proxy_port_min}-{_DEFAULT.proxy_port_max}",
        help="where the L7 proxy may listen, on the loopback addresses",
    )
    add(
        "--proxy-release-delay",
        type=float,
        default=_DEFAULT.proxy_release_delay_s,
        metavar="S",
        help="a listener of the proxy that no rule needs is kept this long",
    )
    add("--attach", choices=["auto", "tcx", "clsact"], default="auto", help="how programs hang")
    add(
        "--enable-policy",
        choices=["default", "always", "never"],
        default="default",
        help="when endpoints are isolated",
    )
    add(
        "--allow-localhost",
        choices=["always", "policy"],
        default="always",
        help="whether the node may always reach its endpoints",
    )
    add("--policy-audit-mode", choices=on_off, default="off", help="report, drop nothing by policy")
    add(
        "--node-label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="by which policies of nodes (nodeSelector) select this one; may be repeated",
    )
    add(
        "--host-control-port",
        action="append",
        default=[],
        metavar="PROTO/PORT[/egress]",
        help="stays open whatever policy of the node says; may be repeated",
    )
    add("--allow-icmp-frag-needed", choices=on_off, default="on", help="path MTU discovery works")
    add(
        "--monitor-aggregation",
        choices=list(AGGREGATION_LEVEL),
        default=_DEFAULT.aggregation,
        help="how much traces are thinned",
    )
    add("--monitor-interval", type=int, default=5, metavar="S", help="between traces of a flow")
    add("--bpf-policy-map-max", type=int, default=_SIZES.policy, help="rows of one policy")
    add("--bpf-policy-slots", type=int, default=_SIZES.policy_slots, help="distinct policies")
    add("--bpf-ct-max", type=int, default=_SIZES.conntrack, help="connections")
    add("--bpf-nat-max", type=int, default=_SIZES.nat, help="masqueraded connections")
    add("--bpf-ipcache-max", type=int, default=_SIZES.ipcache, help="known prefixes")
    add("--bpf-events-bytes", type=int, default=_SIZES.events_bytes, help="event ring")
    add(
        "--ct-tcp",
        type=int,
        default=ConntrackLifetimes().tcp_s,
        metavar="S",
        help="an idle TCP connection is forgotten after this long",
    )
    add(
        "--ct-any",
        type=int,
        default=ConntrackLifetimes().any_s,
        metavar="S",
        help="the same of any other protocol",
    )
    add("--labels", default="", help="label filter, e.g. 'k8s:app !tmp'")
    add(
        "--lease-ttl",
        type=int,
        default=_DEFAULT.lease_ttl_s,
        metavar="S",
        help="other nodes know our endpoints this long after we are gone",
    )
    add(
        "--endpoint-add-timeout",
        type=float,
        default=_DEFAULT.endpoint_add_timeout_s,
        metavar="S",
        help="until policy is in force, before an endpoint is taken back",
    )
    add(
        "--identity-timeout",
        type=float,
        default=_DEFAULT.identity_timeout_s,
        metavar="S",
        help="of one call to the identity service",
    )
    add(
        "--cidr-release-delay",
        type=float,
        default=_DEFAULT.cidr_release_delay_s,
        metavar="S",
        help="a prefix that no rule names keeps its number this long",
    )
    add(
        "--conntrack-gc-interval",
        type=float,
        default=_DEFAULT.conntrack_gc_interval_s,
        metavar="S",
        help="between removals of connections that are over",
    )
    add(
        "--resync-interval",
        type=float,
        default=_DEFAULT.resync_interval_s,
        metavar="S",
        help="the kernel is compared with what it should hold this often",
    )
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", choices=levels, default="info", help="the least that is logged")
    add(
        "--log-format",
        choices=["auto", "json", "console"],
        default="auto",
        help="auto: for people on a terminal, else JSON",
    )
    return p


def _port_range(flag: str, text: str, such_as: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (dash and low.isdigit() and high.isdigit()):
        raise ConfigInvalid(f"{flag} {text}: give a range, such as {such_as}")
    return int(low), int(high)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> AgentConfig:
    """Raises ConfigInvalid; a flag that does not exist ends the process with 2 (argparse)."""
    p = parser()
    # Given as text, so that the environment is read by the same types and choices as flags.
    from_env: list[str] = []
    for action in p._actions:
        name = action.dest.upper()
        if action.option_strings and f"{ENV_PREFIX}{name}" in environ:
            from_env.append(f"{action.option_strings[-1]}={environ[f'{ENV_PREFIX}{name}']}")
    a: Any = p.parse_args([*from_env, *argv])
    pool4, pool6 = parse_networks([a.ipv4_pool, a.ipv6_pool])
    if pool4 is None or pool6 is None:
        raise ConfigInvalid("give an IPv4 network to --ipv4-pool and an IPv6 one to --ipv6-pool")
    nat_ports = _port_range("--nat-ports", a.nat_ports, "61000-65535")
    proxy_ports = _port_range("--proxy-ports", a.proxy_ports, "10000-20000")
    try:
        LabelFilter.parse(a.labels)
    except LabelError as error:
        raise ConfigInvalid(f"--labels: {error}") from error
    config = AgentConfig(
        node=a.node_name,
        cluster=a.cluster_name,
        run_dir=a.run_dir,
        state_dir=a.state_dir,
        bpffs=a.bpffs,
        object_dir=a.object_dir,
        identity_socket=a.identity_socket,
        xds_socket=a.xds_socket,
        socket_group=a.group,
        metrics_address=a.metrics_address or None,
        pool4=pool4,
        pool6=pool6,
        mtu=a.mtu,
        big_tcp=a.big_tcp == "auto",
        devices=tuple(name for name in a.devices.split(",") if name),
        masquerade4=a.masquerade_ipv4 == "on",
        masquerade6=a.masquerade_ipv6 == "on",
        nat_port_min=nat_ports[0],
        nat_port_max=nat_ports[1],
        proxy_port_min=proxy_ports[0],
        proxy_port_max=proxy_ports[1],
        proxy_release_delay_s=a.proxy_release_delay,
        attach=a.attach,
        enforcement=a.enable_policy,
        allow_localhost=a.allow_localhost,
        policy_audit=a.policy_audit_mode == "on",
        node_labels=tuple(a.node_label),
        control_ports=tuple(a.host_control_port),
        allow_frag_needed=a.allow_icmp_frag_needed == "on",
        aggregation=a.monitor_aggregation,
        report_interval_s=a.monitor_interval,
        map_sizes=MapSizes(
            policy=a.bpf_policy_map_max,
            policy_slots=a.bpf_policy_slots,
            conntrack=a.bpf_ct_max,
            nat=a.bpf_nat_max,
            ipcache=a.bpf_ipcache_max,
            events_bytes=a.bpf_events_bytes,
        ),
        conntrack=ConntrackLifetimes(tcp_s=a.ct_tcp, any_s=a.ct_any),
        label_rules=tuple(a.labels.split()),
        lease_ttl_s=a.lease_ttl,
        endpoint_add_timeout_s=a.endpoint_add_timeout,
        identity_timeout_s=a.identity_timeout,
        cidr_release_delay_s=a.cidr_release_delay,
        conntrack_gc_interval_s=a.conntrack_gc_interval,
        resync_interval_s=a.resync_interval,
        log_level=a.log_level,
        log_format=a.log_format,
    )
    check(config)
    node_labels(config.node_labels)
    control_ports(config.control_ports, config.metrics_address)
    return config
