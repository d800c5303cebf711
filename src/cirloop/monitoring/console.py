"""Log lines, progress and closing tables: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from cirloop.io.redact import sanitize
from cirloop.monitoring import events, preemption
from cirloop.monitoring.live import console

T = TypeVar("T")
logger = logging.getLogger("cirloop")
LINE_EVERY = 15.0
ERROR_WORDS = {"persistent": "wrong in both", "new": "newly wrong", "mended": "mended"}
"""What the errors are called that a comparison of two iterations counts."""
_numbers = itertools.count()
_title_prefix: ContextVar[str] = ContextVar("mark", default="")


class RedactingFormatter(logging.Formatter):
    """A formatter of log lines and tracebacks without control characters and secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return sanitize(super().format(record))


def start_logging(plain: bool = False) -> None:
    """Log one line per event: through rich on a terminal, else or where `plain` is set as text."""
    handler: logging.Handler
    if console.is_interactive and not plain:
        handler = RichHandler(
            console=console, show_path=False, show_level=False, log_time_format="[%X]"
        )
        handler.setFormatter(RedactingFormatter("%(message)s"))
        # The bar itself is there.
        handler.addFilter(lambda record: not getattr(record, "bar", False))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not getattr(record, "aside", False))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)


@contextmanager
def run_logging() -> Iterator[None]:
    """Log the lines of a run that another program starts: by its handlers, or where it has none to
    standard error. All is put back at the end."""
    root = logging.getLogger()
    level = logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not getattr(record, "aside", False))
    added = [] if root.handlers else [handler]
    try:
        for new in added:
            root.addHandler(new)
        if level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        yield
    finally:
        for new in added:
            root.removeHandler(new)
        logger.setLevel(level)


def progress(items: Iterable[T], title: str) -> Iterator[T]:
    """Yield `items` and emit `bar` events, which the live display shows.

    A line is logged now and then, for files and pipes. A requested stop happens between two items.
    `events.CountedBatches` have a rate too.
    """
    total = len(items) if isinstance(items, Sized) else None
    if total == 0:
        return
    key = f"{os.getpid()}.{next(_numbers)}"
    began = last = time.monotonic()
    try:
        for done, item in enumerate(items):
            preemption.raise_if_requested()
            now = time.monotonic()
            rate = items.rate(done, now - began) if isinstance(items, events.CountedBatches) else ""
            events.emit("bar", key=key, title=title, done=done, total=total, rate=rate)
            if done and total and now - last > LINE_EVERY:
                time_left = f"about {(now - began) / done * (total - done):.0f} s left"
                rates = ", ".join(filter(None, [time_left, rate]))
                logger.info("%s: %d of %d, %s", title, done, total, rates, extra={"bar": True})
                last = now
            yield item
    finally:
        events.emit("bar", key=key, title=title, done=None, total=total, rate="")


def no_progress(items: Iterable[T], title: str) -> Iterable[T]:
    """Return `items`, for the processes beside the one that shows their progress."""
    return items


@contextmanager
def title_prefix(mark: str) -> Iterator[None]:
    """Begin the title of each table with `mark` while the context is open."""
    before = _title_prefix.set(mark)
    try:
        yield
    finally:
        _title_prefix.reset(before)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    out: Console | None = None,
    numbers: bool = True,
) -> None:
    """Print a table; the first column is text, the rest too or `numbers`."""
    grid = Table()
    for number, column in enumerate(columns):
        grid.add_column(
            Text(sanitize(column)),
            justify="right" if number and numbers else "left",
            overflow="fold",
        )
    for row in rows:
        # Not markup: data sets and models wrote some of it.
        grid.add_row(*(Text(sanitize(str(cell))) for cell in row))
    destination = out or Console(width=None if console.is_terminal else 120)
    destination.print(sanitize(_title_prefix.get() + title), highlight=False, markup=False)
    destination.print(grid)


def metric_rows(results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[list[str]]:
    """Return one row per iteration: each metric in percent as `value ± standard error`, or
    `none`."""

    def cell(result: dict[str, Any], metric: str) -> str:
        if metric not in result["metrics"]:
            return "none"
        return (
            f"{100 * result['metrics'][metric]:.1f} ± {100 * result['standard_errors'][metric]:.1f}"
        )

    return [
        [str(result["iteration"]), *(cell(result, metric) for metric in metrics)]
        for result in results
    ]
