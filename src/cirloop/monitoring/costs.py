"""What the stages of a run cost: `costs.json` of the run directory, a line when a stage ends, a
table when a run does.

A row per stage and attempt, none of it part of any fingerprint. A row is there from the start of
the attempt, so that one of a killed attempt stays, with `finished` false.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked
from cirloop.monitoring import profiling
from cirloop.monitoring.console import table
from cirloop.monitoring.profiling import StageMetrics
from cirloop.monitoring.stage_names import stage_words, turn_and_kind
from cirloop.types import UserError

logger = logging.getLogger(__name__)
FILE = "costs.json"
PROFILE = "profile"
COLUMNS = (
    "stage",
    "s",
    "images/s",
    "tokens/s",
    "texts/s",
    "cached",
    "padding",
    "waiting s",
    "GB",
    "GPU GB",
    "GFLOP",
    "GFLOP/s",
)
SUMMED = ("s", "images/s", "tokens/s", "texts/s", "GB", "GPU GB")
"""Columns of the table that closes a run."""
NONE = "-"


class Costs:
    """The costs of one run directory."""

    def __init__(self, directory: Path, mark: Mapping[str, Any] | None = None) -> None:
        """Open the costs of a run directory; `mark` stands first in the file."""
        self._mark = mark or {}
        self._path = directory / FILE
        self._made = list[dict[str, Any]]()
        self._warnings: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """Read the rows so far. Raises UserError where the file is damaged."""
        content = schema.read(self._path) if self._path.exists() else {"stages": []}
        if not isinstance(content.get("stages"), list):
            raise UserError(
                f"{self._path} is damaged (it lists no stages). No result needs it: delete it."
            )
        rows: list[dict[str, Any]] = content["stages"]
        return rows

    @contextmanager
    def stage(self, name: str, profile: bool) -> Iterator[None]:
        """Meter a stage. With `profile` some batches are traced, and operations counted."""
        rows = self.read()
        attempt = 1 + sum(row["stage"] == name for row in rows)
        row: dict[str, Any] = {"stage": name, "attempt": attempt, "finished": False}
        rows.append(row)
        self._write(rows)
        self._warnings = []
        try:
            with profiling.metering(self._path.parent / PROFILE if profile else None) as spent:
                yield
            row["finished"] = True
        finally:
            row |= spent.to_json() | ({"warnings": self._warnings} if self._warnings else {})
            self._write(rows)
        self._made.append(row)
        logger.info("%s: done in %s", stage_words(name), describe(row))

    def warn(self, text: str) -> None:
        """Log a warning about the running stage, and keep it in the stage's row."""
        logger.warning("warning: %s", text)
        self._warnings.append(text)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_checked(self._path, "costs", {**self._mark, "stages": rows})

    def show(self) -> None:
        """Print a row for each kind of stage that ran since this object was created."""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in self._made:
            kinds.setdefault(turn_and_kind(row["stage"])[1], []).append(row)
        if kinds:
            shown = [[kind, *_summed(rows)] for kind, rows in kinds.items()]
            table(f"Cost of all rounds; by stage in {self._path}", ("stage", *SUMMED), shown)


def log_start(name: str) -> None:
    """Log that a stage begins; on a terminal the view at the bottom says so."""
    logger.info("%s: start (%s)", stage_words(name), name, extra={"bar": True})


def _summed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of several stages of one kind: seconds, rates over all of them, and the
    most memory."""
    total = StageMetrics()
    for row in rows:
        spent = StageMetrics(**{name: row[name] for name in StageMetrics.__annotations__})
        total.add_sequential(spent)
        total.seconds += spent.seconds
    cells = format_cells(total.to_json())
    return [cells[column] for column in SUMMED]


def columns_in_use(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return `COLUMNS` and the cells below them, without the columns that are empty in every
    row."""
    used = [i for i, _ in enumerate(COLUMNS) if not i or any(row[i] != NONE for row in rows)]
    return [COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows]


def format_cells(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of `costs.json` by column; `NONE` for what is zero or unknown.

    A stage that was killed has no numbers.
    """
    if "seconds" not in row:
        return dict.fromkeys(COLUMNS[1:], NONE)
    spent = StageMetrics(**{name: row[name] for name in StageMetrics.__annotations__})
    seconds = max(row["seconds"], 1e-9)
    images = spent.images_encoded + spent.images_cached
    places = spent.tokens + spent.padding
    values = (
        f"{seconds:.1f}",
        f"{images / seconds:.3g}" if images else NONE,
        f"{(spent.tokens + spent.tokens_written) / seconds:.3g}" if spent.tokens else NONE,
        f"{spent.texts / spent.writing:.3g}" if spent.texts and spent.writing else NONE,
        f"{100 * spent.images_cached / images:.0f}%" if images else NONE,
        f"{100 * spent.padding / places:.1f}%" if places else NONE,
        f"{spent.waiting:.1f}",
        f"{spent.memory_bytes / 1e9:.2f}",
        f"{spent.gpu_bytes / 1e9:.2f}" if spent.gpu_bytes else NONE,
        _short(spent.flops / 1e9) if spent.flops else NONE,
        _short(spent.flops / 1e9 / seconds) if spent.flops else NONE,
    )
    return dict(zip(COLUMNS[1:], values, strict=True))


def describe(row: dict[str, Any]) -> str:
    """Describe a row in a few words: seconds, texts a second, and what the stage produced."""
    units = {
        "items": "embedded",
        "texts": "texts",
        "tokens_written": "tokens written",
        "triplets": "triplets",
        "steps": "steps",
    }
    parts = [f"{row[name]} {unit}" for name, unit in units.items() if row[name]]
    cells = format_cells(row)
    rate = [] if cells["texts/s"] == NONE else [f"{cells['texts/s']} texts/s"]
    return ", ".join([f"{cells['s']} s", *parts, *rate])


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
