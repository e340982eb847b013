"""`python -m services.flows`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (the state directory is locked, the socket in use);
70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import sys

from cilia import lifecycle
from services.flows.app import build
from services.flows.config import parse


def main() -> int:
    # Serving and taking in share one interpreter: neither waits long for the other.
    sys.setswitchinterval(0.0005)
    return lifecycle.main("flows", parse, build)


if __name__ == "__main__":
    sys.exit(main())
