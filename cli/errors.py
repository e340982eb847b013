"""What can go wrong in the command, and the exit code each kind has.

The codes are part of the interface (docs/cli.md): scripts may branch on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, Any

import click


class Exit(IntEnum):
    """Exit codes of `cilia`."""

    OK = 0
    FAILED = 1  # the request was understood and could not be done; or a check said no
    USAGE = 2  # wrong command line (click's own code)
    UNREACHABLE = 3  # the service needed does not answer
    INVALID = 4  # a document, label, address or file is wrong
    NOT_FOUND = 5
    CONFLICT = 6  # exists already, or the address is in use
    TIMEOUT = 7  # no answer within --timeout
    PERMISSION = 8  # not root, or not allowed to open the socket


@dataclass(frozen=True, slots=True)
class FaultLine:
    """One fault of a document, as printed: `file:line:column: path: message`."""

    source: str
    line: int
    column: int
    path: str
    message: str
    document: str = ""

    def text(self) -> str:
        """The line an editor can jump to; unknown positions are left out, not printed as 0."""
        place = self.source or "<input>"
        if self.line:
            place += f":{self.line}"
            if self.column:
                place += f":{self.column}"
        what = f"{self.path}: {self.message}" if self.path else self.message
        return f"{place}: {what}"

    def shape(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "file": self.source,
            "line": self.line,
            "column": self.column,
            "document": self.document,
            "path": self.path,
            "message": self.message,
        }


class CliError(click.ClickException):
    """An error with an exit code, an optional cure, and optional faults of a document."""

    def __init__(
        self,
        message: str,
        *,
        code: Exit = Exit.FAILED,
        hint: str = "",
        faults: Sequence[FaultLine] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint
        self.faults = tuple(faults)
        self.as_json = False  # set where the output format is known

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # click reads it; ours differs by error
        return int(self.code)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print to stderr: faults first (an editor reads them), then the message and the cure."""
        if self.as_json:
            body = {
                "error": {
                    "code": self.code.name.lower(),
                    "exit": int(self.code),
                    "message": self.message,
                    "hint": self.hint,
                    "faults": [f.shape() for f in self.faults],
                }
            }
            click.echo(json.dumps(body, ensure_ascii=False), err=True)
            return
        for fault in self.faults:
            click.echo(fault.text(), err=True)
        click.echo(f"Error: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)
