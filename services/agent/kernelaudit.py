"""The proof that the kernel does what policy says, asked for or going on slowly all the time.

    maps      what they hold            against what was last written there, row by row
    verdicts  what a packet would meet  against the engine: every edge of every row of every policy,
              (cilia.bpf.auditor)       and one step outside it

What differs is drift: somebody else wrote there, or something is broken. It is counted, shown in
the status with the row and its rule, and repaired by writing again what should be there; policies
get a new revision, so that who was admitted by a false row is judged again.

The comparison of a slot, or of a handful of verdicts, happens between flushes, and a flush waits no
longer than for one of these.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

import numpy as np
import structlog

from cilia.bpf import constants as k
from cilia.bpf.auditor import Auditor
from cilia.bpf.constants import AUDIT_CELLS
from cilia.bpf.dropreason import POLICY_DENIED, POLICY_DENIED_BY_RULE
from cilia.bpf.layout import AUDIT_CELL
from cilia.identity import HOST
from cilia.policy import PROTO_NAMES, MapState, PolicyKey
from cilia.policy.mapstate import PLEN_ANY, PLEN_PROTO
from cilia.telemetry import fields
from services.agent import metrics
from services.agent.calculation import Calculation
from services.agent.datapath import Datapath
from services.agent.drift import Drift
from services.agent.endpoint import SubjectKey
from services.agent.monitor import Monitor
from services.agent.policyrows import Fill
from services.agent.regeneration import Regeneration
from services.agent.rows import PolicyMapRow

log = structlog.get_logger()

_TCP, _UDP, _ICMP, _SCTP = 6, 17, 1, 132
_ICMPS: Final = (1, 58)
_PROXY_UNSUPPORTED: Final = 180  # Cilium's number: no proxy takes this protocol
_STRANGER: Final = 0xFFFF_FFFF  # no identity: only rows for everybody match it
_SLICE: Final = AUDIT_CELLS
_KEPT: Final = 50  # drifts shown
_RECENT_S: Final = 600.0  # how long the status speaks of what was repaired
_HEARD_S: Final = 3.0
_BREATH_S: Final = 0.005  # between costly looks
BUDGET_S: Final = 0.25  # of costly looks, by the background
_TRIED: Final = 1024  # cells at most, in search of one that is denied
_IDLE_S: Final = 5.0  # between searches that find none: audit may have been turned on

State = Literal["Ok", "Warning", "Failure"]
Question = tuple[int, bool, int, int]  # peer, egress, protocol, port


def questions(keys: Iterable[PolicyKey]) -> Iterator[Question]:
    """One packet per cell of a policy: the edges of each row, and what lies just outside them."""
    seen: set[Question] = set()
    for egress in (False, True):
        for asked in _edges(PolicyKey(0, egress, 0, 0, PLEN_ANY)):
            seen.add(asked)
            yield asked
    for key in keys:
        for asked in _edges(key):
            if asked not in seen:
                seen.add(asked)
                yield asked


def _edges(key: PolicyKey) -> Iterator[Question]:
    peers = (key.identity, _STRANGER) if key.identity else (_STRANGER,)
    inside: tuple[int, ...]
    ports: tuple[int, ...]
    if key.plen == PLEN_ANY:
        inside, ports = (_TCP, _UDP, _ICMP, _SCTP), (0, 65535)
    elif key.plen == PLEN_PROTO:
        inside, ports = (key.proto, _UDP if key.proto == _TCP else _TCP), (0, 65535)
    else:
        inside = (key.proto, _UDP if key.proto == _TCP else _TCP)
        ports = (key.port, key.last_port, key.port - 1, key.last_port + 1)
    for peer in peers:
        for proto in inside:
            top = 255 if proto in _ICMPS else 65535
            for port in dict.fromkeys(ports):
                if 0 <= port <= top:
                    yield peer, key.egress, proto, port


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict as an auditor gives it."""

    verdict: int  # 0 allow, > 0 proxy port, < 0 minus the drop reason
    rule_id: int
    audited: bool = False  # reported, and let pass

    def __str__(self) -> str:
        how = (
            "denied" if self.verdict < 0 else f"proxy {self.verdict}" if self.verdict else "allowed"
        )
        audited = ", only audited" if self.audited else ""
        return f"{how}{audited}, {f'by rule {self.rule_id}' if self.rule_id else 'by no rule'}"


