"""Progress bars and closing tables: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cirloop import stopping
from cirloop.shown import safe

T = TypeVar("T")
console = Console(stderr=True)
logger = logging.getLogger("cirloop")
LINE_EVERY = 15.0


class Safe(logging.Formatter):
    """Log lines without what steers a terminal and without secrets; tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return safe(super().format(record))


def start_logging() -> None:
    """One line per event, through rich on a terminal."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]")
        handler.setFormatter(Safe("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(Safe("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)


def progress(items: Iterable[T], title: str) -> Iterator[T]:
    """`items` with a bar and the time left; on no terminal, a plain line now and then. A run that is asked to stop does
    so between two of them."""
    total = len(items) if isinstance(items, Sized) else None
    if total == 0:
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            for item in bar.track(items, total=total, description=safe(title)):
                stopping.check()
                yield item
        return
    began = last = time.monotonic()
    for done, item in enumerate(items):
        stopping.check()
        now = time.monotonic()
        if done and total and now - last > LINE_EVERY:
            logger.info("%s: %d of %d, about %.0f s left", title, done, total, (now - began) / done * (total - done))
            last = now
        yield item


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    out: Console | None = None,
    numbers: bool = True,
) -> None:
    """Print a table; the first column is text, the rest too or `numbers`."""
    made = Table()
    for number, column in enumerate(columns):
        made.add_column(Text(safe(column)), justify="right" if number and numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(safe(str(cell))) for cell in row))  # not markup: data sets and models wrote some of it
    target = out or Console(width=None if console.is_terminal else 120)
    target.print(safe(title), highlight=False, markup=False)
    target.print(made)


def metric_rows(results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[list[str]]:
    """One row an iteration: each metric in percent as `value ± standard error`; one without a value as `none`."""

    def cell(result: dict[str, Any], metric: str) -> str:
        if metric not in result["metrics"]:
            return "none"
        return f"{100 * result['metrics'][metric]:.1f} ± {100 * result['standard_errors'][metric]:.1f}"

    return [[str(result["iteration"]), *(cell(result, metric) for metric in metrics)] for result in results]
