"""`python -m services.xds`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (the socket is in use, Envoy is not there);
70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import sys

from cilia import lifecycle
from services.xds.app import build
from services.xds.config import parse


def main() -> int:
    return lifecycle.main("xds", parse, build)


if __name__ == "__main__":
    sys.exit(main())
