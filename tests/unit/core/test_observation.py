"""The names of numbers in events are those of the constants."""

from __future__ import annotations

import pytest

from cilia.bpf import constants
from cilia.observation import MATCHES, POINTS


@pytest.mark.parametrize(
    ("prefix", "names", "words"),
    [
        ("TRACE_", POINTS, {}),
        ("MATCH_", MATCHES, {"l3": "l3-only", "l4": "l4-only", "proto": "proto-only"}),
    ],
)
def test_names_are_those_of_the_constants(
    prefix: str, names: dict[int, str], words: dict[str, str]
) -> None:
    found = {
        value: name.removeprefix(prefix).lower().replace("_", "-")
        for name, value in vars(constants).items()
        if name.startswith(prefix)
    }
    assert {k: words.get(v, v) for k, v in found.items()} == {
        k: v.lower() for k, v in names.items()
    }
