"""Mining: rankings of the training queries -> wrong images to learn from. One short file per strategy."""

from typing import Annotated

from pydantic import Field

from cirloop.negatives.random import Random
from cirloop.negatives.top_k import TopK

MinerConfig = Annotated[TopK | Random, Field(discriminator="type")]

__all__ = ["MinerConfig", "Random", "TopK"]
