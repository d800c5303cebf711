"""A comparison as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cirloop.evaluation.significance import Estimate
from cirloop.report.charts import Table
from cirloop.tools.compare.comparison import Change, Comparison, Row
from cirloop.tools.compare.groups import Group


def title(comparison: Comparison) -> str:
    """Return what the numbers of the table are."""
    common = comparison.common
    return (
        f"{common['split']}, percent ± standard error over queries, of several runs over runs."
        f" {common['protocol']}"
    )


def explanation(comparison: Comparison) -> str:
    """Return what the differences are."""
    num = len(comparison.changes)
    comparisons = f"{num} comparison{'s' * (num > 1)}"
    text = (
        f"Difference to {comparison.rows[0].group.name} in {comparison.metric}, in points, paired"
        f" over the {len(comparison.queries):,} queries that all share; p of a randomisation test,"
        f" corrected for {comparisons} (Holm)."
    )
    if _has_groups(comparison):
        text += (
            " Of several runs it is that of their means, and p says nothing about other seeds: see"
            " the standard error over runs."
        )
    return text


def main_table(comparison: Comparison, reported: Sequence[str]) -> Table:
    """Return the table of metrics and differences."""
    metrics = [name for name in reported if any(name in row.metrics for row in comparison.rows)]
    groups = _has_groups(comparison)
    columns = [
        "run",
        "iteration",
        *metrics,
        "difference",
        *(["over runs"] if groups else []),
        "p",
        "won",
        "lost",
    ]
    rows = [
        [
            _name(row),
            row.iterations,
            *(_cell(row.metrics.get(name)) for name in metrics),
            *_change_cells(row.change, groups=groups),
        ]
        for row in comparison.rows
    ]
    return Table(title(comparison), columns, rows)


def _name(row: Row) -> str:
    num = len(row.evaluated)
    return f"{row.group.name} ({num} runs)" if num > 1 else row.group.name


def _has_groups(comparison: Comparison) -> bool:
    return any(len(row.evaluated) > 1 for row in comparison.rows)


def _cell(metric: Estimate | None) -> str:
    return "none" if metric is None else f"{100 * metric.value:.1f} ± {100 * metric.se:.1f}"


def _change_cells(change: Change | None, *, groups: bool) -> list[str]:
    """Return the cells from `difference` on."""
    if change is None:
        return ["", *([""] if groups else []), "", "", ""]
    seeds = change.over_runs
    over_runs = "" if seeds is None or seeds.se != seeds.se else f"± {100 * seeds.se:.1f}"
    return [
        f"{100 * change.difference.value:+.1f} ± {100 * change.difference.se:.1f}",
        *([over_runs] if groups else []),
        f"{change.p_corrected:.4f}",
        str(len(change.won)),
        str(len(change.lost)),
    ]


def settings_table(groups: Sequence[Group]) -> Table:
    """Return the settings that decide results and are not the same in all groups, of the first run
    of each."""
    flat = [dict(_flat(group.runs[0].config.result_settings())) for group in groups]
    names = sorted({name for settings in flat for name in settings})
    rows = []
    for name in names:
        values = [str(settings.get(name, "")) for settings in flat]
        if len({*values}) > 1:
            rows.append([name, *values])
    return Table("Settings by run", ["setting", *(group.name for group in groups)], rows)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    """Return settings with dotted names."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs


def counts_note(rows: Sequence[Row]) -> str:
    """Return how many queries each row was evaluated on, where they differ; else empty."""
    counts = {
        str(each.run.directory): each.content["queries"] for row in rows for each in row.evaluated
    }
    if len({*counts.values()}) == 1:
        return ""
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"Metrics are of all queries that a run was evaluated on: {listed}."
