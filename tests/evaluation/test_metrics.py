"""Recall and its standard error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.evaluation.metrics import KS, recall_at, recalls, standard_error

ranks = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(ranks=ranks, k=st.integers(1, 60))
def test_recall_is_the_share_of_ranks_within_k(ranks: list[int], k: int) -> None:
    naive = 100 * len([rank for rank in ranks if rank <= k]) / len(ranks)
    assert recall_at(ranks, k) == pytest.approx(naive)
    assert recall_at(np.array(ranks, np.int32), k) == recall_at(ranks, k)


@given(ranks=ranks, k=st.integers(1, 59))
def test_recall_never_falls_with_k(ranks: list[int], k: int) -> None:
    assert 0 <= recall_at(ranks, k) <= recall_at(ranks, k + 1) <= recall_at(ranks, 60) == 100


def test_recall_counts_the_rank_at_the_cut() -> None:
    assert [recall_at([1, 2, 5, 6], k) for k in (1, 2, 5, 6)] == [25, 50, 75, 100]


@pytest.mark.parametrize(
    ("recall", "num_queries", "expected"),
    [(50.0, 100, 5.0), (20.0, 400, 2.0), (10.0, 900, 1.0), (0.0, 7, 0.0), (100.0, 7, 0.0)],
)
def test_standard_error_is_binomial_in_percentage_points(recall: float, num_queries: int, expected: float) -> None:
    assert standard_error(recall, num_queries) == pytest.approx(expected)


def test_standard_error_is_the_spread_of_recalls_over_resampled_queries() -> None:
    rng = np.random.default_rng(0)
    sampled = [recall_at(np.where(rng.random(250) < 0.3, 1, 2), 1) for _ in range(4000)]
    assert np.std(sampled) == pytest.approx(standard_error(30.0, 250), rel=0.05)


def test_recalls_are_named_and_rounded() -> None:
    made = recalls([1, 2, 30])
    assert list(made) == [f"R@{k}" for k in KS] == ["R@1", "R@5", "R@10", "R@50"]
    assert made["R@1"] == {"value": 33.333, "se": 27.217}
    assert made["R@50"] == {"value": 100.0, "se": 0.0}
    assert recalls([1, 2], (1,), "any correct R") == {"any correct R@1": {"value": 50.0, "se": 35.355}}
