"""A node with both objects loaded, shared by the tests of a module and reset for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.datapath.harness import Node, build_objects


@pytest.fixture(scope="session")
def objects(need_bpf: None, need_clang: None, need_netns: None) -> None:
    """The objects, compiled from the sources of now."""
    build_objects()


@pytest.fixture(scope="module")
def shared_node(objects: None) -> Iterator[Node]:
    """One node a module."""
    with Node() as node:
        yield node


@pytest.fixture
def node(shared_node: Node) -> Node:
    """The module's node, as new."""
    shared_node.reset()
    return shared_node


@pytest.fixture(params=["v4", "v6"])
def v6(request: pytest.FixtureRequest) -> bool:
    """Both families."""
    return bool(request.param == "v6")
