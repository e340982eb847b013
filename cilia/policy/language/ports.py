"""Ports, port rules and ICMP types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from cilia.policy.api import (
    L4,
    MAX_PORT,
    PARSER_LISTENER,
    PARSER_TLS,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_NAMES,
    PROTO_SCTP,
    PROTO_TCP,
    PROTO_UDP,
    L7Rules,
    NamedPort,
    Origin,
    PortRule,
)
from cilia.policy.language.requests import L7, TLS
from cilia.policy.schema import (
    INVALID,
    Checking,
    Choice,
    Int,
    ListOf,
    Object,
    Text,
    Type,
    canonical,
    shown,
    suggestion,
)
from cilia.policy.tree import Node

NO_ORIGIN: Final = Origin("")  # to be that of the entry
MAX_PORTS: Final = 40  # Cilium's bound of one `ports` list
MAX_PORT_RULES: Final = 1000
PROTOCOLS: Final[Mapping[str, int]] = {
    "TCP": PROTO_TCP,
    "UDP": PROTO_UDP,
    "SCTP": PROTO_SCTP,
    "ANY": 0,
}
_OF_ANY: Final = (PROTO_TCP, PROTO_UDP, PROTO_SCTP)
_DNS_OF_ANY: Final = (PROTO_TCP, PROTO_UDP)
_PORT_NAME: Final = re.compile(r"(?=.{1,15}\Z)(?!.*--)(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")


def port_name(text: str) -> str:
    """An IANA service name, as endpoints name their ports. Raises ValueError."""
    if not _PORT_NAME.match(text):
        raise ValueError(
            f"{shown(text)} is not the name of a port: lower case letters, digits and single '-', "
            "at least one letter, at most 15 characters"
        )
    return text


def _port(text: str) -> int | str:
    if text.isascii() and text.isdigit():
        if len(text) > 1 and text[0] == "0":
            raise ValueError(f"port {shown(text)} has a leading zero: write it in decimal")
        if len(text) > 5 or int(text) > MAX_PORT:
            raise ValueError(f"port {shown(text)} is above {MAX_PORT}")
        return int(text)
    if re.match(r"0[xX]", text):
        raise ValueError(f"port {shown(text)} is not decimal")
    lower = text.lower()
    if not _PORT_NAME.match(lower):
        raise ValueError(
            f"port {shown(text)} is neither a number from 0 to {MAX_PORT} nor a port name"
        )
    return lower


class _Protocol:
    model: Final = Choice(tuple(PROTOCOLS), "protocol", any_case=True)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, str) and node.value.upper() in ("ICMP", "ICMPV6"):
            c.fault(path, node, "ICMP has types, not ports: write it as `icmps`")
            return INVALID
        word = self.model.check(node, path, c)
        return word if word is INVALID else PROTOCOLS[word]


# A port as written: one range or name of one protocol, 0 being any.
_Port = L4 | NamedPort


def _build_port(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "port" not in v:
        return INVALID
    port, end, proto = v["port"], v.get("endPort", 0), v.get("protocol", 0)
    if isinstance(node.value["port"].value, int):
        c.warn(f"{path}.port", node.value["port"], "is a number: Kubernetes takes only text here")
    if isinstance(port, str):
        if end:
            c.fault(f"{path}.endPort", node.value["endPort"], "a named port has no range")
            return INVALID
        return NamedPort(port, proto)
    if not end:
        return L4(proto, port, port or MAX_PORT)
    if port == 0:
        c.fault(f"{path}.endPort", node.value["endPort"], "port 0 already means every port")
        return INVALID
    if end < port:
        c.fault(f"{path}.endPort", node.value["endPort"], f"{end} is below port {port}")
        return INVALID
    return L4(proto, port, end)


def of_any(ports: list[_Port], protocols: tuple[int, ...] = _OF_ANY) -> tuple[L4, ...]:
    """The numbered ports, those of any protocol spelled out."""
    found = (
        L4(proto, x.first, x.last)
        for x in ports
        if isinstance(x, L4)
        for proto in ((x.proto,) if x.proto else protocols)
    )
    return tuple(dict.fromkeys(found))


def _check_l7(l7: L7Rules, ports: list[_Port], node: Node, path: str, c: Checking) -> None:
    kind = l7.parser
    what = {PARSER_TLS: "TLS", PARSER_LISTENER: "a listener"}.get(kind, f"{kind} rules")
    verb = "needs" if kind in (PARSER_TLS, PARSER_LISTENER) else "need"
    given = node.value.get("ports")
    entries = given.value if given is not None and isinstance(given.value, list) else []
    if not entries:
        example = " (53)" if kind == "dns" else ""
        c.fault(f"{path}.ports", node, f"{what} {verb} the port{example} to be written")
        return
    if len(ports) != len(entries):
        return  # places do not agree, and there are faults already
    for i, port in enumerate(ports):
        name = PROTO_NAMES[port.proto]
        if kind == "dns":
            if port.proto not in (0, PROTO_TCP, PROTO_UDP):
                c.fault(f"{path}.ports[{i}].protocol", entries[i], f"DNS does not speak {name}")
        elif port.proto != PROTO_TCP:
            c.fault(
                f"{path}.ports[{i}].protocol",
                entries[i],
                f"{what} {verb} the protocol TCP, written out",
            )
        if isinstance(port, L4) and port.first == 0:
            c.fault(f"{path}.ports[{i}].port", entries[i], f"{what} {verb} a port other than 0")


def _l7(v: dict[str, Any], node: Node, path: str, c: Checking) -> L7Rules | None:
    rules: L7Rules | None = v.get("rules")
    originating, terminating = v.get("originatingTLS"), v.get("terminatingTLS")
    names, listener = tuple(v.get("serverNames", ())), v.get("listener", "")
    if listener and (rules or originating or terminating or names):
        c.fault(
            f"{path}.listener",
            node.value["listener"],
            "a listener judges requests itself: it cannot stand with rules, TLS contexts or "
            "serverNames",
        )
    if names and rules and not terminating:
        c.fault(
            f"{path}.serverNames",
            node.value["serverNames"],
            "with rules, serverNames need terminatingTLS: without it no request can be seen",
        )
    if rules and rules.parser == "dns" and (originating or terminating):
        c.fault(f"{path}.rules.dns", node.value["rules"], "DNS is not proxied under TLS")
    if listener:
        return L7Rules(PARSER_LISTENER, listener=listener)
    if rules is None and not (originating or terminating or names):
        return None
    return L7Rules(
        parser=rules.parser if rules else PARSER_TLS,
        rules=rules.rules if rules else (),
        originating_tls=originating,
        terminating_tls=terminating,
        server_names=names,
    )


def _build_port_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    ports: list[_Port] = v.get("ports", [])
    l7 = _l7(v, node, path, c)
    if l7 is not None:
        _check_l7(l7, ports, node, path, c)
    elif not ports:
        c.warn(path, node, "lists no ports, so it selects no traffic")
    dns = l7 is not None and l7.parser == "dns"
    return PortRule(
        l4=of_any(ports, _DNS_OF_ANY if dns else _OF_ANY),
        named=tuple(dict.fromkeys(x for x in ports if isinstance(x, NamedPort))),
        l7=l7,
        path=path,
        # Places are stored, and there may be many: only L7 rules are told by their own.
        origin=c.mark(path, node) if l7 is not None else NO_ORIGIN,
    )


_PORTS: Final = ListOf(
    Object(
        {
            "port": Text(
                _port,
                max_length=64,
                number_ok=True,
                kubernetes_number_ok=False,
                pattern=r"^[0-9a-zA-Z]([-0-9a-zA-Z]*[0-9a-zA-Z])?$",
            ),
            "endPort": Int(0, MAX_PORT),
            "protocol": _Protocol(),
        },
        required=("port",),
        build=_build_port,
    ),
    MAX_PORTS,
    "ports",
)


def _server_name(text: str) -> str:
    if not re.fullmatch(r"(\*{1,2}\.)?[-a-zA-Z0-9_.]+|\*", text) or ".." in text:
        raise ValueError(f"{shown(text)} is not a server name")
    return text.lower().removesuffix(".")


_LISTENER: Final = Object(
    {
        "envoyConfig": Object(
            {
                "kind": Choice(("CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig"), "kind"),
                "name": Text(max_length=253),
            },
            required=("name",),
        ),
        "name": Text(max_length=253),
        "priority": Int(0, 100),
    },
    required=("envoyConfig", "name"),
    build=lambda v, node, path, c: canonical(node),
)
_PORT_RULE_FIELDS: Final[Mapping[str, Type]] = {
    "ports": _PORTS,
    "rules": L7,
    "terminatingTLS": TLS,
    "originatingTLS": TLS,
    "serverNames": ListOf(Text(_server_name, max_length=255), 1000),
    "listener": _LISTENER,
}
PORT_RULES: Final = ListOf(
    Object(_PORT_RULE_FIELDS, build=_build_port_rule, name="PortRule"), MAX_PORT_RULES
)
_ONLY_PORTS: Final = "a deny rule has ports only: what it denies, it denies whatever the request"
DENY_PORT_RULES: Final = ListOf(
    Object(
        {"ports": _PORTS},
        build=_build_port_rule,
        elsewhere={name: _ONLY_PORTS for name in _PORT_RULE_FIELDS if name != "ports"},
        name="DenyPortRule",
    ),
    MAX_PORT_RULES,
)


# ---- ICMP

# Names of ICMP types as Kubernetes documents write them: IANA's, in camel case.
_ICMP4: Final = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEchoRequest": 42,
    "ExtendedEchoReply": 43,
}
_ICMP6: Final = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
    "RouterRenumbering": 138,
    "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}


def _build_icmp(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "type" not in v:
        return INVALID
    family = v.get("family", "IPv4")
    names, proto = (_ICMP4, PROTO_ICMP) if family == "IPv4" else (_ICMP6, PROTO_ICMPV6)
    text = v["type"]
    if text.isascii() and text.isdigit():
        number = int(text) if len(text) < 4 else 256
        if number > 255:
            c.fault(f"{path}.type", node.value["type"], f"type {text[:20]} is above 255")
            return INVALID
    elif text in names:
        number = names[text]
    else:
        c.fault(
            f"{path}.type",
            node.value["type"],
            f"{shown(text)} is not a known type of {family}{suggestion(text, list(names))}",
        )
        return INVALID
    return L4(proto, number, number)


def _build_icmps(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if not v.get("fields"):
        c.warn(path, node, "lists no ICMP types, so it selects no traffic")
    return PortRule(l4=tuple(dict.fromkeys(v.get("fields", ()))), path=path, origin=NO_ORIGIN)


ICMPS: Final = ListOf(
    Object(
        {
            "fields": ListOf(
                Object(
                    {
                        "family": Choice(("IPv4", "IPv6"), "family"),
                        "type": Text(max_length=64, number_ok=True),
                    },
                    required=("type",),
                    build=_build_icmp,
                ),
                MAX_PORTS,
            )
        },
        build=_build_icmps,
        name="ICMPRule",
    ),
    MAX_PORT_RULES,
)
