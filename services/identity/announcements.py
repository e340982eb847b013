"""Which identity is behind which address, as the nodes announce it under their leases."""

from __future__ import annotations

from collections.abc import Sequence

from cilia.errors import ConflictError, DomainError, Kind
from cilia.kv.backend import (
    Backend,
    Delete,
    KeyValue,
    LeaseID,
    LeaseNotFound,
    Op,
    Put,
    RangeResult,
    Span,
    Txn,
    get,
    unchanged,
)
from services.identity.keys import ip_key
from services.identity.records import IpEntry
from services.identity.sessions import Sessions

_ATTEMPTS = 16


class AddressConflict(ConflictError):
    """The address belongs to another node."""

    def __init__(self, prefix: str, owner: str) -> None:
        super().__init__(
            f"{prefix} is announced by node {owner}",
            cure="Give the nodes address pools that do not overlap, or wait until the lease of "
            f"{owner} has ended",
        )


class AnnouncementContended(DomainError):
    default_kind = Kind.ABORTED

    def __init__(self) -> None:
        super().__init__("the addresses kept changing while they were announced")


class Announcements:
    def __init__(self, *, backend: Backend, sessions: Sessions) -> None:
        self._backend = backend
        self._sessions = sessions

    async def announce(self, node: str, put: Sequence[IpEntry], withdraw: Sequence[str]) -> int:
        """Publishes and withdraws; returns the revision. Withdrawing what is not there succeeds,
        and so does withdrawing what another node announces: it is left alone.

        Whatever fits one transaction is all or nothing; more is done in steps of that size, after
        all of it was looked at for conflicts. Raises AddressConflict, NoSession.
        """
        lease = await self._sessions.lease_of(node)
        wanted: dict[bytes, IpEntry | None] = {ip_key(prefix): None for prefix in withdraw}
        wanted |= {ip_key(entry.prefix): entry for entry in put}
        step = self._backend.limits.max_txn_ops
        keys = list(wanted)
        steps = [keys[start : start + step] for start in range(0, len(keys), step)]
        for part in steps:
            self._check(node, wanted, await self._read(part))
        revision = self._backend.revision
        for part in steps:
            try:
                revision = await self._write(node, lease, {key: wanted[key] for key in part})
            except LeaseNotFound:
                raise self._sessions.forget(node) from None
        return revision

    async def _write(self, node: str, lease: LeaseID, wanted: dict[bytes, IpEntry | None]) -> int:
        for _ in range(_ATTEMPTS):
            present = await self._read(list(wanted))
            self._check(node, wanted, present)
            ops: list[Op] = []
            touched: list[bytes] = []
            for key, entry in wanted.items():
                old = present.get(key)
                if entry is None:
                    if old is None or _owner(old) != node:
                        continue
                    ops.append(Delete(Span.key(key)))
                else:
                    value = entry.to_json()
                    if old is not None and old.value == value and old.lease == lease:
                        continue
                    ops.append(Put(key, value, lease))
                touched.append(key)
            if not ops:
                return self._backend.revision
            compares = tuple(
                unchanged(key, old.mod_revision if (old := present.get(key)) else 0)
                for key in touched
            )
            result = await self._backend.txn(Txn(compares, success=tuple(ops)))
            if result.succeeded:
                return result.revision
        raise AnnouncementContended

    async def _read(self, keys: Sequence[bytes]) -> dict[bytes, KeyValue]:
        result = await self._backend.txn(Txn(success=tuple(get(key) for key in keys)))
        return {
            kv.key: kv
            for part in result.results
            if isinstance(part, RangeResult)
            for kv in part.kvs
        }

    @staticmethod
    def _check(
        node: str, wanted: dict[bytes, IpEntry | None], present: dict[bytes, KeyValue]
    ) -> None:
        for key, kv in present.items():
            entry = wanted[key]
            if entry is not None and (owner := _owner(kv)) != node:
                raise AddressConflict(entry.prefix, owner)


def _owner(kv: KeyValue) -> str:
    return IpEntry.from_json("", kv.value).node
