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
    """InfoNCE: the cross entropy of the target among all candidates of the batch."""

    type: Literal["info_nce"] = "info_nce"
    temperature: float = Field(0.02, gt=0)
    """Divisor of the scores."""
    mask_margin: float | None = Field(None, ge=0)
    """Cosine above the target's from which candidates of other queries count as right and are
    ignored; Qwen3-Embedding (arXiv 2506.05176) has 0.1. None: no candidate is ignored."""

    def build(self) -> Loss:
        from cirloop.training.losses import info_nce

        return partial(info_nce, temperature=self.temperature, mask_margin=self.mask_margin)


class TripletHinge(Settings):
    """Triplet hinge on the cosines of the target and of a query's hard negatives."""

    type: Literal["triplet"] = "triplet"
    margin: float = Field(0.2, gt=0)
    """Least lead of the target over a negative, in cosine."""

    def build(self) -> Loss:
        from cirloop.training.losses import triplet

        return partial(triplet, margin=self.margin)


class BradleyTerry(Settings):
    """QuRe's Bradley-Terry loss: the log-odds of the target against a query's hard negatives; QuRe
    draws one, `training.negatives_in_batch`."""

    type: Literal["bradley_terry"] = "bradley_terry"
    temperature: float = Field(1.0, gt=0)
    """Divisor of the scores."""

    def build(self) -> Loss:
        from cirloop.training.losses import bradley_terry

        return partial(bradley_terry, temperature=self.temperature)


class LossPart(Settings):
    """One loss of a sum."""

    weight: float = Field(1.0, gt=0)
    """Factor of the loss."""
    loss: Annotated[BradleyTerry | InfoNCE | TripletHinge, Field(discriminator="type")]


class LossSum(Settings):
    """A weighted sum of losses."""

    type: Literal["sum"] = "sum"
    parts: tuple[LossPart, ...] = Field(min_length=1)
    """The losses, each a `weight` and a `loss`."""

    def build(self) -> Loss:
        from cirloop.training.losses import weighted

        return partial(weighted, parts=[(part.weight, part.loss.build()) for part in self.parts])


LossConfig = Annotated[
    BradleyTerry | LossSum | TripletHinge | InfoNCE,
    Field(discriminator="type"),
    BeforeValidator(default_type("info_nce")),
]


class MinedNegatives(Settings):
    """Explicit negatives are the images that were mined for a human query."""

    type: Literal["mined"] = "mined"


class RankedNegatives(Settings):
    """Explicit negatives are drawn from a window of ranks of the current model, anew in each
    iteration."""

    type: Literal["ranked"] = "ranked"
    first_rank: int = Field(11, ge=1)
    """First rank of the window, counted without the target, what is known to be right and the
    reference."""
    last_rank: int | None = Field(60, ge=1)
    """Last rank of the window; None: the whole gallery."""
    rows: Literal["all", "human"] = "all"
    """Which queries have such negatives: augmented ones too, or human ones alone."""
    num: int = Field(16, ge=1)
    """Images drawn per query and iteration; a step draws `negatives_in_batch` of them."""

    @model_validator(mode="after")
    def _has_a_window(self) -> RankedNegatives:
        if self.last_rank is not None and self.last_rank < self.first_rank:
            raise ValueError(
                f"no rank is from first_rank {self.first_rank} to last_rank {self.last_rank}; raise"
                " last_rank or lower first_rank"
            )
        return self


NegativesConfig = Annotated[
    RankedNegatives | MinedNegatives,
    Field(discriminator="type"),
    BeforeValidator(default_type("mined")),
]


class BundleSettings(Settings):
    """Batches of bundles: a human or self-made triplet with its texts of all rounds."""

    size: int = Field(0, ge=0)
    """Most triplets of a bundle, so that the images of one reference are each other's negatives
    with known texts; 0 = no bundles but pairs, by `augmented_fraction`."""
    plain_fraction: float = Field(0.25, ge=0, lt=1)
    """Share of a batch that human triplets from the shuffle of all take, whether or not they have
    further texts."""


