"""Preflight checks: everything that can be known to fail before any hour is spent."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cirloop.artifacts.atomic import write_json
from cirloop.config.run import RunConfig
from cirloop.config.runtime import Runtime
from cirloop.data import Dataset
from cirloop.data.paths import DataPaths
from cirloop.distributed import launcher
from cirloop.monitoring import trackers
from cirloop.monitoring.console import progress
from cirloop.negatives.attributes.images import image_attributes
from cirloop.stages.model_checks import check_disk, check_models, nearest_directory
from cirloop.stages.sharding_checks import check_sharding
from cirloop.types import EvalProtocol, EvalSplit, TrainSplit, UserError
from cirloop.validation import ValidationFailed, ValidationReport

logger = logging.getLogger(__name__)
PROBLEMS = "problems.json"


def check(config: RunConfig) -> Dataset:
    """Check models, files and the data set's images, and build the data set.

    Raises ValidationFailed with all problems. Those of the data set are also written to
    `problems.json` in the cache.
    """
    problems = ValidationReport()
    data = _build_data(config, problems)
    listed = data is not None and _check_data(config, data, problems)
    for name, model in (("model.path", config.model), ("foundation.path", config.foundation)):
        with _reported(problems, name):
            model.resolve_dir()
    if not problems.rows:  # the models' files are there, and the data set's
        assert data is not None
        check_disk(config, data, problems)
    check_models(config, problems)
    if config.trains:
        check_sharding(config, problems)
    _check_stages(config, problems)
    _check_early_stopping(config, problems)
    _check_runtime(config.runtime, problems)
    if listed:
        rows = [asdict(row) for row in problems.rows]
        write_json(
            config.cache / PROBLEMS, {"schema": 1, "problems": rows, "ways_out": problems.remedies}
        )
        problems.remedies.append(f"All of them are in {config.cache / PROBLEMS}.")
    problems.raise_if_any()
    assert data is not None
    return data


@contextmanager
def _reported(problems: ValidationReport, where: str) -> Iterator[None]:
    """Add the UserError of what runs within to the problems, under `where` if it lists none."""
    try:
        yield
    except UserError as error:
        problems.merge(error, where)


def _build_data(config: RunConfig, problems: ValidationReport) -> Dataset | None:
    if not isinstance(getattr(config.data, "protocol", None), EvalProtocol):
        problems.add(
            f"data.type {config.data.type}",
            "has no protocol, so its rankings cannot be scored",
            "Give its settings a `protocol`, as in data/cirr.py.",
        )
    try:
        return config.open_data(
            DataPaths(config.data_dir, config.cache, progress, config.train_dir)
        )
    except UserError as error:
        problems.merge(error, "data")
    return None


def _check_data(config: RunConfig, data: Dataset, problems: ValidationReport) -> bool:
    """Check the splits that the run uses; return whether one of them lists problems of its own."""

    def check_evaluation() -> None:
        _check_targets(data.eval_splits(config.evaluation.split), problems)

    def check_training() -> None:
        _check_triplets(config, data.train, problems)
        _check_mining(config, data.train, problems)
        with _reported(problems, "foundation"):
            config.foundation.check_data(data.train)
        _check_groups(config.training.group_batches, data.train, problems)
        _warn_of_overlap(data.train, data.eval_splits(config.evaluation.split))

    listed = False
    for check_split in (check_evaluation, *([check_training] if config.trains else [])):
        try:
            check_split()
        except UserError as error:
            listed = listed or isinstance(error, ValidationFailed)
            problems.merge(error, "data")
    return listed


def _check_stages(config: RunConfig, problems: ValidationReport) -> None:
    """Check that the models can do what training, captioning and mining ask of them."""
    with _reported(problems, "training"):
        if config.trains:
            config.model.check_training(config.training)
    with _reported(problems, "captioning"):
        if config.captioning.enabled:
            config.captioning.check(config.foundation)
    if config.mining.search != "exact" and config.model.multi_vector:
        problem = f"is for images of one vector; {config.model.type} gives several. Use exact"
        problems.add(f"mining.search {config.mining.search}", problem)


def _check_early_stopping(config: RunConfig, problems: ValidationReport) -> None:
    """Check that early stopping has evaluations on val to go by, and rounds to leave out."""
    patience = config.evaluation.early_stopping
    if not patience:
        return
    where = f"--early_stopping {patience}"
    if config.evaluation.split != "val":
        problems.add(
            where,
            f"goes by val, and evaluation.split is {config.evaluation.split}. Evaluate on val, and"
            " in the end on the other by eval_iterative.py; or leave the flag out",
        )
    if patience >= config.num_iterations:
        problems.add(
            where,
            f"is in rounds, and cannot end a run of --num_iterations {config.num_iterations} before"
            " its last one. Give fewer, or more iterations",
        )


def _check_runtime(runtime: Runtime, problems: ValidationReport) -> None:
    """Check files that flags name, devices and trackers."""
    for name, file in (
        ("--accelerate_config", runtime.accelerate_config),
        ("--deepspeed", runtime.deepspeed),
    ):
        if file is not None and not file.is_file():
            problems.add(f"{name} {file}", "there is no such file")
    if runtime.answers_dir is not None:
        _check_answers_dir(runtime.answers_dir, problems)
    compared = runtime.compare_with
    if compared is not None and not compared.is_dir():
        problems.add(f"--compare_with {compared}", "there is no such directory")
    with _reported(
        problems, "--accelerate_config" if runtime.accelerate_config else "--num_processes"
    ):
        if runtime.accelerate_config is None or runtime.accelerate_config.is_file():
            for line in launcher.device_warnings(runtime):
                logger.warning("%s", line)
    for tracker, problem in trackers.missing_packages(runtime.report_to):
        problems.add(tracker, problem)


def _check_answers_dir(directory: Path, problems: ValidationReport) -> None:
    """Check that answers can be kept there, before any is paid for."""
    name = f"runtime.answers_dir {directory}"
    with _reported(problems, name):
        nearest = nearest_directory(directory)
        parts = (directory, *directory.parents)
        if any(part.exists() and not part.is_dir() for part in parts):
            problems.add(name, "is a file, or is in one. Give a directory")
        elif not os.access(nearest, os.W_OK):
            problems.add(name, f"{nearest} may not be written. Give a directory that may")


def _check_targets(parts: Sequence[EvalSplit], problems: ValidationReport) -> None:
    """Check that what is evaluated after each iteration has right answers."""
    for part in parts:
        if part.relevance is None:
            problems.add(
                "evaluation.split",
                f"{part.name} has no targets, so an iteration cannot be evaluated on it",
                "Name a split with targets by --evaluation.split; eval_iterative.py "
                "writes the rankings of one without.",
            )


def _check_triplets(config: RunConfig, train: TrainSplit, problems: ValidationReport) -> None:
    """Check that the training triplets are enough to learn from."""
    targets = len({triplet.target for triplet in train.triplets})
    if targets < 2:
        problems.add(
            "data.train",
            f"{len(train.triplets):,} training triplets have one target, and a loss needs another"
            " image to compare it with",
            "Give triplets with two different targets or more.",
        )
    elif targets < config.training.batch_size and config.training.unique_targets:
        logger.warning(
            "%d training triplets have %d different targets: a batch holds at most so many queries,"
            " not training.batch_size %d",
            len(train.triplets),
            targets,
            config.training.batch_size,
        )


def _warn_of_overlap(train: TrainSplit, parts: Sequence[EvalSplit]) -> None:
    """Warn of queries of the evaluation that are training triplets."""
    trained = {(t.query.reference, t.query.text, t.target) for t in train.triplets}
    for part in parts:
        targets = part.relevance.targets if part.relevance is not None else {}
        rows = [(q.reference, q.text, targets[q.id]) for q in part.queries if q.id in targets]
        both = sum(row in trained for row in rows)
        if both:
            logger.warning(
                "%s: %d of %d queries are training triplets too (same reference, text and target),"
                " so recall on them says nothing about other queries",
                part.name,
                both,
                len(rows),
            )


def _check_mining(config: RunConfig, train: TrainSplit, problems: ValidationReport) -> None:
    """Check that the strategy has what it requires, and that a file of attributes is valid."""
    attributes = config.attributes
    foundation = config.foundation
    describes = attributes is not None and attributes.image_source == "vlm"
    for setting, needed, can in (
        ("mining.filters verify", config.mining.verifies, foundation.can_verify),
        ("attributes.image_source vlm", describes, foundation.can_describe),
    ):
        if needed and not can:
            problems.add(
                setting,
                f"the foundation model {foundation.type!r} looks at no image; use another "
                "--foundation_model_backbone",
            )
    if config.mining.anchors.num and not config.captioning.enabled:
        problems.add(
            f"mining.anchors.num {config.mining.anchors.num}",
            "does nothing with captioning.enabled off; turn that on, or set 0",
        )
    available = {
        "groups": train.groups,
        "categories": train.categories or attributes,
        "attributes": attributes,
    }
    for name in sorted(config.mining.strategy.requires):
        if config.num_iterations and not available[name]:
            sources = {
                "groups": "a data set that has them",
                "categories": "such a data set, or `attributes` settings",
            }
            way = sources.get(name, "`attributes` settings")
            problems.add(
                f"mining.strategy {config.mining.strategy.type}",
                f"needs {name}: {way}; see docs/negatives.md",
            )
    if attributes is not None and attributes.image_source != "vlm":
        image_attributes(attributes, attributes.build(), train.gallery.ids)


def _check_groups(kind: str, train: TrainSplit, problems: ValidationReport) -> None:
    """Check that every query has the group that batches are drawn from."""
    available = {
        "none": True,
        "category": all(t.target in train.categories for t in train.triplets),
        "group": all(t.query.id in train.groups for t in train.triplets),
    }
    if not available[kind]:
        problems.add(
            f"training.group_batches {kind}",
            "needs a data set that has them: categories are FashionIQ's, "
            "groups CIRR's; or leave it at none",
        )
