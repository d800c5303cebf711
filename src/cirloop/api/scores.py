"""`cirloop.evaluate`: the rankings of any system by a benchmark's own protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cirloop.types import EvalSplit, LabeledQueries, UserError

if TYPE_CHECKING:
    from cirloop.validation import ValidationReport

Part = EvalSplit | LabeledQueries
"""Queries and their right answers: all of a split, or a category of it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics of rankings by name, fractions, with their standard errors over queries.

    `protocol` says in words how they are computed, `note` what a reader must know besides.
    """

    benchmark: str
    protocol: str
    num_queries: int
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    note: str = ""


def evaluate(
    rankings: Mapping[str, Sequence[str]] | Mapping[str, Mapping[str, Sequence[str]]] | str | Path,
    benchmark: str | Part | Sequence[Part],
    data_dir: str | Path | None = None,
    *,
    gallery: Literal["original", "union"] = "original",
) -> Scores:
    """Return the scores of rankings, which may be any system's; no model is loaded.

    `rankings` lists for each query id the image ids, best first, as `eval_iterative.py --rankings`
    reads them: by category and position for all of FashionIQ; or names a JSON file of that form.
    `benchmark` is a name such as `cirr_val` or `fashioniq_val:dress`, whose annotations lie in
    `data_dir` or a usual place; or what `dataset.eval_splits("val")` gives, or a part of it.
    `gallery` is FashionIQ's kind. Raises UserError with every problem of data and rankings.
    """
    from cirloop.cli import score_rankings
    from cirloop.evaluation import rankings_file
    from cirloop.validation import ValidationReport

    parts = _parts(benchmark, data_dir, gallery)
    problems = ValidationReport("Rankings must hold one list of image ids per query, each once.")
    _refuse_unscored(parts, problems)
    problems.raise_if_any()
    if isinstance(rankings, str | Path):
        checked, metric = rankings_file.read(Path(rankings), parts, problems)
    else:
        checked, metric = rankings_file.check(_plain(rankings), "rankings", parts, problems)
    problems.raise_if_any()
    name = benchmark if isinstance(benchmark, str) else parts[0].name
    about = score_rankings.describe_data(name, parts, checked)
    scores = score_rankings.scores(parts, checked, metric)
    return Scores(
        name,
        about["protocol"],
        about["num_queries"],
        scores["metrics"],
        scores["standard_errors"],
        scores.get("note", ""),
    )


def _parts(
    benchmark: str | Part | Sequence[Part],
    data_dir: str | Path | None,
    gallery: Literal["original", "union"],
) -> list[LabeledQueries]:
    """Return the queries of each category. Raises UserError where there are none."""
    if isinstance(benchmark, str):
        return _load(benchmark, data_dir, gallery)
    parts = [benchmark] if isinstance(benchmark, Part) else list(benchmark)
    wrong = [type(part).__name__ for part in parts if not isinstance(part, Part)]
    if wrong or not parts:
        raise UserError(
            f"benchmark holds {', '.join(wrong) or 'nothing'}. Give a name such as cirr_val, or"
            ' what dataset.eval_splits("val") gives.'
        )
    return [part.labeled if isinstance(part, EvalSplit) else part for part in parts]


def _load(
    name: str, data_dir: str | Path | None, gallery: Literal["original", "union"]
) -> list[LabeledQueries]:
    """Return the queries of a benchmark by its name, from its annotations alone where these are
    enough."""
    from cirloop.api.datasets import load_dataset
    from cirloop.cli import score_rankings
    from cirloop.data import benchmarks, locations

    benchmark = benchmarks.settings_for_benchmark(name, gallery)
    if benchmark is None:
        names = [*benchmarks.benchmark_names(), "grocery_val", "shapes_val", "shapes_test"]
        raise UserError(f"benchmark {name!r:.100} is unknown. There are: {', '.join(names)}.")
    settings, split = benchmark
    if name not in benchmarks.benchmark_names():
        data = load_dataset(settings.type, data_dir)
        return [part.labeled for part in data.eval_splits(split)]
    path = None if data_dir is None else Path(data_dir)
    directory = locations.with_default_dirs(settings, path, None)["data_dir"]
    if directory is None:
        raise UserError(
            f"benchmark {name} needs data_dir, the directory of its annotations. They are in none"
            f" of the usual places either: {locations.describe_default_dirs(settings.type)}."
        )
    return score_rankings.load_queries(name, directory, gallery)


def _refuse_unscored(parts: Sequence[LabeledQueries], problems: ValidationReport) -> None:
    """Add a problem for each part whose rankings have no score."""
    for part in parts:
        if part.relevance is None:
            problems.add(part.name, "has no published targets, so there are no scores")
        elif part.relevance.preferences:
            problems.add(part.name, "people chose between sets of images, so nothing is ranked")


def _plain(rankings: object) -> object:
    """Return rankings as a file holds them: keys of text, images in lists."""
    if isinstance(rankings, Mapping):
        return {str(key): _plain(row) for key, row in rankings.items()}
    if isinstance(rankings, Iterable) and not isinstance(rankings, str):
        return list(rankings)
    return rankings
