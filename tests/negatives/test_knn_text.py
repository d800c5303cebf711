"""`knn_text` against loops that say the rule one sample, one query and one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.knn_text import Loop
from cirloop.negatives import knn_text_samples
from cirloop.negatives.base import MiningContext
from cirloop.negatives.knn_text_samples import (
    Clusters,
    KnnTextParams,
    RejectReason,
    SamplePool,
    choose,
    diverse_first,
    neighbours,
)
from cirloop.negatives.strategies.knn_text import KnnText, thresholds
from cirloop.negatives.text_reuse import is_generic, max_uses, normal
from cirloop.tools.add_negatives.pipeline import num_clusters_for
from cirloop.types import UserError
from tests.negatives.cases import Case, cases

CODES = {
    RejectReason.BELOW_FLOOR: "low",
    RejectReason.SAME_TEXT: "same",
    RejectReason.GENERIC: "generic",
    RejectReason.TEXT_NEAR: "near",
}


def numbers(draw: st.DrawFn, rows: int, low: int, high: int) -> Any:
    return np.array(draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows)), np.int64)


def vectors(draw: st.DrawFn, rows: int, dimensions: int) -> Any:
    """Eighths of few values: many ties, and products that are exact in float32."""
    return numbers(draw, rows * dimensions, -3, 5).reshape(rows, dimensions).astype(np.float32) / 8


@st.composite
def pools(draw: st.DrawFn) -> tuple[SamplePool, Clusters, KnnTextParams]:
    """One to fifteen samples, images and texts shared or not, one group or many, texts that may
    never be used."""
    num = draw(st.integers(1, 15))
    images = draw(st.integers(1, 15))
    texts = draw(st.integers(1, 10))
    dimensions = draw(st.integers(1, 3))
    image_of = np.arange(num) if draw(st.booleans()) else numbers(draw, num, 0, images - 1)
    visual = vectors(draw, int(image_of.max()) + 1, dimensions)
    text_of = numbers(draw, num, 0, texts - 1)
    group_of = numbers(draw, num, 0, draw(st.sampled_from([0, 3, 40])))
    uses_T = numbers(draw, texts, 0, 3)
    short_T = numbers(draw, texts, 0, 1).astype(bool)
    pool = SamplePool(
        visual, image_of, vectors(draw, texts, dimensions), text_of, group_of, uses_T, short_T
    )
    of_V = numbers(draw, len(visual), 0, draw(st.integers(0, 4)))
    _, of_V = np.unique(of_V, return_inverse=True)
    centroids = vectors(draw, int(of_V.max()) + 1, dimensions)
    rule = KnnTextParams(
        draw(st.sampled_from([1, 2, 3, 5, 30])),
        draw(st.sampled_from([-1.0, -0.09, 0.0, 0.125, 0.3, 1.0])),
        draw(st.sampled_from([-1.0, 0.0, 0.125, 0.3, 2.0])),
        draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        draw(st.integers(0, 3)),
    )
    return pool, Clusters(of_V, centroids), rule


@given(case=pools(), block=st.sampled_from([1, 4, 1024]))
def test_the_same_as_one_sample_after_the_other(case: Any, block: int) -> None:
    pool, found, rule = case
    with pytest.MonkeyPatch.context() as patch:  # several blocks also of few samples
        patch.setattr(knn_text_samples, "BLOCK", block)
        patch.setattr(knn_text_samples, "DRAWN", block)
        near = neighbours(pool, rule)
        chosen, num_exhausted = choose(pool, near, found, rule)
    loop = Loop(pool, found, rule)
    assert chosen == loop.run()
    assert num_exhausted == loop.num_exhausted
    for row, drops in zip(near.codes_NK.tolist(), loop.drops, strict=True):
        assert [CODES.get(code, "") for code in row if code != RejectReason.ABSENT] == drops


@given(case=pools())
def test_what_is_promised_of_every_negative(case: Any) -> None:
    """Said apart from any order of choice: what a negative may never be, whoever chose it."""
    pool, found, rule = case
    chosen, _ = choose(pool, neighbours(pool, rule), found, rule)
    used = np.zeros(len(pool.max_uses_T), np.int64)
    for i, negative in enumerate(chosen):
        if negative is None:
            continue
        j = negative.row
        assert pool.image_of_N[j] != pool.image_of_N[i] and pool.group_of_N[j] != pool.group_of_N[i]
        assert pool.text_of_N[j] != pool.text_of_N[i]
        text = pool.texts_TE[pool.text_of_N[j]] @ pool.texts_TE[pool.text_of_N[i]]
        visual = pool.visual_VD[pool.image_of_N[j]] @ pool.visual_VD[pool.image_of_N[i]]
        assert text < thresholds(rule.cosine_threshold)[negative.level] and negative.text == text
        assert negative.visual == visual
        if negative.kind == "hard":
            assert visual >= np.float32(rule.min_visual_similarity)
        else:
            assert found.of_V[pool.image_of_N[j]] != found.of_V[pool.image_of_N[i]]
        used[pool.text_of_N[j]] += 1
    assert (used <= pool.max_uses_T).all()


def by_hand(texts: list[list[float]], **changes: Any) -> SamplePool:
    """Sample 0 and others that are ever less like it; each a group of its own."""
    num = len(texts)
    angles = np.linspace(0, 0.5, num)
    visual = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    own = dict.fromkeys(("image_of_N", "text_of_N", "group_of_N"), np.arange(num))
    uses = {"max_uses_T": np.full(num, 3), "short_T": np.zeros(num, bool)}
    texts_TE = np.array(texts, np.float32)
    return SamplePool(visual_VD=visual, texts_TE=texts_TE, **{**own, **uses, **changes})


def first_negative(pool: SamplePool, rule: KnnTextParams, found: Clusters | None = None) -> Any:
    one = Clusters(np.zeros(len(pool.visual_VD), np.int64), pool.visual_VD[:1])
    return choose(pool, neighbours(pool, rule), found or one, rule)[0][0]


HARD_ONLY = KnnTextParams(diverse_ratio=0.0)


def test_the_threshold_is_raised_only_as_far_as_needed() -> None:
    assert thresholds(0.3).tolist() == pytest.approx([0.3, 0.39, 0.48])
    texts = [[1, 0], [0.5, 0], [0.45, 0], [0.35, 0], [0.2, 0]]
    for num, row, level in ((5, 4, 0), (4, 3, 1), (3, 2, 2)):
        found = first_negative(by_hand(texts[:num]), HARD_ONLY)
        assert (found.row, found.level) == (row, level)
    assert first_negative(by_hand(texts[:2]), HARD_ONLY) is None


def test_a_short_text_is_taken_only_where_no_longer_one_is_left() -> None:
    texts = [[1, 0], [0, 1], [0.4, 0]]
    short = np.array([False, True, False])
    assert first_negative(by_hand(texts, short_T=short), HARD_ONLY).row == 2
    one_left = by_hand(texts, short_T=short, max_uses_T=np.array([1, 1, 0]))
    assert first_negative(one_left, HARD_ONLY).row == 1
    none_left = by_hand(texts, short_T=short, max_uses_T=np.array([1, 0, 0]))
    assert first_negative(none_left, HARD_ONLY) is None


def test_a_diverse_one_comes_from_the_farthest_cluster_and_is_the_fallback_of_hard() -> None:
    pool = by_hand([[1, 0], [0, 1], [0, 1], [0, 1]])
    found = Clusters(np.array([0, 0, 1, 2]), np.array([[0, 0], [1, 0], [2, 0]], np.float32))
    assert (first_negative(pool, KnnTextParams(diverse_ratio=1.0), found).row) == 3
    assert first_negative(pool, HARD_ONLY, found).row == 1
    far = KnnTextParams(diverse_ratio=0.0, min_visual_similarity=1.5)
    negative = first_negative(pool, far, found)
    assert (negative.row, negative.kind) == (3, "diverse")
    assert first_negative(pool, far) is None  # one cluster has no farthest one


def test_the_share_of_diverse_is_drawn_by_the_seed() -> None:
    first = diverse_first(10_000, KnnTextParams(diverse_ratio=0.3, seed=1))
    assert first.mean() == pytest.approx(0.3, abs=0.02)
    assert (first[:100] == diverse_first(100, KnnTextParams(diverse_ratio=0.3, seed=1))).all()
    assert (first != diverse_first(10_000, KnnTextParams(diverse_ratio=0.3, seed=2))).any()
    assert diverse_first(50, KnnTextParams(diverse_ratio=1.0)).all()
    assert not diverse_first(50, KnnTextParams(diverse_ratio=0.0)).any()


@pytest.mark.parametrize(
    "text", ["a photo", "An image of something", "...", "yes", "it is the one", "IMAGE!", "🙂"]
)
def test_generic_texts(text: str) -> None:
    assert is_generic(text)


@pytest.mark.parametrize("text", ["a photo of a dog", "red", "не знаю", "犬", "room 4"])
def test_texts_that_say_something(text: str) -> None:
    assert not is_generic(text)


def test_a_short_text_may_be_used_as_often_as_its_length_lets_it() -> None:
    texts = ["red", "a red dress", "x" * 19, "x" * 20, "x" * 200, "a photo"]
    uses_T, short_T = max_uses(texts, 20, 3)
    assert uses_T.tolist() == [1, 1, 2, 3, 3, 0]
    assert short_T.tolist() == [True, True, True, False, False, True]
    assert max_uses(["red"], 0, 3)[1].tolist() == [False]
    assert max_uses(["red"], 0, 3)[0].tolist() == [3]
    assert normal("A  Red\n dress ") == normal("a red dress")


def test_clusters_find_what_is_apart_and_are_the_same_twice() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(4, dtype=np.float32)
    truth = random.integers(0, 4, 400)
    points = centres[truth] + 0.02 * random.standard_normal((400, 4)).astype(np.float32)
    found = Clusters.of_images(points, 12, 5)
    again = Clusters.of_images(points, 12, 5)
    assert (found.of_V == again.of_V).all() and (found.centroids_CD == again.centroids_CD).all()
    assert all(len(set(truth[found.of_V == c])) == 1 for c in range(len(found.centroids_CD)))
    distances = ((points[:, None] - found.centroids_CD[None]) ** 2).sum(-1)
    assert (distances.argmin(1) == found.of_V).all()
    far = ((found.centroids_CD[:, None] - found.centroids_CD[None]) ** 2).sum(-1)
    assert far[np.arange(len(far)), found.farthest()] == pytest.approx(far.max(1), rel=1e-4)


@pytest.mark.parametrize("points", [np.ones((1, 3), np.float32), np.ones((9, 3), np.float32)])
def test_clusters_of_one_point(points: Any) -> None:
    found = Clusters.of_images(points, 4, 0)
    assert len(found.centroids_CD) == 1 and found.farthest().tolist() == [-1]
    assert not found.of_V.any()
    assert num_clusters_for(1) == 2 and num_clusters_for(10_000) == 71
    assert num_clusters_for(10**9) == 256


def naive_sets(case: Case, strategy: KnnText, visual: Any, text: Any) -> list[list[int]]:
    out = []
    for i, target in enumerate(case.targets):
        floor = np.float32(strategy.min_visual_similarity)
        alike = [g for g in case.allowed(i) if visual[target] @ visual[g] >= floor]
        alike = sorted(alike, key=lambda g: (-(visual[target] @ visual[g]), g))[: strategy.k_nn]
        kept: list[int] = []
        for threshold in thresholds(strategy.cosine_threshold):
            if len(kept) < strategy.negatives_per_query:
                kept = [g for g in alike if text[i, g] < threshold]
        out.append(kept)
    return out


@given(
    case=cases(),
    seed=st.integers(0, 10**6),
    k=st.integers(1, 4),
    k_nn=st.sampled_from([1, 3, 30]),
    floor=st.sampled_from([-1.0, 0.0, 0.25]),
    half=st.booleans(),
)
def test_the_strategy_against_a_loop(
    case: Case, seed: int, k: int, k_nn: int, floor: float, half: bool
) -> None:
    random = np.random.default_rng(seed)
    size = case.scores_QG.shape[1]
    visual = (random.integers(-3, 5, (size, 2)) / 8).astype(np.float16 if half else np.float32)
    text = (random.integers(-2, 8, case.scores_QG.shape) / 10).astype(np.float32)
    strategy = KnnText(negatives_per_query=k, k_nn=k_nn, min_visual_similarity=floor)
    context = MiningContext(seed=0, vectors_GD=visual, text_scores=lambda numbers: text[numbers])
    expected = naive_sets(case, strategy, visual.astype(np.float32), text)
    assert [rows.tolist() for rows in strategy.candidate_sets(case.whole(), context)] == expected
    chosen = [rows.tolist() for rows in strategy.choose(case.whole(), context)]
    assert chosen == [rows[:k] for rows in expected]


def test_the_strategy_says_what_it_needs() -> None:
    case = Case(np.zeros((1, 3), np.float32), [1], [0], [{1}])
    with pytest.raises(UserError, match=r"'knn_text' needs vectors_GD .* and text_scores"):
        KnnText().choose(case.whole(), MiningContext(seed=0))
