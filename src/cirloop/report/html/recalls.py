"""The evaluations of a run: metrics by iteration beside a control, and what differs from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop import schemas
from cirloop.report.html.charts import Chart, Series, Table, lines
from cirloop.report.html.source import Source, or_none
from cirloop.types import QueryId

RESULTS = "evaluation_results.json"
ABOUT = ("split", "queries", "gallery", "protocol")
"""What two results must have in common to be drawn on one axis."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation without its queries' best images. `values_Q` are what iterations are compared on (float32),
    `ranks_Q` the targets' ranks, or margins where people chose between sets (float64)."""

    name: str
    label: str
    result: Mapping[str, Any]
    queries: tuple[QueryId, ...]
    values_Q: npt.NDArray[np.float32]
    ranks_Q: npt.NDArray[np.float64]

    def percent(self, metric: str) -> str:
        return cell(self.result, metric)


@dataclass(frozen=True, slots=True)
class Recalls:
    """Section of the page. `notes` say what a reader must know."""

    evaluations: tuple[Evaluated, ...]
    headline: tuple[str, ...]
    chart: Chart | None
    table: Table | None
    compared: Table | None
    notes: tuple[str, ...]


def cell(result: Mapping[str, Any], metric: str) -> str:
    if metric not in result["metrics"]:
        return "none"
    return f"{100 * result['metrics'][metric]:.1f} ± {100 * result['standard_errors'][metric]:.1f}"


def evaluations(source: Source) -> tuple[Evaluated, ...]:
    """Base first, then the iterations, as far as they are finished."""
    names = [n for n in ("evaluation_base.json",) if n in source.names]
    names += [f"evaluation_iter_{t}.json" for t in source.iterations("evaluation_iter_{t}.json")]
    return tuple(source.once(name, lambda name=name: _read(source, name)) for name in names)  # type: ignore[misc]


def _read(source: Source, name: str) -> Evaluated:
    content = source.read(name)
    ranks = content["ranks"]
    result = {key: value for key, value in content.items() if key not in ("ranks", "top")}
    return Evaluated(
        name, str(content["iteration"]), result, tuple(row[0] for row in ranks),
        np.array([row[2] for row in ranks], np.float32), np.array([row[1] for row in ranks], np.float64),
    )  # fmt: skip


def recalls(source: Source) -> Recalls:
    found = evaluations(source)
    if not found:
        return Recalls((), source.headline, None, None, None, ())
    last = found[-1].result
    metrics = tuple(m for m in source.headline if any(m in e.result["metrics"] for e in found))
    control, notes = _control(source, found)
    if last["missing_images"] or last["dropped_queries"]:
        notes.append(
            f"{last['missing_images']} images of the gallery are missing, {last['dropped_queries']} queries dropped."
        )
    return Recalls(
        found, metrics, _chart(found, metrics, control), _table(found, control), _compared(source), tuple(notes)
    )


def _control(source: Source, found: Sequence[Evaluated]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The results of the control, where there is one that was evaluated alike; else why none is drawn."""
    if source.control is None:
        return [], []
    file, name = source.control / RESULTS, source.control.name
    if not file.exists():
        return [], [f"The control {name} has no {RESULTS} yet."]
    content, wrong = or_none(lambda: schemas.read(file))
    if content is None:
        return [], [f"The control {name} cannot be read: {wrong}"]
    results: list[Mapping[str, Any]] = content["results"]
    unlike = [key for key in ABOUT if any(row[key] != found[0].result[key] for row in results)]
    if unlike:
        return [], [f"The control {name} is not drawn: it was evaluated with another {', '.join(unlike)}."]
    return results, [f"Dashed: the control {name}, evaluated alike."]


def _chart(found: Sequence[Evaluated], metrics: Sequence[str], control: Sequence[Mapping[str, Any]]) -> Chart:
    labels = [e.label for e in found] + [r["iteration"] for r in control]
    ordered = sorted(set(labels), key=lambda label: -1 if label == "base" else int(label))
    places = {label: float(i) for i, label in enumerate(ordered)}
    series = []
    for i, metric in enumerate(metrics):
        for dashed, results in ((False, [e.result for e in found]), (True, control)):
            there = [r for r in results if metric in r["metrics"]]
            if there:
                series.append(Series(
                    f"{metric}, control" if dashed else metric, tuple(places[r["iteration"]] for r in there),
                    tuple(r["metrics"][metric] for r in there), tuple(r["standard_errors"][metric] for r in there), i,
                    dashed,
                ))  # fmt: skip
    rows = []
    for kind, results in (("", [e.result for e in found]), ("control ", control)):
        rows += [
            (f"{kind}{r['iteration']}", *(_exact(r, metric) for metric in metrics)) for r in results
        ]  # fmt: skip
    table = Table("Fractions ± standard errors", ("iteration", *metrics), tuple(rows))
    end = found[-1]
    said = "; ".join(f"{metric} {end.percent(metric)} percent" for metric in metrics)
    about = (
        f"Lines over iterations {found[0].label} to {end.label} with error bars of one standard error. Last: {said}."
    )
    along = [(place, label) for label, place in places.items()]
    return lines("Metrics with one standard error", about, table, series, along, ("iteration", "percent"), percent=True)


def _exact(result: Mapping[str, Any], metric: str) -> str:
    if metric not in result["metrics"]:
        return "none"
    return f"{result['metrics'][metric]} ± {result['standard_errors'][metric]}"


def _table(found: Sequence[Evaluated], control: Sequence[Mapping[str, Any]]) -> Table:
    """Every metric, in percent."""
    metrics = list(dict.fromkeys(m for e in found for m in e.result["metrics"]))
    rows = [(e.label, *(e.percent(m) for m in metrics)) for e in found]
    rows += [(f"control {r['iteration']}", *(cell(r, m) for m in metrics)) for r in control]
    return Table("All metrics, percent ± standard error over queries", ("iteration", *metrics), tuple(rows))


def _compared(source: Source) -> Table | None:
    """From `evaluation_results.json`, which is written after each evaluation."""
    file = source.directory / RESULTS
    content, _ = or_none(lambda: schemas.read(file)) if file.exists() else (None, "")
    found = content["compared"] if content else []
    if not found:
        return None
    rows = [
        (f"{c['from']} → {c['to']}", f"{100 * c['difference']:+.1f} ± {100 * c['se']:.1f}", f"{c['p']:.4f}")
        for c in found
    ]
    title = f"Each iteration against the one before it, paired over queries: {found[0]['metric']}, points"
    return Table(title, ("iterations", "difference", "p of a randomisation test"), tuple(rows))
