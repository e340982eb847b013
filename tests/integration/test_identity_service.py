"""The identity service as a process, over its unix socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cilia.errors import Kind
from cilia.identity import RESERVED
from cilia.rpc.channel import Channel
from cilia.rpc.errors import RpcError
from protos.common.v1 import common_pb2
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1 import identity_pb2_grpc as pb_grpc
from services.identity.storecopy import restore

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Service:
    """A process of the service, and a client of it."""

    directory: Path
    flags: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    channel: Channel | None = None
    log: list[dict[str, object]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    def spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "services.identity",
                f"--run-dir={self.run_dir}",
                f"--state-dir={self.state_dir}",
                *self.flags,
            ],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
        )

    async def start(self) -> None:
        self.process = self.spawn()
        assert self.process.stderr is not None
        while line := await asyncio.to_thread(self.process.stderr.readline):
            self.log.append(json.loads(line))
            if self.log[-1]["msg"] == "The service is ready.":
                break
        else:
            raise AssertionError(f"the service did not start: {self.log}")
        self.channel = Channel(self.run_dir / "identity.sock", service="identity")

    @property
    def identity(self) -> Any:
        return pb_grpc.IdentityServiceStub(self.channel)  # type: ignore[arg-type]

    @property
    def store(self) -> Any:
        return pb_grpc.StoreServiceStub(self.channel)  # type: ignore[arg-type]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Returns the exit code."""
        if self.channel is not None:
            await self.channel.close()
            self.channel = None
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(number)
        assert process.stderr is not None
        for line in await asyncio.to_thread(process.stderr.readlines):
            self.log.append(json.loads(line))
        process.stderr.close()
        return await asyncio.to_thread(process.wait)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(tmp_path, ["--bookmark=0.2"])
    await service.start()
    try:
        yield service
    finally:
        await service.stop(signal.SIGKILL)


def labels(*texts: str) -> list[common_pb2.Label]:
    found = []
    for text in texts:
        key, _, value = text.partition("=")
        found.append(common_pb2.Label(source="k8s", key=key, value=value))
    return found


def policy(name: str, text: str = "{}") -> pb.Policy:
    return pb.Policy(
        kind="CiliumNetworkPolicy",
        namespace="default",
        name=name,
        document=text.encode(),
        origin=common_pb2.Origin(source="rules.yaml", line=3, column=1),
        rule_origins=[
            pb.RuleOrigin(
                path="spec.ingress[0]", origin=common_pb2.Origin(source="rules.yaml", line=7)
            )
        ],
    )


class Session:
    """A node's stream."""

    def __init__(self, service: Service, node: str, ttl_s: int = 0) -> None:
        self.node = node
        self._ttl_s = ttl_s
        self._call = service.identity.Session()

    async def open(self) -> pb.SessionResponse:
        await self._call.write(pb.SessionRequest(node=self.node, lease_ttl_s=self._ttl_s))
        answer: pb.SessionResponse = await self._call.read()
        return answer

    async def renew(self) -> pb.SessionResponse:
        await self._call.write(pb.SessionRequest())
        answer: pb.SessionResponse = await self._call.read()
        return answer

    def drop(self) -> None:
        self._call.cancel()


class Follower:
    """A client of Watch that keeps the state it was told of."""

    def __init__(self, service: Service, request: pb.WatchRequest | None = None) -> None:
        self._messages = service.identity.Watch(request or pb.WatchRequest()).__aiter__()
        self.identities: dict[int, str] = {}
        self.ips: dict[str, pb.IpEntry] = {}
        self.policies: dict[str, pb.Policy] = {}
        self.store_id = 0
        self.revision = 0
        self.resets = 0
        self.kinds: list[str] = []

    async def read(self) -> pb.WatchResponse:
        async with asyncio.timeout(10):
            message: pb.WatchResponse = await anext(self._messages)
        what = message.WhichOneof("body")
        assert what is not None
        self.kinds.append(what)
        if what == "reset":
            self.resets += 1
            self.identities, self.ips, self.policies = {}, {}, {}
        assert message.revision >= self.revision or what == "reset"
        self.store_id, self.revision = message.store_id, message.revision
        for event in message.batch.events:
            self._apply(event)
        return message

    def _apply(self, event: pb.Event) -> None:
        put = event.type == pb.Event.PUT
        match event.WhichOneof("value"):
            case "identity":
                self.identities.pop(event.identity.id, None)
                if put:
                    known = event.identity.labels
                    self.identities[event.identity.id] = ",".join(
                        f"{x.key}={x.value}" for x in known
                    )
            case "ip":
                self.ips.pop(event.ip.prefix, None)
                if put:
                    self.ips[event.ip.prefix] = event.ip
            case "policy":
                self.policies.pop(event.policy.name, None)
                if put:
                    self.policies[event.policy.name] = event.policy

    async def synced(self) -> None:
        while (await self.read()).WhichOneof("body") != "synced":
            pass

    async def reach(self, revision: int) -> None:
        while self.revision < revision:
            await self.read()

    async def close(self) -> None:
        await self._messages.aclose()


