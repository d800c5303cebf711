"""Evaluations that are made for a comparison, with the models of the runs, on the benchmark that
`--eval_dataset` names."""

from __future__ import annotations

from collections.abc import Sequence

from cirloop.cli.evaluate import EvalConfig, evaluate_run, select_data
from cirloop.tools.compare.config import CompareConfig
from cirloop.tools.compare.groups import Content, Run
from cirloop.types import EvalSplit, UserError


def evaluate_now(run: Run, label: str, options: CompareConfig) -> Content:
    """Evaluate an iteration of a run, print its metrics, and return the evaluation."""
    [result] = evaluate_run(_eval_config(run, label, options))
    return result


def open_splits(run: Run, options: CompareConfig) -> Sequence[EvalSplit]:
    """Open the benchmark for a run. Raises UserError where it is not there, or has no published
    targets."""
    _, data, split = select_data(_eval_config(run, "base", options), run.config)
    parts = data.eval_splits(split)
    if any(part.relevance is None for part in parts):
        raise UserError(
            f"--eval_dataset {options.eval_dataset}: it has no published targets, so there are no"
            " scores to compare."
        )
    return parts


def _eval_config(run: Run, label: str, options: CompareConfig) -> EvalConfig:
    return EvalConfig(
        experiment_dir=run.directory,
        eval_dataset=options.eval_dataset,
        data_dir=options.data_dir,
        iterations=label,
    )
