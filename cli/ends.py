"""Who a question is about, as named on the command line, found among documents and endpoints.

SIDE   an address | an endpoint's name | reserved:host | host, world-ipv4, ... | labels
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from cilia.identity import RESERVED_BY_NAME
from cilia.labels import (
    NAMESPACE_KEY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_RESERVED,
    SOURCE_UNSPEC,
    Label,
    LabelError,
    Labels,
)
from cilia.policy import PROTO_BY_NAME
from cilia.policy.questions.inventory import endpoint_labels
from cilia.policy.questions.judge import End, Question
from cilia.policy.questions.requests import HTTPRequest, Request
from cilia.policy.questions.scene import Party, Scene
from cli.errors import CliError, Exit


def end(scene: Scene, texts: Sequence[str], namespace: str = "default") -> End:
    """One side of a question. Several texts are labels of one side. Raises CliError."""
    text = texts[0]
    if len(texts) == 1:
        head, colon, rest = text.partition(":")
        if colon and head in ("endpoint", "ep"):
            return _endpoint(scene, rest, namespace) or _unknown(scene, rest)
        if colon and head in ("identity", "id"):
            raise CliError(
                f"{text!r} can only be looked up by an agent",
                code=Exit.INVALID,
                hint="Say who it is by labels (app=web), an address or an endpoint's name.",
            )
        if head == SOURCE_RESERVED and rest in RESERVED_BY_NAME:
            return _entity(scene, rest)
        if (found := _address(scene, text)) is not None:
            return found
        if "=" not in text and ":" not in text and "," not in text:
            return (
                _endpoint(scene, text, namespace)
                or (_entity(scene, text) if text in RESERVED_BY_NAME else None)
                or _unknown(scene, text)
            )
    labels = _labels(texts, namespace)
    return End(scene.guest(labels), ",".join(texts))


def _endpoint(scene: Scene, text: str, namespace: str) -> End | None:
    found = scene.inventory.find(text, namespace)
    if found is None:
        return None
    return End(scene.party_of(found), found.ref)


def _entity(scene: Scene, name: str) -> End:
    if name == "world":
        name = "world-ipv4"
    party = scene.entity(name)
    assert party is not None
    return End(party, f"reserved:{name}")


def _address(scene: Scene, text: str) -> End | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    found = scene.inventory.find(text)
    if found is not None:
        return End(scene.party_of(found), found.ref, address)
    return End(scene.region(address), text, address)


def _unknown(scene: Scene, text: str) -> End:
    known = [x.ref for x in scene.inventory.endpoints]
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    raise CliError(
        f"no endpoint {text!r}",
        code=Exit.NOT_FOUND,
        hint=f"There are: {shown}."
        if known
        else "Say who it is by labels (app=web), or by an "
        "address; or give the endpoints with --endpoints FILE.",
    )


def _labels(texts: Sequence[str], namespace: str) -> Labels:
    found = []
    try:
        for text in texts:
            for part in text.split(","):
                label = Label.parse(part)
                if label.source == SOURCE_UNSPEC:
                    label = Label(SOURCE_K8S, label.key, label.value)
                found.append(label)
        if any(x.source in (SOURCE_RESERVED, SOURCE_CIDR) for x in found):
            return Labels(found)
        space = next((x.value for x in found if x.key == NAMESPACE_KEY), namespace)
        return endpoint_labels(found, space)
    except LabelError as error:
        raise CliError(
            str(error),
            code=Exit.INVALID,
            hint="Write key=value (app=web) or source:key=value (k8s:app=web).",
        ) from error


def port(text: str) -> tuple[int, int]:
    """`80/tcp` as (6, 80), of ICMP the type; a number alone is TCP's. Raises CliError."""
    number, _, said = text.partition("/")
    if not (number.isascii() and number.isdigit()) or int(number) > 65535:
        raise CliError(
            f"{text!r} is not a port: write 80 or 80/tcp (0 to 65535)", code=Exit.INVALID
        )
    proto = PROTO_BY_NAME.get(said.upper() or "TCP")
    if proto is None:
        raise CliError(
            f"unknown protocol {said!r} in {text!r}: one of TCP, UDP, SCTP, ICMP, ICMPv6, ANY",
            code=Exit.INVALID,
        )
    return proto, int(number)


def request(method: str, path: str, host: str, headers: Sequence[str]) -> Request | None:
    """An HTTP request from options; None when none of them was given. Raises CliError."""
    if not (method or path or host or headers):
        return None
    pairs = []
    for text in headers:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise CliError(f"{text!r} is not a header: write 'Name: value'", code=Exit.INVALID)
        pairs.append((name.strip(), value.strip()))
    return HTTPRequest(method or "GET", path or "/", host, tuple(pairs))


# ---- flows