async def test_a_session_gives_a_lease_and_the_next_one_takes_it_over(service: Service) -> None:
    first = Session(service, "node-1", 60)
    opened = await first.open()
    assert (opened.lease_new, opened.lease_ttl_s) == (True, 60)
    renewed = await first.renew()
    assert (renewed.lease_id, renewed.lease_new) == (opened.lease_id, False)
    second = Session(service, "node-1")
    taken = await second.open()
    assert (taken.lease_id, taken.lease_new, taken.lease_ttl_s) == (opened.lease_id, False, 60)
    with pytest.raises(RpcError) as caught:
        await first.renew()
    assert caught.value.kind is Kind.ABORTED
    status = await service.store.Status(pb.StatusRequest())
    assert [(s.node, s.connected) for s in status.sessions] == [("node-1", True)]
    assert status.sessions[0].lease_remaining_s in (58, 59, 60)


async def test_the_default_lease_is_fifteen_minutes(service: Service) -> None:
    assert (await Session(service, "n").open()).lease_ttl_s == 900


async def test_allocate_needs_a_session(service: Service) -> None:
    with pytest.raises(RpcError) as caught:
        await service.identity.Allocate(pb.AllocateRequest(node="n", labels=labels("app=web")))
    assert caught.value.kind is Kind.PRECONDITION
    assert caught.value.reason == "NoSession"


async def test_identities_are_shared_listed_and_found(service: Service) -> None:
    for node in ("n1", "n2"):
        await Session(service, node).open()
    one = await service.identity.Allocate(
        pb.AllocateRequest(node="n1", labels=labels("app=web", "tier=front"))
    )
    two = await service.identity.Allocate(
        pb.AllocateRequest(node="n2", labels=labels("tier=front", "app=web"))
    )
    assert (one.is_new, two.is_new) == (True, False)
    assert one.identity == two.identity
    assert 256 <= one.identity.id <= 65535
    assert [label.key for label in one.identity.labels] == ["app", "tier"]
    by_id = await service.identity.Get(pb.GetRequest(id=one.identity.id))
    assert list(by_id.nodes) == ["n1", "n2"]
    wanted = pb.LabelSet(labels=labels("app=web", "tier=front"))
    assert (await service.identity.Get(pb.GetRequest(labels=wanted))).identity == one.identity
    everything = await service.identity.List(pb.ListRequest())
    assert {i.id for i in everything.identities} == {*RESERVED, one.identity.id}
    some = await service.identity.List(pb.ListRequest(labels=labels("app=web")))
    assert [i.id for i in some.identities] == [one.identity.id]
    assert not (await service.identity.List(pb.ListRequest(labels=labels("app=we")))).identities
    await service.identity.Release(pb.ReleaseRequest(node="n1", id=one.identity.id))
    await service.identity.Release(pb.ReleaseRequest(node="n1", id=one.identity.id))
    await service.identity.Release(pb.ReleaseRequest(node="n1", id=4711))
    by_id = await service.identity.Get(pb.GetRequest(id=one.identity.id))
    assert list(by_id.nodes) == ["n2"]
    with pytest.raises(RpcError) as caught:
        await service.identity.Get(pb.GetRequest(id=4711))
    assert caught.value.kind is Kind.NOT_FOUND


