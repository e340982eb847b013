"""What the service stores, as values, and as the bytes that they are in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cilia.errors import Fault, InvalidError, Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class IpEntry:
    """An address, or a whole prefix, and whose it is."""

    prefix: str
    identity: int
    node: str
    host_ip: str
    namespace: str
    workload: str

    def to_json(self) -> bytes:
        return _dump(
            {
                "identity": self.identity,
                "node": self.node,
                "hostIP": self.host_ip,
                "namespace": self.namespace,
                "workload": self.workload,
            }
        )

    @classmethod
    def from_json(cls, prefix: str, data: bytes) -> IpEntry:
        value = json.loads(data)
        return cls(
            prefix=prefix,
            identity=value["identity"],
            node=value["node"],
            host_ip=value["hostIP"],
            namespace=value["namespace"],
            workload=value["workload"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyName:
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind} {where}{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy document as it is stored. `rule_origins` are (path, origin)."""

    name: PolicyName
    document: bytes
    origin: Origin
    rule_origins: tuple[tuple[str, Origin], ...] = ()

    def encode(self) -> bytes:
        """A line of JSON about the document, then the document as it came: not escaped a second
        time, and readable in a dump."""
        about = {
            "origin": _origin(self.origin),
            # The source is nearly always the document's own: then it is left out.
            "rules": [
                [path, *_origin(origin)]
                if origin.source != self.origin.source
                else [path, origin.line, origin.column]
                for path, origin in self.rule_origins
            ],
        }
        return _dump(about) + b"\n" + self.document

    @classmethod
    def decode(cls, name: PolicyName, data: bytes) -> Policy:
        head, _, document = data.partition(b"\n")
        about = json.loads(head)
        origin = _to_origin(about["origin"])
        return cls(
            name=name,
            document=document,
            origin=origin,
            rule_origins=tuple(
                (path, _to_origin(rest if len(rest) == 3 else [origin.source, *rest]))
                for path, *rest in about["rules"]
            ),
        )


class InvalidRequestField(InvalidError):
    """The request has a field that cannot be taken; every such field is named."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        where = "".join(f"{part}: " for part in (first.document, first.path) if part)
        super().__init__(f"{where}{first.message}{more}", faults=faults)


def _origin(origin: Origin) -> list[Any]:
    return [origin.source, origin.line, origin.column]


def _to_origin(value: list[Any]) -> Origin:
    source, line, column = value
    return Origin(source=source, line=line, column=column)


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
