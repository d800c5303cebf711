"""Planted pairs, and the AUC of judges on them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cirloop.captioning.backends.catalogue import CatalogueCaptioner
from cirloop.captioning.planted import PlantedPairs, auc, draw_pairs, planted_pairs
from cirloop.captioning.prompts import VERIFY
from cirloop.data import ShapesSettings
from cirloop.types import ImageId, Query, QueryId, Triplet

TRIPLETS = [
    Triplet(Query(QueryId(f"q{i}"), ImageId(f"r{i}"), f"text {i}"), ImageId(f"t{i}"))
    for i in range(20)
]


def drawn(num: int, seed: int) -> PlantedPairs:
    return draw_pairs(TRIPLETS, num, seed, lambda _: False)


def test_one_planted_pair_in_ten_is_right() -> None:
    pairs = drawn(10, seed=1)
    right = {(t.query.reference, t.query.text, t.target) for t in TRIPLETS}
    assert [(r.reference, r.text, r.image) in right for r in pairs.requests] == pairs.is_right
    assert (len(pairs.is_right), sum(pairs.is_right)) == (100, 10)
    assert {pairs.triplets.count(number) for number in range(10)} == {10}
    assert drawn(10, seed=1) == pairs
    assert drawn(10, seed=2).requests != pairs.requests
    assert sum(drawn(99, seed=1).is_right) == 20


def test_wrong_pairs_keep_the_images_of_their_triplet() -> None:
    pairs = drawn(10, seed=1)
    for request, number in zip(pairs.requests, pairs.triplets, strict=True):
        first = pairs.requests[number]
        assert (request.reference, request.image) == (first.reference, first.image)


def test_texts_that_are_right_by_the_lines_or_the_catalogue_are_left_out() -> None:
    train = ShapesSettings(train_families=6, train_triplets=90).build().train
    pairs = planted_pairs(train, 50, seed=1)
    assert train.catalogue is not None
    judge = CatalogueCaptioner(train.catalogue)
    answers = judge.yes_probability(VERIFY, pairs.requests, [])
    assert answers == [float(right) for right in pairs.is_right]
    assert 350 < len(answers) < 500, "some texts are right for other images too"
    assert auc(pairs, answers) == (1.0, 0.0)


def test_a_judge_that_says_one_thing_has_half() -> None:
    assert auc(drawn(10, 1), [0.9] * 100) == (0.5, 0.0)
    pairs = drawn(10, 1)
    assert auc(pairs, [1.0 - right for right in pairs.is_right]) == (0.0, 0.0)
    assert auc(draw_pairs(TRIPLETS, 10, 1, lambda _: True), [1.0] * 10) is None


def test_the_auc_is_that_of_comparing_every_two_pairs() -> None:
    pairs, rng = drawn(10, 1), random.Random(1)
    answers = [round(rng.random() + 0.3 * right, 1) for right in pairs.is_right]
    right = [a for a, is_right in zip(answers, pairs.is_right, strict=True) if is_right]
    wrong = [a for a, is_right in zip(answers, pairs.is_right, strict=True) if not is_right]
    wins = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    measured = auc(pairs, answers)
    assert measured is not None
    assert measured[0] == pytest.approx(np.mean(wins))


def test_the_standard_error_is_the_spread_over_draws() -> None:
    """Answers share a part that is their triplet's, as those about the same images do."""
    rng = np.random.default_rng(0)
    pairs = drawn(20, 1)
    triplets = np.array(pairs.triplets)
    right = np.array(pairs.is_right)
    values, errors = [], []
    for _ in range(300):
        shared = rng.normal(size=20)[triplets]
        measured = auc(pairs, (shared + rng.normal(size=len(right)) + right).tolist())
        assert measured is not None
        values.append(measured[0])
        errors.append(measured[1])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
