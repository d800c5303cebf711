"""Each false-negative filter keeps what its definition says, and counts what it drops."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cirloop.negatives.filters import (
    Agreement,
    FilterContext,
    MinedPairs,
    NearDuplicate,
    ScoreMargin,
    Verify,
    apply_filters,
)


def pairs(scores: list[int], targets: list[int]) -> MinedPairs:
    num = len(scores)
    rows = np.arange(num)
    return MinedPairs(
        rows,
        rows,
        np.array(scores, np.float32) / 8,
        np.full(num, num),
        np.array(targets, np.float32) / 8,
    )


def judges(num: int, seed: int = 0) -> FilterContext:
    random = np.random.default_rng(seed)
    yes = random.random(num)
    second = random.standard_normal((2, num)).astype(np.float32)
    return FilterContext(
        random.standard_normal((num + 1, 2)).astype(np.float32),
        lambda p: yes[p.query_index_N].tolist(),
        lambda path, p: (second[0, p.query_index_N], second[1, p.query_index_N]),
    )


rows = st.lists(st.tuples(st.integers(-4, 8), st.integers(-4, 8)), max_size=12)


@given(rows, st.sampled_from([-0.25, 0.0, 0.25]), st.integers(0, 9))
def test_each_keeps_what_it_says(
    given_rows: list[tuple[int, int]], margin: float, seed: int
) -> None:
    scores = [a for a, _ in given_rows]
    targets = [b for _, b in given_rows]
    made = pairs(scores, targets)
    known = judges(len(scores), seed)
    vectors = known.vectors_GD
    yes = known.yes_probability(made)
    images, others = known.second_model_scores("x", made)
    for i, (a, b) in enumerate(given_rows):
        cosine = vectors[i] @ vectors[-1] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[-1])
        expected: list[tuple[Any, bool]] = [
            (ScoreMargin(margin=margin), a / 8 <= b / 8 - margin),
            (NearDuplicate(threshold=0.5), bool(cosine <= 0.5)),
            (Verify(threshold=0.4), yes[i] <= 0.4),
            (Agreement(path="x"), not (a > b and images[i] > others[i])),
        ]
        for each, keeps in expected:
            assert bool(each.keep(made, known)[i]) == keeps, each.type


@given(rows)
def test_filters_follow_one_another_and_count(given_rows: list[tuple[int, int]]) -> None:
    made = pairs([a for a, _ in given_rows], [b for _, b in given_rows])
    known = judges(len(given_rows))
    filters = (ScoreMargin(), Verify(threshold=0.5))
    keep, counts = apply_filters(filters, made, known)
    each = (
        [one.keep(made, known) for one in filters] if len(given_rows) else [np.zeros(0, bool)] * 2
    )
    assert keep.tolist() == (each[0] & each[1]).tolist()
    assert counts == [
        {"filter": "score_margin", "seen": len(given_rows), "dropped": int((~each[0]).sum())},
        {
            "filter": "verify",
            "seen": int(each[0].sum()),
            "dropped": int((each[0] & ~each[1]).sum()),
        },
    ]


def test_without_filters_all_is_kept() -> None:
    keep, counts = apply_filters((), pairs([1, 2], [1, 1]), judges(2))
    assert keep.all() and counts == []
