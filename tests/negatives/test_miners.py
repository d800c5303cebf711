"""What every mining strategy owes the loop, against naive oracles: ranks, scores, exclusions,
seeds, blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.negatives import (
    STRATEGIES,
    Band,
    Margin,
    MiningSettings,
    NoMining,
    Random,
    TopK,
    miner,
)
from cirloop.negatives.base import MiningContext, Strategy
from cirloop.negatives.miner import MiningInputs, MiningResult
from cirloop.types import UserError
from tests.negatives.cases import Case, cases
from tests.tiers import one_in

MINERS = tuple(STRATEGIES.values())


def vectors(case: Case) -> MiningInputs:
    """Make queries whose products with the gallery, unit vectors, are the case's scores."""
    identity = np.eye(case.scores_QG.shape[1], dtype=np.float32)
    rows = (np.array(case.targets), np.array(case.references))
    return MiningInputs(case.scores_QG, identity, *rows, [frozenset(p) for p in case.positives])


def context(case: Case, seed: int = 0) -> MiningContext:
    """Something of everything a strategy may need."""
    size = case.scores_QG.shape[1]
    queries = len(case.targets)
    colours, sizes = ("red", "blue", "green"), ("big", "small")
    text_QG = np.random.default_rng(5).standard_normal((queries, size)).astype(np.float32)
    return MiningContext(
        seed,
        groups=[frozenset(range(0, size, 2))] * queries,
        categories=["ab"[row % 2] for row in range(size)],
        attributes=[{"colour": colours[g % 3], "size": sizes[g % 2]} for g in range(size)],
        requested_attributes=[{"colour": "red"}] * queries,
        vectors_GD=np.random.default_rng(7).standard_normal((size, 4)).astype(np.float32),
        text_scores=lambda numbers: text_QG[numbers],
    )


def mine(strategy: Strategy, case: Case, seed: int = 0, **shared: Any) -> dict[int, MiningResult]:
    settings = MiningSettings(strategy=strategy, **shared)  # type: ignore[arg-type]
    results = miner.mine(settings, vectors(case), context(case, seed))
    return {result.query_index: result for result in results}


def of(kind: type[Strategy], **settings: Any) -> Strategy:
    if kind.__name__ == "Mixture":
        parts = [{"weight": 2, "strategy": {"type": "random"}}, {"strategy": {"type": "top_k"}}]
        return kind(parts=parts, **settings)
    if kind.__name__ == "Curriculum":
        return kind(stages=[{"type": "random"}, {"type": "top_k"}], **settings)
    return kind(**settings)


def test_union_is_seen() -> None:
    assert {TopK, Random, NoMining, Band, Margin} <= set(MINERS)
    assert len({kind.model_fields["type"].default for kind in MINERS}) == len(MINERS)


@pytest.mark.parametrize("kind", MINERS, ids=lambda kind: kind.__name__)
@given(
    case=cases(),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
    reference=st.sampled_from(["out", "in"]),
    only_failed=st.booleans(),
)
def test_strategy_keeps_its_contract(
    kind: type[Strategy], case: Case, k: int, seed: int, reference: Any, only_failed: bool
) -> None:
    strategy = of(kind, negatives_per_query=k)
    shared = {"rank_reference": reference == "in", "only_failed_queries": only_failed}
    found = mine(strategy, case, seed, **shared)
    for i, row in found.items():
        order, mined = case.order(i, reference), row.gallery_indices.tolist()
        assert {*mined} <= {*case.allowed(i, reference)}, "a barred image was mined"
        assert len({*mined}) == len(mined) <= k, "an image was mined twice, or too many"
        assert row.ranks.tolist() == [order.index(column) + 1 for column in row.gallery_indices]
        assert row.scores.tolist() == [case.scores_QG[i, column] for column in row.gallery_indices]
        assert row.target_rank == order.index(case.targets[i]) + 1
        assert row.target_score == case.scores_QG[i, case.targets[i]]
        assert not (only_failed and row.target_rank == 1 and len(row.gallery_indices))
        assert row.num_fallback == 0
    assert list(found) == list(range(len(case.targets))), "queries are missing or out of order"
    for i, row in mine(strategy, case, seed, **shared).items():
        assert row.gallery_indices.tolist() == found[i].gallery_indices.tolist()


