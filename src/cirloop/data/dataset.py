"""What a data set gives the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cirloop.types import EvalSplit, TrainSplit


@dataclass(frozen=True, slots=True)
class Dataset:
    """`evals` makes an evaluation split by name (`val`, `test`); `digest` is of `train`'s triplets and pixels."""

    name: str
    train: TrainSplit
    evals: Mapping[str, Callable[[], EvalSplit]]
    digest: str
