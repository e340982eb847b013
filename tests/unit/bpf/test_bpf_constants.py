"""The numbers and texts shared with the kernel side are those of the header."""

from __future__ import annotations

import re
from pathlib import Path

from cilia.bpf import constants, dropreason

_DEFINE = re.compile(r"^#define[ \t]+(\w+)[ \t]+(\S.*?)[ \t]*(?:/\*.*)?$", re.M)
_SHIFT = re.compile(r"\(?(\d+)u?\s*<<\s*(\d+)\)?$")


def header_numbers(repository: Path) -> dict[str, int]:
    text = (repository / "bpf/lib/types.h").read_text()
    numbers = {}
    for name, value in _DEFINE.findall(text):
        if shift := _SHIFT.match(value):
            numbers[name] = int(shift[1]) << int(shift[2])
        else:
            numbers[name] = int(value.rstrip("u"), 0)
    return numbers


def test_constants_are_the_headers(repository: Path) -> None:
    ours = {name: value for name, value in vars(constants).items() if name.isupper()}
    assert ours == header_numbers(repository)


def test_every_named_drop_reason_has_a_text() -> None:
    for name, number in vars(dropreason).items():
        if name.isupper() and isinstance(number, int):
            assert dropreason.reason_text(number) != str(number), name
            assert dropreason.is_drop(number) == (number >= 130), name


def test_drop_reason_texts() -> None:
    assert dropreason.reason_text(133) == "Policy denied"
    assert dropreason.reason_text(-181) == "Policy denied by denylist"
    assert dropreason.reason_text(235) == "Endpoint is not open"
    assert dropreason.reason_text(199) == "199"
    assert all(130 <= number <= 255 for number in dropreason.DROP_REASONS)
    assert not dropreason.is_drop(dropreason.ANSWERED_LOCALLY)
    assert dropreason.is_drop(-dropreason.POLICY_DENIED)
