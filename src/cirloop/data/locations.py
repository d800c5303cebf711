"""Default directories of data sets: `data/NAME` under the working directory, and
`$CIRLOOP_DATA/NAME`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from cirloop.data.dataset import DatasetSettings

if TYPE_CHECKING:
    from cirloop.data.config import DataConfig

logger = logging.getLogger(__name__)
VARIABLE = "CIRLOOP_DATA"
BESIDE = {"hp_fashioniq": "fashioniq"}
"""Data sets whose files lie among those of another."""


class Directories(TypedDict, total=False):
    """The directories of a run's data, as the run's settings name them."""

    data_dir: Path | None
    train_dir: Path | None


def default_dirs(data_set: str) -> list[Path]:
    """Return where a data set's files are looked for when no directory is named."""
    roots = [Path("data")]
    if os.environ.get(VARIABLE):
        roots.append(Path(os.environ[VARIABLE]).expanduser())
    return [root / BESIDE.get(data_set, data_set) for root in roots]


def describe_default_dirs(data_set: str) -> str:
    """Name the default directories, for messages."""
    variable = "" if os.environ.get(VARIABLE) else f"; ${VARIABLE} is not set"
    return f"{' and '.join(str(path.absolute()) for path in default_dirs(data_set))}{variable}"


def with_default_dirs(
    data: DataConfig, data_dir: Path | None, train_dir: Path | None
) -> Directories:
    """Return `data_dir` and `train_dir`, by default the first default directory that exists.

    There is no `train_dir` where the data set has a training split of its own.
    """
    needs_files = data.type != "shapes" and not (
        data.type == "huggingface" and data.path is not None
    )
    dirs: Directories = {"data_dir": data_dir}
    if data_dir is None and needs_files:
        dirs["data_dir"] = _first_default("data_dir", data.type)
    train = getattr(data, "train", None)
    if isinstance(train, DatasetSettings) and data_dir is None:
        dirs["train_dir"] = train_dir or _first_default("train_dir", train.type)
    return dirs


def _first_default(flag: str, data_set: str) -> Path | None:
    for directory in default_dirs(data_set):
        if directory.is_dir():
            logger.info(
                "--%s is not given: %s is taken, one of the usual places",
                flag,
                directory.absolute(),
            )
            return directory.absolute()
    return None
