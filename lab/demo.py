"""The Star Wars scene, played for real: `python -m lab.demo [--no-color] [--keep]`.

    act 1   no policy: every ship lands
    act 2   the L3-L4 policy: ships of the empire land, the X-wing's packets are dropped
    act 3   the agent is killed with SIGKILL in a download and restarted: nothing breaks or opens
    act 4   the L7 policy: ships of the empire may ask for a landing, and for nothing else
    act 5   the same for gRPC: one method is allowed, another one is not

Every line printed about traffic is an observation: what the client process got, what the kernel
reported about exactly that connection (matched by addresses and source port), what the process
table or a pinned map says. Exit code 0 only if every expectation held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from cilia.bpf import Map
from cilia.bpf.layout import METRIC
from cilia.errors import DomainError
from lab import down, plans, process, spec, state
from lab import up as lab_up
from lab.clients import AgentClient, EndpointInfo, Request, RuleInfo, Verdict, flow_followers
from lab.errors import LabError
from lab.state import LabState, WorkloadState
from lab.up import ROOT, environment, place_of

LAB = "demo"
LAB_FILE = ROOT / "examples" / "lab" / "star-wars.yaml"
POLICY = Path("examples/policies/star-wars/l3-l4.yaml")
L7_POLICY = Path("examples/policies/star-wars-l7/l7.yaml")
DENIED_BODY = "Access denied by the Empire"  # xds_args of the lab file
NODE = "node1"

LAND_TIMEOUT_S = 3.0  # for a landing that should work
DENIED_TIMEOUT_S = 1.2  # for one that should not: a dropped SYN is never answered
EVENT_TIMEOUT_S = 3.0
PLANS_BYTES = 20 << 20
PLANS_RATE = 1 << 20  # bytes a second
KILL_AFTER = 1 << 20  # bytes received when the agent is killed
DEAD_BYTES = 1 << 20  # bytes that must arrive while it is dead
STEP_TIMEOUT_S = 30.0
POLL_S = 0.05
POLICY_DENIED = 133


# ---- what is printed


class Screen:
    """Text for people; colours only where they are wanted."""

    def __init__(self, out: TextIO, *, color: bool) -> None:
        self._out = out
        self._color = color

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text

    def good(self, text: str) -> str:
        return self.paint(text, "32")

    def bad(self, text: str) -> str:
        return self.paint(text, "31")

    def dim(self, text: str) -> str:
        return self.paint(text, "2")

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    def line(self, text: str = "") -> None:
        self._out.write(text + "\n")
        self._out.flush()

    def title(self, text: str) -> None:
        self.line()
        self.line(self.paint(text, "1;36"))


# ---- what is expected, and whether it held


@dataclass(frozen=True, slots=True)
class Expectation:
    """One sentence, and what was seen."""

    what: str
    seen: str
    held: bool


@dataclass(slots=True)
class Ledger:
    """Every expectation of the run."""

    screen: Screen
    rows: list[Expectation] = field(default_factory=list)

    def expect(self, what: str, held: bool, seen: str) -> bool:
        self.rows.append(Expectation(what, seen, held))
        if not held:
            self.screen.line(f"  {self.screen.bad('EXPECTED OTHERWISE')}: {what}; seen: {seen}")
        return held

    @property
    def all_held(self) -> bool:
        return bool(self.rows) and all(row.held for row in self.rows)

    def show(self) -> None:
        screen = self.screen
        screen.title("What was expected, and what was seen")
        width = max((len(row.what) for row in self.rows), default=0)
        for row in self.rows:
            mark = screen.good("held  ") if row.held else screen.bad("FAILED")
            screen.line(f"  {mark}  {row.what:<{width}}  {screen.dim(row.seen)}")
        held = sum(row.held for row in self.rows)
        verdict = f"{held} of {len(self.rows)} expectations held"
        screen.line()
        screen.line(f"  {screen.good(verdict) if self.all_held else screen.bad(verdict)}")


# ---- what the kernel reports


E = TypeVar("E", Verdict, Request)


class Witness(Generic[E]):
    """A monitor stream, kept, so that an attempt finds the events about its own connection."""

    def __init__(self, source: Callable[[Callable[[], None]], AsyncIterator[E]]) -> None:
        self._source: Callable[[Callable[[], None]], AsyncIterator[E]] = source
        self._events: list[E] = []
        self._news = asyncio.Condition()
        self.listening = asyncio.Event()

    async def listen(self) -> None:
        """Collect until cancelled or until the agent is gone."""
        async for event in self._source(self.listening.set):
            async with self._news:
                self._events.append(event)
                self._news.notify_all()

    async def find(self, wanted: Callable[[E], bool], timeout_s: float) -> list[E]:
        """Events that match, waiting for the first; empty when none came in time."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                while not (found := [e for e in self._events if wanted(e)]):
                    await self._news.wait()
                return found
        except TimeoutError:
            return []


