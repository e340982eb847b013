"""A node for tests: a namespace with an identity service and an agent, an uplink, and workloads.

      cilt-<pid>-<tag>-node                          cilt-<pid>-<tag>-world
      agent, identity   up0 192.168.77.2/24  ──────  w0 192.168.77.1/24, fd77::1/64

Everything is removed at the end, also after a failure; what a killed run left is removed by name
when the next one starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from cilia.labels import Labels
from cilia.net.mount import umount_bpffs
from cilia.net.netns import NetNS, in_netns
from cilia.rpc.convert import labels_to_proto
from protos.agent.v1 import agent_pb2 as pb
from protos.agent.v1 import agent_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
WORLD4, WORLD6 = "192.168.77.1", "fd77::1"


def run(*words: str | Path) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr or done.stdout}"
    return done.stdout


def eventually(check: Callable[[], Any], *, within_s: float, what: str) -> Any:
    """Polls what has no event to wait for, such as another process's readiness."""
    deadline = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def sweep() -> None:
    """Removes what runs of processes that are gone left behind."""
    for path in (*Path("/run/netns").glob("cilt-*-a-*"), *Path("/run").glob("cilt-*-a-*")):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            if path.parent.name == "netns":
                subprocess.run(["ip", "netns", "del", path.name], check=False)
            else:
                end_envoys(path)
                with contextlib.suppress(Exception):
                    umount_bpffs(path / "bpf")
                shutil.rmtree(path, ignore_errors=True)


