"""Desired against actual content of a bulk store, and what must be done to make them equal.

Pure: no I/O, no clock. Both sides may change at any time and in any order; the pending sets are
kept as the changes come, so asking what is pending costs nothing and a flush costs as much as
differs. After a restart the store's content is read back into `replace_actual`, and only the
difference from the freshly calculated desired state is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class DeltaTracker(Generic[K, V]):
    """Keeps the desired and the actual content of one store.

    `equal` says whether an actual value needs no update to be the desired one; give one that
    ignores what the store itself counts or stamps.
    """

    __slots__ = ("_actual", "_deletes", "_desired", "_equal", "_updates")

    def __init__(self, *, equal: Callable[[V, V], bool] = operator.eq) -> None:
        self._equal = equal
        self._desired: dict[K, V] = {}
        self._actual: dict[K, V] = {}
        self._updates: dict[K, V] = {}
        self._deletes: dict[K, V] = {}

    @property
    def desired(self) -> Mapping[K, V]:
        return MappingProxyType(self._desired)

    @property
    def actual(self) -> Mapping[K, V]:
        return MappingProxyType(self._actual)

    @property
    def pending_updates(self) -> Mapping[K, V]:
        """Keys to write, with the desired value. A live view: copy it before iterating and
        applying.
        """
        return MappingProxyType(self._updates)

    @property
    def pending_deletes(self) -> Mapping[K, V]:
        """Keys to remove, with the value they are thought to have. A live view."""
        return MappingProxyType(self._deletes)

    @property
    def in_sync(self) -> bool:
        return not self._updates and not self._deletes

    def set_desired(self, key: K, value: V) -> None:
        self._desired[key] = value
        self._deletes.pop(key, None)
        if key in self._actual and self._equal(self._actual[key], value):
            self._updates.pop(key, None)
        else:
            self._updates[key] = value

    def delete_desired(self, key: K) -> None:
        self._desired.pop(key, None)
        self._updates.pop(key, None)
        if key in self._actual:
            self._deletes[key] = self._actual[key]

    def replace_desired(self, content: Mapping[K, V]) -> None:
        for key in [key for key in self._desired if key not in content]:
            self.delete_desired(key)
        for key, value in content.items():
            self.set_desired(key, value)

    def set_actual(self, key: K, value: V) -> None:
        """Records that the store now has `value` under `key`: written by us, or found there."""
        self._actual[key] = value
        if key not in self._desired:
            self._deletes[key] = value
        elif self._equal(value, self._desired[key]):
            self._updates.pop(key, None)
        else:
            self._updates[key] = self._desired[key]

    def delete_actual(self, key: K) -> None:
        """Records that the store has nothing under `key`."""
        self._actual.pop(key, None)
        self._deletes.pop(key, None)
        if key in self._desired:
            self._updates[key] = self._desired[key]

    def replace_actual(self, content: Mapping[K, V]) -> None:
        for key in [key for key in self._actual if key not in content]:
            self.delete_actual(key)
        for key, value in content.items():
            self.set_actual(key, value)