def about(result: dict[str, Any], ship: str) -> Callable[[Verdict], bool]:
    """Events of the connection a client made: addresses and source port."""

    def matches(event: Verdict) -> bool:
        return (
            event.source == ship
            and event.source_port == result["local_port"]
            and event.destination == result["remote"]
            and event.destination_port == result["remote_port"]
        )

    return matches


# ---- what the ships do


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try to land, as the ship saw it."""

    ship: WorkloadState
    target: WorkloadState
    family: int
    result: dict[str, Any]

    @property
    def landed(self) -> bool:
        return bool(self.result["status"] == 200 and self.result["body"] == "Ship landed\n")

    @property
    def silent(self) -> bool:
        """No answer at all: neither refused nor broken."""
        return bool(self.result["exit"] == 28 and self.result["status"] is None)

    @property
    def address(self) -> str:
        return self.ship.ipv4 if self.family == 4 else self.ship.ipv6

    @property
    def outcome(self) -> str:
        if self.result["status"] is not None:
            took_ms = self.result["elapsed_s"] * 1000
            return f"{self.result['status']} {self.result['body'].strip()!r} in {took_ms:.0f} ms"
        return str(self.result["error"])


def client_argv(*words: str) -> list[str]:
    return [sys.executable, "-m", "lab.httpc", "--json", *words]


async def client(
    lab: LabState, ship: WorkloadState, argv: Sequence[str]
) -> asyncio.subprocess.Process:
    """Start a client in the ship's namespaces."""
    place = place_of(lab, ship)
    return await asyncio.create_subprocess_exec(
        *process.command_line(argv, place),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=process.launch_environment(environment(), place),
        cwd="/",
    )


async def attempt(
    lab: LabState, ship: WorkloadState, target: WorkloadState, family: int, timeout_s: float
) -> Attempt:
    """Ask one deathstar for a landing, by its address."""
    address = target.ipv4 if family == 4 else f"[{target.ipv6}]"
    argv = client_argv("--timeout", str(timeout_s), "POST", f"http://{address}/v1/request-landing")
    child = await client(lab, ship, argv)
    out, _ = await child.communicate()
    if not out:
        raise LabError(f"the client of {ship.name} ended without a word (exit {child.returncode})")
    return Attempt(ship=ship, target=target, family=family, result=json.loads(out))


async def attempts(
    lab: LabState,
    tries: Sequence[tuple[WorkloadState, WorkloadState, int]],
    timeout_s: float,
) -> list[Attempt]:
    """Several at once."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(attempt(lab, ship, target, family, timeout_s))
            for ship, target, family in tries
        ]
    return [task.result() for task in tasks]


class Download:
    """A long answer, read by a client whose progress we see."""

    def __init__(self, lab: LabState, ship: WorkloadState, target: WorkloadState) -> None:
        self._lab, self._ship, self._target = lab, ship, target
        self._news = asyncio.Condition()
        self.bytes = 0
        self.result: dict[str, Any] | None = None

    async def run(self) -> None:
        url = f"http://{self._target.ipv4}/v1/plans?bytes={PLANS_BYTES}&rate={PLANS_RATE}"
        child = await client(self._lab, self._ship, client_argv("--progress", "--stall", "8", url))
        assert child.stdout is not None
        try:
            async for text in child.stdout:
                said = json.loads(text)
                async with self._news:
                    if "exit" in said:
                        self.result = said
                    self.bytes = said["bytes"] or self.bytes
                    self._news.notify_all()
            await child.wait()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        async with self._news:
            self._news.notify_all()

    async def reach(self, count: int) -> int:
        """Wait until `count` bytes arrived, or the end; returns how many did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STEP_TIMEOUT_S), self._news:
                while self.bytes < count and self.result is None:
                    await self._news.wait()
        return self.bytes


