"""The README's first five minutes, as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import down
from tests.e2e.machine import REPOSITORY, remains_of, remove_remains, traces_of_ours


@pytest.fixture
def name(need_root: None, need_netns: None, need_bpf: None, need_objects: None) -> Iterator[str]:
    remove_remains()
    name = f"e2e{os.getpid()}-readme"
    yield name
    down.down(name)


def block() -> str:
    """The commands of the section, without what this run has done already: setup and building."""
    text = (REPOSITORY / "README.md").read_text()
    found = re.search(r"## The first five minutes\n\n```sh\n(.*?)```", text, re.DOTALL)
    assert found is not None
    lines = found[1].splitlines(keepends=True)
    assert lines[:2] == ["make setup bpf\n", ". .venv/bin/activate\n"]
    return "".join(lines[2:])


def test_the_block_does_what_it_says(name: str) -> None:
    """Run under a name of this run's, which changes a few words of it."""
    before = traces_of_ours()
    up = "cilia lab up examples/lab/star-wars.yaml"
    commands = block()
    for old, new in (
        (up, f"{up} --name {name}"),
        ("/run/cilia-lab/star-wars/", f"/run/cilia-lab/{name}/"),
        ("cilia lab down star-wars", f"cilia lab down {name}"),
    ):
        assert old in commands, old
        commands = commands.replace(old, new)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=False,
    )
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    # Without policy the X-wing lands, with it the TIE fighter alone.
    assert out.count("Ship landed") == 2, out
    assert "within 5 s" in done.stderr
    assert "Final verdict: DENIED" in out
    assert re.search(r"examples/policies/star-wars/l3-l4\.yaml:\d+", out)
    assert re.search(r"xwing:\d+ .*DROPPED .*deathstar-landing", out), out
    assert re.search(r"Policy denied\s+133\s+INGRESS\s+[1-9]", out), out
    assert remains_of(name) == []
    assert traces_of_ours() - before == set()
