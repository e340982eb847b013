"""How things are named on the command line, parsed into messages. Pure, and unit-tested.

endpoint   42 | 10.217.0.5 | fd00:c111::5 | web | default/web
label      app=web | k8s:app=web | reserved:world
subject    an address | identity:1234 | app=web,org=empire | endpoint:REF | REF
port       80 | 80/tcp
policy     [KIND/][NAMESPACE/]NAME, KIND one of cnp, ccnp, netpol, rules or the full kind
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cilia.labels import (
    CLUSTER_KEY,
    NAMESPACE_KEY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_RESERVED,
    SOURCE_UNSPEC,
    Label,
    LabelError,
    Labels,
)
from cli.errors import CliError, Exit
from protos.agent.v1 import agent_pb2
from protos.common.v1 import common_pb2

KINDS = {
    "cnp": "CiliumNetworkPolicy",
    "ciliumnetworkpolicy": "CiliumNetworkPolicy",
    "ccnp": "CiliumClusterwideNetworkPolicy",
    "ciliumclusterwidenetworkpolicy": "CiliumClusterwideNetworkPolicy",
    "netpol": "NetworkPolicy",
    "networkpolicy": "NetworkPolicy",
    "rules": "Rules",
}

MAX_NAMES = 8  # that a message lists

PROTOCOLS = ("ANY", "TCP", "UDP", "SCTP", "ICMP", "ICMPV6")


def is_address(text: str) -> bool:
    """True for an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def endpoint_ref(text: str) -> agent_pb2.EndpointRef:
    """Raises CliError for an empty reference."""
    if not text.strip():
        raise CliError(
            "an endpoint is named by id, name, namespace/name or address", code=Exit.USAGE
        )
    if text.isascii() and text.isdigit():
        if int(text) > 0xFFFFFFFF:
            raise CliError(f"endpoint id {text} is out of range", code=Exit.INVALID)
        return agent_pb2.EndpointRef(id=int(text))
    if is_address(text):
        return agent_pb2.EndpointRef(address=str(ipaddress.ip_address(text)))
    return agent_pb2.EndpointRef(name=text)


def parse_label(text: str) -> Label:
    """A label as people write it. Without a source it is a `k8s:` one, as in a lab file and as
    policies without a source match it. Raises CliError (invalid) with the parser's own words."""
    try:
        parsed = Label.parse(text)
    except LabelError as error:
        raise CliError(
            f"{text!r}: {error}",
            code=Exit.INVALID,
            hint="Write key=value (app=web) or source:key=value (k8s:app=web).",
        ) from error
    if parsed.source == SOURCE_UNSPEC:
        return Label(SOURCE_K8S, parsed.key, parsed.value)
    return parsed


def parse_labels(texts: Iterable[str]) -> list[Label]:
    """Labels from repeated options; each may hold several, separated by commas."""
    return [parse_label(part) for text in texts for part in text.split(",") if part]


def labels(texts: Iterable[str]) -> list[common_pb2.Label]:
    """The same, as messages."""
    return [to_message(item) for item in parse_labels(texts)]


def to_message(item: Label) -> common_pb2.Label:
    return common_pb2.Label(source=item.source, key=item.key, value=item.value)


def subject_labels(texts: Sequence[str], namespace: str) -> Labels:
    """Labels of one side of a trace, with those that every endpoint has: namespace and cluster.

    What is reserved or a CIDR is no endpoint, and stays as it is. Raises CliError.
    """
    parsed = parse_labels(texts)
    if all(item.source not in (SOURCE_RESERVED, SOURCE_CIDR) for item in parsed):
        keys = {item.key for item in parsed}
        given = ((NAMESPACE_KEY, namespace), (CLUSTER_KEY, "default"))
        parsed += [Label(SOURCE_K8S, key, value) for key, value in given if key not in keys]
    try:
        return Labels(parsed)
    except LabelError as error:
        raise CliError(str(error), code=Exit.INVALID) from error


