"""`cilia policy schema`: printed as committed, in both formats."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from cli.root import cli

FOLDER = Path(__file__).parents[3] / "cilia/policy/schemas"


def printed(*args: str) -> str:
    result = CliRunner().invoke(cli, [*args], prog_name="cilia")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_schema() -> None:
    assert printed("policy", "schema") == (FOLDER / "policy.schema.json").read_text()


def test_definitions_as_yaml_and_as_a_list() -> None:
    assert printed("policy", "schema", "--format", "crd") == (FOLDER / "crds.yaml").read_text()
    listed = json.loads(printed("-o", "json", "policy", "schema", "--format", "crd"))
    assert [x["metadata"]["name"] for x in listed["items"]] == [
        "ciliumnetworkpolicies.cilium.io",
        "ciliumclusterwidenetworkpolicies.cilium.io",
    ]
