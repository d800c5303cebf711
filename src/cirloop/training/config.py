"""Settings of training; the union of losses is their registry."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from cirloop.backbones.base import LoraSettings
from cirloop.config.base import Settings, default_type

if TYPE_CHECKING:
    from cirloop.training.losses import Loss


class InfoNCE(Settings):
    """Each query against every candidate of the batch."""

    type: Literal["info_nce"] = "info_nce"
    temperature: float = Field(0.02, gt=0)
    """Scores are divided by it."""
    mask_margin: float | None = Field(None, ge=0)
    """Other queries' candidates scored more than this above the target count as right and are left
    out; Qwen3-Embedding (arXiv 2506.05176) takes 0.1. By default none is."""

    def build(self) -> Loss:
        from cirloop.training.losses import info_nce

        return partial(info_nce, temperature=self.temperature, mask_margin=self.mask_margin)


class TripletHinge(Settings):
    """Hinge on the cosines of the target and of a query's own negatives."""

    type: Literal["triplet"] = "triplet"
    margin: float = Field(0.2, gt=0)
    """By how much the target's cosine is to be above a negative's."""

    def build(self) -> Loss:
        from cirloop.training.losses import triplet

        return partial(triplet, margin=self.margin)


class BradleyTerry(Settings):
    """QuRe's: the log-odds of the target against a query's own negatives; QuRe draws one,
    `training.negatives_in_batch`."""

    type: Literal["bradley_terry"] = "bradley_terry"
    temperature: float = Field(1.0, gt=0)
    """Scores are divided by it."""

    def build(self) -> Loss:
        from cirloop.training.losses import bradley_terry

        return partial(bradley_terry, temperature=self.temperature)


class LossPart(Settings):
    """One loss of a sum."""

    weight: float = Field(1.0, gt=0)
    """What the loss is multiplied by."""
    loss: Annotated[BradleyTerry | InfoNCE | TripletHinge, Field(discriminator="type")]


class LossSum(Settings):
    """A weighted sum of losses."""

    type: Literal["sum"] = "sum"
    parts: tuple[LossPart, ...] = Field(min_length=1)
    """Each a `weight` and a `loss`."""

    def build(self) -> Loss:
        from cirloop.training.losses import weighted

        return partial(weighted, parts=[(part.weight, part.loss.build()) for part in self.parts])


LossConfig = Annotated[
    BradleyTerry | LossSum | TripletHinge | InfoNCE,
    Field(discriminator="type"),
    BeforeValidator(default_type("info_nce")),
]


class TrainingSettings(Settings):
    """One training stage: a contrastive loss, AdamW, a linear warm-up of the rate and a fall."""

    iteration_0_steps: int = Field(100, ge=0)
    """Optimisation steps of iteration 0, on human triplets alone; 0 = the base model as it is."""
    steps_per_iteration: int = Field(100, ge=0)
    """Optimisation steps of each later iteration."""
    batch_size: int = Field(48, ge=2)
    """Queries per step, over all processes."""
    augmented_fraction: float = Field(0.25, ge=0, le=0.5)
    """Share of a batch that is augmented triplets, where there are any; each brings its human
    triplet along."""
    negatives_in_batch: int = Field(1, ge=0)
    """Mined images added as candidates per human query that has any: its own negatives, for losses
    of pairs, beside the mined images that were rewritten and are in the batch. A query with neither
    gets as many random targets of other queries of the batch."""
    unique_targets: bool = True
    """No image is the target of two queries of a batch."""
    group_batches: Literal["none", "category", "group"] = "none"
    """Draw a batch's human triplets from one category of images, or whole groups of them (CIRR's
    sets of six)."""
    num_hard_candidates: int = Field(0, ge=0)
    """Valid wrong candidates of the batch kept in a query's denominator, the hardest, which are
    also the negatives of `triplet`; 0 = all of them, and a query's own negatives for `triplet`."""
    hard_candidate_pool: int = Field(50, ge=1)
    """Most similar candidates that those are looked for among."""
    hard_candidate_margin: float = 0.0
    """How far above the target a valid candidate may score, in cosine; negative: how far below it
    must stay."""
    loss: LossConfig = InfoNCE()
    learning_rate: float = Field(5e-4, gt=0)
    """The peak of the rate."""
    lr_overrides: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Other learning rates, by a pattern that a weight's name starts with; the first that fits
    counts."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after its warm-up, to 0 at the stage's last step, or not at all."""
    lr_warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are shortened to this norm."""
    grad_cache_chunk_size: int = Field(0, ge=0)
    """Rows encoded at once with gradient caching (GradCache, arXiv 2101.06983); 0 = the whole batch
    at once. A run may go on with another number, which changes rounding and the draws of
    dropout."""
    max_skipped_batches: int = Field(0, ge=0)
    """Batches of a stage without a finite loss and gradient that may be left out; one more stops
    it. What is left out does not depend on this number, so a run can go on with a higher one."""
    finetuning: Literal["lora", "dora", "full"] | None = None
    """How weights are trained; by default as suits the model: LoRA on a language model, other
    models in full."""
    lora: LoraSettings = LoraSettings()
    trainable_patterns: tuple[str, ...] = ()
    """With `finetuning: full`, what is trained: patterns that a weight's name starts with; by
    default the model's own."""

    @model_validator(mode="after")
    def _even(self) -> TrainingSettings:
        if int(self.batch_size * self.augmented_fraction) * 2 > self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot hold its augmented share"
                f" {self.augmented_fraction} in pairs"
            )
        return self

    @model_validator(mode="after")
    def _heard(self) -> TrainingSettings:
        """No setting that would do nothing, and patterns that are patterns."""
        losses = (
            [part.loss for part in self.loss.parts]
            if isinstance(self.loss, LossSum)
            else [self.loss]
        )
        if self.num_hard_candidates and all(isinstance(loss, BradleyTerry) for loss in losses):
            raise ValueError(
                f"num_hard_candidates {self.num_hard_candidates} does nothing with loss"
                f" {self.loss.type}, which has pairs of its own; leave it out, or use info_nce or"
                " triplet"
            )
        if self.hard_candidate_margin != 0 and not self.num_hard_candidates:
            raise ValueError(
                f"hard_candidate_margin {self.hard_candidate_margin} does nothing with"
                " num_hard_candidates: 0; set num_hard_candidates too"
            )
        only_pairs = not any(isinstance(loss, InfoNCE) for loss in losses)
        if only_pairs and self.negatives_in_batch == 0 and not self.num_hard_candidates:
            raise ValueError(
                f"negatives_in_batch 0 leaves queries without a pair, and loss {self.loss.type} has"
                " nothing else; set negatives_in_batch 1 or more, or add info_nce"
            )
        if self.trainable_patterns and self.finetuning in ("lora", "dora"):
            raise ValueError(
                f"trainable_patterns are for finetuning full, not {self.finetuning}; leave one of"
                " the two out"
            )
        for pattern in (*self.trainable_patterns, *self.lr_overrides):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is no pattern ({error}); give the start of a weight's name"
                ) from None
        return self
