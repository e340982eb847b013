"""The node as a subject: its labels, its control ports, and the connections it already had."""

from __future__ import annotations

import ipaddress
import sys

import numpy as np
import pytest

from cilia.bpf.constants import CT_F_FROM_HOST, CT_F_INIT_LO, CT_F_OUTSIDE, CT_F_TO_HOST
from cilia.bpf.layout import CT_ENTRY, CT_KEY, from_addr
from cilia.policy import MapState, PolicyEntry
from cilia.policy.api import RuleID
from cilia.policy.mapstate import L4Key
from services.agent.config import ConfigInvalid, ConntrackLifetimes
from services.agent.hostpolicy import (
    ControlPort,
    control_ports,
    control_ports_row,
    ending,
    node_labels,
    parse_streams,
)

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n"
TCP4 = HEAD + (
    "   0: 00000000:0016 00000000:0000 0A 0 0 0\n"  # sshd listens
    "   1: 0200000A:0016 0900000A:9C40 01 0 0 0\n"  # 10.0.0.9:40000 to it
    "   2: 0200000A:C350 0900000A:0050 02 0 0 0\n"  # the node connects to 10.0.0.9:80
    "   3: 0100007F:0016 0100007F:9C41 01 0 0 0\n"  # loopback
    "   4: 0200000A:0016 0900000A:9C42 06 0 0 0\n"  # over
    "   5: short\n"
)
TCP6 = HEAD + (
    # fd77::2 to [fd77::1]:443, and an IPv4-mapped peer of a listener on ::
    "   0: 000077FD000000000000000002000000:C351 000077FD000000000000000001000000:01BB 08 0 0\n"
    "   1: 0000000000000000FFFF00000200000A:1F90 0000000000000000FFFF00000900000A:9C43 01 0 0\n"
    "   2: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0 0\n"
)


@pytest.mark.skipif(sys.byteorder == "big", reason="the sample is of a little-endian machine")
def test_the_nodes_connections_and_who_began() -> None:
    found = {
        (str(x.local), x.local_port, str(x.remote), x.remote_port): (x.inbound, x.opening)
        for x in parse_streams(TCP4, TCP6)
    }
    assert found == {
        ("10.0.0.2", 22, "10.0.0.9", 40000): (True, False),
        ("10.0.0.2", 50000, "10.0.0.9", 80): (False, True),
        ("fd77::2", 50001, "fd77::1", 443): (False, False),
        ("10.0.0.2", 8080, "10.0.0.9", 40003): (True, False),
    }


@pytest.mark.skipif(sys.byteorder == "big", reason="the sample is of a little-endian machine")
def test_entries_say_who_began() -> None:
    inbound, outbound = list(parse_streams(TCP4))
    key, entry = inbound.row(1000, ConntrackLifetimes())
    row, value = np.frombuffer(key, CT_KEY)[0], np.frombuffer(entry, CT_ENTRY)[0]
    assert from_addr(bytes(row["lo"])) == ipaddress.ip_address("10.0.0.2")
    assert (row["lo_port_be"], row["hi_port_be"], row["proto"]) == (22, 40000, 6)
    assert value["flags"] == CT_F_TO_HOST | CT_F_OUTSIDE
    assert value["expires_s"] == 1000 + 21600
    assert not value["side"]["policy_rev"].any()
    value = np.frombuffer(outbound.row(1000, ConntrackLifetimes())[1], CT_ENTRY)[0]
    assert value["flags"] == CT_F_FROM_HOST | CT_F_INIT_LO
    assert (value["expires_s"], list(value["seen"])) == (1060, [0, 0])


def test_what_a_policy_would_end() -> None:
    ssh, web, tls, app = list(parse_streams(TCP4, TCP6))
    state = MapState(
        {
            9: {L4Key(False, 6, 22, 24): PolicyEntry(False, RuleID(1))},
            0: {L4Key(True, 6, 443, 24): PolicyEntry(False, RuleID(2))},
        }
    )
    assert ending([ssh, web, tls, app], state, lambda _: 9) == [web, app]
    assert ending([ssh], state, lambda _: 10) == [ssh]


def test_labels_of_the_node() -> None:
    labels = node_labels(("role=edge", "cloud:zone=a", "node-role.kubernetes.io/worker="))
    assert sorted(map(str, labels)) == [
        "cloud:zone=a", "k8s:node-role.kubernetes.io/worker", "k8s:role=edge", "reserved:host",
    ]  # fmt: skip
    for text in ("reserved:world", "", "=x"):
        with pytest.raises(ConfigInvalid, match="--node-label"):
            node_labels((text,))


def test_control_ports() -> None:
    ports = control_ports(("tcp/4240", "UDP/53/egress", "tcp/4240"), "127.0.0.1:9962")
    assert ports == (
        ControlPort(6, 4240),
        ControlPort(17, 53, True),
        ControlPort(6, 9962),
    )
    row = control_ports_row(ports)
    assert len(row) == 32
    assert row[:12] == b"\x10\x90\x06\x00\x00\x35\x11\x01\x26\xea\x06\x00"
    assert control_ports((), "/run/metrics.sock") == ()
    for text in ("tcp", "icmp/8", "tcp/0", "tcp/65536", "tcp/80/out", "tcp/x", "tcp/\u0663"):
        with pytest.raises(ConfigInvalid, match="--host-control-port"):
            ControlPort.parse(text)
    with pytest.raises(ConfigInvalid, match="8 are the most"):
        control_ports(tuple(f"tcp/{n}" for n in range(1, 10)), None)
