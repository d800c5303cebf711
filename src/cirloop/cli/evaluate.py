"""Evaluating the checkpoints of a finished or unfinished run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact
from cirloop.cli.iterations import BASE, select_iterations
from cirloop.cli.runner import print_results
from cirloop.cli.score_rankings import score_rankings
from cirloop.config import cli, notices
from cirloop.config.run import RunConfig
from cirloop.data import Dataset, benchmarks, locations
from cirloop.data.paths import DataPaths
from cirloop.distributed import launcher
from cirloop.evaluation import rankings_file, submission
from cirloop.evaluation.significance import compare_iterations
from cirloop.monitoring.console import progress, title_prefix
from cirloop.stages.context import RunContext, run_directory
from cirloop.stages.evaluate import evaluation, predictions
from cirloop.types import EvalSplit, UserError, benchmark_of
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
PROGRAM = "eval_iterative.py"


class EvalConfig(cli.Flags):
    """What eval_iterative.py evaluates."""

    experiment_dir: Path | None = None
    """The run directory."""
    rankings: Path | None = None
    """Score this JSON file of any system's rankings, {query id: [image ids, best first]}, instead
    of a run."""
    eval_dataset: str | None = None
    """Data set and split, such as shapes_test; by default the split the run evaluates on."""
    data_dir: Path | None = None
    """The directory of the benchmark that --eval_dataset names, where it is not the run's own."""
    submission: Path | None = None
    """Write each iteration's rankings into this directory: for CIRR and CIRCO the files for their
    servers, else the form that --rankings reads."""
    gallery: Literal["original", "union"] = "original"
    """For FashionIQ: all images of the split, or the references and targets of its queries."""
    iterations: str | None = None
    """Iterations separated by commas: numbers, `base`, `best` (by the run's own evaluations) or
    `last`; by default the base and all there are."""
    allow_missing_images: int = Field(0, ge=0)
    """With --data_dir: images that may be missing or damaged; every result says how many queries
    that drops."""
    ablate: Literal["text", "image"] | None = None
    """Evaluate with the texts dropped, or the references made grey: how much the other alone
    solves."""
    num_processes: int | None = Field(None, ge=1)
    """Processes to embed in; by default the run's."""
    output_file: Path | None = None
    """Also write the results here, as JSON."""


def select_data(options: EvalConfig, config: RunConfig) -> tuple[RunConfig, Dataset, str]:
    """Return the data set and split to evaluate on, and settings with it.

    The data set is the run's own or another benchmark's by name.
    """
    name = options.eval_dataset or f"{config.data.type}_{config.evaluation.split}"
    other = benchmarks.settings_for_benchmark(name, options.gallery, options.allow_missing_images)
    if other is not None and (
        options.data_dir is not None or benchmark_of(name) != config.data.type
    ):
        settings, split = other
        directory = locations.with_default_dirs(settings, options.data_dir, None)["data_dir"]
        paths = DataPaths(directory, config.cache, progress)
        changes = {"data": settings, "data_dir": directory, "train_dir": None}
        return config.model_copy(update=changes), settings.build(paths), split
    others = ", ".join([*benchmarks.benchmark_names(), "hp_fashioniq_val"])
    if options.data_dir is not None and benchmark_of(name) != config.data.type:
        raise UserError(
            f"--eval_dataset {name}: unknown. With --data_dir there are {others}, and splits of"
            f" the run's own data set, such as {config.data.type}_{config.evaluation.split}."
        )
    paths = DataPaths(options.data_dir or config.data_dir, config.cache, progress, config.train_dir)
    own = config.open_data(paths)
    names = {f"{config.data.type}_{split}": split for split in own.evals}
    if name not in names:
        raise UserError(
            f"--eval_dataset {name}: this run's data set has {', '.join(sorted(names))}; with"
            f" --data_dir {others}."
        )
    if options.gallery != "original" or options.allow_missing_images:
        raise UserError(
            "--gallery, --allow_missing_images: the run has its own; give --data_dir to use others."
        )
    return config.model_copy(update={"data_dir": paths.directory}), own, names[name]


