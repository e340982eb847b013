"""State files: atomic, damage is explained, one owner a directory."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cilia import statefile
from cilia.errors import Kind
from cilia.statefile import DirectoryLock, StateDirectoryLocked, StateFileDamaged


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert statefile.read(path) is None
    statefile.write(path, b"x" * 100_000)
    statefile.write(path, b"short")
    assert statefile.read(path) == b"short"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_writer_killed_at_any_point_leaves_old_or_new(tmp_path: Path) -> None:
    """Every system call of a write is made the last one the writer does."""
    path = tmp_path / "a"
    program = """
import os, sys
from pathlib import Path
from cilia import statefile
count = [int(sys.argv[2])]
def deadly(function):
    def call(*a, **k):
        if count[0] == 0: os._exit(9)
        count[0] -= 1
        return function(*a, **k)
    return call
for name in ("open", "write", "fsync", "close", "rename"):
    setattr(os, name, deadly(getattr(os, name)))
statefile.write(Path(sys.argv[1]), b"new" * 1000)
"""
    outcomes = []
    for calls in range(12):
        path.write_bytes(b"old")
        code = subprocess.run(
            [sys.executable, "-c", program, str(path), str(calls)], check=False
        ).returncode
        assert path.read_bytes() in (b"old", b"new" * 1000)
        outcomes.append((code, path.read_bytes()[:3]))
        if code == 0:
            break
    assert outcomes[0] == (9, b"old")
    assert outcomes[-1] == (0, b"new")
    assert statefile.sweep(tmp_path) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b'{"a": 1', "line 1, column 8"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_damage_is_explained_and_kept(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "policies.json"
    path.write_bytes(content)
    with pytest.raises(StateFileDamaged, match=why) as caught:
        statefile.read_json(path)
    assert str(path) in caught.value.message
    assert caught.value.kind is Kind.DATA_LOSS
    assert path.read_bytes() == content


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for number in (1, 2):
        path.write_text(f"bad {number}")
        assert statefile.set_aside(path).name == f"a.json.damaged-{number}"
    assert (tmp_path / "a.json.damaged-1").read_text() == "bad 1"
    assert not path.exists()


def test_json_round_trip_and_remove(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    statefile.write_json(path, {"b": [1, "ü"]})
    assert statefile.read_json(path) == {"b": [1, "ü"]}
    statefile.remove(path)
    statefile.remove(path)
    assert statefile.read_json(path) is None


_HOLD = """
import sys
from pathlib import Path
from cilia.statefile import DirectoryLock
DirectoryLock(Path(sys.argv[1]), owner="cilia agent").acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_has_one_owner_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        lock = DirectoryLock(tmp_path / "state", owner="second")
        with pytest.raises(StateDirectoryLocked) as caught:
            lock.acquire()
        assert caught.value.pid == holder.pid
        assert f"in use by process {holder.pid} (cilia agent)" in caught.value.message
        holder.kill()
        holder.wait()
        with lock:
            assert (tmp_path / "state" / "lock").read_text() == f"{os.getpid()} second\n"
        with lock:
            pass
