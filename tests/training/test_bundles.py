"""Bundles: each once an epoch, whole in a batch, and a function of seed and step."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cirloop.training.batches import BatchSampler
from cirloop.training.bundles import BundleOrder
from cirloop.training.config import BundleSettings
from cirloop.types import AugmentedTriplet, ImageId, Query, QueryId, Triplet
from tests.training.test_batches import negative, triplet

HUMAN = [triplet(i, i, f"text {i}", 1000 + i) for i in range(20)]


def texts(source: str, reference: int, num: int) -> list[AugmentedTriplet]:
    """`num` texts that were written from a source."""
    made = []
    for n in range(num):
        name = QueryId(f"{source}+1.{n}")
        query = Query(name, ImageId(f"i{reference}"), f"{source} becomes {n}")
        target = ImageId(f"{source} target {n}")
        made.append(AugmentedTriplet(Triplet(query, target), QueryId(source), 1, "tiny", "p"))
    return made


AUGMENTED = [*texts("h0", 0, 5), *texts("h1", 1, 1), *texts("h2", 2, 2), *texts("anchor0.0", 77, 3)]


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_holds_every_bundle_once(size: int, num_rows: int, seed: int) -> None:
    order = BundleOrder(HUMAN, AUGMENTED, size, num_rows, seed)
    again = BundleOrder(HUMAN, AUGMENTED, size, num_rows, seed)
    steps = [order[step] for step in range(8)]
    assert [again[step] for step in (5, 2)] == [steps[5], steps[2]]
    assert all(sum(map(len, step)) <= num_rows for step in steps)
    whole = [bundle for step in steps for bundle in step if len(bundle) > 0]
    sources = [bundle[0].query.reference for bundle in whole]
    for epoch in range(len(sources) // 4):
        assert len({*sources[4 * epoch : 4 * epoch + 4]}) == 4
    for bundle in whole:
        assert len(bundle) <= size
        assert len({row.query.reference for row in bundle}) == 1
        assert len({row.query.id for row in bundle}) == len(bundle)


def test_a_batch_holds_bundles_and_plain_human_rows() -> None:
    sampler = BatchSampler(
        HUMAN, AUGMENTED, [], 16, 0.25, 0, 0, bundles=BundleSettings(size=4, plain_fraction=0.25)
    )
    batch = sampler[0]
    assert len(batch.queries) == 16
    names = Counter(str(query.id).partition("+")[0] for query in batch.queries)
    # 4 bundles have 4 + 2 + 3 + 3 rows; the other 4 are plain
    assert [names[source] for source in ("h0", "h1", "h2", "anchor0.0")] == [4, 2, 3, 3]
    assert sum(names.values()) == 16


def test_texts_of_anchors_are_trained_on_in_pairs_too() -> None:
    batch = BatchSampler(HUMAN, texts("anchor0.0", 77, 3), [], 8, 0.25, 0, 0)[0]
    assert sum(str(query.id).startswith("anchor") for query in batch.queries) == 2
    assert len(batch.queries) == 8


def test_augmented_queries_may_have_explicit_negatives() -> None:
    rows = texts("h0", 0, 2)
    wrong = negative(rows[0].triplet.query.id, ImageId("i999"))
    right = negative(rows[0].triplet.query.id, rows[0].triplet.target)
    sampler = BatchSampler(
        HUMAN, rows, [wrong, right], 4, 0.5, 1, 0, bundles=BundleSettings(size=3, plain_fraction=0)
    )
    assert sampler.num_known_positives == 1
    assert ImageId("i999") in sampler[0].candidates
