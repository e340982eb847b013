"""Which fields of a flow are asked for: paths as a tree, whose leaves stand for all below them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Union

Tree = dict[str, Union["Tree", None]]  # None: all below


@dataclass(frozen=True, slots=True)
class FieldMask:
    """Paths relative to flow.Flow; no paths: everything."""

    paths: tuple[str, ...] = ()

    def tree(self) -> Tree | None:
        """None: everything."""
        if not self.paths:
            return None
        root: Tree = {}
        for path in self.paths:
            _add(root, path.split("."))
        return root


EVERYTHING: Final = FieldMask()


def _add(root: Tree, parts: list[str]) -> None:
    node = root
    for part in parts[:-1]:
        if part in node:
            below = node[part]
            if below is None:
                return  # a shorter path has it all
        else:
            below = node[part] = {}
        node = below
    node[parts[-1]] = None


def has(tree: Tree | None, name: str) -> bool:
    """Whether the field, or something below it, is asked for."""
    return tree is None or name in tree


def below(tree: Tree | None, name: str) -> Tree | None:
    """What is asked for below a field that is."""
    return None if tree is None else tree[name]


def pick(tree: Tree | None, fields: Iterable[tuple[str, bytes]]) -> bytes:
    """Of encoded fields by name, those asked for."""
    return b"".join(piece for name, piece in fields if tree is None or name in tree)