class TrainingSettings(Settings):
    """Settings of a training stage: a contrastive loss, AdamW, learning-rate warm-up and decay."""

    iteration_0_steps: int = Field(100, ge=0)
    """Optimisation steps of iteration 0, on human triplets alone; 0 = the base model as it is."""
    steps_per_iteration: int = Field(100, ge=0)
    """Optimisation steps of each later iteration."""
    batch_size: int = Field(48, ge=2)
    """Queries per step, over all processes."""
    augmented_fraction: float = Field(0.25, ge=0, le=0.5)
    """Share of augmented triplets in a batch, where there are any; each brings its human triplet
    along."""
    negatives_in_batch: int = Field(1, ge=0)
    """Explicit negatives added as candidates per query that has any: its own negatives, for losses
    of pairs, beside the mined images that were rewritten and are in the batch. A query with neither
    gets as many random targets of other queries of the batch."""
    negatives: NegativesConfig = MinedNegatives()
    """Where explicit negatives come from, `negatives_in_batch` for a query in a step."""
    bundles: BundleSettings = BundleSettings()
    """How augmented triplets and those they came from share a batch."""
    augmented_rounds: int | None = Field(None, ge=1)
    """Latest rounds whose texts are trained on; None: all."""
    start_from: Literal["previous", "iteration_0"] = "previous"
    """Which iteration's weights an iteration starts from."""
    unique_targets: bool = True
    """Allow no image to be the target of two queries of a batch."""
    group_batches: Literal["none", "category", "group"] = "none"
    """Draw a batch's human triplets from one category of images, or whole groups of them (CIRR's
    sets of six)."""
    num_hard_candidates: int = Field(0, ge=0)
    """Valid wrong candidates of the batch kept in a query's denominator, the hardest, which are
    also the negatives of `triplet`; 0 = all of them, and a query's own negatives for `triplet`."""
    hard_candidate_pool: int = Field(50, ge=1)
    """Most similar candidates among which hard ones are chosen."""
    hard_candidate_margin: float = 0.0
    """Largest lead of a valid candidate over the target, in cosine; negative: the least distance
    below it."""
    loss: LossConfig = InfoNCE()
    learning_rate: float = Field(5e-4, gt=0)
    """Peak of the learning rate."""
    lr_overrides: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Learning rates of their own, by a pattern that a weight's name starts with; the first match
    counts."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after its warm-up, to 0 at the stage's last step, or none."""
    lr_span: Literal["iteration", "run"] = "iteration"
    """What the learning rate's warm-up and decay extend over: each iteration, or all later
    iterations together; iteration 0 has its own."""
    lr_warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate warms up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which longer gradients are clipped."""
    grad_cache_chunk_size: int = Field(0, ge=0)
    """Rows encoded at once with gradient caching (GradCache, arXiv 2101.06983); 0 = the whole batch
    at once. A run may go on with another number, which changes rounding and the draws of
    dropout."""
    max_skipped_batches: int = Field(0, ge=0)
    """Batches of a stage without a finite loss and gradient that may be left out; one more stops
    it. What is left out does not depend on this number, so a run can go on with a higher one."""
    finetuning: Literal["lora", "dora", "full"] | None = None
    """How weights are trained. None: as suits the model, LoRA on a language model, other models in
    full."""
    lora: LoraSettings = LoraSettings()
    trainable_patterns: tuple[str, ...] = ()
    """Patterns of the weights that `finetuning: full` trains: a weight's name starts with one; by
    default the model's own."""

    @property
    def ranks_negatives(self) -> bool:
        """Whether explicit negatives come from a window of ranks."""
        return isinstance(self.negatives, RankedNegatives)

    @model_validator(mode="after")
    def _pairs_fit(self) -> TrainingSettings:
        if int(self.batch_size * self.augmented_fraction) * 2 > self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot hold its augmented share"
                f" {self.augmented_fraction} in pairs"
            )
        return self

    @model_validator(mode="after")
    def _no_unused(self) -> TrainingSettings:
        """Refuse settings that would do nothing."""
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
        if self.ranks_negatives and self.negatives_in_batch == 0:
            raise ValueError(
                "negatives of type ranked do nothing with negatives_in_batch 0; set it to 1 or"
                " more, or leave negatives out"
            )
        if self.bundles.size == 1:
            raise ValueError(
                "bundles.size 1 has no room for a text beside its human triplet; set 2 or more, or"
                " 0 for pairs"
            )
        if self.trainable_patterns and self.finetuning in ("lora", "dora"):
            raise ValueError(
                f"trainable_patterns are for finetuning full, not {self.finetuning}; leave one of"
                " the two out"
            )
        return self

    @model_validator(mode="after")
    def _patterns(self) -> TrainingSettings:
        """Refuse patterns that are none."""
        for pattern in (*self.trainable_patterns, *self.lr_overrides):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{pattern!r} is no pattern ({error}); give the start of a weight's name"
                ) from None
        return self
