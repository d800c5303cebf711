"""Batches that take more memory than there is, in halves."""

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


def in_halves(
    work: Callable[[Sequence[T]], R], rows: Sequence[T], what: str, way_out: str
) -> list[R]:
    """`[work(rows)]`, or where a device's memory does not hold that, of the halves of `rows`, and
    so on.

    Counted in the stage's cost. Raises UserError with the `way_out` where one row alone is too
    much.
    """
    try:
        return [work(rows)]
    except (MemoryError, RuntimeError) as error:
        if not oom.is_oom(error):
            raise
        if len(rows) == 1:
            raise UserError(
                f"out of memory with one of {what}: {oom.first_line(error)}\n{way_out}"
            ) from None
        logger.warning("out of memory with %d of %s; in halves now", len(rows), what)
    profiling.add(splits=1)
    clear_device_cache(
        garbage_collection=True
    )  # what the failed call held is free only here, where its frames are gone
    half = len(rows) // 2
    return [
        made for part in (rows[:half], rows[half:]) for made in in_halves(work, part, what, way_out)
    ]
