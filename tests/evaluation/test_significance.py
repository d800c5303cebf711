"""The randomisation test against enumeration of all signs, and its error rate where nothing
differs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.evaluation.significance import (
    DRAWS,
    compare_iterations,
    difference_over_runs,
    error_changes,
    holm,
    over_runs,
    paired,
    standard_error,
)

values = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=10)


@given(pairs=values)
def test_p_is_the_share_of_all_sign_flips(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    d = b - a
    every = [abs(np.dot(signs, d)) >= abs(d.sum()) for signs in product((-1, 1), repeat=len(d))]
    assert paired(a, b).p == pytest.approx(np.mean(every), abs=0.03)
    assert paired(a, b).value == pytest.approx(b.mean() - a.mean())


@given(pairs=values)
def test_turned_around_only_the_sign_changes(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    there = paired(a, b)
    back = paired(b, a)
    assert there.value == -back.value and there.se == back.se and there.p == back.p


def test_equal_systems_are_never_different() -> None:
    found = paired([1, 0, 1], [1, 0, 1])
    assert (found.value, found.se, found.p) == (0, 0, 1)


def test_a_clear_difference_has_the_least_p() -> None:
    assert paired(np.zeros(100), np.ones(100)).p == 1 / (1 + DRAWS)


def test_calls_a_difference_in_one_of_twenty_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    ps = [paired(*rng.random((2, 60)), seed=n).p for n in range(300)]
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.09


@given(pairs=values, data=st.data())
def test_queries_of_a_reference_are_tossed_together(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    a, b = np.array(pairs, float).T
    clusters = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(a), max_size=len(a)))
    names = sorted({*clusters})
    sums = np.array([sum((b - a)[n] for n, c in enumerate(clusters) if c == k) for k in names])
    every = [
        abs(np.dot(signs, sums)) >= abs(sums.sum()) for signs in product((-1, 1), repeat=len(sums))
    ]
    found = paired(a, b, clusters)
    assert found.p == pytest.approx(np.mean(every), abs=0.03)
    assert found.value == pytest.approx(b.mean() - a.mean())


def test_a_standard_error_counts_clusters() -> None:
    """Queries that are asked twice tell no more than once; those alone are a binomial's."""
    once = np.array([1, 0, 0, 1, 1, 0, 1, 1], float)
    alone = standard_error(once, range(8))
    assert alone == pytest.approx(once.std() / 8**0.5)
    assert standard_error(np.repeat(once, 2), [n // 2 for n in range(16)]) == pytest.approx(alone)
    assert standard_error(np.array([1.0, 0.0]), "xx") == 0


def test_a_clustered_error_is_the_spread_of_means_over_draws() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(100), 3)
    draws = rng.normal(size=(2000, 100)).repeat(3, axis=1) + rng.normal(size=(2000, 300))
    errors = [standard_error(row, clusters) for row in draws[:50]]
    assert np.mean(errors) == pytest.approx(draws.mean(1).std(), rel=0.06)
    assert np.mean(errors) > 1.3 * np.mean([standard_error(row, range(300)) for row in draws[:50]])


def test_different_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="a value per query of both"):
        paired([1, 0], [1])
    with pytest.raises(ValueError, match="a value per query of both"):
        paired([], [])
    with pytest.raises(ValueError, match="not finite"):
        paired([0, np.nan, 1], [1, 1, 1])


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_errors_that_stay_come_and_go_are_counted() -> None:
    before = [["a", 1, 1.0], ["b", 3, 0.0], ["c", 2, 0.0], ["d", 1, 1.0], ["e", 9, 0.0]]
    after = [["a", 2, 0.0], ["b", 1, 1.0], ["c", 7, 0.0], ["d", 1, 1.0], ["e", 2, 0.0]]
    for row in (*before, *after):
        row.append(row[0])
    evaluations = [
        {"iteration": name, "compared_on": "recall@1", "ranks": ranks}
        for name, ranks in (("0", before), ("1", after))
    ]
    [compared] = compare_iterations(evaluations)
    assert compared["errors"] == {"persistent": 2, "new": 1, "mended": 1}
    margins = [["a", 0.25, 1.0], ["b", -0.5, 0.0]]
    assert error_changes(margins, margins, "preference") is None
    several_right = [["a", 9, 1.0, "a"], ["b", 1, 1.0, "b"], ["c", 2, 0.0, "c"]]
    counts = error_changes(several_right, several_right, "any correct recall@1")
    assert counts == {"persistent": 1, "new": 0, "mended": 0}


def test_the_error_over_runs_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    means = [over_runs(rng.normal(3, 2, 4)) for _ in range(2000)]
    spread = np.std([mean.value for mean in means])
    assert spread == pytest.approx(2 / 4**0.5, rel=0.06)
    assert np.mean([mean.se**2 for mean in means]) ** 0.5 == pytest.approx(spread, rel=0.06)
    assert over_runs([0.25]).value == 0.25 and np.isnan(over_runs([0.25]).se)


def test_runs_are_paired_by_seed_where_both_have_the_same() -> None:
    """What a seed adds to both is no part of the difference's error."""
    a = {1: 0.2, 2: 0.9, 3: 0.5}
    b = {3: 0.61, 1: 0.30, 2: 1.01}
    same = difference_over_runs(a, b)
    assert same.value == pytest.approx(0.32 / 3) and same.se < 0.01
    other = difference_over_runs(a, {seed + 3: value for seed, value in b.items()})
    assert other.value == pytest.approx(same.value)
    assert other.se == pytest.approx(
        np.hypot(over_runs([*a.values()]).se, over_runs([*b.values()]).se)
    )
    assert np.isnan(difference_over_runs({1: 0.2}, b).se)
