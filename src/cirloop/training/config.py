"""Settings of training, all of which decide the result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cirloop.backbones.base import LoraSettings
from cirloop.settings import Settings


class TrainingSettings(Settings):
    """One training stage: InfoNCE on a LoRA with AdamW, a linear warm-up and a linear fall."""

    warm_up_steps: int = Field(100, ge=0)
    """Optimisation steps of iteration 0, on human triplets alone; 0 = the base model as it is."""
    steps: int = Field(100, ge=0)
    """Optimisation steps of each later iteration."""
    batch_size: int = Field(48, ge=2)
    """Queries per step, over all processes."""
    augmented_share: float = Field(0.25, ge=0, le=0.5)
    """Share of a batch that is augmented triplets, where there are any; each brings its human triplet along."""
    num_negatives: int = Field(1, ge=0)
    """Mined images added as candidates per human query that has any."""
    hardest: int = Field(0, ge=0)
    """Wrong candidates of the batch kept in a query's denominator, the hardest; 0 = all of them."""
    hardest_of: int = Field(50, ge=1)
    """Most similar candidates that those are looked for among; only what scores at most the target counts."""
    temperature: float = Field(0.02, gt=0)
    learning_rate: float = Field(5e-4, gt=0)
    rate_warm_up: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    chunk_size: int = Field(0, ge=0)
    """Rows encoded at once with gradient caching (GradCache, arXiv 2101.06983); 0 = the whole batch at once."""
    tune: Literal["lora", "dora", "full"] | None = None
    """How weights are trained; by default as suits the model: LoRA on a language model, other models in full."""
    lora: LoraSettings = LoraSettings()
    parts: tuple[str, ...] = ()
    """With `tune: full`, what is trained: patterns that a weight's name starts with; by default the model's own."""

    @model_validator(mode="after")
    def _even(self) -> TrainingSettings:
        if int(self.batch_size * self.augmented_share) * 2 > self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot hold its augmented share {self.augmented_share} in pairs"
            )
        return self
