"""One flush: what changed is folded into the calculation, its results are made real, in one order.

    cluster view, endpoints, host addresses
      -> calculation                      (pure)
        -> proxies                        enforce what rows are to name; a moment is waited
        -> policy maps                    rows of every subject that changed
          -> ipcache                      names policy already knows
            -> announcement               other nodes may send
              -> endpoint rows            the slot that is filled, the identity, EP_F_OPEN
                -> epoch                  live connections look their peers up again
                  -> told                 who waits for the endpoint hears of it
                    -> freed slots, identities nobody carries any more

An endpoint is opened only after the policy of its very subject is in its slot. One whose new
policy cannot be programmed keeps what is in force, and says why.

A flush looks at the endpoints of which something changed since the last one: their row of the
table, or how a policy or a kernel row of theirs stands. It costs what changed, not what there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network

import structlog

from cilia.bpf.constants import EP_F_AUDIT, EP_F_HOST, EP_F_OPEN
from cilia.controller import describe
from cilia.errors import DomainError
from cilia.identity import HOST, EndpointID, NumericIdentity, is_cluster, reserved_labels
from cilia.labels import SOURCE_K8S, Labels
from cilia.policy import Document, DocumentError
from cilia.reconcile import State
from cilia.table import ReadTable, Table
from cilia.telemetry import fields
from services.agent import metrics
from services.agent.calculation import Calculation
from services.agent.clusterwatch import Changes, ClusterView, PolicyEntry, PolicyName
from services.agent.datapath import Datapath
from services.agent.endpoint import (
    CLOSING,
    NAMESPACE_LABEL,
    Endpoint,
    EndpointState,
    SlotIndex,
    SubjectKey,
)
from services.agent.endpointtable import Endpoints
from services.agent.hostpolicy import HOST_ID
from services.agent.notifications import Notifier
from services.agent.policystate import PolicyStateFile
from services.agent.reconcilers.endpointmap import EndpointMapReconciler
from services.agent.reconcilers.ipcache import IpcacheReconciler
from services.agent.reconcilers.policymap import PolicyMapReconciler
from services.agent.rows import EndpointMapRow, InForceSlot, IpcacheRow, Network, PolicyMapRow

log = structlog.get_logger()

_MANY_SUBJECTS = 32
_MANY_PREFIXES = 1024
NO_POLICY_SET = (
    "policy is not known: the identity service was not reached and no policy set was saved; "
    "packets are dropped until it is (start the identity service)"
)


@dataclass(slots=True)
class Pending:
    """Inputs that came since the last flush: which keys to look at again."""

    identities: set[NumericIdentity] = field(default_factory=set)
    policies: set[PolicyName] = field(default_factory=set)
    force: set[SubjectKey] = field(default_factory=set)
    everything: bool = True  # the first flush looks at all there is


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """A row of cilia_ifindex as an earlier run left it."""

    id: EndpointID
    ifindex: int
    identity: NumericIdentity
    slot: SlotIndex
    open: bool


class Regeneration:
    """Owns the desired tables and the order in which they become real."""

    def __init__(
        self,
        *,
        node: str,
        view: ClusterView,
        endpoints: Endpoints,
        calculation: Calculation,
        datapath: Datapath,
        notifier: Notifier,
        saved: PolicyStateFile,
        announce: Callable[[], Awaitable[None]],
        settle_proxies: Callable[[Iterable[PolicyMapRow]], Awaitable[Collection[str]]],
        policy_limit: int,
        node_labels: Labels | None = None,
        before_node: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.policy_limit = policy_limit  # rows that one policy may have
        self._node = node
        self._view = view
        self._endpoints = endpoints
        self.calculation = calculation
        self._datapath = datapath
        self._notifier = notifier
        self._saved = saved
        self._saved_version = -1
        self._announce = announce
        self._node_labels = node_labels or reserved_labels(HOST)
        self._before_node = before_node  # the node's policy is in force
        self._node_key: SubjectKey | None = None  # None: no rule selects the node
        self._node_due = True  # rules have changed since it was asked
        self._settle_proxies = settle_proxies  # the digests whose port is another now
        self.pending = Pending()
        self._read: dict[PolicyName, Document] = {}  # what was stored from here, until it is told
        self._policies: Table[SubjectKey, PolicyMapRow] = Table(
            "policymap", key=lambda row: row.subject
        )
        self._ipcache: Table[Network, IpcacheRow] = Table("ipcache", key=lambda row: row.prefix)
        self._rows: Table[EndpointID, EndpointMapRow] = Table("endpointmap", key=lambda row: row.id)
        self.policymap = PolicyMapReconciler(self._policies.reader(), datapath, limit=policy_limit)
        self.ipcache = IpcacheReconciler(self._ipcache.reader(), datapath)
        self.endpointmap = EndpointMapReconciler(self._rows.reader(), datapath)
        self._subject_errors: dict[SubjectKey, str] = {}
        self._document_errors: dict[PolicyName, str] = {}
        self._kept_revision: dict[EndpointID, int] = {}  # of endpoints whose policy is stale
        self._held: dict[SubjectKey, str] = {}  # by a document that nobody here understands
        self._epoch_due = False
        self._many_came = False  # subjects or prefixes, since garbage was collected for them
        self._due: set[EndpointID] = set()  # changed since the last flush folded its inputs
        self._current: set[EndpointID] = set()  # to be looked at by the flush under way
        self._seen: tuple[int | None, int | None, int | None] = (None, None, None)  # _look's
        self._wired: set[EndpointID] = set()  # may be open now, if their policy is in its slot
        self._subject_errors_told: set[SubjectKey] = set()  # to the endpoints
        self._users: dict[EndpointID, tuple[SubjectKey, Labels, str]] = {}  # as subjects have them
        self._ips_version = 0  # raised whenever other nodes' prefixes changed
        self._ipcache_others: object = None  # what the ipcache's rows were made from
        self._ipcache_endpoints: Mapping[EndpointID, Endpoint] = {}
        self._epoch_of = (0, 0)  # what had changed when the epoch was last raised
        self.policymap.spare_by(self.endpointmap.slots)
        self._flushed_revision = 0  # what the last flush that ended well was made from
        self.quiet = asyncio.Lock()  # held: no flush is under way, nor begins
        self._begun = 0  # flushes
        self._ended = 0  # the number of the last flush that ended well
        self._realised = asyncio.Event()
        self._trigger: Callable[[], None] = lambda: None

    # ---- what others see

    @property
    def tables(self) -> tuple[ReadTable[SubjectKey, PolicyMapRow], ...]:
        return (self._policies.reader(), self._ipcache.reader(), self._rows.reader())  # type: ignore[return-value]  # tables of different rows, for printing

    @property
    def ipcache_rows(self) -> ReadTable[Network, IpcacheRow]:
        return self._ipcache.reader()

    @property
    def policies(self) -> ReadTable[SubjectKey, PolicyMapRow]:
        return self._policies.reader()

    @property
    def synced(self) -> bool:
        """Whether a whole policy set is known, live or as it was last saved."""
        return self._view.synced

    @property
    def document_errors(self) -> dict[PolicyName, str]:
        return dict(self._document_errors)

    @property
    def realised_revision(self) -> int:
        """The store revision up to which every endpoint here is under the policy set."""
        unread = (
            entry.revision - 1
            for name in self._document_errors
            if (entry := self._view.policies.get(name)) is not None
        )
        return min((self._flushed_revision, *self._kept_revision.values(), *unread))

    @property
    def failing(self) -> dict[SubjectKey, str]:
        return dict(self._subject_errors)

    def policy_in_force(self, key: SubjectKey) -> PolicyMapRow | None:
        """What the subject's slot was made to hold; None while another is on its way there."""
        return self._done(key)

    @property
    def node_labels(self) -> Labels:
        """By which rules select the node itself."""
        return self._node_labels

    @property
    def node_policy(self) -> PolicyMapRow | None:
        """What is in force for the node itself; None while no rule is about it."""
        row = self._rows.get(HOST_ID)
        if row is None or self._node_key is None:
            return None
        return self._policies.get(self._node_key)

    def in_force(self) -> list[InForceSlot]:
        """What the programs find where rows of endpoints lead."""
        return self.policymap.maps.in_force(self.endpointmap.slots())

    def revision_of(self, endpoint: Endpoint) -> int:
        """The store revision of the policy set that the endpoint's policy was made from."""
        if not endpoint.open:
            return 0
        return self._kept_revision.get(endpoint.id, self._flushed_revision)

    def not_shown(self, endpoint: Endpoint) -> list[str]:
        """What of the visibility that an endpoint asks for is not in force, and why."""
        row = self._policies.get(endpoint.realised) if endpoint.realised is not None else None
        return row.not_shown if row is not None and endpoint.options.visibility else []

    def trigger_by(self, trigger: Callable[[], None]) -> None:
        """How to ask for a flush: the controller's trigger."""
        self._trigger = trigger

    def changed(self, changes: Changes) -> bool:
        """Marks work for the next flush; False when none is needed for it.

        Most of what the service tells is what we told it: our identities, our addresses.
        """
        self.pending.identities |= changes.identities
        self.pending.policies |= changes.policies
        elsewhere = any(self._prefix_is_news(prefix) for prefix in changes.ips)
        if elsewhere:
            self._ips_version += 1
        return (
            elsewhere
            or changes.synced
            or bool(changes.policies)
            or any(self._identity_is_news(number) for number in changes.identities)
        )

    def _identity_is_news(self, number: NumericIdentity) -> bool:
        entry = self._view.identities.get(number)
        known = self.calculation.labels_of(number)
        return known is not None if entry is None else known != entry.labels

    def _prefix_is_news(self, prefix: str) -> bool:
        entry = self._view.ips.get(prefix)
        if entry is not None and entry.node != self._node:
            return True
        row = self._ipcache.get(ip_network(prefix))
        return row is not None and row.source == "cluster"

    @contextlib.contextmanager
    def expecting(self, documents: Mapping[PolicyName, Document]) -> Iterator[None]:
        """These were read here: while it lasts, what the cluster tells of them is not read again
        if it is what was stored."""
        self._read.update(documents)
        try:
            yield
        finally:
            for name, document in documents.items():
                if self._read.get(name) is document:
                    del self._read[name]

    def force(self, subject: SubjectKey) -> None:
        """Resolve and write this subject again although nothing says that it changed."""
        self.pending.force.add(subject)

    def wired(self, number: EndpointID) -> None:
        """The endpoint's wire is up: the next flush opens it if its policy is in its slot."""
        self._wired.add(number)

    def look_at_all(self) -> None:
        """Have the next flush look at every endpoint, whatever is thought to have changed."""
        self._seen = (None, None, None)

    async def wait_folded(self) -> None:
        """Returns when a flush that began after now has made everything known now real."""
        wanted = self._begun + 1
        self._trigger()
        while self._ended < wanted:
            await self._realised.wait()

    # ---- the flush

    async def read_back(self) -> list[KernelRow]:
        """Take the kernel's state as actual; returns its endpoint rows."""
        await self.policymap.read_back()
        await self.ipcache.read_back()
        rows = await self.endpointmap.read_back()
        self._epoch_due = True  # a crash may have come between rows and epoch
        return [
            KernelRow(
                id=EndpointID(int(row["id"])),
                ifindex=int(row["ifindex"]),
                identity=NumericIdentity(int(row["identity"])),
                slot=SlotIndex(int(row["policy_slot"])),
                open=bool(row["flags"] & EP_F_OPEN),
            )
            for row in rows
        ]

    async def flush(self) -> None:
        """One round. Row errors stay with their endpoints; raises only what stops everything."""
        async with self.quiet:
            await self._flush()

    async def _flush(self) -> None:
        started = time.monotonic()
        self._begun += 1
        await self._save_policies()
        # News may come while this flush awaits: it acts on what it folded in, and on that alone.
        synced, live = self._view.synced, self._view.live
        self._fold()
        calculation = self.calculation
        if self._choose_node() | self._users_changed():
            calculation.set_users(
                endpoint for endpoint in self._endpoints if endpoint.state not in CLOSING
            )
        revision = self._view.policy_revision
        gone_prefixes = calculation.cidrs.release_due()
        if calculation.cidrs.unsaved:
            await self._datapath.run(calculation.cidrs.save)
        if synced:
            await self._resolve()
            if moved := await self._settle_proxies(self._policies):
                calculation.proxies_changed(moved)
                await self._resolve()
            await self.policymap.flush()
            self._note_policy_errors()
            self._subject_errors.update(self._held)
        self._adopt_policies()
        await self._flush_ipcache(prune=live)
        await self._announce()
        await self._flush_endpoint_rows(prune=synced)
        # Since it was last raised, not since this flush began: one that failed half way, or rows
        # written outside of a flush, count as well.
        changes = (self.ipcache.changes, self.endpointmap.identity_changes)
        if self._epoch_due or changes != self._epoch_of:
            await self._datapath.raise_epoch()
            self._epoch_due, self._epoch_of = False, changes
        if synced:
            self._settle_endpoints(revision)
            self._flushed_revision = revision
            # Last: the kernel waits for a grace period, and nobody else needs to.
            await self._free_slots()
        calculation.release_prefixes(gone_prefixes)
        if self._many_came:
            # What was made now lasts: later collections need not walk all of it again and again.
            self._many_came = False
            gc.collect()
            gc.freeze()
        self._ended = self._begun
        self._realised.set()
        self._realised = asyncio.Event()
        metrics.REGENERATION_SECONDS.observe(time.monotonic() - started)

    async def _save_policies(self) -> None:
        """On disk before in the kernel: a restart must not find a policy set older than what is
        in force, or it would undo a denial until the identity service is heard."""
        while self._view.live and self._saved_version != self._view.policy_version:
            version = self._view.policy_version
            await self._datapath.run(
                self._saved.save_policies,
                list(self._view.policies.values()),
                revision=self._view.policy_revision,
                store_id=self._view.store_id,
            )
            self._saved_version = version

    def _look(self) -> list[Endpoint]:
        """The endpoints of which something changed since a flush last settled them."""
        statuses = (self.policymap.statuses, self.endpointmap.statuses)
        batch = self._endpoints.table.changes(self._seen[0])
        policies = statuses[0].changes(self._seen[1])
        rows = statuses[1].changes(self._seen[2])
        self._seen = (batch.revision, policies.revision, rows.revision)
        changed = {change.key for change in batch.changes}
        changed.update(change.key for change in rows.changes)
        for subject in policies.changes:
            changed.update(self._users_of(subject.key))
        if batch.reset:
            changed.update(self._users)  # those that are gone are not in it
        # This flush acts on it where it can; what it has passed already is the next one's.
        self._current |= changed
        self._due |= changed
        found = (self._endpoints.table.get(number) for number in sorted(self._current))
        return [endpoint for endpoint in found if endpoint is not None]

    def _users_of(self, key: SubjectKey) -> list[EndpointID]:
        subject = self.calculation.subjects.get(key)
        return [EndpointID(number) for number in subject.users] if subject is not None else []

    def _users_changed(self) -> bool:
        """Whether an endpoint came or went, or is another subject's now."""
        changed = False
        due = {endpoint.id: endpoint for endpoint in self._look()}
        for number in self._current:
            endpoint, user = due.get(number), None
            if endpoint is not None and endpoint.state not in CLOSING:
                key = self.calculation.subject_of(endpoint)
                if key is not None:
                    user = (key, endpoint.identity_labels, endpoint.qualified_name)
            if self._users.get(number) == user:
                continue
            changed = True
            if user is None:
                del self._users[number]
            else:
                self._users[number] = user
        return changed

    def _fold(self) -> None:
        pending, self.pending = self.pending, Pending(everything=False)
        view, calculation = self._view, self.calculation
        identities = set(view.identities) if pending.everything else pending.identities
        self._current |= self._due
        ours: Iterable[Endpoint] = self._look()
        self._due.clear()
        for number in identities:
            if not is_cluster(number):
                continue
            entry = view.identities.get(number)
            if entry is not None:
                if calculation.labels_of(number) != entry.labels:
                    calculation.put_identity(number, entry.labels)
                    ours = self._endpoints
            elif not self._in_use(number):
                calculation.remove_identity(number)
        # Ours are known before the cluster tells us about them.
        for endpoint in ours:
            if endpoint.identity is not None and is_cluster(endpoint.identity):
                calculation.put_identity(endpoint.identity, endpoint.identity_labels)
        names = set(view.policies) if pending.everything else pending.policies
        if names or pending.everything:
            self._fold_policies(names)
        calculation.mark_dirty(pending.force)

    def _choose_node(self) -> bool:
        """The node is a subject while a rule selects it, and never where nothing is enforced.

        False when nothing can have changed.
        """
        if not self._node_due:
            return False  # looking at every rule is not for every flush
        self._node_due = False
        calculation = self.calculation
        rules = calculation.engine.repository.rules_for(self._node_labels, node=True)
        chosen = self._node_labels if rules and calculation.mode != "never" else None
        self._node_key = calculation.set_node(chosen)
        return True

    def adopt_node(self, slot: SlotIndex) -> bool:
        """Keep the slot that an earlier run's row of the node leads to."""
        key = SubjectKey(HOST, self.calculation.mode, self.calculation.audit)
        return self.calculation.slots.adopt(key, slot)

    def _in_use(self, number: NumericIdentity) -> bool:
        return any(
            number in (endpoint.identity, endpoint.realised_identity)
            for endpoint in self._endpoints
        )

    def _fold_policies(self, names: set[PolicyName]) -> None:
        puts: dict[PolicyName, Document] = {}
        removed = []
        unread = dict(self._document_errors)
        for name in names:
            entry = self._view.policies.get(name)
            if entry is None:
                removed.append(name)
                self._document_errors.pop(name, None)
                continue
            try:
                document = self._read.get(name)
                known = document is not None and PolicyEntry.of(document) == entry
                puts[name] = document if document is not None and known else entry.parse()
                self._document_errors.pop(name, None)
            except DocumentError as error:
                # Stored by a newer version, most likely. What is not understood must not vanish
                # from enforcement in silence: the old form stays, and the status says so. Where
                # no old form is known, whom it may concern is held (_holding).
                self._document_errors[name] = str(error)
                log.error(
                    "A stored policy cannot be understood.",
                    **{fields.POLICY_NAME: str(name), fields.ERROR: str(error)},
                )
        self.calculation.set_documents(puts, removed)
        self._node_due = True
        if unread != self._document_errors:
            # It decides whose policy can be made at all.
            self.calculation.mark_dirty(self.calculation.subjects)
        revision = self._view.policy_revision
        count = len(self.calculation.documents)
        if puts:
            self._notifier.policy_updated(map(str, puts), revision, count)
        if removed:
            self._notifier.policy_deleted(map(str, removed), revision, count)

    def _holding(self, key: SubjectKey) -> str:
        """Why the subject's policy cannot be made now; "" when it can.

        A document that is not understood, and of which no older form is known (it was stored
        while this process was away), may deny anything to anybody in its scope. So what is in
        force there stays, and what is not open waits.
        """
        for name, error in self._document_errors.items():
            if name in self.calculation.documents:
                continue
            namespace = self.calculation.subjects[key].labels.get(NAMESPACE_LABEL, SOURCE_K8S)
            if not name.namespace or (namespace and namespace.value == name.namespace):
                return f"{name} is not understood, so policy stays as it is: {error}"
        return ""

    async def _resolve(self) -> None:
        calculation = self.calculation
        self._held = {key: why for key, why in self._held.items() if key in calculation.subjects}
        # Peers that come and go change rows, not what the rules say: no endpoint regenerates for
        # them, unless there is more to do.
        touched = calculation.take_touched()
        more = {
            key
            for key in touched
            if key in self._held or key in self._subject_errors or self._policies.get(key) is None
        }
        calculation.mark_dirty(more)
        self._regenerate_wired()
        dirty = calculation.take_dirty()
        for key in sorted(dirty):
            for number in calculation.subjects[key].users:
                self._regenerating(EndpointID(number))
            if why := self._holding(key):
                self._held[key] = why
                continue
            self._held.pop(key, None)
            try:
                self._policies.upsert(calculation.policy_row(key))
                self._subject_errors.pop(key, None)
            except DomainError as error:
                self._subject_errors[key] = describe(error)
            await asyncio.sleep(0)  # a large policy set must not hold the loop
        for key in touched - more:
            self._policies.upsert(calculation.newer_row(key))
        self._many_came |= len(dirty) >= _MANY_SUBJECTS

    def _regenerate_wired(self) -> None:
        """Endpoints whose wire came up: their policy was made meanwhile, or is made now."""
        for number in self._wired:
            endpoint = self._endpoints.table.get(number)
            key = self.calculation.subject_of(endpoint) if endpoint is not None else None
            if key is None:
                continue
            if key in self._held or key in self._subject_errors or self._done(key) is None:
                self.calculation.mark_dirty([key])
            else:
                self._regenerating(number)
        self._wired.clear()

    def _regenerating(self, number: EndpointID) -> None:
        endpoint = self._endpoints.table.get(number)
        if endpoint is None or endpoint.state is EndpointState.CREATING:
            return
        if endpoint.state is EndpointState.READY:
            self._endpoints.move(
                number, EndpointState.WAITING_TO_REGENERATE, "Policy inputs changed"
            )
        self._endpoints.move(
            number, EndpointState.REGENERATING, "Policy is being resolved", builder=True
        )

    def _note_policy_errors(self) -> None:
        errors = self.policymap.errors
        for status in self.policymap.statuses:
            if status.state is State.DONE and not status.deleting:
                self._subject_errors.pop(status.key, None)
        for key, message in errors.items():
            self._subject_errors[key] = message
        for key in [key for key in self._subject_errors if self._forgotten(key)]:
            del self._subject_errors[key]

    def _forgotten(self, key: SubjectKey) -> bool:
        return key not in self.calculation.subjects and self._policies.get(key) is None

    def _done(self, key: SubjectKey) -> PolicyMapRow | None:
        """The subject's row if its slot holds it."""
        status = self.policymap.statuses.get(key)
        if status is None or status.state is not State.DONE or status.deleting:
            return None
        return self._policies.get(key)

    def _adopt_policies(self) -> None:
        """Endpoints whose policy is in its slot take it over."""
        for endpoint in self._look():
            key = self.calculation.subject_of(endpoint)
            if key is None or endpoint.state in CLOSING:
                continue
            row = self._done(key)
            if row is None:
                continue
            self._endpoints.update(
                endpoint.id,
                realised_identity=key.identity,
                realised=key,
                slot=row.slot,
                entries=row.size,
                ingress_enforced=row.ingress_enforced,
                egress_enforced=row.egress_enforced,
            )

    async def _flush_ipcache(self, *, prune: bool) -> None:
        endpoints = {e.id: e for e in self._endpoints if e.state not in CLOSING}
        prefixes = self.calculation.cidrs.take_changed()
        others = (self._ips_version, self.calculation.host_addresses)
        self._many_came |= len(prefixes) >= _MANY_PREFIXES
        if others == self._ipcache_others and self._put_endpoints(endpoints):
            self._put_prefixes(prefixes)
        else:
            wanted = self.calculation.ipcache(
                node=self._node, endpoints=endpoints.values(), cluster=self._view.ips
            )
            self._ipcache.replace_all(wanted.values())
        self._ipcache_others, self._ipcache_endpoints = others, endpoints
        if prune:
            self._ipcache.mark_synced()
        await self.ipcache.flush()

    def _put_prefixes(self, prefixes: Iterable[Network]) -> None:
        """Change the rows of prefixes that got or lost a number. The table is current but for
        these, so a row of another source is one of higher rank and stays."""
        numbers = self.calculation.cidrs.numbers
        puts = []
        for prefix in prefixes:
            present = self._ipcache.get(prefix)
            if present is not None and present.source != "cidr":
                continue
            number = numbers.get(prefix)
            if number is not None:
                puts.append(IpcacheRow(prefix=prefix, identity=number, source="cidr"))
            elif present is not None:
                self._ipcache.delete(prefix)
        self._ipcache.upsert_all(puts)

    def _put_endpoints(self, endpoints: Mapping[EndpointID, Endpoint]) -> bool:
        """Change the rows of those that changed, and those alone; False when another source speaks
        of such a prefix, too: then rank decides, over all there is."""
        before = self._ipcache_endpoints
        gone: dict[Network, IpcacheRow] = {}
        puts: dict[Network, IpcacheRow] = {}
        for number in before.keys() | endpoints.keys():
            old, new = before.get(number), endpoints.get(number)
            if old is new:
                continue
            of = self.calculation.ipcache_of
            was = of(old) if old is not None else []
            now = of(new) if new is not None else []
            if was != now:
                gone.update((row.prefix, row) for row in was)
                puts.update((row.prefix, row) for row in now)
        for prefix in gone.keys() | puts.keys():
            present = self._ipcache.get(prefix)
            entry = self._view.ips.get(str(prefix))
            if (
                (present is not None and present.source != "endpoint")
                or (entry is not None and entry.node != self._node)
                or prefix in self.calculation.cidrs.numbers
            ):
                return False
        for prefix in gone.keys() - puts.keys():
            self._ipcache.delete(prefix)
        self._ipcache.upsert_all(puts.values())
        return True

    async def _flush_endpoint_rows(self, *, prune: bool) -> None:
        for endpoint in self._look():
            if endpoint.state in CLOSING:
                self._rows.delete(endpoint.id)
                continue
            row = self._row_of(endpoint)
            if row is not None:
                self._rows.upsert(row)
        begins = self._put_node_row()
        if begins and self._before_node is not None:
            await self._before_node()
        if prune:
            self._rows.mark_synced()
        await self.endpointmap.flush()
        if begins and self._before_node is not None:
            await self._before_node()  # what began meanwhile

    def _put_node_row(self) -> bool:
        """The node's row follows its policy; True when from here on it is judged, and was not."""
        if self._node_key is None:
            self._rows.delete(HOST_ID)
            return False
        policy = self._done(self._node_key)
        if policy is None:
            return False  # what is in force, or nothing, stays
        self._rows.upsert(
            EndpointMapRow(
                id=HOST_ID,
                ifindex=0,
                identity=HOST,
                slot=policy.slot,
                flags=EP_F_OPEN | EP_F_HOST | (EP_F_AUDIT if self._node_key.audit else 0),
                mac=bytes(6),
                node_mac=bytes(6),
                ipv4=None,
                ipv6=None,
            )
        )
        return not self.endpointmap.has_node

    def _row_of(self, endpoint: Endpoint) -> EndpointMapRow | None:
        """None while there is nothing to say, or only what an earlier run has said already."""
        if not endpoint.ifindex:
            return None
        if endpoint.realised is None or not endpoint.wired:
            if endpoint.state is EndpointState.RESTORING or (endpoint.wired and endpoint.open):
                return None
            flags, identity, slot = 0, endpoint.identity or NumericIdentity(0), endpoint.slot
        else:
            flags = EP_F_OPEN | (EP_F_AUDIT if endpoint.realised.audit else 0)
            identity, slot = endpoint.realised.identity, endpoint.slot
        return EndpointMapRow(
            id=endpoint.id,
            ifindex=endpoint.ifindex,
            identity=identity,
            slot=slot,
            flags=flags,
            mac=endpoint.mac,
            node_mac=endpoint.node_mac,
            ipv4=endpoint.ipv4,
            ipv6=endpoint.ipv6,
        )

    async def write_closed(self, number: EndpointID) -> None:
        """The row of a new endpoint before anything else of it exists in the kernel: it drops."""
        row = self._row_of(self._endpoints.get(number))
        if row is not None:
            assert not row.flags & EP_F_OPEN
            self._rows.upsert(row)
            await self.endpointmap.flush()

    async def close(self, number: EndpointID) -> None:
        """Take the endpoint's rows away: from here on its packets are dropped."""
        self._rows.delete(number)
        await self.endpointmap.flush()

    def _settle_endpoints(self, revision: int) -> None:
        self._regenerate_wired()  # the rows were written with those of which it became known since
        for wrong in self._subject_errors_told | self._subject_errors.keys():
            self._current.update(self._users_of(wrong))
        self._subject_errors_told = set(self._subject_errors)
        for endpoint in self._look():
            key = self.calculation.subject_of(endpoint)
            if key is None or endpoint.state in CLOSING:
                continue
            status = self.endpointmap.statuses.get(endpoint.id)
            error = self._subject_errors.get(key, "")
            if not error and status is not None and status.state is State.ERROR:
                error = f"endpoint row: {status.message}"
            row = self._rows.get(endpoint.id)
            opened = (
                endpoint.wired
                and endpoint.realised is not None
                # Wired since the rows were written, it has a closed one still.
                and row is not None
                and bool(row.flags & EP_F_OPEN)
                and status is not None
                and status.state is State.DONE
            )
            if error:
                # It is behind, also where no document changed but whom they select did.
                behind = max(0, min(self._flushed_revision, revision - 1))
                self._kept_revision.setdefault(endpoint.id, behind)
            else:
                self._kept_revision.pop(endpoint.id, None)
            self._endpoints.fail(endpoint.id, error)
            if opened != endpoint.open:
                self._endpoints.update(endpoint.id, open=opened)
            if endpoint.state in (EndpointState.REGENERATING,) and (opened or error):
                self._endpoints.move(
                    endpoint.id,
                    EndpointState.READY,
                    error or f"Policy of revision {revision} is in force",
                    builder=True,
                    code="Failure" if error else "OK",
                )
                metrics.REGENERATIONS.labels("fail" if error else "success").inc()
                self._notifier.endpoint_regenerated(
                    endpoint.id,
                    endpoint.name,
                    endpoint.namespace,
                    endpoint.identity_labels,
                    error,
                )
        if self._node_key is not None and self._node_key in self._subject_errors:
            behind = max(0, min(self._flushed_revision, revision - 1))
            self._kept_revision.setdefault(HOST_ID, behind)
        else:
            self._kept_revision.pop(HOST_ID, None)
        for number in [n for n in self._kept_revision if n not in self._endpoints.table]:
            if number != HOST_ID:
                del self._kept_revision[number]
        self._current.clear()

    async def _free_slots(self) -> None:
        """Subjects that no endpoint has, wants or is still held to by a failed change."""
        needed = set(self.calculation.subjects)
        # One that is being deleted has had its rows taken away; where that failed they hold it.
        needed.update(e.realised for e in self._endpoints if e.realised and e.state not in CLOSING)
        idle = [row.subject for row in self._policies if row.subject not in needed]
        if idle or self.calculation.slots.held:
            # A row that could not be written leads to its old slot still.
            led_to = self.endpointmap.slots()
            idle = [key for key in idle if self.calculation.slots.get(key) not in led_to]
            if self.calculation.slots.unhold(led_to):
                self.policymap.trigger_prune()
        for key in idle:
            self._policies.delete(key)
            self._subject_errors.pop(key, None)
        # Only now: what an earlier run left goes, but for slots that rows of endpoints lead to.
        self._policies.mark_synced()
        await self.policymap.flush()
        for key in idle:
            if self.policymap.statuses.get(key) is None:
                self.calculation.slots.free(key)

    # ---- host addresses

    def set_host_addresses(self, addresses: frozenset[IPv4Address | IPv6Address]) -> bool:
        """The node's own addresses; True when they changed."""
        if addresses == self.calculation.host_addresses:
            return False
        self.calculation.host_addresses = addresses
        return True
