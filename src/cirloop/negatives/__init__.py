"""Mining: rankings of the training queries -> wrong images to learn from. One short file per strategy."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from cirloop.negatives.none import Nothing
from cirloop.negatives.random import Random
from cirloop.negatives.top_k import TopK
from cirloop.settings import default_type

# TopK last: `--help` shows the last one's name and defaults.
MinerConfig = Annotated[Nothing | Random | TopK, Field(discriminator="type"), BeforeValidator(default_type("top_k"))]

__all__ = ["MinerConfig", "Nothing", "Random", "TopK"]
