"""Policies that would isolate a node: rolled back, unless somebody says again that they are meant.

Who locks a node cannot always come back to unlock it. So policies that isolate a node that was open
are stored only where the caller says so, and for CONFIRM_S; unless they are confirmed within that
time, what was there before is stored again. What is to be rolled back is on disk before it is
stored, so that a restart does not make it final. A document that somebody changed meanwhile is left
as it is.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from cilia import statefile
from cilia.errors import InvalidError, NotFoundError
from cilia.telemetry import fields
from services.agent.clients import IdentityClient
from services.agent.clusterwatch import ClusterView, PolicyEntry, PolicyName, Where

log = structlog.get_logger()

CONFIRM_S: Final = 60


class NodeIsolated(InvalidError):
    default_cure = (
        f"If that is meant, apply with --confirm and then, within {CONFIRM_S} s, "
        "`cilia policy confirm`; otherwise it is rolled back"
    )


class NothingToConfirm(NotFoundError):
    default_cure = "Only policies that isolate a node wait for it, and for a minute"

    def __init__(self) -> None:
        super().__init__("no policy waits to be confirmed")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Documents that were stored on trial, and what to put back: None where there was nothing."""

    deadline_s: float  # wall clock: it must outlive a restart
    applied: Mapping[PolicyName, PolicyEntry]
    before: Mapping[PolicyName, PolicyEntry | None]


class Confirmation:
    def __init__(
        self,
        path: Path,
        *,
        client: IdentityClient,
        view: ClusterView,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path: Final = path
        self._client = client
        self._view = view
        self._clock = clock
        self.waiting: Waiting | None = None
        self._rolling_back: Waiting | None = None

    def load(self) -> None:
        """What an earlier run left. Raises StateFileDamaged."""
        content = statefile.read_json(self.path)
        if content is None:
            return
        try:
            before = {_name(x["name"]): x["before"] for x in content["documents"]}
            applied = {_name(x["name"]): x["applied"] for x in content["documents"]}
            self.waiting = Waiting(
                float(content["deadline_s"]),
                {name: _entry(name, x) for name, x in applied.items()},
                {name: _entry(name, x) if x is not None else None for name, x in before.items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise statefile.StateFileDamaged(self.path, str(error)) from error

    def begin(self, entries: Iterable[PolicyEntry]) -> None:
        """These are about to be stored on trial. What waits already waits on, with them.

        Blocking: it writes a file.
        """
        old = self.waiting
        applied = dict(old.applied) if old is not None else {}
        before = dict(old.before) if old is not None else {}
        for entry in entries:
            applied[entry.name] = entry
            before.setdefault(entry.name, self._view.policies.get(entry.name))
        self.waiting = Waiting(self._clock() + CONFIRM_S, applied, before)
        self._save()

    def _save(self) -> None:
        waiting = self.waiting
        if waiting is None:
            statefile.remove(self.path)
            return
        documents = [
            {
                "name": [name.kind, name.namespace, name.name],
                "applied": _to_json(entry),
                "before": _to_json(waiting.before[name]),
            }
            for name, entry in waiting.applied.items()
        ]
        statefile.write_json(self.path, {"deadline_s": waiting.deadline_s, "documents": documents})

    def cancel(self, old: Waiting | None) -> None:
        """They were not stored after all: what waited before waits on."""
        self.waiting = old
        self._save()

    def confirm(self) -> tuple[PolicyName, ...]:
        """They are meant. Raises NothingToConfirm, also once they are being rolled back."""
        if self.waiting is None or self.waiting is self._rolling_back:
            raise NothingToConfirm
        names = tuple(self.waiting.applied)
        self.waiting = None
        self._save()
        log.info("Policies that isolate a node were confirmed.", policies=[str(x) for x in names])
        return names

    @property
    def left_s(self) -> float | None:
        """Seconds until they are rolled back; None when nothing waits."""
        if self.waiting is None:
            return None
        left_s = self.waiting.deadline_s - self._clock()
        # More than there was: the clock was set back, and how much is left nobody knows.
        return left_s if 0 < left_s < CONFIRM_S + 1 else 0.0

    async def check(self) -> None:
        """Roll back what was not confirmed in time. Raises IdentityUnavailable: then try again."""
        waiting = self.waiting
        if waiting is None or self.left_s or not self._view.live:
            return
        self._rolling_back = waiting
        puts, removed = [], []
        for name, entry in waiting.applied.items():
            if self._view.policies.get(name) != entry:
                continue
            old = waiting.before[name]
            if old is not None:
                puts.append(old)
            else:
                removed.append(name)
        if puts:
            await self._client.apply_policies(puts, dry_run=False)
        if removed:
            await self._client.delete_policies(removed, everything=False)
        if self.waiting is waiting:
            self.waiting = None
            self._save()
        for name in (*(x.name for x in puts), *removed):
            log.warning(
                "A policy that isolates a node was not confirmed and is rolled back.",
                **{fields.POLICY_NAME: str(name)},
            )


def _name(value: Any) -> PolicyName:
    kind, namespace, name = value
    return PolicyName(str(kind), str(namespace), str(name))


def _to_json(entry: PolicyEntry | None) -> Any:
    if entry is None:
        return None
    return {
        "document": base64.b64encode(entry.document).decode(),
        "origin": entry.origin,
        "rule_origins": entry.rule_origins,
    }


def _where(value: Any) -> Where:
    source, line, column = value
    return str(source), int(line), int(column)


def _entry(name: PolicyName, value: Any) -> PolicyEntry:
    return PolicyEntry(
        name,
        base64.b64decode(value["document"], validate=True),
        _where(value["origin"]),
        tuple((str(path), _where(at)) for path, at in value["rule_origins"]),
    )
