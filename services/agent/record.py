"""Endpoint records: one file an endpoint in the state directory, written atomically.

A record is written before an interface of its endpoint exists, marked `creating`, and again,
`ready`, before its creation is acknowledged. A `creating` record found at start belongs to an
endpoint nobody was told about: what there is of it is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from cilia import statefile
from cilia.identity import EndpointID, NumericIdentity
from cilia.labels import LabelError, Labels
from cilia.policy import parse_visibility, visibility_text
from cilia.policy.l7 import port_names
from services.agent.endpoint import MAX_ENDPOINT_ID, Endpoint, EndpointOptions, EndpointState

_VERSION = 1


class EndpointRecords:
    """The directory of records. Blocking: call it from an executor."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.damaged: list[str] = []  # what was found unreadable, for the status

    def _path(self, number: EndpointID) -> Path:
        return self._directory / f"{number}.json"

    def prepare(self) -> None:
        statefile.ensure_directory(self._directory)
        statefile.sweep(self._directory)

    def save(self, endpoint: Endpoint, *, creating: bool = False) -> None:
        statefile.write_json(self._path(endpoint.id), to_json(endpoint, creating=creating))

    def remove(self, number: EndpointID) -> None:
        statefile.remove(self._path(number))

    def load(self) -> Iterator[tuple[Endpoint, bool]]:
        """(endpoint, whether its creation was under way). Damaged records are set aside."""
        for path in sorted(self._directory.glob("*.json")):
            try:
                content = statefile.read_json(path)
                endpoint, creating = from_json(content)
                if f"{endpoint.id}.json" != path.name:
                    raise ValueError(f"it is of endpoint {endpoint.id}")
            except (
                statefile.StateFileDamaged,
                LabelError,
                KeyError,
                TypeError,
                ValueError,
            ) as error:
                kept = statefile.set_aside(path)
                self.damaged.append(f"{path} is damaged ({error}); it was kept as {kept}")
                continue
            yield endpoint, creating


def to_json(endpoint: Endpoint, *, creating: bool) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "creating": creating,
        "id": endpoint.id,
        "name": endpoint.name,
        "namespace": endpoint.namespace,
        "labels": endpoint.labels.canonical().decode(),
        "identity_labels": endpoint.identity_labels.canonical().decode(),
        "identity": endpoint.identity,
        "netns": endpoint.netns,
        "netns_inode": endpoint.netns_inode,
        "interface": endpoint.interface,
        "host_interface": endpoint.host_interface,
        "ifindex": endpoint.ifindex,
        "ipv4": str(endpoint.ipv4) if endpoint.ipv4 else None,
        "ipv6": str(endpoint.ipv6) if endpoint.ipv6 else None,
        "mac": endpoint.mac.hex(":"),
        "node_mac": endpoint.node_mac.hex(":"),
        "enforcement": endpoint.options.enforcement,
        "audit": endpoint.options.audit,
        "visibility": endpoint.options.visibility,
        "ports": [list(port) for port in endpoint.ports],
    }


def from_json(content: Any) -> tuple[Endpoint, bool]:
    """Raises KeyError, TypeError, ValueError, LabelError for what is no record of ours."""
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']} is not known")
    number = int(content["id"])
    if not 0 < number <= MAX_ENDPOINT_ID:
        raise ValueError(f"{number} is no endpoint id")
    identity = content["identity"]
    endpoint = Endpoint(
        id=EndpointID(number),
        name=str(content["name"]),
        namespace=str(content["namespace"]),
        labels=Labels.from_canonical(content["labels"].encode()),
        identity_labels=Labels.from_canonical(content["identity_labels"].encode()),
        identity=NumericIdentity(int(identity)) if identity is not None else None,
        netns=str(content["netns"]),
        netns_inode=int(content["netns_inode"]),
        interface=str(content["interface"]),
        host_interface=str(content["host_interface"]),
        ifindex=int(content["ifindex"]),
        ipv4=IPv4Address(content["ipv4"]) if content["ipv4"] else None,
        ipv6=IPv6Address(content["ipv6"]) if content["ipv6"] else None,
        mac=bytes.fromhex(content["mac"].replace(":", "")),
        node_mac=bytes.fromhex(content["node_mac"].replace(":", "")),
        options=EndpointOptions(
            content["enforcement"],
            content["audit"],
            visibility_text(parse_visibility(content.get("visibility", ""))),
        ),
        # Older records have no visibility, and no ports.
        ports=port_names(
            tuple((str(n), int(port), int(proto)) for n, port, proto in content.get("ports", ()))
        ),
    )
    return replace(endpoint, state=EndpointState.RESTORING), bool(content["creating"])