def end_envoys(run_dir: Path) -> None:
    """Those that an xds service of this directory launched outlive it when it is killed."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"{run_dir}/envoy/".encode() in b" ".join(words) and b"--config-path" in words:
                os.kill(int(path.parent.name), signal.SIGKILL)


class AgentNode:
    def __init__(self, tag: str) -> None:
        self.base = f"cilt-{os.getpid()}-a-{tag}"
        self.run_dir = Path("/run") / self.base
        self.state_dir = self.run_dir / "state"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.namespaces: list[str] = []
        self.flags: tuple[str, ...] = ()
        self._channel: Any = None

    def __enter__(self) -> AgentNode:
        sweep()
        try:
            self.run_dir.mkdir(parents=True)
            node, world = self.netns("node"), self.netns("world")
            run(
                "ip", "-n", node, "link", "add", "up0", "type", "veth", "peer", "w0", "netns", world
            )
            for ns, device, host in ((node, "up0", 2), (world, "w0", 1)):
                run("ip", "-n", ns, "addr", "add", f"192.168.77.{host}/24", "dev", device)
                run("ip", "-n", ns, "addr", "add", f"fd77::{host}/64", "dev", device, "nodad")
                run("ip", "-n", ns, "link", "set", device, "up")
            run("ip", "-n", node, "route", "add", "default", "via", WORLD4)
            run("ip", "-n", node, "-6", "route", "add", "default", "via", WORLD6)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        for name in list(self.processes):
            self.stop(name, signal.SIGKILL)
        end_envoys(self.run_dir)
        with contextlib.suppress(Exception):
            umount_bpffs(self.run_dir / "bpf")
        for name in self.namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    # ---- namespaces

    def netns(self, name: str) -> str:
        full = f"{self.base}-{name}"
        run("ip", "netns", "add", full)
        self.namespaces.append(full)
        run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def path(self, name: str) -> str:
        return f"/run/netns/{self.base}-{name}"

    def inside(self, name: str, *words: str) -> list[str]:
        return ["nsenter", f"--net={self.path(name)}", *words]

    def ping(self, name: str, address: str, *, count: int = 1) -> bool:
        words = self.inside(name, "ping", "-c", str(count), "-i", "0.05", "-W", "1", address)
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def socket(
        self, name: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM
    ) -> socket.socket:
        """A socket that lives in the namespace."""
        with NetNS.open(self.path(name)) as netns:
            return in_netns(netns, lambda: socket.socket(family, kind))

    @contextlib.contextmanager
    def stream(self, client: str, server: str, address: str) -> Iterator[Stream]:
        """An established TCP connection from one workload to another."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.socket(server, family) as listener, self.socket(client, family) as near:
            listener.settimeout(5)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 8080))
            listener.listen()
            near.settimeout(5)
            near.connect((address, 8080))
            far, _ = listener.accept()
            with far:
                far.settimeout(5)
                yield Stream(near, far)

    # ---- services

    def start(self, name: str, *flags: str, wait: bool = True) -> subprocess.Popen[bytes]:
        log = (self.run_dir / f"{name}.log").open("ab")
        words = [sys.executable, "-m", f"services.{name}", "--run-dir", str(self.run_dir)]
        words += ["--log-level", "debug"]
        if name != "xds":
            words += ["--state-dir", str(self.state_dir)]
        if name == "agent":
            words += ["--node-name", "n1", *self.flags]
        process = subprocess.Popen(
            self.inside("node", *words, *flags), cwd=ROOT, stdout=log, stderr=log
        )
        log.close()
        self.processes[name] = process
        if wait:
            self.wait_serving(name)
        return process

    def wait_serving(self, name: str) -> None:
        process = self.processes[name]
        path = self.run_dir / f"{name}.sock"

        def listening() -> bool:
            assert process.poll() is None, self.log(name)
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(path))
                return True
            return False

        eventually(listening, within_s=30, what=f"{name} serves: {self.log(name)[-2000:]}")
        if name == "agent":
            if self._channel is not None:
                self._channel.close()
            self._channel = grpc.insecure_channel(
                f"unix:{path}", options=[("grpc.default_authority", "localhost")]
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        # nsenter without --fork executes the service in its own place: the pid is the service's.
        process.send_signal(how)
        return process.wait(timeout=15)

    def log(self, name: str) -> str:
        path = self.run_dir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    # ---- the agent's API

    @property
    def endpoints(self) -> Any:
        return agent_pb2_grpc.EndpointServiceStub(self._channel)

    @property
    def policy(self) -> Any:
        return agent_pb2_grpc.PolicyServiceStub(self._channel)

    @property
    def datapath(self) -> Any:
        return agent_pb2_grpc.DatapathServiceStub(self._channel)

    @property
    def monitor(self) -> Any:
        return agent_pb2_grpc.MonitorServiceStub(self._channel)

    def status(self) -> pb.StatusResponse:
        stub: Any = agent_pb2_grpc.StatusServiceStub(self._channel)
        found: pb.StatusResponse = stub.Status(
            pb.StatusRequest(tables=True, all_controllers=True), timeout=10
        )
        return found

    def component(self, name: str) -> pb.Component:
        return next(c for c in self.status().components if c.name == name)

    def add(self, name: str, *labels: str, netns: str | None = None, **more: Any) -> pb.Endpoint:
        request = pb.AddEndpointRequest(
            name=name,
            labels=labels_to_proto(Labels.parse(labels)),
            netns_path=netns or self.path(name),
            **more,
        )
        found: pb.Endpoint = self.endpoints.Add(request, timeout=40)
        return found

    def workload(self, name: str, *labels: str, **more: Any) -> pb.Endpoint:
        """A namespace and an endpoint in it."""
        self.netns(name)
        return self.add(name, *labels, **more)

    def get(self, name: str) -> pb.Endpoint:
        found: pb.Endpoint = self.endpoints.Get(pb.EndpointRef(name=name), timeout=10)
        return found

    def delete(self, name: str) -> None:
        reply = self.endpoints.Delete(
            pb.DeleteEndpointRequest(ref=pb.EndpointRef(name=name)), timeout=20
        )
        assert not reply.errors

    def relabel(
        self, name: str, *, add: tuple[str, ...] = (), remove: tuple[str, ...] = ()
    ) -> None:
        self.endpoints.SetLabels(
            pb.SetLabelsRequest(
                ref=pb.EndpointRef(name=name),
                add=labels_to_proto(Labels.parse(add)),
                remove=labels_to_proto(Labels.parse(remove)),
            ),
            timeout=20,
        )

    def apply(
        self, text: str, *, wait: bool = True, dry_run: bool = False, keep: bool = True
    ) -> pb.ApplyResponse:
        """Apply policies; with `keep`, also those that isolate a node, for good."""
        found: pb.ApplyResponse = self.policy.Apply(
            pb.ApplyRequest(
                documents=[pb.Document(source="test.yaml", text=text.encode())],
                wait=wait,
                dry_run=dry_run,
                confirm=keep,
            ),
            timeout=20,
        )
        if keep and found.confirm_within_s:
            self.policy.Confirm(pb.ConfirmRequest(), timeout=10)
        return found

    def delete_policies(self) -> None:
        self.policy.Delete(pb.DeleteRequest(all=True, wait=True), timeout=20)


class Stream:
    """Both ends of a connection."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.sent = 0

    def exchange(self) -> None:
        """One byte there and one back. Raises TimeoutError when it does not arrive in time."""
        self.near.sendall(b"x")
        assert self.far.recv(1) == b"x"
        self.far.sendall(b"y")
        assert self.near.recv(1) == b"y"

    def works(self, within_s: float = 0.3) -> bool:
        for end in (self.near, self.far):
            end.settimeout(within_s)
        try:
            self.exchange()
        except TimeoutError:
            return False
        return True


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The code and message a call is refused with."""
    try:
        call()
    except grpc.RpcError as error:
        raw: Any = error
        return raw.code(), raw.details()
    raise AssertionError("the call was accepted")
