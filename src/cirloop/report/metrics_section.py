"""The evaluations of a run: metrics by iteration beside a control, and what differs from what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from cirloop.artifacts import schema
from cirloop.monitoring.console import ERROR_WORDS, metric_rows
from cirloop.report.charts import Chart, Table, draw, name_ticks, percent
from cirloop.report.report_data import ReportData, Section, try_read
from cirloop.types import QueryId

RESULTS = "evaluation_results.json"
COMPARABLE = ("split", "queries", "gallery", "protocol")
"""What two results must have in common to be drawn on one axis."""
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation without its queries' best images. `values_Q` are what iterations are compared
    on (float32), `ranks_Q` the targets' ranks, or margins where people chose between sets
    (float64)."""

    name: str
    label: str
    result: Result
    queries: Sequence[QueryId]
    values_Q: npt.NDArray[np.float32]
    ranks_Q: npt.NDArray[np.float64]


def evaluations(data: ReportData) -> list[Evaluation]:
    """Return the finished evaluations, base first, then by iteration."""
    base = "evaluation_base.json"
    names = [base] if base in data.names else []
    names += [f"evaluation_iter_{t}.json" for t in data.iterations("evaluation_iter_{t}.json")]
    return [_evaluation(name, data.read(name)) for name in names]


def _evaluation(name: str, content: dict[str, Any]) -> Evaluation:
    content.pop("top", None)
    ranks = content.pop("ranks")
    queries = [row[0] for row in ranks]
    values_Q = np.array([row[2] for row in ranks], np.float32)
    return Evaluation(
        name, content["iteration"], content, queries, values_Q, np.array([row[1] for row in ranks])
    )


def section(data: ReportData, evaluated: Sequence[Evaluation]) -> Section:
    if not evaluated:
        return Section("recalls", "Recalls by iteration", ["Nothing is evaluated yet."])
    results = [evaluation.result for evaluation in evaluated]
    control, control_note = _control(data, results[0])
    drawn = [metric for metric in data.headline if any(metric in row["metrics"] for row in results)]
    last = results[-1]
    notes = [
        (
            f"{last['protocol']}. base is the model before any training, 0 after the warm-up on"
            " human triplets."
        ),
        control_note,
    ]
    if last["missing_images"] or last["dropped_queries"]:
        notes.append(
            f"{last['missing_images']} images of the gallery are missing, "
            f"{last['dropped_queries']} queries dropped."
        )
    labelled = [*results, *({**row, "iteration": f"control {row['iteration']}"} for row in control)]
    metrics = list(dict.fromkeys(metric for row in results for metric in row["metrics"]))
    title = "All metrics, percent ± standard error over queries"
    everything = Table(title, ("iteration", *metrics), metric_rows(labelled, metrics))
    tables = [everything, *_compared(data)]
    chart = _chart(data, drawn, results, control, labelled)
    return Section("recalls", "Recalls by iteration", notes, (), [chart], tables)


def _control(data: ReportData, own: Result) -> tuple[Sequence[Result], str]:
    """Return the control's results, where it was evaluated alike, and a note about it."""
    if data.control is None:
        return [], ""
    file = data.control / RESULTS
    name = data.control.name
    if not file.exists():
        return [], f"The control {name} has no {RESULTS} yet."
    content, problem = try_read(lambda: schema.read(file))
    if content is None:
        return [], f"The control {name} cannot be read: {problem}"
    different = [
        key for key in COMPARABLE if any(row[key] != own[key] for row in content["results"])
    ]
    if different:
        return (
            [],
            (
                f"The control {name} is not drawn: it was evaluated with another"
                f" {', '.join(different)}."
            ),
        )
    return content["results"], f"Dashed: the control {name}, evaluated alike."


def _chart(
    data: ReportData,
    metrics: Sequence[str],
    results: Sequence[Result],
    control: Sequence[Result],
    labelled: Sequence[Result],
) -> Chart:
    rows = [[row["iteration"], *(_exact(row, metric) for metric in metrics)] for row in labelled]
    table = Table("Fractions ± standard errors", ("iteration", *metrics), rows)
    title = f"{data.mark}Metrics with one standard error"
    return draw("recalls", title, table, lambda axes: plot_metrics(axes, metrics, results, control))


def plot_metrics(
    axes: Axes, metrics: Sequence[str], results: Sequence[Result], control: Sequence[Result]
) -> None:
    """Plot a line per metric over the iterations with error bars; the control's dashed, in the same
    colour."""
    numbers = {row["iteration"] for row in (*results, *control)} - {"base"}
    labels = ["base", *sorted(numbers, key=int)]
    for i, metric in enumerate(metrics):
        for suffix, style, series in (("", "o-", results), (", control", "o--", control)):
            rows = [row for row in series if metric in row["metrics"]]
            if rows:
                axes.errorbar(
                    [labels.index(row["iteration"]) for row in rows],
                    [row["metrics"][metric] for row in rows],
                    [row["standard_errors"][metric] for row in rows],
                    fmt=style,
                    color=f"C{i}",
                    markerfacecolor="none" if suffix else None,
                    label=metric + suffix,
                )
    name_ticks(axes, labels)
    percent(axes)
    axes.set_xlabel("iteration")


def _exact(result: Result, metric: str) -> str:
    if metric not in result["metrics"]:
        return "none"
    return f"{result['metrics'][metric]} ± {result['standard_errors'][metric]}"


COMPARED = (
    "iterations",
    "difference",
    "p of a randomisation test, corrected (Holm)",
    *ERROR_WORDS.values(),
)


def _compared(data: ReportData) -> list[Table]:
    """Return the table of comparisons, from `evaluation_results.json`."""
    compared = data.results.get("compared")
    if not compared:
        return []
    rows = [
        (
            f"{c['from']} → {c['to']}",
            f"{100 * c['difference']:+.1f} ± {100 * c['se']:.1f}",
            f"{c['p_corrected']:.4f}",
            *(str(c["errors"][name]) if c.get("errors") else "" for name in ERROR_WORDS),
        )
        for c in compared
    ]
    title = (
        f"Each iteration against the one before it, paired over queries: {compared[0]['metric']},"
        " points; then queries whose first image is wrong in both, newly, or no longer"
    )
    return [Table(title, COMPARED, rows)]
