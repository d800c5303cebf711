"""Random queries over small galleries with many tied scores, as hypothesis strategies, and their
blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cirloop.negatives.base import CandidateBlock


@dataclass(frozen=True)
class Case:
    """Scores of every query and image, and what each query knows."""

    scores_QG: Any
    targets: list[int]
    references: list[int]
    positives: list[set[int]]
    """Known positives, the target among them."""

    def allowed(self, i: int, reference: str = "out") -> list[int]:
        """Gallery rows that may be mined for query i, in the gallery's order."""
        barred = self.positives[i] | ({self.references[i]} if reference == "out" else set())
        return [g for g in range(self.scores_QG.shape[1]) if g not in barred]

    def order(self, i: int, reference: str = "out") -> list[int]:
        """Gallery rows ranked for query i, best first, ties by row."""
        ranked = [
            g
            for g in range(self.scores_QG.shape[1])
            if reference == "in" or g != self.references[i]
        ]
        return sorted(ranked, key=lambda g: (-self.scores_QG[i, g], g))

    def whole(self, reference: str = "out") -> CandidateBlock:
        """All queries in one block over the whole gallery."""
        queries, size = self.scores_QG.shape
        allowed = np.zeros((queries, size), bool)
        for i in range(queries):
            allowed[i, self.allowed(i, reference)] = True
        return CandidateBlock(
            np.arange(queries),
            np.broadcast_to(np.arange(size), (queries, size)),
            self.scores_QG,
            allowed,
            *self._targets(reference),
        )

    def window(self, depth: int, reference: str = "out") -> CandidateBlock:
        """All queries in one block of each one's best images, so many that `depth` allowed ones are
        among them."""
        queries = len(self.targets)
        ranked = [self.order(i, reference) for i in range(queries)]
        kept = []
        for i in range(queries):
            may = set(self.allowed(i, reference))
            count = 0
            end = 0
            while end < len(ranked[i]) and count < depth:
                count += ranked[i][end] in may
                end += 1
            kept.append(ranked[i][:end])
        width = max(map(len, kept), default=0)
        columns = np.full((queries, width), -1)
        scores = np.full((queries, width), -np.inf, np.float32)
        allowed = np.zeros((queries, width), bool)
        for i, row in enumerate(kept):
            columns[i, : len(row)] = row
            scores[i, : len(row)] = self.scores_QG[i, row]
            allowed[i, : len(row)] = np.isin(row, self.allowed(i, reference))
        ranks = np.broadcast_to(np.arange(1, width + 1), columns.shape)
        return CandidateBlock(
            np.arange(queries), columns, scores, allowed, *self._targets(reference), ranks
        )

    def _targets(self, reference: str) -> tuple[Any, Any, Any]:
        number = range(len(self.targets))
        scores = np.array([self.scores_QG[i, self.targets[i]] for i in number], np.float32)
        ranks = np.array([self.order(i, reference).index(self.targets[i]) + 1 for i in number])
        return np.array(self.targets), scores, ranks


@st.composite
def cases(draw: st.DrawFn, smallest: int = 2) -> Case:
    """One to six queries over `smallest` to 24 images; scores of few distinct values, exact in
    float32."""
    size = draw(st.integers(smallest, 24))
    count = draw(st.integers(1, 6))
    references = []
    targets = []
    positives = []
    for _ in range(count):
        references.append(draw(st.integers(0, size - 1)))
        others = [g for g in range(size) if g != references[-1]]
        right = draw(st.lists(st.sampled_from(others), min_size=1, max_size=3, unique=True))
        targets.append(right[0])
        positives.append(set(right))
    scores = draw(st.lists(st.integers(-2, 8), min_size=size * count, max_size=size * count))
    return Case(
        np.array(scores, np.float32).reshape(count, size) / 8, targets, references, positives
    )
