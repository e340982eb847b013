"""Regular expressions of rules, as Envoy's matchers.

Rules are RE2, matched whole. What is a plain text or a prefix in disguise becomes one: Envoy then
compares bytes and runs no automaton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import re2
from envoy.type.matcher.v3 import string_pb2

from services.xds.translate.model import MAX_PROGRAM_SIZE, RuleRefused

_SPECIAL: Final = frozenset("\\.+*?()|[]{}^$")
MAX_LENGTH: Final = 4096


def literal(expression: str) -> str | None:
    """The one text that the expression matches, if there is just one that is easily seen."""
    out: list[str] = []
    chars = iter(expression)
    for char in chars:
        if char == "\\":
            escaped = next(chars, "")
            # \d, \x41, \Q and the like mean something; escaped punctuation means itself.
            if not escaped or escaped.isalnum() or not escaped.isascii() or escaped == "_":
                return None
            out.append(escaped)
        elif char in _SPECIAL:
            return None
        else:
            out.append(char)
    return "".join(out)


@lru_cache(maxsize=4096)
def check(expression: str) -> str:
    """Why Envoy would refuse the expression; empty when it would not."""
    if len(expression) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    if any(char in expression for char in "\0\r\n"):
        return "has a control character, which no request can have"
    options = re2.Options()
    options.log_errors = False
    try:
        size = int(re2.compile(expression, options).programsize)
    except re2.error as error:
        what = error.args[0] if error.args else error
        text = what.decode(errors="replace") if isinstance(what, bytes) else str(what)
        return f"is no RE2 expression: {text}"
    if size > MAX_PROGRAM_SIZE:
        return f"compiles to {size} instructions, over the limit of {MAX_PROGRAM_SIZE}"
    return ""


def matcher(expression: str, *, what: str) -> string_pb2.StringMatcher | None:
    """Matches the whole of a value; None when every value matches.

    Raises RuleRefused, which says what the expression belongs to.
    """
    if why := check(expression):
        shown = expression if len(expression) <= 80 else expression[:77] + "..."
        raise RuleRefused(f"{what} {shown!r} {why}")
    bare = expression.removeprefix("^")
    if bare.endswith("$") and not bare.endswith("\\$"):
        bare = bare[:-1]
    if bare == ".*":
        return None
    text = literal(bare)
    if text:
        return string_pb2.StringMatcher(exact=text)
    if bare.endswith(".*") and not bare.endswith("\\.*"):
        text = literal(bare[:-2])
        if text:
            return string_pb2.StringMatcher(prefix=text)
    result = string_pb2.StringMatcher()
    result.safe_regex.regex = expression
    return result
