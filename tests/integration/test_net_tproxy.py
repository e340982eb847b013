"""The table, rules and routes that lead to the L7 proxy, in a namespace of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cilia.cleanup import cleanup
from cilia.net import nft, tproxy
from cilia.net.rtnl import RouteSocket
from tests.datapath.harness import Thread


@pytest.fixture
def space(need_netns: None, need_nft: None) -> Iterator[Thread]:
    thread = Thread()
    try:
        thread.sh("ip link set lo up")
        yield thread
    finally:
        thread.close()


def shown(space: Thread) -> str:
    words = "nft list ruleset; ip rule; ip -6 rule; ip route show table 2004 2>/dev/null;"
    words += " ip -6 route show table 2004 2>/dev/null"
    return space.call(
        lambda: subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    ).stdout


def make(*ports: int) -> None:
    tproxy.write_table(ports)
    with RouteSocket() as host:
        tproxy.ensure_routing(host)


def missing() -> list[str]:
    with RouteSocket() as host:
        return tproxy.missing_routing(host)


def test_made_and_made_again(space: Thread) -> None:
    assert len(space.call(missing)) == 4
    space.call(lambda: make(10000, 10001))
    first = shown(space)
    assert "0x10270200 : 10000" in first
    assert space.call(missing) == []
    space.call(lambda: make(10000, 10001))
    assert shown(space) == first
    space.call(lambda: make(10001))
    assert "10000" not in shown(space)


def test_what_is_others_stays(space: Thread, tmp_path: Path) -> None:
    space.sh(
        "nft add table inet other",
        "ip rule add pref 9 fwmark 0x300/0xf00 lookup 77",
        "ip route add local default dev lo table 77",
    )
    before = shown(space)
    space.call(lambda: make(10000))
    assert shown(space) != before
    gone = space.call(lambda: cleanup(tmp_path / "run", tmp_path / "state"))
    assert {trace.kind for trace in gone} == {"rule", "table"}
    assert not any(trace.error for trace in gone)
    assert shown(space) == before
    assert space.call(lambda: cleanup(tmp_path / "run", tmp_path / "state")) == []


def test_a_transaction_is_whole(space: Thread) -> None:
    """What nft refuses changes nothing, and the message says why."""
    space.call(lambda: make(10000))
    before = shown(space)
    bad = [*tproxy.commands([10001]), {"add": {"rule": {"family": "inet", "table": "none"}}}]
    with pytest.raises(nft.NftError, match="nft"):
        space.call(lambda: nft.apply(bad))
    assert shown(space) == before