def flow(scene: Scene, text: str) -> Question:
    """A question from one flow as JSON: a line of `cilia monitor` or of `cilia flows observe`.

    Who was at the ends is taken from the flow (their labels), so that a flow of another node or of
    yesterday can be asked about too. Raises CliError.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CliError(f"the flow is not JSON: {error}", code=Exit.INVALID) from error
    if isinstance(value, dict) and isinstance(value.get("flow"), dict):
        value = value["flow"]
    if not isinstance(value, dict) or not isinstance(value.get("source"), dict):
        raise CliError(
            "the flow has no source: give one line of `cilia monitor -o json` or `cilia flows "
            "observe -o json`",
            code=Exit.INVALID,
        )
    return _hubble(scene, value) if "l4" in value or "IP" in value else _event(scene, value)


def _event(scene: Scene, value: dict[str, Any]) -> Question:
    source, destination = _mapping(value["source"]), _mapping(value.get("destination"))
    protocol = str(value.get("protocol") or "")
    proto = PROTO_BY_NAME.get(protocol.upper())
    if proto is None:
        raise CliError(f"the flow has no protocol of ports: {protocol!r}", code=Exit.INVALID)
    icmp = value.get("icmp")
    number = icmp.get("type") if isinstance(icmp, dict) else destination.get("port")
    if value.get("reply"):
        source, destination = destination, source
        number = number if isinstance(icmp, dict) else destination.get("port")
    return Question(
        src=_flow_end(scene, source, source.get("address")),
        dst=_flow_end(scene, destination, destination.get("address")),
        proto=proto,
        port=_number(number),
        request=_flow_request(value),
    )


def _hubble(scene: Scene, value: dict[str, Any]) -> Question:
    l4 = _mapping(value.get("l4"))
    name = next((x for x in ("TCP", "UDP", "SCTP", "ICMPv4", "ICMPv6") if x in l4), "")
    if not name:
        raise CliError("the flow has no L4 protocol", code=Exit.INVALID)
    proto = PROTO_BY_NAME["ICMP" if name == "ICMPv4" else name.upper()]
    inner = _mapping(l4[name])
    source, destination = _mapping(value["source"]), _mapping(value.get("destination"))
    ip = _mapping(value.get("IP"))
    addresses = [ip.get("source"), ip.get("destination")]
    numbers = [inner.get("source_port"), inner.get("destination_port")]
    if value.get("is_reply") or value.get("reply"):
        source, destination = destination, source
        addresses.reverse()
        numbers.reverse()
    number = inner.get("type") if name.startswith("ICMP") else numbers[1]
    return Question(
        src=_flow_end(scene, source, addresses[0]),
        dst=_flow_end(scene, destination, addresses[1]),
        proto=proto,
        port=_number(number or 0),
        request=_flow_request(value.get("l7")),
    )


def _flow_request(l7: Any) -> Request | None:
    http = l7.get("http") if isinstance(l7, dict) else None
    if not isinstance(http, dict):
        return None
    url = str(http.get("url") or "/")
    host = ""
    if "://" in url:
        host, _, path = url.partition("://")[2].partition("/")
        url = f"/{path}"
    headers = [
        (str(x.get("key") or x.get("name") or ""), str(x.get("value", "")))
        for x in _list(http.get("headers"))
        if isinstance(x, dict)
    ]
    return HTTPRequest(str(http.get("method") or "GET"), url, host, tuple(headers))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise CliError("the flow has no destination port", code=Exit.INVALID)
    return value


def _flow_end(scene: Scene, value: dict[str, Any], address_text: Any) -> End:
    address = None
    if isinstance(address_text, str):
        try:
            address = ip_address(address_text)
        except ValueError:
            raise CliError(
                f"{address_text!r} in the flow is no address", code=Exit.INVALID
            ) from None
    texts = [str(x) for x in _list(value.get("labels"))]
    try:
        labels = Labels.parse(texts)
    except LabelError as error:
        raise CliError(f"labels of the flow: {error}", code=Exit.INVALID) from error
    reserved = [x.key for x in labels if x.source == SOURCE_RESERVED]
    outside = any(x.source == SOURCE_CIDR for x in labels) or "world" in " ".join(reserved)
    if outside or not labels:
        if address is None:
            raise CliError("the flow does not say who was at its ends", code=Exit.INVALID)
        return _address(scene, str(address)) or _unknown(scene, str(address))
    name = next((x for x in reserved if x in RESERVED_BY_NAME), None)
    if name is not None:
        return _entity(scene, name)
    party: Party = scene.guest(labels)
    named = str(value.get("name") or value.get("pod_name") or "")
    space = labels.get(NAMESPACE_KEY)
    if named and "/" not in named and space is not None:
        named = f"{space.value}/{named}"
    if party.members and not named:
        named = party.members[0].ref
    return End(party, named or ",".join(texts), address)
