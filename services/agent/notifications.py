"""Agent notifications: what changed, for those who watch. Subtypes are Cilium's numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from cilia.labels import Labels


class Subtype(IntEnum):
    MESSAGE = 1
    AGENT_STARTED = 2
    ENDPOINT_REGENERATED = 3
    ENDPOINT_REGENERATION_FAILED = 4
    POLICY_UPDATED = 5
    POLICY_DELETED = 6
    ENDPOINT_CREATED = 7
    ENDPOINT_DELETED = 8
    IPCACHE_UPSERTED = 9
    IPCACHE_DELETED = 10


@dataclass(frozen=True, slots=True)
class Notification:
    subtype: Subtype
    time_ns: int  # wall clock
    json: str


class Notifier:
    """Makes notifications and hands them to whoever listens."""

    def __init__(self) -> None:
        self._sinks: list[Callable[[Notification], None]] = []

    def listen(self, sink: Callable[[Notification], None]) -> None:
        self._sinks.append(sink)

    def _send(self, subtype: Subtype, payload: dict[str, object]) -> None:
        note = Notification(
            subtype, time.time_ns(), json.dumps(payload, separators=(",", ":"), sort_keys=True)
        )
        for sink in self._sinks:
            sink(note)

    def agent_started(self) -> None:
        self._send(
            Subtype.AGENT_STARTED,
            {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        )

    def policy_updated(self, names: Iterable[str], revision: int, rules: int) -> None:
        self._send(
            Subtype.POLICY_UPDATED,
            {"labels": sorted(names), "revision": revision, "rule_count": rules},
        )

    def policy_deleted(self, names: Iterable[str], revision: int, rules: int) -> None:
        self._send(
            Subtype.POLICY_DELETED,
            {"labels": sorted(names), "revision": revision, "rule_count": rules},
        )

    def _endpoint(
        self, subtype: Subtype, number: int, name: str, namespace: str, labels: Labels, error: str
    ) -> None:
        payload: dict[str, object] = {
            "id": number,
            "labels": [str(label) for label in labels],
            "pod-name": name,
            "namespace": namespace,
        }
        if error:
            payload["error"] = error
        self._send(subtype, payload)

    def endpoint_created(self, number: int, name: str, namespace: str, labels: Labels) -> None:
        self._endpoint(Subtype.ENDPOINT_CREATED, number, name, namespace, labels, "")

    def endpoint_deleted(self, number: int, name: str, namespace: str, labels: Labels) -> None:
        self._endpoint(Subtype.ENDPOINT_DELETED, number, name, namespace, labels, "")

    def endpoint_regenerated(
        self, number: int, name: str, namespace: str, labels: Labels, error: str = ""
    ) -> None:
        subtype = Subtype.ENDPOINT_REGENERATION_FAILED if error else Subtype.ENDPOINT_REGENERATED
        self._endpoint(subtype, number, name, namespace, labels, error)

    def ipcache_changed(self, cidr: str, identity: int | None) -> None:
        if identity is None:
            self._send(Subtype.IPCACHE_DELETED, {"cidr": cidr})
        else:
            self._send(Subtype.IPCACHE_UPSERTED, {"cidr": cidr, "id": identity})
