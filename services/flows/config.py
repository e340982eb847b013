"""Configuration: flags, then environment (CILIA_FLOWS_<NAME>), then the defaults shown here."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from cilia import settings
from cilia.settings import ConfigError, check_bounds, check_logging

MIN_RING_ROWS = 1024
MAX_RING_ROWS = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowsConfig:
    """How the service runs."""

    run_dir: Path = Path("/run/cilia")
    state_dir: Path = Path("/var/lib/cilia")
    socket: Path | None = None
    """None: hubble.sock in the run directory."""
    agent_socket: Path | None = None
    """None: agent.sock in the run directory."""
    group: str = "cilia"
    """Owns the socket, if the group exists."""
    node: str = gethostname()
    """What flows are named by until the agent tells its own name."""
    relay: bool = False
    """Serve many nodes' flows instead of this node's."""

    ring_rows: int = 1 << 20
    """Flows kept in memory; a power of two."""
    history_mb: int = 1024
    """Disk for older flows; 0: none are kept."""
    history_age_s: float = 7 * 86_400.0
    segment_rows: int = 1 << 18
    """Flows in a file."""
    segment_age_s: float = 300.0
    """The longest a flow waits to be written to disk."""

    listen: str = ""
    """host:port,...: addresses to serve at besides the socket."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Clients must have a certificate of this authority."""
    advertise: str = ""
    """host:port that relays are told; empty: the first of --listen."""

    peers_file: Path | None = None
    peer_service: str = ""
    metrics: str = ""
    """Hubble's metrics, separated by spaces: "drop:sourceContext=namespace flow"."""
    exports: Path | None = None
    """File that lists what to write to files and collectors; read again when it changes."""
    log_level: str = "info"
    log_format: str = "auto"
    metrics_address: str = ""
    """host:port to serve Prometheus metrics at; empty: not served."""

    @property
    def socket_path(self) -> Path:
        return self.socket or self.run_dir / ("relay.sock" if self.relay else "hubble.sock")

    @property
    def agent_socket_path(self) -> Path:
        return self.agent_socket or self.run_dir / "agent.sock"

    @property
    def flows_dir(self) -> Path:
        return self.state_dir / "flows"

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        return tuple(_address(text) for text in self.listen.split(",") if text.strip())

    def __post_init__(self) -> None:
        check_bounds(
            self,
            {
                "ring_rows": (MIN_RING_ROWS, MAX_RING_ROWS),
                "history_mb": (0, 1 << 24),
                "history_age_s": (1, 3650 * 86_400),
                "segment_rows": (1024, 1 << 22),
                "segment_age_s": (0.1, 86_400),
            },
        )
        if self.ring_rows & (self.ring_rows - 1):
            raise ConfigError(
                f"--ring-rows {self.ring_rows} is no power of two", cure="Try 1048576"
            )
        if self.segment_rows > self.ring_rows // 2:
            raise ConfigError(
                f"--segment-rows {self.segment_rows} is more than half of --ring-rows: flows would "
                "be overwritten before they are written to disk",
                cure=f"Choose at most {self.ring_rows // 2}",
            )
        given = (self.tls_cert is not None, self.tls_key is not None)
        if given[0] != given[1] or (self.tls_client_ca is not None and not given[0]):
            raise ConfigError(
                "--tls-cert and --tls-key belong together, --tls-client-ca to both of them"
            )
        for host, port in self.addresses:
            if not given[0] and not _is_loopback(host):
                raise ConfigError(
                    f"--listen {host}:{port} would send flows over the network in the clear",
                    cure="Give --tls-cert, --tls-key and --tls-client-ca, or a loopback address",
                )
        check_logging(self)
        if self.relay and not (self.peers_file or self.peer_service):
            raise ConfigError(
                "a relay has nobody to ask", cure="Give --peers-file or --peer-service"
            )

    def tls(self) -> ssl.SSLContext | None:
        """How to serve on TCP; None without certificates. Raises ConfigError."""
        return self._context(ssl.Purpose.CLIENT_AUTH)

    def client_tls(self) -> ssl.SSLContext | None:
        """How a relay speaks to nodes; None without certificates. Raises ConfigError."""
        return self._context(ssl.Purpose.SERVER_AUTH)

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext | None:
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            context = ssl.create_default_context(purpose, cafile=self.tls_client_ca)
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the certificates cannot be used: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if purpose is ssl.Purpose.CLIENT_AUTH and self.tls_client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen {text!r} is not host:port")
    return host.strip("[]") or "::", int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_HELP = {
    "run_dir": "directory of sockets",
    "state_dir": "directory of state; history is in flows/ below it",
    "socket": "unix socket to serve at (default: hubble.sock in the run directory)",
    "agent_socket": "the agent's socket (default: agent.sock in the run directory)",
    "group": "group that may use the socket, if it exists",
    "node": "name of this node until the agent tells its own",
    "relay": "answer for many nodes, by asking them",
    "ring_rows": "flows kept in memory, a power of two",
    "history_mb": "megabytes of disk for older flows; 0 keeps none",
    "history_age_s": "seconds for which flows are kept on disk",
    "segment_rows": "flows in a file",
    "segment_age_s": "seconds after which a flow is written to disk",
    "listen": "host:port,... to serve at besides the socket",
    "tls_cert": "certificate to serve on TCP with (PEM)",
    "tls_key": "its key (PEM)",
    "tls_client_ca": "authority of the certificates that clients must have (PEM)",
    "advertise": "host:port that relays are told (default: the first of --listen)",
    "peers_file": "relay: file that lists nodes",
    "peer_service": "relay: address of a node that tells of all (peer.Peer/Notify)",
    "metrics": "Hubble's metrics, separated by spaces, each name[:option=value;...]",
    "exports": "file that lists exports, flowLogs in Hubble's form and otlp",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (JSON unless a terminal), json or console",
    "metrics_address": "host:port to serve Prometheus metrics at",
}


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> FlowsConfig:
    """Raises ConfigError; argparse itself ends the process for --help and unknown flags."""
    return settings.parse(
        FlowsConfig,
        arguments,
        environment,
        service="flows",
        description="The flow service: flows of this node, kept, searched, and served.",
        help_of=_HELP,
    )
