"""The policy language: one table of what documents may say, and what it means.

`parse_documents` takes text from anywhere and never raises: it gives documents or faults, all or
nothing. What is legal but has no enforcer yet (L7 rules, FQDNs, services, named ports, ...) is
carried and allows nothing, with a warning. In a deny rule the same is a fault: there, ignoring it
would open something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv6Network, ip_network
from pathlib import PurePath
from typing import Any, Final

from cilia.labels import (
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    SOURCE_ANY,
    SOURCE_CIDR,
    SOURCE_GENERATED,
    SOURCE_K8S,
    SOURCE_RESERVED,
    SOURCE_UNSPEC,
    Label,
    LabelError,
    Labels,
    parse_selector_key,
)
from cilia.policy.api import (
    ENTITIES,
    L4,
    MAX_PORT,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_SCTP,
    PROTO_TCP,
    PROTO_UDP,
    AbsentSelector,
    CarriedPorts,
    CidrSelector,
    Document,
    DocumentError,
    DocumentKey,
    Element,
    EndpointSelector,
    EntitySelector,
    Fault,
    Kind,
    Network,
    Origin,
    ParseResult,
    PeerSelector,
    Requirement,
    Rule,
)
from cilia.policy.schema import (
    INVALID,
    Anything,
    Bool,
    Checking,
    Choice,
    Int,
    ListOf,
    MapOf,
    Object,
    Text,
    Type,
    shown,
    suggestion,
)
from cilia.policy.tree import Node, TreeError, from_plain, parse_text

MAX_RULES: Final = 10_000  # in one document
MAX_ELEMENTS: Final = 10_000  # in one list of one rule
MAX_PEERS: Final = 100_000  # a CIDRSet may be long
MAX_PORTS: Final = 40  # Cilium's bound of one `ports` list
MAX_DOCUMENTS: Final = 20_000
MAX_DOCUMENT_BYTES: Final = 512 * 1024  # the store's bound of one document, as JSON

_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
_DNS_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_DNS_SUBDOMAIN: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z"
)
_PORT_NAME: Final = re.compile(r"(?=.{1,15}\Z)(?!.*--)(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")


# ---- leaves


def _selector_key(text: str) -> tuple[str, str]:
    source, key = parse_selector_key(text)
    if source == SOURCE_CIDR:
        raise ValueError("prefixes are selected with fromCIDR, toCIDR, fromCIDRSet and toCIDRSet")
    if source in (SOURCE_ANY, SOURCE_K8S, SOURCE_UNSPEC):
        prefix, slash, name = key.rpartition("/")
        if slash and not _DNS_SUBDOMAIN.match(prefix):
            raise ValueError(
                f"label key {shown(text)}: the part before '/' must be a DNS subdomain"
            )
        if not _LABEL_NAME.match(name):
            raise ValueError(
                f"label key {shown(text)} must be letters, digits, '-', '_' and '.', begin and "
                "end with a letter or digit, at most 63 characters"
            )
    return source, key


def _label_value(text: str, source: str) -> str | None:
    """Why the text cannot be the value of a label of this source; None when it can."""
    if source in (SOURCE_ANY, SOURCE_K8S, SOURCE_UNSPEC) and not _LABEL_VALUE.match(text):
        return (
            f"label value {shown(text)} must be letters, digits, '-', '_' and '.', begin and end "
            "with a letter or digit, at most 63 characters"
        )
    try:
        Label(SOURCE_ANY, "key", text)
    except LabelError as error:
        return str(error).partition(": ")[2] or str(error)
    return None


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


_MAPPED: Final = IPv6Network("::ffff:0:0/96")


class _Cidr:
    """A CIDR; bits beyond its length are cut off, with a warning."""

    def __init__(self, *, need_length: bool) -> None:
        self.text: Final = Text(
            lambda text: (text, _network(text, need_length=need_length)), max_length=64
        )

    def check(self, node: Node, path: str, c: Checking) -> Any:
        found = self.text.check(node, path, c)
        if found is INVALID:
            return INVALID
        text, network = found
        if "/" in text and ip_network(text.partition("/")[0]).network_address != (
            network.network_address
        ):
            c.warn(path, node, f"{text} has bits beyond its length; it means {network}")
        return network


class _CidrPeer:
    """A CIDR or an address as a peer."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        network = _Cidr(need_length=False).check(node, path, c)
        return network if network is INVALID else CidrSelector(network)


# ---- selectors


