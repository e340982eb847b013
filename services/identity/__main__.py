"""`python -m services.identity`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (the store is locked or damaged, the socket in use);
70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import sys

from cilia import lifecycle
from services.identity.app import build
from services.identity.config import parse


def main() -> int:
    return lifecycle.main("identity", parse, build)


if __name__ == "__main__":
    sys.exit(main())
