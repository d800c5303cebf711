"""What a strategy is given and what it gives back.

Array suffixes: B queries of a block, K candidates of a query, G gallery. A strategy sees block after block, never all
queries by all images. Its candidates are the whole gallery in its order (`whole`), or each query's best ones, best
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from cirloop.negatives.filters import FilterConfig
from cirloop.retrieval.config import IndexSettings, Search
from cirloop.settings import Settings
from cirloop.types import ImageId, QueryId, UserError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Block:
    """Candidates of some queries.

    `columns_BK` are gallery rows, -1 where a query has fewer; `ranks_BK` places from 1 among all ranked images (the
    reference is ranked only where the strategy says so), None for the whole gallery; `allowed_BK` is False for the
    target, known positives and the reference. `numbers_B` count all queries from 0.
    """

    numbers_B: Rows
    columns_BK: Rows
    scores_BK: Floats
    allowed_BK: Mask
    target_B: Rows
    target_score_B: Floats
    target_rank_B: Rows
    ranks_BK: Rows | None = None

    def of(self, rows_B: Rows | slice) -> Block:
        """Some queries of the block."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kept: dict[str, Any] = {name: None if part is None else part[rows_B] for name, part in parts.items()}
        return Block(**kept)


@dataclass(frozen=True, slots=True)
class About:
    """What a strategy may know beside the scores; what is not known is None, and a strategy that needs it says so.

    `groups` and `others` are per query: images of its group, and of its batch. `categories` and `attributes` are per
    gallery row; `asked` is per query, the names of the attributes its text asks for with their values. `vectors_GD` are
    the gallery's, `text_scores` gives (B, G) similarities of the texts alone for query numbers. `mean_target_score` is
    over all queries, `losses` are those measured in the rounds before, `iteration` counts the `rounds` from 0.
    """

    seed: int
    iteration: int = 0
    rounds: int = 0
    names: Sequence[QueryId] = ()
    targets_Q: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    groups: Sequence[frozenset[int]] | None = None
    categories: Sequence[str] | None = None
    attributes: Sequence[Mapping[str, str]] | None = None
    asked: Sequence[Mapping[str, str]] | None = None
    vectors_GD: Floats | None = None
    text_scores: Any = None
    mean_target_score: float | None = None
    losses: Sequence[float] = ()

    def stream(self, number: int) -> np.random.Generator:
        """Random numbers that depend on the seed and the query alone, not on blocks."""
        name = str(self.names[number] if self.names else number)
        return np.random.default_rng([self.seed, *name.encode()])

    def need(self, strategy: str, **what: str) -> None:
        """Raises UserError for each thing (field name -> where it comes from) that is not known."""
        missing = [f"{name} ({source})" for name, source in what.items() if getattr(self, name) is None]
        if missing:
            what_for = " and ".join(missing)
            raise UserError(f"the negative strategy {strategy!r} needs {what_for}, which this data has not.")


