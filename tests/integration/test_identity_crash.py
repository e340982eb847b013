"""The identity service killed with SIGKILL under load: what it acknowledged is there afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cilia.rpc.channel import Channel
from cilia.rpc.errors import RpcError
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1 import identity_pb2_grpc as pb_grpc

REPOSITORY = Path(__file__).resolve().parents[2]
ROUNDS = 6
WRITERS = 16
ALLOCATORS = 8


@dataclass
class Ledger:
    """What was sent and what was answered."""

    sent: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    identities: dict[str, int] = field(default_factory=dict)
    revision: int = 0
    answers: int = 0


def spawn(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "services.identity",
            f"--run-dir={directory / 'run'}",
            f"--state-dir={directory / 'state'}",
        ],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )


async def write(stub: Any, name: str, ledger: Ledger) -> None:
    while True:
        number = ledger.sent.get(name, 0) + 1
        ledger.sent[name] = number
        policy = pb.Policy(kind="Rules", name=name, document=json.dumps({"n": number}).encode())
        try:
            answer = await stub.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy]))
        except RpcError:
            return
        ledger.acknowledged[name] = number
        ledger.revision = max(ledger.revision, answer.revision)
        ledger.answers += 1


async def allocate(stub: Any, node: str, ledger: Ledger, rng: random.Random) -> None:
    while True:
        app = f"app{rng.randrange(2000)}"
        label = common_pb2.Label(source="k8s", key="app", value=app)
        try:
            answer = await stub.Allocate(pb.AllocateRequest(node=node, labels=[label]))
        except RpcError:
            return
        known = ledger.identities.setdefault(app, answer.identity.id)
        assert known == answer.identity.id, "an identity that was given out never changes"
        ledger.revision = max(ledger.revision, answer.revision)
        ledger.answers += 1


async def check(stub: Any, ledger: Ledger) -> None:
    stored: dict[str, int] = {}
    identities: dict[str, int] = {}
    async for message in stub.Watch(pb.WatchRequest(kinds=[pb.KIND_POLICY, pb.KIND_IDENTITY])):
        for event in message.batch.events:
            if event.kind == pb.KIND_POLICY:
                stored[event.policy.name] = json.loads(event.policy.document)["n"]
            elif event.identity.id >= 256:
                identities[event.identity.labels[0].value] = event.identity.id
        if message.HasField("synced"):
            assert message.revision >= ledger.revision, "the revision went back"
            break
    for name, number in ledger.acknowledged.items():
        assert stored[name] >= number, "an acknowledged write is lost"
    for name, number in stored.items():
        assert number <= ledger.sent[name], "something was stored that nobody wrote"
    for app, number in ledger.identities.items():
        assert identities[app] == number
    assert len(set(identities.values())) == len(identities)


async def one_round(directory: Path, ledger: Ledger, rng: random.Random) -> None:
    process = spawn(directory)
    channel = Channel(directory / "run" / "identity.sock", service="identity")
    stub: Any = pb_grpc.IdentityServiceStub(channel)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(15):
            await channel.wait_ready()
        session = stub.Session()
        await session.write(pb.SessionRequest(node="node"))
        opened: pb.SessionResponse = await session.read()
        # The lease survives a kill: references and announcements hang on it.
        assert opened.lease_new is (ledger.answers == 0)
        await check(stub, ledger)
        goal = ledger.answers + 150 + rng.randrange(300)
        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(write(stub, f"w{number}", ledger))
            for number in range(ALLOCATORS):
                group.create_task(allocate(stub, "node", ledger, random.Random(number)))
            while ledger.answers < goal:
                await asyncio.sleep(0.01)
                assert process.poll() is None, "the service ended by itself"
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
    finally:
        process.kill()
        process.wait()
        await channel.close()


async def test_no_acknowledged_write_is_lost(tmp_path: Path) -> None:
    ledger, rng = Ledger(), random.Random(1)
    for _ in range(ROUNDS):
        await one_round(tmp_path, ledger, rng)
    assert ledger.answers > ROUNDS * 150
    assert len(ledger.acknowledged) == WRITERS
