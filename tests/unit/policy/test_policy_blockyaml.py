"""YAML as most people write it: what is read by itself is what ruamel.yaml reads, places too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cilia.policy import blockyaml, tree

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
PIECES = [
    " ", "  ", "-", "- ", ":", ": ", "#", " #", "\n", "\n  ", "\n- ", "\n-", "[", "]", "{", "}",
    ",", ", ", "'", '"', "|", ">", "&a ", "*a", "!", "?", "? ", "~", "null", "true", "012", "1.5",
    "a", "k: v", "...", "---", "%", "@", "`", "\\", "=", "<<: ", "x:y", "::", "a b", "\t", "\n\n",
    "é", "a: b: c", "- - a", "\r\n", "key:", "null: x", "{a: [b, c]}", "2001:db8::/32", "'a''b'",
]  # fmt: skip
TEXT = """# a comment
kind: Rules   # and another
metadata: {name: some, labels: {}}
rules:
- endpointSelector: {matchLabels: {"app": a}}
- endpointSelector:
    matchLabels:
      k8s:app: 'a b'
  egress:
    - toCIDRSet:
      - cidr: 10.0.0.0/8
        except: [10.1.0.0/16, "10.2.0.0/16"]
      - {cidr: 2001:db8::/32}
      toPorts:
      -
        ports:
          - port: 080
            protocol: TCP
---
- - a
  - b c
-   x: 1
    y: 2.5
"""


def fast(text: str) -> list[tree.Node] | None:
    try:
        return blockyaml.BlockReader(text, tree._plain_scalar).read()
    except (blockyaml.NotPlain, tree.TreeError):
        return None


def same(text: str) -> bool:
    """Whether it was read here; then it must be what ruamel.yaml reads."""
    found = fast(text)
    if found is not None:
        assert found == tree._parse_any_yaml(text)
    return found is not None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda x: x.name)
def test_examples(path: Path) -> None:
    same(path.read_text())


def test_most_examples_are_written_so() -> None:
    policies = [x for x in EXAMPLES if "policies" in x.parts]
    assert sum(fast(x.read_text()) is not None for x in policies) > len(policies) * 0.7


def test_what_it_knows() -> None:
    assert same(TEXT.replace('"app"', "app"))


@pytest.mark.parametrize(
    "text",
    [
        "a: &x b\nc: *x\n",
        "a: |\n  text\n",
        "a: b\n  c\n",
        'a: "\\x41"\n',
        "a:\nb: 1\n",
        "a: 1\na: 2\n",
        "a: !!str 1\n",
        "%YAML 1.1\n---\na: b\n",
        "a: [b,\n  c]\n",
        "a: b: c\n",
        "? a\n: b\n",
        "a:\n   b: 1\n  c: 2\n",
        "- a\n-b\n",
        "a:\tb\n",
        "null: a\n",
        "a: 'b''c'\n",
        "ä: b\n",
        "a: " + "1" * 50 + "\n",
        "- " * 60 + "a\n",
    ],
)
def test_what_is_left_to_the_other(text: str) -> None:
    assert fast(text) is None


edits = st.lists(
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 6), st.sampled_from(PIECES)), max_size=4
)


@settings(max_examples=300, deadline=None)
@given(edits)
@example([(0, 0, "\n-key: x")])
def test_damaged_texts(edits: list[tuple[int, int, str]]) -> None:
    text = TEXT.replace('"app"', "app")
    for at, cut, piece in edits:
        text = text[:at] + piece + text[at + cut :]
    same(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("a:\n-b: c\n")
def test_heaps_of_pieces(text: str) -> None:
    same(text)
