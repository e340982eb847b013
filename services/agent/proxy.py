"""L7 redirects of this node, from policy to the kernel and to the proxy, and back.

    policies' L7 sets --want--> Redirects --xds--> proxy's listeners
            ^                       |  ^______________________|  acknowledged
            | ports                 |
       policy rows             nft table, rules, routes; cilia_proxy_pair

What the proxy does not enforce yet has no row: a change of rules waits a moment for the proxy's
word, so that open connections see the old rules, then the new ones; if it does not come, the rows
go, and what needs the proxy is dropped until it does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

import structlog

from cilia import statefile
from cilia.bpf.layout import PROXY_LISTENER, PROXY_PAIR
from cilia.controller import describe
from cilia.errors import DomainError
from cilia.net import nft, tproxy
from cilia.net.rtnl import RouteSocket
from cilia.telemetry import fields
from services.agent import metrics, policyrows
from services.agent.datapath import Datapath
from services.agent.endpoint import SlotIndex
from services.agent.redirects import (
    InForce,
    ListenerState,
    Proxied,
    Redirects,
    State,
    SubjectRows,
    meeting_pairs,
)
from services.agent.rows import InForceSlot, PolicyMapRow
from services.agent.xdsclient import XdsClient

log = structlog.get_logger()

#: L7 parsers that the xds service has enforced by Envoy.
ENFORCED: Final = frozenset(("http",))

_WAIT_S: Final = 0.5  # of a flush, for the proxy's word
_FIRST_WAIT_S: Final = 2.0  # after a start, when streams have yet to be made


class Proxy:
    """Owner of the redirects and of all in the kernel that is about them."""

    def __init__(
        self,
        datapath: Datapath,
        client: XdsClient,
        *,
        directory: Path,
        ports: range,
        release_delay_s: float,
        policy_text: Callable[[int], str],
    ) -> None:
        self._datapath = datapath
        self._client = client
        self._policy_text = policy_text
        self.redirects = Redirects(
            directory / "redirects.json",
            ports=ports,
            release_delay_s=release_delay_s,
            busy=listening_ports,
        )
        self._path = directory / "redirects.json"
        self.redirects.watching = False  # not before the host's firewall has been looked at
        self.connected = False
        self.error = ""  # of rules and tables
        self._known = asyncio.Event()  # what is wanted: not before the first flush
        self._changed = asyncio.Event()
        self._told = asyncio.Event()  # the proxy said something
        self._first = True
        self._routed = asyncio.Lock()
        self._written: list[dict[str, object]] | None = None  # the table as it was when written
        self._written_ports: frozenset[int] | None = None
        self._pairs: dict[tuple[int, int], int] | None = None
        self._watcher: tproxy.Watcher | None = None
        self._moved: Callable[[frozenset[str]], None] = lambda _: None
        self._trigger: Callable[[], None] = lambda: None
        self._slots: Callable[[], Collection[InForceSlot]] = list
        self._tables_changed: Callable[[], None] = lambda: None

    def on_moved(self, told: Callable[[frozenset[str]], None]) -> None:
        """Whom to tell of sets whose port is another now."""
        self._moved = told

    def in_force_by(self, slots: Callable[[], Collection[InForceSlot]]) -> None:
        """Who knows the kernel's policy rows."""
        self._slots = slots

    def watch(self, may: bool) -> None:
        """Whether connections that are only to be seen may go to the proxy: where a firewall drops
        what is on its way there, they would be closed."""
        if self.redirects.watching != may:
            self.redirects.watching = may
            sides = (s for x in self.redirects.listeners.values() for s in (x.egress, x.ingress))
            self._moved(frozenset(s.digest for s in sides if s is not None and s.watches))

    def trigger_by(self, trigger: Callable[[], None]) -> None:
        """How to ask for `keep_routing`: the controller's trigger."""
        self._trigger = trigger

    def on_nftables(self, told: Callable[[], None]) -> None:
        """Whom to tell that somebody changed some table of nftables."""
        self._tables_changed = told

    # ---- lifecycle

    def load(self) -> list[str]:
        """What an earlier run left. Returns what is wrong with it. Blocking."""
        try:
            self.redirects.load()
        except statefile.StateFileDamaged as error:
            kept = statefile.set_aside(self._path)
            return [f"{error.message}; it was kept as {kept}"]
        return []

    async def start(self) -> None:
        """Watch what others do to tables and rules. Raises NetworkError."""
        self._watcher = await self._datapath.run(tproxy.Watcher)
        loop = asyncio.get_running_loop()
        for watcher in (self._watcher.table, self._watcher.routing):
            loop.add_reader(watcher.fileno(), self._heard, watcher)

    async def stop(self) -> None:
        """Everything stays: redirected connections go on without us."""
        if self._watcher is not None:
            loop = asyncio.get_running_loop()
            for watcher in (self._watcher.table, self._watcher.routing):
                loop.remove_reader(watcher.fileno())
            self._watcher.close()
            self._watcher = None
        await self._client.close()

    def _heard(self, watcher: object) -> None:
        assert self._watcher is not None
        self._watcher.drain(watcher)  # type: ignore[arg-type]  # one of its sockets
        if self.redirects.ports:
            self._trigger()
        if watcher is self._watcher.table:
            self._tables_changed()

    # ---- from policy

    async def settle(self, rows: Iterable[PolicyMapRow]) -> frozenset[str]:
        """Have the proxy enforce what these policies need; wait for it, a moment.

        Returns the digests of sets whose port is another than the rows have.
        """
        everyone = list(rows)
        rows = [row for row in everyone if row.state.l7]
        # Looked at only where something may be opened or changed.
        now = _in_force(self._slots(), everyone) if rows else InForce()
        used = {row.subject: frozenset(row.state.l7) for row in rows}
        told = self.redirects.want(used, meeting_pairs(_subject_rows(rows)), now)
        await self._save()
        await self._write_kernel()
        self._known.set()
        if told:
            self._changed.set()
        if told or self._first:
            await self._wait()
        self._first = False
        await self._write_pairs()
        self._count()
        return frozenset(
            rules.digest
            for row in rows
            for rules in row.state.l7
            if self.redirects.port(rules) != row.fill.ports.get(rules.digest)
        )

    async def _wait(self) -> None:
        limit_s = _FIRST_WAIT_S if self._first else _WAIT_S if self.connected else 0.0
        try:
            async with asyncio.timeout(limit_s):
                while any(x.state is State.PENDING for x in self.redirects.waiting()):
                    self._told.clear()
                    await self._told.wait()
        except TimeoutError:
            pass
        await self._save()

    async def _save(self) -> None:
        if self.redirects.unsaved:
            await self._datapath.run(self.redirects.save)

    # ---- the proxy

    async def sync(self) -> None:
        """Runs until the xds service goes away; raises XdsUnavailable then."""
        await self._known.wait()

        def sent() -> None:
            self.connected = True

        try:
            await self._client.sync(
                self.redirects,
                changed=self._changed,
                policy_text=self._policy_text,
                on_states=self._feed,
                on_sent=sent,
            )
        finally:
            self.connected = False

    def _feed(self, states: list[ListenerState]) -> None:
        moved = self.redirects.feed(states)
        self._told.set()
        if self.redirects.unsent:
            self._moved(frozenset())  # a flush saves, opens the way, and tells
        if moved:
            self._moved(moved)
        self._count()

    async def release(self) -> None:
        """Close what nobody needed for long."""
        named = frozenset[int]().union(*(slot.proxy_ports for slot in self._slots()))
        if self.redirects.release_due(named):
            await self._save()
            self._changed.set()
        if self.redirects.ports != self._written_ports:
            await self._write_kernel()

    def _count(self) -> None:
        listeners = self.redirects.listeners.values()
        for state in State:
            metrics.REDIRECTS.labels(state.value).set(sum(x.state is state for x in listeners))

    # ---- the kernel

    async def _write_kernel(self) -> None:
        """Deliver to new ports before any row names them."""
        if self.redirects.ports != (self._written_ports or frozenset()):
            await self.keep_routing()
        await self._write_pairs()

    async def keep_routing(self) -> None:
        """Table, rules and routes are there and as they should be, or are made so."""
        async with self._routed:
            ports = self.redirects.ports
            try:
                if not ports and self._written_ports is None:
                    await self._datapath.run(_remove_routing)
                    self._written_ports = ports
                elif ports or self._written_ports:
                    await self._datapath.run(self._restore, ports)
                self.error = ""
            except DomainError as error:
                if describe(error) != self.error:
                    log.error(
                        "What delivers packets to the proxy cannot be set up.",
                        **{fields.ERROR: describe(error)},
                    )
                self.error = describe(error)

    def _restore(self, ports: frozenset[int]) -> None:
        with RouteSocket() as host:
            missing = tproxy.missing_routing(host)
            if missing:
                if self._written_ports:
                    self._say_restored(", ".join(missing))
                tproxy.ensure_routing(host)
        found = tproxy.read_table()
        if ports == self._written_ports and found == self._written and found is not None:
            return
        if self._written_ports and found != self._written:
            self._say_restored(f"the table {tproxy.FAMILY} {tproxy.TABLE}")
        self._written = tproxy.write_table(ports)
        self._written_ports = ports

    @staticmethod
    def _say_restored(what: str) -> None:
        metrics.REDIRECT_RESTORED.inc()
        log.warning(
            "Somebody changed what delivers packets to the proxy; it is put back.",
            **{fields.REASON: what},
        )

    async def _write_pairs(self) -> None:
        pairs = self.redirects.pairs()
        if pairs != self._pairs:
            await self._datapath.run(self._sync_pairs, pairs)
            self._pairs = pairs

    def _sync_pairs(self, pairs: dict[tuple[int, int], int]) -> None:
        table = self._datapath.map("cilia_proxy_pair")
        wanted = {_pair_key(*ports): _pair_value(port) for ports, port in pairs.items()}
        keys, values = table.items_np(PROXY_PAIR, PROXY_LISTENER)
        found = {k.tobytes(): v.tobytes() for k, v in zip(keys, values, strict=True)}
        for key in found.keys() - wanted.keys():
            table.delete(key)
        for key, value in wanted.items():
            if found.get(key) != value:
                table.update(key, value)

    # ---- for people

    def status(self) -> list[str]:
        """What does not work, a line each; nothing when all does."""
        lines = [self.error] if self.error else []
        if self.redirects.problem:
            lines.append(self.redirects.problem)
        waiting = self.redirects.waiting()
        if not waiting:
            return lines
        refused = [x for x in waiting if x.state is State.FAILED]
        lines += [
            f"L7 rules are refused by the proxy, and what they allow "
            f"{'passes without it' if x.watches else 'is dropped'} (port {x.port}): {x.message}"
            for x in refused
        ]
        pending = sum(x.state is not State.FAILED and not x.watches for x in waiting)
        if pending:
            why = (
                "it has not acknowledged them"
                if self.connected
                else "the xds service is not reached (start it: `python -m services.xds`)"
            )
            lines.append(f"L7 rules wait for the proxy, {pending} sets: {why}")
        return lines


