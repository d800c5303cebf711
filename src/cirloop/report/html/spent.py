"""What the stages cost, from `costs.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cirloop.report.costs import COLUMNS, FILE, NONE, Costs, cells
from cirloop.report.html.charts import Chart, Series, Table, bars
from cirloop.report.html.source import Source, or_none, shortened

KINDS = {
    "evaluation": "evaluate",
    "checkpoint": "train",
    "hard_negatives": "mine",
    "augmented_samples": "caption",
    "accounting": "account",
}


@dataclass(frozen=True, slots=True)
class Spent:
    chart: Chart | None
    table: Table | None
    warnings: tuple[str, ...]
    note: str


def spent(source: Source) -> Spent:
    if not (source.directory / FILE).exists():
        return Spent(None, None, (), f"There is no {FILE}.")
    rows, wrong = or_none(lambda: Costs(source.directory).read())
    if not rows:
        return Spent(None, None, (), wrong)
    done = [row for row in rows if "seconds" in row]
    warnings = tuple(f"{row['stage']}: {text}" for row in rows for text in row.get("warnings", ()))
    return Spent(_chart(done) if done else None, _table(rows), tuple(map(shortened, warnings)), "")


def _turn(row: Mapping[str, Any]) -> tuple[str, int]:
    """Kind of a stage and the iteration it is counted with: images mined by model t-1 serve iteration t."""
    name = str(row["stage"])
    kind = next((word for start, word in KINDS.items() if name.startswith(start)), name)
    found = re.search(r"_iter_(\d+)", name)
    return kind, -1 if found is None else int(found[1]) + (kind == "mine")


def _chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        kind, turn = _turn(row)
        of = seconds.setdefault(kind, {})
        of[turn] = of.get(turn, 0.0) + float(row["seconds"])
    turns = sorted({turn for of in seconds.values() for turn in of})
    unit, name = (
        (3600.0, "hours") if sum(map(sum, (of.values() for of in seconds.values()))) > 36000 else (60.0, "minutes")
    )
    names = {turn: "base" if turn < 0 else str(turn) for turn in turns}
    kinds = [word for word in KINDS.values() if word in seconds] + [
        word for word in seconds if word not in KINDS.values()
    ]
    parts = [
        Series(kind, tuple(map(float, turns)), tuple(seconds[kind].get(turn, 0.0) / unit for turn in turns), (), i)
        for i, kind in enumerate(kinds)
    ]
    told = tuple((names[t], *(f"{seconds[kind].get(t, 0.0):.1f}" for kind in kinds)) for t in turns)
    whole = sum(sum(of.values()) for of in seconds.values())
    return bars(
        "Time by stage", f"A bar an iteration, all attempts counted; {whole / unit:.1f} {name} in all.",
        Table("Seconds by iteration and stage", ("iteration", *kinds), told), parts,
        [(float(turn), names[turn]) for turn in turns], ("iteration", name),
    )  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row an attempt, as the closing table of a run has it."""
    told = []
    for row in rows:
        attempt = "" if row["attempt"] == 1 else f", attempt {row['attempt']}"
        values = cells(dict(row)) if "seconds" in row else dict.fromkeys(COLUMNS[1:], NONE)
        ended = "" if row.get("finished") else ", not finished"
        told.append((shortened(f"{row['stage']}{attempt}{ended}"), *values.values()))
    kept = [i for i, _ in enumerate(COLUMNS) if not i or any(cell[i] != NONE for cell in told)]
    return Table("Cost of each attempt at a stage", tuple(COLUMNS[i] for i in kept),
                 tuple(tuple(cell[i] for i in kept) for cell in told))  # fmt: skip
