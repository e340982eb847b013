"""The linters, as tests: one gate, the same for a person, CI and an editor."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def _run(repository: Path, *command: str | Path) -> None:
    done = subprocess.run(command, cwd=repository, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}\n{done.stderr}".strip(), pytrace=False)


def test_ruff_check(repository: Path) -> None:
    _run(repository, BIN / "ruff", "check", "--quiet", ".")


def test_ruff_format(repository: Path) -> None:
    _run(repository, BIN / "ruff", "format", "--check", "--quiet", "--diff", ".")


@pytest.mark.timeout(300)
def test_mypy(repository: Path) -> None:
    _run(repository, BIN / "mypy", "--no-error-summary", "--hide-error-context")


def test_imports(repository: Path) -> None:
    _run(repository, BIN / "lint-imports", "--no-cache")


def test_no_package_lost_its_init_file(repository: Path) -> None:
    # Without one a directory drops out of the import contracts silently.
    for top in ("cilia", "cli", "lab", "services", "protos"):
        for source in (repository / top).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), f"{source.parent} has no __init__.py"


def test_clang_format(repository: Path) -> None:
    style = next(
        (p for p in (".clang-format", "bpf/.clang-format") if (repository / p).exists()), None
    )
    tool = shutil.which("clang-format")
    if style is None or tool is None:
        pytest.skip("clang-format is not installed; it is not among what make setup installs")
    version = subprocess.run([tool, "--version"], text=True, capture_output=True, check=True).stdout
    found = re.search(r"version (\d+)", version)
    if found is None or int(found[1]) != 14:
        pytest.skip(f"the C sources are formatted by clang-format 14; this is {version.strip()}")
    sources = sorted((repository / "bpf").rglob("*.[ch]"))
    _run(repository, tool, "--dry-run", "--Werror", *sources)
