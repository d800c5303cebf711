"""What a run tells those who watch it: how far a bar is, each training step, each stage. No result
depends on them.

A listener is called with the kind of the news and what it says, in the thread that tells it:

- `bar`: `key`, `title`, `done`, `total` (None = not known), `rate` in words, empty where it is not
  known; `done` None = the bar is over
- `step`: `row`, a step as the training log has it
- `begins`: `name`, `iteration` of an artifact, made or found; `ended`: the same and `artifact`
- `numbers`: `step` over all iterations, `values` by name, and `found`: they are of an artifact that
  was there before
- `head`: what stands above the bars (`monitoring.live.RunHeader`); None = the run is over
- `evaluated`: an iteration was evaluated, and the results are written
- `finished`: the loop has done all of its work
- `processes`: `working`, whether launched processes write to the terminal
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Listener = Callable[[str, dict[str, Any]], None]
logger = logging.getLogger(__name__)
_listeners: list[tuple[str, Listener]] = []


class CountedBatches(Iterable[T], Generic[T]):
    """Batches with the number of items that each produces, so that a progress bar can show a
    rate."""

    def __init__(self, batches: Sequence[T], counts: Sequence[int], unit: str) -> None:
        """Take a number per batch in `counts`, and in `unit` what stands behind their rate, such as
        "texts/s"."""
        self._batches = batches
        self._totals = [0, *accumulate(counts)]
        self.unit = unit

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[T]:
        return iter(self._batches)

    def rate(self, done: int, seconds: float) -> str:
        """Return the rate in words, once the first `done` batches took `seconds`; empty before the
        first."""
        num = self._totals[done]
        return f"{num / seconds:.3g} {self.unit}" if num and seconds > 0 else ""


@contextmanager
def subscribe(listener: Listener, name: str = "a listener") -> Iterator[None]:
    """Call `listener` for every event while the context is open; `name` is what users call it."""
    entry = (name, listener)
    _listeners.append(entry)
    try:
        yield
    finally:
        if entry in _listeners:
            _listeners.remove(entry)


def emit(kind: str, **payload: object) -> None:
    """Pass an event to every listener.

    A listener that raises is removed and a warning is logged: a listener must never end a run.
    """
    for entry in [*_listeners]:
        name, listener = entry
        try:
            listener(kind, payload)
        except Exception:  # whatever a terminal, a disk or a tracker's service raises
            _listeners.remove(entry)
            logger.warning(
                "%s failed, and this attempt goes on without it. No result depends on it.",
                name,
                exc_info=True,
            )
