"""Who is who on this node: numbers for label sets, and for the prefixes that policy names.

`IdentityAllocator` asks the identity service once a label set and counts users; reserved identities
need no one. While the service is away, sets that were known before still get their number, marked
to be confirmed; unknown ones raise IdentityUnavailable and are tried again by their controller.

`CidrIdentities` numbers prefixes: numbers of this node alone (bit 24), stable over restarts because
conntrack entries and events remember them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType

from cilia import statefile
from cilia.errors import DomainError, ExhaustedError
from cilia.identity import (
    LOCAL_SCOPE,
    MAX_LOCAL_ID,
    NumericIdentity,
    is_local,
    reserved_identity,
)
from cilia.labels import Labels
from services.agent.clients import IdentityClient, IdentityUnavailable

Network = IPv4Network | IPv6Network


@dataclass(slots=True)
class _Held:
    identity: NumericIdentity
    users: int
    confirmed: bool  # the service holds our reference under the present lease


class IdentityAllocator:
    """Numbers for label sets. All methods run on the event loop."""

    def __init__(self, client: IdentityClient) -> None:
        self._client = client
        self._held: dict[Labels, _Held] = {}
        self._known: dict[Labels, NumericIdentity] = {}
        self._releases: set[NumericIdentity] = set()
        self._locks: dict[Labels, asyncio.Lock] = {}

    def learn(self, labels: Labels, identity: NumericIdentity | None) -> None:
        """What the cluster says, or said before a restart."""
        if identity is None:
            self._known.pop(labels, None)
        else:
            self._known[labels] = identity

    @property
    def held(self) -> Mapping[Labels, NumericIdentity]:
        return MappingProxyType({labels: h.identity for labels, h in self._held.items()})

    @property
    def unconfirmed(self) -> int:
        return sum(not held.confirmed for held in self._held.values()) + len(self._releases)

    async def acquire(self, labels: Labels) -> NumericIdentity:
        """The set's number, one more user of it. Raises IdentityUnavailable, ExhaustedError."""
        if (reserved := reserved_identity(labels)) is not None:
            return reserved
        async with self._locks.setdefault(labels, asyncio.Lock()):
            held = self._held.get(labels)
            if held is None:
                try:
                    number, confirmed = await self._client.allocate(labels), True
                except IdentityUnavailable:
                    known = self._known.get(labels)
                    if known is None:
                        raise
                    number, confirmed = known, False
                self._known[labels] = number
                self._releases.discard(number)
                held = self._held[labels] = _Held(number, 0, confirmed)
            held.users += 1
            return held.identity

    def adopt(self, labels: Labels, identity: NumericIdentity) -> None:
        """A restored endpoint's number: in use already, to be confirmed by the service."""
        if reserved_identity(labels) is not None:
            return
        held = self._held.setdefault(labels, _Held(identity, 0, False))
        held.users += 1
        self._known.setdefault(labels, identity)

    def release(self, labels: Labels) -> None:
        """One user less. The service hears of the last one from `settle`."""
        held = self._held.get(labels)
        if held is None:
            return
        held.users -= 1
        if held.users == 0:
            del self._held[labels]
            self._releases.add(held.identity)

    def lease_lost(self) -> None:
        """References under the old lease are gone: every one must be put again."""
        for held in self._held.values():
            held.confirmed = False

    async def settle(self) -> list[tuple[Labels, NumericIdentity, NumericIdentity]]:
        """Confirm what is unconfirmed and release what is unused.

        Returns (labels, old, new) of the sets whose number turned out to be another, after the
        store was lost and made anew. Raises IdentityUnavailable.
        """
        moved = []
        for labels, held in list(self._held.items()):
            if held.confirmed:
                continue
            number = await self._client.allocate(labels)
            if self._held.get(labels) is not held:
                self._releases.add(number)
                continue
            held.confirmed = True
            self._known[labels] = number
            if number != held.identity:
                moved.append((labels, held.identity, number))
                held.identity = number
        for number in list(self._releases):
            if any(held.identity == number for held in self._held.values()):
                self._releases.discard(number)
                continue
            await self._client.release(number)
            self._releases.discard(number)
        return moved


class LocalIdentitiesExhausted(ExhaustedError):
    default_cure = "Use fewer distinct prefixes in policy"

    def __init__(self) -> None:
        super().__init__("this node is out of numbers for prefixes (2^24 - 1 are in use)")


