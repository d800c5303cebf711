"""Evaluating the checkpoints of a finished or unfinished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cirloop import flags
from cirloop.artifacts import Artifact, Store, write_json
from cirloop.config import explain, from_json
from cirloop.experiment import CONFIG, TABLE, done_iterations
from cirloop.report.terminal import recall_rows, table
from cirloop.stages import Run, evaluation
from cirloop.types import UserError

BASE = "base"


class EvalConfig(BaseSettings):
    """What eval_iterative.py evaluates."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    experiment_dir: Path = Field()
    """The run directory."""
    eval_dataset: str | None = None
    """Data set and split, such as shapes_test; by default the split the run evaluates on."""
    iterations: str | None = None
    """Iterations separated by commas, `base` among them if wanted; by default the base and all there are."""
    output_file: Path | None = None
    """Also write the results here, as JSON."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> EvalConfig:
        try:
            return flags.parse(cls, argv, "eval_iterative.py")
        except ValidationError as error:
            raise UserError(explain(error, "eval_iterative.py")) from None


def chosen(wanted: str | None, done: Sequence[int]) -> list[str]:
    """Labels of the iterations asked for. Raises UserError for unknown ones, with those there are."""
    there = [BASE, *map(str, done)]
    if wanted is None:
        return there
    labels = [label.strip() for label in wanted.split(",")]
    unknown = [label or "(empty)" for label in labels if label not in there]
    if unknown:
        raise UserError(f"--iterations {wanted}: no {', '.join(unknown)} here. There are: {', '.join(there)}.")
    return list(dict.fromkeys(labels))


def evaluate_run(options: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate the chosen iterations, print one row each, and write `output_file` if asked for."""
    directory = options.experiment_dir
    if not (directory / CONFIG).is_file():
        raise UserError(f"--experiment_dir {directory} is no run directory (no {CONFIG}).")
    if options.output_file is not None and not options.output_file.absolute().parent.is_dir():
        raise UserError(f"--output_file {options.output_file}: its directory does not exist.")
    config = from_json(directory / CONFIG, experiment_dir=directory)
    run = Run(config, Store(directory))
    names = {f"{config.data.type}_{split}": split for split in run.data.evals}
    dataset = options.eval_dataset or f"{config.data.type}_{config.evaluation.split}"
    if dataset not in names:
        raise UserError(f"--eval_dataset {dataset}: this run's data set has {', '.join(sorted(names))}.")
    results = []
    for label in chosen(options.iterations, done_iterations(run.store)):
        checkpoint: Artifact | None = None if label == BASE else run.store.find(f"checkpoint_iter_{label}")
        results.append(evaluation(run, label, checkpoint, names[dataset]))
    table(f"Recall on {dataset}, percent ± standard error", ("iteration", *TABLE), recall_rows(results, TABLE))
    if options.output_file is not None:
        write_json(options.output_file, {"schema": 1, "results": results})
    return results
