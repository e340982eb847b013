"""`python -m services.agent`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (state directory or socket in use, kernel feature
missing, programs refused); 70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

from cilia import lifecycle
from services.agent.app import build
from services.agent.options import parse

_M_ARENA_MAX = -8  # mallopt(3)


def _few_arenas() -> None:
    """One heap for a dozen threads that are mostly idle: glibc would keep several, half empty."""
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def main() -> int:
    _few_arenas()
    return lifecycle.main("agent", parse, build)


if __name__ == "__main__":
    sys.exit(main())