# ---- the acts


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who plays."""

    deathstars: tuple[WorkloadState, ...]
    tiefighter: WorkloadState
    xwing: WorkloadState

    @classmethod
    def of(cls, lab: LabState) -> Fleet:
        return cls(
            deathstars=tuple(w for w in lab.workloads if w.group == "deathstar"),
            tiefighter=lab.workload("tiefighter"),
            xwing=lab.workload("xwing"),
        )

    def tries(self, *ships: WorkloadState) -> list[tuple[WorkloadState, WorkloadState, int]]:
        return [(ship, d, family) for family in (4, 6) for ship in ships for d in self.deathstars]


class Play:
    """The acts, over one lab."""

    def __init__(self, lab: LabState, screen: Screen, ledger: Ledger) -> None:
        self.lab = lab
        self.fleet = Fleet.of(lab)
        self.screen = screen
        self.ledger = ledger

    async def run(self) -> None:
        async with AgentClient(self.lab.nodes[0].agent_socket) as agent:
            before = {(e.namespace, e.name): e for e in await agent.endpoints()}
            async with self._witnessed(agent.verdicts) as witness:
                await self.act1(witness)
                await self.act2(agent, witness)
        await self.act3(before)
        async with (
            AgentClient(self.lab.nodes[0].agent_socket) as agent,
            self._witnessed(agent.requests) as requests,
        ):
            await self.act4(agent, requests)
            await self.act5(requests)

    @contextlib.asynccontextmanager
    async def _witnessed(
        self, source: Callable[[Callable[[], None]], AsyncIterator[E]]
    ) -> AsyncIterator[Witness[E]]:
        """The monitor's events for as long as the block runs; it is known to be listening."""
        witness = Witness(source)
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(witness.listen())
            try:
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    await witness.listening.wait()
                yield witness
            finally:
                listening.cancel()

    # ---- acts

    async def act1(self, witness: Witness[Verdict]) -> None:
        self.screen.title("Act 1: no policy. Who asks, lands.")
        fleet = self.fleet
        made = await attempts(self.lab, fleet.tries(fleet.tiefighter, fleet.xwing), LAND_TIMEOUT_S)
        verdicts = [await self._landed(item, witness) for item in made]
        self.ledger.expect(
            "act 1: each landing has a verdict of the kernel, by no rule",
            all(verdict is not None and verdict.rule is None for verdict in verdicts),
            f"{sum(verdict is not None for verdict in verdicts)} of {len(verdicts)} have one",
        )
        self.ledger.expect(
            "act 1: both ships land on both deathstars, IPv4 and IPv6",
            len(made) == 8 and all(item.landed for item in made),
            f"{sum(item.landed for item in made)} of {len(made)} landed",
        )

    async def act2(self, agent: AgentClient, witness: Witness[Verdict]) -> None:
        screen, fleet = self.screen, self.fleet
        screen.title("Act 2: the L3-L4 policy. Ships of the empire may use port 80, nobody else.")
        started = time.monotonic()
        revision = await agent.apply([ROOT / POLICY], names=[str(POLICY)])
        took_ms = (time.monotonic() - started) * 1000
        screen.line(
            f"  policy {POLICY} applied and in force: revision {revision}, {took_ms:.0f} ms"
        )
        screen.line()
        landed = await attempts(self.lab, fleet.tries(fleet.tiefighter), LAND_TIMEOUT_S)
        verdicts = [await self._landed(item, witness) for item in landed]
        rules = [verdict.rule if verdict is not None else None for verdict in verdicts]
        for family in (4, 6):
            mine = [item for item in landed if item.family == family]
            self.ledger.expect(
                f"act 2: the tiefighter (org=empire) lands over IPv{family}",
                bool(mine) and all(item.landed for item in mine),
                f"{sum(item.landed for item in mine)} of {len(mine)} landed",
            )
        self.ledger.expect(
            "act 2: each landing names the rule that admits it",
            all(rule is not None and rule.file == str(POLICY) and rule.line for rule in rules),
            f"{sum(rule is not None for rule in rules)} of {len(rules)} name one",
        )
        async with self._flows("--verdict", "DROPPED") as flows:
            dropped = await attempts(self.lab, fleet.tries(fleet.xwing), DENIED_TIMEOUT_S)
            reasons = [await self._dropped(item, witness) for item in dropped]
            await self._shown(flows, 2)
        for family in (4, 6):
            mine = [item for item in dropped if item.family == family]
            self.ledger.expect(
                f"act 2: the xwing (org=alliance) is dropped over IPv{family}",
                bool(mine) and all(item.silent for item in mine),
                f"{sum(item.silent for item in mine)} of {len(mine)} got no answer",
            )
        self.ledger.expect(
            "act 2: each drop names its reason, the rule, the file and the line",
            bool(reasons) and all(reasons),
            f"{sum(reasons)} of {len(reasons)} do",
        )
        await self._why()

    @contextlib.asynccontextmanager
    async def _flows(self, *options: str) -> AsyncIterator[asyncio.StreamReader]:
        """`cilia flows observe -f`, following before the block begins."""
        server = self.lab.nodes[0].flows_socket
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "flows", "observe", "-f", *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**environment(), "CILIA_FLOWS_SERVER": f"unix://{server}"},
            cwd=ROOT,
        )
        assert child.stdout is not None
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                while await flow_followers(server) < 1:  # noqa: ASYNC110  # it tells nobody
                    await asyncio.sleep(POLL_S)
            yield child.stdout
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            await child.wait()

    async def _shown(self, flows: asyncio.StreamReader, count: int) -> None:
        """What a follower of flows has been shown meanwhile, a few lines of it."""
        screen = self.screen
        screen.line()
        screen.line("  $ cilia flows observe -f --verdict DROPPED")
        seen: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STEP_TIMEOUT_S):
                while len(seen) < count and (line := await flows.readline()):
                    text = line.decode().rstrip()
                    if f"/{self.fleet.xwing.name}:" in text and POLICY.name in text:
                        seen.append(text)
                        screen.line(screen.dim(f"  {text}"))
        self.ledger.expect(
            "act 2: the flow stream shows drops as they happen, with reason and rule",
            len(seen) == count and all("DROPPED" in text for text in seen),
            f"{len(seen)} of {count} lines",
        )

    async def _why(self) -> None:
        """Ask the command what would have to change; nothing is changed."""
        screen = self.screen
        words = ["why", self.fleet.xwing.name, self.fleet.deathstars[0].name, "--dport", "80/tcp"]
        screen.line()
        screen.line(f"  $ cilia {' '.join(words)}")
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**environment(), "CILIA_AGENT_SOCK": self.lab.nodes[0].agent_socket},
            cwd=ROOT,
        )
        async with asyncio.timeout(STEP_TIMEOUT_S):
            out, _ = await child.communicate()
        said = out.decode()
        for line in said.splitlines():
            screen.line(screen.dim(f"  {line}") if line else "")
        self.ledger.expect(
            "act 2: why names the file and line that isolate, and an edit that would admit it",
            child.returncode == 1 and f"{POLICY}:" in said and "smallest edit" in said,
            f"exit code {child.returncode}, {len(said.splitlines())} lines",
        )

    async def act3(self, before: dict[tuple[str, str], EndpointInfo]) -> None:
        screen, fleet = self.screen, self.fleet
        screen.title("Act 3: the agent is killed in the middle of a download, and comes back.")
        size = f"{PLANS_BYTES / 2**20:.0f} MiB"
        screen.line(
            f"  tiefighter downloads {size} of plans from deathstar-1, "
            f"{PLANS_RATE / 2**20:.0f} MiB a second"
        )
        download = Download(self.lab, fleet.tiefighter, fleet.deathstars[0])
        async with asyncio.TaskGroup() as group:
            group.create_task(download.run())
            await download.reach(KILL_AFTER)
            await self._while_dead(download)
            await self._after_restart(download, before)
        result = download.result or {"error": "no result", "bytes": 0, "sha256": None, "exit": -1}
        whole = result["bytes"] == PLANS_BYTES and result["sha256"] == plans.digest(PLANS_BYTES)
        seen = (
            f"{result['bytes']} bytes in {result['elapsed_s']:.1f} s, SHA-256 "
            f"{result['sha256'][:16]}… is that of the plans"
            if whole
            else f"{result['bytes']} of {PLANS_BYTES} bytes: {result['error'] or 'wrong SHA-256'}"
        )
        screen.line(f"  download: {screen.good(seen) if whole else screen.bad(seen)}")
        self.ledger.expect("act 3: the download, one TCP connection, arrives whole", whole, seen)

    async def _while_dead(self, download: Download) -> None:
        screen, fleet, ledger = self.screen, self.fleet, self.ledger
        agent = self.lab.node(NODE).agent
        assert agent is not None
        drops = self._policy_drops()
        at_kill = download.bytes
        running = download.result is None
        sent = process.send(agent, signal.SIGKILL)
        dead = sent and await asyncio.to_thread(process.wait_gone, agent, 5.0)
        screen.line(
            f"  {at_kill / 2**20:.1f} MiB in: agent (pid {agent.pid}) killed with SIGKILL: "
            + (screen.bad("it is dead") if dead else "it is NOT dead")
        )
        ledger.expect(
            "act 3: the agent dies while the download runs",
            dead and running,
            f"dead: {dead}, bytes so far: {at_kill}",
        )
        landed, *dropped = await attempts(
            self.lab,
            [
                (fleet.tiefighter, fleet.deathstars[1], 4),
                (fleet.xwing, fleet.deathstars[1], 4),
                (fleet.xwing, fleet.deathstars[1], 6),
            ],
            DENIED_TIMEOUT_S,
        )
        for item in (landed, *dropped):
            screen.line(f"  {self._headline(item)}")
        counted = self._policy_drops() - drops
        screen.line(
            screen.dim(f"      the kernel counted {counted} packets dropped by policy meanwhile")
        )
        ledger.expect(
            "act 3: without an agent, the xwing is still dropped",
            all(item.silent for item in dropped) and counted > 0,
            f"{sum(item.silent for item in dropped)} of {len(dropped)} got no answer, "
            f"{counted} packets counted as dropped by policy",
        )
        ledger.expect(
            "act 3: without an agent, the tiefighter still lands", landed.landed, landed.outcome
        )
        now = await download.reach(at_kill + DEAD_BYTES)
        still_dead = not process.alive(agent)
        ledger.expect(
            "act 3: the download goes on while there is no agent",
            now >= at_kill + DEAD_BYTES and still_dead,
            f"{(now - at_kill) / 2**20:.1f} MiB more arrived",
        )

    async def _after_restart(
        self, download: Download, before: dict[tuple[str, str], EndpointInfo]
    ) -> None:
        screen, fleet, ledger = self.screen, self.fleet, self.ledger
        started = time.monotonic()
        self.lab = lab_up.start_service(self.lab, NODE, "agent")
        await lab_up.agent_ready(self.lab, NODE)
        took_s = time.monotonic() - started
        running = download.result is None
        agent = self.lab.node(NODE).agent
        assert agent is not None
        screen.line(
            f"  agent restarted (pid {agent.pid}), Ok after {took_s:.1f} s, "
            f"{download.bytes / 2**20:.1f} MiB in"
        )
        ledger.expect(
            "act 3: the agent is back before the download ends",
            running,
            f"after {took_s:.1f} s, at {download.bytes / 2**20:.1f} MiB",
        )
        async with AgentClient(self.lab.nodes[0].agent_socket) as client_:
            after = {(e.namespace, e.name): e for e in await client_.endpoints()}
            ledger.expect(
                "act 3: it has the same endpoints, identities and addresses as before",
                after == before,
                f"{len(after)} endpoints",
            )
            async with self._witnessed(client_.verdicts) as witness:
                dropped = await attempts(
                    self.lab, [(fleet.xwing, fleet.deathstars[0], 4)], DENIED_TIMEOUT_S
                )
                reasons = [await self._dropped(item, witness) for item in dropped]
        ledger.expect(
            "act 3: after the restart the xwing is dropped, by the same rule",
            all(item.silent for item in dropped) and all(reasons),
            dropped[0].outcome,
        )

    async def act4(self, agent: AgentClient, witness: Witness[Request]) -> None:
        screen, fleet, ledger = self.screen, self.fleet, self.ledger
        screen.title("Act 4: the L7 policy. Ships of the empire may ask for a landing, no more.")
        ship, target = fleet.tiefighter, fleet.deathstars[0]
        before = await self._ask(ship, target, 4, "PUT", "/v1/exhaust-port")
        screen.line(
            f"  before it, {ship.name} PUTs into the exhaust port: {_answer(before)}, "
            "for a packet to port 80 is a packet to port 80"
        )
        ledger.expect(
            "act 4: L3-L4 policy does not see what is asked",
            before["status"] == 503,
            _answer(before),
        )
        started = time.monotonic()
        revision = await agent.apply([ROOT / L7_POLICY], names=[str(L7_POLICY)])
        took_ms = (time.monotonic() - started) * 1000
        screen.line(
            f"  policy {L7_POLICY} applied and in force: revision {revision}, {took_ms:.0f} ms"
        )
        screen.line()
        told = []
        for family in (4, 6):
            landing = await self._ask(ship, target, family, "POST", "/v1/request-landing")
            told.append(await self._request(landing, ship, family, witness))
            exhaust = await self._ask(ship, target, family, "PUT", "/v1/exhaust-port")
            told.append(await self._request(exhaust, ship, family, witness))
            ledger.expect(
                f"act 4: the tiefighter may ask for a landing, IPv{family}",
                landing["status"] == 200 and landing["body"] == "Ship landed\n",
                _answer(landing),
            )
            ledger.expect(
                f"act 4: it gets 403 for the exhaust port, with our text, IPv{family}",
                exhaust["status"] == 403 and exhaust["body"].strip() == DENIED_BODY,
                _answer(exhaust),
            )
        ledger.expect(
            "act 4: each request is told of, with the rule, its file and line",
            all(event is not None and f"({L7_POLICY}:" in event.policy for event in told),
            f"{sum(event is not None for event in told)} of {len(told)} are",
        )
        dropped = await attempts(self.lab, [(fleet.xwing, target, 4)], DENIED_TIMEOUT_S)
        for item in dropped:
            screen.line(f"  {self._headline(item)}")
        ledger.expect(
            "act 4: the xwing does not come as far as a request",
            all(item.silent for item in dropped),
            dropped[0].outcome,
        )

    async def act5(self, witness: Witness[Request]) -> None:
        screen, fleet, ledger = self.screen, self.fleet, self.ledger
        screen.title("Act 5: gRPC. The empire may aim its superlaser; to fire is for nobody.")
        ship, target = fleet.tiefighter, fleet.deathstars[0]
        argv = [sys.executable, "-m", "lab.superlaser"]
        server = await client(self.lab, target, [*argv, "serve"])
        try:
            assert server.stdout is not None
            async with asyncio.timeout(STEP_TIMEOUT_S):
                ready = await server.stdout.readline()
            ledger.expect("act 5: the service runs", ready == b"ready\n", repr(ready))
            for method, code in (("Aim", "OK"), ("Fire", "PERMISSION_DENIED")):
                child = await client(self.lab, ship, [*argv, "call", target.ipv4, method])
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    out, _ = await child.communicate()
                found = json.loads(out) if out else {"code": "no answer", "answer": ""}
                mark = screen.good("allowed") if found["code"] == "OK" else screen.bad("denied ")
                said = found["answer"] or found["message"]
                screen.line(f"  {mark}  {ship.name} calls {method}: {found['code']} {said!r}")

                def about_it(event: Request, method: str = method) -> bool:
                    return event.source == ship.ipv4 and event.url.endswith(f"/{method}")

                events = await witness.find(about_it, EVENT_TIMEOUT_S)
                if events:
                    self._tell_request(events[-1])
                ledger.expect(
                    f"act 5: {method} ends with {code}", found["code"] == code, found["code"]
                )
                ledger.expect(
                    f"act 5: {method} is told of, with the rule",
                    bool(events) and str(L7_POLICY) in events[-1].policy,
                    events[-1].policy if events else "nothing",
                )
        finally:
            if server.returncode is None:
                server.kill()
            await server.wait()

    async def _ask(
        self, ship: WorkloadState, target: WorkloadState, family: int, method: str, path: str
    ) -> dict[str, Any]:
        """One request; what the client process got."""
        address = target.ipv4 if family == 4 else f"[{target.ipv6}]"
        argv = client_argv("--timeout", str(LAND_TIMEOUT_S), method, f"http://{address}{path}")
        child = await client(self.lab, ship, argv)
        out, _ = await child.communicate()
        if not out:
            raise LabError(f"the client of {ship.name} ended without a word")
        found: dict[str, Any] = json.loads(out)
        found["asked"] = f"{method} {path}"
        return found

    async def _request(
        self, result: dict[str, Any], ship: WorkloadState, family: int, witness: Witness[Request]
    ) -> Request | None:
        """Tell a request; returns what the proxy said about it."""
        screen = self.screen
        allowed = result["status"] == 200
        mark = screen.good("allowed") if allowed else screen.bad("denied ")
        route = f"{ship.name} {result['asked']}, IPv{family}"
        screen.line(f"  {mark}  {route:<50} {_answer(result)}")

        port: int = result["local_port"]
        remote: str = result["remote"]

        def mine(event: Request) -> bool:
            return event.source_port == port and event.destination == remote

        events = await witness.find(mine, EVENT_TIMEOUT_S)
        if not events:
            screen.line(screen.bad("      the proxy reported nothing about it"))
            return None
        self._tell_request(events[-1])
        return events[-1]

    def _tell_request(self, event: Request) -> None:
        screen = self.screen
        denied = event.verdict == "DENIED"
        word = screen.bad(event.verdict) if denied else screen.good(event.verdict)
        screen.line(
            f"      {word} at {event.direction}, identity {event.source_identity} -> "
            f"{event.destination_identity}, {event.method} {event.url}"
        )
        how = "not what is allowed by" if denied else "by"
        screen.line(f"      {how} {event.policy}")

    # ---- observing

    def _policy_drops(self) -> int:
        """Packets dropped as `Policy denied`, read from the pinned map: no agent is needed."""
        path = Path(self.lab.nodes[0].bpffs) / "cilia" / "maps" / "cilia_metrics"
        with contextlib.closing(Map.open_pinned(path)) as metrics:
            total = 0
            for direction in (0, 1, 2):
                key = (POLICY_DENIED << 2 | direction).to_bytes(4, sys.byteorder)
                rows = metrics.lookup_percpu(key, METRIC)
                if rows is not None:
                    total += int(rows["packets"].sum())
            return total

    # ---- telling

    def _headline(self, item: Attempt) -> str:
        screen = self.screen
        mark = screen.good("lands  ") if item.landed else screen.bad("dropped")
        if not item.landed and not item.silent:
            mark = screen.bad("FAILED ")
        who = ",".join(
            text.removeprefix("k8s:") for text in item.ship.labels if text.startswith("k8s:org=")
        )
        route = f"{item.ship.name} ({who}) -> {item.target.name}, IPv{item.family}"
        return f"{mark}  {route:<50} {item.outcome}"

    async def _landed(self, item: Attempt, witness: Witness[Verdict]) -> Verdict | None:
        """Tell a landing; returns the verdict of the deathstar's ingress that admitted it."""
        self.screen.line(f"  {self._headline(item)}")
        mine = about(item.result, item.address)

        def decisive(event: Verdict) -> bool:
            return mine(event) and event.type == "verdict" and event.direction == "ingress"

        events = await witness.find(decisive, EVENT_TIMEOUT_S)
        if not events:
            self.screen.line(self.screen.bad("      the kernel reported no verdict about it"))
            return None
        self._tell(events[0], events[0].rule)
        return events[0]

    async def _dropped(self, item: Attempt, witness: Witness[Verdict]) -> bool:
        """Tell a drop; True when its reason, rule, file and line are known."""
        self.screen.line(f"  {self._headline(item)}")
        mine = about(item.result, item.address)

        def decisive(event: Verdict) -> bool:
            return mine(event) and event.verdict.upper() == "DENIED"

        events = await witness.find(decisive, EVENT_TIMEOUT_S)
        if not events:
            self.screen.line(self.screen.bad("      the kernel reported no drop of it"))
            return False
        event = events[0]
        rule = event.rule or (event.default_deny[0] if event.default_deny else None)
        self._tell(event, rule)
        return (
            event.reason_code == POLICY_DENIED
            and rule is not None
            and rule.file == str(POLICY)
            and rule.line > 0
        )

    def _tell(self, event: Verdict, rule: RuleInfo | None) -> None:
        screen = self.screen
        verdict = event.verdict.upper()
        word = screen.good(verdict) if verdict == "ALLOWED" else screen.bad(verdict)
        reason = f" ({event.reason})" if event.reason else ""
        head = (
            f"      {word}{reason} at {event.direction}, identity {event.source_identity} -> "
            f"{event.destination_identity}, {event.protocol} "
            f"{event.source_port} -> {event.destination_port}"
        )
        if rule is None:
            screen.line(f"{head}: {event.explanation.rpartition(': ')[2].rstrip('.')}")
            return
        screen.line(head)
        how = (
            "by"
            if verdict == "ALLOWED" or event.rule is not None
            else "no rule allows it; isolated by"
        )
        screen.line(f"      {how} {rule.policy} {rule.path}, {screen.bold(rule.place)}")
        text = _source_line(rule)
        if text:
            screen.line(screen.dim(f"      {rule.line:>4} | {text}"))


