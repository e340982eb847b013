"""The committed stubs are what the pinned compiler makes of the committed .proto files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def _stubs(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for path in (root / "protos").rglob("*.py*")
        if path.name.endswith(SUFFIXES)
    }


def test_stubs_are_fresh(repository: Path, tmp_path: Path) -> None:
    script = repository / "scripts" / "protos.sh"
    done = subprocess.run([script, tmp_path], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    made, committed = _stubs(tmp_path), _stubs(repository)
    assert made, "the compiler made no stub"
    stale = sorted(
        name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name)
    )
    if stale:
        pytest.fail("run make protos; these differ: " + " ".join(stale), pytrace=False)
