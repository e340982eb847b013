"""Everything that is printed for people goes through here; the only module that knows rich.

Off a terminal nothing is coloured, cut or wrapped, so `| grep` and `| awk` see whole rows.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.settings import Settings

WIDE = 100_000  # columns, off a terminal: rich must not wrap what a program may read
FOLDED = 32  # columns: what is longer may be folded on a terminal

STYLES = {
    "ok": "green",
    "ready": "green",
    "allowed": "green",
    "enabled": "green",
    "running": "green",
    "yes": "green",
    "denied": "bold red",
    "failure": "bold red",
    "error": "bold red",
    "not-ready": "red",
    "dead": "red",
    "missing": "red",
    "drop": "red",
    "warning": "yellow",
    "audit": "yellow",
    "pending": "yellow",
    "regenerating": "yellow",
    "waiting-for-identity": "yellow",
    "disabled": "dim",
}


def console(settings: Settings) -> Console:
    """A console on stdout; NO_COLOR and --no-color are honoured."""
    terminal = sys.stdout.isatty()
    return Console(
        no_color=not settings.color,
        width=None if terminal else WIDE,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not terminal,
    )


def count(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def styled(value: object) -> Text:
    """A cell; a word that is a state gets the state's colour."""
    text = "" if value is None else str(value)
    return Text(text, style=STYLES.get(text.lower(), ""))


def table(settings: Settings, header: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Print an aligned table with three blanks between columns. Returns the number of rows.

    On a terminal long cells are folded into their column, if then all fits; words are not cut into
    letters for it: else rows are whole, and the terminal wraps them.
    """
    cells = [[styled(cell) for cell in row] for row in rows]
    widths = [len(name) for name in header]
    for row in cells:
        for index, cell in enumerate(row):
            widths[index] = max(widths[index], *map(len, cell.plain.split("\n")))
    screen = console(settings)
    needed = sum(min(width, FOLDED) for width in widths) + 3 * (len(widths) - 1)
    fold = sys.stdout.isatty() and needed <= screen.width
    if not fold:
        screen.width = WIDE
    out = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name, width in zip(header, widths, strict=True):
        out.add_column(name, no_wrap=not fold or width <= FOLDED, overflow="fold")
    for row in cells:
        out.add_row(*row)
    with screen.capture() as captured:
        screen.print(out)
    # rich pads the last column; blanks at line ends are nobody's.
    sys.stdout.write("\n".join(row.rstrip() for row in captured.get().splitlines()) + "\n")
    return len(cells)


def fields(settings: Settings, rows: Iterable[tuple[str, object]], *, indent: int = 0) -> None:
    """Print `Name:   value` lines, aligned."""
    items = list(rows)
    if not items:
        return
    width = max(len(name) for name, _ in items) + 1
    screen = console(settings)
    for name, value in items:
        line = Text(" " * indent + f"{name + ':':<{width}}   ")
        line.append_text(styled(value))
        line.rstrip()
        screen.print(line)


def line(settings: Settings, *parts: str | tuple[str, str]) -> None:
    """Print one line; a part may be (text, style)."""
    screen = console(settings)
    text = Text()
    for part in parts:
        if isinstance(part, tuple):
            text.append(part[0], style=part[1])
        else:
            text.append(part)
    screen.print(text)


def json(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_module.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_line(value: Any) -> None:
    """Print one JSON object on one line and flush: a stream for programs."""
    sys.stdout.write(json_module.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """Say something on stderr that is not an error."""
    sys.stderr.write(text + "\n")


def progress(text: str) -> None:
    """What goes on right now, on stderr and only on a terminal; the next one replaces it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
