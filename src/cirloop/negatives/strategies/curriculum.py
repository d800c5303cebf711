"""A curriculum: easy images in the first iterations, hard ones later (Bengio et al., ICML 2009).

`stages` are L strategies from the easiest to the hardest, and the share h in [0, 1] says how far
along them an iteration stands: h * (L - 1) lies between two neighbours, which share
`negatives_per_query` by the fraction (as in `mixture`). With two stages h is the hard one's share.
With start = `initial_difficulty`, ratio = `target_loss_ratio`, iteration t, and the mean training
losses l_0, ..., l of the iterations so far:

    linear  h rises from start at `first_iteration` to 1 at `last_iteration` (default: the last)
    step    h = (how many of `steps` are <= t) / (L - 1)
    loss    h = start + (1 - start) * (l_0 - l) / (l_0 - ratio * l_0), between start and 1

The last round mines from the hardest level (h = 1) whatever the schedule says, so a run of one
round does too.

Degenerate cases: before `first_iteration` h is start, after `last_iteration` 1, as at both where
they are the same; without a loss h is start, and a first loss of 0 leaves nothing to learn from
easy images: 1. Where the number of rounds is not known (0), `last_iteration` is by default
`first_iteration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy
from cirloop.negatives.strategies.mixture import choose_from_parts, reject_ignored_settings
from cirloop.retrieval.arrays import Rows

if TYPE_CHECKING:
    # In the running program the union, as in `mixture`.
    from cirloop.negatives.base import (
        Strategy as AnyStrategy,
    )

SETTINGS = {
    "linear": ("initial_difficulty", "first_iteration", "last_iteration"),
    "step": ("steps",),
    "loss": ("initial_difficulty", "target_loss_ratio"),
}
"""What each schedule reads."""


class Curriculum(Strategy):
    """`negatives_per_query` images from two neighbouring levels, the harder the later."""

    type: Literal["curriculum"] = "curriculum"
    stages: tuple[AnyStrategy, ...] = Field(min_length=2)
    """Strategies, the easiest first; `negatives_per_query` is the curriculum's."""
    schedule: Literal["linear", "step", "loss"] = "linear"
    """How it gets harder: evenly over iterations, at given ones, or as the measured loss falls."""
    initial_difficulty: float = Field(0.0, ge=0, le=1)
    """linear, loss: the share of hard images to begin with."""
    first_iteration: int = Field(0, ge=0)
    """linear: the last iteration at `initial_difficulty`."""
    last_iteration: int | None = Field(None, ge=0)
    """linear: the first iteration with hard images only; by default the last round's."""
    steps: tuple[int, ...] = ()
    """step: iterations from which each next level is used, ascending; one fewer than there are
    stages."""
    target_loss_ratio: float = Field(0.5, ge=0, lt=1)
    """loss: the part of the first loss at which all images are hard."""

    _share = field_validator("stages")(lambda stages: tuple(map(reject_ignored_settings, stages)))

    @model_validator(mode="after")
    def _fits_the_schedule(self) -> Curriculum:
        for name in sorted(
            {name for names in SETTINGS.values() for name in names} - {*SETTINGS[self.schedule]}
        ):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing with schedule: {self.schedule}")
        if self.last_iteration is not None and self.last_iteration < self.first_iteration:
            raise ValueError(
                f"last_iteration {self.last_iteration} is before first_iteration"
                f" {self.first_iteration}"
            )
        if self.schedule == "step" and (
            len(self.steps) != len(self.stages) - 1 or sorted(set(self.steps)) != [*self.steps]
        ):
            raise ValueError(
                f"steps {self.steps} must be {len(self.stages) - 1} ascending iterations, one per"
                " new stage"
            )
        return self

    @property
    def requires(self) -> set[str]:
        return {name for stage in self.stages for name in stage.requires}

    def difficulty(self, iteration: int, losses: Sequence[float] = (), rounds: int = 0) -> float:
        """Return the difficulty of an iteration of `rounds` (0 = not known): 0 is the easiest
        level, 1 the hardest."""
        if rounds and iteration >= rounds - 1:
            return 1.0
        if self.schedule == "step":
            return sum(step <= iteration for step in self.steps) / (len(self.stages) - 1)
        if self.schedule == "linear":
            last = (
                max(self.first_iteration, rounds - 1)
                if self.last_iteration is None
                else self.last_iteration
            )
            length = last - self.first_iteration
            done = (
                (iteration - self.first_iteration) / length if length else float(iteration >= last)
            )
        elif not losses:
            done = 0.0
        else:
            done = (
                (losses[0] - losses[-1]) / (losses[0] * (1 - self.target_loss_ratio))
                if losses[0] > 0
                else 1.0
            )
        return self.initial_difficulty + (1 - self.initial_difficulty) * min(max(done, 0.0), 1.0)

    def weights(self, difficulty: float) -> list[float]:
        """Return each level's share of the images; they sum to 1."""
        position = difficulty * (len(self.stages) - 1)
        return [max(0.0, 1 - abs(position - level)) for level in range(len(self.stages))]

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Up to `negatives_per_query` images, best-scored first."""
        difficulty = self.difficulty(context.iteration, context.losses, context.rounds)
        return choose_from_parts(
            block, context, self.negatives_per_query, self.stages, self.weights(difficulty)
        )
