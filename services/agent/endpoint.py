"""An endpoint: what it is, which states it goes through, and the log of how it fared.

    ""--> creating --> waiting-for-identity --> ready <--> waiting-to-regenerate
                                                  ^                |
                                                  +- regenerating <+     restoring (after a start)
    any of them --> disconnecting --> disconnected

States and edges are Cilium's (daemon/endpoint.go and pkg/endpoint at v1.7), so its tools and
people's habits fit. `not-ready` is never stored: it is how a ready endpoint is shown whose
last step failed. No I/O, no kernel, no asyncio here.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal, NewType

from cilia.errors import (
    ConflictError,
    DomainError,
    ExhaustedError,
    InvalidError,
    Kind,
    NotFoundError,
)
from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import CLUSTER_KEY, NAMESPACE_KEY, Labels
from cilia.policy import VISIBILITY_ANNOTATION, parse_visibility, visibility_text
from cilia.policy.l7 import PortNames

SlotIndex = NewType("SlotIndex", int)

NAMESPACE_LABEL: Final = NAMESPACE_KEY
CLUSTER_LABEL: Final = CLUSTER_KEY
MAX_ENDPOINT_ID: Final = 4095
STATUS_LOG_ENTRIES: Final = 256
MAX_NAMED_PORTS: Final = 256
_PORT_NAME: Final = re.compile(r"(?=[0-9-]*[a-z])[a-z0-9](?:[-a-z0-9]*[a-z0-9])?\Z")


class EndpointNotFound(NotFoundError):
    default_cure = "See `cilia endpoint list` for those there are"

    def __init__(self, reference: str) -> None:
        super().__init__(f"there is no endpoint {reference}")


class EndpointInvalid(InvalidError):
    """The request itself cannot be served as it stands."""


class EndpointExists(ConflictError):
    """Name or interface is taken."""


class EndpointNumbersExhausted(ExhaustedError):
    default_cure = "Delete an endpoint first"

    def __init__(self) -> None:
        super().__init__(f"this node has {MAX_ENDPOINT_ID} endpoints, the most there can be")


class EndpointBusy(DomainError):
    """The endpoint is being deleted, or is not there yet."""

    default_kind = Kind.ABORTED
    default_cure = "Try again in a moment"


class EndpointFailed(DomainError):
    """A step of bringing an endpoint up failed; everything done for it was undone."""

    default_kind = Kind.PRECONDITION


class EndpointState(StrEnum):
    NONE = ""
    CREATING = "creating"
    WAITING_FOR_IDENTITY = "waiting-for-identity"
    READY = "ready"
    WAITING_TO_REGENERATE = "waiting-to-regenerate"
    REGENERATING = "regenerating"
    RESTORING = "restoring"
    DISCONNECTING = "disconnecting"
    DISCONNECTED = "disconnected"


_S = EndpointState
_EDGES: Final[Mapping[EndpointState, frozenset[EndpointState]]] = {
    _S.NONE: frozenset({_S.CREATING, _S.WAITING_FOR_IDENTITY, _S.RESTORING}),
    _S.CREATING: frozenset({_S.DISCONNECTING, _S.WAITING_FOR_IDENTITY, _S.RESTORING}),
    _S.WAITING_FOR_IDENTITY: frozenset({_S.READY, _S.DISCONNECTING}),
    _S.READY: frozenset(
        {_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.WAITING_TO_REGENERATE, _S.RESTORING}
    ),
    _S.WAITING_TO_REGENERATE: frozenset({_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.RESTORING}),
    _S.REGENERATING: frozenset(
        {_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.WAITING_TO_REGENERATE, _S.RESTORING}
    ),
    _S.RESTORING: frozenset({_S.DISCONNECTING, _S.RESTORING}),
    _S.DISCONNECTING: frozenset({_S.DISCONNECTED}),
    _S.DISCONNECTED: frozenset(),
}
CLOSING: Final = frozenset({_S.DISCONNECTING, _S.DISCONNECTED})
# Only regeneration itself takes these.
_BUILDER_EDGES: Final[frozenset[tuple[EndpointState, EndpointState]]] = frozenset(
    {
        (_S.WAITING_TO_REGENERATE, _S.REGENERATING),
        (_S.RESTORING, _S.REGENERATING),
        (_S.REGENERATING, _S.READY),
    }
)
# Refused without a word: they happen whenever two changes meet.
_SILENT: Final[frozenset[tuple[EndpointState, EndpointState]]] = frozenset(
    {
        (_S.WAITING_TO_REGENERATE, _S.WAITING_TO_REGENERATE),
        (_S.WAITING_TO_REGENERATE, _S.READY),
    }
)


def may_move(old: EndpointState, new: EndpointState, *, builder: bool = False) -> bool:
    """Whether the edge exists. `builder` adds the edges only regeneration may take."""
    if new in _EDGES[old]:
        return True
    return builder and (old, new) in _BUILDER_EDGES


def silently_refused(old: EndpointState, new: EndpointState) -> bool:
    return (old, new) in _SILENT


LogCode = Literal["OK", "Warning", "Failure"]


@dataclass(frozen=True, slots=True)
class LogEntry:
    time_ns: int  # wall clock
    code: LogCode
    state: EndpointState
    message: str


class StatusLog:
    """The last 256 things that happened to an endpoint, oldest first."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[LogEntry] = deque(maxlen=STATUS_LOG_ENTRIES)

    def add(self, code: LogCode, state: EndpointState, message: str) -> None:
        self._entries.append(LogEntry(time.time_ns(), code, state, message))

    def newest_first(self) -> list[LogEntry]:
        return list(reversed(self._entries))

    @property
    def last(self) -> LogEntry | None:
        return self._entries[-1] if self._entries else None