class Strategy(Settings):
    """What every strategy has: how many images, for which queries, and what to do where there are too few."""

    whole: ClassVar[bool] = True
    """Sees the whole gallery; False: each query's best `depth` candidates."""
    knowledge: ClassVar[tuple[str, ...]] = ()
    """What it must be told beside scores: `groups`, `categories`, `attributes` of `About`."""
    type: str
    k: int = Field(5, ge=1)
    """Wrong images kept per query."""
    only_wrong: bool = False
    """Mine only for queries whose target is not ranked first."""
    reference: Literal["out", "in"] = "out"
    """`in`: the reference is ranked, and may be mined."""
    fallback: Literal["none", "top_k", "random"] = "none"
    """What fills up a query with fewer than `k` images: nothing, its best-ranked or random wrong ones."""
    search: Search = "exact"
    """How the best images are found: exactly, or by a FAISS index of this kind; only strategies that need no more."""
    index: IndexSettings = IndexSettings()
    filters: tuple[FilterConfig, ...] = ()
    """False-negative filters, one after the other; what they drop is counted and not replaced."""

    @model_validator(mode="after")
    def _index_is_read(self) -> Self:
        if unread := self.index.unread(self.search):
            raise ValueError(f"index: {' and '.join(unread)} does nothing with search: {self.search}")
        return self

    @property
    def needs(self) -> set[str]:
        """Its `knowledge` and that of strategies it holds."""
        return {*self.knowledge}

    @property
    def depth(self) -> int:
        """Allowed candidates to search per query where not `whole`."""
        return self.k

    def period(self, rounds: int) -> int:
        """Rounds for which the model that scored stays the one that scores; 1 = every round mines with its own."""
        return 1

    def choose(self, block: Block, about: About) -> list[Rows]:
        """Per query of the block the chosen candidates, as positions on the K axis, best first."""
        raise NotImplementedError

    def sets(self, block: Block, about: About) -> list[Rows] | None:
        """Per query the whole set that `choose` draws from, positions ascending; None where there is no such set."""
        return None

    def counts(self, block: Block, about: About, sets: Sequence[Rows]) -> dict[str, int]:
        """What the report should say of the sets: how many queries have one of a special kind."""
        return {}

    def from_sets(self, block: Block, about: About, sets: Sequence[Rows]) -> list[Rows]:
        """What `choose` gives, from the sets that are there already where that saves work."""
        return self.choose(block, about)


def hardest(block: Block, eligible_BK: Mask, k: int) -> list[Rows]:
    """The `k` best-scored eligible candidates of each query, ties by gallery row."""
    if block.ranks_BK is not None:  # best first already
        return [np.flatnonzero(row)[:k] for row in eligible_BK]
    return [best_of(scores, np.flatnonzero(row), k) for scores, row in zip(block.scores_BK, eligible_BK, strict=True)]


def best_of(scores_K: Floats, positions: Rows, k: int) -> Rows:
    """The `k` of `positions` with the best scores, best first, ties by position; all for k < 0."""
    scores = scores_K[positions]
    if 0 <= k < len(scores) // 8:  # a stable sort of everything at least as good as the k-th
        edge = np.partition(scores, -k)[-k]
        positions = positions[scores >= edge]
        scores = scores_K[positions]
    order = np.argsort(-scores)  # many times quicker than a stable sort, and the same where nothing is tied
    fallen = scores[order]
    if (fallen[1:] == fallen[:-1]).any():
        order = np.argsort(-scores, kind="stable")
    return positions[order] if k < 0 else positions[order[:k]]


def drawn(block: Block, eligible_BK: Mask, k: int, about: About) -> list[Rows]:
    """`k` random eligible candidates of each query, best-scored first."""
    return drawn_of(block, [np.flatnonzero(row) for row in eligible_BK], k, about)


def drawn_of(block: Block, found: Sequence[Rows], k: int, about: About) -> list[Rows]:
    """The same from positions (ascending) per query."""
    out = []
    for number, scores, positions in zip(block.numbers_B, block.scores_BK, found, strict=True):
        if len(positions) > k:
            positions = np.sort(about.stream(int(number)).choice(positions, k, replace=False))
        out.append(best_of(scores, positions, -1) if len(positions) > 1 else positions)
    return out


def ranked(block: Block) -> tuple[Block, Rows]:
    """The whole gallery of each query best first, ties by gallery row, and where each candidate was (B, K)."""
    order_BK = np.argsort(-block.scores_BK, axis=1, kind="stable")
    made = replace(
        block,
        columns_BK=np.take_along_axis(block.columns_BK, order_BK, 1),
        scores_BK=np.take_along_axis(block.scores_BK, order_BK, 1),
        allowed_BK=np.take_along_axis(block.allowed_BK, order_BK, 1),
        ranks_BK=np.broadcast_to(np.arange(1, order_BK.shape[1] + 1), order_BK.shape),
    )
    return made, order_BK


def rows_of(images: Sequence[ImageId], gallery: Mapping[ImageId, int]) -> frozenset[int]:
    """Gallery rows of images, those the gallery lacks left out."""
    return frozenset(gallery[image] for image in images if image in gallery)
