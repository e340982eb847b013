"""The services, one package each: islands that talk gRPC and never import one another."""

from __future__ import annotations

import sys


def _import_structlog() -> None:
    """Before anybody else does, without rich: structlog imports it where it finds it, to colour
    tracebacks that we print plain. It is 4 MB in every service."""
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        import structlog  # noqa: F401 -- for those who import it later
    finally:
        del sys.modules["rich"]


_import_structlog()
