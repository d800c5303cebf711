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

from cirloop.negatives.attributes.table import Table
from cirloop.negatives.base import About, Block, Rows, Strategy, hardest


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
        about.need(
            self.type,
            attributes="attributes of the gallery's images: negatives.attributes",
            asked="attributes the texts ask for: negatives.attributes",
        )
        assert about.attributes is not None and about.asked is not None
        table, eligible_BK = Table.of(about.attributes), np.zeros_like(block.allowed_BK)
        for i, number in enumerate(block.numbers_B):
            found = table.agreement(about.asked[number], int(block.target_B[i]))
            agree_G = found.asked_agree_G + found.other_agree_G
            differ_G = found.asked_differ_G + found.other_differ_G
            share_G = agree_G / np.maximum(agree_G + differ_G, 1)
            some_G = (agree_G > 0) & (differ_G > 0) & (share_G >= self.least) & (share_G <= self.most)
            eligible_BK[i] = block.allowed_BK[i] & some_G[block.columns_BK[i]]
        return hardest(block, eligible_BK, self.k)
