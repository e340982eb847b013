"""Which lab is meant when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import names, state
from lab.errors import LabNotFound


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(names, "RUN_ROOT", tmp_path)
    monkeypatch.setattr(state, "RUN_ROOT", tmp_path)
    return tmp_path


def test_the_only_one(root: Path) -> None:
    with pytest.raises(LabNotFound, match="no lab is up"):
        state.only_lab()
    (root / "one").mkdir()
    assert state.only_lab() == "one"
    assert state.only_lab("/run/cilia/agent.sock") == "one"


def test_that_of_the_agent_spoken_to(root: Path) -> None:
    (root / "one").mkdir()
    (root / "one-more").mkdir()
    assert state.only_lab(str(root / "one-more/node1/agent.sock")) == "one-more"
    assert state.only_lab(str(root / "one/node1/agent.sock")) == "one"
    for other in (None, "", "/run/cilia/agent.sock", str(root / "gone/node1/agent.sock")):
        with pytest.raises(LabNotFound, match="several labs are up: one, one-more"):
            state.only_lab(other)
