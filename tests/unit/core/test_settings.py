"""Settings of a service: where a value comes from, and how a wrong one is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cilia import settings
from cilia.lifecycle import ExitCode
from cilia.settings import ConfigError, check_bounds, check_logging


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    where: Path = Path("/run/x")
    beside: Path | None = None
    node: str = "n1"
    max_rows: int = 8
    wait_s: float = 1.5
    bold: bool = False
    colour: Literal["red", "green"] = "red"
    names: tuple[str, ...] = ()
    host: str = field(default_factory=lambda: "h")
    log_level: str = "info"
    log_format: str = "auto"


_HELP = {
    "where": "a directory",
    "beside": "another one (default: none)",
    "node": "a name",
    "max_rows": "rows",
    "wait_s": "seconds",
    "bold": "try",
    "colour": "of all",
    "names": "of things",
    "host": "whose",
    "log_level": "level",
    "log_format": "format",
}


def parse(arguments: list[str], environment: dict[str, str]) -> Example:
    return settings.parse(
        Example, arguments, environment, service="example", description="It.", help_of=_HELP
    )


def test_nothing_given_is_the_defaults() -> None:
    assert parse([], {"CILIA_OTHER_NODE": "n2"}) == Example()


def test_every_type_is_read_from_flags_and_from_the_environment() -> None:
    wanted = Example(
        where=Path("/a"),
        beside=Path("b"),
        node="n2",
        max_rows=3,
        wait_s=0.25,
        bold=True,
        colour="green",
        names=("x", "y"),
    )
    flags = "--where /a --beside b --node n2 --max-rows 3 --wait 0.25 --bold"
    flags += " --colour green --names x --names y"
    assert parse(flags.split(), {}) == wanted
    variables = {"WHERE": "/a", "BESIDE": "b", "NODE": "n2", "MAX_ROWS": "3", "WAIT": "0.25"}
    variables |= {"BOLD": "on", "COLOUR": "green", "NAMES": "x y"}
    assert parse([], {f"CILIA_EXAMPLE_{name}": text for name, text in variables.items()}) == wanted


def test_flags_win_over_the_environment() -> None:
    environment = {"CILIA_EXAMPLE_BOLD": "true", "CILIA_EXAMPLE_MAX_ROWS": "3"}
    got = parse(["--no-bold", "--max-rows", "8"], environment)
    assert (got.bold, got.max_rows) == (False, 8)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("MAX_ROWS", "many", "is not a int"),
        ("WAIT", "long", "is not a float"),
        ("BOLD", "perhaps", "is neither true nor false"),
        ("COLOUR", "blue", "is none of red, green"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^CILIA_EXAMPLE_{name}='{text}' {words}$"):
        parse([], {f"CILIA_EXAMPLE_{name}": text})


def test_help_shows_defaults_that_are_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], {})
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m services.example" in said
    assert "--wait WAIT_S seconds (default 1.5)" in said
    assert "--bold, --no-bold try (default False)" in said
    assert "another one (default: none) --node" in said
    assert "--colour {red,green} of all (default red)" in said
    assert "of things; may be repeated --host" in said
    assert "whose --log-level" in said


def test_bounds_name_the_flag() -> None:
    check_bounds(Example(), {"wait_s": (1.5, 2), "max_rows": (1, 8)})
    with pytest.raises(ConfigError, match=r"^--wait 1\.5 is outside 2 to 3$"):
        check_bounds(Example(), {"wait_s": (2, 3)})


def test_logging_is_one_of_the_few() -> None:
    check_logging(Example())
    with pytest.raises(ConfigError, match="--log-level 'loud'"):
        check_logging(Example(log_level="loud"))
    with pytest.raises(ConfigError, match="--log-format 'xml'"):
        check_logging(Example(log_format="xml"))


_PROGRAM = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from dataclasses import dataclass
from cilia import lifecycle, settings
@dataclass(frozen=True, kw_only=True)
class Config:
    node: str = ""
    log_level: str = "info"
    log_format: str = "json"
    def __post_init__(self):
        settings.check_logging(self)
def parse(arguments, environment):
    return settings.parse(Config, arguments, environment, service="x", description="",
                          help_of={{"node": "", "log_level": "", "log_format": ""}})
async def build(config, running):
    running.on_ready(lambda: running.request_stop("that was " + config.node))
sys.exit(lifecycle.main("x", parse, build))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--node", "n7"], ExitCode.OK, '"service": "x", "msg": "The service is stopping."'),
        (["--node", "n7"], ExitCode.OK, "that was n7"),
        (["--log-level", "loud"], ExitCode.CONFIG, "x: --log-level 'loud' is not debug,"),
        (["--nodes", "n7"], 2, "unrecognized arguments: --nodes"),
    ],
)
def test_a_service_runs_with_its_settings_or_says_why_not(
    arguments: list[str], code: int, said: str
) -> None:
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
