"""A directory of resources: what is read, what is refused, and that it counts as a whole."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.xds.cache import ResourceCache
from services.xds.files import FileFault, ResourceDirectory, read_file
from services.xds.resources import LDS, PREFIX, NodeID, TypeURL

CLUSTER = {"@type": PREFIX + "envoy.config.cluster.v3.Cluster", "name": "c", "type": "STATIC"}


class Served:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = ResourceCache()
        self.directory = ResourceDirectory(path, self.cache)
        self.directory.prepare()
        self.commits: list[int] = []
        self.cache.listen(lambda changed: self.commits.append(len(changed)))

    def names(self, node: str = "n") -> set[str]:
        view = self.cache.view(NodeID(node))
        return {name for url in self.cache.tables for name in view.names(url)}

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / name).write_text(text)
        # Within one tick of the file system's clock a size may be all that tells two apart.
        status = (self.path / name).stat()
        os.utime(self.path / name, ns=(status.st_atime_ns, status.st_mtime_ns + len(self.commits)))


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


async def test_yaml_json_and_many_documents(served: Served) -> None:
    served.write(
        "a.yaml",
        "resources:\n"
        '- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster\n'
        "  name: one\n"
        "---\n"
        '"@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n'
        "cluster_name: two\n",
    )
    served.write("b.json", [dict(CLUSTER, name="three")])
    (served.path / "below").mkdir()
    served.write("below/c.yml", {"resources": [dict(CLUSTER, name="four")]})
    served.write(".hidden.yaml", "nonsense: [")
    served.write("notes.txt", "nonsense")
    await served.directory.sync()
    assert served.names() == {"one", "two", "three", "four"}
    assert not served.cache.held_all


async def test_one_fault_keeps_all_as_it_was(served: Served) -> None:
    served.write("a.json", CLUSTER)
    await served.directory.sync()
    served.commits.clear()
    served.write("a.json", dict(CLUSTER, name="renamed"))
    served.write("b.json", dict(CLUSTER, name="d", typo="x"))
    with pytest.raises(FileFault, match="typo"):
        await served.directory.sync()
    assert served.names() == {"c"}
    assert served.commits == []
    assert [bool(f.error) for f in served.directory.files] == [False, True]
    with pytest.raises(FileFault):  # and goes on saying so
        await served.directory.sync()
    served.write("b.json", dict(CLUSTER, name="d"))
    await served.directory.sync()
    assert served.names() == {"renamed", "d"}
    assert served.commits == [3]  # at once


async def test_what_is_unchanged_is_not_put_again(served: Served) -> None:
    served.write("a.json", CLUSTER)
    await served.directory.sync()
    served.commits.clear()
    served.write("a.json", json.dumps(CLUSTER, indent=4))
    await served.directory.sync()
    await served.directory.sync()
    assert served.commits == []


async def test_nodes_get_their_own(served: Served) -> None:
    served.write("a.json", {"nodes": ["n", "m"], "resources": [CLUSTER]})
    served.write("b.json", {"nodes": ["o"], "resources": [dict(CLUSTER, type="EDS")]})
    await served.directory.sync()
    assert served.names("n") == served.names("m") == served.names("o") == {"c"}
    assert served.names("p") == set()
    served.write("a.json", {"nodes": ["n"], "resources": [CLUSTER]})
    await served.directory.sync()
    assert served.names("m") == set()
    assert served.names("o") == {"c"}


async def test_nothing_is_said_before_the_first_good_state(served: Served) -> None:
    served.write("a.json", "{")
    with pytest.raises(FileFault):
        await served.directory.sync()
    assert served.cache.held_all
    (served.path / "a.json").unlink()
    await served.directory.sync()
    assert not served.cache.held_all


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "line 1"),
        ("a.yaml", "a: [", "line 1"),
        ("a.yaml", "a: b", "at its top"),
        ("a.yaml", "just text", "not a list"),
        ("a.yaml", "resources: 5", "not a list"),
        ("a.yaml", "resources: [5]", '"@type"'),
        ("a.json", {"resources": [CLUSTER], "nodes": "n"}, "not a list of names"),
        ("a.json", {"@type": PREFIX + "no.such.Type", "name": "x"}, "no.such.Type"),
        ("a.json", {k: v for k, v in CLUSTER.items() if k != "name"}, "no name"),
        ("a.json", dict(CLUSTER, name="*"), "cannot be the name"),
        ("a.json", dict(CLUSTER, connect_timeout="soon"), "soon"),
        ("a.json", [CLUSTER, CLUSTER, dict(CLUSTER, lb_policy="NONE_SUCH")], r"resources\[2\]"),
        ("a.yaml", "a: &a [x]\nb: &b [" + "*a, " * 9 + "]", "at its top"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_faults_say_where_and_what(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FileFault, match=said):
        list(read_file(path))


def test_aliases_cannot_blow_up(tmp_path: Path) -> None:
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(FileFault, match="values"):
        list(read_file(path))
    path.write_text("&a [*a]")
    with pytest.raises(FileFault):
        list(read_file(path))


async def test_one_name_twice_is_a_fault(served: Served) -> None:
    served.write("a.json", CLUSTER)
    served.write("b.json", dict(CLUSTER, type="EDS"))
    with pytest.raises(FileFault, match=r"'c' is in .*a\.json already"):
        await served.directory.sync()


def test_a_type_without_messages_is_served_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = base64.b64encode(b"\x0a\x01x").decode()
    path.write_text(json.dumps({"@type": "x/y.Z", "name": "n", "@value": value}))
    [entry] = read_file(path)
    assert (entry.url, entry.name, entry.value) == (TypeURL(PREFIX + "y.Z"), "n", b"\x0a\x01x")


async def test_the_example_is_good(repository: Path) -> None:
    served = Served(repository / "examples/xds")
    await served.directory.sync()
    assert served.names() == {"hello"}


async def test_a_directory_that_goes_away_is_a_fault_and_no_deletion(served: Served) -> None:
    served.write("a.json", CLUSTER)
    await served.directory.sync()
    (served.path / "a.json").unlink()
    served.path.rmdir()
    with pytest.raises(FileFault, match="cannot read"):
        await served.directory.sync()
    assert served.names() == {"c"}


def test_listeners_and_wrapped_resources(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    inner = {"@type": PREFIX + "envoy.config.listener.v3.Listener", "name": "l"}
    wrapper = {
        "@type": PREFIX + "envoy.service.discovery.v3.Resource", "name": "w", "resource": inner
    }  # fmt: skip
    path.write_text(json.dumps({"resources": [inner, wrapper]}))
    assert [(e.url, e.name) for e in read_file(path)] == [(LDS, "l"), (LDS, "w")]