def expected(state: MapState, fill: Fill, asked: Question, *, audit: bool) -> Answer:
    """What the engine says; `audit`: the subject's own. Of a complete policy (row.complete)."""
    peer, egress, proto, port = asked
    match = state.lookup(peer, egress, proto, port)
    if match is None:
        return Answer(-POLICY_DENIED, 0, audit)
    entry = match.entry
    if entry.deny:
        return Answer(-POLICY_DENIED_BY_RULE, entry.rule_id, audit)
    if entry.audit:
        reason = POLICY_DENIED_BY_RULE if entry.rule_id else POLICY_DENIED
        return Answer(-reason, entry.rule_id, True)
    if entry.l7 is not None:
        if proto != _TCP:
            return Answer(-_PROXY_UNSUPPORTED, entry.rule_id, audit)
        return Answer(fill.ports[entry.l7.digest], entry.rule_id)
    return Answer(0, entry.rule_id)


@dataclass(slots=True)
class Report:
    """One look at everything, or at as much as was asked for."""

    rows: int = 0
    policies: int = 0
    cells: int = 0
    skipped: list[str] = field(default_factory=list)  # policies that were on their way
    drifts: list[Drift] = field(default_factory=list)  # the first of them
    drifted: int = 0
    repaired: bool = True  # meaningless without drifts
    seconds: float = 0.0

    def add(self, drifts: Iterable[Drift]) -> None:
        for drift in drifts:
            self.drifted += 1
            if len(self.drifts) < _KEPT:
                self.drifts.append(drift)


@dataclass(slots=True)
class _Round:
    """The background's walk over all policies."""

    todo: list[SubjectKey] = field(default_factory=list)
    cells: int = 0
    began_s: float = 0.0
    drifted: int = 0