def _answer(result: dict[str, Any]) -> str:
    if result["status"] is None:
        return str(result["error"])
    return f"{result['status']} {result['body'].strip()!r}"


def _source_line(rule: RuleInfo) -> str:
    try:
        return (ROOT / rule.file).read_text().splitlines()[rule.line - 1]
    except (OSError, IndexError):
        return ""


NEXT = """\
  cilia lab up examples/lab/star-wars.yaml        the same lab, to play with
  export CILIA_AGENT_SOCK=/run/cilia-lab/star-wars/node1/agent.sock
  export CILIA_FLOWS_SERVER=unix:///run/cilia-lab/star-wars/node1/hubble.sock
  cilia monitor                                   verdicts as they happen
  cilia flows observe -f --verdict DROPPED        the same for Hubble's clients, with history
  cilia policy apply {policy} --wait
  cilia lab exec xwing -- python -m lab.httpc POST http://deathstar/v1/request-landing
  cilia policy trace --src xwing --dst deathstar-1 --dport 80/tcp
  cilia endpoint labels xwing --add k8s:org=empire      change sides, and land
  cilia lab down star-wars
"""


# ---- from start to end


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Refuse a second demo at the same time. The lock is a name that ends with the process."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0cilia-demo-{name}")
        except OSError as error:
            raise LabError("another demo is running", cure="Wait for it, or end it.") from error
        yield