OptionMode = Literal["default", "always", "never"]

_MODES: Final[Mapping[str, OptionMode | None]] = {
    "default": "default",
    "always": "always",
    "never": "never",
    "node": None,
    "": None,
}
_ON: Final = frozenset({"enabled", "true", "on", "1"})
_OFF: Final = frozenset({"disabled", "false", "off", "0"})


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """What an endpoint sets for itself; None leaves it to the node."""

    enforcement: OptionMode | None = None
    audit: bool | None = None
    visibility: str = ""  # the annotation, as `visibility_text` writes it

    @classmethod
    def of_annotations(cls, annotations: Mapping[str, str]) -> EndpointOptions:
        """What a workload's annotations say. Raises EndpointInvalid, also for one not known: it
        would do nothing, and whoever wrote it thinks otherwise."""
        for key in annotations:
            if key != VISIBILITY_ANNOTATION:
                raise EndpointInvalid(
                    f"annotation {key} means nothing here", cure=f"There is {VISIBILITY_ANNOTATION}"
                )
        return cls(
            visibility=_visibility(
                VISIBILITY_ANNOTATION, annotations.get(VISIBILITY_ANNOTATION, "")
            )
        )

    def merged(self, changes: Mapping[str, str]) -> EndpointOptions:
        """These options with changes applied. Raises EndpointInvalid naming what is accepted."""
        result = self
        for key, value in changes.items():
            word = value.strip().lower()
            if key == "PolicyEnforcement":
                if word in _MODES:
                    result = replace(result, enforcement=_MODES[word])
                else:
                    raise EndpointInvalid(
                        f"PolicyEnforcement={value} is not a mode",
                        cure="Give default, always, never, or node for the node's own mode",
                    )
            elif key == "PolicyAudit":
                if word in _ON | _OFF:
                    result = replace(result, audit=word in _ON)
                elif word in ("", "node"):
                    result = replace(result, audit=None)
                else:
                    raise EndpointInvalid(
                        f"PolicyAudit={value} is neither on nor off",
                        cure="Give Enabled, Disabled, or node for what the node does",
                    )
            elif key.lower() == "visibility":
                result = replace(
                    result, visibility="" if word == "none" else _visibility(key, value)
                )
            else:
                raise EndpointInvalid(
                    f"unknown option {key}",
                    cure="There are PolicyEnforcement, PolicyAudit and Visibility",
                )
        return result

    def as_text(self, *, mode: str, audit: bool) -> dict[str, str]:
        """Effective values, under the names `merged` takes."""
        return {
            "PolicyEnforcement": self.enforcement or mode,
            "PolicyAudit": "Enabled"
            if (self.audit if self.audit is not None else audit)
            else "Disabled",
            "Visibility": self.visibility or "none",
        }


def _visibility(field: str, text: str) -> str:
    try:
        return visibility_text(parse_visibility(text))
    except ValueError as error:
        raise EndpointInvalid(
            f"{field}: {error}",
            cure="Write <Ingress/80/TCP/HTTP>, more of them after commas, or none",
        ) from None


