"""Stages on the artifacts that another run left."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from cirloop.artifacts.store import Artifact, Store
from cirloop.config.run import RunConfig
from cirloop.data.paths import DataPaths
from cirloop.stages.context import RunContext

CHECKPOINT = "checkpoint_iter_0"
NEGATIVES = "hard_negatives_iter_0.json"
SAMPLES = "augmented_samples_iter_1.json"


def context(config: RunConfig) -> RunContext:
    data_paths = DataPaths(None, config.cache, lambda items, _: items)
    return RunContext(config, Store(config.directory), config.data.build(data_paths))


def copied(run: RunContext, source: Path, *names: str) -> list[Artifact]:
    """Enter copies of these artifacts of the run at `source`."""
    return [
        run.store.get_or_build(name, {}, [], partial(_copy, source / name), 0) for name in names
    ]


def _copy(source: Path, path: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, path, dirs_exist_ok=True)
    else:
        shutil.copy(source, path)
