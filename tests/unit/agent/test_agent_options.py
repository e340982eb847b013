"""The agent's command line: what its help says, and what becomes of flags."""

from __future__ import annotations

from dataclasses import fields
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cilia.errors import InvalidError
from services.agent.config import AgentConfig
from services.agent.options import HELP, Options, parse


def test_every_flag_says_what_it_is_for_and_its_default_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(HELP) == [field.name for field in fields(Options)]
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    said = " ".join(capsys.readouterr().out.split())
    assert "default None" not in said
    assert "(default )" not in said
    assert said.count("(default: RUN_DIR/bpf)") == 1
    assert "IPv4 addresses (default 10.217.0.0/16)" in said
    assert "--masquerade-ipv4 {on,off} hide endpoints from the world (default on)" in said


def test_nothing_given_is_the_config_of_a_node() -> None:
    config = parse(["--node-name", "n1"], {})
    assert config == AgentConfig(node="n1")


def test_flags_and_variables() -> None:
    flags = (
        "--node-name n1 --ipv4-pool 10.1.0.0/16 --masquerade-ipv6 off --policy-audit-mode on"
        " --node-label a=b --node-label c --nat-ports 50000-50100 --devices eth0,eth1"
        " --ct-tcp 60 --bpf-ct-max 1000 --resync-interval 0.5 --metrics-address 127.0.0.1:9000"
    )
    environ = {
        "CILIA_AGENT_IPV4_POOL": "10.2.0.0/16",  # the flag counts
        "CILIA_AGENT_ATTACH": "clsact",
        "CILIA_AGENT_HOST_CONTROL_PORT": "tcp/1 udp/2/egress",
        "CILIA_AGENT_STATE_DIR": "/x",
    }
    config = parse(flags.split(), environ)
    assert config.pool4 == IPv4Network("10.1.0.0/16")
    assert (config.masquerade4, config.masquerade6, config.policy_audit) == (True, False, True)
    assert config.node_labels == ("a=b", "c")
    assert config.control_ports == ("tcp/1", "udp/2/egress")
    assert (config.nat_port_min, config.nat_port_max) == (50000, 50100)
    assert config.devices == ("eth0", "eth1")
    assert (config.conntrack.tcp_s, config.map_sizes.conntrack) == (60, 1000)
    assert (config.resync_interval_s, config.attach) == (0.5, "clsact")
    assert (config.metrics_address, config.state_dir) == ("127.0.0.1:9000", Path("/x"))


@pytest.mark.parametrize(
    ("flags", "environ", "fault"),
    [
        ("--ipv4-pool fd00::/64", {}, "--ipv4-pool fd00::/64: "),
        ("--ipv4-pool 10.0.0.1/8", {}, "--ipv4-pool 10.0.0.1/8: .* host bits set"),
        ("--nat-ports 5", {}, "--nat-ports 5: give a range"),
        ("--proxy-ports 9-8", {}, "proxy ports 9-8"),
        ("--labels !", {}, "--labels: "),
        ("--log-level loud", {}, "--log-level 'loud'"),
        ("", {"CILIA_AGENT_ATTACH": "glue"}, "CILIA_AGENT_ATTACH='glue' is none of auto, tcx"),
    ],
)
def test_what_cannot_be_is_named(flags: str, environ: dict[str, str], fault: str) -> None:
    with pytest.raises(InvalidError, match=fault):
        parse(["--node-name", "n1", *flags.split()], environ)
