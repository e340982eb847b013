"""Numeric identities: scopes, the reserved table, and the labels of prefixes."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from cilia.identity import (
    RESERVED,
    WORLD_IPV4,
    WORLD_IPV6,
    cidr_labels,
    cidr_prefix,
    cluster_of,
    identity_name,
    is_cluster,
    is_local,
    is_reserved,
    parse_identity,
    reserved_identity,
    reserved_labels,
)
from cilia.labels import Labels


@pytest.mark.parametrize(
    ("number", "reserved", "local", "cluster"),
    [
        (0, False, False, False),
        (1, True, False, False),
        (255, True, False, False),
        (256, False, False, True),
        (65535, False, False, True),
        ((7 << 16) | 300, False, False, True),
        ((7 << 16) | 3, False, False, False),
        (1 << 24, False, False, False),
        ((1 << 24) + 1, False, True, False),
        ((1 << 25) - 1, False, True, False),
        (1 << 25, False, False, False),
    ],
)
def test_scopes(number: int, reserved: bool, local: bool, cluster: bool) -> None:
    assert (is_reserved(number), is_local(number), is_cluster(number)) == (reserved, local, cluster)


def test_reserved_table() -> None:
    assert {int(k): v for k, v in RESERVED.items()} == {
        1: "host",
        2: "world",
        3: "unmanaged",
        4: "health",
        5: "init",
        6: "remote-node",
        7: "kube-apiserver",
        8: "ingress",
        9: "world-ipv4",
        10: "world-ipv6",
    }
    for number in RESERVED:
        assert reserved_identity(reserved_labels(number)) == number
        assert parse_identity(identity_name(number)) == number
    assert reserved_identity(Labels.parse(["reserved:world-ipv4"])) == WORLD_IPV4
    assert reserved_identity(Labels.parse(["reserved:host", "k8s:a=b"])) is None
    assert reserved_identity(Labels()) is None


def test_names_and_numbers() -> None:
    assert parse_identity("0x100") == 256
    assert parse_identity("reserved:host") == 1
    assert identity_name(300) == "300"
    assert cluster_of((7 << 16) | 300) == 7
    for wrong in ("", "abc", "0", "-1", str(1 << 25)):
        with pytest.raises(ValueError, match="identity"):
            parse_identity(wrong)


def test_prefixes() -> None:
    labels = cidr_labels("10.0.0.0/8")
    assert [str(x) for x in labels] == [
        "cidr:10.0.0.0/8",
        "reserved:world",
        "reserved:world-ipv4",
    ]
    assert cidr_prefix(labels) == ip_network("10.0.0.0/8")
    assert cidr_labels("0.0.0.0/0") == reserved_labels(WORLD_IPV4)
    assert cidr_labels("::/0") == reserved_labels(WORLD_IPV6)
    assert cidr_prefix(reserved_labels(WORLD_IPV6)) == ip_network("::/0")
    assert cidr_prefix(cidr_labels("2001:db8::1/128")) == ip_network("2001:db8::1/128")
    assert cidr_prefix(reserved_labels(2)) is None
    assert cidr_prefix(Labels.parse(["k8s:a=b"])) is None