def evaluate_run(options: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate the chosen iterations, print one row each, and write what was asked for.

    On a split without published targets there are no scores; its rankings are written instead.
    """
    directory = options.experiment_dir
    assert directory is not None
    config, store = run_directory(directory)
    for notice in notices.of(config):
        logger.warning("%s", notice)
    if options.num_processes is not None:
        overrides = {"num_processes": options.num_processes, "accelerate_config": None}
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update=overrides)})
    labels = select_iterations(options.iterations, store)
    config, data, split = select_data(options, config)
    run = RunContext(config, store, data)
    parts = data.eval_splits(split)
    labelled = all(part.relevance is not None for part in parts)
    _refuse_impossible(options, parts)
    submission_dir = options.submission
    if not labelled and submission_dir is None:
        submission_dir = directory / f"submission_{parts[0].name}"
    if submission_dir is not None:
        notices.refuse_simulated(config, "whose rankings could be submitted")
    results = []
    for label in labels:
        checkpoint = None if label == BASE else store.load(f"checkpoint_iter_{label}")
        if labelled:
            results.append(evaluation(run, label, checkpoint, split, options.ablate))
        if submission_dir is not None:
            _submit(run, label, checkpoint, split, submission_dir)
    if not labelled:
        logger.warning(
            "%s has no published targets, so no scores: its server gives them for the files above",
            parts[0].name,
        )
        return []
    with title_prefix(notices.title(config)):
        print_results(results, parts[0].labeled.protocol)
    if options.output_file is not None:
        write_json(
            options.output_file,
            run.mark | {"schema": 4, "results": results, "compared": compare_iterations(results)},
        )
    return results


def _refuse_impossible(options: EvalConfig, parts: Sequence[EvalSplit]) -> None:
    """Raise UserError for what a split without targets, or with preferences, cannot give."""
    name = parts[0].name
    preferences = any(part.relevance and part.relevance.preferences for part in parts)
    labelled = all(part.relevance is not None for part in parts)
    if options.submission is not None and preferences:
        raise UserError(f"--submission: {name} ranks nothing; people chose between sets of images.")
    if not labelled and options.ablate is not None:
        raise UserError(f"--ablate: {name} has no published targets, so there is nothing to score.")
    if not labelled and options.output_file is not None:
        raise UserError(
            f"--output_file {options.output_file}: {name} has no published targets, so there are no"
            " scores to write. Leave the flag out: the rankings are written for the server, into"
            " --submission."
        )


def _submit(
    run: RunContext, label: str, checkpoint: Artifact | None, split: str, directory: Path
) -> None:
    """Write the server's files of one iteration, or its rankings where there is no server, to a
    directory."""
    parts = run.data.eval_splits(split)
    rankings = predictions(run, checkpoint, split, submission.LISTED + 1)
    if parts[0].labeled.benchmark in submission.BENCHMARKS:
        problems = ValidationReport()
        files = submission.build(parts[0].labeled, rankings[0], problems)
        problems.raise_if_any("The server would refuse it.")
    else:
        content = rankings_file.to_json([part.labeled for part in parts], rankings)
        files = {f"{parts[0].name}_rankings.json": content}
    goal = directory / (BASE if label == BASE else f"iter_{label}")
    submission.write(goal, files)
    logger.info("wrote %s to %s", " and ".join(files), goal)


def main(argv: Sequence[str]) -> None:
    """Evaluate as the flags say. Raises UserError for what is wrong with them, the run or the
    rankings."""
    launcher.refuse_nested_launch(sys.argv)
    evaluate(cli.parse_flags(EvalConfig, argv, PROGRAM))


def evaluate(options: EvalConfig) -> list[dict[str, Any]] | dict[str, Any]:
    """Evaluate a run's iterations, or score a file of rankings."""
    problems = ValidationReport()
    if (options.experiment_dir is None) == (options.rankings is None):
        problems.add("--experiment_dir, --rankings", "give one of the two")
    if options.rankings is not None:
        for flag in ("eval_dataset", "data_dir"):
            if getattr(options, flag) is None:
                problems.add(f"--{flag}", "is needed with --rankings")
        for flag in ("iterations", "ablate"):
            if getattr(options, flag) is not None:
                problems.add(f"--{flag}", "goes with --experiment_dir")
    if options.ablate is not None and options.submission is not None:
        problems.add("--ablate", "is no system to submit; leave --submission out")
    if options.output_file is not None and not options.output_file.absolute().parent.is_dir():
        problems.add(f"--output_file {options.output_file}", "its directory does not exist")
    for flag, path in (("output_file", options.output_file), ("rankings", options.rankings)):
        if path is not None and path.is_dir():
            problems.add(
                f"--{flag} {path}", f"is a directory; give a file, such as {path / 'results.json'}"
            )
    if options.submission is not None and options.submission.is_file():
        problems.add(f"--submission {options.submission}", "is a file; give a directory")
    problems.raise_if_any(f"All flags: {cli.program(PROGRAM)} --help")
    if options.rankings is None:
        return evaluate_run(options)
    assert options.eval_dataset is not None and options.data_dir is not None
    return score_rankings(
        options.rankings,
        options.eval_dataset,
        options.data_dir,
        options.gallery,
        options.output_file,
        options.submission,
    )
