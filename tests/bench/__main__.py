"""`python -m tests.bench`: runs the benches and says a line a figure.

A bench is a function `bench_<name>()` of a module `bench_<group>.py` in this directory. It returns
figures: dicts {name, value, unit, baseline, ratio, goal, met}, where

- baseline is the same thing measured without us in the same run, or None;
- ratio is value / baseline;
- goal is what ratio (or value, without a baseline) should reach; met says whether it does;
- floor and floor_met, where given, are what it must reach: a missed floor makes the exit code 1.

`--only a,b` runs the groups and benches whose name begins with a or b (`agent`, `agent_restart`).
All figures go to build/bench.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "build" / "bench.json"

Bench = Callable[[], list[dict[str, Any]]]


def discover() -> Iterator[tuple[str, str, Bench]]:
    """Yields (group, name, function) in the order of the files and of the text."""
    for path in sorted(HERE.glob("bench_*.py")):
        group = path.stem.removeprefix("bench_")
        module = importlib.import_module(f"tests.bench.{path.stem}")
        for name, function in vars(module).items():
            if (
                name.startswith("bench_")
                and callable(function)
                and function.__module__ == module.__name__
            ):
                yield group, name.removeprefix("bench_"), function


def wanted(group: str, name: str, only: list[str]) -> bool:
    """`agent` is a group, `agent_restart` a bench of it, `restart` nothing."""
    full = name if name.startswith(group) else f"{group}_{name}"
    return not only or any(full.startswith(prefix) or name.startswith(prefix) for prefix in only)


def line(figure: dict[str, Any]) -> str:
    """One figure for a person."""

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    verdict = "ok  " if figure["met"] else ("MISS" if not figure.get("floor_met", True) else "near")
    if figure["goal"] is None:
        verdict = "info"
    parts = [f"{verdict} {figure['name']:<34} {number(figure['value']):>9} {figure['unit']:<8}"]
    if figure["baseline"] is not None:
        parts.append(f"baseline {number(figure['baseline']):>9}  ratio {figure['ratio']:.3f}")
    if figure["goal"] is not None:
        parts.append(f"goal {number(figure['goal'])}")
    if "floor" in figure:
        parts.append(f"must {number(figure['floor'])}")
    return "  ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default="", help="prefixes of groups or benches, by comma")
    parser.add_argument("--list", action="store_true", help="names, and nothing else")
    options = parser.parse_args()
    only = [word.strip() for word in options.only.split(",") if word.strip()]

    benches = [bench for bench in discover() if wanted(bench[0], bench[1], only)]
    if options.list:
        for group, name, _ in benches:
            print(name if name.startswith(group) else f"{group}_{name}")
        return 0
    if not benches:
        groups = ", ".join(dict.fromkeys(group for group, _, _ in discover()))
        print(f"no bench is called {options.only}; the groups are {groups}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("the benches need root: namespaces and eBPF", file=sys.stderr)
        return 1
    if (load := os.getloadavg()[0]) > 1:
        print(f"load is {load:.1f}: figures of a busy machine are rough", file=sys.stderr)

    figures: list[dict[str, Any]] = []
    failed = False
    for group, name, function in benches:
        started = time.monotonic()
        try:
            found = function()
        except Exception:
            # One broken bench does not hide the others' figures.
            traceback.print_exc()
            print(f"FAIL {group}: {name}", flush=True)
            failed = True
            continue
        for figure in found:
            print(line(figure), flush=True)
            figures.append(figure)
        print(f"     ({name}: {time.monotonic() - started:.0f} s)", file=sys.stderr)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    missed = [figure["name"] for figure in figures if not figure.get("floor_met", True)]
    if missed:
        print("below what it must reach: " + ", ".join(missed))
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