class KernelAudit:
    """Compares, proves and repairs; see the module's text."""

    def __init__(
        self,
        *,
        regeneration: Regeneration,
        calculation: Calculation,
        datapath: Datapath,
        monitor: Monitor,
        interval_s: float,
        cells_per_step: int = 256,
    ) -> None:
        self._regeneration = regeneration
        self._calculation = calculation
        self._datapath = datapath
        self._monitor = monitor
        self._interval_s = interval_s
        self._cells_per_step = cells_per_step
        self._auditor: Auditor | None = None
        self._round = _Round()
        self._walk: Iterator[Question] | None = None
        self._walking: PolicyMapRow | None = None
        self.last_compare = Report()
        self.last_round_cells = 0
        self.last_round_s = 0.0  # monotonic; 0: none has ended
        self.last_drift: Drift | None = None
        self.last_drift_s = 0.0
        self.unrepaired = 0
        self._last_slot = 0  # that took of a budget
        self._tried_s = 0.0  # the audit path, monotonic
        self.selftest = SelfTest()

    # ---- maps

    async def compare(self, *, budget_s: float | None = None) -> Report:
        """Read every map again, and repair what is not as it was written.

        To make the rows of a policy that changed since the last look takes time, of which no more
        than the budget is taken: the others have their turn at later looks.
        """
        async with asyncio.timeout(300):
            return await self._compare(budget_s)

    async def _compare(self, budget_s: float | None) -> Report:
        started = time.monotonic()
        report = Report()
        await self._look(report, budget_s)
        if report.drifted:
            self._tell(report)
            await self._repair()
            again = Report()
            await self._look(again, None)
            report.repaired = not again.drifted
        self.unrepaired = 0 if report.repaired or not report.drifted else report.drifted
        metrics.KERNEL_DRIFT.set(self.unrepaired)
        report.seconds = time.monotonic() - started
        self.last_compare = report
        return report

    async def _look(self, report: Report, budget_s: float | None) -> None:
        regeneration = self._regeneration
        policymap = regeneration.policymap
        slots = sorted({*policymap.maps.slots(), *await policymap.strays()})
        # Round and round, so that what always changes has its turn, too.
        for slot in sorted(slots, key=lambda slot: (slot <= self._last_slot, slot)):
            costly = not policymap.maps.is_summed(slot)
            if costly and budget_s is not None:
                if budget_s <= 0:
                    continue
                await asyncio.sleep(_BREATH_S)
            began = time.monotonic()
            async with regeneration.quiet:
                report.add(await policymap.reread([slot]))
            report.policies += 1
            if costly and budget_s is not None:
                budget_s -= time.monotonic() - began
                self._last_slot = slot
        report.rows += sum(row.size for row in regeneration.policies)
        report.add(await regeneration.ipcache.reread())
        report.rows += regeneration.ipcache.size
        report.add(await regeneration.endpointmap.reread())
        report.rows += regeneration.endpointmap.size

    async def _repair(self) -> None:
        regeneration = self._regeneration
        async with regeneration.quiet:
            await regeneration.policymap.flush()
            await regeneration.ipcache.flush()
            await regeneration.endpointmap.flush()
            # Who was admitted by a false row is looked up, and judged, again.
            await self._datapath.raise_epoch()

    def _tell(self, report: Report) -> None:
        for drift in report.drifts:
            log.error(
                "The kernel was found otherwise than it was written.",
                **{fields.MAP: drift.map, fields.KEY: drift.row, fields.REASON: str(drift)},
            )
            self.last_drift, self.last_drift_s = drift, time.monotonic()
        for drift in report.drifts[: report.drifted]:
            metrics.KERNEL_DRIFTS.labels(drift.map).inc()

    # ---- verdicts

    async def prove(self, report: Report) -> None:
        """Ask about every cell of every policy."""
        for key in sorted(self._calculation.subjects):
            row = self._regeneration.policy_in_force(key)
            if row is None or not row.complete:
                report.skipped.append(f"{key}: {', '.join(row.users) if row else 'not in force'}")
                continue
            walk = questions(list(row.state))  # as it is now: it changes while we ask
            while asked := list(islice(walk, _SLICE)):
                drifts = await self._ask(row, asked)
                if drifts is None:  # it changed under way: its successor is proved in its turn
                    report.skipped.append(f"{key}: changed meanwhile")
                    break
                report.cells += len(asked)
                report.add(drifts)

    async def everything(self) -> Report:
        """Maps, then verdicts: what `cilia policy audit-kernel` asks for."""
        started = time.monotonic()
        report = await self.compare()
        found = Report()
        await self.prove(found)
        if found.drifted:
            self._tell(found)
            await self._rewrite(found.drifts)
            again = Report()
            await self.prove(again)
            report.repaired = report.repaired and not again.drifted
            if again.drifted:
                self.unrepaired = again.drifted
                metrics.KERNEL_DRIFT.set(again.drifted)
        report.cells, report.skipped = found.cells, found.skipped
        report.drifted += found.drifted
        report.drifts = (report.drifts + found.drifts)[:_KEPT]
        report.seconds = time.monotonic() - started
        return report

    async def _rewrite(self, drifts: Iterable[Drift]) -> None:
        """Have policies whose verdicts are wrong read and written again."""
        for key in {drift.subject for drift in drifts if drift.subject is not None}:
            self._regeneration.force(key)
        await self.compare()

    async def _ask(self, row: PolicyMapRow, asked: list[Question]) -> list[Drift] | None:
        """Put some questions; None when the policy is another by now."""
        regeneration = self._regeneration
        async with regeneration.quiet:
            if regeneration.policy_in_force(row.subject) is not row:
                return None
            rev = regeneration.policymap.maps.rev(row.slot)
            audit = row.subject.audit
            due = [expected(row.state, row.fill, question, audit=audit) for question in asked]
            answers = await self._datapath.run(self._get_auditor().ask, _cells(row, asked))
        metrics.KERNEL_CELLS.inc(len(asked))
        drifts = []
        for question, wanted, answer in zip(asked, due, answers, strict=True):
            given = Answer(int(answer["verdict"]), int(answer["rule_id"]), bool(answer["audited"]))
            if given == wanted and int(answer["policy_rev"]) == rev:
                continue
            drifts.append(
                Drift(
                    map="verdict",
                    row=_question_text(question),
                    expected=f"{wanted}, revision {rev}",
                    found=f"{given}, revision {int(answer['policy_rev'])}",
                    subject=row.subject,
                    users=row.users,
                    rule_id=wanted.rule_id or given.rule_id,
                )
            )
        return drifts

    def _get_auditor(self) -> Auditor:
        if self._auditor is None:
            program = self._datapath.program
            self._auditor = Auditor(program("audit_policy"), program("audit_selftest"))
        return self._auditor

    async def step(self) -> None:
        """A little of the walk over all policies, which begins anew every interval."""
        now = time.monotonic()
        rest_s = self._interval_s if self.selftest.state != "idle" else _IDLE_S
        if now - self._tried_s >= min(rest_s, self._interval_s):
            await self.try_audit()
        walk = self._round
        if not walk.todo and self._walk is None:
            if walk.began_s and now - walk.began_s < self._interval_s:
                return
            self._round = walk = _Round(sorted(self._calculation.subjects), 0, now)
        left = self._cells_per_step
        while left > 0:
            if self._walk is None:
                if not walk.todo:
                    self.last_round_s, self.last_round_cells = now, walk.cells
                    return
                row = self._regeneration.policy_in_force(walk.todo.pop())
                if row is None or not row.complete:
                    continue
                self._walking, self._walk = row, questions(list(row.state))
            assert self._walking is not None
            asked = list(islice(self._walk, _SLICE))
            drifts = await self._ask(self._walking, asked) if asked else None
            if drifts is None:
                self._walk = self._walking = None
                continue
            walk.cells += len(asked)
            left -= len(asked)
            if drifts:
                report = Report()
                report.add(drifts)
                self._tell(report)
                await self._rewrite(drifts)
                self._walk = self._walking = None

    # ---- audit mode

    async def try_audit(self) -> None:
        """Where something is only audited: that this is heard, too. See SelfTest."""
        self._tried_s = time.monotonic()
        documents = any(document.audit for document in self._calculation.documents.values())
        left = _TRIED
        for key in sorted(self._calculation.subjects):
            row = self._regeneration.policy_in_force(key)
            if row is None or not row.complete or not (key.audit or documents):
                continue
            await asyncio.sleep(0)
            for asked in islice(questions(list(row.state)), left):
                left -= 1
                answer = expected(row.state, row.fill, asked, audit=key.audit)
                if answer.audited and answer.verdict < 0:
                    await self._hear(row, asked)
                    return
        self.selftest.state = "idle"

    async def _hear(self, row: PolicyMapRow, asked: Question) -> None:
        test = self.selftest
        test.subject, test.asked = ", ".join(row.users[:3]), _question_text(asked)
        cells = _cells(row, [asked])
        cells["ep_id"] = min(self._calculation.subjects[row.subject].users, default=0)
        with self._monitor.subscribe() as subscription:
            answer = await self._datapath.run(self._get_auditor().try_aloud, cells)
            heard = False
            if answer["audited"].all():
                try:
                    async with asyncio.timeout(_HEARD_S):
                        async for delivery in subscription:
                            if any(
                                batch.events is not None
                                and (batch.events["flags"] & k.EVENT_F_SELFTEST).any()
                                for batch in delivery.items
                            ):
                                heard = True
                                break
                except TimeoutError:
                    heard = False
        test.state = "heard" if heard else "silent"
        test.at_s = time.monotonic()
        metrics.AUDIT_SELFTESTS.labels(test.state).inc()
        if not heard:
            log.error("What is only audited is not reported.", **{fields.REASON: str(test)})

    # ---- what the status says

    def summary(self) -> tuple[State, str]:
        """For the status: how it stands, and a sentence."""
        drift, now = self.last_drift, time.monotonic()
        if self.unrepaired:
            return "Failure", f"{self.unrepaired} rows cannot be repaired: {drift}"
        if drift is not None and now - self.last_drift_s < _RECENT_S:
            return "Warning", f"repaired {now - self.last_drift_s:.0f} s ago: {drift}"
        proved = (
            f"{self.last_round_cells} cells answer as the engine"
            if self.last_round_s
            else "verdicts are being compared"
        )
        return "Ok", f"{self.last_compare.rows} rows are as written, {proved}"


