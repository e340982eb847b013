"""Identities: reserved ones by their fixed numbers, the rest from the store."""

from __future__ import annotations

from dataclasses import dataclass

from cilia.errors import InvalidError, NotFoundError
from cilia.identity import (
    RESERVED,
    NumericIdentity,
    is_reserved,
    reserved_identity,
    reserved_labels,
)
from cilia.kv.allocator import ID_PREFIX, Allocation, Allocator
from cilia.kv.backend import Backend, LeaseNotFound, Span
from cilia.labels import SOURCE_CIDR, SOURCE_RESERVED, Label, Labels
from services.identity.keys import identity_of
from services.identity.sessions import Sessions


class IdentityNotFound(NotFoundError):
    def __init__(self, what: str) -> None:
        super().__init__(f"there is no identity {what}", cure="See `cilia identity list`")


class LabelsNotAllocatable(InvalidError):
    """The labels can have no cluster identity."""


@dataclass(frozen=True, slots=True)
class Identity:
    id: NumericIdentity
    labels: Labels


class Identities:
    def __init__(self, *, backend: Backend, allocator: Allocator, sessions: Sessions) -> None:
        self._backend = backend
        self._allocator = allocator
        self._sessions = sessions

    async def allocate(self, node: str, labels: Labels) -> Allocation:
        """Raises LabelsNotAllocatable, NoSession, IdentitySpaceExhausted, BackendUnavailable."""
        reserved = reserved_identity(labels)
        if reserved is not None:
            return Allocation(reserved, False, self._backend.revision)
        for label in labels:
            if label.source in (SOURCE_RESERVED, SOURCE_CIDR):
                raise LabelsNotAllocatable(
                    f"labels: {label} cannot be part of a cluster identity",
                    cure="Labels of the sources reserved and cidr are given by the suite itself",
                )
        lease = await self._sessions.lease_of(node)
        try:
            return await self._allocator.allocate(labels, node=node, lease=lease)
        except LeaseNotFound:
            raise self._sessions.forget(node) from None

    async def release(self, node: str, identity: int) -> int:
        """Drops the node's reference and returns the revision; success when there was none."""
        labels = None if is_reserved(identity) else await self._allocator.labels_of(identity)
        if labels is None:
            return self._backend.revision
        return await self._allocator.release(labels, node=node)

    async def by_id(self, identity: int) -> tuple[Identity, tuple[str, ...]]:
        """With the nodes that hold a reference. Raises IdentityNotFound."""
        if identity in RESERVED:
            return Identity(NumericIdentity(identity), reserved_labels(identity)), ()
        labels = await self._allocator.labels_of(identity)
        if labels is None:
            raise IdentityNotFound(str(identity))
        return Identity(NumericIdentity(identity), labels), await self._allocator.nodes_of(labels)

    async def by_labels(self, labels: Labels) -> tuple[Identity, tuple[str, ...]]:
        """Raises IdentityNotFound."""
        found = reserved_identity(labels)
        if found is not None:
            return Identity(found, reserved_labels(found)), ()
        found = await self._allocator.find(labels)
        if found is None:
            raise IdentityNotFound(f"of the labels {labels}")
        return Identity(found, labels), await self._allocator.nodes_of(labels)

    async def list(self, wanted: Labels) -> tuple[list[Identity], int]:
        """Those that carry all the wanted labels, by number, and the revision."""
        found = [
            identity
            for identity in (Identity(n, reserved_labels(n)) for n in RESERVED)
            if _carries(identity.labels, wanted)
        ]
        stored = await self._backend.range(Span.prefix(ID_PREFIX))
        # Cheap exclusion before labels are parsed; sources may be `any`, so keys and values only.
        needles = [f":{label.key}={label.value};".encode() for label in wanted]
        allocated = []
        for kv in stored.kvs:
            if all(needle in kv.value for needle in needles):
                labels = Labels.from_canonical(kv.value)
                if _carries(labels, wanted):
                    allocated.append(Identity(NumericIdentity(identity_of(kv.key)), labels))
        allocated.sort(key=lambda identity: identity.id)
        return found + allocated, stored.revision


def _carries(labels: Labels, wanted: Labels) -> bool:
    return all(_has(labels, label) for label in wanted)


def _has(labels: Labels, wanted: Label) -> bool:
    found = labels.get(wanted.key, wanted.source)
    return found is not None and found.value == wanted.value
