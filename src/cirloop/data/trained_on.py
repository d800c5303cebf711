"""The training split that a benchmark without one takes from another data set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cirloop.data.cirr import CirrSettings
from cirloop.data.fashioniq import FashionIQSettings
from cirloop.data.huggingface import HuggingFaceSettings
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.paths import DataPaths
from cirloop.types import TrainSplit, UserError

TrainedOn = Annotated[
    CirrSettings | FashionIQSettings | HuggingFaceSettings | JsonlSettings,
    Field(discriminator="type"),
]
"""What a benchmark without a training split can be trained on."""


def train_split_of(name: str, settings: TrainedOn | None, data_paths: DataPaths) -> TrainSplit:
    """Load the training split of `settings`. Raises UserError, with the benchmark's `name`, where
    these are None."""
    if settings is None:
        raise UserError(
            f"{name} has no training split. Name the data set to train on by --data.train.type"
            " and its files by --train_dir, or train on another data set and evaluate that run"
            f" by eval_iterative.py --eval_dataset {name}_val --data_dir DIR."
        )
    return settings.build(data_paths.for_training()).train
