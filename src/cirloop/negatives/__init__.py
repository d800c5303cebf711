"""Mining: rankings of the training queries -> wrong images to learn from. One short file per strategy."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cirloop.negatives.none import Nothing
from cirloop.negatives.random import Random
from cirloop.negatives.top_k import TopK


def _default_type(value: Any) -> Any:
    """`mining: {k: 7}` alone means `top_k`."""
    return {"type": "top_k", **value} if isinstance(value, dict) else value


# TopK last: `--help` shows the last one's name and defaults.
MinerConfig = Annotated[Nothing | Random | TopK, Field(discriminator="type"), BeforeValidator(_default_type)]

__all__ = ["MinerConfig", "Nothing", "Random", "TopK"]
