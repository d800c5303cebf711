"""A run directory, for reading: its settings and its artifacts. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from cirloop.artifacts.store import Store
from cirloop.config.recipes import CONFIG as CONFIG
from cirloop.config.run import RunConfig, from_json, read_run_id
from cirloop.types import UserError


def run_directory(directory: Path) -> tuple[RunConfig, Store]:
    """Open a run directory for reading: its settings and artifacts.

    Raises UserError where it is none or is damaged.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"--experiment_dir {directory} is no run directory (no {CONFIG}).")
    config = from_json(directory / CONFIG, experiment_dir=directory)
    store = Store(directory, reading=True)
    store.bind_to_run(read_run_id(directory / CONFIG), directory / CONFIG)
    return config, store