def play(screen: Screen, *, name: str, keep: bool) -> int:
    """The whole demo; returns the exit code."""
    started = time.monotonic()
    ledger = Ledger(screen)
    lab_up.check_machine()
    screen.title("Cilia: who may land on the Death Star?")
    wanted = spec.load(LAB_FILE, name=name)
    try:
        if name in down.labs() and down.down(name).anything:
            screen.line(screen.dim("  removed what an earlier demo left"))
        lab = lab_up.up(wanted, say=lambda text: screen.line(screen.dim(f"  {text}")))
        for item in lab.workloads:
            labels = ",".join(text.removeprefix("k8s:") for text in item.labels)
            screen.line(
                f"  {item.name:<12} {labels:<30} identity {item.identity:<6} "
                f"{item.ipv4:<14} {item.ipv6}"
            )
        asyncio.run(Play(lab, screen, ledger).run())
    finally:
        if keep and state.read(name) is not None:
            screen.line()
            screen.line(f"  The lab is kept: `cilia lab status {name}`, `cilia lab down {name}`")
        else:
            removed = _clear(name)
            screen.line()
            screen.line(
                screen.dim(
                    f"  cleaned up: {removed.processes} processes, {removed.namespaces} namespaces,"
                    f" {removed.mounts} mounts, {removed.cgroups} cgroups removed"
                )
            )
    if not keep:
        left = name in down.labs()
        ledger.expect("nothing of the demo is left", not left, "remains" if left else "nothing")
    ledger.show()
    screen.title("To try next")
    screen.line(NEXT.format(policy=POLICY).rstrip())
    screen.line()
    screen.line(screen.dim(f"  {time.monotonic() - started:.1f} s"))
    return 0 if ledger.all_held else 1


