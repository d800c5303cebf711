"""Metrics of the benchmarks against oracles written from the papers' formulas, and against
ir-measures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import AP, Success

from cirloop.data import fashioniq
from cirloop.data.shapes.load import PROTOCOL as SHAPES
from cirloop.evaluation.protocols import (
    average_precision_at,
    mean,
    metrics,
    per_query,
    ranks_in,
    recall_at,
    remove_reference,
    subset_rank,
)
from cirloop.types import Gallery, ImageId, LabeledQueries, Query, QueryId, Relevance

IMAGES = [ImageId(f"i{n:02d}") for n in range(20)]
orders = st.permutations(IMAGES)
groups = st.sets(st.sampled_from(IMAGES), min_size=1, max_size=8)


def paper_ap(ranking: Sequence[str], right: set[str], k: int) -> float:
    """CIRCO, equation 1: AP@K = 1 / min(K, |G|) * sum over k of P@k * rel(k)."""
    total = 0.0
    for place in range(1, k + 1):
        if place <= len(ranking) and ranking[place - 1] in right:
            total += len([image for image in ranking[:place] if image in right]) / place
    return total / min(k, len(right))


@given(order=orders, right=groups, k=st.integers(1, 25), listed=st.integers(0, 20))
def test_average_precision_is_the_papers(
    order: list[ImageId], right: set[ImageId], k: int, listed: int
) -> None:
    ranking = order[:listed]
    ours = average_precision_at(ranks_in(ranking, right), frozenset(right), k)
    assert ours == pytest.approx(paper_ap(ranking, set(right), k), abs=1e-12)
    assert 0 <= ours <= 1


@given(order=orders, right=groups)
def test_right_images_first_is_an_average_precision_of_one(
    order: list[ImageId], right: set[ImageId]
) -> None:
    ranking = sorted(order, key=lambda image: image not in right)
    for k in (1, 3, 10):
        assert average_precision_at(ranks_in(ranking, right), frozenset(right), k) == pytest.approx(
            1
        )


@given(orders=st.lists(st.tuples(orders, groups), min_size=1, max_size=4), k=st.integers(1, 20))
def test_agrees_with_ir_measures(orders: list[tuple[list[ImageId], set[ImageId]]], k: int) -> None:
    """AP over the whole list, where its division by |G| is the paper's; recall of one target is
    Success."""
    run = {
        f"q{n}": {image: 100.0 - place for place, image in enumerate(order)}
        for n, (order, _) in enumerate(orders)
    }
    all_right = {f"q{n}": dict.fromkeys(right, 1) for n, (_, right) in enumerate(orders)}
    one_right = {f"q{n}": {min(right): 1} for n, (_, right) in enumerate(orders)}
    ap = ir_measures.calc_aggregate([AP @ 20], all_right, run)[AP @ 20]
    success = ir_measures.calc_aggregate([Success @ k], one_right, run)[Success @ k]
    places = [ranks_in(order, set(IMAGES)) for order, _ in orders]
    ours = [
        average_precision_at(p, frozenset(right), 20)
        for p, (_, right) in zip(places, orders, strict=True)
    ]
    recall = [recall_at(p[min(right)], k) for p, (_, right) in zip(places, orders, strict=True)]
    assert sum(ours) / len(ours) == pytest.approx(ap)
    assert sum(recall) / len(recall) == pytest.approx(success)


@given(order=orders, reference=st.sampled_from(IMAGES), listed=st.integers(0, 20))
def test_removing_the_reference_is_ranking_without_it(
    order: list[ImageId], reference: ImageId, listed: int
) -> None:
    ranking = order[:listed]
    naive = ranks_in([image for image in ranking if image != reference], set(IMAGES))
    assert remove_reference(ranks_in(ranking, set(IMAGES)), reference) == naive


@given(
    order=orders,
    members=st.lists(st.sampled_from(IMAGES), min_size=5, max_size=5, unique=True),
    data=st.data(),
)
def test_subset_place_is_the_place_among_the_members(
    order: list[ImageId], members: list[ImageId], data: st.DataObject
) -> None:
    target = data.draw(st.sampled_from(members))
    among = [image for image in order if image in members]
    assert subset_rank(ranks_in(order, set(members)), target, members) == among.index(target) + 1


def test_what_a_ranking_does_not_list_is_not_retrieved() -> None:
    members = IMAGES[:5]
    assert recall_at(None, 1000) == 0
    assert subset_rank({IMAGES[1]: 1}, IMAGES[0], members) is None
    assert subset_rank({IMAGES[0]: 40}, IMAGES[0], members) == 1


def part(category: str, num: int, seed: int) -> tuple[LabeledQueries, dict[QueryId, list[ImageId]]]:
    """Make a part of `num` FashionIQ queries and random rankings of its 20 images, the reference
    among them."""
    draw = random.Random(seed)
    pairs = [draw.sample(IMAGES, 2) for _ in range(num)]
    queries = tuple(
        Query(QueryId(f"{category}/{n}"), pair[0], "text") for n, pair in enumerate(pairs)
    )
    relevance = Relevance({query.id: pair[1] for query, pair in zip(queries, pairs, strict=True)})
    rankings = {query.id: draw.sample(IMAGES, len(IMAGES)) for query in queries}
    gallery = Gallery(category, tuple(IMAGES))
    return (
        LabeledQueries("fashioniq_val", queries, relevance, gallery, fashioniq.PROTOCOL, category),
        rankings,
    )


def test_any_correct_counts_the_first_right_image_after_the_reference() -> None:
    """Ranked: the reference, a wrong image, a right one that is not annotated, the target."""
    names = [ImageId(name) for name in ("reference", "wrong", "right", "target")]
    query = Query(QueryId("q"), names[0], "text")
    relevance = Relevance({query.id: names[3]}, {query.id: frozenset(names[2:])})
    part = LabeledQueries(
        "shapes_val", (query,), relevance, Gallery("g", tuple(sorted(names))), SHAPES
    )
    found = metrics([part], {query.id: {name: place for place, name in enumerate(names, 1)}})
    assert found["any correct recall@1"].value == 0 and found["any correct recall@5"].value == 1
    found = metrics([part], {query.id: {names[0]: 2, names[2]: 1, names[1]: 3, names[3]: 4}})
    assert found["any correct recall@1"].value == 1 and found["recall@1"].value == 0


def test_fashioniq_averages_categories_and_not_queries() -> None:
    (dress, a) = part("dress", 3, 0)
    (shirt, b) = part("shirt", 30, 1)
    rankings = a | b
    places = {
        query.id: ranks_in(rankings[query.id], p.relevant_images(query))
        for p in (dress, shirt)
        for query in p.queries
    }

    def naive(p: LabeledQueries, k: int, keep: bool) -> float:
        assert p.relevance is not None
        hits = 0
        for query in p.queries:
            ranking = [i for i in rankings[query.id] if keep or i != query.reference]
            hits += p.relevance.targets[query.id] in ranking[:k]
        return hits / len(p.queries)

    found = metrics([dress, shirt], places)
    for keep, mark in ((True, ""), (False, ", reference removed")):
        each = [naive(p, 10, keep) for p in (dress, shirt)]
        assert found[f"recall@10{mark}"].value == pytest.approx(sum(each) / 2)
        assert found[f"recall@10{mark}, dress"].value == pytest.approx(each[0])
    ten = found["recall@10"]
    fifty = found["recall@50"]
    assert found["mean of recall@10 and recall@50"].value == pytest.approx(
        (ten.value + fifty.value) / 2
    )
    both = [
        mean(per_query(p, places)["recall@10"], [q.reference for q in p.queries])
        for p in (dress, shirt)
    ]
    assert ten.se == pytest.approx(sum(metric.se**2 for metric in both) ** 0.5 / 2)
    assert fifty.value == 1 and fifty.se == 0  # twenty images