@pytest.mark.parametrize(
    ("kind", "fallback"),
    one_in(
        3,
        [kind for kind in MINERS if kind is not NoMining],
        ["top_k", "random"],
        name=lambda value: getattr(value, "__name__", value),
    ),
)
@given(case=cases(), k=st.integers(1, 5))
def test_a_fallback_fills_up_what_there_is(
    kind: type[Strategy], fallback: Any, case: Case, k: int
) -> None:
    strategy = of(kind, negatives_per_query=k)
    plain = mine(strategy, case)
    filled = mine(strategy, case, fallback=fallback)
    for i, row in filled.items():
        allowed = case.allowed(i)
        if kind.only_failed_queries and row.target_rank == 1:
            assert not len(row.gallery_indices)
            continue
        assert len(row.gallery_indices) == min(k, len(allowed))
        assert len(set(row.gallery_indices.tolist())) == len(row.gallery_indices)
        kept = len(row.gallery_indices) - row.num_fallback
        assert set(row.gallery_indices[:kept].tolist()) == set(plain[i].gallery_indices.tolist())
        if fallback == "top_k":
            left = set(allowed) - set(row.gallery_indices[:kept].tolist())
            rest = [column for column in case.order(i) if column in left]
            assert row.gallery_indices[kept:].tolist() == rest[: row.num_fallback]


@given(case=cases(), k=st.integers(1, 5), below=st.one_of(st.integers(0, 6), st.just("all")))
def test_top_k_takes_exactly_the_best_wrong_images(case: Case, k: int, below: Any) -> None:
    strategy = TopK(negatives_per_query=k, extra_ranks=below)
    for i, row in mine(strategy, case, only_failed_queries=False).items():
        order = case.order(i)
        end = len(order) if below == "all" else order.index(case.targets[i]) + 1 + below
        assert row.gallery_indices.tolist() == [c for c in order[:end] if c in case.allowed(i)][:k]


@given(case=cases(), k=st.integers(1, 5), seed=st.integers(0, 99))
def test_random_takes_as_many_as_there_are_up_to_k(case: Case, k: int, seed: int) -> None:
    strategy = Random(negatives_per_query=k)
    for i, row in mine(strategy, case, seed, only_failed_queries=False).items():
        assert len(row.gallery_indices) == min(k, len(case.allowed(i)))
        assert row.ranks.tolist() == sorted(row.ranks.tolist())


def test_random_draws_evenly_and_by_its_seed() -> None:
    case = Case(np.linspace(1, 0, 12, dtype=np.float32)[None], [11], [0], [{11}])
    strategy = Random(negatives_per_query=3)
    results = [mine(strategy, case, seed)[0] for seed in range(400)]
    drawn = [frozenset(result.gallery_indices.tolist()) for result in results]
    assert len(set(drawn)) > 50
    counts = Counter(image for images in drawn for image in images)
    assert set(counts) == set(range(1, 11))
    # 120 expected of each, deviation 9
    assert min(counts.values()) > 80 and max(counts.values()) < 160


def test_nothing_mines_nothing() -> None:
    case = Case(np.linspace(1, 0, 5, dtype=np.float32)[None], [4], [0], [{4}])
    assert not len(mine(NoMining(), case)[0].gallery_indices)


def perhaps(*values: float) -> st.SearchStrategy[float | None]:
    return st.sampled_from([None, *values])


