"""CIDRs as peers, alone and with exceptions."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final

from cilia.policy.api import AbsentSelector, CidrSelector, Network
from cilia.policy.language.selectors import SELECTOR
from cilia.policy.schema import INVALID, Checking, ListOf, Object, Text, canonical, shown
from cilia.policy.tree import Node

MAX_EXCEPTS: Final = 100_000
_OCTET: Final = "(0|[1-9][0-9]{0,2})"
_IPV4: Final = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}(?:/(0|[1-9][0-9]?))?\Z")
_MAPPED: Final = IPv6Network("::ffff:0:0/96")


def _network(text: str, *, need_length: bool) -> Network:
    address, slash, length = text.partition("/")
    if need_length and not slash:
        raise ValueError(f"{shown(text)} has no prefix length: write {address}/32 or /128")
    if slash and not (length.isascii() and length.isdigit()):
        raise ValueError(f"{shown(text)} is not a CIDR: the prefix length must be a number")
    if "%" in text:
        raise ValueError(f"{shown(text)}: a CIDR has no zone")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not an IPv4 or IPv6 {'CIDR' if slash else 'address or CIDR'}"
        ) from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        raise ValueError(f"{shown(text)} is an IPv4-mapped address: write it as IPv4")
    return network


class Prefix4(IPv4Network):
    """An IPv4 network that remembers its hash: as a key it is looked up a few dozen times before
    it is in force."""

    _own_hash: int | None = None

    def __hash__(self) -> int:
        if self._own_hash is None:
            self._own_hash = super().__hash__()
        return self._own_hash

    def __repr__(self) -> str:
        return repr(str(self))


def _read(text: str, *, need_length: bool) -> tuple[Network, bool]:
    """The network, and whether it is written without bits beyond its length.

    Plain IPv4 is read here, as ipaddress would at several times the cost: a set may be long.
    """
    if (found := _IPV4.match(text)) is not None and (found[5] is not None or not need_length):
        a, b, c, d = (int(x) for x in found.group(1, 2, 3, 4))
        length = 32 if found[5] is None else int(found[5])
        if max(a, b, c, d) <= 255 and length <= 32:
            address = a << 24 | b << 16 | c << 8 | d
            first = address >> (32 - length) << (32 - length)
            return Prefix4((first, length)), first == address
    network = _network(text, need_length=need_length)
    address_text, slash, _ = text.partition("/")
    exact = not slash or int(ip_address(address_text)) == int(network.network_address)
    return network, exact


class Cidr:
    """A CIDR; bits beyond its length are cut off, with a warning."""

    def __init__(self, *, need_length: bool) -> None:
        self.model: Final = Text(
            lambda text: (text, *_read(text, need_length=need_length)), max_length=64
        )

    def check(self, node: Node, path: str, c: Checking) -> Any:
        found = self.model.check(node, path, c)
        if found is INVALID:
            return INVALID
        text, network, exact = found
        if not exact:
            c.warn(path, node, f"{text} has bits beyond its length; it means {network}")
        return network


class CidrPeer:
    """A CIDR or an address as a peer."""

    model: Final = Cidr(need_length=False)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        network = self.model.check(node, path, c)
        return network if network is INVALID else CidrSelector(network)


def cidr_except(
    v: dict[str, Any], node: Node, path: str, c: Checking, *, strict: bool = False
) -> Any:
    """The selector of a `cidr` with its `except`; `strict`: none may be all of it."""
    if "cidr" not in v:
        return INVALID
    prefix, excepts = v["cidr"], v.get("except", [])
    within = CidrSelector(prefix)
    for i, inner in enumerate(excepts):
        at = node.value["except"].value
        place = at[i] if i < len(at) else node
        if not within.contains(inner):
            c.fault(f"{path}.except[{i}]", place, f"{inner} is not inside {prefix}")
            return INVALID
        if inner == prefix:
            if strict:
                c.fault(f"{path}.except[{i}]", place, f"excepts all of {prefix}")
                return INVALID
            c.warn(f"{path}.except[{i}]", place, f"excepts all of {prefix}: selects nothing")
    return CidrSelector(prefix, tuple(dict.fromkeys(excepts)))


def _build_cidr_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    names = ("cidr", "cidrGroupRef", "cidrGroupSelector")
    given = [name for name in names if name in node.value and node.value[name].value is not None]
    if len(given) != 1:
        c.fault(path, node, "needs exactly one of cidr, cidrGroupRef and cidrGroupSelector")
        return INVALID
    if "cidr" not in given:
        return AbsentSelector(given[0], canonical(node))
    return cidr_except(v, node, path, c)


CIDR_RULE: Final = Object(
    {
        "cidr": Cidr(need_length=True),
        "except": ListOf(Cidr(need_length=True), MAX_EXCEPTS),
        "cidrGroupRef": Text(max_length=253),
        "cidrGroupSelector": SELECTOR,
    },
    build=_build_cidr_rule,
    name="CIDRRule",
)
