"""What the kernel's maps hold otherwise than it was written, a row each, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from services.agent.endpoint import SubjectKey

DRIFTS_KEPT: Final = 100  # of one map at one look; more are counted

_ABSENT: Final = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One row, or one answer, that is not as it should be."""

    map: str
    row: str  # which
    expected: str
    found: str
    subject: SubjectKey | None = None
    users: tuple[str, ...] = ()  # endpoints whose policy it is
    rule_id: int = 0  # whose row it is, if it is one rule's

    def __str__(self) -> str:
        who = f" of {', '.join(self.users[:3])}" if self.users else ""
        return f"{self.map}{who}: {self.row}: {self.found}, should be {self.expected}"


def compare(
    name: str,
    wanted: Mapping[bytes, bytes],
    found: Mapping[bytes, bytes],
    *,
    key_text: Callable[[bytes], str],
    value_text: Callable[[bytes], str],
) -> list[Drift]:
    """The rows that differ, DRIFTS_KEPT at most."""
    drifts: list[Drift] = []
    if wanted == found:
        return drifts
    for key in wanted.keys() | found.keys():
        ours, theirs = wanted.get(key), found.get(key)
        if ours == theirs:
            continue
        drifts.append(
            Drift(
                map=name,
                row=key_text(key),
                expected=value_text(ours) if ours is not None else _ABSENT,
                found=value_text(theirs) if theirs is not None else _ABSENT,
            )
        )
        if len(drifts) == DRIFTS_KEPT:
            break
    return drifts
