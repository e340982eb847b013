"""One lab for the session, made by `cilia lab up` and checked to leave nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from lab import down
from tests.e2e.machine import LAB, Cilia, Lab, remains_of, remove_remains, traces_of_ours


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    need_root: None,
    need_netns: None,
    need_bpf: None,
    need_objects: None,
) -> Iterator[Lab]:
    """One lab for the session's CLI tests."""
    remove_remains()
    name = f"e2e{os.getpid()}-lab"
    path = tmp_path_factory.mktemp("lab") / "lab.yaml"
    path.write_text(LAB)
    before = traces_of_ours()
    up = Cilia().run("lab", "up", str(path), "--name", name, "-o", "json", timeout_s=110)
    assert up.returncode == 0, up.stderr
    node = json.loads(up.stdout)["nodes"][0]
    env = {
        "CILIA_AGENT_SOCK": node["agent_socket"],
        "CILIA_IDENTITY_SOCK": node["identity_socket"],
    }
    try:
        yield Lab(name, Cilia(env))
    finally:
        down.down(name)
    assert remains_of(name) == []
    assert traces_of_ours() - before == set()
