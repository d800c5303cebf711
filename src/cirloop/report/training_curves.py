"""How the training sets grow, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cirloop.report.charts import Chart, Table, draw
from cirloop.report.negatives_section import Summaries
from cirloop.report.report_data import ReportData, Section

MAX_POINTS = 300
"""Of the loss curve: means over equal numbers of steps."""


def section(data: ReportData, mined: Summaries, written: Summaries) -> Section:
    contents = dict(data.artifacts("checkpoint_iter_{t}"))
    logs = {t: content["rows"] for t, content in contents.items()}
    losses = {
        t: [float(row["loss"]) for row in rows if "ids" not in row] for t, rows in logs.items()
    }
    left_out = {
        t: len(rows) - len(losses[t]) for t, rows in logs.items()
    }  # batches that were left out have ids
    trained = {t: curve for t, curve in losses.items() if curve}
    charts = [_loss(data, trained, left_out)] if trained else []
    tables = [*_set_sizes(data, mined, written), *_drawn(contents)]
    notes = [] if charts or tables else ["Nothing is trained yet."]
    return Section("training", "Training: loss and sets", notes, (), charts, tables)


def _set_sizes(data: ReportData, mined: Summaries, written: Summaries) -> list[Table]:
    """Return what each iteration trains on: human triplets, augmented ones so far, and mined
    images."""
    human = str(len(data.train.triplets)) if data.train else "not known"
    accepted = {t: int(summary["accepted"]) for t, summary in written.items()}
    rows = []
    for t, summary in ((before + 1, summary) for before, summary in mined.items()):
        size = summary.get("set_size")
        total = sum(num for turn, num in accepted.items() if turn <= t)
        rows.append(
            (
                str(t),
                human,
                str(accepted.get(t, 0)),
                str(total),
                str(summary["negatives"]),
                f"{size['mean']:.1f}" if size else "none",
            )
        )
    columns = (
        "iteration",
        "human triplets",
        "new texts",
        "texts so far",
        "mined images",
        "set drawn from, mean",
    )
    return [Table("Set sizes", columns, rows)] if rows else []


def _drawn(contents: Mapping[int, Mapping[str, Any]]) -> list[Table]:
    """Return how often each iteration trained on human triplets and on the texts of each
    iteration."""
    rows = [
        (
            str(t),
            "human triplets" if origin == "human" else f"texts of iteration {origin}",
            str(count["triplets"]),
            f"{count['rows'] / count['triplets']:.1f}",
        )
        for t, content in contents.items()
        for origin, count in sorted(content.get("drawn", {}).items(), key=_human_first)
    ]
    columns = ("iteration", "trained on", "different ones", "times each")
    return [Table("Triplets that were trained on", columns, rows)] if rows else []


def _human_first(origin_and_count: tuple[str, object]) -> tuple[int, str]:
    """Return what sorts human triplets before texts, and those by iteration."""
    origin, _ = origin_and_count
    return (0, "") if origin == "human" else (len(origin), origin)


def _loss(
    data: ReportData, losses: Mapping[int, Sequence[float]], left_out: Mapping[int, int]
) -> Chart:
    """Draw one loss curve through all iterations."""
    num_steps = sum(map(len, losses.values()))
    step = -(-num_steps // MAX_POINTS)

    def plot(axes: Axes) -> None:
        done = 0
        for t, values in losses.items():
            starts = range(0, len(values), step)
            means = [np.mean(values[start : start + step]) for start in starts]
            axes.plot(
                [done + start + 1 for start in starts],
                means,
                label=f"iteration {t}" if len(losses) <= 8 else "",
            )
            done += len(values)
        axes.set_xlabel("step" if step == 1 else f"step; means of {step}")
        axes.set_ylabel("loss")

    rows = [
        (
            str(t),
            str(len(values)),
            str(left_out[t]),
            *(f"{value:.6g}" for value in (values[0], np.mean(values), values[-1])),
        )
        for t, values in losses.items()
    ]
    table = Table(
        "Loss of each iteration", ("iteration", "steps", "left out", "first", "mean", "last"), rows
    )
    return draw("loss", f"{data.mark}Training loss", table, plot)