async def test_reserved_labels_have_their_fixed_number_and_mix_with_nothing(
    service: Service,
) -> None:
    host = common_pb2.Label(source="reserved", key="host")
    answer = await service.identity.Allocate(pb.AllocateRequest(node="n", labels=[host]))
    assert (answer.identity.id, answer.is_new) == (1, False)
    for bad in ([host, *labels("app=web")], [common_pb2.Label(source="cidr", key="10.0.0.0/8")]):
        with pytest.raises(RpcError) as caught:
            await service.identity.Allocate(pb.AllocateRequest(node="n", labels=bad))
        assert caught.value.kind is Kind.INVALID


async def test_an_address_belongs_to_the_node_that_announced_it(service: Service) -> None:
    one, two = Session(service, "n1", 1), Session(service, "n2")
    await one.open()
    await two.open()

    def announce(node: str, prefix: str) -> pb.AnnounceRequest:
        entry = pb.IpEntry(prefix=prefix, identity=1000, host_ip="192.0.2.1", workload="w")
        return pb.AnnounceRequest(node=node, put=[entry])

    first = await service.identity.Announce(announce("n1", "10.1.2.3"))
    again = await service.identity.Announce(announce("n1", "10.1.2.3/32"))
    assert again.revision == first.revision, "an equal announcement writes nothing"
    with pytest.raises(RpcError) as caught:
        await service.identity.Announce(announce("n2", "10.1.2.3/32"))
    assert caught.value.kind is Kind.CONFLICT
    assert "node n1" in caught.value.message
    follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_IP]))
    await follower.synced()
    assert follower.ips["10.1.2.3/32"].node == "n1"
    withdraw = pb.AnnounceRequest(node="n2", withdraw=["10.1.2.3/32", "10.9.9.9"])
    await service.identity.Announce(withdraw)  # not its own: left alone
    assert (await service.store.Status(pb.StatusRequest())).revision == follower.revision
    while follower.ips:  # the lease of n1 ends, though its stream is open
        await follower.read()
    await service.identity.Announce(announce("n2", "10.1.2.3/32"))
    renewed = await one.renew()
    assert renewed.lease_new, "and n1 is told"


async def test_policies_are_applied_all_or_none(service: Service) -> None:
    apply = service.identity.ApplyPolicies
    first = await apply(pb.ApplyPoliciesRequest(policies=[policy("a"), policy("b")]))
    assert [o.change for o in first.outcomes] == [pb.Outcome.CREATED] * 2
    same = await apply(pb.ApplyPoliciesRequest(policies=[policy("b"), policy("a")]))
    assert [o.change for o in same.outcomes] == [pb.Outcome.UNCHANGED] * 2
    assert same.revision == first.revision
    dry = await apply(
        pb.ApplyPoliciesRequest(policies=[policy("a", "[1]"), policy("c")], dry_run=True)
    )
    assert [o.change for o in dry.outcomes] == [pb.Outcome.CONFIGURED, pb.Outcome.CREATED]
    assert dry.revision == first.revision
    bad = [policy("x"), policy("y", "{"), pb.Policy(kind="Pod", name="z", document=b"{}")]
    with pytest.raises(RpcError) as caught:
        await apply(pb.ApplyPoliciesRequest(policies=bad))
    assert caught.value.kind is Kind.INVALID
    # One that has a name is named; one whose kind is none of ours has only its place.
    broken, unknown = caught.value.faults
    assert broken.document.endswith("/y")
    assert unknown.path == "policies[2].kind"
    huge = [policy(f"big{n}", json.dumps("x" * 400_000).join("[]")) for n in range(6)]
    with pytest.raises(RpcError) as caught:
        await apply(pb.ApplyPoliciesRequest(policies=huge))
    assert caught.value.kind is Kind.INVALID
    follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_POLICY]))
    await follower.synced()
    assert sorted(follower.policies) == ["a", "b"]
    stored = follower.policies["a"]
    assert (stored.revision, stored.revision) == (first.revision, first.revision)
    stored.revision = 0
    assert stored == policy("a"), "what comes back is what went in"
    gone = await service.identity.DeletePolicies(
        pb.DeletePoliciesRequest(
            names=[
                pb.PolicyName(kind="CiliumNetworkPolicy", namespace="default", name=name)
                for name in ("a", "nope")
            ]
        )
    )
    assert [o.change for o in gone.outcomes] == [pb.Outcome.DELETED, pb.Outcome.UNCHANGED]
    rest = await service.identity.DeletePolicies(pb.DeletePoliciesRequest(all=True))
    assert [(o.name, o.change) for o in rest.outcomes] == [("b", pb.Outcome.DELETED)]
    await follower.reach(rest.revision)
    assert follower.policies == {}


