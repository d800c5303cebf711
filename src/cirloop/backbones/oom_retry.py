"""Retry of a batch in halves where memory does not hold it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache

from cirloop.monitoring import oom, profiling
from cirloop.types import UserError

T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger(__name__)


def run_with_oom_split(
    work: Callable[[Sequence[T]], R], rows: Sequence[T], noun: str, way_out: str
) -> list[R]:
    """Return `[work(rows)]`, or, where memory does not hold that, the results of halves of `rows`.

    Halves are halved in turn. Each split counts in the stage's cost. Raises UserError with the
    `way_out` where one row alone is too much.
    """
    try:
        return [work(rows)]
    except (MemoryError, RuntimeError) as error:
        if not oom.is_oom(error):
            raise
        if len(rows) == 1:
            raise UserError(
                f"out of memory with one of {noun}: {oom.first_line(error)}\n{way_out}"
            ) from None
        logger.warning("out of memory with %d of %s; in halves now", len(rows), noun)
    profiling.add(splits=1)
    # Memory of the failed call is free only here, where its frames are gone.
    clear_device_cache(garbage_collection=True)
    half = len(rows) // 2
    first_results = run_with_oom_split(work, rows[:half], noun, way_out)
    return first_results + run_with_oom_split(work, rows[half:], noun, way_out)
