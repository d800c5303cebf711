"""Settings of captioning."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from cirloop.captioning.foundation import Foundation
from cirloop.captioning.prompts import Prompts, load, packaged
from cirloop.config.base import Settings
from cirloop.types import UserError


class RelabelSettings(Settings):
    """Settings of mined images that become further positives of the human text."""

    min_probability: float = Field(0.0, ge=0, lt=1)
    """Least probability of "yes" for the human text with which a mined image becomes a positive;
    0 = none does."""
    min_precision: float = Field(0.5, ge=0, le=1)
    """Least precision of that judgement on planted pairs, one in ten of them right; below it no
    image of the iteration becomes a positive, and a warning says so."""
    num_planted: int = Field(50, ge=10)
    """Right pairs that are planted, here and for `captioning.min_judge_auc`, with nine times as
    many wrong ones."""


class CaptioningSettings(Settings):
    """Settings of how texts are generated and which are accepted."""

    enabled: bool = True
    """Generate texts; without them, mined images are used as negatives only."""
    num_candidates: int = Field(4, ge=1)
    """Texts per mined image: one greedy, the rest sampled; the surest that passes the checks is
    kept."""
    temperature: float = Field(0.7, gt=0)
    """Temperature of the sampled texts."""
    batch_size: int = Field(64, ge=1)
    """Requests per batch. Each batch has its own seed, so the size affects sampled texts."""
    max_new_tokens: int = Field(48, ge=4)
    """Most tokens of an answer."""
    rewrite_prompt: str | None = None
    """What requests for a text: the name of a packaged prompt or a .yaml file like them. None:
    rewrite-2, for llava rewrite-side-1."""
    verify_prompt: str | None = None
    """What requests if a text is right. None: verify-1, for llava verify-side-1."""
    min_words: int = Field(2, ge=1)
    """Least words of a text."""
    max_words: int = Field(40, ge=1)
    """Most words of a text."""
    min_verify_probability: float = Field(0.5, ge=0, lt=1)
    """Least probability of "yes" when the foundation model is asked if the text is right; 0 = do
    not request."""
    min_judge_auc: float = Field(0.7, ge=0, le=1)
    """Least AUC of the foundation model's verdicts on planted pairs, measured before the first
    texts; below it a warning says so, and `stop_on_futile_round` ends the run. 0 = not measured."""
    max_round_trip_rank: int = Field(20, ge=0)
    """Lowest rank the current embedder may give the mined image for the new text; 0 = do not
    check."""
    min_round_trip_rank: int = Field(1, ge=1)
    """Highest rank that it may have: from 2 on, texts that the current embedder can answer already
    are not kept."""
    max_per_iteration: int | None = Field(None, ge=1)
    """Augmented triplets kept of an iteration, the surest first; None: all."""
    max_per_query: int = Field(3, ge=1)
    """Augmented triplets kept per human query and iteration, the surest first."""
    max_per_query_in_all: int | None = Field(None, ge=1)
    """Augmented triplets kept per human query over all iterations; None: any number."""

    relabel: RelabelSettings = RelabelSettings()
    """Mined images that are right for the human text itself."""

    @model_validator(mode="after")
    def _some_rank_is_kept(self) -> Self:
        if 0 < self.max_round_trip_rank < self.min_round_trip_rank:
            raise ValueError(
                f"no rank is from min_round_trip_rank {self.min_round_trip_rank} to"
                f" max_round_trip_rank {self.max_round_trip_rank}, so no text would be kept; set"
                " max_round_trip_rank 0, or lower min_round_trip_rank"
            )
        return self

    def measures_judge(self, foundation: Foundation, *, filters: bool) -> bool:
        """Return whether it is measured how well the foundation model judges: where it is asked for
        verdicts, here or by `filters` of mining, and can be wrong."""
        writes = self.enabled and (self.min_verify_probability or self.relabel.min_probability)
        is_asked = bool(writes or filters) and foundation.can_verify
        return is_asked and self.min_judge_auc > 0 and not foundation.judges_exactly

    @property
    def checks_round_trip(self) -> bool:
        """Whether the embedder ranks mined images by their new texts."""
        return bool(self.max_round_trip_rank) or self.min_round_trip_rank > 1

    def prompts(self, foundation: Foundation) -> Prompts:
        """Load the prompts for this foundation model.

        Raises UserError for a prompt that does not exist or does not fit the model.
        """
        side = "-side" if foundation.concatenates_images else ""
        default_rewrite = "rewrite-side-1" if foundation.concatenates_images else "rewrite-2"
        prompts = Prompts(
            load(self.rewrite_prompt or default_rewrite),
            load(self.verify_prompt or f"verify{side}-1"),
            load(f"describe{side}-1"),
        )
        num_images = 1 if foundation.concatenates_images else 2
        for setting, prompt, kinds in (
            ("captioning.rewrite_prompt", prompts.rewrite, ("plain", "json")),
            ("captioning.verify_prompt", prompts.verify, ("yes_no",)),
        ):
            if prompt.num_images != num_images or prompt.answer not in kinds:
                raise UserError(
                    f"{setting} {prompt.name!r} has {prompt.num_images} places for an image and the"
                    f" answer {prompt.answer!r}; {foundation.type} needs {num_images} and"
                    f" {' or '.join(kinds)}. Packaged are {', '.join(packaged())}."
                )
        return prompts

    def check(self, foundation: Foundation) -> None:
        """Raise UserError where these settings and the foundation model do not go together."""
        self.prompts(foundation)
        probabilities = {
            "captioning.min_verify_probability": self.min_verify_probability,
            "captioning.relabel.min_probability": self.relabel.min_probability,
        }
        for setting, probability in probabilities.items():
            if probability and not foundation.can_verify:
                raise UserError(
                    f"{setting} {probability}: the foundation model {foundation.type!r} looks at no"
                    f" image and cannot judge a text. Set {setting} to 0, or use another"
                    " --foundation_model_backbone."
                )
        if self.relabel.min_probability and getattr(foundation, "exclude_right", False):
            raise UserError(
                "captioning.relabel.min_probability does nothing with foundation.exclude_right:"
                " right images are then not mined. Set one of them to 0 or false."
            )
