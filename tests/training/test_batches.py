"""Batches are a function of seed and step, and hold what training needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.training.batches import Batch, Batches, known_positives
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet


def triplet(number: int, reference: int, text: str, target: int, name: str = "h") -> Triplet:
    query = Query(QueryId(f"{name}{number}"), ImageId(f"i{reference}"), text)
    return Triplet(query, ImageId(f"i{target}"))


def negative(query: QueryId, image: ImageId) -> MinedNegative:
    return MinedNegative(query, image, 1, 0.5, 2, 0.4, "top_k")


@dataclass
class Rows:
    """What a training stage is given."""

    human: list[Triplet]
    augmented: list[AugmentedTriplet] = field(default_factory=list)
    mined: list[MinedNegative] = field(default_factory=list)

    def batches(
        self, size: int, share: float = 0.25, num_negatives: int = 1, seed: int = 0, unique: bool = False
    ) -> Batches:
        return Batches(self.human, self.augmented, self.mined, size, share, num_negatives, seed, unique)

    def targets(self) -> dict[QueryId, ImageId]:
        return {t.query.id: t.target for t in [*self.human, *(a.triplet for a in self.augmented)]}


def plain(num: int) -> Rows:
    return Rows([triplet(i, i, f"text {i}", 1000 + i) for i in range(num)])


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Few references, texts and images, so that triplets coincide in all ways."""
    few = st.integers(0, 3)
    made = Rows(
        [
            triplet(i, draw(few), f"text {draw(few)}", 10 + draw(st.integers(0, 9)))
            for i in range(draw(st.integers(8, 40)))
        ]
    )
    for t in made.human:
        for image in draw(st.lists(st.integers(10, 25), max_size=3, unique=True)):
            if ImageId(f"i{image}") != t.target:
                made.mined.append(negative(t.query.id, ImageId(f"i{image}")))
    for n, mined in enumerate(made.mined):
        if draw(st.integers(0, 2)) == 0:
            source = next(t for t in made.human if t.query.id == mined.query)
            query = Query(QueryId(f"a{n}"), source.query.reference, f"new text {draw(few)}")
            made.augmented.append(AugmentedTriplet(Triplet(query, mined.image), mined.query, 1, "tiny", "p"))
    return made


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.queries, a.candidates) == (b.queries, b.candidates)
        and np.array_equal(a.target_B, b.target_B)
        and np.array_equal(a.also_right_BN, b.also_right_BN)
        and np.array_equal(a.own_BK, b.own_BK)
    )


