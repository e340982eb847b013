"""Each flow's uuid, made of which run stored it and its number there: version 8 of RFC 9562.

rrrrrrrr-rrrr-8rrr-xnnn-nnnnnnnnnnnn      r: run (60 bits), n: number (60 bits), x: 8 (variant)
"""

from __future__ import annotations

import secrets
from typing import Final

RUN_BITS: Final = 60
NUMBER_BITS: Final = 60


def new_run() -> int:
    return secrets.randbits(RUN_BITS)


def run_text(run: int) -> str:
    """What stands before a number's own part, up to and with the variant's digit."""
    digits = f"{run:015x}"
    return f"{digits[:8]}-{digits[8:12]}-8{digits[12:]}-8"


def format_uuid(run: int, number: int) -> str:
    digits = f"{number & (1 << NUMBER_BITS) - 1:015x}"
    return f"{run_text(run)}{digits[:3]}-{digits[3:]}"


def parse_uuid(text: str) -> tuple[int, int] | None:
    """The run and the number; None for what is no uuid of ours."""
    parts = text.split("-")
    if [len(part) for part in parts] != [8, 4, 4, 4, 12]:
        return None
    if parts[2][0] != "8" or parts[3][0] != "8":
        return None
    try:
        run = int(parts[0] + parts[1] + parts[2][1:], 16)
        number = int(parts[3][1:] + parts[4], 16)
    except ValueError:
        return None
    # Equality is of text: only the very form that is given out.
    return (run, number) if format_uuid(run, number) == text else None
