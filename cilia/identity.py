"""Numeric identities: the number that the kernel knows a set of labels by.

Bits 0 to 15 number the identity within a cluster, bits 16 to 23 the cluster, bit 24 marks an
identity that only this node knows (a CIDR). Only 24 bits travel between nodes, so local ones never
leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from types import MappingProxyType
from typing import Final, NewType

from cilia.labels import SOURCE_CIDR, SOURCE_RESERVED, Label, Labels

NumericIdentity = NewType("NumericIdentity", int)
EndpointID = NewType("EndpointID", int)

UNKNOWN: Final = NumericIdentity(0)
HOST: Final = NumericIdentity(1)
WORLD: Final = NumericIdentity(2)
UNMANAGED: Final = NumericIdentity(3)
HEALTH: Final = NumericIdentity(4)
INIT: Final = NumericIdentity(5)
REMOTE_NODE: Final = NumericIdentity(6)
KUBE_APISERVER: Final = NumericIdentity(7)
INGRESS: Final = NumericIdentity(8)
WORLD_IPV4: Final = NumericIdentity(9)
WORLD_IPV6: Final = NumericIdentity(10)

RESERVED: Final[Mapping[NumericIdentity, str]] = MappingProxyType(
    {
        HOST: "host",
        WORLD: "world",
        UNMANAGED: "unmanaged",
        HEALTH: "health",
        INIT: "init",
        REMOTE_NODE: "remote-node",
        KUBE_APISERVER: "kube-apiserver",
        INGRESS: "ingress",
        WORLD_IPV4: "world-ipv4",
        WORLD_IPV6: "world-ipv6",
    }
)
RESERVED_BY_NAME: Final[Mapping[str, NumericIdentity]] = MappingProxyType(
    {name: number for number, name in RESERVED.items()}
)

MIN_CLUSTER_ID: Final = 256
MAX_CLUSTER_ID: Final = 65535
LOCAL_SCOPE: Final = 1 << 24
MAX_LOCAL_ID: Final = LOCAL_SCOPE | 0xFFFFFF
_CLUSTER_SHIFT: Final = 16


def is_reserved(identity: int) -> bool:
    """Whether the identity is fixed by number, the same everywhere."""
    return 0 < identity < MIN_CLUSTER_ID


def is_local(identity: int) -> bool:
    """Whether only this node knows the identity: it stands for a CIDR."""
    return LOCAL_SCOPE < identity <= MAX_LOCAL_ID


def is_cluster(identity: int) -> bool:
    """Whether the identity was allocated for labels, in this cluster or a connected one."""
    return identity < LOCAL_SCOPE and (identity & 0xFFFF) >= MIN_CLUSTER_ID


def cluster_of(identity: int) -> int:
    """The cluster number (0 to 255) of a cluster identity."""
    return (identity >> _CLUSTER_SHIFT) & 0xFF


def identity_name(identity: int) -> str:
    """The name of a reserved identity, else the number in decimal."""
    return RESERVED.get(NumericIdentity(identity), str(identity))


def parse_identity(text: str) -> NumericIdentity:
    """Read a reserved name or a number, also 0x, 0o, 0b. Raises ValueError."""
    name = text.removeprefix("reserved:")
    if name in RESERVED_BY_NAME:
        return RESERVED_BY_NAME[name]
    try:
        number = int(text, 0)
    except ValueError:
        raise ValueError(
            f"{text!r} is not an identity: give a number or one of {', '.join(RESERVED_BY_NAME)}"
        ) from None
    if not 0 < number <= MAX_LOCAL_ID:
        raise ValueError(f"identity {number} is outside 1 to {MAX_LOCAL_ID}")
    return NumericIdentity(number)


def reserved_label(name: str) -> Label:
    return Label(SOURCE_RESERVED, name)


_WORLD4: Final = Labels((reserved_label("world"), reserved_label("world-ipv4")))
_WORLD6: Final = Labels((reserved_label("world"), reserved_label("world-ipv6")))
_RESERVED_LABELS: Final = {
    number: Labels((reserved_label(name),)) for number, name in RESERVED.items()
} | {WORLD_IPV4: _WORLD4, WORLD_IPV6: _WORLD6}


def reserved_labels(identity: int) -> Labels:
    """The labels of a reserved identity. Raises KeyError for a number that has no name.

    The world of one family is also part of the world, so 9 and 10 carry ``reserved:world`` too.
    """
    return _RESERVED_LABELS[NumericIdentity(identity)]


def reserved_identity(labels: Labels) -> NumericIdentity | None:
    """The reserved identity of exactly these labels; None for any other set."""
    for number, known in _RESERVED_LABELS.items():
        if known == labels or (len(labels) == 1 and reserved_label(RESERVED[number]) in labels):
            return number
    return None


# What `cidr_labels` wrote, to be read again: of an identity it is asked at each change.
_PREFIXES: Final[dict[str, IPv4Network | IPv6Network]] = {}
_MAX_PREFIXES: Final = 1 << 18


def cidr_labels(prefix: IPv4Network | IPv6Network | str) -> Labels:
    """The labels of a prefix: ``cidr:<prefix>`` and its family's world; of /0 the world alone.

    Containment is decided from the one prefix, so a label for each shorter length is not needed.
    """
    network = ip_network(prefix) if isinstance(prefix, str) else prefix
    world = _WORLD4 if network.version == 4 else _WORLD6
    if not network.prefixlen:
        return world
    text = str(network)
    if len(_PREFIXES) >= _MAX_PREFIXES:
        _PREFIXES.clear()
    _PREFIXES[text] = network
    return world.merge([Label(SOURCE_CIDR, text)])


def cidr_prefix(labels: Labels) -> IPv4Network | IPv6Network | None:
    """The prefix a CIDR identity stands for; /0 for a world of one family; None for all else."""
    for label in labels:
        if label.source == SOURCE_CIDR:
            found = _PREFIXES.get(label.key)
            return found if found is not None else _network(label.key)
    if labels == _WORLD4 or (len(labels) == 1 and reserved_label("world-ipv4") in labels):
        return _network("0.0.0.0/0")
    if labels == _WORLD6 or (len(labels) == 1 and reserved_label("world-ipv6") in labels):
        return _network("::/0")
    return None


@lru_cache(maxsize=4096)
def _network(text: str) -> IPv4Network | IPv6Network | None:
    """Read over and over, for a moment each."""
    try:
        return ip_network(text)
    except ValueError:
        return None