@dataclass(slots=True)
class SelfTest:
    """Audit mode says nothing while nothing is denied: is it silent, or dead?

    So from time to time one denial is judged aloud (audit_selftest of bpf_audit.c), and has to come
    out of the ring as an event of its own, flagged AUDITED and SELFTEST, which monitors show.
    """

    state: str = "idle"  # nothing is audited, or nothing that is would be denied; heard; silent
    subject: str = ""
    asked: str = ""
    at_s: float = 0.0  # monotonic

    def __str__(self) -> str:
        if self.state == "idle":
            return "nothing is only audited"
        age = time.monotonic() - self.at_s
        told = "was reported" if self.state == "heard" else "was NOT reported"
        return f"a denial of {self.subject} ({self.asked}) {told} {age:.0f} s ago"


def _cells(row: PolicyMapRow, asked: list[Question]) -> np.ndarray:
    cells = np.zeros(len(asked), AUDIT_CELL)
    peers, egress, protos, ports = zip(*asked, strict=True)
    node = row.subject.identity == HOST
    cells["policy_slot"] = row.slot
    cells["identity"] = row.subject.identity
    cells["remote_id"], cells["egress"] = peers, egress
    cells["proto"], cells["dport_be"] = protos, ports
    cells["ep_flags"] = (
        k.EP_F_OPEN | (k.EP_F_AUDIT if row.subject.audit else 0) | (k.EP_F_HOST if node else 0)
    )
    return cells


def _question_text(asked: Question) -> str:
    peer, egress, proto, port = asked
    who = "a stranger" if peer == _STRANGER else f"identity {peer}"
    where = f"egress to {who}" if egress else f"ingress from {who}"
    return f"{where} on {PROTO_NAMES.get(proto, proto)}/{port}"
