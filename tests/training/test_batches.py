"""Batches are a function of seed and step, and hold what training needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.data.known_positives import KnownPositives
from cirloop.training.batches import Batch, BatchSampler
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet


def triplet(number: int, reference: int, text: str, target: int, name: str = "h") -> Triplet:
    query = Query(QueryId(f"{name}{number}"), ImageId(f"i{reference}"), text)
    return Triplet(query, ImageId(f"i{target}"))


def negative(query: QueryId, image: ImageId) -> MinedNegative:
    return MinedNegative(query, image, 1, 0.5, 2, 0.4, "top_k")


def rewritten(query: Query, image: ImageId, source: QueryId) -> AugmentedTriplet:
    return AugmentedTriplet(Triplet(query, image), source, 1, "tiny", "p")


@dataclass
class Rows:
    """What a training stage is given."""

    human: list[Triplet]
    augmented: list[AugmentedTriplet] = field(default_factory=list)
    mined: list[MinedNegative] = field(default_factory=list)

    def batches(
        self,
        size: int,
        share: float = 0.25,
        num_negatives: int = 1,
        seed: int = 0,
        unique: bool = False,
    ) -> BatchSampler:
        return BatchSampler(
            self.human, self.augmented, self.mined, size, share, num_negatives, seed, unique
        )

    def everything(self) -> list[Triplet]:
        return [*self.human, *(a.triplet for a in self.augmented)]

    def known(self) -> set[tuple[ImageId, str, ImageId]]:
        """Reference, text and target of every triplet."""
        return {(t.query.reference, t.query.text, t.target) for t in self.everything()}

    def mined_images(self) -> dict[QueryId, set[ImageId]]:
        images: dict[QueryId, set[ImageId]] = {}
        for n in self.mined:
            images.setdefault(n.query, set()).add(n.image)
        return images

    def targets(self) -> dict[QueryId, ImageId]:
        return {t.query.id: t.target for t in self.everything()}


def plain(num: int) -> Rows:
    return Rows([triplet(i, i, f"text {i}", 1000 + i) for i in range(num)])


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Few references, texts and images, so that triplets coincide in all ways."""
    few, ten = st.integers(0, 3), st.integers(10, 19)
    num = draw(st.integers(8, 40))
    made = Rows([triplet(i, draw(few), f"text {draw(few)}", draw(ten)) for i in range(num)])
    for t in made.human:
        for image in draw(st.lists(st.integers(10, 25), max_size=3, unique=True)):
            if ImageId(f"i{image}") != t.target:
                made.mined.append(negative(t.query.id, ImageId(f"i{image}")))
    for n, mined in enumerate(made.mined):
        if draw(st.integers(0, 2)) == 0:
            source = next(t for t in made.human if t.query.id == mined.query)
            query = Query(QueryId(f"a{n}"), source.query.reference, f"new text {draw(few)}")
            made.augmented.append(rewritten(query, mined.image, mined.query))
    return made


@given(given=rows(), share=st.sampled_from([0.0, 0.25, 0.5]))
def test_triplets_are_counted_by_their_origin(given: Rows, share: float) -> None:
    batches = given.batches(8, share)
    counted: dict[str, Counter[QueryId]] = {"human": Counter(), "1": Counter()}
    for step in range(5):
        for query in batches[step].queries:
            counted["1" if query.id.startswith("a") else "human"][query.id] += 1
    assert batches.drawn(5) == {
        origin: {"triplets": len(names), "rows": names.total()}
        for origin, names in counted.items()
        if names
    }


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.queries, a.candidates) == (b.queries, b.candidates)
        and np.array_equal(a.target_B, b.target_B)
        and np.array_equal(a.known_positive_BN, b.known_positive_BN)
        and np.array_equal(a.hard_negatives_BK, b.hard_negatives_BK)
    )


@given(
    given=rows(), seed=st.integers(0, 9), steps=st.lists(st.integers(0, 30), min_size=1, max_size=6)
)
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
    order = [q.id for step in range(2 * steps) for q in batches[step].queries]
    assert order[:num] != order[num:], "two epochs in one order"


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
        given.augmented.append(rewritten(query, ImageId("i5"), t.query.id))
    batches = given.batches(24, share)
    assert {len(batches[step].queries) for step in range(60)} == {24}


