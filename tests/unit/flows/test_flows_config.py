"""Settings: what they default to, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cilia.settings import ConfigError
from services.flows.config import parse


def test_defaults() -> None:
    config = parse([], {})
    assert config.socket_path == Path("/run/cilia/hubble.sock")
    assert config.agent_socket_path == Path("/run/cilia/agent.sock")
    assert config.ring_rows == 1 << 20
    assert config.addresses == ()
    assert config.tls() is None


def test_flags_win_over_the_environment() -> None:
    environment = {"CILIA_FLOWS_RING_ROWS": "2048", "CILIA_FLOWS_SEGMENT_ROWS": "1024"}
    assert parse([], environment).ring_rows == 2048
    assert parse(["--ring-rows", "4096"], environment).ring_rows == 4096
    relay = parse(["--peer-service", "n1:4244"], {"CILIA_FLOWS_RELAY": "true"})
    assert relay.relay
    assert relay.socket_path.name == "relay.sock"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ring-rows", "1000000"], "power of two"),
        (["--ring-rows", "512"], "--ring-rows"),
        (["--ring-rows", "2048"], "--segment-rows"),
        (["--history-mb", "-1"], "--history-mb"),
        (["--listen", "0.0.0.0:4244"], "in the clear"),
        (["--listen", "nowhere"], "host:port"),
        (["--listen", "127.0.0.1:99999"], "host:port"),
        (["--tls-cert", "/x"], "--tls-key"),
        (["--relay"], "nobody to ask"),
        (["--log-level", "loud"], "--log-level"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(flags, {})


def test_the_environment_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="CILIA_FLOWS_RING_ROWS"):
        parse([], {"CILIA_FLOWS_RING_ROWS": "many"})
    with pytest.raises(ConfigError, match="CILIA_FLOWS_RELAY"):
        parse([], {"CILIA_FLOWS_RELAY": "perhaps"})


def test_loopback_needs_no_certificates() -> None:
    config = parse(["--listen", "127.0.0.1:4244,[::1]:4244"], {})
    assert config.addresses == (("127.0.0.1", 4244), ("::1", 4244))


def test_certificates_that_cannot_be_read_are_named() -> None:
    config = parse(["--tls-cert", "/nowhere/c", "--tls-key", "/nowhere/k"], {})
    with pytest.raises(ConfigError, match="certificates"):
        config.tls()
