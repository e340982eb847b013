"""One producer, many subscribers, none of whom may cost unbounded memory or slow the others.

Each subscriber has a queue of bounded weight. When an item does not fit, the oldest queued items
are given up and counted; the subscriber is told with its next batch how much it lost before it.

    publish(item) ──▶ [subscriber queue <= capacity] ──▶ async for Delivery(items, lost)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delivery(Generic[T]):
    """`lost` is the weight of what was given up before the first of `items`."""

    items: tuple[T, ...]
    lost: int


class Subscription(Generic[T]):
    """One subscriber's queue. Iterate over it, or take what is there; leave it to end it."""

    def __init__(self, fanout: BoundedFanout[T], capacity: int) -> None:
        self._fanout = fanout
        self._capacity = capacity
        self._queue: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._lost = 0
        self._closed = False
        self._wake = asyncio.Event()
        self.lost_total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._fanout.unsubscribe(self)

    def __aiter__(self) -> AsyncIterator[Delivery[T]]:
        return self

    async def __anext__(self) -> Delivery[T]:
        """Waits for something to deliver; ends when the fan-out is closed and nothing is left."""
        while not self._queue and not self._lost:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self.take()

    def take(self) -> Delivery[T]:
        """Everything that is queued, without waiting; may be empty."""
        delivery = Delivery(tuple(item for item, _ in self._queue), self._lost)
        self._queue.clear()
        self._weight = 0
        self._lost = 0
        return delivery

    def _put(self, item: T, weight: int) -> None:
        self._queue.append((item, weight))
        self._weight += weight
        while self._weight > self._capacity:
            _, given_up = self._queue.popleft()
            self._weight -= given_up
            self._lost += given_up
            self.lost_total += given_up
        self._wake.set()

    def _close(self) -> None:
        self._closed = True
        self._wake.set()


class BoundedFanout(Generic[T]):
    """`capacity` bounds each subscriber's queue, in the unit of `weigh` (by default: items)."""

    def __init__(self, *, capacity: int, weigh: Callable[[T], int] | None = None) -> None:
        assert capacity > 0, "a queue must hold something"
        self._capacity = capacity
        self._weigh = weigh
        self._subscriptions: list[Subscription[T]] = []
        self._closed = False
        self.lost_total = 0  # by subscribers that have left

    def __len__(self) -> int:
        """How many subscribers there are: with none, the producer need not even make the item."""
        return len(self._subscriptions)

    @property
    def subscriptions(self) -> tuple[Subscription[T], ...]:
        return tuple(self._subscriptions)

    def subscribe(self, *, capacity: int | None = None) -> Subscription[T]:
        """Starts a queue, a context manager. Only what is published from now on arrives."""
        subscription = Subscription(self, capacity or self._capacity)
        if self._closed:
            subscription._close()
        else:
            self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription[T]) -> None:
        """Ends a queue; an ended one is success."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            self.lost_total += subscription.lost_total
        subscription._close()

    def publish(self, item: T) -> None:
        """Queues the item for every subscriber; never blocks."""
        if not self._subscriptions:
            return
        weight = 1 if self._weigh is None else self._weigh(item)
        for subscription in self._subscriptions:
            subscription._put(item, weight)

    def close(self) -> None:
        """Lets every subscriber end once it has taken what is queued."""
        self._closed = True
        for subscription in tuple(self._subscriptions):
            self.unsubscribe(subscription)
