"""Galleries of several vectors an image: the best one counts, in search, mining and places alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cirloop.backbones.similarity import pooled, similarity
from cirloop.mining import Vectors, mine
from cirloop.negatives import Band, TopK
from cirloop.negatives.base import About, Strategy
from cirloop.retrieval import blocks, search, top
from cirloop.retrieval.index import indexed_rows
from cirloop.types import Gallery, ImageId, Query, QueryId, UserError

RANDOM = np.random.default_rng(0)
QUERIES = RANDOM.integers(-2, 3, (40, 6)).astype(np.float32)  # exact scores, many ties
SEVERAL = RANDOM.integers(-2, 3, (90, 4, 6)).astype(np.float32)
SCORES = np.array([[max(float(v @ q) for v in image) for image in SEVERAL] for q in QUERIES], np.float32)


def test_the_most_similar_vector_counts() -> None:
    assert (similarity(QUERIES, SEVERAL) == SCORES).all()
    assert torch.equal(similarity(torch.from_numpy(QUERIES), torch.from_numpy(SEVERAL)), torch.from_numpy(SCORES))
    alone = similarity(QUERIES, SEVERAL[:, 0])
    assert (alone == similarity(QUERIES, SEVERAL[:, :1])).all() and (alone == QUERIES @ SEVERAL[:, 0].T).all()


def test_one_vector_of_unit_norm_stands_for_an_image_among_images() -> None:
    made = pooled(SEVERAL)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
    assert np.allclose(made[3] * np.linalg.norm(SEVERAL[3].mean(0)), SEVERAL[3].mean(0), atol=1e-6)
    assert pooled(QUERIES) is QUERIES


@pytest.mark.parametrize("numbers", [1 << 25, 600])
def test_best_rows_places_and_pairs(numbers: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    order = np.argsort(-SCORES, axis=1, kind="stable")
    for k in (1, 7, 90, 200):
        rows, scores = top.best_rows(QUERIES, SEVERAL, k)
        assert (rows == order[:, :k]).all() and (scores == np.take_along_axis(SCORES, order, 1)[:, :k]).all()
    wanted = RANDOM.integers(0, 90, 40)
    found, score = top.places(QUERIES, SEVERAL, wanted)
    assert (found == [list(row).index(w) + 1 for row, w in zip(order, wanted, strict=True)]).all()
    assert (score == SCORES[np.arange(40), wanted]).all()
    assert (top.pair_scores(QUERIES, SEVERAL, wanted) == score).all()


@pytest.mark.parametrize("strategy", [TopK(k=3), TopK(k=3, below="all", fallback="random"), Band(k=2)])
def test_mining_is_that_of_the_scores(strategy: Strategy) -> None:
    """A gallery whose vectors are the scores themselves gives the same images."""
    targets, references = RANDOM.integers(0, 45, 40), RANDOM.integers(45, 90, 40)
    made = [
        [(f.number, f.target_rank, f.columns.tolist(), f.ranks.tolist(), f.scores.tolist())
         for f in mine(strategy, Vectors(queries, gallery, targets, references), About(0))]
        for queries, gallery in ((QUERIES, SEVERAL), (SCORES, np.eye(90, dtype=np.float32)))
    ]  # fmt: skip
    assert made[0] == made[1] and sum(len(row[2]) for row in made[0]) > 20


def test_search_of_an_evaluation() -> None:
    gallery = Gallery("g", tuple(ImageId(f"{i:03}") for i in range(90)))
    queries = [Query(QueryId(str(i)), gallery.ids[i], "") for i in range(40)]
    targets = [gallery.ids[89 - i] for i in range(40)]
    single = np.eye(90, dtype=np.float32)
    ours, plain = (search.rank(queries, targets, gallery, q, g, 10) for q, g in ((QUERIES, SEVERAL), (SCORES, single)))
    assert (ours.images_QK == plain.images_QK).all() and (ours.target_rank_Q == plain.target_rank_Q).all()
    wanted = [[t] for t in targets]
    assert search.places(queries, wanted, gallery, QUERIES, SEVERAL) == search.places(
        queries, wanted, gallery, SCORES, single
    )
    assert search.scores(queries, wanted, gallery, QUERIES, SEVERAL)[5] == {targets[5]: float(SCORES[5, 84])}


def test_an_index_refuses_several_vectors() -> None:
    with pytest.raises(UserError, match="Use exact"):
        indexed_rows(QUERIES, SEVERAL, 3, "flat")
    gallery = Gallery("g", tuple(ImageId(f"{i:03}") for i in range(90)))
    with pytest.raises(UserError, match="Use exact"):
        search.rank(
            [Query(QueryId("q"), gallery.ids[0], "")], [gallery.ids[1]], gallery, QUERIES[:1], SEVERAL, 3, "faiss"
        )


def test_what_is_not_finite_is_named_by_its_row() -> None:
    bad = SEVERAL.copy()
    bad[7, 2, 1] = np.nan
    with pytest.raises(UserError, match="row 7"):
        blocks.checked(bad, "gallery vectors")
    assert blocks.checked(SEVERAL, "gallery vectors") is SEVERAL
