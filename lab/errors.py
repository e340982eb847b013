"""What can go wrong in a lab, with what to do about it."""

from __future__ import annotations

from cilia.errors import ConflictError, DomainError, InvalidError, Kind, NotFoundError


class LabError(DomainError):
    """Something on the machine did not work out; the message says what."""

    default_kind = Kind.PRECONDITION


class LabInvalid(InvalidError):
    """The lab file is wrong; every fault is a line of the message."""


class LabNotFound(NotFoundError):
    """No such lab, or no such workload in it."""


class LabExists(ConflictError):
    """The lab is up already."""
