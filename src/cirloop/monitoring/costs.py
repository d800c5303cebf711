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
        logger.info("%s cost: %s", name, describe(row))

    def warn(self, text: str) -> None:
        """Log a warning about the running stage, and keep it in the stage's row."""
        logger.warning("warning: %s", text)
        self._warnings.append(text)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_checked(self._path, "costs", {**self._mark, "stages": rows})

    def show(self) -> None:
        """Print the table of the stages that ran since this object was created."""
        if self._made:
            shown = [[row["stage"], *format_cells(row).values()] for row in self._made]
            title = (
                f"Cost; the columns are explained in docs/costs.md, all of it is in {self._path}"
            )
            table(title, *columns_in_use(shown))


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
    """Describe a row in one line, with what the stage produced."""
    units = {
        "items": "embedded",
        "texts": "texts",
        "tokens_written": "tokens written",
        "triplets": "triplets",
        "steps": "steps",
    }
    parts = [f"{row[name]} {unit}" for name, unit in units.items() if row[name]]
    return ", ".join(
        [f"{value} {column}" for column, value in format_cells(row).items() if value != NONE]
        + parts
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
