"""What is served: resources and their types, as bytes that every stream can share.

A resource is serialised when it is put. Its version is a digest of its bytes, so versions survive a
restart of this service and a client that reconnects is sent only what it lacks.

    DiscoveryResponse           version_info 1, resources 2 (Any), type_url 4, nonce 5
    DeltaDiscoveryResponse      system_version_info 1, resources 2 (Resource), type_url 4, nonce 5,
                                removed_resources 6
    Resource                    version 1, resource 2 (Any), name 3
    Any                         type_url 1, value 2

(envoy/service/discovery/v3/discovery.proto). Responses are joined from ready encoded fields, which
protobuf allows in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NewType

from envoy.config.cluster.v3 import cluster_pb2
from google.protobuf.message import DecodeError, Message

from cilia.errors import InvalidError
from cilia.rpc.wire import varint

TypeURL = NewType("TypeURL", str)
NodeID = NewType("NodeID", str)

PREFIX: Final = "type.googleapis.com/"
LDS: Final = TypeURL(PREFIX + "envoy.config.listener.v3.Listener")
RDS: Final = TypeURL(PREFIX + "envoy.config.route.v3.RouteConfiguration")
SRDS: Final = TypeURL(PREFIX + "envoy.config.route.v3.ScopedRouteConfiguration")
VHDS: Final = TypeURL(PREFIX + "envoy.config.route.v3.VirtualHost")
CDS: Final = TypeURL(PREFIX + "envoy.config.cluster.v3.Cluster")
EDS: Final = TypeURL(PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment")
SDS: Final = TypeURL(PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret")
ECDS: Final = TypeURL(PREFIX + "envoy.config.core.v3.TypedExtensionConfig")
RTDS: Final = TypeURL(PREFIX + "envoy.service.runtime.v3.Runtime")
NPDS: Final = TypeURL(PREFIX + "cilium.NetworkPolicy")
NPHDS: Final = TypeURL(PREFIX + "cilium.NetworkPolicyHosts")

WILDCARD: Final = "*"
MAX_NAME_BYTES: Final = 1024
MAX_RESOURCE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """How a type is spoken of. An unknown one is treated as the protocol's rules say by default."""

    url: TypeURL
    short: str
    order: int
    """Dependencies first: what a listener names exists before it."""
    removal_order: int
    """What refers goes before what it refers to."""
    dependency: bool = False
    """Others refer to it, so changes of theirs wait for its acknowledgement for a while."""
    whole: bool = True
    """A state-of-the-world response lists everything subscribed to: what is absent is deleted."""
    patient: bool = False
    """A name that is unknown may come: clients wait for it, and an answer would end that."""

    @property
    def legacy_wildcard(self) -> bool:
        """Whether a first request without names asks for everything."""
        return self.whole or self.url == SRDS


_KNOWN: Final = {
    info.url: info
    for info in (
        TypeInfo(CDS, "CDS", 0, 40, dependency=True),
        TypeInfo(EDS, "EDS", 1, 41, dependency=True, whole=False, patient=True),
        TypeInfo(SDS, "SDS", 2, 42, dependency=True, whole=False, patient=True),
        TypeInfo(NPHDS, "NPHDS", 3, 31),
        TypeInfo(NPDS, "NPDS", 4, 30),
        TypeInfo(LDS, "LDS", 10, 10),
        TypeInfo(SRDS, "SRDS", 11, 11),
        TypeInfo(RDS, "RDS", 12, 12, whole=False, patient=True),
        TypeInfo(VHDS, "VHDS", 13, 13, whole=False),
        TypeInfo(ECDS, "ECDS", 14, 14, whole=False, patient=True),
        TypeInfo(RTDS, "RTDS", 15, 15, whole=False),
    )
}


def type_info(url: TypeURL) -> TypeInfo:
    """What is known of a type; any URL is a type."""
    return _KNOWN.get(url) or TypeInfo(url, url.removeprefix(PREFIX), 20, 20)


def by_short_name(text: str) -> TypeURL:
    """`LDS` or a full URL, with or without the prefix."""
    for info in _KNOWN.values():
        if info.short == text.upper():
            return info.url
    return TypeURL(text if "/" in text else PREFIX + text)


# ---- bytes


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


class Resource:
    """One version of one named resource. Immutable; compared by identity or by `version`."""

    __slots__ = ("any_field", "delta_field", "name", "number", "refers", "size", "url", "version")

    def __init__(self, url: TypeURL, name: str, value: bytes) -> None:
        digest = blake2b(value, digest_size=16, person=b"cilia-xds").digest()
        packed = field(1, url.encode()) + field(2, value)
        self.url = url
        self.name = name
        self.size = len(value)
        self.version = digest.hex()
        self.any_field = field(2, packed)
        self.delta_field = field(
            2, field(1, self.version.encode()) + self.any_field + field(3, name.encode())
        )
        # Of a set of resources the sum identifies it, in whatever order they came and went.
        self.number = int.from_bytes(blake2b(digest + name.encode(), digest_size=16).digest())
        self.refers = _endpoints_of(value) if url == CDS else None

    def value(self) -> bytes:
        """The message's own bytes."""
        return self.any_field[len(self.any_field) - self.size :]

    def __repr__(self) -> str:
        return f"<{type_info(self.url).short} {self.name} {self.version[:8]}>"


def _endpoints_of(value: bytes) -> str | None:
    """The EDS name that a cluster needs: a changed cluster warms anew and asks for it again."""
    try:
        cluster = cluster_pb2.Cluster.FromString(value)
    except DecodeError:
        return None
    if cluster.type != cluster_pb2.Cluster.EDS:
        return None
    return str(cluster.eds_cluster_config.service_name or cluster.name)


class ResourceInvalid(InvalidError):
    """What was put cannot be served."""


def make(url: TypeURL, name: str, value: Message | bytes) -> Resource:
    """Raises ResourceInvalid."""
    if not url.isprintable() or "/" not in url or len(url) > 512:
        raise ResourceInvalid(f"{url[:80]!r} is not a type URL")
    if len(name.encode()) > MAX_NAME_BYTES or name == WILDCARD:
        raise ResourceInvalid(
            f"{name[:80]!r} cannot be the name of a resource",
            cure=f"Use another than {WILDCARD}, of at most {MAX_NAME_BYTES} bytes",
        )
    data = value if isinstance(value, bytes) else value.SerializeToString(deterministic=True)
    if len(data) > MAX_RESOURCE_BYTES:
        raise ResourceInvalid(f"the resource {name} has {len(data)} bytes, above 16 MiB")
    return Resource(url, name, data)


_SUM: Final = 1 << 128


def set_version(total: int) -> str:
    """The version of a set, from the sum of its resources' numbers."""
    return f"{total % _SUM:032x}"


def set_sum(resources: Iterable[Resource]) -> int:
    return sum(resource.number for resource in resources) % _SUM


def sotw_response(url: TypeURL, version: str, nonce: str, resources: Iterable[Resource]) -> bytes:
    parts = [field(1, version.encode())]
    parts += [resource.any_field for resource in resources]
    parts += [field(4, url.encode()), field(5, nonce.encode())]
    return b"".join(parts)


def delta_response(
    url: TypeURL,
    version: str,
    nonce: str,
    resources: Iterable[Resource],
    removed: Sequence[str],
) -> bytes:
    parts = [field(1, version.encode())]
    parts += [resource.delta_field for resource in resources]
    parts += [field(4, url.encode()), field(5, nonce.encode())]
    parts += [field(6, name.encode()) for name in removed]
    return b"".join(parts)
