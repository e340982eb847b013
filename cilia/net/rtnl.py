"""rtnetlink(7) by pyroute2: blocking requests from any thread, in any namespace.

pyroute2's sockets belong to the thread that made them: used from another one, they silently open a
second socket in *that* thread's namespace, and the blocking kind refuses to run below an event
loop. So each `RouteSocket` keeps one thread, which entered the namespace and has the loop and the
socket; requests are handed to it. pyroute2's own `netns=` argument would fork a child instead.

pyroute2 is imported by the first socket, not by this module: docs/adr/0010-pyroute2-for-netlink.md
has what it costs.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self

from cilia.net.errors import NetworkError
from cilia.net.netns import NetNS, enter, in_netns

_ANSWER_S: Final = 30.0
_DUMP_TRIES: Final = 8
_NLM_F_DUMP_INTR: Final = 0x10

Command = str | tuple[int, int]  # pyroute2's word, or a message type and its flags


class RouteSocket:
    """One pyroute2 socket. Not for use by two threads at a time."""

    def __init__(self, netns: NetNS | None = None) -> None:
        # Its one thread starts as a copy of the caller's, and so in the caller's namespace.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        self._runner = asyncio.Runner()
        try:
            self._ipr = self._thread.submit(self._open, netns).result()
        except BaseException:
            self._end()
            raise

    def _open(self, netns: NetNS | None) -> Any:
        if netns is not None:
            enter(netns)
        return self._runner.run(_connect())

    def close(self) -> None:
        """May be repeated."""
        ipr, self._ipr = self._ipr, None
        if ipr is not None:
            self._thread.submit(ipr.close).result()
            self._end()

    def _end(self) -> None:
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(
        self,
        method: str,
        command: Command,
        /,
        *,
        what: str,
        ignore: Sequence[int] = (),
        **spec: Any,
    ) -> bool:
        """Asks for a change and waits for the answer.

        `method` is one of pyroute2's IPRoute, with its arguments in `spec`. Raises NetworkError
        with `what` before the kernel's reason. Errors listed in `ignore` return False.
        """
        return self._ask(method, command, what, ignore, spec) is not None

    def get(
        self,
        method: str,
        command: Command,
        /,
        *,
        what: str,
        ignore: Sequence[int] = (),
        **spec: Any,
    ) -> Any | None:
        """Asks for one object; None for an error listed in `ignore`."""
        found = self._ask(method, command, what, ignore, spec)
        return found[0] if found else None

    def dump(
        self,
        method: str,
        command: Command = "dump",
        /,
        *,
        what: str,
        ignore: Sequence[int] = (),
        **spec: Any,
    ) -> list[Any]:
        """All objects of a kind; none for an error listed in `ignore`.

        A dump that a change disturbed is made again, a few times.
        """
        found: list[Any] = []
        for _ in range(_DUMP_TRIES):
            found = self._ask(method, command, what, ignore, spec) or []
            # pyroute2 0.9 has an exception for this, which it never raises.
            if not any(message["header"]["flags"] & _NLM_F_DUMP_INTR for message in found):
                break
        return found

    def _ask(
        self, method: str, command: Command, what: str, ignore: Sequence[int], spec: dict[str, Any]
    ) -> list[Any] | None:
        from pyroute2.netlink.exceptions import NetlinkError

        def run() -> list[Any]:
            return self._runner.run(_converse(getattr(self._ipr, method), command, spec))

        try:
            return self._thread.submit(run).result()
        except NetlinkError as error:
            number, text = error.args  # the text is strerror's, or the extended acknowledgement
            if number in ignore:
                return None
            reason = os.strerror(number)
            detail = "" if text == reason else f"{reason}: {text}"
            raise NetworkError(what, number, detail) from None
        except TimeoutError:
            raise NetworkError(what, errno.ETIMEDOUT) from None
        except OSError as error:
            raise NetworkError(what, error.errno or errno.EIO) from error


async def _connect() -> Any:
    from pyroute2 import AsyncIPRoute

    # Extended acknowledgements (Linux 4.12) give errors a sentence; strictly checked dumps (4.20)
    # honour the filter in their header.
    ipr = AsyncIPRoute(ext_ack=True, strict_check=True, groups=0)
    await ipr.setup_endpoint()
    return ipr


async def _converse(method: Any, command: Command, spec: dict[str, Any]) -> list[Any]:
    async with asyncio.timeout(_ANSWER_S):
        answer = await method(command, **spec)
        return answer if isinstance(answer, list) else [message async for message in answer]


def open_watcher(netns: NetNS | None, groups: int) -> Any:
    """A non-blocking pyroute2 IPRSocket that hears the multicast `groups` (RTMGRP_ bits).

    This kind has no event loop and no thread: it is to be polled. Unlike AsyncIPRoute it leaves
    what is not yet read in the kernel's buffer, which is bounded, and goes on after an overflow.
    """

    def make() -> Any:
        from pyroute2 import IPRSocket

        watcher = IPRSocket(groups=groups)
        try:
            watcher.bind(groups)
            watcher.socket.setblocking(False)
        except BaseException:
            watcher.close()
            raise
        return watcher

    return in_netns(netns, make)