def subject(texts: Sequence[str], namespace: str = "default") -> agent_pb2.Subject:
    """One side of a trace. Several texts are labels of one side. Raises CliError."""
    if not texts:
        raise CliError("a trace needs a source and a destination", code=Exit.USAGE)
    text = texts[0]
    if len(texts) == 1:
        if is_address(text):
            return agent_pb2.Subject(address=str(ipaddress.ip_address(text)))
        head, _, rest = text.partition(":")
        if head in ("identity", "id"):
            return agent_pb2.Subject(identity=identity_number(rest))
        if head in ("endpoint", "ep"):
            return agent_pb2.Subject(endpoint=endpoint_ref(rest))
        if "=" not in text and ":" not in text and "," not in text:
            return agent_pb2.Subject(endpoint=endpoint_ref(text))
    items = subject_labels(texts, namespace).sorted()
    return agent_pb2.Subject(
        labels=agent_pb2.LabelList(labels=[to_message(item) for item in items])
    )


def identity_number(text: str) -> int:
    """A numeric identity. Raises CliError."""
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 1 << 32:
        raise CliError(
            f"{text!r} is not an identity: it must be a number from 1 to 4294967295",
            code=Exit.INVALID,
            hint="See `cilia identity list` for those there are, or look one up with --label.",
        )
    return int(text)


def port(text: str) -> tuple[int, str]:
    """`80/tcp` -> (80, "TCP"); without a protocol ANY. Raises CliError."""
    number, _, protocol = text.partition("/")
    protocol = protocol.upper() or "ANY"
    if not (number.isascii() and number.isdigit()) or int(number) > 65535:
        raise CliError(
            f"{text!r} is not a port: write 80 or 80/tcp (0 to 65535)", code=Exit.INVALID
        )
    if protocol not in PROTOCOLS:
        raise CliError(
            f"unknown protocol {protocol!r} in {text!r}: one of {', '.join(PROTOCOLS)}",
            code=Exit.INVALID,
        )
    return int(number), protocol


@dataclass(frozen=True, slots=True)
class PolicyPattern:
    """What was said of a policy's name; None is anything."""

    name: str
    kind: str | None = None
    namespace: str | None = None

    def matches(self, kind: str, namespace: str, name: str) -> bool:
        """True for the policy named."""
        return (
            self.name == name and self.kind in (None, kind) and self.namespace in (None, namespace)
        )


def policy_pattern(text: str) -> PolicyPattern:
    """Raises CliError for a name that cannot be one."""
    parts = text.split("/")
    if not all(parts) or len(parts) > 3:
        raise CliError(
            f"{text!r} does not name a policy: write [KIND/][NAMESPACE/]NAME", code=Exit.INVALID
        )
    match parts:
        case [name]:
            return PolicyPattern(name)
        case [first, name]:
            kind = KINDS.get(first.lower())
            if kind is not None:
                return PolicyPattern(name, kind=kind)
            return PolicyPattern(name, namespace=first)
        case _:
            kind = KINDS.get(parts[0].lower())
            if kind is None:
                raise CliError(
                    f"unknown kind {parts[0]!r}: one of {', '.join(sorted(set(KINDS)))}",
                    code=Exit.INVALID,
                )
            return PolicyPattern(parts[2], kind=kind, namespace=parts[1])


def netns_path(text: str) -> str:
    """A namespace's path; a bare name is one of `ip netns`. Raises CliError if it is not there."""
    path = Path(text) if "/" in text else Path("/run/netns") / text
    if not path.exists():
        names = sorted(p.name for p in Path("/run/netns").glob("*"))
        near = difflib.get_close_matches(path.name, names, n=3)
        shown = near or names[:MAX_NAMES]
        more = f", and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        known = f"Known: {', '.join(shown)}{more}." if names else "There is none yet."
        raise CliError(
            f"no network namespace at {path}",
            code=Exit.NOT_FOUND,
            hint=f"Create it (`ip netns add {path.name}`), or name a process with --pid. {known}",
        )
    return str(path.absolute())
