"""How the training sets grow, how hard the mining is set, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cirloop.report.html.captions import Written
from cirloop.report.html.charts import Chart, Series, Table, lines
from cirloop.report.html.mined import Mined
from cirloop.report.html.source import Source

NAME = "checkpoint_iter_{t}"
POINTS = 300
"""Of the loss curve: means over equal numbers of steps."""


@dataclass(frozen=True, slots=True)
class Log:
    """What is kept of a training log: the losses of the steps that were taken, and how many were left out."""

    iteration: int
    losses: tuple[float, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Growth:
    sizes: Chart | None
    hardness: Chart | None
    loss: Chart | None


def logs(source: Source) -> tuple[Log, ...]:
    return tuple(source.once(("log", t), lambda t=t: _read(source, t)) for t in source.iterations(NAME))  # type: ignore[misc]


def _read(source: Source, iteration: int) -> Log:
    rows: list[Mapping[str, Any]] = source.read(NAME.format(t=iteration))["rows"]
    losses = tuple(float(row["loss"]) for row in rows if "ids" not in row)  # a batch that was left out has ids
    return Log(iteration, losses, len(rows) - len(losses))


def growth(source: Source, found: Sequence[Mined], texts: Sequence[Written]) -> Growth:
    taken = logs(source)
    return Growth(_sizes(source, found, texts), _hardness(source, found, taken), _loss(taken))


def _sizes(source: Source, found: Sequence[Mined], texts: Sequence[Written]) -> Chart | None:
    """What each iteration trains on: human triplets, those written so far, and mined images."""
    if not found:
        return None
    human = len(source.train.triplets) if source.train else None
    accepted = {w.iteration: int(w.summary["accepted"]) for w in texts}
    sizes = {
        m.iteration + 1: (sum(n for t, n in accepted.items() if t <= m.iteration + 1), int(m.summary["negatives"]))
        for m in found
    }
    xs = tuple(map(float, sizes))
    series = [Series("human", xs, tuple(human for _ in xs), (), 0)] if human is not None else []
    series += [
        Series("written", xs, tuple(float(new) for new, _ in sizes.values()), (), 1),
        Series("mined", xs, tuple(float(num) for _, num in sizes.values()), (), 2),
    ]
    rows = tuple(
        (
            str(t),
            "not known" if human is None else str(human),
            str(accepted.get(t, 0)),
            str(new),
            str(num),
            _draws(found, t),
        )
        for t, (new, num) in sizes.items()
    )
    columns = ("iteration", "human triplets", "new texts", "texts so far", "mined images", "set drawn from, mean")
    return lines(
        "What each iteration trains on", "Numbers of human triplets, of triplets written so far, and of mined images.",
        Table("Set sizes", columns, rows), series, [(float(t), str(t)) for t in sizes], ("iteration", "number"),
    )  # fmt: skip


def _draws(found: Sequence[Mined], iteration: int) -> str:
    """Of strategies that draw from a set."""
    sizes = {m.iteration + 1: m.summary.get("set_size") for m in found}
    told = sizes.get(iteration)
    return f"{told['mean']:.1f}" if told else "none"


def _hardness(source: Source, found: Sequence[Mined], taken: Sequence[Log]) -> Chart | None:
    """Of a curriculum: how far from its easiest (0) to its hardest strategy (1) each mining stood."""
    if source.hardness is None or not found:
        return None
    losses = {log.iteration: float(np.mean(log.losses)) for log in taken if log.losses}
    turns = [m.iteration for m in found]
    items = [(t, source.hardness(t, [loss for before, loss in losses.items() if before <= t])) for t in turns]
    series = Series("share", tuple(float(t) for t, _ in items), tuple(share for _, share in items), (), 3)
    rows = tuple((str(t), f"{share:.4f}") for t, share in items)
    return lines(
        "Curriculum", f"Share of hard images by mining: from {items[0][1]:.2f} to {items[-1][1]:.2f}.",
        Table("Share of hard images", ("by model", "share"), rows), [series], [(float(t), str(t)) for t, _ in items],
        ("by model", "percent"), percent=True,
    )  # fmt: skip


def _loss(found: Sequence[Log]) -> Chart | None:
    """One curve through all iterations, which take turns in two colours."""
    trained = [log for log in found if log.losses]
    if not trained:
        return None
    step = -(-sum(len(log.losses) for log in trained) // POINTS)
    series: list[Series] = []
    labels: list[tuple[float, str]] = []
    at = 0
    for log in trained:
        starts = np.arange(0, len(log.losses), step)
        means = [float(np.mean(log.losses[s : s + step])) for s in starts]
        series.append(
            Series(f"M{log.iteration}", tuple((at + starts + 1.0).tolist()), tuple(means), (), len(series) % 2)
        )
        labels.append((float(at + 1), f"M{log.iteration}"))
        at += len(log.losses)
    rows = tuple(
        (str(log.iteration), str(len(log.losses)), str(log.left_out), f"{log.losses[0]:.6g}",
         f"{float(np.mean(log.losses)):.6g}", f"{log.losses[-1]:.6g}")
        for log in trained
    )  # fmt: skip
    columns = ("iteration", "steps", "left out", "first", "mean", "last")
    about = f"Loss over {at} steps" + (f", means of {step} steps" if step > 1 else "")
    return lines(
        "Training loss", f"{about}; the iterations take turns in two colours.",
        Table("Loss of each iteration", columns, rows),
        series, labels, (about, "loss"), from_zero=False, marks=False,
    )  # fmt: skip
