"""Secrets from files, Envoy's log from its file, and the bootstrap that names its admin socket."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

from services.xds.envoy import bootstrap
from services.xds.envoy import log as envoy_log
from services.xds.envoy.bootstrap import BootstrapSettings
from services.xds.envoy.log import LogFile
from services.xds.translate.secretfiles import MAX_ITEM, SecretFiles


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# ---- secrets


def test_a_secret_is_the_files_of_its_directory(tmp_path: Path) -> None:
    read = SecretFiles(tmp_path)
    write(tmp_path / "default/api/tls.crt", b"C")
    write(tmp_path / "default/api/tls.key", b"K")
    write(tmp_path / "default/api/..2026/tls.key", b"what a mount keeps for itself")
    (tmp_path / "default/api/directory").mkdir()
    os.mkfifo(tmp_path / "default/api/pipe")
    write(tmp_path / "default/api/large", b"x" * (MAX_ITEM + 1))
    assert read(("default", "api")) == {"tls.crt": b"C", "tls.key": b"K"}
    assert read(("default", "other")) is None


def test_no_name_leads_out_of_the_directory(tmp_path: Path) -> None:
    write(tmp_path / "outside/x/item", b"secret")
    read = SecretFiles(tmp_path / "certs")
    (tmp_path / "certs/a").mkdir(parents=True)
    for secret in (
        ("..", "outside"), ("a", "../../outside/x"), ("a", ".."), ("", "x"), ("a", ""),
        (".", "."), ("a/../..", "outside"), ("a\0", "b"),
    ):  # fmt: skip
        assert read(secret) is None, secret


def test_a_change_of_what_was_read_is_told_once(tmp_path: Path) -> None:
    read = SecretFiles(tmp_path)
    write(tmp_path / "n/a/item", b"1")
    write(tmp_path / "n/b/item", b"1")
    assert not read.changed()
    read(("n", "a"))
    read(("n", "missing"))
    write(tmp_path / "n/b/item", b"2")  # nobody asked for it
    assert not read.changed()
    replacement = tmp_path / "n/a/.new"
    write(replacement, b"2")
    replacement.rename(tmp_path / "n/a/item")
    assert read.changed()
    assert not read.changed()
    write(tmp_path / "n/missing/item", b"there now")
    assert read.changed()


# ---- the log


def line(level: str, message: str) -> bytes:
    return json.dumps({"level": level, "logger": "main", "msg": message}).encode() + b"\n"


def test_envoys_lines_become_ours(tmp_path: Path) -> None:
    path = tmp_path / "envoy.log"
    path.write_bytes(line("error", "from before"))
    log = LogFile(path)
    with structlog.testing.capture_logs() as lines, path.open("ab") as out:
        out.write(line("info", "hello") + line("warning", "careful") + b"#0: 0x1234\n")
        out.write(line("critical", "the end") + b'{"level":"info"')
        out.flush()
        log.read()
        assert [(x["log_level"], x["line"]) for x in lines] == [
            ("debug", "hello"),
            ("warning", "careful"),
            ("warning", "#0: 0x1234"),
            ("error", "the end"),
        ]
        out.write(b',"logger":"x","msg":"in two parts"}\n')
        out.flush()
        log.read()
    assert lines[-1]["line"] == "in two parts"


def test_a_large_log_is_emptied_and_followed_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(envoy_log, "MAX_FILE", 1000)
    path = tmp_path / "envoy.log"
    log = LogFile(path)
    assert log.read() == 0  # it is not there yet
    with path.open("ab") as out, structlog.testing.capture_logs() as lines:
        for number in range(100):
            out.write(line("info", f"{number}"))
            out.flush()
            log.read()
    assert [x["line"] for x in lines] == [str(n) for n in range(100)]
    assert path.stat().st_size < 1100


def test_a_line_without_end_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "envoy.log"
    log = LogFile(path)
    with path.open("ab") as out, structlog.testing.capture_logs():
        for _ in range(10):
            out.write(b"x" * 100_000)
            out.flush()
            log.read()
        assert len(log._rest) <= envoy_log.MAX_LINE


# ---- the bootstrap


def settings(**more: Any) -> BootstrapSettings:
    return BootstrapSettings(
        node_id="n1", ads_socket=Path("/run/x/ads.sock"), admin_directory=Path("/run/x"), **more
    )


def test_the_bootstraps_digest_is_of_all_that_makes_it_another() -> None:
    one = bootstrap.build(settings(), salt="binary 1")
    assert one == bootstrap.build(settings(), salt="binary 1")
    others = {
        bootstrap.build(settings(), salt="binary 2").digest,
        bootstrap.build(settings(max_connections=5), salt="binary 1").digest,
        one.digest,
    }
    assert len(others) == 3
    assert one.digest in one.admin_socket.name
    message = json.loads(one.text)
    assert message["admin"]["address"]["pipe"]["path"] == str(one.admin_socket)
    layer = message["layered_runtime"]["layers"][0]["static_layer"]
    assert layer["re2.max_program_size.error_level"] == 1000
    assert layer["envoy.reloadable_features.rbac_match_headers_individually"] is False
