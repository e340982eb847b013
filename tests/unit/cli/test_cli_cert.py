"""`cilia cert` and, without a service, `cilia xds`."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from cli.errors import Exit
from cli.root import cli


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="cilia")


def test_an_authority_from_its_beginning_to_its_rotation(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    made = run("cert", "init", "--dir", pki, "-o", "json")
    assert made.exit_code == 0, made.output
    [authority] = json.loads(made.stdout)
    assert authority["authority"] is True
    again = run("cert", "init", "--dir", pki)
    assert again.exit_code == Exit.CONFLICT

    issued = run(
        "cert", "issue", "--dir", pki, "--node", "n1", "--service", "xds", "--name", "n1.example",
        "--name", "192.0.2.1", "-o", "json",
    )  # fmt: skip
    [certificate] = json.loads(issued.stdout)
    assert certificate["file"] == str(pki / "n1-xds/tls.crt")
    assert certificate["names"] == ["spiffe://cilia/node/n1/xds", "n1.example", "192.0.2.1"]
    assert certificate["error"] is None

    assert (
        json.loads(run("cert", "rotate", "--dir", pki, "--within", "5", "-o", "json").stdout) == []
    )
    [renewed] = json.loads(run("cert", "rotate", "--dir", pki, "--ca", "-o", "json").stdout)
    assert renewed["names"] == certificate["names"]
    assert renewed["serial"] != certificate["serial"]
    assert renewed["issuer"] != certificate["issuer"]

    listed = run("cert", "list", "--dir", pki)
    assert listed.exit_code == 0
    assert "authority" in listed.stdout
    assert "n1.example" in listed.stdout
    (pki / "n1-xds/tls.crt").write_text("nonsense")
    broken = run("cert", "list", "--dir", pki)
    assert broken.exit_code == Exit.FAILED
    assert "holds no certificate" in broken.stdout


def test_mistakes_have_their_codes_and_cures(tmp_path: Path) -> None:
    absent = run("cert", "issue", "--dir", tmp_path, "--node", "n", "--service", "s")
    assert absent.exit_code == Exit.NOT_FOUND
    assert "cilia cert init" in str(absent.exception) + absent.output
    run("cert", "init", "--dir", tmp_path)
    wrong = run("cert", "issue", "--dir", tmp_path, "--node", "../n", "--service", "s")
    assert wrong.exit_code == Exit.INVALID
    unknown = run("cert", "rotate", "--dir", tmp_path, "n-s")
    assert unknown.exit_code == Exit.NOT_FOUND


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    for command in (("xds", "status"), ("xds", "resources"), ("redirect", "list")):
        done = run("--xds-socket", tmp_path / "xds.sock", *command)
        assert done.exit_code == Exit.UNREACHABLE
        assert "services.xds" in done.output
