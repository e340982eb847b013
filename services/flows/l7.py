"""What a proxy saw of one request or answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class L7Kind(IntEnum):
    NONE = 0
    HTTP = 1
    DNS = 2
    KAFKA = 3


class L7Type(IntEnum):
    UNKNOWN = 0
    REQUEST = 1
    RESPONSE = 2
    SAMPLE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    code: int = 0  # 0 on requests
    method: str = ""
    url: str = ""
    protocol: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dns:
    query: str = ""
    ips: tuple[str, ...] = ()
    ttl: int = 0
    cnames: tuple[str, ...] = ()
    observation_source: str = ""
    rcode: int = 0
    qtypes: tuple[str, ...] = ()
    rrtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kafka:
    error_code: int = 0
    api_version: int = 0
    api_key: str = ""
    correlation_id: int = 0
    topic: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class L7Record:
    """The part of an L7 flow that is not in every flow."""

    type: L7Type
    record: Http | Dns | Kafka
    latency_ns: int = 0
    trace_id: str = ""

    @property
    def kind(self) -> L7Kind:
        match self.record:
            case Http():
                return L7Kind.HTTP
            case Dns():
                return L7Kind.DNS
            case Kafka():
                return L7Kind.KAFKA
