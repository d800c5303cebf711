"""What the stages cost, from `costs.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from cirloop.monitoring.costs import FILE, Costs, columns_in_use, format_cells
from cirloop.monitoring.stage_names import STAGES, stage_words, turn_and_kind
from cirloop.report.charts import Chart, Table, draw, stacked_bars
from cirloop.report.report_data import ReportData, Section, shortened, try_read


def section(data: ReportData) -> Section:
    title = "Cost by stage"
    if not (data.directory / FILE).exists():
        return Section("cost", title, [f"There is no {FILE}."])
    rows, problem = try_read(lambda: Costs(data.directory).read())
    if not rows:
        return Section("cost", title, [problem])
    warnings = [
        shortened(f"{stage_words(row['stage'])}: {text}")
        for row in rows
        for text in row.get("warnings", ())
    ]
    done = [row for row in rows if "seconds" in row]
    return Section(
        "cost", title, (), warnings, [_chart(data, done)] if done else [], [_table(rows)]
    )


def _chart(data: ReportData, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the time by stage, over all attempts."""
    seconds: Counter[tuple[int, str]] = Counter()
    for row in rows:
        seconds[turn_and_kind(str(row["stage"]))] += row["seconds"]
    turns = sorted({turn for turn, _ in seconds})
    kinds = sorted({kind for _, kind in seconds}, key=[*STAGES.values()].index)
    labels = ["base" if turn < 0 else str(turn) for turn in turns]
    divisor, unit = (3600, "hours") if seconds.total() > 36000 else (60, "minutes")
    parts = {kind: [seconds[turn, kind] / divisor for turn in turns] for kind in kinds}
    cells_of = [
        [label, *(f"{seconds[turn, kind]:.1f}" for kind in kinds)]
        for label, turn in zip(labels, turns, strict=True)
    ]

    def plot(axes: Axes) -> None:
        stacked_bars(axes, labels, parts)
        axes.set_xlabel("iteration")
        axes.set_ylabel(unit)

    table = Table("Seconds by iteration and stage", ("iteration", *kinds), cells_of)
    return draw("costs", f"{data.mark}Time by stage", table, plot)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a row per attempt, as the closing table of a run has it."""
    shown = []
    for row in rows:
        attempt = "" if row["attempt"] == 1 else f", attempt {row['attempt']}"
        ended = "" if row.get("finished") else ", not finished"
        shown.append(
            [shortened(f"{stage_words(row['stage'])}{attempt}{ended}"), *format_cells(row).values()]
        )
    return Table("Cost of each attempt at a stage", *columns_in_use(shown))
