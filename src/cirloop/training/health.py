"""What is wrong with a training stage, in numbers: a batch without a finite loss, a loss that does
not fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

from cirloop.training.batches import Batch

SHOWN = 8
"""Ids that an error lists; all of them are in the run directory."""
LEAST = 8
"""Steps in a quarter of a stage, below which nothing is said about its loss."""


class BadBatch(Exception):
    """Training stopped at a batch whose loss or gradient is not finite. `row` says which, as
    JSON."""

    def __init__(self, row: dict[str, Any], steps: int, skipped: int) -> None:
        self.row, ids = row, row["ids"]
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        super().__init__(
            f"step {row['step']} of {steps}: the loss is {row['loss']}, the gradient's norm"
            f" {row['grad_norm']}. The batch's triplets: {', '.join(ids[:SHOWN])}{more}.\nWays out:"
            " look at their pictures and texts; a lower --learning_rate; another model.dtype; or"
            f" --max_skipped_batches {skipped + 1} --auto_resume, which leaves such a batch out."
        )


def bad_row(step: int, loss: float, norm: float | None, batch: Batch) -> dict[str, Any]:
    """A bad batch at `step`, from 1, as JSON, which knows no NaN: numbers that are none are
    words."""
    numbers = {"loss": loss, "grad_norm": norm}
    told = {
        name: value if value is None or math.isfinite(value) else str(value)
        for name, value in numbers.items()
    }
    return {"step": step, **told, "ids": [query.id for query in batch.queries]}


def not_falling(losses: Sequence[float]) -> str | None:
    """What to say of a stage whose loss did not fall; None where it did, or steps are too few to
    tell.

    It fell if its mean over the last quarter of the steps is lower than over the first by more than
    the standard error of the difference, steps taken as independent.
    """
    size = len(losses) // 4
    if size < LEAST:
        return None
    first, last = losses[:size], losses[-size:]
    fall, error = fmean(first) - fmean(last), math.sqrt((variance(first) + variance(last)) / size)
    if fall > error:
        return None
    return (
        f"the loss did not fall: {fmean(first):.4f} over the first {size} steps, {fmean(last):.4f}"
        f" over the last {size}, a fall of {fall:.4f} with a standard error of {error:.4f}"
    )
