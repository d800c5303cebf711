"""FAISS indexes: flat gives what an exact search gives, the others say how much of it they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cirloop.negatives import Margin, MiningSettings, Random, TopK, miner
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs
from cirloop.retrieval.ann import ann_topk, kmeans
from cirloop.retrieval.config import IndexSettings
from cirloop.retrieval.topk import topk
from cirloop.retrieval.vectors import ConcatArray
from cirloop.types import UserError


@pytest.fixture(scope="module")
def vectors() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    centres = random.standard_normal((60, 32))
    gallery = (
        centres[random.integers(0, 60, 4000)] + 0.7 * random.standard_normal((4000, 32))
    ).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    return gallery[::40] + 0.05 * random.standard_normal((100, 32)).astype(np.float32), gallery


def test_flat_is_exact(vectors: tuple[Any, Any]) -> None:
    rows, scores, recall = ann_topk(*vectors, 20, "flat")
    exact, same = topk(*vectors, 20)
    assert recall == 1 and (rows == exact).all() and (scores == same).all()


@pytest.mark.parametrize("kind", ["ivf", "ivf_pq", "hnsw"])
def test_an_approximate_index_says_what_it_holds(kind: Any, vectors: tuple[Any, Any]) -> None:
    rows, scores, recall = ann_topk(*vectors, 20, kind)
    exact, _ = topk(*vectors, 20)
    held = (
        np.mean([len({*a} & {*b}) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]) / 20
    )
    assert recall == pytest.approx(held) and 0.8 < held <= 1
    queries, gallery = vectors
    for i in range(100):
        found = rows[i][rows[i] >= 0]
        assert scores[i, : len(found)] == pytest.approx(gallery[found] @ queries[i], abs=1e-6)
        assert (np.diff(scores[i, : len(found)]) <= 0).all()


def test_looking_at_more_finds_more(vectors: tuple[Any, Any]) -> None:
    """All lists and all codes are all images; few of either miss some."""

    def held(kind: Any, **settings: int) -> float:
        return ann_topk(*vectors, 20, kind, IndexSettings(nlist=50, **settings))[2]

    assert held("ivf", nprobe=50) == 1 > held("ivf", nprobe=1) > 0
    assert held("ivf_pq", nprobe=50, nbits=4, m=8, candidates=200) == 1
    fine = held("ivf_pq", nprobe=50, m=16)
    coarse = held("ivf_pq", nprobe=50, m=2, nbits=4)
    assert fine > coarse > 0
    assert held("ivf_pq", nprobe=50, m=2, nbits=4, candidates=30) > coarse


def test_an_index_is_the_same_again_and_reads_no_more_than_it_trains_on(
    vectors: tuple[Any, Any],
) -> None:
    queries, gallery = vectors
    settings = IndexSettings(nlist=20, nprobe=2, training_size=900, m=8, nbits=5)
    parts = ConcatArray([gallery[:1500], gallery[1500:]])
    made = [ann_topk(queries, g, 9, "ivf_pq", settings) for g in (gallery, gallery, parts)]
    for rows, scores, recall in made[1:]:
        assert (rows == made[0][0]).all() and (scores == made[0][1]).all() and recall == made[0][2]
    other = ann_topk(queries, gallery, 9, "ivf_pq", settings, seed=1)
    assert (other[0] != made[0][0]).any()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("ivf", {"nlist": 5000}, "nlist 5000 must be at most the gallery's 4000 images"),
        ("ivf", {"nlist": 5, "nprobe": 6}, "nprobe 6 at most nlist"),
        ("ivf", {"nlist": 500, "training_size": 499}, "training_size 499 must be at least 500"),
        ("ivf_pq", {"m": 5}, "m 5 must divide the vectors' width 32"),
        ("ivf_pq", {"nbits": 12}, "nbits 12 needs a gallery of 4096 images at least, found 4000"),
        ("ivf_pq", {"training_size": 255}, "training_size 255 must be at least 256"),
    ],
)
def test_settings_that_do_not_fit_the_gallery(
    kind: Any, settings: Any, message: str, vectors: tuple[Any, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        ann_topk(*vectors, 20, kind, IndexSettings(**settings))


def test_settings_that_an_index_does_not_read_are_refused() -> None:
    assert MiningSettings(search="ivf_pq", index=IndexSettings(m=8, nprobe=3)).index.m == 8
    for search, name in (("exact", "nlist"), ("flat", "nprobe"), ("ivf", "m"), ("hnsw", "nlist")):
        with pytest.raises(ValueError, match=f"index: {name} does nothing with search: {search}"):
            MiningSettings(search=search, index={name: 4})  # type: ignore[arg-type]


def test_mining_by_an_index(vectors: tuple[Any, Any]) -> None:
    given = MiningInputs(*vectors, np.arange(0, 4000, 40))
    stats = {}
    best = Margin(negatives_per_query=3, range_max=20)
    exact = [
        f.gallery_indices.tolist()
        for f in miner.mine(MiningSettings(strategy=best), given, MiningContext(0))
    ]
    flat = miner.mine(
        MiningSettings(strategy=best, search="flat"), given, MiningContext(0), stats=stats
    )
    assert [f.gallery_indices.tolist() for f in flat] == exact and stats == {"search_recall": 1.0}
    every = MiningSettings(
        strategy=TopK(negatives_per_query=3, extra_ranks="all"),
        search="ivf",
        only_failed_queries=False,
    )
    few = list(miner.mine(every, given, MiningContext(0), stats=stats))
    assert all(len(f.gallery_indices) == 3 for f in few) and stats["search_recall"] > 0.8


def test_only_where_the_best_images_are_enough() -> None:
    for strategy, fallback in ((Random(), "none"), (TopK(), "random")):
        with pytest.raises(ValueError, match="is for strategies that need the best images only"):
            MiningSettings(strategy=strategy, search="hnsw", fallback=fallback)


def test_a_gallery_smaller_than_its_lists(vectors: tuple[Any, Any]) -> None:
    queries, gallery = vectors
    for kind in ("ivf", "hnsw", "flat"):
        rows, _, _ = ann_topk(queries, gallery[:7], 20, kind)  # type: ignore[arg-type]
        assert rows.shape == (100, 7) and {*rows[0].tolist()} <= {-1, *range(7)}


def test_an_index_leaves_out_what_is_excluded(vectors: tuple[Any, Any]) -> None:
    queries, gallery = vectors
    first, _ = topk(queries, gallery, 1)
    excluded = np.where(np.arange(100)[:, None] % 2, first, -1)
    rows, scores, recall = ann_topk(queries, gallery, 20, "flat", excluded_QE=excluded)
    exact, same = topk(queries, gallery, 20, excluded=excluded)
    assert recall == 1 and (rows == exact).all() and (scores == same).all()
    assert not (rows[1::2] == first[1::2]).any()


def test_clusters_of_well_apart_images() -> None:
    random = np.random.default_rng(0)
    kind = random.integers(0, 4, 200)
    vectors_ND = np.eye(4, 8, dtype=np.float32)[kind] + random.normal(0, 0.02, (200, 8)).astype(
        np.float32
    )
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    for seed in range(10):  # k-means may settle elsewhere, for few seeds
        labels, centroids = kmeans(vectors_ND, 4, seed)
        if len(set(zip(kind.tolist(), labels.tolist(), strict=True))) == 4:
            break
    else:
        pytest.fail("no seed finds the four kinds")
    assert (kmeans(vectors_ND, 4, seed)[0] == labels).all()
    assert ((vectors_ND @ centroids.T).argmax(1) == labels).all()
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def test_fewer_images_than_clusters_are_a_cluster_each() -> None:
    assert sorted(kmeans(np.eye(3, dtype=np.float32), 100, 2**40)[0].tolist()) == [0, 1, 2]
