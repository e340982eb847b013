"""Configuration: flags, then environment (CILIA_IDENTITY_<NAME>), then the defaults shown here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cilia import settings
from cilia.settings import check_bounds, check_logging


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityConfig:
    """How the service runs."""

    run_dir: Path = Path("/run/cilia")
    state_dir: Path = Path("/var/lib/cilia")
    socket: Path | None = None
    """None: identity.sock in the run directory."""
    group: str = "cilia"
    """Owns the socket, if the group exists."""

    node_lease_ttl_s: int = 900
    """How long what a node announced outlives its last keepalive, unless it asks otherwise."""
    gc_interval_s: float = 900.0
    quarantine_s: int = 900
    """How long a freed number is kept back; nodes that are away for longer relist anyway."""

    bookmark_s: float = 5.0
    history_revisions: int = 10_000
    history_age_s: float = 3600.0
    watch_graves: int = 16_384
    """Deletions remembered for watchers that are behind."""
    max_watches: int = 1024
    log_level: str = "info"
    log_format: str = "auto"
    metrics_address: str = ""
    """host:port to serve Prometheus metrics at; empty: not served."""

    @property
    def socket_path(self) -> Path:
        return self.socket or self.run_dir / "identity.sock"

    @property
    def store_path(self) -> Path:
        return self.state_dir / "identity" / "store.sqlite"

    def __post_init__(self) -> None:
        check_bounds(
            self,
            {
                "node_lease_ttl_s": (1, 86_400),
                "gc_interval_s": (0.05, 86_400),
                "quarantine_s": (1, 86_400),
                "bookmark_s": (0.05, 60),
                "history_revisions": (100, 10_000_000),
                "history_age_s": (1, 7 * 86_400),
                "watch_graves": (1, 1 << 20),
                "max_watches": (1, 65_536),
            },
        )
        check_logging(self)


_HELP = {
    "run_dir": "directory of sockets",
    "state_dir": "directory of state; the store is in identity/ below it",
    "socket": "unix socket to serve at (default: identity.sock in the run directory)",
    "group": "group that may use the socket, if it exists",
    "node_lease_ttl_s": "seconds a node's announcements outlive it",
    "gc_interval_s": "seconds between rounds of identity collection",
    "quarantine_s": "seconds a freed identity is kept back",
    "bookmark_s": "seconds after which a quiet watch gets a sign of life",
    "history_revisions": "revisions kept for readers and watches",
    "history_age_s": "seconds for which overwritten values are kept",
    "watch_graves": "deletions remembered for watchers that are behind",
    "max_watches": "watches served at once",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (JSON unless a terminal), json or console",
    "metrics_address": "host:port to serve Prometheus metrics at",
}


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> IdentityConfig:
    """Raises ConfigError; argparse itself ends the process for --help and unknown flags."""
    return settings.parse(
        IdentityConfig,
        arguments,
        environment,
        service="identity",
        description="The identity service: cluster state over an embedded store.",
        help_of=_HELP,
    )
