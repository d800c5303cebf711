"""Rows of the training log."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from cirloop.types import QueryId


class StepRow(TypedDict):
    """A step that was taken. `step` counts from 1; `grad_norm` is left out where it is unknown."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: NotRequired[float]


class SkippedRow(TypedDict):
    """A step that was skipped, since its loss or gradient was not finite.

    JSON knows no NaN, so numbers that are not finite are texts. `ids` are the batch's queries.
    """

    step: int
    loss: float | str
    grad_norm: float | str | None
    ids: list[QueryId]


Row = StepRow | SkippedRow


def is_skipped(row: Row) -> bool:
    """Return whether the step of `row` was skipped."""
    return "ids" in row
