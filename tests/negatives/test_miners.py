"""What every mining strategy owes the loop, and what each promises by itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cirloop.negatives import MinerConfig, Nothing, Random, TopK
from cirloop.negatives.report import summary
from cirloop.retrieval.search import rank
from cirloop.types import Gallery, ImageId, MinedNegative, Query, QueryId, Rankings

MINERS: tuple[type[Any], ...] = get_args(get_args(MinerConfig)[0])


@dataclass(frozen=True)
class Case:
    """Training queries with a model's rankings of all images."""

    queries: list[Query]
    targets: list[ImageId]
    positives: dict[QueryId, frozenset[ImageId]]
    gallery: Gallery
    scores_QG: Any

    def rankings(self, depth: int) -> Rankings:
        """As the mining stage asks for them: as many more than `depth` as a query has known positives."""
        depth = depth and depth + max(map(len, self.positives.values()))
        identity = np.eye(len(self.gallery.ids), dtype=np.float32)
        return rank(self.queries, self.targets, self.gallery, self.scores_QG, identity, depth)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size, count = draw(st.integers(2, 30)), draw(st.integers(1, 8))
    gallery = Gallery("g", tuple(ImageId(f"i{row:03d}") for row in range(size)))
    queries, targets, positives = [], [], {}
    for i in range(count):
        reference = draw(st.sampled_from(gallery.ids))
        others = [image for image in gallery.ids if image != reference]
        right = draw(st.lists(st.sampled_from(others), min_size=1, max_size=4, unique=True))
        queries.append(Query(QueryId(f"q{i}"), reference, "text"))
        targets.append(right[0])
        positives[queries[-1].id] = frozenset(right)
    scores = draw(st.lists(st.integers(0, 6), min_size=size * count, max_size=size * count))
    scores_QG = np.array(scores, np.float32).reshape(count, size) / 8
    return Case(queries, targets, positives, gallery, scores_QG)


def miner_of(kind: type[Any], k: int) -> Any:
    return kind(k=k) if "k" in kind.model_fields else kind()


def test_union_is_seen() -> None:
    assert {TopK, Random, Nothing} <= set(MINERS)
    assert len({kind.model_fields["type"].default for kind in MINERS}) == len(MINERS)


