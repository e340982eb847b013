"""The endpoints of this node and how each got where it is: the table's one writer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import structlog

from cilia.identity import EndpointID
from cilia.table import ReadTable, Table
from cilia.telemetry import fields
from services.agent.endpoint import (
    MAX_ENDPOINT_ID,
    Endpoint,
    EndpointExists,
    EndpointNotFound,
    EndpointNumbersExhausted,
    EndpointState,
    LogCode,
    StatusLog,
    may_move,
    silently_refused,
)

log = structlog.get_logger()


class Endpoints:
    """Table and status logs together, so that no change of state goes unrecorded."""

    def __init__(self) -> None:
        self._table: Table[EndpointID, Endpoint] = Table(
            "endpoints",
            key=lambda endpoint: endpoint.id,
            indexes={
                "name": lambda endpoint: (endpoint.qualified_name,),
                "address": lambda endpoint: endpoint.addresses,
                "wire": lambda endpoint: ((endpoint.netns_inode, endpoint.interface),),
                "host_interface": lambda endpoint: (endpoint.host_interface,),
            },
        )
        self._logs: dict[EndpointID, StatusLog] = {}
        self._next = 1

    @property
    def table(self) -> ReadTable[EndpointID, Endpoint]:
        return self._table.reader()

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._table)

    def free_id(self) -> EndpointID:
        """A number no endpoint has, going round. Raises EndpointNumbersExhausted."""
        if len(self._table) >= MAX_ENDPOINT_ID:
            raise EndpointNumbersExhausted
        while EndpointID(self._next) in self._table:
            self._next = self._next % MAX_ENDPOINT_ID + 1
        number = EndpointID(self._next)
        self._next = self._next % MAX_ENDPOINT_ID + 1
        return number

    def insert(self, endpoint: Endpoint, message: str) -> Endpoint:
        """Raises EndpointExists."""
        if self._table.by("name", endpoint.qualified_name):
            other = self._table.by("name", endpoint.qualified_name)[0]
            raise EndpointExists(
                f"there is an endpoint {endpoint.qualified_name} already (id {other.id})",
                cure="Delete it first, or give another name or namespace",
            )
        if wired := self._table.by("wire", (endpoint.netns_inode, endpoint.interface)):
            raise EndpointExists(
                f"interface {endpoint.interface} of {endpoint.netns} belongs to endpoint "
                f"{wired[0].qualified_name} (id {wired[0].id})",
                cure="Delete that endpoint first, or give another --interface",
            )
        self._table.upsert(endpoint)
        self._logs[endpoint.id] = StatusLog()
        self._logs[endpoint.id].add("OK", endpoint.state, message)
        return endpoint

    def remove(self, number: EndpointID) -> None:
        self._table.delete(number)
        self._logs.pop(number, None)

    def get(self, number: EndpointID) -> Endpoint:
        """Raises EndpointNotFound."""
        endpoint = self._table.get(number)
        if endpoint is None:
            raise EndpointNotFound(str(number))
        return endpoint

    def find(self, *, name: str = "", address: str = "", number: int = 0) -> Endpoint:
        """By one of them; a name without namespace is one of `default`. Raises EndpointNotFound."""
        if number:
            return self.get(EndpointID(number))
        if address:
            try:
                found = self._table.by("address", ip_address(address))
            except ValueError:
                found = ()
            if not found:
                raise EndpointNotFound(f"with address {address}")
            return found[0]
        if not name:
            raise EndpointNotFound("without an id, a name or an address")
        qualified = name if "/" in name else f"default/{name}"
        named = self._table.by("name", qualified)
        if not named:
            raise EndpointNotFound(qualified)
        return named[0]

    def named_interface(self, name: str) -> Iterable[Endpoint]:
        """Those whose interface on the node has this name."""
        return self._table.by("host_interface", name)

    def update(self, number: EndpointID, **changes: Any) -> Endpoint:
        """Replace fields of the row. Raises EndpointNotFound."""
        endpoint = self.get(number)
        # Every flush says of every endpoint what is so already; making the row anew costs more.
        if all(getattr(endpoint, name) == value for name, value in changes.items()):
            return endpoint
        endpoint = replace(endpoint, **changes)
        self._table.upsert(endpoint)
        return endpoint

    def note(self, number: EndpointID, code: LogCode, message: str) -> None:
        if number in self._logs:
            self._logs[number].add(code, self.get(number).state, message)

    def move(
        self,
        number: EndpointID,
        state: EndpointState,
        why: str,
        *,
        builder: bool = False,
        code: LogCode = "OK",
        **changes: Any,
    ) -> bool:
        """Go to a state if there is such an edge; what cannot be is logged and skipped.

        `code` is that of the entry in the endpoint's log: a move may be the end of what failed.
        """
        endpoint = self.get(number)
        if not may_move(endpoint.state, state, builder=builder):
            if not silently_refused(endpoint.state, state):
                self.note(
                    number,
                    "Warning",
                    f"Skipped invalid state transition to {state} due to: {why}",
                )
            if changes:
                self.update(number, **changes)
            return False
        self._table.upsert(replace(endpoint, state=state, **changes))
        self.note(number, code, why)
        log.debug(
            "An endpoint changed its state.",
            **{
                fields.ENDPOINT_ID: number,
                fields.ENDPOINT_STATE: str(state),
                fields.REASON: why,
            },
        )
        return True

    def fail(self, number: EndpointID, message: str) -> None:
        """Say why an endpoint is not as it should be. The same message twice is one entry."""
        endpoint = self._table.get(number)
        if endpoint is None or endpoint.message == message:
            return
        self._table.upsert(replace(endpoint, message=message))
        if message:
            self.note(number, "Failure", message)

    def log_of(self, number: EndpointID) -> StatusLog:
        self.get(number)
        return self._logs[number]
