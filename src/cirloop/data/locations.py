"""The usual places of data sets: `data/NAME` where the command is given, and
`$CIRLOOP_DATA/NAME`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cirloop.data.config import DataConfig

logger = logging.getLogger(__name__)
VARIABLE = "CIRLOOP_DATA"
BESIDE = {"hp_fashioniq": "fashioniq"}
"""Data sets whose files lie among those of another."""


def default_dirs(data_set: str) -> list[Path]:
    """Where a data set's files are looked for when no directory is named."""
    roots = [
        Path("data"),
        *([Path(os.environ[VARIABLE]).expanduser()] if os.environ.get(VARIABLE) else []),
    ]
    return [root / BESIDE.get(data_set, data_set) for root in roots]


def describe_default_dirs(data_set: str) -> str:
    """Those places, for messages."""
    variable = "" if os.environ.get(VARIABLE) else f"; ${VARIABLE} is not set"
    return f"{' and '.join(str(place.absolute()) for place in default_dirs(data_set))}{variable}"


def with_default_dirs(
    data: DataConfig, data_dir: Path | None, train_dir: Path | None
) -> dict[str, Any]:
    """`data_dir` and `train_dir`, taken from the usual places where they are not given and a place
    is there."""
    named = {"data_dir": (data_dir, None if _needs_none(data) else data.type)}
    trained: Any = getattr(data, "train", None)
    if hasattr(trained, "type") and data_dir is None:
        named["train_dir"] = (train_dir, trained.type)
    out: dict[str, Any] = {}
    for flag, (directory, data_set) in named.items():
        out[flag] = directory
        places = [place for place in default_dirs(data_set) if place.is_dir()] if data_set else []
        if directory is None and places:
            out[flag] = places[0].absolute()
            logger.info("--%s is not given: %s is taken, one of the usual places", flag, out[flag])
    return out


def _needs_none(data: Any) -> bool:
    """Drawn, or on the hub."""
    return data.type == "shapes" or (data.type == "huggingface" and data.path is not None)
