"""A node for benches: a namespace with an identity service and an agent of its own.

Names carry this process's pid; everything is removed at the end, and what a killed bench left is
removed by the next one's `sweep`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from cilia.net.device import Network
from cilia.net.netns import NetNS
from protos.agent.v1 import agent_pb2, agent_pb2_grpc
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2

ROOT = Path(__file__).resolve().parent.parent.parent
PREFIX = "cilt-"
START_S = 30.0
STOP_S = 10.0
BIG_TCP_BYTES = 192 * 1024
CALL_S = 30.0
COMMAND_S = 60.0


def command(*words: str | Path) -> str:
    """Runs a program to its end; raises with what it said when it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        text=True,
        capture_output=True,
        check=False,
        timeout=COMMAND_S,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def inside(netns: str, *words: str | Path) -> list[str]:
    """A command line that runs in a namespace. `ip netns exec` would hide /sys and bpffs."""
    return ["nsenter", f"--net=/run/netns/{netns}", *map(str, words)]


def labels(*texts: str) -> list[common_pb2.Label]:
    """`key=value` of source k8s."""
    return [
        common_pb2.Label(source="k8s", key=key, value=value)
        for key, _, value in (text.partition("=") for text in texts)
    ]


def sweep() -> None:
    """Removes what a killed bench of a process that is gone left behind."""
    for path in [*Path("/run/netns").glob(f"{PREFIX}*"), *Path("/run").glob(f"{PREFIX}*-bench")]:
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if "bench" not in path.name or not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        if path.parent.name == "netns":
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)
        else:
            _remove(path)


def _remove(directory: Path) -> None:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        point = line.split()[4]
        if point.startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)
    shutil.rmtree(directory, ignore_errors=True)


class Node:
    """One node. Use as a context manager."""

    def __init__(self, *agent_arguments: str, big_tcp: bool = False) -> None:
        self._agent_arguments = agent_arguments
        self.base = f"{PREFIX}{os.getpid()}-bench"
        self.netns = f"{self.base}-node"
        self.directory = Path("/run") / self.base
        self.agent_socket = self.directory / "agent.sock"
        self._namespaces: list[str] = []
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._channel: Any = None
        self._big_tcp = big_tcp  # whether the device to the world takes segments beyond 64 KiB

    def __enter__(self) -> Node:
        sweep()
        if not any((ROOT / "build" / "bpf").glob("*.o")):
            raise RuntimeError("no eBPF objects in build/bpf: run make bpf")
        try:
            self.directory.mkdir(parents=True)
            self.namespace("node")
            # A way to the world, as a node has one: the agent picks its devices by it.
            world = self.namespace("world")
            here = ["ip", "-n", self.netns]
            command(*here, "link", "add", "up0", "type", "veth", "peer", "down0", "netns", world)
            command("ip", "-n", world, "link", "set", "down0", "up")
            command(*here, "addr", "add", "198.18.0.1/24", "dev", "up0")
            command(*here, "link", "set", "up0", "up")
            if self._big_tcp:
                with NetNS.open(f"/run/netns/{self.netns}") as netns, Network(netns) as network:
                    network.ensure_link("up0", gso_max=BIG_TCP_BYTES)
            command(*here, "route", "add", "default", "via", "198.18.0.254")
            self.start("identity")
            self.start("agent")
            self.wait_ready(0)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        for name in list(self._services):
            self.stop(name)
        for name in self._namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        _remove(self.directory)

    def namespace(self, suffix: str) -> str:
        """Makes a namespace with loopback up and returns its name."""
        name = f"{self.base}-{suffix}"
        command("ip", "netns", "add", name)
        self._namespaces.append(name)
        command("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def start(self, service: str) -> None:
        """Starts a service; its log is beside its socket."""
        arguments: list[str | Path] = [
            "--run-dir",
            self.directory,
            "--state-dir",
            self.directory / "state",
        ]
        if service == "agent":
            arguments += ["--node-name", "bench", "--bpffs", self.directory / "bpf"]
            arguments += ["--object-dir", ROOT / "build" / "bpf", *self._agent_arguments]
        with (self.directory / f"{service}.log").open("ab") as log:
            self._services[service] = subprocess.Popen(
                inside(self.netns, sys.executable, "-m", f"services.{service}", *arguments),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, service: str, *, how: signal.Signals = signal.SIGTERM) -> None:
        process = self._services.pop(service)
        process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pid(self, service: str) -> int:
        return self._services[service].pid

    def stub(self, service: str) -> Any:
        """A synchronous stub of one of the agent's services, for example EndpointService."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.agent_socket}")
        return _stub(service, self._channel)

    def wait_ready(self, endpoints: int) -> None:
        """Until the agent says Ok and has that many endpoints ready."""
        deadline = time.monotonic() + START_S
        status: Any = None
        while time.monotonic() < deadline:
            for name, process in self._services.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.log(name)}")
            with contextlib.suppress(grpc.RpcError):
                # A fresh channel a try: an old one backs off for longer than a start takes.
                with grpc.insecure_channel(f"unix:{self.agent_socket}") as channel:
                    stub = _stub("StatusService", channel)
                    status = stub.Status(agent_pb2.StatusRequest(), timeout=2)
                if status.state == "Ok" and status.endpoint_states.get("ready", 0) == endpoints:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"agent not ready after {START_S:.0f} s: {status}\n{self.log('agent')}")

    def log(self, service: str) -> str:
        """The end of a service's log."""
        path = self.directory / f"{service}.log"
        return "\n".join(path.read_text().splitlines()[-20:]) if path.exists() else "(no log)"

    def add(self, name: str, netns: str, *texts: str) -> Any:
        """Adds an endpoint; returns when its policy is in force."""
        return self.stub("EndpointService").Add(
            agent_pb2.AddEndpointRequest(
                name=name, labels=labels(*texts), netns_path=f"/run/netns/{netns}"
            ),
            timeout=CALL_S,
        )

    def delete(self, endpoint_id: int) -> None:
        ref = agent_pb2.EndpointRef(id=endpoint_id)
        request = agent_pb2.DeleteEndpointRequest(ref=ref)
        self.stub("EndpointService").Delete(request, timeout=CALL_S)

    def apply(self, *texts: str) -> None:
        """Applies policies and waits until they are in force."""
        documents = [agent_pb2.Document(source="bench.yaml", text=x.encode()) for x in texts]
        request = agent_pb2.ApplyRequest(documents=documents, wait=True)
        reply = self.stub("PolicyService").Apply(request, timeout=CALL_S)
        assert reply.realised

    def delete_policy(self, kind: str, name: str) -> None:
        """Deletes a policy and waits until it is in force no more."""
        names = [identity_pb2.PolicyName(kind=kind, name=name)]
        request = agent_pb2.DeleteRequest(names=names, wait=True)
        self.stub("PolicyService").Delete(request, timeout=CALL_S)


def _stub(service: str, channel: grpc.Channel) -> Any:
    """The stubs' types know asyncio only; a bench has no loop."""
    return getattr(agent_pb2_grpc, f"{service}Stub")(channel)


@contextlib.contextmanager
def background(*words: str, ready: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process for as long as the block lasts; `ready` is a word that it prints when it serves."""
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            while ready:
                said = process.stdout.readline()
                if not said:
                    raise RuntimeError(f"{' '.join(words)} ended early")
                if ready in said:
                    break
            yield process
        finally:
            process.kill()