@given(
    case=cases(),
    k=st.integers(1, 4),
    start=st.integers(0, 3),
    width=st.one_of(st.none(), st.integers(0, 6)),
    margins=st.tuples(perhaps(0.0, 0.125, 0.25), perhaps(0.0, 0.5), perhaps(-0.25, 0.1)),
    bounds=st.tuples(perhaps(0.25), perhaps(0.75)),
)
def test_margin_is_its_limits(
    case: Case, k: int, start: int, width: int | None, margins: Any, bounds: Any
) -> None:
    end = None if width is None else start + k + width
    (absolute, relative, delta), (low, high) = margins, bounds
    strategy = Margin(
        negatives_per_query=k,
        absolute_margin=absolute,
        relative_margin=relative,
        mean_delta=delta,
        min_score=low,
        max_score=high,
        range_min=start,
        range_max=end,
    )
    mean = np.mean([case.scores_QG[i, t] for i, t in enumerate(case.targets)])
    for i, row in mine(strategy, case).items():
        positive = case.scores_QG[i, case.targets[i]]
        expected = []
        for place, column in enumerate(c for c in case.order(i) if c in case.allowed(i)):
            s = case.scores_QG[i, column]
            fits = start <= place < (strategy.depth if end is None else end)
            fits &= absolute is None or s <= positive - absolute
            fits &= relative is None or s <= positive - abs(positive) * relative
            fits &= delta is None or s <= np.float32(mean) + np.float32(delta)
            fits &= (low is None or s >= low) and (high is None or s <= high)
            expected += [column] if fits else []
        assert row.gallery_indices.tolist() == expected[:k]


def test_a_window_too_small_is_refused() -> None:
    said = "range_max 4 leaves fewer than negatives_per_query 3 after range_min 2"
    with pytest.raises(ValueError, match=said):
        Margin(negatives_per_query=3, range_min=2, range_max=4)


@given(case=cases(), data=st.data())
def test_what_is_mined_does_not_depend_on_blocks(case: Case, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(MINERS))
    strategy = of(kind, negatives_per_query=2)
    block = case.whole() if strategy.needs_full_gallery else case.window(strategy.depth)
    known = replace(
        context(case),
        targets_Q=np.array(case.targets),
        references_Q=np.array(case.references),
        mean_target_score=0.4,
    )
    cut = data.draw(st.integers(0, len(case.targets)))
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part = block.select(rows)
        parts += strategy.choose(part, known) if len(part.query_index_B) else []
    assert [p.tolist() for p in parts] == [p.tolist() for p in strategy.choose(block, known)]


def test_vectors_without_references_or_further_positives() -> None:
    scores = np.array([[0.9, 0.5, 0.7, 0.1]], np.float32)
    plain = MiningInputs(scores, np.eye(4, dtype=np.float32), np.array([1]))
    settings = MiningSettings(strategy=TopK(negatives_per_query=3, extra_ranks="all"))
    [found] = miner.mine(settings, plain, MiningContext(0))
    assert found.target_rank == 3
    assert (found.gallery_indices.tolist(), found.ranks.tolist()) == ([0, 2, 3], [1, 2, 4])
    every = MiningSettings(strategy=Random(), only_failed_queries=False)
    [one] = miner.mine(every, replace(plain, references_Q=np.array([-1])), MiningContext(0))
    assert one.gallery_indices.tolist() == [0, 2, 3]


def test_one_image_gives_nothing() -> None:
    plain = MiningInputs(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), np.array([0]))
    for kind in (TopK, Random, Band, Margin):
        settings = MiningSettings(strategy=kind(), only_failed_queries=False)  # type: ignore[arg-type]
        [found] = miner.mine(settings, plain, MiningContext(0))
        assert len(found.gallery_indices) == 0


def test_what_a_strategy_needs_and_has_not_is_said() -> None:
    said = r"the negative strategy 'x' needs categories \(a file\), but this dataset has none"
    with pytest.raises(UserError, match=said):
        MiningContext(0).require("x", categories="a file")
