"""Seconds of a piece of work, by a few sizes of it: those of a call, and those of each unit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cirloop.stages.work import Cost

BUDGET_S = 12.0
"""Seconds for each of the measurements, besides loading and a first try with a few rows."""
FIRST_ROWS = 2
"""Rows of the first try."""
clock = time.perf_counter
"""What seconds are read from."""


@dataclass(frozen=True, slots=True)
class Point:
    """Seconds of some work: in how many calls, and of how many units in all."""

    calls: float
    units: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """The cost of a piece of work, measured with `rows` of the `of` rows of a full batch."""

    cost: Cost
    rows: int
    of: int

    def __str__(self) -> str:
        part = (
            f"a full batch of {self.of}"
            if self.rows == self.of
            else f"{self.rows} rows of a batch of {self.of}"
        )
        call = f"{1000 * self.cost.call:,.3g} ms a call and " if self.cost.call else ""
        return f"{call}{1000 * self.cost.unit:,.3g} ms each, from {part}"


def fit(first: Point, last: Point) -> Cost:
    """Return the seconds of a call and of a unit that give both points; of the last alone where
    noise would make one negative."""
    determinant = last.units * first.calls - first.units * last.calls
    if determinant:
        unit = (last.seconds * first.calls - first.seconds * last.calls) / determinant
        call = (last.seconds - unit * last.units) / last.calls
        if unit > 0 and call >= 0:
            return Cost(call, unit)
    return Cost(0.0, last.seconds / last.units)


def time_rows(work: Callable[[int], object], of: int) -> list[tuple[int, float]]:
    """Measure the seconds of `work(rows)`, by rows.

    A few rows are timed first, then as many of `of` as fit the budget, if they are more.
    """
    rows = min(FIRST_ROWS, of)
    work(rows)  # the first call also warms up
    points = []
    while True:
        took = seconds_of(partial(work, rows))
        points.append((rows, took))
        more = min(of, int(BUDGET_S * rows / max(took, 1e-9)))
        if more < 2 * rows and (more <= rows or more < of):
            return points
        # Larger batches are faster: the prediction is made anew on the way.
        rows = min(more, 8 * rows)


def seconds_of(work: Callable[[], object]) -> float:
    _synchronize()
    began = clock()
    work()
    _synchronize()
    return clock() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
