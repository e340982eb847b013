"""House rules that no linter knows: who may import protos, who may start tasks, what never enters
a tracked file."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = ("cilia", "cli", "lab", "services")
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")

# Where messages are turned into domain values and back; everything else speaks domain values.
PROTO_EDGES = re.compile(
    r"^(cli/.*|lab/clients\.py|cilia/rpc/.*|services/([^/]+/)+(server|convert|clients|xdsclient)\.py|services/xds/.*"
    r"|services/[^/]+/(servers|convert|clients)/.*)$"
)
# Where tasks are started that no TaskGroup owns.
TASKS = "cilia/controller.py"

# A lock file pins by hash, so no file says where a package comes from; and what a document points
# to on the net is from this list of standards bodies, the kernel and licences. A host that is an
# address, has no dot, or ends in a reserved name is of a lab or an example.
INDEX_OPTIONS = re.compile(
    r"--(?:extra-)?index-url\s+\S|--find-links\s+\S|trusted-host|index-url\s*="
)
URL_HOST = re.compile(r"https?://(?:\[[^]]*\]|[^\s/:'\"`)>\]}{$|\\]+)")
WELL_KNOWN = {
    "datatracker.ietf.org",
    "docs.cilium.io",
    "docs.kernel.org",
    "git.kernel.org",
    "github.com",
    "json-schema.org",
    "kubernetes.io",
    "www.apache.org",
    "www.gnu.org",
    "www.iana.org",
    "www.kernel.org",
    "www.rfc-editor.org",
}
LOCAL_HOST = re.compile(
    r"\[|\d{1,3}(\.\d{1,3}){3}$|[^.]*$|.*\.(?:example|test|local|internal|invalid|localhost)$"
    r"|(?:.*\.)?example\.(?:com|net|org)$",
    re.IGNORECASE,
)
# Paths of somebody's machine: home directories, and trees mounted only there.
MACHINE_PATHS = re.compile(
    r"(?<![\w./-])/(?:home/[a-z]\w*|Users/\w+|root/\.|work/|workspace/|mnt/c/)"
)


def _tracked(repository: Path) -> list[Path]:
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [repository / name for name in listed.stdout.split("\0") if name]


def _texts(repository: Path) -> Iterator[tuple[str, str]]:
    for path in _tracked(repository):
        if path.name.endswith(GENERATED) or not path.is_file():
            continue
        try:
            yield str(path.relative_to(repository)), path.read_text()
        except UnicodeDecodeError:
            continue


def _python(repository: Path, *tops: str) -> Iterator[tuple[str, ast.Module]]:
    for top in tops:
        for path in sorted((repository / top).rglob("*.py")):
            if not path.name.endswith(GENERATED):
                yield str(path.relative_to(repository)), ast.parse(path.read_text())


def _report(faults: list[str]) -> None:
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def _foreign_hosts(line: str) -> list[str]:
    hosts = [found.split("://", 1)[1].rsplit("@")[-1] for found in URL_HOST.findall(line)]
    return [host for host in hosts if host not in WELL_KNOWN and not LOCAL_HOST.match(host)]


def test_no_tracked_file_names_a_package_index(repository: Path) -> None:
    here = str(Path(__file__).relative_to(repository))
    _report(
        [
            f"{name}:{number}: {found}"
            for name, text in _texts(repository)
            if name != here
            for number, line in enumerate(text.splitlines(), 1)
            for found in [*INDEX_OPTIONS.findall(line), *_foreign_hosts(line)]
        ]
    )


def test_no_tracked_file_names_a_path_of_one_machine(repository: Path) -> None:
    here = str(Path(__file__).relative_to(repository))
    _report(
        [
            f"{name}:{number}: {found[0]}"
            for name, text in _texts(repository)
            if name != here
            for number, line in enumerate(text.splitlines(), 1)
            if (found := MACHINE_PATHS.search(line))
        ]
    )


def test_patterns_can_match() -> None:
    assert INDEX_OPTIONS.search("--index-url https://mirror.example/simple")
    assert _foreign_hosts("from https://files.packages.co/simple/numpy") == ["files.packages.co"]
    assert not _foreign_hosts(
        "http://deathstar/v1 http://10.0.0.1:80/ http://[fd00::1]/ http://{name}/"
    )
    assert MACHINE_PATHS.search("see /home/alice/src")
    assert not MACHINE_PATHS.search("/run/cilia/bpf and net/work/x")


def test_protos_stay_at_the_edges(repository: Path) -> None:
    faults = []
    for name, tree in _python(repository, *OURS):
        if PROTO_EDGES.match(name):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            faults += [
                f"{name}:{node.lineno}: imports {module}; only the edges know protos"
                for module in modules
                if module.split(".")[0] == "protos"
            ]
    _report(faults)


def test_tasks_belong_to_groups(repository: Path) -> None:
    """ruff bans asyncio.create_task by name; a loop's own method gets past it."""
    faults = []
    for name, tree in _python(repository, *OURS):
        if name == TASKS:
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr == "create_task" and re.search(r"loop|asyncio", owner):
                faults.append(f"{name}:{node.lineno}: {owner}.create_task outside {TASKS}")
            if node.func.attr in {"gather", "wait_for", "ensure_future"} and owner == "asyncio":
                faults.append(f"{name}:{node.lineno}: asyncio.{node.func.attr} outside {TASKS}")
    _report(faults)


def test_broad_handlers_live_where_work_is_run(repository: Path) -> None:
    """An operating error has a type; only what runs other people's work may catch everything."""
    allowed = {
        "cilia/controller.py",
        "cilia/reconcile.py",
        "services/flows/http2/server.py",  # a call that fails ends alone
    }
    _report(
        [
            f"{name}:{node.lineno}: catches everything; say which errors are expected"
            for name, tree in _python(repository, *OURS)
            if name not in allowed
            for node in ast.walk(tree)
            if isinstance(node, ast.ExceptHandler)
            and (node.type is None or ast.unparse(node.type) == "Exception")
            and not any(
                isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node)
            )
        ]
    )


def test_test_file_names_are_unique(repository: Path) -> None:
    seen: dict[str, Path] = {}
    faults = []
    for path in sorted((repository / "tests").rglob("test_*.py")):
        if path.name in seen:
            faults.append(f"{path} and {seen[path.name]} have one name")
        seen[path.name] = path
    _report(faults)


def test_waivers_say_why(repository: Path) -> None:
    """`# noqa: RULE` and `# type: ignore[code]` are followed by a reason, or stand below one."""
    bare = re.compile(
        r"#\s*(noqa(?!:)|noqa:\s*[A-Z0-9, ]+$|type:\s*ignore(?!\[)|type:\s*ignore\[[^]]+\]\s*$)"
    )
    _report(
        [
            f"{name}:{number}: {line.strip()}"
            for name, text in _texts(repository)
            if name.endswith(".py") and name.startswith(tuple(f"{top}/" for top in OURS))
            for lines in [["", *text.splitlines()]]
            for number, line in enumerate(lines)
            if bare.search(line.rstrip()) and not lines[number - 1].lstrip().startswith("#")
        ]
    )