async def test_a_watch_is_snapshot_synced_changes_and_signs_of_life(service: Service) -> None:
    await Session(service, "n").open()
    await service.identity.Allocate(pb.AllocateRequest(node="n", labels=labels("app=web")))
    follower = Follower(service)
    await follower.synced()
    assert set(follower.identities) > set(RESERVED)
    assert list(follower.identities.values())[-1] == "app=web"
    assert follower.kinds == ["batch", "synced"]
    answer = await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("p")]))
    message = await follower.read()
    assert (message.revision, len(message.batch.events)) == (answer.revision, 1)
    assert message.batch.events[0].policy.revision == answer.revision
    assert (await follower.read()).WhichOneof("body") == "bookmark"
    # What this watch is not about moves its resume point all the same.
    other = Follower(service, pb.WatchRequest(kinds=[pb.KIND_IP]))
    await other.synced()
    answer = await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("q")]))
    assert (await other.read()).WhichOneof("body") == "bookmark"
    await other.reach(answer.revision)
    assert set(other.kinds) == {"synced", "bookmark"}


async def test_a_watch_resumes_also_across_a_restart_of_the_service(service: Service) -> None:
    follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_POLICY]))
    await follower.synced()
    for name in ("a", "b", "c"):
        await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy(name)]))
    await follower.reach(3)
    resume = pb.WatchRequest(
        kinds=[pb.KIND_POLICY], store_id=follower.store_id, resume_revision=follower.revision
    )
    at = follower.revision
    await service.identity.DeletePolicies(pb.DeletePoliciesRequest(all=True))
    await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("d")]))
    for number in (signal.SIGTERM, signal.SIGKILL):
        await service.stop(number)
        await service.start()
        again = Follower(service, resume)
        await again.synced()
        assert again.resets == 0
        assert set(again.policies) == {"d"}
        first_new = {n for n in ("a", "b", "c") if n in again.policies}
        assert not first_new
        assert again.revision > at
        assert again.kinds == ["batch", "synced"]
        await again.close()


async def test_what_cannot_be_resumed_is_reset(service: Service) -> None:
    await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("a")]))
    status = await service.store.Status(pb.StatusRequest())
    for store_id, revision in ((status.store_id + 1, 1), (status.store_id, 1000)):
        follower = Follower(
            service,
            pb.WatchRequest(kinds=[pb.KIND_POLICY], store_id=store_id, resume_revision=revision),
        )
        await follower.synced()
        assert follower.kinds == ["reset", "batch", "synced"]
        assert set(follower.policies) == {"a"}
        await follower.close()


async def test_a_watch_that_was_away_too_long_is_reset(tmp_path: Path) -> None:
    service = Service(tmp_path, ["--bookmark=0.2", "--watch-graves=5"])
    await service.start()
    try:
        follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_POLICY]))
        await follower.synced()
        store_id, revision = follower.store_id, follower.revision
        for number in range(8):
            name = policy(f"p{number}")
            await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[name]))
        await service.identity.DeletePolicies(pb.DeletePoliciesRequest(all=True))
        again = Follower(
            service,
            pb.WatchRequest(kinds=[pb.KIND_POLICY], store_id=store_id, resume_revision=revision),
        )
        await again.synced()
        assert (again.kinds[0], again.policies) == ("reset", {})
    finally:
        await service.stop(signal.SIGKILL)


async def test_a_client_that_does_not_read_gets_the_newest_of_each_key(service: Service) -> None:
    """Many changes of one key while a client sleeps: it is told of few, and of the last."""
    sleeper = Follower(service, pb.WatchRequest(kinds=[pb.KIND_POLICY]))
    await sleeper.synced()
    last = 0
    big = "x" * 20_000
    for number in range(300):
        text = json.dumps({"n": number, "pad": big})
        answer = await service.identity.ApplyPolicies(
            pb.ApplyPoliciesRequest(policies=[policy("p", text)])
        )
        last = answer.revision
    await sleeper.reach(last)
    assert json.loads(sleeper.policies["p"].document)["n"] == 299
    assert sleeper.resets == 0
    assert len(sleeper.kinds) < 300