def _clear(name: str) -> down.Removed:
    """Clean up to the end: a second Ctrl-C must not leave half a lab."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return down.down(name)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Command line to exit code: 0 all held, 1 not, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--no-color", action="store_true", help="no colours, even on a terminal")
    parser.add_argument("--keep", action="store_true", help="leave the lab running")
    parser.add_argument("--name", default=LAB, help="name of the lab (default: %(default)s)")
    options = parser.parse_args(argv)
    color = sys.stdout.isatty() and not options.no_color and "NO_COLOR" not in os.environ
    screen = Screen(sys.stdout, color=color)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        with only_one(options.name):
            return play(screen, name=options.name, keep=options.keep)
    except KeyboardInterrupt:
        screen.line(screen.bad("interrupted"))
        return 130
    except BrokenPipeError:
        # The reader went away; the lab is gone all the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DomainError as error:
        _explain(error)
    except BaseExceptionGroup as errors:
        for leaf in _leaves(errors):
            if isinstance(leaf, DomainError):
                _explain(leaf)
            else:
                raise
    return 1


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _explain(error: DomainError) -> None:
    sys.stderr.write(f"Error: {error.message}\n")
    if error.cure:
        sys.stderr.write(f"  {error.cure}\n")


if __name__ == "__main__":
    sys.exit(main())