def _build_expression(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "key" not in v or "operator" not in v:
        return INVALID
    source, key = v["key"]
    values = v.get("values", [])
    if v["operator"] in ("In", "NotIn"):
        if not values:
            c.fault(f"{path}.values", node, f"{v['operator']} needs at least one value")
            return INVALID
        for i, value in enumerate(values):
            if wrong := _label_value(value, source):
                c.fault(f"{path}.values[{i}]", node.value["values"].value[i], wrong)
                return INVALID
        return Requirement(source, key, v["operator"], tuple(sorted(set(values))))
    if values:
        c.fault(f"{path}.values", node.value["values"], f"{v['operator']} takes no values")
        return INVALID
    return Requirement(source, key, v["operator"])


def _build_selector(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    requirements = []
    for name, value in v.get("matchLabels", {}).items():
        source, key = _selector_key(name)
        if wrong := _label_value(value, source):
            c.fault(
                f"{path}.matchLabels[{name[:80]}]", node.value["matchLabels"].value[name], wrong
            )
        requirements.append(Requirement(source, key, "In", (value,)))
    requirements += v.get("matchExpressions", [])
    return EndpointSelector(tuple(dict.fromkeys(requirements)))


class _LabelText:
    """A value of matchLabels; null is the empty one, as in `reserved:host:` unquoted."""

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if node.value is None:
            return ""
        return Text().check(node, path, c)


SELECTOR: Final = Object(
    {
        "matchLabels": MapOf(_LabelText(), max_items=256, key=_selector_key),
        "matchExpressions": ListOf(
            Object(
                {
                    "key": Text(_selector_key),
                    "operator": Choice(("In", "NotIn", "Exists", "DoesNotExist"), "operator"),
                    "values": ListOf(Text(), 1024, "values"),
                },
                required=("key", "operator"),
                build=_build_expression,
            ),
            256,
        ),
    },
    build=_build_selector,
)


# ---- ports


def _canonical(node: Node) -> str:
    return json.dumps(node.plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


_PROTOCOLS: Final = {
    "TCP": (PROTO_TCP,),
    "UDP": (PROTO_UDP,),
    "SCTP": (PROTO_SCTP,),
    "ANY": (PROTO_TCP, PROTO_UDP, PROTO_SCTP),
}


def _port(text: str) -> int | str:
    if text.isascii() and text.isdigit():
        if len(text) > 1 and text[0] == "0":
            raise ValueError(f"port {shown(text)} has a leading zero: write it in decimal")
        if len(text) > 5 or int(text) > MAX_PORT:
            raise ValueError(f"port {shown(text)} is above {MAX_PORT}")
        return int(text)
    if re.match(r"0[xX]", text):
        raise ValueError(f"port {shown(text)} is not decimal")
    if not _PORT_NAME.match(text):
        raise ValueError(
            f"port {shown(text)} is neither a number from 0 to {MAX_PORT} nor a port name"
        )
    return text


class _Protocol:
    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, str) and node.value.upper() in ("ICMP", "ICMPV6"):
            c.fault(path, node, "ICMP has types, not ports: write it as `icmps`")
            return INVALID
        word = Choice(tuple(_PROTOCOLS), "protocol", any_case=True).check(node, path, c)
        return word if word is INVALID else _PROTOCOLS[word]


def _build_port(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "port" not in v:
        return INVALID
    port, end = v["port"], v.get("endPort", 0)
    if isinstance(node.value["port"].value, int):
        c.warn(f"{path}.port", node.value["port"], "is a number: Kubernetes takes only text here")
    protocols = v.get("protocol", _PROTOCOLS["ANY"])
    if isinstance(port, str):
        if end:
            c.fault(f"{path}.endPort", node.value["endPort"], "a named port has no range")
            return INVALID
        return port, protocols
    if not end:
        last = port or MAX_PORT
        return tuple(L4(proto, port, last) for proto in protocols)
    if port == 0:
        c.fault(f"{path}.endPort", node.value["endPort"], "port 0 already means every port")
        return INVALID
    if end < port:
        c.fault(f"{path}.endPort", node.value["endPort"], f"{end} is below port {port}")
        return INVALID
    return tuple(L4(proto, port, end) for proto in protocols)


def _regex(text: str) -> str:
    import re2  # slow to import, and only L7 rules have regular expressions

    try:
        re2.compile(text)
    except re2.error as error:
        reason = error.args[0] if error.args else "syntax error"
        if isinstance(reason, bytes):
            reason = reason.decode(errors="replace")
        raise ValueError(f"{shown(text)} is not an RE2 regular expression: {reason}") from None
    return text


_TLS: Final = Object(
    {
        "secret": Object({"namespace": Text(), "name": Text()}, required=("name",)),
        "trustedCA": Text(),
        "certificate": Text(),
        "privateKey": Text(),
    },
    required=("secret",),
)


def _build_fqdn(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if ("matchName" in node.value) == ("matchPattern" in node.value):
        c.fault(path, node, "needs either matchName or matchPattern")
    return v


def _fqdn(pattern: bool) -> Text:
    allowed = re.compile(r"[-a-zA-Z0-9._*]+\Z" if pattern else r"[-a-zA-Z0-9._]+\Z")

    def parse(text: str) -> str:
        if not allowed.match(text):
            star = " and '*'" if pattern else ""
            raise ValueError(f"{shown(text)} may hold letters, digits, '-', '_', '.'{star} only")
        return text

    return Text(parse, max_length=255)


_FQDN: Final = Object({"matchName": _fqdn(False), "matchPattern": _fqdn(True)}, build=_build_fqdn)


def _build_kafka(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    if "role" in v and "apiKey" in v:
        c.fault(path, node, "role and apiKey cannot stand together")
    return v


_KAFKA: Final = Object(
    {
        "role": Choice(("produce", "consume"), "role", any_case=True),
        "apiKey": Text(max_length=64),
        "apiVersion": Text(max_length=8),
        "clientID": Text(max_length=255),
        "topic": Text(max_length=255),
    },
    build=_build_kafka,
)

_HTTP: Final = Object(
    {
        "path": Text(_regex, max_length=4096),
        "method": Text(_regex, max_length=1024),
        "host": Text(_regex, max_length=4096),
        "headers": ListOf(Text(max_length=8192), 256),
        "headerMatches": ListOf(
            Object(
                {
                    "name": Text(),
                    "value": Text(max_length=8192),
                    "secret": Object({"namespace": Text(), "name": Text()}, required=("name",)),
                    "mismatch": Choice(("LOG", "ADD", "DELETE", "REPLACE"), "mismatch action"),
                },
                required=("name",),
            ),
            256,
        ),
    }
)


def _build_l7(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    kinds = [name for name in ("http", "kafka", "dns", "l7proto") if name in v]
    if len(kinds) > 1:
        c.fault(path, node, f"{' and '.join(kinds)} rules cannot stand together")
    if "l7" in v and "l7proto" not in v:
        c.fault(f"{path}.l7", node.value["l7"], "needs l7proto")
    return kinds[0] if kinds else ""


_L7: Final = Object(
    {
        "http": ListOf(_HTTP, 1000),
        "kafka": ListOf(_KAFKA, 1000),
        "dns": ListOf(_FQDN, 1000),
        "l7proto": Text(max_length=64),
        "l7": ListOf(MapOf(Text()), 1000),
    },
    build=_build_l7,
)


def _build_port_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    """(ports that count now, port rules that are carried)."""
    plain: list[L4] = []
    carried: list[CarriedPorts] = []
    ports = v.get("ports", [])
    if not ports:
        c.warn(path, node, "lists no ports, so it selects no traffic")
    text = _canonical(node)
    why = ""
    if kind := v.get("rules"):
        why = f"{kind} rules have no proxy to enforce them yet"
    elif "terminatingTLS" in v or "originatingTLS" in v:
        why = "TLS contexts have no proxy to enforce them yet"
    elif "listener" in v:
        why = "listeners have no proxy to enforce them yet"
    elif "serverNames" in v:
        why = "serverNames have no proxy to enforce them yet"
    if kind and kind != "dns":
        for i, port in enumerate(ports):
            protocols = port[1] if isinstance(port[0], str) else tuple(x.proto for x in port)
            if protocols != (PROTO_TCP,):
                c.fault(
                    f"{path}.ports[{i}].protocol",
                    node.value["ports"].value[i] if i < len(node.value["ports"].value) else node,
                    f"{kind} rules need the protocol TCP, written out",
                )
    if kind == "dns" and not ports:
        c.fault(f"{path}.ports", node, "dns rules need the port (53) to be written")
    for port in ports:
        if isinstance(port[0], str):
            name, protocols = port
            named = why or f"named port {name!r} is not resolved yet"
            carried.append(CarriedPorts(named, tuple(L4(proto) for proto in protocols), text))
        elif why:
            carried.append(CarriedPorts(why, port, text))
        else:
            plain += port
    for note in dict.fromkeys(x.why for x in carried):
        c.warn(path, node, f"{note}: this port rule allows nothing")
    return plain, carried


_PORTS: Final = ListOf(
    Object(
        {
            "port": Text(_port, max_length=64, number_ok=True),
            "endPort": Int(0, MAX_PORT),
            "protocol": _Protocol(),
        },
        required=("port",),
        build=_build_port,
    ),
    MAX_PORTS,
    "ports",
)
_PORT_RULE_FIELDS: Final[Mapping[str, Type]] = {
    "ports": _PORTS,
    "rules": _L7,
    "terminatingTLS": _TLS,
    "originatingTLS": _TLS,
    "serverNames": ListOf(Text(max_length=255), 1000),
    "listener": Anything(),
}
PORT_RULES: Final = ListOf(Object(_PORT_RULE_FIELDS, build=_build_port_rule), 1000)
_ONLY_PORTS: Final = "a deny rule has ports only: what it denies, it denies whatever the request"
DENY_PORT_RULES: Final = ListOf(
    Object(
        {"ports": _PORTS},
        build=_build_port_rule,
        elsewhere={name: _ONLY_PORTS for name in _PORT_RULE_FIELDS if name != "ports"},
    ),
    1000,
)

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
    return v.get("fields", [])


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
    ),
    1000,
)


# ---- elements


def _build_cidr_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    names = ("cidr", "cidrGroupRef", "cidrGroupSelector")
    given = [name for name in names if name in node.value and node.value[name].value is not None]
    if len(given) != 1:
        c.fault(path, node, "needs exactly one of cidr, cidrGroupRef and cidrGroupSelector")
        return INVALID
    if "cidr" not in given:
        return AbsentSelector(given[0], _canonical(node))
    if "cidr" not in v:
        return INVALID
    prefix, excepts = v["cidr"], v.get("except", [])
    for i, inner in enumerate(excepts):
        if inner.version != prefix.version or not inner.subnet_of(prefix):
            at = node.value["except"].value
            c.fault(
                f"{path}.except[{i}]",
                at[i] if i < len(at) else node,
                f"{inner} is not inside {prefix}",
            )
            return INVALID
        if inner == prefix:
            c.warn(f"{path}.except[{i}]", node, f"excepts all of {prefix}: selects nothing")
    return CidrSelector(prefix, tuple(dict.fromkeys(excepts)))


class _Absent:
    """A peer that is checked and carried, and that nothing can resolve yet."""

    def __init__(self, what: str, item: Type) -> None:
        self.what, self.item = what, item

    def check(self, node: Node, path: str, c: Checking) -> Any:
        if self.item.check(node, path, c) is INVALID:
            return INVALID
        return AbsentSelector(self.what, _canonical(node))


_SERVICE: Final = Object(
    {
        "k8sService": Object(
            {"serviceName": Text(max_length=253), "namespace": Text(max_length=63)}
        ),
        "k8sServiceSelector": Object(
            {"selector": SELECTOR, "namespace": Text(max_length=63)}, required=("selector",)
        ),
    }
)


def _peer_fields(side: str) -> dict[str, Type]:
    return {
        f"{side}Endpoints": ListOf(SELECTOR, MAX_PEERS),
        f"{side}CIDR": ListOf(_CidrPeer(), MAX_PEERS),
        f"{side}CIDRSet": ListOf(
            Object(
                {
                    "cidr": _Cidr(need_length=True),
                    "except": ListOf(_Cidr(need_length=True), MAX_PEERS),
                    "cidrGroupRef": Text(max_length=253),
                    "cidrGroupSelector": SELECTOR,
                },
                build=_build_cidr_rule,
            ),
            MAX_PEERS,
        ),
        f"{side}Entities": ListOf(_Entity(), 64),
        f"{side}Groups": ListOf(_Absent(f"{side}Groups", Anything()), 1000),
        f"{side}Nodes": ListOf(_Absent(f"{side}Nodes", SELECTOR), 1000),
    }


class _Entity:
    def check(self, node: Node, path: str, c: Checking) -> Any:
        word = Choice(ENTITIES, "entity").check(node, path, c)
        return word if word is INVALID else EntitySelector(word)


class _ElementType:
    """One entry of a rule's list. Gives an Element whose selectors are not yet scoped."""

    def __init__(self, *, egress: bool, deny: bool) -> None:
        self.egress, self.deny = egress, deny
        side = "to" if egress else "from"
        other = "from" if egress else "to"
        peers = _peer_fields(side)
        elsewhere = {
            name: (
                f"belongs to {'ingress' if egress else 'egress'}; "
                f"here it is {side}{name[len(other) :]}"
            )
            for name in (*_peer_fields(other), f"{other}Requires")
        }
        if egress:
            peers["toServices"] = ListOf(_Absent("toServices", _SERVICE), 1000)
            if not deny:
                peers["toFQDNs"] = ListOf(_Absent("toFQDNs", _FQDN), MAX_PEERS)
            else:
                elsewhere["toFQDNs"] = "a deny rule cannot name FQDNs"
        else:
            elsewhere |= {
                "toServices": "belongs to egress",
                "toFQDNs": "belongs to egress: where a peer may connect to",
            }
        self.peer_kinds = tuple(peers)
        self.requires = f"{side}Requires"
        fields: dict[str, Type] = {
            **peers,
            self.requires: ListOf(SELECTOR, 1000),
            "toPorts": DENY_PORT_RULES if deny else PORT_RULES,
            "icmps": ICMPS,
        }
        if not deny:
            fields["authentication"] = Object(
                {"mode": Choice(("disabled", "required", "test-always-fail"), "mode")},
                required=("mode",),
            )
        self.object = Object(fields, build=self.build, elsewhere=elsewhere)

    def check(self, node: Node, path: str, c: Checking) -> Any:
        return self.object.check(node, path, c)

    def build(self, v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
        given = [name for name in self.peer_kinds if name in v]
        for name in given[1:]:
            c.fault(
                f"{path}.{name}",
                node.value[name],
                f"{given[0]} and {name} cannot stand together: write two entries",
            )
        peers: tuple[PeerSelector, ...] | None = tuple(v[given[0]]) if given else None
        l4: tuple[L4, ...] | None = None
        carried: list[CarriedPorts] = []
        port_rules, icmps = v.get("toPorts"), v.get("icmps")
        if port_rules and icmps:
            c.fault(
                f"{path}.icmps",
                node.value["icmps"],
                "icmps and toPorts cannot stand together: write two entries",
            )
        if port_rules:  # an empty list is like none
            l4 = tuple(dict.fromkeys(x for plain, _ in port_rules for x in plain))
            carried = [x for _, more in port_rules for x in more]
        if icmps:
            l4 = tuple(dict.fromkeys(x for fields in icmps for x in fields))
        unenforced = ""
        mode = v.get("authentication", {}).get("mode", "disabled")
        if mode == "required":
            unenforced = "mutual authentication is not supported yet"
        elif mode == "test-always-fail":
            unenforced = "authentication mode test-always-fail never lets anything pass"
        absent = list(dict.fromkeys(x.what for x in peers or () if isinstance(x, AbsentSelector)))
        if self.deny:
            for what in absent:
                at = node.value.get(what) or node
                c.fault(
                    f"{path}.{what}",
                    at,
                    "is not supported yet in a deny rule: it would deny nothing",
                )
            for x in carried:
                c.fault(f"{path}.toPorts", node.value["toPorts"], f"{x.why}: it would deny nothing")
        else:
            for what in absent:
                c.warn(
                    f"{path}.{what}",
                    node.value.get(what) or node,
                    "is not resolved yet: it allows nothing",
                )
        if unenforced:
            c.warn(
                f"{path}.authentication",
                node.value["authentication"],
                f"{unenforced}: this entry allows nothing",
            )
        element = Element(
            egress=self.egress,
            deny=self.deny,
            path=path,
            origin=c.mark(path, node),
            peers=peers,
            l4=l4,
            requires=tuple(v[self.requires]) if self.requires in v else None,
            carried=tuple(carried),
            unenforced=unenforced,
        )
        if given and peers == ():
            c.warn(f"{path}.{given[0]}", node.value[given[0]], "is empty: it selects nobody")
        elif self.deny and peers is None and l4 is None and element.requires is None:
            c.warn(path, node, "has neither peers nor ports: it denies nothing")
        return element


# ---- rules


class _RuleLabels:
    def check(self, node: Node, path: str, c: Checking) -> Any:
        if isinstance(node.value, dict):
            v = Object({"key": Text(), "value": Text(), "source": Text()}, required=("key",)).check(
                node, path, c
            )
            if v is INVALID:
                return INVALID
            text = f"{v.get('source') or SOURCE_UNSPEC}:{v['key']}={v.get('value', '')}"
        else:
            text = Text().check(node, path, c)
            if text is INVALID:
                return INVALID
        try:
            label = Label.parse(text)
        except LabelError as error:
            c.fault(path, node, str(error))
            return INVALID
        if label.source == SOURCE_GENERATED:
            c.fault(path, node, f"labels of source {SOURCE_GENERATED} cannot be given by users")
            return INVALID
        return label


_LISTS: Final = ("ingress", "ingressDeny", "egress", "egressDeny")


def _build_rule(v: dict[str, Any], node: Node, path: str, c: Checking) -> Any:
    isolates: dict[bool, tuple[str, Origin] | None] = {False: None, True: None}
    switch = v.get("enableDefaultDeny", {})
    for name in _LISTS:
        egress = name.startswith("egress")
        at = node.value.get(name)
        if at is None or not at.value:
            continue
        wanted = switch.get("egress" if egress else "ingress")
        if wanted is not False and isolates[egress] is None:
            where = f"{path}.{name}" if path else name
            line, column = (node.keys or {}).get(name, (at.line, at.column))
            isolates[egress] = where, c.mark(where, Node(None, line, column))
    elements = tuple(x for name in _LISTS for x in v.get(name, []))
    if not any(node.value.get(name) and node.value[name].value for name in _LISTS):
        c.warn(path, node, "has neither ingress nor egress rules: it has no effect")
    if "nodeSelector" in node.value:
        c.fault(
            f"{path}.nodeSelector" if path else "nodeSelector",
            node.value["nodeSelector"],
            "nodeSelector (policy for the host itself) is not supported yet",
        )
        return INVALID
    if "endpointSelector" not in v:
        if "endpointSelector" not in node.value or node.value["endpointSelector"].value is None:
            where = f"{path}.endpointSelector" if path else "endpointSelector"
            c.fault(where, node, "is missing; {} selects every endpoint")
        return INVALID
    try:
        labels = Labels(v.get("labels", []))
    except LabelError as error:
        c.fault(f"{path}.labels", node, str(error))
        labels = Labels()
    return Rule(
        selector=v["endpointSelector"],
        elements=elements,
        path=path,
        origin=c.mark(path, node),
        isolates_ingress=isolates[False],
        isolates_egress=isolates[True],
        labels=labels,
        description=v.get("description", ""),
    )


RULE: Final = Object(
    {
        "endpointSelector": SELECTOR,
        "nodeSelector": Anything(),
        **{
            name: ListOf(
                _ElementType(egress=name.startswith("egress"), deny=name.endswith("Deny")),
                MAX_ELEMENTS,
            )
            for name in _LISTS
        },
        "enableDefaultDeny": Object({"ingress": Bool(), "egress": Bool()}),
        "labels": ListOf(_RuleLabels(), 256),
        "description": Text(max_length=64 << 10),
    },
    build=_build_rule,
)


# ---- scoping


_NAMESPACE_EXISTS: Final = Requirement(SOURCE_K8S, NAMESPACE_KEY, "Exists")


def _names_namespace(selector: EndpointSelector) -> bool:
    return any(
        x.source in (SOURCE_K8S, SOURCE_ANY)
        and (x.key == NAMESPACE_KEY or x.key.startswith(NAMESPACE_LABELS_PREFIX))
        for x in selector.requirements
    )


def _scope_subject(
    selector: EndpointSelector, namespace: str, path: str, c: Checking, node: Node
) -> EndpointSelector:
    """A namespaced rule is about endpoints of its own namespace, whatever its selector says."""
    if selector.mentions("init", SOURCE_RESERVED):
        return selector
    own = Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,))
    kept = []
    for requirement in selector.requirements:
        if requirement.key == NAMESPACE_KEY and requirement.source in (SOURCE_K8S, SOURCE_ANY):
            if requirement.operator != "In" or requirement.values != (namespace,):
                c.warn(
                    f"{path}.endpointSelector" if path else "endpointSelector",
                    node,
                    f"names another namespace ({requirement}); "
                    f"the rule stays one of namespace {namespace}",
                )
        else:
            kept.append(requirement)
    return EndpointSelector((*kept, own))


def _scope_peer(
    selector: PeerSelector, kind: str, namespace: str | None, *, reserved_stays: bool
) -> PeerSelector:
    if not isinstance(selector, EndpointSelector) or kind == Kind.RULES:
        return selector
    if reserved_stays and selector.mentions_source(SOURCE_RESERVED):
        return selector
    if _names_namespace(selector):
        # "not in namespace x" means other endpoints, never the world or the host.
        return selector.plus(_NAMESPACE_EXISTS)
    if namespace is None:
        return selector.plus(_NAMESPACE_EXISTS)
    return selector.plus(Requirement(SOURCE_K8S, NAMESPACE_KEY, "In", (namespace,)))


def _scope_rule(rule: Rule, kind: str, namespace: str | None, c: Checking, node: Node) -> Rule:
    selector = rule.selector
    init = selector.mentions("init", SOURCE_RESERVED)
    if namespace is not None:
        selector = _scope_subject(selector, namespace, rule.path, c, node)
    elements = []
    for x in rule.elements:
        peers, requires = x.peers, x.requires
        if not (init and kind == Kind.CNP):
            if peers is not None:
                peers = tuple(_scope_peer(p, kind, namespace, reserved_stays=True) for p in peers)
            if requires is not None:
                scoped = (_scope_peer(p, kind, namespace, reserved_stays=False) for p in requires)
                requires = tuple(p for p in scoped if isinstance(p, EndpointSelector))
        elements.append(
            Element(
                egress=x.egress,
                deny=x.deny,
                path=x.path,
                origin=x.origin,
                peers=peers,
                l4=x.l4,
                requires=requires,
                carried=x.carried,
                unenforced=x.unenforced,
            )
        )
    return Rule(
        selector=selector,
        elements=tuple(elements),
        path=rule.path,
        origin=rule.origin,
        isolates_ingress=rule.isolates_ingress,
        isolates_egress=rule.isolates_egress,
        labels=rule.labels,
        description=rule.description,
    )


# ---- documents


def _dns(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.match(text):
            raise ValueError(
                f"{shown(text)} is not a {what}: lower case letters, digits and '-', beginning and "
                "ending with a letter or digit"
            )
        return text

    return parse


_METADATA: Final = Object(
    {
        "name": Text(_dns(_DNS_SUBDOMAIN, "name"), max_length=253),
        "namespace": Text(_dns(_DNS_LABEL, "namespace"), max_length=63),
        "labels": MapOf(Text()),
        "annotations": MapOf(Text(max_length=256 << 10)),
        **dict.fromkeys(
            (
                "uid",
                "resourceVersion",
                "generation",
                "creationTimestamp",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "generateName",
                "managedFields",
                "ownerReferences",
                "finalizers",
                "selfLink",
            ),
            Anything(),
        ),
    }
)
_KINDS: Final = (*Kind, "List")
_API_VERSIONS: Final = ("cilium.io/v2",)


def _default_name(source: str) -> str:
    stem = PurePath(source).name.partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:63].strip("-")
    return name or "rules"


class _Reader:
    """Reads the documents of one text."""

    def __init__(self, source: str, default_namespace: str) -> None:
        self.source, self.default_namespace = source, default_namespace
        self.documents: list[Document] = []
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []
        self.names: dict[DocumentKey, Origin] = {}
        self.count = 0

    def add(self, node: Node) -> None:
        self.count += 1
        title = f"document {self.count}"
        if self.count > MAX_DOCUMENTS:
            if self.count == MAX_DOCUMENTS + 1:
                self.fault(title, "", f"there are more than {MAX_DOCUMENTS} documents", node)
            return
        if isinstance(node.value, dict) and _text(node, "kind").endswith("List"):
            kind = _text(node, "kind").removesuffix("List")
            items = node.value.get("items")
            if items is not None and isinstance(items.value, list) and kind in ("", *Kind):
                self.count -= 1
                for item in items.value:
                    if kind and isinstance(item.value, dict) and "kind" not in item.value:
                        item.value["kind"] = Node(kind, item.line, item.column)
                    self.add(item)
                return
        document = self.read(node, title)
        if document is None:
            return
        if (before := self.names.get(document.key)) is not None:
            hint = " (name it with metadata.name)" if document.kind == Kind.RULES else ""
            self.fault(
                document.ref,
                "metadata.name",
                f"is also the name of the one at {before}{hint}",
                node,
            )
            return
        self.names[document.key] = document.origin
        self.documents.append(document)

    def fault(self, document: str, path: str, message: str, node: Node) -> None:
        self.faults.append(
            Fault(document, path, message, Origin(self.source, node.line, node.column))
        )

    def read(self, node: Node, title: str) -> Document | None:
        if isinstance(node.value, list):
            return self.build(node, title, Kind.RULES, None, _default_name(self.source))
        if not isinstance(node.value, dict):
            self.fault(title, "", "a document must be a mapping, or a list of rules", node)
            return None
        kind = node.value.get("kind")
        if kind is None or kind.value is None:
            hint = (
                "; a rule without kind goes into a list: begin it with '- '"
                if "endpointSelector" in node.value
                else f"; it may be {', '.join(Kind)}"
            )
            self.fault(title, "kind", f"is missing{hint}", node)
            return None
        if kind.value not in tuple(Kind):
            if kind.value == "NetworkPolicy":
                message = "Kubernetes' NetworkPolicy is not supported yet"
            else:
                hint = suggestion(str(kind.value), list(Kind))
                message = f"{shown(kind.value)} is not a known kind{hint}"
            self.fault(title, "kind", message, kind)
            return None
        c = Checking(self.source, title)
        at = node.value.get("metadata")
        metadata = {} if at is None or at.value is None else _METADATA.check(at, "metadata", c)
        namespace: str | None = None
        name = ""
        if metadata is not INVALID:
            name = metadata.get("name", "")
            if kind.value == Kind.CNP:
                namespace = metadata.get("namespace") or self.default_namespace
            elif "namespace" in metadata and at is not None:
                c.fault(
                    "metadata.namespace", at.value["namespace"], f"a {kind.value} has no namespace"
                )
            if not name:
                if kind.value == Kind.RULES:
                    name = _default_name(self.source)
                elif at is not None and "name" in (at.value or {}):
                    c.fault("metadata.name", at.value["name"], "is empty")
                else:
                    c.fault("metadata.name", at or node, "is missing")
        if kind.value != Kind.RULES or "apiVersion" in node.value:
            version = node.value.get("apiVersion")
            if version is None or version.value is None:
                c.fault("apiVersion", node, f"is missing; write {_API_VERSIONS[0]}")
            elif version.value not in _API_VERSIONS:
                c.fault(
                    "apiVersion",
                    version,
                    f"{shown(version.value)} is not supported; write {_API_VERSIONS[0]}",
                )
        if c.faults:
            if name:
                title = str(DocumentKey(kind.value, namespace or "", name))
            self.faults += [Fault(title, f.path, f.message, f.origin) for f in c.faults]
            # The rest is checked too, so that one round shows every fault.
            self.build(node, title, Kind(kind.value), namespace, name or "?")
            return None
        return self.build(node, title, Kind(kind.value), namespace, name)

    def build(
        self, node: Node, title: str, kind: Kind, namespace: str | None, name: str
    ) -> Document | None:
        if name != "?":
            title = str(DocumentKey(kind, namespace or "", name))
        c = Checking(self.source, title)
        rules = _rules(node, kind, namespace, c)
        self.faults += c.faults
        self.warnings += c.warnings
        if c.faults:
            return None
        origin = Origin(self.source, node.line, node.column)
        return Document(
            kind=kind,
            namespace=namespace,
            name=name,
            rules=rules,
            body=_body(node.plain()),
            origin=origin,
            origins=tuple(sorted(c.origins.items())),
        )


def _text(node: Node, key: str) -> str:
    child = node.value.get(key)
    return child.value if child is not None and isinstance(child.value, str) else ""


def _body(plain: Any) -> bytes:
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()


def _rules(node: Node, kind: str, namespace: str | None, c: Checking) -> tuple[Rule, ...]:
    """Check the body of a document and give its rules, scoped to its namespace."""
    found: list[tuple[Node, Any]] = []
    if isinstance(node.value, list):
        _check_count(node, "", c)
        found = [
            (child, RULE.check(child, f"[{i}]", c))
            for i, child in enumerate(node.value[:MAX_RULES])
        ]
    else:
        fields = ("rules",) if kind == Kind.RULES else ("spec", "specs")
        known = ("apiVersion", "kind", "metadata", "status", *fields)
        for key in node.value:
            if key not in known:
                line, column = (node.keys or {}).get(key, (node.line, node.column))
                c.fault(
                    key[:80],
                    Node(key, line, column),
                    f"unknown field{suggestion(key, list(known))}",
                )
        present = [(f, node.value[f]) for f in fields if f in node.value]
        present = [(f, at) for f, at in present if at.value is not None]
        if not present:
            c.fault(fields[0], node, "is missing")
        for name, at in present:
            if name == "spec":
                found.append((at, RULE.check(at, name, c)))
            elif not isinstance(at.value, list):
                c.fault(name, at, "must be a list of rules")
            else:
                _check_count(at, name, c)
                found += [
                    (child, RULE.check(child, f"{name}[{i}]", c))
                    for i, child in enumerate(at.value[:MAX_RULES])
                ]
    return tuple(
        _scope_rule(rule, kind, namespace, c, at) for at, rule in found if rule is not INVALID
    )


def _check_count(node: Node, path: str, c: Checking) -> None:
    if len(node.value) > MAX_RULES:
        c.fault(path, node, f"has {len(node.value)} rules, more than the {MAX_RULES} allowed")
    if not node.value:
        c.warn(path, node, "has no rules: it has no effect")


def parse_documents(
    text: bytes | str, *, source: str, default_namespace: str = "default"
) -> ParseResult:
    """Read policy documents from YAML (many documents) or JSON text.

    All or nothing: with one fault anywhere there are no documents, and every fault is given with
    its document, field path, line and column. Never raises for anything the text holds.
    """
    reader = _Reader(source, default_namespace)
    try:
        nodes = parse_text(text)
    except TreeError as error:
        fault = Fault("document", "", error.message, Origin(source, error.line, error.column))
        return ParseResult(faults=(fault,))
    for node in nodes:
        reader.add(node)
    for document in reader.documents:
        if len(document.body) > MAX_DOCUMENT_BYTES:
            reader.faults.append(
                Fault(
                    document.ref,
                    "",
                    f"the document is {len(document.body)} bytes long as stored, "
                    f"{MAX_DOCUMENT_BYTES} are allowed: spread its rules over several documents",
                    document.origin,
                )
            )
    if not nodes:
        reader.faults.append(Fault("document", "", "there is no document", Origin(source)))
    warnings = tuple(reader.warnings)
    if reader.faults:
        found = sorted(reader.faults, key=lambda x: (x.origin.line, x.origin.column))
        # What holds a fault was read without it: a warning that it is empty would be untrue.
        faulty = {(f.document, part) for f in found for part in _around(f.path)}
        warnings = tuple(w for w in warnings if (w.document, w.path) not in faulty)
        return ParseResult(faults=tuple(found), warnings=warnings)
    return ParseResult(documents=tuple(reader.documents), warnings=warnings)


def _around(path: str) -> list[str]:
    """The path and those of everything it is in: `a.b[0]` gives a, a.b and a.b[0]."""
    return [path[: cut.start()] for cut in re.finditer(r"[.\[]", path)] + [path]


def document_from_parts(
    *,
    kind: str,
    namespace: str | None,
    name: str,
    body: bytes,
    origin: Origin,
    origins: Mapping[str, Origin],
) -> Document:
    """Build a document from what is stored of it. Raises DocumentError."""
    title = str(DocumentKey(kind, namespace or "", name))
    c = Checking(origin.source, title, known_origins={"": origin, **origins})
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):
        raise DocumentError((Fault(title, "", "the stored text is not JSON", origin),)) from None
    if kind not in tuple(Kind) or not isinstance(plain, dict | list):
        raise DocumentError((Fault(title, "kind", f"{shown(kind)} is not a known kind", origin),))
    rules = _rules(from_plain(plain, origin.line, origin.column), kind, namespace, c)
    if c.faults:
        raise DocumentError(tuple(c.faults))
    return Document(
        kind=Kind(kind),
        namespace=namespace,
        name=name,
        rules=rules,
        body=body,
        origin=origin,
        origins=tuple(sorted(c.origins.items())),
    )


def document_from_json(data: bytes | str) -> Document:
    """Undo Document.to_json(). Raises DocumentError."""
    try:
        v = json.loads(data)
        origin = Origin(str(v["source"]), *map(int, v["origin"]))
        origins = {
            str(path): Origin(origin.source, int(line), int(column))
            for path, (line, column) in v["origins"].items()
        }
        namespace = v["namespace"]
        return document_from_parts(
            kind=str(v["kind"]),
            namespace=None if namespace is None else str(namespace),
            name=str(v["name"]),
            body=_body(v["body"]),
            origin=origin,
            origins=origins,
        )
    except DocumentError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = Fault("document", "", f"not a stored document: {error}", Origin("stored"))
        raise DocumentError((fault,)) from None
