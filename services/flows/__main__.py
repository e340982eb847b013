"""`python -m services.flows`: configuration, then the service, then an exit code.

0 stopped when asked to; 1 an operating error (the state directory is locked, the socket in use);
70 a bug; 78 the configuration is wrong (2: a flag that does not exist).
"""

from __future__ import annotations

import os
import sys

from cilia import lifecycle
from cilia.errors import InvalidError
from cilia.lifecycle import ExitCode, Lifecycle
from cilia.telemetry import log
from services.flows.app import build
from services.flows.config import parse


def main() -> int:
    try:
        config = parse(sys.argv[1:], os.environ)
        as_json = None if config.log_format == "auto" else config.log_format == "json"
        log.setup("flows", level=config.log_level, json=as_json)
    except InvalidError as error:
        sys.stderr.write(f"flows: {error.explain()}\n")
        return ExitCode.CONFIG
    # Serving and taking in share one interpreter: neither waits long for the other.
    sys.setswitchinterval(0.0005)

    async def build_service(running: Lifecycle) -> None:
        await build(config, running)

    return lifecycle.run(build_service, service="flows")


if __name__ == "__main__":
    sys.exit(main())
