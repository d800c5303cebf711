"""The live view: on a terminal, one region at the bottom with the stage, its bars and the last
recalls.

Log lines scroll above it, since both go through one console. The region is there while a run works
or a bar moves, and leaves nothing behind. While launched processes work, the terminal is theirs:
the first of them has a view of its own.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cirloop.io.redact import sanitize
from cirloop.monitoring import events

console = Console(stderr=True)
"""Everything that a person sees while a command works goes through it."""
WIDE_TERMINAL = 80
"""Columns of a terminal from which on there is room for a bar."""
RECALL_WIDTH = 14
"""Columns that a recall with its standard error takes."""
MAX_EVALUATIONS = 4
"""Evaluations shown; the base model's and the latest."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """The lines above the progress bars."""

    run: str
    stage: str
    number: int
    of: int
    iteration: int | None
    iterations: int
    seconds_left: float | None = None
    """Seconds that the rest of the run takes from the beginning of this stage on; None = nobody
    knows."""
    recalls: Sequence[Sequence[str]] = ()
    """Names of the columns, then a row an evaluation."""
    began: float = field(default_factory=time.monotonic)


class LiveDisplay:
    """A listener that shows events on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(console=console)
        self._tasks: dict[str, TaskID] = {}
        self._live: Live | None = None
        self._head: RunHeader | None = None
        self._away = False

    def __call__(self, kind: str, payload: dict[str, Any]) -> None:
        if kind == "bar":
            self._bar(**payload)
        elif kind == "head":
            self._head = payload["head"]
        elif kind == "processes":
            self._away = payload["working"]
        else:
            return
        if self._away or (self._head is None and not self._tasks):
            self.stop()
        elif self._live is None:
            self._start()

    def _bar(
        self, key: str, title: str, done: int | None, total: int | None, rate: str = ""
    ) -> None:
        if done is None:
            task = self._tasks.pop(key, None)
            if task is not None:
                self._bars.remove_task(task)
        elif key in self._tasks:
            self._bars.update(self._tasks[key], completed=done, rate=sanitize(rate))
        else:
            self._tasks[key] = self._bars.add_task(
                sanitize(title), total=total, completed=done, rate=sanitize(rate)
            )

    def _start(self) -> None:
        """Show the region; Python's own prints to a terminal appear above it."""
        self._live = Live(
            get_renderable=self._shown,
            console=self._console,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()
        # Live hides it, and a process that is killed could not bring it back.
        self._console.show_cursor(True)

    def stop(self) -> None:
        """Remove the region."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _shown(self) -> RenderableType:
        width = self._console.width
        self._bars.columns = _columns(width)
        parts: list[RenderableType] = []
        if self._head is not None:
            parts += [
                _line(text, style)
                for text, style in zip(_words(self._head), ("bold", "dim"), strict=True)
            ]
        if self._tasks:
            parts.append(
                self._bars.make_tasks_table(
                    [task for task in self._bars.tasks if not task.finished]
                )
            )
        if self._head is not None and len(self._head.recalls) > 1:
            parts.append(_recalls(self._head.recalls, width))
        return Group(*parts)


@contextmanager
def live_display() -> Iterator[None]:
    """Show bars and stages on an interactive terminal, and restore the terminal afterwards."""
    if not console.is_interactive:
        yield
        return
    view = LiveDisplay(console)
    with events.subscribe(view):
        try:
            yield
        finally:
            view.stop()


def _columns(width: int) -> tuple[ProgressColumn, ...]:
    title = TextColumn("{task.description}", markup=False)
    rate = TextColumn("{task.fields[rate]}", markup=False)
    few: tuple[ProgressColumn, ...] = (
        title,
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        rate,
    )
    many = (
        title,
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        rate,
    )
    return many if width >= WIDE_TERMINAL else few


def _line(text: str, style: str) -> Text:
    return Text(sanitize(text), style, no_wrap=True, overflow="ellipsis")


def _words(head: RunHeader) -> tuple[str, str]:
    """Return the stage, then its place in the run; narrow terminals cut the end of each."""
    iteration = f"iteration {head.iteration} of {head.iterations}" if head.iteration else "warm-up"
    parts = ["base model" if head.iteration is None else iteration]
    seconds_left = (
        None if head.seconds_left is None else head.seconds_left - (time.monotonic() - head.began)
    )
    if seconds_left is not None and seconds_left > 0:
        parts.append(f"about {duration(seconds_left)} left in all")
    return f"stage {head.number} of {head.of}: {head.stage}", " · ".join([*parts, head.run])


def duration(seconds: float) -> str:
    """Return a time in words, to the minute or the tenth of an hour."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute"
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _recalls(rows: Sequence[Sequence[str]], width: int) -> Table:
    """Build the table of recalls, with as many columns as fit."""
    grid = Table.grid(padding=(0, 2))
    kept = max(2, min(len(rows[0]), width // RECALL_WIDTH))
    last = rows[1:] if len(rows) <= MAX_EVALUATIONS else [rows[1], *rows[1 - MAX_EVALUATIONS :]]
    for number in range(kept):
        grid.add_column(no_wrap=True, justify="right" if number else "left")
    for number, row in enumerate(itertools.chain(rows[:1], last)):
        grid.add_row(*(Text(sanitize(cell), "dim" if number == 0 else "") for cell in row[:kept]))
    return grid