@given(given=rows(), seed=st.integers(0, 9), steps=st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_batch_is_decided_by_seed_and_step_alone(given: Rows, seed: int, steps: list[int]) -> None:
    """Asked for in any order, as a resumed run does."""
    straight = given.batches(8, seed=seed)
    in_order = [straight[step] for step in range(31)]
    jumping = given.batches(8, seed=seed)
    assert all(same(jumping[step], in_order[step]) for step in steps)


def test_seeds_and_steps_give_different_batches() -> None:
    given = plain(100)
    assert not same(given.batches(8, seed=0)[0], given.batches(8, seed=1)[0])
    assert not same(given.batches(8)[0], given.batches(8)[1])


@pytest.mark.parametrize(("num", "size"), [(12, 4), (60, 6), (8, 8), (96, 48)])
def test_human_triplets_come_once_per_epoch_where_nothing_is_augmented(num: int, size: int) -> None:
    batches, steps = plain(num).batches(size), num // size
    for epoch in range(3):
        seen = Counter(q.id for step in range(steps) for q in batches[epoch * steps + step].queries)
        assert len(seen) == num and set(seen.values()) == {1}
    orders = [[q.id for s in range(steps) for q in batches[e * steps + s].queries] for e in range(2)]
    assert orders[0] != orders[1], "two epochs in one order"


@pytest.mark.parametrize(("num", "size"), [(13, 4), (50, 48), (61, 6)])
def test_human_triplets_are_all_seen_within_an_epoch_begun(num: int, size: int) -> None:
    batches = plain(num).batches(size)
    seen = {q.id for step in range(-(-num // size)) for q in batches[step].queries}
    assert len(seen) == num


@given(given=rows(), seed=st.integers(0, 9), share=st.sampled_from((0.0, 0.25, 0.5)))
def test_no_query_comes_twice_in_a_batch(given: Rows, seed: int, share: float) -> None:
    batches = given.batches(8, share, seed=seed)
    for step in range(12):
        ids = [query.id for query in batches[step].queries]
        assert len(set(ids)) == len(ids) and 6 <= len(ids) <= 8


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_batch_size_is_constant_where_triplets_are_many(share: float) -> None:
    """Also where augmented triplets bring sources that the human stream has too."""
    given = plain(200)
    for t in given.human[:100]:
        query = Query(QueryId(f"a{t.query.id}"), t.query.reference, "new text")
        given.augmented.append(AugmentedTriplet(Triplet(query, ImageId("i5")), t.query.id, 1, "tiny", "p"))
    batches = given.batches(24, share)
    assert {len(batches[step].queries) for step in range(60)} == {24}


@pytest.mark.parametrize(("num", "size"), [(5, 4), (49, 48), (50, 48), (9, 8)])
def test_batch_is_full_where_an_epoch_ends_within_it(num: int, size: int) -> None:
    sizes = [len(plain(num).batches(size, seed=seed)[step].queries) for seed in range(5) for step in range(40)]
    assert set(sizes) == {size}


@given(given=rows(), seed=st.integers(0, 9))
def test_augmented_triplet_is_brought_with_its_source(given: Rows, seed: int) -> None:
    source = {a.triplet.query.id: a.source for a in given.augmented}
    batches, seen = given.batches(8, 0.25, seed=seed), set()
    for step in range(12):
        ids = {query.id for query in batches[step].queries}
        new = ids & source.keys()
        assert {source[i] for i in new} <= ids
        assert min(1, len(given.augmented)) <= len(new) <= 2
        seen |= new
    if len(given.augmented) <= 12:
        assert seen == source.keys(), "an augmented triplet was never trained on"


@given(given=rows(), seed=st.integers(0, 9), num=st.integers(0, 3))
def test_negatives_of_human_rows_are_candidates(given: Rows, seed: int, num: int) -> None:
    mined: dict[QueryId, set[ImageId]] = {}
    for n in given.mined:
        mined.setdefault(n.query, set()).add(n.image)
    batches, targets = given.batches(8, num_negatives=num, seed=seed), given.targets()
    for step in range(6):
        batch = batches[step]
        own = {targets[q.id] for q in batch.queries}
        expected = 0
        for query in batch.queries:
            there = mined.get(query.id, set()) & set(batch.candidates)
            assert len(there) >= min(num, len(mined.get(query.id, ())))
            expected += min(num, len(mined.get(query.id, ())))
        assert own <= set(batch.candidates) and len(batch.candidates) <= len(own) + expected
        assert set(batch.candidates) - own <= set().union(*mined.values(), set())


@given(given=rows(), seed=st.integers(0, 9))
def test_targets_are_where_the_batch_says(given: Rows, seed: int) -> None:
    batches, targets = given.batches(8, seed=seed), given.targets()
    for step in range(6):
        batch = batches[step]
        assert len(set(batch.candidates)) == len(batch.candidates)
        found = [batch.candidates[row] for row in batch.target_B]
        assert found == [targets[q.id] for q in batch.queries]
        assert batch.target_B.dtype == np.int64


@given(given=rows(), seed=st.integers(0, 9))
def test_also_right_marks_exactly_the_other_known_targets(given: Rows, seed: int) -> None:
    known = {(t.query.reference, t.query.text, t.target) for t in [*given.human, *(a.triplet for a in given.augmented)]}
    batches = given.batches(8, seed=seed)
    for step in range(6):
        batch = batches[step]
        assert batch.also_right_BN.shape == (len(batch.queries), len(batch.candidates))
        for i, query in enumerate(batch.queries):
            assert not batch.also_right_BN[i, batch.target_B[i]], "the target itself is masked"
            for j, image in enumerate(batch.candidates):
                right = (query.reference, query.text, image) in known and j != batch.target_B[i]
                assert batch.also_right_BN[i, j] == right


@given(given=rows(), seed=st.integers(0, 9), share=st.sampled_from((0.0, 0.25)))
def test_no_image_is_the_target_of_two_queries(given: Rows, seed: int, share: float) -> None:
    batches, targets = given.batches(8, share, seed=seed, unique=True), given.targets()
    source = {a.triplet.query.id: a.source for a in given.augmented}
    for step in range(12):
        batch = batches[step]
        found = [targets[query.id] for query in batch.queries]
        ids = {query.id for query in batch.queries}
        assert len(set(found)) == len(found) <= 8
        assert {source[i] for i in ids & source.keys()} <= ids
        if len(found) < 8:  # only where every triplet left has a target that is there already
            assert {t.target for t in given.human if t.query.id not in ids} <= set(found)


@given(given=rows(), seed=st.integers(0, 9), num=st.integers(0, 3), unique=st.booleans())
def test_own_negatives_are_mined_or_of_other_queries(given: Rows, seed: int, num: int, unique: bool) -> None:
    mined: dict[QueryId, set[ImageId]] = {}
    for n in given.mined:
        mined.setdefault(n.query, set()).add(n.image)
    batches, targets = given.batches(8, num_negatives=num, seed=seed, unique=unique), given.targets()
    known = {(t.query.reference, t.query.text, t.target) for t in [*given.human, *(a.triplet for a in given.augmented)]}
    for step in range(6):
        batch = batches[step]
        assert batch.own_BK.shape == (len(batch.queries), max(1, num))
        for query, row in zip(batch.queries, batch.own_BK, strict=True):
            own = [batch.candidates[place] for place in row if place >= 0]
            assert len(set(own)) == len(own)
            if num and mined.get(query.id):
                assert set(own) <= mined[query.id] and len(own) == min(num, len(mined[query.id]))
            else:
                wrong = {targets[q.id] for q in batch.queries}
                wrong = {image for image in wrong if (query.reference, query.text, image) not in known}
                assert set(own) <= wrong and len(own) == min(max(1, num), len(wrong))


@pytest.mark.parametrize(("size", "groups"), [(8, 3), (6, 20)])
def test_grouped_batches_hold_few_groups_and_see_nearly_all(size: int, groups: int) -> None:
    given = plain(100)
    of = {t.query.id: f"g{i % groups}" for i, t in enumerate(given.human)}
    batches = Batches(given.human, [], [], size, 0.0, 0, 0, True, of)
    steps = 100 // size
    found = [{of[q.id] for q in batches[step].queries} for step in range(steps)]
    plainly = [{of[q.id] for q in given.batches(size, 0.0)[step].queries} for step in range(steps)]
    assert all(len(batches[step].queries) == size for step in range(2 * steps))
    assert np.mean([len(each) for each in found]) < 0.6 * np.mean([len(each) for each in plainly])
    seen = Counter(q.id for step in range(steps) for q in batches[step].queries)
    assert set(seen.values()) == {1} and len(seen) == steps * size
    second = [q.id for step in range(steps, 2 * steps) for q in batches[step].queries]
    assert second != [q.id for step in range(steps) for q in batches[step].queries]


def test_no_human_triplets_is_an_error() -> None:
    with pytest.raises(ValueError, match="no human triplets"):
        Rows([]).batches(8)


def test_known_positives_gather_the_targets_of_equal_queries() -> None:
    human = [triplet(0, 1, "a", 5), triplet(1, 1, "a", 6), triplet(2, 1, "b", 7), triplet(3, 2, "a", 8)]
    assert known_positives(human) == {
        "h0": {"i5", "i6"},
        "h1": {"i5", "i6"},
        "h2": {"i7"},
        "h3": {"i8"},
    }
