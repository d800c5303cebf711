"""FAISS indexes: flat gives what an exact search gives, the others say how much of it they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cirloop import mining
from cirloop.mining import Vectors
from cirloop.negatives import Margin, Random, TopK
from cirloop.negatives.base import About
from cirloop.retrieval.index import indexed_rows
from cirloop.retrieval.top import best_rows
from cirloop.types import UserError


@pytest.fixture(scope="module")
def vectors() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    centres = random.standard_normal((60, 32))
    gallery = (centres[random.integers(0, 60, 4000)] + 0.7 * random.standard_normal((4000, 32))).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    return gallery[::40] + 0.05 * random.standard_normal((100, 32)).astype(np.float32), gallery


def test_flat_is_exact(vectors: tuple[Any, Any]) -> None:
    rows, scores, recall = indexed_rows(*vectors, 20, "flat")
    exact, same = best_rows(*vectors, 20)
    assert recall == 1 and (rows == exact).all() and (scores == same).all()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_says_what_it_holds(kind: Any, vectors: tuple[Any, Any]) -> None:
    rows, scores, recall = indexed_rows(*vectors, 20, kind)
    exact, _ = best_rows(*vectors, 20)
    held = np.mean([len({*a} & {*b}) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]) / 20
    assert recall == pytest.approx(held) and 0.8 < held <= 1
    queries, gallery = vectors
    for i in range(100):
        found = rows[i][rows[i] >= 0]
        assert scores[i, : len(found)] == pytest.approx(gallery[found] @ queries[i], abs=1e-6)
        assert (np.diff(scores[i, : len(found)]) <= 0).all()


def test_mining_by_an_index(vectors: tuple[Any, Any]) -> None:
    given, notes = Vectors(*vectors, np.arange(0, 4000, 40)), {}
    exact = [f.columns.tolist() for f in mining.mine(Margin(k=3, range_max=20), given, About(0))]
    flat = mining.mine(Margin(k=3, range_max=20, search="flat"), given, About(0), notes=notes)
    assert [f.columns.tolist() for f in flat] == exact and notes == {"search_recall": 1.0}
    few = [f for f in mining.mine(TopK(k=3, search="ivf", below="all", only_wrong=False), given, About(0), notes=notes)]
    assert all(len(f.columns) == 3 for f in few) and notes["search_recall"] > 0.8


def test_only_where_the_best_images_are_enough(vectors: tuple[Any, Any]) -> None:
    given = Vectors(*vectors, np.arange(0, 4000, 40))
    for strategy in (Random(search="ivf"), TopK(search="hnsw", fallback="random")):
        with pytest.raises(UserError, match="is for strategies that need the best images only"):
            list(mining.mine(strategy, given, About(0)))


def test_a_gallery_smaller_than_its_lists(vectors: tuple[Any, Any]) -> None:
    queries, gallery = vectors
    for kind in ("ivf", "hnsw", "flat"):
        rows, _, _ = indexed_rows(queries, gallery[:7], 20, kind)  # type: ignore[arg-type]
        assert rows.shape == (100, 7) and {*rows[0].tolist()} <= {-1, *range(7)}
