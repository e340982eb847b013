"""Which loopback addresses listeners of the proxy are given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.xds.app import loopbacks

SAY = "from services.xds.app import loopbacks; print(*loopbacks())"


@pytest.fixture
def netns(need_root: None, need_netns: None) -> Iterator[str]:
    name = f"cilt-{os.getpid()}-loopbacks"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def inside(netns: str, *words: str) -> str:
    argv = ["nsenter", f"--net=/run/netns/{netns}", *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_those_that_there_are(netns: str) -> None:
    inside(netns, "ip", "link", "set", "lo", "up")
    assert inside(netns, sys.executable, "-c", SAY) == "127.0.0.1 ::1"
    inside(netns, "sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1")
    assert inside(netns, sys.executable, "-c", SAY) == "127.0.0.1"


def test_here() -> None:
    assert "127.0.0.1" in loopbacks()
