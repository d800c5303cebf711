"""The shared run, exported once to each format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cirloop.tools.export.command import main
from cirloop.tools.export.config import ExportConfig
from cirloop.tools.export.source import ExportSource, load_source

FORMATS = ("adapter", "merged", "sentence-transformers")


def source_of(run: Path, export_format: Any, **options: Any) -> ExportSource:
    """Iteration 1 of a run, as `--format` and other flags ask for it."""
    return load_source(
        ExportConfig(experiment_dir=run, iteration="1", format=export_format, **options)
    )


@pytest.fixture(scope="session")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, for what is written into it."""
    copy = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished, copy)
    return copy


@pytest.fixture(scope="session")
def adapter(run: Path) -> Path:
    """The adapter, in its place in the run directory."""
    main(["--experiment_dir", str(run), "--iteration", "1", "--format", "adapter"])
    return run / "export" / "iter_1_adapter"


@pytest.fixture(scope="session")
def exported(run: Path, adapter: Path) -> dict[str, Path]:
    """The directory of each format."""
    for export_format in ("merged", "sentence-transformers"):
        main(["--experiment_dir", str(run), "--iteration", "1", "--format", export_format])
    return {export_format: run / "export" / f"iter_1_{export_format}" for export_format in FORMATS}
