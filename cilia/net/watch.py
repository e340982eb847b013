"""What changes among links, addresses and routes, as it happens.

Netlink multicast is best effort: when its buffer overflows the kernel says so (ENOBUFS) and the
batch is marked `overrun`, which means: look at everything again.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from cilia.net.device import (
    DeviceAddress,
    Link,
    Route,
    is_ours,
    parse_address,
    parse_link,
    parse_route,
)
from cilia.net.netns import NetNS
from cilia.net.rtnl import Message, open_watcher, receive

_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_ LINK, IPV4_{IFADDR,ROUTE}, IPV6_ same
_MAX_DATAGRAMS: Final = 256  # a batch at most, so that a storm does not starve the loop


@dataclass(frozen=True, slots=True)
class NetworkEvent:
    """Something appeared, changed, or was deleted (then `what` is its last state)."""

    what: Link | DeviceAddress | Route
    deleted: bool


@dataclass(frozen=True, slots=True)
class EventBatch:
    events: tuple[NetworkEvent, ...]
    overrun: bool  # some events were lost


@asynccontextmanager
async def watch_network(
    netns: NetNS | None = None, *, own_routes: bool = True
) -> AsyncIterator[AsyncIterator[EventBatch]]:
    """`async with watch_network() as batches: async for batch in batches: ...`

    It listens from the moment the context is entered, so list things after that. Without
    `own_routes` the routes that we made are passed over before they are read.
    """
    watcher = open_watcher(netns, _GROUPS)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    descriptor = watcher.fileno()
    loop.add_reader(descriptor, readable.set)
    try:
        yield _batches(watcher, readable, own_routes)
    finally:
        loop.remove_reader(descriptor)
        watcher.close()


async def _batches(
    watcher: socket.socket, readable: asyncio.Event, own_routes: bool
) -> AsyncIterator[EventBatch]:
    while True:
        readable.clear()
        events: list[NetworkEvent] = []
        overrun = False
        for _ in range(_MAX_DATAGRAMS):
            try:
                messages = receive(watcher)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                overrun = True
                continue
            for message in messages:
                event = _decode(message, own_routes)
                if event is not None:
                    events.append(event)
        if events or overrun:
            yield EventBatch(tuple(events), overrun)
        else:
            await readable.wait()


def _decode(message: Message, own_routes: bool) -> NetworkEvent | None:
    what: Link | DeviceAddress | Route | None
    match message.kind:
        case 16 | 17:  # RTM_NEWLINK, RTM_DELLINK
            what = parse_link(message)
        case 20 | 21:  # RTM_NEWADDR, RTM_DELADDR
            what = parse_address(message)
        case 24 | 25:  # RTM_NEWROUTE, RTM_DELROUTE
            what = parse_route(message) if own_routes or not is_ours(message) else None
        case _:
            return None
    return None if what is None else NetworkEvent(what, deleted=bool(message.kind & 1))
