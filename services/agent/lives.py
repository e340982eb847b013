"""The lives of endpoints: added, relabelled, configured, deleted. Every order here is a promise.

Adding, with no moment at which a packet could pass unjudged:

    validate -> reserve id and addresses
      -> record `creating`
        -> interface made and moved, still down -> programs attached (no open row: they drop)
          -> closed row -> addresses, routes, neighbours; up
            -> open row -> record `ready`

and beside all of that, needing none of it until the row is opened:

    identity -> policy in its slot -> ipcache
             -> announced

What a kill leaves of the latter goes without a record: slots and prefixes that nobody has are
pruned, announcements have a lease. Both wait for the kernel, the disk and the identity service most
of the time, and so they wait together.
A step that fails undoes all that came before it. Deleting is closing first, and giving the
addresses back last, when no connection of theirs is left:

    closed -> ipcache, announcement -> interface -> conntrack purged -> record -> addresses freed
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import structlog

from cilia.controller import Controller, ControllerSet, describe
from cilia.errors import DomainError
from cilia.identity import EndpointID, NumericIdentity, reserved_labels
from cilia.labels import SOURCE_CIDR, SOURCE_K8S, SOURCE_RESERVED, Label, LabelFilter, Labels
from cilia.policy.l7 import PortNames
from cilia.telemetry import fields
from services.agent import metrics
from services.agent.clients import IdentityUnavailable
from services.agent.conntrack import Conntrack
from services.agent.datapath import Datapath
from services.agent.endpoint import (
    CLUSTER_LABEL,
    NAMESPACE_LABEL,
    Endpoint,
    EndpointBusy,
    EndpointFailed,
    EndpointInvalid,
    EndpointOptions,
    EndpointState,
    check_port_names,
)
from services.agent.endpointtable import Endpoints
from services.agent.identityalloc import IdentityAllocator
from services.agent.ipam import Ipam
from services.agent.notifications import Notifier
from services.agent.record import EndpointRecords
from services.agent.regeneration import NO_POLICY_SET, Regeneration
from services.agent.session import Announcer
from services.agent.wiring import Wiring

log = structlog.get_logger()

INIT_LABELS: Final = reserved_labels(5)
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\Z")
_INTERFACE: Final = re.compile(r"[^\s/:]{1,15}\Z")  # dev_valid_name() in net/core/dev.c


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    name: str
    namespace: str
    labels: Labels
    netns: str
    interface: str
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    ports: PortNames = ()
    options: EndpointOptions = field(default_factory=EndpointOptions)
    wait: bool = True


async def _both(*steps: Awaitable[None]) -> None:
    """Takes the steps at once, each to its end; then raises what the first to fail raised.

    None is cancelled for the other's sake: what it does in a thread would go on behind its undoing.
    """
    errors: list[DomainError | OSError] = []

    async def take(step: Awaitable[None]) -> None:
        try:
            await step
        except (DomainError, OSError) as error:
            errors.append(error)

    async with asyncio.TaskGroup() as group:
        for step in steps:
            group.create_task(take(step))
    if errors:
        raise errors[0]


class EndpointLives:
    """The one place where endpoints begin, change and end."""

    def __init__(
        self,
        *,
        endpoints: Endpoints,
        ipam: Ipam,
        records: EndpointRecords,
        allocator: IdentityAllocator,
        regeneration: Regeneration,
        regenerate: Controller,
        controllers: ControllerSet,
        wiring: Wiring,
        datapath: Datapath,
        conntrack: Conntrack,
        announcer: Announcer,
        notifier: Notifier,
        label_filter: LabelFilter,
        cluster: str,
        add_timeout_s: float,
        identity_retry_s: float,
    ) -> None:
        self._endpoints = endpoints
        self._ipam = ipam
        self._records = records
        self._allocator = allocator
        self._regeneration = regeneration
        self._regenerate = regenerate
        self._controllers = controllers
        self._wiring = wiring
        self._datapath = datapath
        self._conntrack = conntrack
        self._announcer = announcer
        self._notifier = notifier
        self._filter = label_filter
        self._cluster = cluster
        self._add_timeout_s = add_timeout_s
        self._identity_retry_s = identity_retry_s
        self._locks: dict[EndpointID, asyncio.Lock] = {}

    # ---- labels

    def identity_labels(self, namespace: str, labels: Labels) -> Labels:
        """The labels that make the identity; without any of its own it is reserved:init."""
        if not len(labels):
            return INIT_LABELS
        chosen, _ = self._filter.split(labels)
        return chosen.merge(
            [
                Label(SOURCE_K8S, NAMESPACE_LABEL, namespace),
                Label(SOURCE_K8S, CLUSTER_LABEL, self._cluster),
            ]
        )

    def _check_labels(self, namespace: str, labels: Labels) -> None:
        for label in labels:
            if label.source in (SOURCE_RESERVED, SOURCE_CIDR):
                raise EndpointInvalid(
                    f"label {label}: not allowed to add {label.source} labels to an endpoint",
                    cure="Use another source, or none",
                )
            if label.key == NAMESPACE_LABEL and label.value != namespace:
                raise EndpointInvalid(
                    f"label {label} contradicts namespace {namespace}",
                    cure="Give the namespace alone, by --namespace",
                )
            if label.key == CLUSTER_LABEL and label.value != self._cluster:
                raise EndpointInvalid(
                    f"label {label} contradicts the cluster's name {self._cluster}",
                    cure="Leave it out: every endpoint gets it",
                )

    # ---- add

    async def add(self, request: AddRequest) -> Endpoint:
        """Returns when policy is in force; without `wait`, when attached and dropping.

        Raises DomainErrors; then nothing of the endpoint is left.
        """
        started = time.monotonic()
        for what, text in (("name", request.name), ("namespace", request.namespace)):
            if not _NAME.match(text):
                raise EndpointInvalid(
                    f"{text!r} cannot be the {what} of an endpoint",
                    cure="Use letters, digits, '-', '_' and '.', at most 253",
                )
        if not _INTERFACE.match(request.interface) or request.interface in (".", "..", "lo"):
            raise EndpointInvalid(
                f"{request.interface!r} cannot be the name of an interface",
                cure="Use at most 15 characters without blanks, '/' and ':'",
            )
        self._check_labels(request.namespace, request.labels)
        check_port_names(request.ports)
        inode = await self._wiring.check_netns(request.netns)
        async with AsyncExitStack() as undo:
            endpoint = self._prepare(request, inode, undo)
            await _both(self._wire(endpoint.id, undo), self._start_identity(endpoint.id, undo))
            if request.wait:
                await self._wait_open(endpoint.id)
            endpoint = self._endpoints.get(endpoint.id)
            await self._datapath.run(self._records.save, endpoint)
            undo.pop_all()
        self._notifier.endpoint_created(
            endpoint.id, endpoint.name, endpoint.namespace, endpoint.identity_labels
        )
        metrics.ADD_SECONDS.observe(time.monotonic() - started)
        log.info(
            "An endpoint was added.",
            **{
                fields.ENDPOINT_ID: endpoint.id,
                fields.ENDPOINT_NAME: endpoint.qualified_name,
                fields.IDENTITY: endpoint.identity,
                fields.IPV4: str(endpoint.ipv4),
                fields.IPV6: str(endpoint.ipv6),
                fields.DURATION_S: round(time.monotonic() - started, 4),
            },
        )
        return self._endpoints.get(endpoint.id)

    def _prepare(self, request: AddRequest, inode: int, undo: AsyncExitStack) -> Endpoint:
        number = self._endpoints.free_id()
        endpoint = Endpoint(
            id=number,
            name=request.name,
            namespace=request.namespace,
            labels=request.labels,
            identity_labels=self.identity_labels(request.namespace, request.labels),
            netns=request.netns,
            netns_inode=inode,
            interface=request.interface,
            host_interface=f"cil{number:05d}",
            ports=request.ports,
            options=request.options,
            state=EndpointState.CREATING,
        )
        undo.callback(self._regenerate.trigger)  # what was told of it is withdrawn
        self._endpoints.insert(endpoint, "Endpoint is being created")
        undo.callback(self._endpoints.remove, number)
        ipv4, ipv6 = self._ipam.allocate(
            endpoint.qualified_name, ipv4=request.ipv4, ipv6=request.ipv6
        )
        undo.push_async_callback(self._free_addresses, (ipv4, ipv6))
        return self._endpoints.update(number, ipv4=ipv4, ipv6=ipv6)

    async def _wire(self, number: EndpointID, undo: AsyncExitStack) -> None:
        endpoint = self._endpoints.get(number)
        undo.push_async_callback(self._datapath.run, self._records.remove, number)
        await self._datapath.run(self._records.save, endpoint, creating=True)
        undo.push_async_callback(self._wiring.remove, endpoint)
        made = await self._wiring.create(endpoint)
        endpoint = self._endpoints.update(
            number, ifindex=made.ifindex, mac=made.mac, node_mac=made.node_mac
        )
        undo.push_async_callback(self._regeneration.close, number)
        await self._regeneration.write_closed(number)
        await self._wiring.connect(endpoint)
        self._endpoints.update(number, wired=True)
        self._endpoints.move(
            number, EndpointState.WAITING_FOR_IDENTITY, "Interface is up, packets are dropped"
        )
        endpoint = self._endpoints.get(number)
        if endpoint.identity is not None:
            self._regeneration.wired(number)
            self._hand_over(number)

    async def _start_identity(self, number: EndpointID, undo: AsyncExitStack | None) -> None:
        name = f"resolve-identity-{number}"
        if undo is not None:
            undo.push_async_callback(self._drop_identity, number)
            undo.push_async_callback(self._controllers.remove, name)
        try:
            await self.resolve_identity(number)
        except IdentityUnavailable as error:
            self._endpoints.fail(number, f"waiting for an identity: {describe(error)}")
            self.retry_identity(number)
        else:
            if undo is not None:
                # Others may send already: until the row is opened it is dropped here.
                await self._push_announcements()

    def retry_identity(self, number: EndpointID) -> None:
        """Try again until the identity service answers."""
        name = f"resolve-identity-{number}"
        if self._controllers.get(name) is not None:
            self._controllers.trigger(name)
            return

        async def attempt() -> None:
            if number in self._endpoints.table:
                await self.resolve_identity(number)

        self._controllers.add(
            Controller(
                name, attempt, retry_s=self._identity_retry_s, retry_max_s=5.0, resync_s=None
            )
        )

    async def resolve_identity(self, number: EndpointID) -> None:
        """Give the endpoint the identity that its labels make. Idempotent.

        Raises IdentityUnavailable; then the identity it has, if any, stays in force.
        """
        endpoint = self._endpoints.get(number)
        wanted = self.identity_labels(endpoint.namespace, endpoint.labels)
        if endpoint.identity is not None and wanted == endpoint.identity_labels:
            if endpoint.state is EndpointState.WAITING_FOR_IDENTITY:
                self._endpoints.move(number, EndpointState.READY, "Identity is known")
            return
        identity = await self._allocator.acquire(wanted)
        endpoint = self._endpoints.get(number)
        if self.identity_labels(endpoint.namespace, endpoint.labels) != wanted or (
            endpoint.state in (EndpointState.DISCONNECTING, EndpointState.DISCONNECTED)
        ):
            self._allocator.release(wanted)  # the labels moved on meanwhile
            return
        old = endpoint.identity_labels if endpoint.identity is not None else None
        self._endpoints.update(number, identity=identity, identity_labels=wanted, message="")
        if old is not None:
            self._allocator.release(old)
        if endpoint.state is EndpointState.CREATING:
            self._regenerate.trigger()  # policy is made while the interface is
        else:
            self._hand_over(number)

    def _hand_over(self, number: EndpointID) -> None:
        """Its identity is known: what follows is regeneration's."""
        endpoint = self._endpoints.get(number)
        if endpoint.state is EndpointState.WAITING_FOR_IDENTITY:
            self._endpoints.move(number, EndpointState.READY, f"Identity is {endpoint.identity}")
        self._endpoints.move(number, EndpointState.WAITING_TO_REGENERATE, "Identity was set")
        self._regenerate.trigger()

    async def _drop_identity(self, number: EndpointID) -> None:
        endpoint = self._endpoints.table.get(number)
        if endpoint is not None and endpoint.identity is not None:
            self._allocator.release(endpoint.identity_labels)

    async def _wait_open(self, number: EndpointID) -> None:
        """Until policy is in force. Raises EndpointFailed when it cannot be, or not in time."""

        def settled() -> bool:
            endpoint = self._endpoints.table.get(number)
            if endpoint is None:
                raise EndpointBusy(f"endpoint {number} was deleted meanwhile")
            if endpoint.open and endpoint.state is EndpointState.READY:
                return True
            if endpoint.state is EndpointState.READY and endpoint.message:
                raise EndpointFailed(endpoint.message)
            return False

        try:
            async with asyncio.timeout(self._add_timeout_s):
                await self._endpoints.table.wait_until(lambda _: settled())
        except TimeoutError:
            endpoint = self._endpoints.get(number)
            why = endpoint.message
            if not why and not self._regeneration.synced:
                why = NO_POLICY_SET
            raise EndpointFailed(
                f"policy of {endpoint.qualified_name} was not in force within "
                f"{self._add_timeout_s:g} s: {why or 'the node is busy'}",
                cure="Start the identity service, or add it with --no-wait to let it wait",
            ) from None

    async def _free_addresses(self, addresses: tuple[IPv4Address, IPv6Address]) -> None:
        self._ipam.quarantine(addresses)
        await self._conntrack.purge(addresses)
        self._ipam.free(addresses)

    # ---- change

    @asynccontextmanager
    async def _alone(self, number: EndpointID) -> AsyncIterator[Endpoint]:
        """One change of an endpoint at a time. Raises EndpointNotFound, EndpointBusy."""
        lock = self._locks.setdefault(number, asyncio.Lock())
        async with lock:
            endpoint = self._endpoints.get(number)
            if endpoint.state in (EndpointState.CREATING, EndpointState.DISCONNECTING):
                raise EndpointBusy(f"endpoint {endpoint.qualified_name} is {endpoint.state}")
            yield endpoint

    async def set_labels(
        self, number: EndpointID, *, add: Labels, remove: Labels, wait: bool
    ) -> Endpoint:
        """New labels, so perhaps a new identity and policy; live connections are judged again."""
        async with self._alone(number) as endpoint:
            self._check_labels(endpoint.namespace, add)
            for label in remove:
                if (have := endpoint.labels.get(label.key)) is None or (
                    label.value and have != label
                ):
                    raise EndpointInvalid(
                        f"endpoint {endpoint.qualified_name} has no label {label}",
                        cure="See `cilia endpoint labels` for those it has",
                    )
            labels = endpoint.labels.without(label.key for label in remove).merge(add)
            if labels == endpoint.labels:
                return endpoint
            self._endpoints.update(number, labels=labels)
            self._endpoints.note(number, "OK", "Labels were changed")
            if self.identity_labels(endpoint.namespace, labels) != endpoint.identity_labels:
                self._endpoints.move(
                    number, EndpointState.WAITING_FOR_IDENTITY, "Labels make another identity"
                )
            await self._datapath.run(self._records.save, self._endpoints.get(number))
            await self._start_identity(number, None)
            if wait:
                await self._wait_in_force(number)
            await self._datapath.run(self._records.save, self._endpoints.get(number))
        return self._endpoints.get(number)

    async def set_options(self, number: EndpointID, changes: Mapping[str, str]) -> Endpoint:
        async with self._alone(number) as endpoint:
            options: EndpointOptions = endpoint.options.merged(changes)
            if options == endpoint.options:
                return endpoint
            self._endpoints.update(number, options=options)
            self._endpoints.note(number, "OK", "Options were changed")
            await self._datapath.run(self._records.save, self._endpoints.get(number))
            await self._regenerate_and_wait(number)
        return self._endpoints.get(number)

    async def regenerate(self, number: EndpointID) -> Endpoint:
        """Resolve and write its policy again, whatever is thought to be there."""
        async with self._alone(number) as endpoint:
            subject = self._regeneration.calculation.subject_of(endpoint)
            if subject is not None:
                self._regeneration.force(subject)
            await self._regenerate_and_wait(number)
        return self._endpoints.get(number)

    async def _regenerate_and_wait(self, number: EndpointID) -> None:
        try:
            async with asyncio.timeout(self._add_timeout_s):
                await self._regenerate.wait_success()
        except TimeoutError:
            endpoint = self._endpoints.get(number)
            raise EndpointFailed(
                f"policy of {endpoint.qualified_name} was not renewed within "
                f"{self._add_timeout_s:g} s: {self._regenerate.status().last_error or 'busy'}"
            ) from None

    async def _wait_in_force(self, number: EndpointID) -> None:
        """Until the kernel's row has the endpoint's identity, or it is known why not."""

        def settled() -> bool:
            endpoint = self._endpoints.table.get(number)
            if endpoint is None:
                return True
            if endpoint.state is EndpointState.READY and endpoint.message:
                return True
            return (
                endpoint.state is EndpointState.READY
                and endpoint.identity == endpoint.realised_identity
            )

        try:
            async with asyncio.timeout(self._add_timeout_s):
                await self._endpoints.table.wait_until(lambda _: settled())
        except TimeoutError:
            endpoint = self._endpoints.get(number)
            raise EndpointFailed(
                f"the new labels of {endpoint.qualified_name} are not in force: "
                f"{endpoint.message or 'the node is busy'}",
                cure="They will be once the identity service answers; nothing needs to be repeated",
            ) from None

    # ---- delete

    async def delete(self, number: EndpointID) -> list[str]:
        """Ends an endpoint; returns what could not be cleaned up, for people."""
        lock = self._locks.setdefault(number, asyncio.Lock())
        async with lock:
            endpoint = self._endpoints.get(number)
            if endpoint.state is EndpointState.CREATING:
                raise EndpointBusy(f"endpoint {endpoint.qualified_name} is being created")
            errors = await self._end(endpoint)
        self._locks.pop(number, None)
        return errors

    async def _end(self, endpoint: Endpoint) -> list[str]:
        number = endpoint.id
        errors: list[str] = []
        await self._controllers.remove(f"resolve-identity-{number}")
        self._endpoints.move(number, EndpointState.DISCONNECTING, "Endpoint is being deleted")
        await self._regeneration.close(number)
        self._ipam.quarantine(endpoint.addresses)
        # Out of the ipcache, its identity out of the policies; then nobody knows it.
        await self._attempt(errors, "withdraw", self._regenerate.wait_success())
        await self._attempt(errors, "announcement", self._push_announcements())
        await self._attempt(errors, "interface", self._wiring.remove(endpoint))
        purged = await self._attempt(errors, "conntrack", self._conntrack.purge(endpoint.addresses))
        await self._attempt(errors, "record", self._datapath.run(self._records.remove, number))
        if endpoint.identity is not None:
            self._allocator.release(endpoint.identity_labels)
            self._controllers.trigger("identity-references")
        if purged:
            self._ipam.free(endpoint.addresses)
        else:
            self._controllers.trigger("address-quarantine")
        self._endpoints.move(number, EndpointState.DISCONNECTED, "Endpoint was deleted")
        self._endpoints.remove(number)
        self._notifier.endpoint_deleted(
            number, endpoint.name, endpoint.namespace, endpoint.identity_labels
        )
        log.info(
            "An endpoint was deleted.",
            **{fields.ENDPOINT_ID: number, fields.ENDPOINT_NAME: endpoint.qualified_name},
        )
        return errors

    async def _push_announcements(self) -> None:
        if not await self._announcer.try_push():
            self._controllers.trigger("announcements")

    async def _attempt(self, errors: list[str], what: str, step: object) -> bool:
        """Deleting goes on whatever one step says; what is left over is retried or reported."""
        try:
            async with asyncio.timeout(10):
                await step  # type: ignore[misc]  # any awaitable
        except (DomainError, OSError, TimeoutError) as error:
            errors.append(f"{what}: {describe(error)}")
            return False
        return True

    async def release_quarantine(self) -> None:
        """Purge and free what a failed delete left behind."""
        busy = {a for e in self._endpoints for a in e.addresses}
        for pool in self._ipam.pools:
            waiting = [a for a in pool.quarantined() if a not in busy]
            if waiting:
                await self._conntrack.purge(waiting)
                self._ipam.free(waiting)

    async def end_vanished(self) -> None:
        """Endpoints whose interface is gone: their namespace went, and they with it."""
        alive = await self._wiring.alive()
        for endpoint in list(self._endpoints):
            if not endpoint.wired or endpoint.state in (
                EndpointState.CREATING,
                EndpointState.DISCONNECTING,
            ):
                continue
            if alive.get(endpoint.host_interface) == endpoint.ifindex:
                continue
            again = await self._wiring.alive()  # it may have been made after the first look
            if again.get(endpoint.host_interface) != endpoint.ifindex:
                log.info(
                    "An endpoint's namespace is gone.",
                    **{
                        fields.ENDPOINT_ID: endpoint.id,
                        fields.ENDPOINT_NAME: endpoint.qualified_name,
                    },
                )
                await self.delete(endpoint.id)

    def identity_moved(self, labels: Labels, new: NumericIdentity) -> None:
        """The store was made anew and gave the set another number."""
        for endpoint in self._endpoints:
            if endpoint.identity_labels == labels and endpoint.identity is not None:
                self._endpoints.update(endpoint.id, identity=new)
        self._regenerate.trigger()