async def test_identities_nobody_uses_are_collected_and_quarantined(tmp_path: Path) -> None:
    service = Service(tmp_path, ["--gc-interval=0.05", "--quarantine=2"])
    await service.start()
    try:
        await Session(service, "n").open()
        answer = await service.identity.Allocate(
            pb.AllocateRequest(node="n", labels=labels("app=web"))
        )
        follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_IDENTITY]))
        await follower.synced()
        await service.identity.Release(pb.ReleaseRequest(node="n", id=answer.identity.id))
        while answer.identity.id in follower.identities:
            await follower.read()
        status = await service.store.Status(pb.StatusRequest())
        assert (status.identities, status.quarantined) == (0, 1)
        while status.quarantined:
            await asyncio.sleep(0.05)
            status = await service.store.Status(pb.StatusRequest())
    finally:
        await service.stop(signal.SIGKILL)


async def test_backup_restore_and_reset_of_watchers(service: Service, tmp_path: Path) -> None:
    await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("kept")]))
    backup = tmp_path / "backup.sqlite"
    data = b"".join([chunk.data async for chunk in service.store.Backup(pb.BackupRequest())])
    await asyncio.to_thread(backup.write_bytes, data)
    with sqlite3.connect(backup) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    assert not list((service.state_dir / "identity").glob("backup-*"))
    await service.identity.ApplyPolicies(pb.ApplyPoliciesRequest(policies=[policy("lost")]))
    follower = Follower(service, pb.WatchRequest(kinds=[pb.KIND_POLICY]))
    await follower.synced()
    with pytest.raises(Exception, match="in use by process"):
        restore(backup, service.state_dir)
    await service.stop()
    restore(backup, service.state_dir)
    await service.start()
    again = Follower(
        service,
        pb.WatchRequest(
            kinds=[pb.KIND_POLICY],
            store_id=follower.store_id,
            resume_revision=follower.revision,
        ),
    )
    await again.synced()
    assert again.kinds[0] == "reset"
    assert set(again.policies) == {"kept"}


async def test_a_second_service_and_a_damaged_store_end_with_a_reason(service: Service) -> None:
    assert service.process is not None
    pid = service.process.pid
    second = service.spawn()
    _, text = await asyncio.to_thread(second.communicate)
    assert second.returncode == 1
    assert f"in use by process {pid}" in text.decode()
    assert await service.stop() == 0
    store = service.state_dir / "identity" / "store.sqlite"
    damage = b"damage" * 1000
    await asyncio.to_thread(store.write_bytes, damage)
    third = service.spawn()
    _, text = await asyncio.to_thread(third.communicate)
    assert third.returncode == 1
    last = json.loads(text.splitlines()[-1])
    assert "is damaged" in last["error"]
    assert "cilia store restore" in last["cure"]
    assert await asyncio.to_thread(store.read_bytes) == damage


async def test_it_stops_at_once_with_open_streams(service: Service) -> None:
    session = Session(service, "n")
    await session.open()
    follower = Follower(service)
    await follower.synced()
    assert service.process is not None
    loop = asyncio.get_running_loop()
    service.process.send_signal(signal.SIGTERM)
    begun = loop.time()
    assert await asyncio.to_thread(service.process.wait) == 0
    assert loop.time() - begun < 4
    assert not (service.run_dir / "identity.sock").exists()


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


async def test_it_is_lean_and_quick(service: Service) -> None:
    """52 MB as measured, two fifths of it shared library pages; half as much again is a fault."""
    assert service.process is not None
    status = proc(service.process.pid, "status")
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kb < 75_000
    maps = proc(service.process.pid, "maps")
    for heavy in ("numpy", "pydantic", "pyroute2"):
        assert heavy not in maps


@pytest.mark.parametrize(
    "flags", [["--node-lease-ttl=0"], ["--bookmark=1e9"], ["--log-level=loud"]]
)
def test_a_wrong_setting_is_refused(tmp_path: Path, flags: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.identity", f"--state-dir={tmp_path}", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"CILIA_IDENTITY_RUN_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 78
    assert flags[0].split("=")[0] in result.stderr
