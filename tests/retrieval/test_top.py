"""Best rows and places against sorting everything: exact whatever the rounding of the fast product, ties by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cirloop.retrieval import blocks, top
from cirloop.types import UserError


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


KINDS = ["random", "nearly alike", "duplicates", "small integers", "all equal"]


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(top, "_fast_dtype", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", [None, 700])
def test_best_rows_are_those_of_a_full_sort(kind: str, shard: int | None, dtype: Any, monkeypatch: Any) -> None:
    gallery = gallery_of(kind)
    queries = gallery_of("small integers" if kind in ("small integers", "all equal") else "random", 50)
    if shard is not None:
        monkeypatch.setattr(top, "shard_size", lambda _: shard)
    for k in (1, 7, 100, len(gallery) + 5):
        rows, scores = top.best_rows(queries, gallery, k)
        assert rows.shape == (50, min(k, len(gallery)))
        exact = np.sort((queries.astype(np.float64) @ gallery.T.astype(np.float64)), axis=1)[:, ::-1][:, :k]
        assert np.allclose(scores, exact, atol=2e-6)
        for i in range(50):  # in the order of their own scores, ties by row, and none left out that ties
            assert sorted(zip(-scores[i], rows[i], strict=True)) == list(zip(-scores[i], rows[i], strict=True))
            assert len(set(rows[i].tolist())) == len(rows[i])
        if kind in ("small integers", "all equal"):
            order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :k]
            assert (rows == order).all()
        if kind == "duplicates":  # equal vectors have equal scores, so the first rows of the best vector come first
            same = (gallery == gallery[rows[0, 0]]).all(axis=1)
            assert rows[0, : min(k, same.sum())].tolist() == np.flatnonzero(same)[: min(k, same.sum())].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_those_of_a_full_sort(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(top, "shard_size", lambda _: 800)
    gallery, random = gallery_of(kind), np.random.default_rng(2)
    queries = gallery_of("small integers" if kind in ("small integers", "all equal") else "random", 60)
    wanted = random.integers(0, len(gallery), 60)
    found, scores = top.places(queries, gallery, wanted)
    every, all_scores = top.best_rows(queries, gallery, len(gallery))
    for i in range(60):
        place = every[i].tolist().index(wanted[i])
        assert found[i] == place + 1 and scores[i] == all_scores[i, place]


def test_memory_mapped_halves_give_what_their_float32_gives(tmp_path: Path) -> None:
    queries, gallery = gallery_of("random", 30).astype(np.float16), gallery_of("random", 500).astype(np.float16)
    np.save(tmp_path / "g.npy", gallery)
    rows, scores = top.best_rows(queries, np.load(tmp_path / "g.npy", mmap_mode="r"), 9)
    again, same = top.best_rows(queries.astype(np.float32), gallery.astype(np.float32), 9)
    assert (rows == again).all() and (scores == same).all()


def test_blocks_hold_every_query_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 4000)
    queries, gallery = gallery_of("random", 37), gallery_of("random", 500)
    seen = list(blocks.score_blocks(queries, gallery, np.arange(0, 37, 2)))
    assert len(seen) > 1 and np.concatenate([rows for rows, _ in seen]).tolist() == list(range(0, 37, 2))
    assert np.allclose(np.concatenate([s for _, s in seen]), queries[::2] @ gallery.T, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.array([[1.0, np.nan]], np.float32), "row 0 is not finite"),
        (np.array([[1.0], [np.inf]], np.float16), "row 1 is not finite"),
        (np.ones((2, 2)), "must be a float16 or float32 array of rows and dimensions, found float64 \\(2, 2\\)"),
        (np.ones(3, np.float32), "found float32 \\(3,\\)"),
        (np.ones((3, 0), np.float32), "found float32 \\(3, 0\\)"),
    ],
)
def test_what_is_no_finite_table_is_refused(vectors: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        blocks.checked(vectors, "--gallery-embeddings")
