"""What is missing, so that "no drops seen" can be told from "not watching".

Every gap is a row: from when to when, how many events (or that nobody knows), and why. Rows are
kept in memory, bounded, and appended to a file of JSON lines, which is read at the next start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

_MERGE_NS: Final = 1_000_000_000
_MAX_ROWS: Final = 1 << 16


class Cause(StrEnum):
    """Where events were lost."""

    KERNEL = "kernel-ring"  # the kernel's ring had no room
    TRANSPORT = "transport"  # between the agent and here
    READER = "reader"  # overwritten in memory before this reader came to it
    HISTORY = "history"  # not written to disk, or not readable there
    AGENT = "agent-unavailable"  # nobody to hear from: counted by nobody
    STOPPED = "not-running"  # this service did not run
    CLOCK = "clock-step"  # nothing is missing, but times before and after differ by a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One gap. `count` None: it is not known how many."""

    from_ns: int
    to_ns: int
    count: int | None
    cause: Cause
    detail: str = ""
    row: int = 0  # the row of the ring before which it lies; of this run only
    run: int = 0


class Ledger:
    """Owned by the event loop. `path` None: memory only."""

    def __init__(self, path: Path | None = None, *, run: int = 0) -> None:
        self._path = path
        self._run = run
        self._rows: list[Loss] = []
        self._opened_ns = 0  # when the last row was entered, to its end then
        self._unsaved: list[Loss] = []
        self.damaged_lines = 0
        self.forgotten = 0
        self.version = 0  # raised by every gap, also by one that widens another
        self.totals: dict[Cause, int] = dict.fromkeys(Cause, 0)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Loss]:
        return iter(self._rows)

    def add(
        self,
        cause: Cause,
        *,
        from_ns: int,
        to_ns: int,
        count: int | None,
        row: int = 0,
        detail: str = "",
    ) -> Loss:
        """Enters a gap; one that follows its like within a second widens it."""
        self.totals[cause] += count or 0
        self.version += 1
        loss = Loss(
            from_ns=min(from_ns, to_ns),
            to_ns=max(from_ns, to_ns),
            count=count,
            cause=cause,
            detail=detail,
            row=row,
            run=self._run,
        )
        last = self._rows[-1] if self._rows else None
        if (
            last is not None
            and (last.run, last.cause, last.detail) == (loss.run, cause, detail)
            and cause is not Cause.CLOCK
            and 0 <= loss.to_ns - self._opened_ns <= _MERGE_NS
            and (last.count is None) == (count is None)
        ):
            loss = replace(
                last,
                from_ns=min(last.from_ns, loss.from_ns),
                to_ns=loss.to_ns,
                row=row,
                count=None if count is None or last.count is None else last.count + count,
            )
            self._rows[-1] = loss
            if self._unsaved:
                self._unsaved[-1] = loss
            else:
                self._unsaved.append(loss)
        else:
            self._opened_ns = loss.to_ns
            self._rows.append(loss)
            self._unsaved.append(loss)
        if len(self._rows) > _MAX_ROWS:
            self.forgotten += len(self._rows) - _MAX_ROWS
            del self._rows[: len(self._rows) - _MAX_ROWS]
        return loss

    def extend(self, cause: Cause, to_ns: int) -> None:
        """Lets the last gap of that cause, which is still open, reach to a later time."""
        for at in range(len(self._rows) - 1, -1, -1):
            row = self._rows[at]
            if row.cause is cause and row.run == self._run:
                self._rows[at] = replace(row, to_ns=max(row.to_ns, to_ns))
                kept = [one for one in self._unsaved if one != row]
                self._unsaved = [*kept, self._rows[at]]
                return

    @property
    def end(self) -> int:
        """The place behind the last gap, counting those forgotten."""
        return self.forgotten + len(self._rows)

    def at(self, place: int) -> Loss | None:
        """The gap at a place; None before the first kept one and behind the last."""
        index = place - self.forgotten
        return self._rows[index] if 0 <= index < len(self._rows) else None

    def between(self, since_ns: int | None, until_ns: int | None) -> list[Loss]:
        """Gaps that touch the time asked for, oldest first."""
        return sorted(
            (
                loss
                for loss in self._rows
                if (since_ns is None or loss.to_ns >= since_ns)
                and (until_ns is None or loss.from_ns <= until_ns)
            ),
            key=lambda loss: loss.from_ns,
        )

    # ---- the file; its callers run these in a thread

    def load(self) -> None:
        """Reads what earlier runs wrote. A line that cannot be read is counted and skipped."""
        if self._path is None or not self._path.exists():
            return
        places: dict[tuple[int, Cause, int, str], int] = {}
        with self._path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    row["cause"] = Cause(row["cause"])
                    loss = Loss(**row)
                except (ValueError, TypeError, KeyError):
                    self.damaged_lines += 1
                    continue
                key = (loss.run, loss.cause, loss.from_ns, loss.detail)
                if key in places:
                    self._rows[places[key]] = loss  # the same gap, grown
                else:
                    places[key] = len(self._rows)
                    self._rows.append(loss)
        del self._rows[: max(0, len(self._rows) - _MAX_ROWS)]

    def take_unsaved(self) -> list[Loss]:
        rows, self._unsaved = self._unsaved, []
        return rows

    def put_back(self, rows: list[Loss]) -> None:
        """What could not be saved after all."""
        self._unsaved = rows + self._unsaved

    def append(self, rows: list[Loss]) -> None:
        """Raises OSError; the rows stay in memory anyhow."""
        if self._path is None or not rows:
            return
        with self._path.open("ab") as file:
            file.write(b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in rows))

    def rewrite(self, oldest_ns: int) -> None:
        """Drops what is older than the flows that are kept. Raises OSError."""
        kept = [row for row in self._rows if row.to_ns >= oldest_ns or row.run == self._run]
        self.forgotten += len(self._rows) - len(kept)
        self._rows = kept
        if self._path is None:
            return
        beside = self._path.with_suffix(".tmp")
        beside.write_bytes(b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in self._rows))
        beside.replace(self._path)
        self._unsaved = []
