"""The builder of `report.html`: hands a run's data to the page, and rebuilds the page from a run
directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cirloop import report
from cirloop.artifacts import schema
from cirloop.artifacts.store import Store
from cirloop.config import automatic, notices
from cirloop.config.run import RunConfig
from cirloop.config.run_dir import run_directory
from cirloop.data import Dataset
from cirloop.data.paths import DataPaths
from cirloop.loop import RESULTS, expected_artifacts
from cirloop.monitoring import events
from cirloop.monitoring.console import progress
from cirloop.report.report_data import try_read
from cirloop.types import EvalSplit, TrainSplit, UserError

logger = logging.getLogger(__name__)
ANY_NUMBER = 1 << 62
LOG = "training_log.json"


def write_report(config: RunConfig, store: Store, data: Dataset | None = None) -> Path:
    """Write the report of a run with what is finished; without `data`, with what can be read of it.

    Raises UserError for an artifact that was altered, OSError where the disk refuses.
    """
    train, evals, no_data = _splits(config, store, data)
    file = store.directory / RESULTS
    results = try_read(lambda: schema.read(file))[0] if file.exists() else None
    stopped = results is not None and "stopped_early" in results
    planned = [] if stopped else expected_artifacts(config, False)
    # What is not there before the last finished artifact will not come, such as the measurement of
    # the judge in a run that had texts already.
    last = max((place for place, name in enumerate(planned) if name in store.names), default=-1)
    return report.write(
        report.ReportData(
            store.directory,
            frozenset(store.names),
            planned[last + 1 :],
            partial(_read, store),
            config.to_json(),
            config.data.protocol.reported,
            train,
            evals,
            no_data,
            config.runtime.compare_with,
            notices.of(config),
            notices.title(config),
            results or {},
            config.runtime.report_examples,
            automatic.used(config),
        )
    )


def reporter(config: RunConfig, store: Store, data: Dataset) -> events.Listener:
    """Return a listener that writes the report after each iteration and at the end of a run
    (`monitoring/events.py`)."""

    def hear(kind: str, payload: dict[str, Any]) -> None:
        if kind in ("evaluated", "finished"):
            write_report(config, store, data)

    return hear


def rebuild(config: RunConfig) -> Path:
    """Rebuild the report of `config.directory` from its artifacts; `config` may say where data lies
    now.

    Loads no model and takes no lock; where data or images are gone the page says so. Raises
    UserError where the directory holds no run, and as `write_report`.
    """
    own, store = run_directory(config.directory)
    of_report = {
        name: getattr(config.runtime, name) or getattr(own.runtime, name)
        for name in ("compare_with", "report_examples")
    }
    runtime = own.runtime.model_copy(update=of_report)
    places = {
        "data_dir": config.data_dir or own.data_dir,
        "train_dir": config.train_dir or own.train_dir,
    }
    path = write_report(own.model_copy(update={"runtime": runtime, **places}), store)
    logger.info("wrote %s", path)
    return path


def _read(store: Store, name: str) -> dict[str, Any]:
    """Read an artifact's verified content; of a checkpoint only its training log."""
    path = store.directory / name
    return schema.read(path / LOG) if path.is_dir() else store.load(name).read()


def readable_data(config: RunConfig) -> Dataset:
    """Open a run's data set for a page, which may lack any number of images."""
    settings = config.data
    if hasattr(settings, "allow_missing_images"):
        settings = settings.model_copy(update={"allow_missing_images": ANY_NUMBER})
    return settings.build(DataPaths(config.data_dir, config.cache, progress, config.train_dir))


def _splits(
    config: RunConfig, store: Store, data: Dataset | None
) -> tuple[TrainSplit | None, Sequence[EvalSplit], str]:
    """Return the splits that artifacts were made of, and why there are none."""
    try:
        data = data or readable_data(config)
        train = (
            data.train if any(name.startswith("hard_negatives") for name in store.names) else None
        )
        evaluated = any(name.startswith("evaluation") for name in store.names)
        return train, data.eval_splits(config.evaluation.split) if evaluated else (), ""
    except UserError as error:
        return None, (), str(error)
