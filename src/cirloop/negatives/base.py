"""The base of strategies, and the candidates and knowledge that they choose by.

Array suffixes: B queries of a block, K candidates of a query, G gallery. A strategy sees block
after block, never all queries by all images. Its candidates are the whole gallery in its order
(`needs_full_gallery`), or each query's best ones, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cirloop.config.base import Settings
from cirloop.retrieval.arrays import Floats, Mask, Rows
from cirloop.retrieval.dense import best_positions
from cirloop.types import ImageId, QueryId, UserError

Selection = Literal["hardest", "random"]
"""Which of the images that a strategy finds are taken: the best-scored, or random ones."""


@dataclass(frozen=True, slots=True)
class CandidateBlock:
    """Candidates of some queries.

    `query_index_B` counts all queries from 0. `gallery_index_BK` are gallery rows, -1 where a query
    has fewer; `ranks_BK` are ranks from 1 among all ranked images (the reference is one only with
    `mining.rank_reference`), None for the whole gallery; `eligible_BK` is False for the target,
    known positives and the reference.
    """

    query_index_B: Rows
    gallery_index_BK: Rows
    scores_BK: Floats
    eligible_BK: Mask
    target_B: Rows
    target_score_B: Floats
    target_rank_B: Rows
    ranks_BK: Rows | None = None

    def select(self, rows_B: Rows | slice) -> CandidateBlock:
        """Return some queries of the block. Gallery rows that all queries share in memory stay
        shared."""
        kept: dict[str, Any] = {}
        for array_field in fields(self):
            array = getattr(self, array_field.name)
            kept[array_field.name] = None if array is None else array[rows_B]
        if self.gallery_index_BK.strides[0] == 0 and len(kept["query_index_B"]):
            kept["gallery_index_BK"] = np.broadcast_to(
                self.gallery_index_BK[0], kept["scores_BK"].shape
            )
        return CandidateBlock(**kept)


@dataclass(frozen=True, slots=True)
class MiningContext:
    """Knowledge of a strategy beside the scores. What is not known is None; a strategy that needs
    it raises UserError.

    `groups` are per query the images of its group. `categories` and `attributes` are per gallery
    row; `requested_attributes` is per query, the names of the attributes its text asks for with
    their values. `targets_Q` and `references_Q` are gallery rows (a reference that is not in the
    gallery: -1). `vectors_GD` are the gallery's, `text_scores` gives (B, G) similarities of the
    texts alone for query numbers. `mean_target_score` is over all queries, `losses` are those
    measured in the rounds before, `iteration` counts the `rounds` from 0.
    """

    seed: int
    iteration: int = 0
    rounds: int = 0
    query_ids: Sequence[QueryId] = ()
    targets_Q: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    references_Q: Rows | None = None
    groups: Sequence[frozenset[int]] | None = None
    categories: Sequence[str] | None = None
    attributes: Sequence[Mapping[str, str]] | None = None
    requested_attributes: Sequence[Mapping[str, str]] | None = None
    vectors_GD: Floats | None = None
    text_scores: Callable[[Rows], Floats] | None = None
    mean_target_score: float | None = None
    losses: Sequence[float] = ()
    cache: dict[Any, Any] = field(default_factory=dict)
    """What a strategy works out once for all blocks."""

    def rng(self, query: int) -> np.random.Generator:
        """Return a generator that depends on the seed and the query alone, not on blocks."""
        name = str(self.query_ids[query] if self.query_ids else query)
        return np.random.default_rng([self.seed, *name.encode()])

    def require(self, strategy: str, **sources: str) -> None:
        """Raise UserError if a field (by its name: where it comes from) is not known."""
        missing = [
            f"{name} ({source})" for name, source in sources.items() if getattr(self, name) is None
        ]
        if missing:
            lacking = " and ".join(missing)
            raise UserError(
                f"the negative strategy {strategy!r} needs {lacking}, but this dataset has none."
            )


class Strategy(Settings):
    """Base of the strategies: a name, and the number of images per query."""

    needs_full_gallery: ClassVar[bool] = True
    """Sees the whole gallery; False: each query's best `depth` candidates."""
    context_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the context that it needs beside scores: `groups`, `categories`, `attributes` of
    `MiningContext`."""
    only_failed_queries: ClassVar[bool] = False
    """Whether it mines, by default, only for queries whose target is not ranked first."""
    type: str
    negatives_per_query: int = Field(5, ge=1)
    """Wrong images kept per query."""

    @property
    def requires(self) -> set[str]:
        """The `context_fields` of this strategy and of those that it holds."""
        return {*self.context_fields}

    @property
    def depth(self) -> int:
        """Eligible candidates to search per query where the strategy does not see the full
        gallery."""
        return self.negatives_per_query

    def refresh_every(self, rounds: int) -> int:
        """Return for how many rounds one model's scores are mined; 1 = every round mines with its
        own model."""
        return 1

    def choose(self, block: CandidateBlock, context: MiningContext) -> list[Rows]:
        """Choose candidates of each query, as positions on the K axis, best first."""
        raise NotImplementedError

    def candidate_sets(self, block: CandidateBlock, context: MiningContext) -> list[Rows] | None:
        """Return per query the whole set that `choose` draws from, positions ascending; None where
        there is no such set."""
        return None

    def set_stats(
        self, block: CandidateBlock, context: MiningContext, sets: Sequence[Rows]
    ) -> dict[str, int]:
        """Count the queries whose set is of a special kind, for the report."""
        return {}

    def choose_from(
        self, block: CandidateBlock, context: MiningContext, sets: Sequence[Rows]
    ) -> list[Rows]:
        """Choose as `choose` does, reusing the sets where that saves work."""
        return self.choose(block, context)


def select(
    selection: Selection, block: CandidateBlock, eligible_BK: Mask, k: int, context: MiningContext
) -> list[Rows]:
    """Choose `k` eligible candidates of each query, the best-scored or random ones; best-scored
    first."""
    if selection == "hardest":
        return top_eligible(block, eligible_BK, k)
    return sample_eligible(block, eligible_BK, k, context)


def top_eligible(block: CandidateBlock, eligible_BK: Mask, k: int) -> list[Rows]:
    """Return the `k` best-scored eligible candidates of each query, ties by gallery row."""
    if block.ranks_BK is not None:  # best first already
        return [np.flatnonzero(row)[:k] for row in eligible_BK]
    return [
        top_of(scores, np.flatnonzero(row), k)
        for scores, row in zip(block.scores_BK, eligible_BK, strict=True)
    ]


def top_of(scores_K: Floats, positions: Rows, k: int | None = None) -> Rows:
    """Return the `k` of `positions` (ascending) with the best scores, best first, ties by position;
    by default all."""
    return positions[best_positions(scores_K[positions], k)]


def sample_eligible(
    block: CandidateBlock, eligible_BK: Mask, k: int, context: MiningContext
) -> list[Rows]:
    """Sample `k` eligible candidates of each query, best-scored first."""
    return sample_from(block, [np.flatnonzero(row) for row in eligible_BK], k, context)


def sample_from(
    block: CandidateBlock, sets: Sequence[Rows], k: int, context: MiningContext
) -> list[Rows]:
    """Sample `k` of the positions (ascending) of each query, best-scored first."""
    out = []
    for query, scores, positions in zip(block.query_index_B, block.scores_BK, sets, strict=True):
        if len(positions) > k:
            positions = np.sort(context.rng(int(query)).choice(positions, k, replace=False))
        out.append(top_of(scores, positions))
    return out


def sorted_block(block: CandidateBlock) -> tuple[CandidateBlock, Rows]:
    """Sort the gallery of each query best first, ties by gallery row. Return also the positions
    (B, K) of the sorted candidates in `block`."""
    order_BK = np.argsort(-block.scores_BK, axis=1, kind="stable")
    by_score = replace(
        block,
        gallery_index_BK=np.take_along_axis(block.gallery_index_BK, order_BK, 1),
        scores_BK=np.take_along_axis(block.scores_BK, order_BK, 1),
        eligible_BK=np.take_along_axis(block.eligible_BK, order_BK, 1),
        ranks_BK=np.broadcast_to(np.arange(1, order_BK.shape[1] + 1), order_BK.shape),
    )
    return by_score, order_BK


def gallery_indices(images: Sequence[ImageId], gallery: Mapping[ImageId, int]) -> frozenset[int]:
    """Return the gallery rows of images; images that the gallery lacks are left out."""
    return frozenset(gallery[image] for image in images if image in gallery)