class CidrIdentities:
    """Numbers for the prefixes that policy names.

    A prefix that no rule names any more keeps its number, and its entry in the ipcache, for
    `release_delay_s`: a policy that is deleted and applied again finds everything in place.
    """

    def __init__(
        self,
        path: Path,
        *,
        release_delay_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._delay_s = release_delay_s
        self._clock = clock
        self._numbers: dict[Network, NumericIdentity] = {}
        self._unused_since: dict[Network, float] = {}
        self._next = LOCAL_SCOPE + 1
        self._taken: set[NumericIdentity] = set()
        self._unsaved: dict[Network, NumericIdentity | None] = {}  # since the last save
        self._changed: set[Network] = set()  # since `take_changed`
        self._saved_as = ""  # the mark of the whole file that the log goes with
        self._logged = 0

    def load(self) -> None:
        """Numbers of an earlier run. Raises StateFileDamaged."""
        content = statefile.read_json(self._path)
        if content is None:
            return
        try:
            numbers = {
                ip_network(prefix): NumericIdentity(int(number))
                for prefix, number in content["prefixes"].items()
            }
            following = int(content["next"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise statefile.StateFileDamaged(self._path, str(error)) from error
        if len(set(numbers.values())) != len(numbers) or not all(map(is_local, numbers.values())):
            raise statefile.StateFileDamaged(self._path, "numbers repeat or are not local ones")
        saved_as = str(content.get("mark", ""))
        for prefix, number in self._read_log(saved_as):
            if number is None:
                numbers.pop(prefix, None)
            else:
                numbers[prefix] = number
                following = number + 1
        if len(set(numbers.values())) != len(numbers):
            raise statefile.StateFileDamaged(self._log, "numbers repeat")
        self._numbers, self._taken = numbers, set(numbers.values())
        self._changed.update(numbers)
        self._next = following if is_local(following) else LOCAL_SCOPE + 1
        now = self._clock()
        self._unused_since = dict.fromkeys(numbers, now)

    @property
    def _log(self) -> Path:
        """Changes since the whole file was written, a line each."""
        return self._path.with_suffix(".log")

    def _read_log(self, mark: str) -> list[tuple[Network, NumericIdentity | None]]:
        """The changes that were logged after the file of this mark. Raises StateFileDamaged."""
        head, *lines = (statefile.read(self._log) or b"").split(b"\n")
        if not mark or head.decode(errors="replace") != mark:
            return []
        found = []
        try:
            for line in lines[:-1]:  # the last one is empty, or was torn by a crash
                prefix, number = line.decode().split()
                found.append(
                    (ip_network(prefix), None if number == "-" else NumericIdentity(int(number)))
                )
        except ValueError as error:
            raise statefile.StateFileDamaged(self._log, str(error)) from error
        if not all(is_local(number) for _, number in found if number is not None):
            raise statefile.StateFileDamaged(self._log, "numbers are not local ones")
        return found

    @property
    def unsaved(self) -> bool:
        return bool(self._unsaved)

    def save(self) -> None:
        """Write the numbers down; before any of the new ones is used. Blocking.

        A few are added to a log, so that one prefix more costs a line and not all that there are.
        """
        unsaved, self._unsaved = self._unsaved, {}
        if not unsaved:
            return
        try:
            if self._saved_as and self._logged + len(unsaved) <= max(256, len(self._numbers) // 4):
                lines = [f"{prefix} {'-' if n is None else n}\n" for prefix, n in unsaved.items()]
                head = [] if self._logged else [f"{self._saved_as}\n"]
                statefile.append(self._log, "".join(head + lines).encode())
                self._logged += len(unsaved)
                return
            self._saved_as, mark = "", secrets.token_hex(8)
            content = {
                "prefixes": {str(prefix): n for prefix, n in self._numbers.items()},
                "next": self._next,
                "mark": mark,
            }
            # On one line: indenting takes the slow encoder.
            statefile.write(self._path, json.dumps(content).encode() + b"\n")
            statefile.remove(self._log)
            self._saved_as, self._logged = mark, 0
        except DomainError:
            self._saved_as = ""  # who knows what is in the log: all of it, the next time
            self._unsaved = {**unsaved, **self._unsaved}
            raise

    def take_changed(self) -> set[Network]:
        """The prefixes that got or lost a number since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    @property
    def numbers(self) -> Mapping[Network, NumericIdentity]:
        """Every numbered prefix, those about to be released too."""
        return MappingProxyType(self._numbers)

    @property
    def next_release_s(self) -> float | None:
        """Seconds until the next prefix may be released; None when all are in use."""
        if not self._unused_since:
            return None
        return max(0.0, min(self._unused_since.values()) + self._delay_s - self._clock())

    def require(self, prefixes: Iterable[Network]) -> list[Network]:
        """Number these and start the clock for all others; returns the newly numbered ones.

        Raises LocalIdentitiesExhausted.
        """
        wanted = set(prefixes)
        return self.change(wanted, [x for x in self._numbers if x not in wanted])

    def change(self, wanted: Iterable[Network], idle: Iterable[Network]) -> list[Network]:
        """Number those that are wanted now and start the clock for those that are no more.

        Returns the newly numbered ones. Raises LocalIdentitiesExhausted.
        """
        now = self._clock()
        for prefix in idle:
            if prefix in self._numbers:
                self._unused_since.setdefault(prefix, now)
        new = []
        for prefix in wanted:
            self._unused_since.pop(prefix, None)
            if prefix not in self._numbers:
                new.append(prefix)
        for prefix in new:
            number = self._free()
            self._taken.add(number)
            self._numbers[prefix] = self._unsaved[prefix] = number
        self._changed.update(new)
        return new

    def _free(self) -> NumericIdentity:
        for _ in range(MAX_LOCAL_ID - LOCAL_SCOPE):
            number = NumericIdentity(self._next)
            self._next = self._next + 1 if self._next < MAX_LOCAL_ID else LOCAL_SCOPE + 1
            if number not in self._taken:
                return number
        raise LocalIdentitiesExhausted

    def avoid(self, numbers: Iterable[NumericIdentity]) -> None:
        """Give no prefix one of these that is not its own: the kernel calls another by it still.

        That is so when the file of numbers was lost, but not the kernel's maps.
        """
        last = max((n for n in numbers if is_local(n) and n not in self._taken), default=0)
        if last >= self._next:
            self._next = last + 1 if last < MAX_LOCAL_ID else LOCAL_SCOPE + 1

    def release_due(self) -> dict[Network, NumericIdentity]:
        """Forget the prefixes that were unused long enough; returns them."""
        now = self._clock()
        due = [p for p, since in self._unused_since.items() if now - since >= self._delay_s]
        gone = {}
        for prefix in due:
            del self._unused_since[prefix]
            gone[prefix] = self._numbers.pop(prefix)
            self._unsaved[prefix] = None
        self._taken.difference_update(gone.values())
        self._changed.update(gone)
        return gone
