"""Best images and ranks against sorting everything: exact whatever the rounding of the fast
product, ties by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cirloop.backbones.similarity import mean_pool, similarity
from cirloop.negatives import Band, MiningSettings, TopK
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.retrieval import gallery_part as module
from cirloop.retrieval.ann import ann_topk
from cirloop.retrieval.dense import all_scores, best_positions, ranks_of
from cirloop.retrieval.images import ranks_of_images, scores_of_images, topk_images
from cirloop.retrieval.topk import ranks, score_blocks, scores_of, topk
from cirloop.types import Gallery, ImageId, UserError

RANDOM = np.random.default_rng(0)
QUERIES = RANDOM.integers(-2, 3, (40, 6)).astype(np.float32)  # exact scores, many ties
SEVERAL = RANDOM.integers(-2, 3, (90, 4, 6)).astype(np.float32)
SCORES = np.array(
    [[max(float(v @ q) for v in image) for image in SEVERAL] for q in QUERIES], np.float32
)


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def gallery_of(kind: str, size: int = 3000, dimensions: int = 48) -> Any:
    random = np.random.default_rng(1)
    if kind == "random":
        return unit(random.standard_normal((size, dimensions)))
    if kind == "nearly alike":  # differences far below what bfloat16 holds
        return unit(np.ones(dimensions) + 1e-3 * random.standard_normal((size, dimensions)))
    if kind == "duplicates":
        return unit(random.standard_normal((40, dimensions)))[random.integers(0, 40, size)]
    if kind == "small integers":  # exact scores, many ties
        return random.integers(-1, 2, (size, dimensions)).astype(np.float32)
    assert kind == "all equal"
    return np.ones((size, dimensions), np.float32)


def queries_for(kind: str, num: int) -> Any:
    """Those with exact scores for a gallery that has them."""
    return gallery_of(
        "small integers" if kind in ("small integers", "all equal") else "random", num
    )


KINDS = ["random", "nearly alike", "duplicates", "small integers", "all equal"]


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "_fast_dtype", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 700])
def test_the_best_rows_are_those_of_a_full_sort(
    kind: str, size: int | None, dtype: Any, monkeypatch: Any
) -> None:
    gallery = gallery_of(kind)
    queries = queries_for(kind, 50)
    if size is not None:
        monkeypatch.setattr(module, "part_size", lambda _: size)
    for k in (1, 7, 100, len(gallery) + 5):
        rows, scores = topk(queries, gallery, k)
        assert rows.shape == (50, min(k, len(gallery)))
        exact = -np.sort(-(queries.astype(np.float64) @ gallery.T.astype(np.float64)), axis=1)
        assert np.allclose(scores, exact[:, :k], atol=2e-6)
        for i in range(50):
            # in the order of their own scores, ties by row, and none left out that ties
            ranked = list(zip(-scores[i], rows[i], strict=True))
            assert sorted(ranked) == ranked
            assert len(set(rows[i].tolist())) == len(rows[i])
        if kind in ("small integers", "all equal"):
            order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :k]
            assert (rows == order).all()
        if kind == "duplicates":
            # equal vectors have equal scores, so the first rows of the best vector come first
            same = np.flatnonzero((gallery == gallery[rows[0, 0]]).all(axis=1))
            assert rows[0, : min(k, len(same))].tolist() == same[:k].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_a_full_sort(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "part_size", lambda _: 800)
    gallery = gallery_of(kind)
    random = np.random.default_rng(2)
    queries = queries_for(kind, 60)
    wanted = random.integers(0, len(gallery), (60, 2))
    found, scores = ranks(queries, gallery, wanted)
    every, all_found = topk(queries, gallery, len(gallery))
    for i in range(60):
        for w in range(2):
            place = every[i].tolist().index(wanted[i, w])
            assert found[i, w] == place + 1 and scores[i, w] == all_found[i, place]


@st.composite
def tied(draw: st.DrawFn) -> tuple[Any, Any, list[list[int]], Any]:
    """Make queries, a gallery of one or several vectors an image, rows left out of each query, and
    two wanted rows."""
    count = draw(st.integers(1, 5))
    size = draw(st.integers(1, 30))
    several = draw(st.integers(1, 3))
    numbers = st.integers(-1, 1)
    pair = st.lists(numbers, min_size=2, max_size=2)
    queries = draw(st.lists(pair, min_size=count, max_size=count))
    flat = draw(st.lists(numbers, min_size=2 * size * several, max_size=2 * size * several))
    gallery = np.array(flat, np.float32).reshape((size, several, 2) if several > 1 else (size, 2))
    row = st.integers(-1, size - 1)
    excluded = [draw(st.lists(row, max_size=size)) for _ in range(count)]
    wanted = draw(st.lists(st.integers(0, size - 1), min_size=2 * count, max_size=2 * count))
    return np.array(queries, np.float32), gallery, excluded, np.array(wanted).reshape(count, 2)


@given(given=tied(), k=st.integers(1, 35), size=st.sampled_from([3, 1000]))
def test_both_are_sorting_by_score_then_row(given: Any, k: int, size: int) -> None:
    """Against plain Python: several vectors an image, parts, ties at every cut, and rows that are
    not ranked."""
    queries, gallery, excluded, wanted = given
    left_out = [np.array(rows, np.int64) for rows in excluded]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "part_size", lambda _: size)
        rows, scores = topk(queries, gallery, k, excluded=left_out)
        found, _ = ranks(queries, gallery, wanted, excluded=left_out)
    for i, query in enumerate(queries):
        score = [max(float(query @ v) for v in image.reshape(-1, 2)) for image in gallery]
        ranked = [g for g in range(len(gallery)) if g not in excluded[i]]
        order = sorted(ranked, key=lambda g: (-score[g], g))
        padding = [-1] * (min(k, len(gallery)) - len(order))
        assert rows[i].tolist() == order[:k] + padding
        assert scores[i].tolist() == [score[g] for g in order[:k]] + [-np.inf] * len(padding)
        for w, place in zip(wanted[i].tolist(), found[i].tolist(), strict=True):
            before = [g for g in order if g != w and (-score[g], g) < (-score[w], w)]
            assert place == len(before) + 1


def test_memory_mapped_halves_give_what_their_float32_gives(tmp_path: Path) -> None:
    queries = gallery_of("random", 30).astype(np.float16)
    gallery = gallery_of("random", 500).astype(np.float16)
    np.save(tmp_path / "g.npy", gallery)
    rows, scores = topk(queries, np.load(tmp_path / "g.npy", mmap_mode="r"), 9)
    again, same = topk(queries.astype(np.float32), gallery.astype(np.float32), 9)
    assert (rows == again).all() and (scores == same).all()


def test_blocks_hold_every_query_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 4000)
    queries = gallery_of("random", 37)
    gallery = gallery_of("random", 500)
    seen = list(score_blocks(queries, gallery))
    assert len(seen) > 1
    assert np.concatenate([np.arange(37)[block] for block, _ in seen]).tolist() == list(range(37))
    assert np.allclose(np.concatenate([s for _, s in seen]), queries @ gallery.T, atol=1e-6)


def test_scores_of_given_rows_are_those_of_the_best(monkeypatch: Any) -> None:
    """In any order, some twice, and whatever the blocks."""
    queries = gallery_of("random", 50)
    gallery = gallery_of("random", 300)
    rows, scores = topk(queries, gallery, 20)
    shuffled = np.concatenate([rows[:, ::-1], rows[:, :3]], 1)
    for numbers in (1 << 25, 5000):
        monkeypatch.setattr(module, "BLOCK_NUMBERS", numbers)
        found = scores_of(queries, gallery, shuffled)
        assert (found == np.concatenate([scores[:, ::-1], scores[:, :3]], 1)).all()


# Scores in memory


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.integers(1, 70))
def test_the_order_of_scores_in_memory(numbers: list[int], k: int) -> None:
    scores = np.array(numbers, np.float32)
    order = sorted(range(len(numbers)), key=lambda g: (-numbers[g], g))
    assert best_positions(scores).tolist() == order
    assert best_positions(scores, k).tolist() == order[:k]
    wanted = np.arange(len(numbers))[None]
    places = [order.index(g) + 1 for g in range(len(numbers))]
    assert ranks_of(scores[None], wanted)[0].tolist() == places


def test_all_scores_of_halves() -> None:
    halves = gallery_of("random", 40).astype(np.float16)
    whole = halves.astype(np.float32)
    assert np.allclose(all_scores(halves[:3], halves), whole[:3] @ whole.T)


# Several vectors an image


def test_the_most_similar_vector_counts() -> None:
    assert (similarity(QUERIES, SEVERAL) == SCORES).all()
    queries, several, scores = map(torch.from_numpy, (QUERIES, SEVERAL, SCORES))
    assert torch.equal(similarity(queries, several), scores)
    alone = similarity(QUERIES, SEVERAL[:, 0])
    assert (alone == similarity(QUERIES, SEVERAL[:, :1])).all()
    assert (alone == QUERIES @ SEVERAL[:, 0].T).all()


def test_one_vector_of_unit_norm_stands_for_an_image_among_images() -> None:
    mean = mean_pool(SEVERAL)
    assert np.allclose(np.linalg.norm(mean, axis=1), 1, atol=1e-6)
    assert np.allclose(mean[3] * np.linalg.norm(SEVERAL[3].mean(0)), SEVERAL[3].mean(0), atol=1e-6)
    assert mean_pool(QUERIES) is QUERIES


@pytest.mark.parametrize(
    "strategy", [TopK(negatives_per_query=3, extra_ranks="all"), Band(negatives_per_query=2)]
)
@pytest.mark.parametrize("fallback", ["none", "random"])
def test_mining_is_that_of_the_scores(strategy: Any, fallback: Any) -> None:
    """A gallery whose vectors are the scores themselves gives the same images."""
    targets = RANDOM.integers(0, 45, 40)
    references = RANDOM.integers(45, 90, 40)
    settings = MiningSettings(strategy=strategy, fallback=fallback)
    made = []
    for queries, gallery in ((QUERIES, SEVERAL), (SCORES, np.eye(90, dtype=np.float32))):
        inputs = MiningInputs(queries, gallery, targets, references)
        rows = []
        for f in mine(settings, inputs, MiningContext(0)):
            arrays = (f.gallery_indices, f.ranks, f.scores)
            rows.append((f.query_index, f.target_rank, *(array.tolist() for array in arrays)))
        made.append(rows)
    assert made[0] == made[1] and sum(len(row[2]) for row in made[0]) > 20


def test_an_index_refuses_several_vectors() -> None:
    with pytest.raises(UserError, match="Use exact"):
        ann_topk(QUERIES, SEVERAL, 3, "flat")


# By the ids of images


def test_images_by_their_ids() -> None:
    gallery = Gallery("g", tuple(ImageId(f"{i:03}") for i in range(90)))
    order = np.argsort(-SCORES, axis=1, kind="stable")
    assert topk_images(gallery, QUERIES, SEVERAL, 7) == [
        [gallery.ids[g] for g in row[:7]] for row in order
    ]
    wanted = [
        {gallery.ids[(7 * i + n) % 90] for n in range(i % 4)} for i in range(40)
    ]  # of some queries none
    assert ranks_of_images(wanted, gallery, QUERIES, SEVERAL) == [
        {image: order[i].tolist().index(gallery.ids.index(image)) + 1 for image in sorted(images)}
        for i, images in enumerate(wanted)
    ]
    assert scores_of_images(wanted, gallery, QUERIES, SEVERAL) == [
        {image: float(SCORES[i, gallery.ids.index(image)]) for image in images}
        for i, images in enumerate(wanted)
    ]
    with pytest.raises(KeyError, match="elsewhere"):
        ranks_of_images([{ImageId("elsewhere")}], gallery, QUERIES[:1], SEVERAL)
