"""Scoring the rankings of any system, without a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cirloop.artifacts.atomic import write_json
from cirloop.data import benchmarks, splits
from cirloop.evaluation import rankings_file, submission
from cirloop.evaluation.protocols import SUBSET_CUTOFFS, Ranks, describe, metrics, ranks_in
from cirloop.monitoring.console import table
from cirloop.types import LabeledQueries, Query, Rankings, UserError, benchmark_of
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)


def score_rankings(
    path: Path,
    eval_dataset: str,
    data_dir: Path,
    gallery: Literal["original", "union"] = "original",
    output_file: Path | None = None,
    submission_dir: Path | None = None,
) -> dict[str, Any]:
    """Score rankings: metrics as fractions with standard errors; with `submission_dir` also the
    server's files.

    A split without published targets has no scores; its files are written beside the rankings by
    default. Raises UserError with every problem of data and file; then nothing is written.
    """
    benchmark = benchmark_of(eval_dataset)
    if submission_dir is not None and benchmark not in submission.BENCHMARKS:
        raise UserError(
            f"--submission: {benchmark} has no server; {' and '.join(submission.BENCHMARKS)} have."
        )
    parts = load_queries(eval_dataset, data_dir, gallery)
    labelled = all(part.relevance is not None for part in parts)
    if not labelled and benchmark not in submission.BENCHMARKS:
        raise UserError(
            f"--eval_dataset {eval_dataset} has no published targets, so there are no scores."
        )
    if not labelled and submission_dir is None:
        submission_dir = path.with_name(f"{path.stem}_submission")
    problems = ValidationReport()
    rankings, metric = rankings_file.read(path, parts, problems)
    problems.raise_if_any(
        f"--rankings must hold one list of image ids per query of {eval_dataset}, each image once."
    )
    files = submission.build(parts[0], rankings, problems) if submission_dir is not None else {}
    problems.raise_if_any(
        f"--submission: the server of {benchmark} would refuse it. Rank more images in --rankings."
    )
    result = describe_data(eval_dataset, parts, rankings)
    if labelled:
        result |= scores(parts, rankings, metric)
        _print_scores(eval_dataset, result)
    else:
        result["note"] = "no published targets, so no scores"
        logger.warning("%s has %s", eval_dataset, result["note"])
    if submission_dir is not None:
        result["submission"] = [file.name for file in submission.write(submission_dir, files)]
        logger.info("wrote %s to %s", " and ".join(result["submission"]), submission_dir)
    if output_file is not None:
        write_json(output_file, result)
    return result


def load_queries(
    eval_dataset: str, data_dir: Path, gallery: Literal["original", "union"]
) -> list[LabeledQueries]:
    """Load the queries of each part of a split. Raises UserError with every problem."""
    problems = ValidationReport()
    parts = benchmarks.load_queries(eval_dataset, data_dir, gallery, problems)
    problems.raise_if_any(
        f"Put the annotations of {eval_dataset} under --data_dir {data_dir} in the official layout."
    )
    for warning in filter(None, map(splits.official_size_warning, parts)):
        logger.warning("%s", warning)
    return parts


def describe_data(
    eval_dataset: str, parts: Sequence[LabeledQueries], rankings: Rankings
) -> dict[str, Any]:
    """Return what the result says beside its scores."""
    return {
        "schema": 1,
        "dataset": eval_dataset,
        "protocol": describe(parts),
        "num_queries": sum(len(part.queries) for part in parts),
        "gallery": {
            part.category or part.name: len(part.gallery.ids) if part.gallery else None
            for part in parts
        },
        "shortest_list": min(map(len, rankings.values())),
    }


def _print_scores(eval_dataset: str, result: dict[str, Any]) -> None:
    rows = [
        [name, f"{100 * value:.2f} ± {100 * result['standard_errors'][name]:.2f}"]
        for name, value in result["metrics"].items()
    ]
    title = f"{eval_dataset}, percent ± standard error. {result['protocol']}"
    table(title, ("metric", "value"), rows)


def scores(parts: Sequence[LabeledQueries], rankings: Rankings, metric: str = "") -> dict[str, Any]:
    """Return metrics and standard errors as fractions by name, and a note where there is one.

    `metric` is the only kind of recall that the rankings are for, "" for all.
    """
    ranks = {
        q.id: ranks_in(rankings[q.id], part.relevant_images(q))
        for part in parts
        for q in part.queries
    }
    metrics_by_name = metrics(parts, ranks)
    if metric:  # CIRR's two submission files hold lists for one kind of recall each
        metrics_by_name = {
            name: m for name, m in metrics_by_name.items() if name.startswith(f"{metric}@")
        }
    short = (
        0
        if metric == "recall_subset"
        else sum(_group_is_short(part, q, ranks[q.id]) for part in parts for q in part.queries)
    )
    out: dict[str, Any] = {
        "metrics": {name: m.value for name, m in metrics_by_name.items()},
        "standard_errors": {name: m.se for name, m in metrics_by_name.items()},
    }
    if short:
        out["note"] = (
            f"{short} queries list neither their target nor {max(SUBSET_CUTOFFS)} other members of"
            " its group: there recall_subset counts a miss, so it is a lower bound"
        )
        logger.warning("%s", out["note"])
    return out


def _group_is_short(part: LabeledQueries, query: Query, ranks: Ranks) -> bool:
    """Whether the ranking leaves open which place the target has in its group (CIRR)."""
    group = part.groups.get(query.id, ())
    assert part.relevance is not None
    return (
        bool(group)
        and part.relevance.targets[query.id] not in ranks
        and sum(m in ranks for m in group) < max(SUBSET_CUTOFFS)
    )
