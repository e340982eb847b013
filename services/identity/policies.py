"""The stored policy documents. They are checked by those who write and who resolve them; here they
are opaque, but whole, named, and bounded in size."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from cilia.errors import DomainError, Kind
from cilia.kv.backend import (
    Backend,
    Delete,
    DeleteResult,
    KeyValue,
    Op,
    Put,
    RangeResult,
    Span,
    Txn,
    get,
    unchanged,
)
from services.identity.keys import POLICY_PREFIX, policy_key, policy_name_of
from services.identity.records import Policy, PolicyName

_ATTEMPTS = 16


class PolicyContended(DomainError):
    default_kind = Kind.ABORTED

    def __init__(self) -> None:
        super().__init__("the policies kept changing while they were written")


class Change(enum.Enum):
    UNCHANGED = "unchanged"
    CREATED = "created"
    CONFIGURED = "configured"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Outcome:
    name: PolicyName
    change: Change


class Policies:
    def __init__(self, *, backend: Backend) -> None:
        self._backend = backend

    async def apply(
        self, policies: Sequence[Policy], *, dry_run: bool = False
    ) -> tuple[int, list[Outcome]]:
        """Stores all of them in one transaction, or none. What is equal to what is stored is not
        written. Returns the revision and what became of each, in their order.

        The names must differ. Raises InvalidRequest when it is too much for one transaction.
        """
        wanted = {_key(policy.name): policy for policy in policies}
        assert len(wanted) == len(policies), "checked at the edge"
        for _ in range(_ATTEMPTS):
            present = await self._read(list(wanted))
            ops: list[Op] = []
            outcomes: list[Outcome] = []
            for key, policy in wanted.items():
                value = policy.encode()
                old = present.get(key)
                if old is not None and old.value == value:
                    outcomes.append(Outcome(policy.name, Change.UNCHANGED))
                    continue
                ops.append(Put(key, value))
                change = Change.CONFIGURED if old is not None else Change.CREATED
                outcomes.append(Outcome(policy.name, change))
            if dry_run or not ops:
                return self._backend.revision, outcomes
            result = await self._backend.txn(_guarded(present, list(wanted), ops))
            if result.succeeded:
                return result.revision, outcomes
        raise PolicyContended

    async def delete(self, names: Sequence[PolicyName]) -> tuple[int, list[Outcome]]:
        """All in one transaction; an absent one is unchanged."""
        result = await self._backend.txn(
            Txn(success=tuple(Delete(Span.key(_key(name))) for name in names))
        )
        outcomes = [
            Outcome(
                name,
                Change.DELETED
                if isinstance(part, DeleteResult) and part.deleted
                else Change.UNCHANGED,
            )
            for name, part in zip(names, result.results, strict=True)
        ]
        return result.revision, outcomes

    async def delete_all(self) -> tuple[int, list[Outcome]]:
        result = await self._backend.delete(Span.prefix(POLICY_PREFIX))
        return result.revision, [Outcome(name_of(kv.key), Change.DELETED) for kv in result.deleted]

    async def _read(self, keys: Sequence[bytes]) -> dict[bytes, KeyValue]:
        result = await self._backend.txn(Txn(success=tuple(get(key) for key in keys)))
        return {
            kv.key: kv
            for part in result.results
            if isinstance(part, RangeResult)
            for kv in part.kvs
        }


def name_of(key: bytes) -> PolicyName:
    kind, namespace, name = policy_name_of(key)
    return PolicyName(kind=kind, namespace=namespace, name=name)


def _guarded(present: dict[bytes, KeyValue], keys: Sequence[bytes], ops: Sequence[Op]) -> Txn:
    """Nothing we looked at, the unchanged ones too, may have changed meanwhile."""
    return Txn(
        tuple(unchanged(key, kv.mod_revision if (kv := present.get(key)) else 0) for key in keys),
        success=tuple(ops),
    )


def _key(name: PolicyName) -> bytes:
    return policy_key(name.kind, name.namespace, name.name)