@pytest.mark.parametrize(("num", "size"), [(5, 4), (49, 48), (50, 48), (9, 8)])
def test_batch_is_full_where_an_epoch_ends_within_it(num: int, size: int) -> None:
    for seed in range(5):
        batches = plain(num).batches(size, seed=seed)
        assert {len(batches[step].queries) for step in range(40)} == {size}


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
    mined = given.mined_images()
    batches, targets = given.batches(8, num_negatives=num, seed=seed), given.targets()
    known = given.known()
    for step in range(6):
        batch = batches[step]
        own = {targets[q.id] for q in batch.queries}
        expected = 0
        for query in batch.queries:
            right = {g for r, text, g in known if (r, text) == (query.reference, query.text)}
            usable = mined.get(query.id, set()) - right - {query.reference}
            assert len(usable & set(batch.candidates)) >= min(num, len(usable))
            expected += min(num, len(usable))
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
    known = given.known()
    batches = given.batches(8, seed=seed)
    for step in range(6):
        batch = batches[step]
        assert batch.known_positive_BN.shape == (len(batch.queries), len(batch.candidates))
        for i, query in enumerate(batch.queries):
            assert not batch.known_positive_BN[i, batch.target_B[i]], "the target itself is masked"
            for j, image in enumerate(batch.candidates):
                right = (query.reference, query.text, image) in known and j != batch.target_B[i]
                assert batch.known_positive_BN[i, j] == right


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
def test_own_negatives_are_mined_or_of_other_queries(
    given: Rows, seed: int, num: int, unique: bool
) -> None:
    mined = given.mined_images()
    batches = given.batches(8, num_negatives=num, seed=seed, unique=unique)
    targets = given.targets()
    source = {a.triplet.query.id: a.source for a in given.augmented}
    known = given.known()
    for step in range(6):
        batch = batches[step]
        assert batch.hard_negatives_BK.shape[0] == len(batch.queries)
        assert batch.hard_negatives_BK.shape[1] >= 1
        for query, row in zip(batch.queries, batch.hard_negatives_BK, strict=True):
            own = {batch.candidates[place] for place in row if place >= 0}
            assert len(own) == (row >= 0).sum()
            right = {g for r, text, g in known if (r, text) == (query.reference, query.text)}
            barred = right | {query.reference}
            partners = [q for q in batch.queries if source.get(q.id) == query.id]
            written = {targets[q.id] for q in partners} - barred
            usable = mined.get(query.id, set()) - barred
            if written or (num and usable):
                assert written <= own <= written | usable
                assert min(num, len(usable)) <= len(own) <= min(num, len(usable)) + len(written)
            else:
                wrong = {targets[q.id] for q in batch.queries} - barred
                assert own <= wrong and len(own) == min(num, len(wrong))


@pytest.mark.parametrize(("size", "groups"), [(8, 3), (6, 20)])
def test_grouped_batches_hold_few_groups_and_see_nearly_all(size: int, groups: int) -> None:
    given = plain(100)
    of = {t.query.id: f"g{i % groups}" for i, t in enumerate(given.human)}
    batches = BatchSampler(given.human, [], [], size, 0.0, 0, 0, True, of)
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


def paired(num: int, per_query: int = 1) -> Rows:
    """Human triplets whose mined images were all rewritten, `per_query` each."""
    made = plain(num)
    for i, t in enumerate(made.human):
        for n in range(per_query):
            image = ImageId(f"m{i}.{n}")
            made.mined += [
                negative(t.query.id, image),
                negative(t.query.id, ImageId(f"unwritten{i}.{n}")),
            ]
            query = Query(QueryId(f"{t.query.id}+1.{n}"), t.query.reference, f"new text {i}.{n}")
            made.augmented.append(rewritten(query, image, t.query.id))
    return made


@pytest.mark.parametrize("num_negatives", [0, 1])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_human_query_is_paired_with_the_mined_image_of_its_rewritten_triplet(
    num_negatives: int, share: float
) -> None:
    """ReCALL's I_h: every human query with an augmented partner in its batch, and with 0 negatives
    nothing else."""
    given = paired(100)
    batches = given.batches(16, share, num_negatives)
    written = {a.source: a.triplet for a in given.augmented}
    mined = given.mined_images()
    pairs = alone = 0
    for step in range(100):
        batch = batches[step]
        ids = {query.id for query in batch.queries}
        for query, row in zip(batch.queries, batch.hard_negatives_BK, strict=True):
            own = [batch.candidates[place] for place in row if place >= 0]
            partner = written.get(query.id)
            if partner is None:  # an augmented query: the paper gives it no negative
                assert len(own) == num_negatives
            elif partner.query.id in ids:
                pairs += 1
                assert own[0] == partner.target and set(own) <= mined[query.id]
                assert len(own) <= 1 + num_negatives
            else:
                alone += 1
                assert set(own) <= mined[query.id] and len(own) == num_negatives
    assert pairs == 100 * int(16 * share) and (alone > 0) == (share < 0.5)


