"""QuRe's band, both variants, against a loop that does what the paper, and the released code,
say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given

from cirloop.negatives.base import CandidateBlock, MiningContext
from cirloop.negatives.strategies.band import Band, band, below_target
from tests.negatives.cases import Case, cases


def naive(scores: list[float], target: int, allowed: set[int], variant: str) -> set[int]:
    """Compute the set by sorting in plain Python."""
    order = sorted(range(len(scores)), key=lambda g: (-scores[g], g))
    tail = [g for g in order[order.index(target) + 1 :] if g in allowed]
    if len(tail) < 3:
        return set(tail)
    drops = [scores[a] - scores[b] for a, b in pairwise(tail)]
    by_size = sorted(range(len(drops)), key=lambda i: (-drops[i], i))
    if variant == "paper":
        low, high = sorted(by_size[:2])
        return set(tail[low + 1 : high + 1])
    for a, b in pairwise(by_size):
        if abs(a - b) > 1:
            low, high = sorted((a, b))
            return set(tail[low + 1 : high + 1])
    return set(tail)


def block(scores: np.ndarray, target: int) -> CandidateBlock:
    size = scores.shape[1]
    allowed = np.ones(scores.shape, bool)
    allowed[:, target] = False
    columns = np.broadcast_to(np.arange(size), scores.shape)
    number = np.arange(len(scores))
    return CandidateBlock(
        number, columns, scores, allowed, np.full(len(scores), target), scores[:, target], number
    )


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("kind", ["continuous", "few values", "two values"])
def test_a_thousand_rows_of_random_scores(variant: str, kind: str) -> None:
    random = np.random.default_rng(3)
    scores = random.standard_normal((1000, 60)).astype(np.float32)
    if kind != "continuous":
        scores = random.integers(0, 12 if kind == "few values" else 2, (1000, 60)).astype(
            np.float32
        )
    scores[:300, 20:] = -5 - random.random((300, 40), np.float32)  # a cliff that many rows have
    for target in (0, 7, 59):
        given = block(scores, target)
        found = band(scores, below_target(given), variant)  # type: ignore[arg-type]
        allowed = set(range(60)) - {target}
        for row, inside in zip(scores.tolist(), found, strict=True):
            assert set(np.flatnonzero(inside).tolist()) == naive(row, target, allowed, variant)


@pytest.mark.parametrize("variant", ["paper", "released"])
@given(case=cases())
def test_with_references_and_other_positives(variant: str, case: Case) -> None:
    given = case.whole()
    chosen = Band(variant=variant).candidate_sets(given, MiningContext(0))  # type: ignore[arg-type]
    for i, inside in enumerate(chosen):
        expected = naive(case.scores_QG[i].tolist(), case.targets[i], set(case.allowed(i)), variant)
        assert inside.tolist() == sorted(expected)


def test_an_example_by_hand() -> None:
    """Target 0; the tail falls .80 .78 | .50 .48 .47 | .10: the second cliff is the steepest, the
    first the next."""
    scores = np.array([[0.9, 0.1, 0.47, 0.8, 0.5, 0.78, 0.48]], np.float32)
    [paper] = Band().candidate_sets(block(scores, 0), MiningContext(0))
    assert paper.tolist() == [2, 4, 6]
    # drops of .3 at 0 and .2 at 1: one position apart, so the released rule goes on to the next
    # pair, 1 and 3
    scores = np.array([[0.9, 0.8, 0.5, 0.3, 0.25, 0.15]], np.float32)
    assert Band().candidate_sets(block(scores, 0), MiningContext(0))[0].tolist() == [2]
    assert Band(variant="released").candidate_sets(block(scores, 0), MiningContext(0))[
        0
    ].tolist() == [3, 4]


def test_short_tails_and_warm_up_give_what_the_docstring_says() -> None:
    scores = np.array([[0.9, 0.5, 0.4]], np.float32)
    for variant in ("paper", "released"):
        assert Band(variant=variant).candidate_sets(block(scores, 0), MiningContext(0))[
            0
        ].tolist() == [1, 2]  # type: ignore[arg-type]
        assert not len(Band(variant=variant).candidate_sets(block(scores, 2), MiningContext(0))[0])  # type: ignore[arg-type]
    level = np.full((1, 6), 0.5, np.float32)
    assert Band().candidate_sets(block(level, 0), MiningContext(0))[0].tolist() == [
        2
    ]  # tail 1..5, earliest drops 0 and 1: tail[1]
    warm = Band(full_set_rounds=2)
    assert warm.candidate_sets(block(level, 2), MiningContext(0, iteration=1))[0].tolist() == [
        0,
        1,
        3,
        4,
        5,
    ]
    assert warm.candidate_sets(block(level, 2), MiningContext(0, iteration=2))[0].tolist() == [4]


def test_n_def_sets_warm_up_and_period() -> None:
    level = np.full((1, 6), 0.5, np.float32)
    six = Band(n_def=6)
    assert [six.refresh_every(rounds) for rounds in (3, 6, 12, 20)] == [1, 1, 2, 3]
    assert Band().refresh_every(12) == 1
    sizes = [
        len(six.candidate_sets(block(level, 2), MiningContext(0, iteration=t, rounds=12))[0])
        for t in range(4)
    ]
    assert sizes == [5, 5, 1, 1]


def test_the_image_drawn_is_of_the_set_and_evenly() -> None:
    scores = np.array([[0.9, 0.1, 0.47, 0.8, 0.5, 0.78, 0.48]], np.float32)
    drawn = [int(Band().choose(block(scores, 0), MiningContext(seed))[0][0]) for seed in range(300)]
    counts = {image: drawn.count(image) for image in set(drawn)}
    assert set(counts) == {2, 4, 6} and min(counts.values()) > 70
    assert Band(selection="hardest", negatives_per_query=2).choose(
        block(scores, 0), MiningContext(0)
    )[0].tolist() == [4, 6]
