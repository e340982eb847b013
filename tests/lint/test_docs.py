"""The documents that claim completeness are complete, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

LINK = re.compile(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)")


def _documents(repository: Path) -> list[Path]:
    tops = [repository / name for name in ("README.md", "DESIGN.md", "CHANGELOG.md")]
    nested = [
        *(repository / "docs").rglob("*.md"),
        repository / "protos/README.md",
        repository / "bpf/README.md",
    ]
    return [path for path in [*tops, *sorted(nested)] if path.exists()]


def test_links_lead_somewhere(repository: Path) -> None:
    dead = [
        f"{document.relative_to(repository)}: {target}"
        for document in _documents(repository)
        for target in LINK.findall(document.read_text())
        if not target.startswith(("http://", "https://", "#", "mailto:"))
        and not (document.parent / target.split("#")[0]).exists()
    ]
    assert not dead, "\n".join(dead)


def test_every_rpc_is_listed_with_its_caller(repository: Path) -> None:
    listed = (repository / "protos/README.md").read_text()
    missing = []
    for proto in sorted((repository / "protos").rglob("*.proto")):
        text = proto.read_text()
        package = re.search(r"^package ([\w.]+);", text, re.MULTILINE)
        assert package is not None, proto
        for service, body in re.findall(
            r"^service (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL
        ):
            heading = f"{package[1]}.{service}"
            section = re.search(
                rf"^## `{re.escape(heading)}`$(.*?)(?=^## |\Z)", listed, re.M | re.S
            )
            rows = dict(
                re.findall(r"^\| `(\w+)` \|.*\| (.+?) \|$", section[1] if section else "", re.M)
            )
            missing += [
                f"{heading}/{rpc}"
                for rpc in re.findall(r"^\s*rpc (\w+)\(", body, re.MULTILINE)
                if not rows.get(rpc, "").strip()
            ]
    assert not missing, "protos/README.md lacks: " + ", ".join(missing)


def test_no_rpc_is_listed_that_does_not_exist(repository: Path) -> None:
    defined = {
        name
        for proto in (repository / "protos").rglob("*.proto")
        for name in re.findall(r"^\s*rpc (\w+)\(", proto.read_text(), re.MULTILINE)
    }
    listed = set(re.findall(r"^\| `(\w+)` \|", (repository / "protos/README.md").read_text(), re.M))
    assert listed <= defined, f"gone from the protos: {sorted(listed - defined)}"


@pytest.mark.parametrize(
    ("index", "directory"),
    [("docs/adr/README.md", "docs/adr"), ("docs/design/README.md", "docs/design")],
)
def test_every_page_is_in_its_index(repository: Path, index: str, directory: str) -> None:
    targets = set(LINK.findall((repository / index).read_text()))
    pages = {page.name for page in (repository / directory).glob("*.md")} - {"README.md"}
    assert pages <= targets, f"{index} lacks {sorted(pages - targets)}"


def test_decisions_have_the_four_parts(repository: Path) -> None:
    for page in sorted((repository / "docs/adr").glob("0*.md")):
        headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "What would change our mind"], (
            page
        )


def test_the_map_names_every_directory(repository: Path) -> None:
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    tracked = [name for name in listed.stdout.split("\0") if "/" in name]
    wanted = {name.split("/")[0] + "/" for name in tracked}
    for parent in ("services", "cilia", "tests"):
        wanted |= {
            "/".join(name.split("/")[:2]) + "/"
            for name in tracked
            if name.startswith(f"{parent}/") and name.count("/") > 1
        }
    readme = (repository / "README.md").read_text()
    mapped = set(re.findall(r"^\| `([\w./-]+/)` \|", readme, re.MULTILINE))
    assert wanted <= mapped, f"README.md's map lacks {sorted(wanted - mapped)}"
    gone = {name for name in mapped if not (repository / name).is_dir()}
    assert not gone, f"README.md's map names what is not there: {sorted(gone)}"


def test_make_help_lists_the_promised_targets(repository: Path) -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=repository, text=True, capture_output=True, check=True
    ).stdout
    for target in [
        "help",
        "setup",
        "protos",
        "bpf",
        "demo",
        "test",
        "test-all",
        "bench",
        "lab",
        "clean",
    ]:
        assert re.search(rf"^\s+make {target}\s+\S", shown, re.MULTILINE), target
