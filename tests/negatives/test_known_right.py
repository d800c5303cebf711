"""No strategy and no fallback mines what is known to be right, in a split full of traps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.known_right_negatives import (
    FALLBACKS,
    KINDS,
    STRATEGIES,
    World,
    make_world,
    mined,
    of,
    right_ones,
)  # fmt: skip
from cirloop.data.known_positives import KnownPositives
from cirloop.negatives import NoMining, Random, TopK
from cirloop.negatives.base import Strategy
from cirloop.stages.exclusions import EXCLUSION_KINDS, SPELLING, barred_rows
from cirloop.training.batches import BatchSampler
from cirloop.types import MinedNegative

MINERS = [kind for kind in STRATEGIES if kind is not NoMining]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("traps"))


def test_all_strategies_are_tried() -> None:
    assert len(STRATEGIES) == 19


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("kind", MINERS, ids=lambda kind: kind.model_fields["type"].default)
def test_no_known_right_answer_is_mined(kind: type[Strategy], fallback: str, world: World) -> None:
    pairs = mined(world, of(kind, 5, fallback=fallback))
    assert pairs and right_ones(world, pairs) == Counter()
    if fallback != "none":
        assert set(Counter(query for query, _ in pairs).values()) == {5}, (
            "a query was not filled up"
        )


@pytest.mark.parametrize("reference", ["out", "in"])
def test_no_known_right_answer_is_mined_by_an_index_or_beside_the_reference(
    reference: str, world: World
) -> None:
    for search in ("exact", "hnsw"):
        pairs = mined(
            world, of(TopK, 5, search=search, rank_reference=reference == "in", extra_ranks="all")
        )
        assert pairs and right_ones(world, pairs) == Counter()
        references = {t.query.id: t.query.reference for t in world.train.triplets}
        assert any(image == references[query] for query, image in pairs) == (reference == "in")


def test_the_traps_catch_who_leaves_out_target_and_reference_alone(world: World) -> None:
    careless = right_ones(world, mined(world, of(TopK, 5, extra_ranks="all"), known=False))
    assert set(careless) == set(KINDS)


def test_pairs_left_out_are_counted_by_name(world: World) -> None:
    """Per pair of queries a, b that ask for the same, against the number of each trap that was
    set."""
    barred, counts = barred_rows(
        world.train, KnownPositives.of(world.train, confirmed=world.confirmed)
    )
    queries = len(world.train.triplets)
    assert tuple(counts) == EXCLUSION_KINDS
    assert counts == {
        "positives of the line": 2 * queries,
        "copies of the target": queries,
        "copies of the reference": (
            2 * queries
        ),  # the other query's reference, and its second spelling
        "same text": (
            5 * queries
        ),  # the other query's positives; its target with its copy and second spelling
        "confirmed by the captioner": 2 * queries,
        "right by the catalogue": 0,
        SPELLING: 2 * queries,
    }
    assert sum(counts.values()) == sum(len(world.right[t.query.id]) for t in world.train.triplets)
    rows = world.train.gallery.rows()
    for triplet, images in zip(world.train.triplets, barred, strict=True):
        assert images == {rows[image] for image in (*world.right[triplet.query.id], triplet.target)}


def test_a_split_without_traps_leaves_nothing_out(world: World) -> None:
    train = world.train
    names = KnownPositives([t for t in train.triplets if t.query.id.endswith("a")])
    alone = type(train)(train.name, train.triplets[::2], train.gallery, train.images)
    barred, counts = barred_rows(alone, names)
    assert set(counts.values()) == {0}
    assert [len(rows) for rows in barred] == [1] * len(alone.triplets)


@pytest.mark.parametrize("num_negatives", [1, 3])
def test_batches_pair_no_query_with_a_known_right_answer(num_negatives: int, world: World) -> None:
    """Also where the mining knew less: all that is right was mined."""
    known = KnownPositives.of(world.train, confirmed=world.confirmed)
    wrong = mined(world, of(Random, 2))
    right = [(query, image) for query, images in world.right.items() for image in images]
    rows = [MinedNegative(query, image, 1, 0.5, 2, 0.4, "random") for query, image in right + wrong]
    triplets = world.train.triplets
    batches = BatchSampler(triplets, [], rows, 12, 0.0, num_negatives, 0, known=known)
    assert batches.num_known_positives == len(right)
    targets = {t.query.id: t.target for t in triplets}
    for step in range(6):
        batch = batches[step]
        for i, query in enumerate(batch.queries):
            images = [batch.candidates[place] for place in batch.hard_negatives_BK[i] if place >= 0]
            assert images and not set(images) & {*world.right[query.id], targets[query.id]}
        marked = [np.flatnonzero(row).tolist() for row in batch.known_positive_BN]
        for i, query in enumerate(batch.queries):
            reference = world.train.images.digest(query.reference)
            kinds = world.right[query.id]
            expected = [
                place for place, image in enumerate(batch.candidates)
                if image in kinds and world.train.images.digest(image) != reference
            ]  # fmt: skip
            assert marked[i] == expected


def test_others_are_no_known_right_answers(world: World) -> None:
    """In the warm-up a query's own negatives are random targets of other queries."""
    known = KnownPositives.of(world.train)
    batches = BatchSampler(world.train.triplets, [], [], 24, 0.0, 20, 0, known=known)
    batch = batches[0]
    assert len(batch.queries) == 24
    for i, query in enumerate(batch.queries):
        images = {batch.candidates[place] for place in batch.hard_negatives_BK[i] if place >= 0}
        assert len(images) == 20 and not images & set(world.right[query.id])
