"""docs/running.md: a node that is no lab's, by the commands as they are printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.machine import REPOSITORY
from tests.integration.agentnode import AgentNode, eventually


@pytest.fixture
def node(
    need_root: None, need_netns: None, need_bpf: None, need_objects: None, need_nft: None
) -> Iterator[AgentNode]:
    with AgentNode("running") as node:
        node.state_dir.mkdir()
        yield node


def block(node: AgentNode) -> str:
    text = (REPOSITORY / "docs" / "running.md").read_text()
    found = re.search(r"```sh\n\. \.venv/bin/activate\n(.*?)```", text, re.DOTALL)
    assert found is not None
    # Namespaces have names for the whole machine; those of a test are its own.
    return re.sub(r"(netns add |--netns )(\w+)", rf"\g<1>{node.base}-\g<2>", found[1])


def end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), within_s=20, what=f"{pid} ends")


def test_the_block_does_what_it_says(node: AgentNode) -> None:
    run_dir = str(node.run_dir)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CILIA_AGENT_SOCK": f"{run_dir}/agent.sock",
        "CILIA_IDENTITY_SOCK": f"{run_dir}/identity.sock",
        "CILIA_FLOWS_SERVER": f"unix://{run_dir}/hubble.sock",
    }
    for service in ("AGENT", "IDENTITY", "FLOWS"):
        environment[f"CILIA_{service}_STATE_DIR"] = str(node.state_dir)
    for service in ("AGENT", "IDENTITY", "FLOWS", "XDS"):
        environment[f"CILIA_{service}_RUN_DIR"] = run_dir
    node.namespaces += [f"{node.base}-web", f"{node.base}-db"]
    jobs, out, log = (node.run_dir / name for name in ("jobs", "out", "services.log"))
    # The shell is no terminal's, so its services stay; who they are is known also when it fails.
    script = f"trap 'jobs -p >{jobs}' EXIT\n{block(node)}"
    try:
        # Files: a pipe would stay open as long as the services have it.
        with out.open("w") as printing, log.open("w") as saying:
            done = subprocess.run(
                node.inside("node", "bash", "-euo", "pipefail", "-c", script),
                stdout=printing,
                stderr=saying,
                cwd=REPOSITORY,
                env=environment,
                timeout=100,
                check=False,
            )
    finally:
        for pid in map(int, jobs.read_text().split()):
            end(pid)
    printed = out.read_text()
    assert done.returncode == 0, printed + log.read_text()
    assert re.search(r"^OK$", printed, re.MULTILINE), printed
    assert re.findall(r"Final verdict: (\w+)", printed) == ["ALLOWED", "DENIED"], printed
    assert re.search(r"default/web +default/db +TCP +5432$", printed, re.MULTILINE), printed
    assert len(re.findall(r"is ready: identity", printed)) == 2
