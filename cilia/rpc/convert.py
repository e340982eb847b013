"""Converters of the messages that more than one service speaks. Total, and tested by round trip."""

from __future__ import annotations

from collections.abc import Iterable

from cilia.errors import InvalidError
from cilia.identity import NumericIdentity
from cilia.labels import Label, LabelError, Labels
from cilia.rpc.errors import fault_from_proto, fault_to_proto
from protos.common.v1 import common_pb2

__all__ = [
    "fault_from_proto",
    "fault_to_proto",
    "identity_from_proto",
    "identity_to_proto",
    "label_from_proto",
    "label_to_proto",
    "labels_from_proto",
    "labels_to_proto",
]


class InvalidLabel(InvalidError):
    """A label in a request cannot be one."""


def label_to_proto(label: Label) -> common_pb2.Label:
    return common_pb2.Label(source=label.source, key=label.key, value=label.value)


def label_from_proto(message: common_pb2.Label) -> Label:
    """Raises InvalidLabel."""
    try:
        return Label(message.source, message.key, message.value)
    except LabelError as error:
        raise InvalidLabel(str(error), cure="A label is [source:]key[=value]") from error


def labels_to_proto(labels: Iterable[Label]) -> list[common_pb2.Label]:
    """In the order of `Labels`: sorted by key."""
    return [label_to_proto(label) for label in labels]


def labels_from_proto(messages: Iterable[common_pb2.Label]) -> Labels:
    """Raises InvalidLabel, also for a key that is given twice with different labels."""
    seen: dict[str, Label] = {}
    for message in messages:
        label = label_from_proto(message)
        if (before := seen.setdefault(label.key, label)) != label:
            raise InvalidLabel(
                f"labels {before} and {label} have the same key", cure="Give each key once"
            )
    try:
        return Labels(seen.values())
    except LabelError as error:
        raise InvalidLabel(str(error)) from error


def identity_to_proto(identity: NumericIdentity, labels: Iterable[Label]) -> common_pb2.Identity:
    return common_pb2.Identity(id=identity, labels=labels_to_proto(labels))


def identity_from_proto(message: common_pb2.Identity) -> tuple[NumericIdentity, Labels]:
    """Raises InvalidLabel."""
    return NumericIdentity(message.id), labels_from_proto(message.labels)
