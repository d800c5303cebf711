"""Settings of the evaluation after each iteration."""

from typing import Literal

from pydantic import Field

from cirloop.config.base import Settings


class Evaluation(Settings):
    """What is evaluated after each iteration."""

    split: Literal["val", "test"] = Field("val", description="What iterations are evaluated on.")
    evaluate_base: bool = True
    """Also evaluate the base model, before any training."""
    early_stopping: int = Field(0, ge=0)
    """Rounds in a row without a better result on val, by the metric that iterations are compared
    on, after which the run ends; 0 = all rounds are done."""
    alone: bool = False
    """Also evaluate with grey references and with empty texts: what one of the two finds alone."""
