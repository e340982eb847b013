"""Errors that an operator can act on, as values: what went wrong, of which kind, and the cure.

Domain code raises a subclass of `DomainError` named for the fact (`EndpointNotFound`). The class
says its `kind`; the gRPC edge turns the kind into a status code and back, so nothing below the edge
knows about gRPC. What is not a `DomainError` is a programmer error and is reported as one.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import ClassVar, Protocol


class Kind(enum.Enum):
    """What sort of failure it is: decides the gRPC status code and the command's exit code."""

    INVALID = "invalid"  # the request can never succeed as it stands
    NOT_FOUND = "not-found"
    CONFLICT = "conflict"  # what is to be created exists, or is in use by another
    PRECONDITION = "precondition"  # the system is not in the state that this needs
    EXHAUSTED = "exhausted"  # a pool, map or quota is full
    UNAVAILABLE = "unavailable"  # a dependency is away: trying again may help
    ABORTED = "aborted"  # lost a race: start over
    DENIED = "denied"  # not permitted
    OUT_OF_RANGE = "out-of-range"  # a revision that is compacted, or lies in the future
    UNIMPLEMENTED = "unimplemented"  # not in this build, or not on this kernel
    DEADLINE = "deadline"  # took longer than the caller wanted to wait
    CANCELLED = "cancelled"
    DATA_LOSS = "data-loss"  # stored state is damaged
    INTERNAL = "internal"  # a bug of ours


class OriginLike(Protocol):
    """Where a rule was written; `line` and `column` count from 1, 0 is unknown."""

    @property
    def source(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


class FaultLike(Protocol):
    """One fault of a document: what `cilia.policy` makes and the edge carries."""

    @property
    def document(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def origin(self) -> OriginLike | None: ...


class DomainError(Exception):
    """Base of the errors that callers are expected to meet.

    `message` names the thing and the fact in one line; `cure` says what to do about it; `faults`
    lists every fault of a refused document.
    """

    default_kind: ClassVar[Kind] = Kind.INTERNAL
    default_cure: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        cure: str | None = None,
        kind: Kind | None = None,
        faults: Iterable[FaultLike] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cure = self.default_cure if cure is None else cure
        self.kind = self.default_kind if kind is None else kind
        self.faults: tuple[FaultLike, ...] = tuple(faults)

    @property
    def reason(self) -> str:
        """The name of the fact, for programs: the class's own name."""
        return type(self).__name__

    def __str__(self) -> str:
        return self.message

    def explain(self) -> str:
        """The message with its cure, in one line, for logs and people."""
        return f"{self.message}. {self.cure}" if self.cure else self.message


class InvalidError(DomainError):
    default_kind = Kind.INVALID


class NotFoundError(DomainError):
    default_kind = Kind.NOT_FOUND


class ConflictError(DomainError):
    default_kind = Kind.CONFLICT


class PreconditionError(DomainError):
    default_kind = Kind.PRECONDITION


class ExhaustedError(DomainError):
    default_kind = Kind.EXHAUSTED


class UnavailableError(DomainError):
    default_kind = Kind.UNAVAILABLE


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where a rule was written; `line` and `column` count from 1, 0 is unknown."""

    source: str
    line: int = 0
    column: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """A fault as it arrives from another process: what the edge made of a `FaultLike`."""

    document: str
    path: str
    message: str
    origin: Origin | None = None