def _in_force(slots: Collection[InForceSlot], rows: Collection[PolicyMapRow]) -> InForce:
    named = [slot for slot in slots if slot.proxy_ports]
    wanted = {row.slot: row for row in rows}

    def may_swap(before: str, after: str) -> bool:
        for slot in named:
            old, new = slot.row, wanted.get(SlotIndex(slot.slot))
            if old is None or new is None or old.subject != new.subject:
                return False
            if any(x.digest == before for x in old.state.l7) and not policyrows.may_swap(
                old.state, new.state, before, after
            ):
                return False
        return True

    return InForce(frozenset[int]().union(*(slot.proxy_ports for slot in named)), may_swap)


def _subject_rows(rows: Collection[PolicyMapRow]) -> list[SubjectRows]:
    found = []
    egress = any(rules.egress for row in rows for rules in row.state.l7)
    ingress = any(not rules.egress for row in rows for rules in row.state.l7)
    if not (egress and ingress):
        return []
    for row in rows:
        subject = SubjectRows(row.subject.identity)
        for key, entry in row.state.items():
            if entry.l7 is None:
                continue
            proxied = Proxied(key.identity, key.port, key.last_port, entry.l7)
            (subject.egress if key.egress else subject.ingress).append(proxied)
        found.append(subject)
    return found


def _pair_key(egress: int, ingress: int) -> bytes:
    return egress.to_bytes(2, "big") + ingress.to_bytes(2, "big")


def _pair_value(port: int) -> bytes:
    return port.to_bytes(2, "big") + bytes(2)


def _remove_routing() -> None:
    with RouteSocket() as host:
        tproxy.delete_routing(host)
    if nft.available() and tproxy.read_table() is not None:
        tproxy.delete_table()


def listening_ports() -> frozenset[int]:
    """TCP ports that some process of this namespace listens on (proc(5), net/tcp)."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == "0A":
                found.add(int(words[1].rpartition(":")[2], 16))
    return frozenset(found)
