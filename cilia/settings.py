"""A service's settings: flags, then the environment, then the defaults of a dataclass.

A service declares a frozen dataclass and a line of help for each of its fields; `parse()` makes the
flags, the variables (CILIA_<SERVICE>_<FLAG>) and --help of them. Types are those of `_READ`, a
Literal of texts, and tuple[str, ...]: a flag that may be repeated, a variable with blanks between.
Whether the values make sense together is for the dataclass's own `__post_init__` to say, with
`check_bounds()` and `check_logging()` for what services have in common.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from cilia.errors import InvalidError
from cilia.telemetry.log import LEVELS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMATS: Final = ("auto", "json", "console")

Settings = TypeVar("Settings", bound="DataclassInstance")


class ConfigError(InvalidError):
    """A setting that cannot be; the service refuses to start with it."""


class LogSettings(Protocol):
    """What every service's settings say about its log."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


# What a field may be declared as, and how its text is read.
_READ: Final[Mapping[object, Callable[[str], object]]] = {
    Path: Path,
    Path | None: Path,
    str: str,
    int: int,
    float: float,
    bool: _boolean,
}


def _how(wanted: Any) -> dict[str, Any]:
    """What argparse has to know of a field of this type."""
    if wanted is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(wanted) is Literal:
        return {"choices": get_args(wanted)}
    if wanted == tuple[str, ...]:
        return {"action": "append"}
    return {"type": _READ[wanted]}


def _from_text(variable: str, text: str, wanted: Any) -> object:
    """The value of a variable. Raises ConfigError."""
    if get_origin(wanted) is Literal:
        if text not in get_args(wanted):
            raise ConfigError(f"{variable}={text!r} is none of {', '.join(get_args(wanted))}")
        return text
    if wanted == tuple[str, ...]:
        return tuple(text.split())
    try:
        return _READ[wanted](text)
    except ValueError:
        fault = "neither true nor false" if wanted is bool else f"not a {wanted.__name__}"
        raise ConfigError(f"{variable}={text!r} is {fault}") from None


def flag(name: str) -> str:
    """A field's flag, without the dashes. Units of time are in the names of fields (`_s`), and in
    the help of flags."""
    return name.removesuffix("_s").replace("_", "-")


def parse(
    declared: type[Settings],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    service: str,
    description: str,
    help_of: Mapping[str, str],
) -> Settings:
    """Reads the settings of `services.<service>`; `help_of` has a line for every field.

    Raises ConfigError; argparse itself ends the process for --help, for flags that do not exist and
    for values of the wrong type.
    """
    types = get_type_hints(declared)
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}", description=description)
    for field in fields(declared):
        shown = "" if field.default in (None, "", (), MISSING) else f" (default {field.default})"
        repeated = "; may be repeated" if types[field.name] == tuple[str, ...] else ""
        parser.add_argument(
            f"--{flag(field.name)}",
            dest=field.name,
            # What was not given is left to the environment.
            default=argparse.SUPPRESS,
            help=help_of[field.name] + repeated + shown,
            **_how(types[field.name]),
        )
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments)).items()
    }
    values: dict[str, Any] = {}
    for field in fields(declared):
        variable = f"CILIA_{service}_{flag(field.name)}".replace("-", "_").upper()
        if variable not in environment:
            continue
        values[field.name] = _from_text(variable, environment[variable], types[field.name])
    return declared(**(values | given))


def check_bounds(settings: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Numbers by field, least and most included. Raises ConfigError, which names the flag."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"--{flag(name)} {value:g} is outside {low:g} to {high:g}")


def check_logging(settings: LogSettings) -> None:
    """Raises ConfigError."""
    if settings.log_format not in FORMATS:
        raise ConfigError(f"--log-format {settings.log_format!r} is not auto, json or console")
    if settings.log_level not in LEVELS:
        raise ConfigError(
            f"--log-level {settings.log_level!r} is not debug, info, warning or error"
        )