@pytest.mark.parametrize("kind", MINERS, ids=lambda kind: kind.__name__)
@given(case=cases(), k=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_miner_keeps_its_contract(kind: type[Any], case: Case, k: int, seed: int) -> None:
    miner = miner_of(kind, k)
    rankings = case.rankings(miner.depth)
    mined = miner.mine(rankings, case.positives, seed)
    number = {query.id: i for i, query in enumerate(case.queries)}
    for negative in mined:
        i = number[negative.query]
        assert negative.image != case.queries[i].reference, "the reference was mined"
        assert negative.image not in case.positives[negative.query], "a known positive was mined"
        assert rankings.target_rank_Q[i] > 1, "mined for a query the model gets right"
        assert negative.strategy == miner.type
        assert case.gallery.ids[rankings.images_QK[i, negative.rank - 1]] == negative.image
        assert negative.score == pytest.approx(rankings.scores_QK[i, negative.rank - 1], abs=1e-6)
        assert negative.target_rank == rankings.target_rank_Q[i]
        assert negative.target_score == pytest.approx(rankings.target_score_Q[i], abs=1e-6)
    pairs = [(negative.query, negative.image) for negative in mined]
    assert len(set(pairs)) == len(pairs), "an image was mined twice for one query"
    assert max(Counter(n.query for n in mined).values(), default=0) <= k
    assert mined == miner.mine(rankings, case.positives, seed), "two runs of one seed differ"
    places = [number[negative.query] for negative in mined]
    assert places == sorted(places), "rows are not in the queries' order"


@given(case=cases(), k=st.integers(1, 5))
def test_top_k_takes_exactly_the_best_wrong_images(case: Case, k: int) -> None:
    expected = []
    for i, query in enumerate(case.queries):
        order = sorted(
            (image for image in case.gallery.ids if image != query.reference),
            key=lambda image, i=i: (-case.scores_QG[i, case.gallery.ids.index(image)], image),
        )
        if order[0] != case.targets[i]:
            wrong = [image for image in order if image not in case.positives[query.id]]
            expected += [(query.id, image, order.index(image) + 1) for image in wrong[:k]]
    mined = TopK(k=k).mine(case.rankings(k), case.positives, 0)
    assert [(n.query, n.image, n.rank) for n in mined] == expected


@given(case=cases(), k=st.integers(1, 5), seed=st.integers(0, 99))
def test_random_takes_as_many_as_there_are_up_to_k(case: Case, k: int, seed: int) -> None:
    rankings = case.rankings(0)
    mined = Counter(n.query for n in Random(k=k).mine(rankings, case.positives, seed))
    for i, query in enumerate(case.queries):
        wrong = len(case.gallery.ids) - 1 - len(case.positives[query.id])
        assert mined[query.id] == (min(k, wrong) if rankings.target_rank_Q[i] > 1 else 0)


def one_query(size: int) -> Case:
    """One query about image 0 whose target, the last image, is ranked last."""
    gallery = Gallery("g", tuple(ImageId(f"i{row:03d}") for row in range(size)))
    query = Query(QueryId("q"), gallery.ids[0], "text")
    scores = np.linspace(1, 0, size, dtype=np.float32)[None]
    return Case([query], [gallery.ids[-1]], {query.id: frozenset([gallery.ids[-1]])}, gallery, scores)


def test_random_draws_evenly_and_by_its_seed() -> None:
    case = one_query(12)
    rankings = case.rankings(0)
    drawn = [frozenset(n.image for n in Random(k=3).mine(rankings, case.positives, s)) for s in range(400)]
    assert len(set(drawn)) > 50
    counts = Counter(image for images in drawn for image in images)
    assert set(counts) == set(case.gallery.ids[1:-1])
    assert min(counts.values()) > 80 and max(counts.values()) < 160  # 120 expected of each, deviation 9


def test_nothing_mines_nothing() -> None:
    case = one_query(5)
    assert Nothing().mine(case.rankings(1), case.positives, 0) == []


@given(case=cases(), k=st.integers(1, 5))
def test_counts_of_the_report_add_up(case: Case, k: int) -> None:
    rankings = case.rankings(k)
    mined = TopK(k=k).mine(rankings, case.positives, 0)
    report = summary(rankings, mined)
    assert report["queries"] == len(case.queries) == len(rankings.queries)
    parts = [report[name] for name in ("target_first", "queries_mined", "without_candidates")]
    assert sum(parts) == report["queries"] and min(parts) >= 0
    assert report["target_first"] == sum(r == 1 for r in rankings.target_rank_Q)
    assert report["queries_mined"] == len({n.query for n in mined})
    assert report["negatives"] == len(mined)
    assert (report["similarity"]["negative"] is None) == (mined == [])


def test_report_gives_the_quartiles_of_both_sides() -> None:
    case = one_query(6)  # scores 1, .8, .6, .4, .2, 0
    rankings = case.rankings(3)
    report = summary(rankings, TopK(k=3).mine(rankings, case.positives, 0))
    assert report["similarity"] == {
        "positive": {"mean": 0.0, "25%": 0.0, "median": 0.0, "75%": 0.0},
        "negative": {"mean": 0.6, "25%": 0.5, "median": 0.6, "75%": 0.7},
    }


def test_report_counts_a_query_without_candidates() -> None:
    """A gallery of reference, target and another positive leaves nothing to mine."""
    gallery = Gallery("g", tuple(map(ImageId, "abc")))
    query = Query(QueryId("q"), ImageId("a"), "text")
    case = Case([query], [ImageId("c")], {query.id: frozenset(map(ImageId, "bc"))}, gallery, np.float32([[0, 1, 0]]))
    rankings = case.rankings(1)
    mined: list[MinedNegative] = TopK(k=1).mine(rankings, case.positives, 0)
    report = summary(rankings, mined)
    assert mined == [] and report["without_candidates"] == 1 and report["target_first"] == 0