def check_port_names(ports: PortNames) -> None:
    """Raises EndpointInvalid for names or ports that are none, or a name given twice."""
    if len(ports) > MAX_NAMED_PORTS:
        raise EndpointInvalid(f"{len(ports)} named ports are more than {MAX_NAMED_PORTS}")
    seen = set()
    for name, port, proto in ports:
        # A Kubernetes port name: IANA_SVC_NAME (RFC 6335, section 5.1), in lower case.
        if len(name) > 15 or not _PORT_NAME.match(name) or "--" in name:
            raise EndpointInvalid(
                f"{name!r} cannot be the name of a port",
                cure="Use at most 15 of a-z, 0-9 and single '-', a letter among them",
            )
        if not 0 < port <= 65535:
            raise EndpointInvalid(f"port {name}: {port} is outside 1 to 65535")
        if proto not in (6, 17, 132):
            raise EndpointInvalid(f"port {name}: the protocol must be TCP, UDP or SCTP")
        if name in seen:
            raise EndpointInvalid(f"port {name} is given twice")
        seen.add(name)


@dataclass(frozen=True, slots=True, order=True)
class SubjectKey:
    """Endpoints that agree in this share one policy map."""

    identity: NumericIdentity
    mode: OptionMode
    audit: bool
    ports: PortNames = ()  # what they call their ports
    visibility: str = ""  # what of them is shown to proxies

    def __str__(self) -> str:
        names = "".join(f"/{name}={port}" for name, port, _ in self.ports)
        return (
            f"{self.identity}/{self.mode}"
            + ("/audit" if self.audit else "")
            + (f"{names}/{self.visibility}" if self.visibility else names)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One row of the endpoints table. Changed only by replacing the row."""

    id: EndpointID
    name: str
    namespace: str
    labels: Labels  # as given
    identity_labels: Labels  # what makes the identity
    ports: PortNames = ()  # what it calls its ports, for rules that name them
    netns: str  # path
    interface: str  # in the workload's namespace
    host_interface: str
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    identity: NumericIdentity | None = None
    ifindex: int = 0  # host side; 0: not made yet
    mac: bytes = bytes(6)
    node_mac: bytes = bytes(6)
    netns_inode: int = 0
    options: EndpointOptions = field(default_factory=EndpointOptions)
    state: EndpointState = EndpointState.NONE
    message: str = ""  # why it is not ready; empty: it is, or is on its way
    wired: bool = False  # interface, programs, addresses and routes are in place
    open: bool = False  # policy is in force, packets may pass
    # What the kernel's row holds. Both trail `identity` while new policy is being made.
    realised_identity: NumericIdentity | None = None
    realised: SubjectKey | None = None
    slot: SlotIndex = SlotIndex(0)
    entries: int = 0
    ingress_enforced: bool = False
    egress_enforced: bool = False

    @property
    def qualified_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def shown_state(self) -> str:
        """`not-ready` when the last step failed although nothing is under way."""
        if self.state is EndpointState.READY and self.message:
            return "not-ready"
        return str(self.state)

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        return tuple(a for a in (self.ipv4, self.ipv6) if a is not None)

    def subject(self, *, mode: OptionMode, audit: bool) -> SubjectKey | None:
        """The policy it needs, given the node's own settings; None before it has an identity."""
        if self.identity is None:
            return None
        return SubjectKey(
            self.identity,
            self.options.enforcement or mode,
            audit if self.options.audit is None else self.options.audit,
            self.ports,
            self.options.visibility,
        )

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("ID", "NAME", "STATE", "IDENTITY", "IPV4", "IPV6", "SLOT", "OPEN", "MESSAGE")

    def table_row(self) -> tuple[str, ...]:
        return (
            str(self.id),
            self.qualified_name,
            self.shown_state,
            str(self.identity or "-"),
            str(self.ipv4 or "-"),
            str(self.ipv6 or "-"),
            str(self.slot),
            "yes" if self.open else "no",
            self.message,
        )


@dataclass(frozen=True, slots=True)
class Health:
    overall: str
    bpf: str
    policy: str
    connected: bool


def health_of(endpoint: Endpoint) -> Health:
    """Cilium's health model of a state (pkg/endpoint/api.go)."""
    match endpoint.state:
        case EndpointState.READY if endpoint.message:
            return Health("Warning", "Warning", "Warning", True)
        case EndpointState.READY:
            return Health("OK", "OK", "OK", True)
        case (
            EndpointState.REGENERATING
            | EndpointState.WAITING_TO_REGENERATE
            | EndpointState.DISCONNECTING
        ):
            return Health("Pending", "Pending", "Pending", True)
        case EndpointState.CREATING:
            return Health("Bootstrap", "Disabled", "Disabled", False)
        case EndpointState.WAITING_FOR_IDENTITY:
            return Health("Disabled", "Bootstrap", "Bootstrap", True)
        case _:
            return Health("Disabled", "Disabled", "Disabled", False)
