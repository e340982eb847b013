"""A store to test, once in memory and once on a disk: the semantics are the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cilia.kv import EmbeddedBackend, Retention

# History is bounded by count alone in these tests.
KEEP = Retention(revisions=100_000, age_s=86_400.0)


@pytest.fixture(params=["memory", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedBackend]:
    path = tmp_path / "kv" / "store.sqlite" if request.param == "file" else None
    async with await EmbeddedBackend.open(path, retention=KEEP) as backend:
        yield backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv" / "store.sqlite"
