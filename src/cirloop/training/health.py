"""Faults of a training stage: a batch without a finite loss, a loss that does not fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from cirloop.training.batches import Batch
from cirloop.training.log import SkippedRow

MAX_SHOWN_IDS = 8
"""Ids that an error lists; the run directory has all of them."""
MIN_QUARTER_STEPS = 8
"""Steps in a quarter of a stage, below which nothing is said about its loss."""


class NonFiniteBatch(Exception):
    """Training stopped at a batch whose loss or gradient is not finite; `row` describes it."""

    def __init__(self, row: SkippedRow, steps: int, num_skipped: int) -> None:
        self.row = row
        ids = row["ids"]
        num_more = len(ids) - MAX_SHOWN_IDS
        more = f" and {num_more} more" if num_more > 0 else ""
        super().__init__(
            f"step {row['step']} of {steps}: the loss is {row['loss']}, the gradient's norm"
            f" {row['grad_norm']}. The batch's triplets: {', '.join(ids[:MAX_SHOWN_IDS])}{more}.\n"
            "Ways out: look at their images and texts; a lower --learning_rate; another"
            f" model.dtype; or --max_skipped_batches {num_skipped + 1} --auto_resume, which leaves"
            " such a batch out."
        )


def non_finite_row(step: int, loss: float, grad_norm: float | None, batch: Batch) -> SkippedRow:
    """Describe a batch at `step`, from 1, whose loss or gradient is not finite."""
    return {
        "step": step,
        "loss": _json_number(loss),
        "grad_norm": None if grad_norm is None else _json_number(grad_norm),
        "ids": [query.id for query in batch.queries],
    }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def loss_warning(losses: Sequence[float], iteration: int) -> str | None:
    """Return a warning where the loss of iteration 0 did not fall, or that of a later one, which
    starts from a trained model, rose; None where all is well, or steps are too few.

    The mean over the last quarter of the steps is compared with that over the first: it fell where
    it is lower by more than the standard error of the difference, and rose where it is higher by
    more than two, with steps taken as independent.
    """
    size = len(losses) // 4
    if size < MIN_QUARTER_STEPS:
        return None
    first = losses[:size]
    last = losses[-size:]
    rise = fmean(last) - fmean(first)
    standard_error = math.sqrt((variance(first) + variance(last)) / size)
    is_healthy = rise <= 2 * standard_error if iteration else rise < -standard_error
    if is_healthy:
        return None
    problem = "the loss rose: " if iteration else "the loss did not fall: "
    return problem + (
        f"{fmean(first):.4f} over the first {size} steps, {fmean(last):.4f} over the last {size},"
        f" a difference of {rise:+.4f} with a standard error of {standard_error:.4f}"
    )
