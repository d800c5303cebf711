"""Soft negatives: images that agree with what is wanted in some attributes and differ in others.

Wanted are the values the text asks for and, in other attributes, the target's own (`attributes.values.verdict`). With a
attributes that are known to agree and d that are known to differ, an image's share is a / (a + d); it is a candidate
where 0 < share < 1 and `least` <= share <= `most`, the best-scored first. An unknown attribute counts on neither side.
Degenerate cases: with fewer than two known attributes no image agrees on some, and nothing is given.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cirloop.negatives.attributes.fitting import fitting
from cirloop.negatives.attributes.table import Agreement
from cirloop.negatives.base import About, Block, Mask, Rows, Strategy, hardest


class Soft(Strategy):
    """The `k` best-scored images that agree on some known attributes, not on all and not on none."""

    knowledge: ClassVar[tuple[str, ...]] = ("attributes",)
    type: Literal["soft"] = "soft"
    least: float = Field(0.0, ge=0, le=1)
    """Least share of the known attributes that agree; 0 = at least one attribute."""
    most: float = Field(1.0, ge=0, le=1)
    """Greatest share of the known attributes that agree; 1 = all but one."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}: give a range of shares, least first")
        return self

    def choose(self, block: Block, about: About) -> list[Rows]:
        def fits_G(found: Agreement) -> Mask:
            agree_G = found.asked_agree_G + found.other_agree_G
            differ_G = found.asked_differ_G + found.other_differ_G
            share_G = agree_G / np.maximum(agree_G + differ_G, 1)
            return np.asarray((agree_G > 0) & (differ_G > 0) & (share_G >= self.least) & (share_G <= self.most))

        return hardest(block, fitting(self.type, block, about, fits_G), self.k)