def test_all_rewritten_triplets_of_a_query_in_a_batch_are_its_negatives() -> None:
    given = paired(2, per_query=3)
    batch = given.batches(10, 0.5, 0)[0]
    own = [
        {batch.candidates[place] for place in row if place >= 0} for row in batch.hard_negatives_BK
    ]
    for query, images in zip(batch.queries, own, strict=True):
        partners = {a.triplet.target for a in given.augmented if a.source == query.id}
        assert images == partners & set(batch.candidates)
    assert max(map(len, own)) > 1


def test_a_rewritten_image_that_is_right_for_its_source_is_no_negative() -> None:
    """The captioner also wrote the original text for it."""
    given = paired(8)
    queries = {t.query.id: t.query for t in given.human}
    confirmed = [(a.source, a.triplet.target) for a in given.augmented[:4]]
    written = [
        (queries[source].reference, queries[source].text, image) for source, image in confirmed
    ]
    known = KnownPositives(given.human, given.augmented, confirmed=written)
    batch = BatchSampler(given.human, given.augmented, given.mined, 16, 0.5, 0, 0, known=known)[0]
    own = {query.id: row for query, row in zip(batch.queries, batch.hard_negatives_BK, strict=True)}
    right = {
        query.id: row for query, row in zip(batch.queries, batch.known_positive_BN, strict=True)
    }
    assert len(own) == 16
    for source, image in confirmed:
        assert (own[source] < 0).all() and right[source][batch.candidates.index(image)]
    assert all((own[a.source] >= 0).any() for a in given.augmented[4:])


def test_a_reference_that_was_mined_is_a_negative_and_its_copy_is_not() -> None:
    """`mining.rank_reference` asks for the reference; nobody asks for a copy of it, or for one that
    is right."""
    human = [triplet(0, 1, "make it red", 5), triplet(1, 2, "make it red", 6)]
    mined = [negative(QueryId("h0"), ImageId("i1")), negative(QueryId("h1"), ImageId("i2"))]
    mined.append(negative(QueryId("h0"), ImageId("copy of i1")))
    known = KnownPositives(
        human,
        confirmed=[(ImageId("i2"), "make it red", ImageId("i2"))],
        content=lambda image: image.removeprefix("copy of "),
    )
    batches = BatchSampler(human, [], mined, 2, 0.0, 2, 0, known=known)
    batch = batches[0]
    own = {
        query.id: {batch.candidates[place] for place in row if place >= 0}
        for query, row in zip(batch.queries, batch.hard_negatives_BK, strict=True)
    }
    assert own == {"h0": {"i1"}, "h1": {"i5"}} and batches.num_known_positives == 2


def test_queries_that_differ_in_case_and_spaces_alone_share_their_targets() -> None:
    human = [
        triplet(0, 1, "Make it  RED", 5),
        triplet(1, 1, " make it red", 6),
        triplet(2, 1, "make it blue", 7),
    ]
    batch = BatchSampler(human, [], [negative(QueryId("h0"), ImageId("i6"))], 3, 0.0, 5, 0)[0]
    of = {query.id: i for i, query in enumerate(batch.queries)}
    places = [batch.candidates.index(ImageId(f"i{n}")) for n in (5, 6, 7)]
    assert batch.known_positive_BN[of[QueryId("h0")], places].tolist() == [False, True, False]
    assert batch.known_positive_BN[of[QueryId("h1")], places].tolist() == [True, False, False]
    assert not batch.known_positive_BN[of[QueryId("h2")]].any()
    own = [
        {batch.candidates[p] for p in batch.hard_negatives_BK[of[QueryId(f"h{n}")]] if p >= 0}
        for n in range(3)
    ]
    assert own == [{"i7"}, {"i7"}, {"i5", "i6"}]
