"""What a bench returns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def figure(
    name: str,
    value: float,
    unit: str,
    *,
    baseline: float | None = None,
    ratio: float | None = None,
    goal: float | None = None,
    floor: float | None = None,
    less_is_better: bool = False,
) -> dict[str, Any]:
    """One figure. `goal` and `floor` are of the ratio if there is a baseline, else of the value."""
    if baseline is not None and ratio is None:
        ratio = value / baseline
    judged = value if ratio is None else ratio

    def reached(bound: float) -> bool:
        return judged <= bound if less_is_better else judged >= bound

    result: dict[str, Any] = {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "goal": goal,
        "met": goal is None or reached(goal),
    }
    if floor is not None:
        result |= {"floor": floor, "floor_met": reached(floor)}
    return result


def paired(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    *,
    goal: float,
    floor: float,
) -> dict[str, Any]:
    """Rounds that were taken in turns: the ratio is the median of each round's own ratio, so that
    what slowed a whole round down slowed both."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return figure(
        name,
        statistics.median(ours),
        unit,
        baseline=statistics.median(theirs),
        ratio=statistics.median(ratios),
        goal=goal,
        floor=floor,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
