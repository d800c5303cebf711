"""Galleries in many files: searched part by part they give what the whole gives, and nothing large
is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cirloop.negatives import Band, MiningSettings, TopK
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.retrieval import gallery_part as module
from cirloop.retrieval import vectors
from cirloop.retrieval.gallery_part import tensor
from cirloop.retrieval.topk import merge_topk, ranks, score_blocks, topk
from cirloop.retrieval.vectors import (
    ConcatArray,
    files_of,
    open_vectors,
    validate_embeddings,
    zeros_or_memmap,
)
from cirloop.types import UserError


@pytest.fixture
def whole() -> Any:
    """Small integers, so that scores are exact and many tie, and no two programs round them
    differently."""
    return np.random.default_rng(0).integers(-1, 2, (700, 12)).astype(np.float32)


@pytest.fixture
def parts(whole: Any, tmp_path: Path) -> Any:
    for number, (start, stop) in enumerate([(0, 100), (100, 101), (101, 450), (450, 700)]):
        np.save(tmp_path / f"part_{number if number < 3 else 10}.npy", whole[start:stop])
    return open_vectors(tmp_path)


def test_parts_are_read_as_one_array(whole: Any, parts: Any) -> None:
    assert parts.shape == whole.shape and parts.dtype == whole.dtype and len(parts) == 700
    assert parts.ndim == 2
    for rows in map(slice, (0, 90, 449, 0, 699, 3), (5, 460, 452, None, 900, 3)):
        assert (parts[rows] == whole[rows]).all() and parts[rows].shape == whole[rows].shape
    random = np.random.default_rng(1).integers(0, 700, (9, 4))
    assert (parts[random] == whole[random]).all() and parts[np.zeros(0, int)].shape == (0, 12)
    assert (np.asarray(parts) == whole).all()


def test_a_slice_of_one_part_is_a_view(parts: Any) -> None:
    assert np.shares_memory(parts[120:300], parts._parts[2]) and not parts[120:300].flags.writeable


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu,cpu"])
@pytest.mark.parametrize("step", [64, 333, 1000])
def test_parts_give_what_the_whole_gives(
    device: str, step: int, whole: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = whole[::9]
    wanted = np.arange(0, 700, 9)[::-1].copy()
    order = np.argsort(-(queries @ whole.T), axis=1, kind="stable")
    monkeypatch.setattr(module, "part_size", lambda _: step)
    for k in (1, 30, 700):
        rows, scores = topk(queries, parts, k, device)
        assert (rows == order[:, :k]).all()
        assert (scores == np.take_along_axis(queries @ whole.T, order[:, :k], 1)).all()
    found, _ = ranks(queries, parts, wanted[:, None], device)
    assert (found[:, 0] == (order == wanted[:, None]).argmax(1) + 1).all()
    made = np.concatenate([scores for _, scores in score_blocks(queries, parts, device)])
    assert (made == queries @ whole.T).all()


def test_what_parts_of_a_gallery_found_is_joined_exactly(whole: Any) -> None:
    """Each part searched alone, as another machine would; ties across parts by row."""
    queries = whole[:40]
    found = []
    for start in (0, 100, 420):
        rows, scores = topk(queries, whole[start : {0: 100, 100: 420, 420: 700}[start]], 25)
        found.append((rows + start, scores))
    rows, scores = merge_topk(found, 25)
    all_rows, all_scores = topk(queries, whole, 25)
    assert (rows == all_rows).all() and (scores == all_scores).all()
    assert (np.diff(scores, axis=1) == 0).any(), "nothing tied, so nothing was shown"


@pytest.mark.parametrize(
    "strategy",
    [
        TopK(negatives_per_query=4, extra_ranks="all"),
        Band(negatives_per_query=2),
        Band(negatives_per_query=2, selection="hardest"),
    ],
)
def test_mining_parts_is_mining_the_whole(
    strategy: Any, whole: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = np.arange(0, 700, 20)
    settings = MiningSettings(strategy=strategy, only_failed_queries=False)

    def mined(gallery: Any) -> list[Any]:
        results = mine(settings, MiningInputs(whole[targets], gallery, targets), MiningContext(0))
        return [(f.gallery_indices.tolist(), f.ranks.tolist(), f.target_rank) for f in results]

    rows = [mined(whole), mined(parts)]
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 3000)  # blocks of 4 queries, shards of 250 images
    rows.append(mined(parts))
    assert rows[0] == rows[1] == rows[2] and any(columns for columns, _, _ in rows[0])


def test_a_mapped_gallery_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.ones((50, 4), np.float32))
    mapped = open_vectors(tmp_path / "g.npy")
    assert tensor(mapped[10:40], "cpu").data_ptr() == mapped[10:40].ctypes.data
    assert validate_embeddings(mapped, "gallery") is mapped


def test_large_arrays_are_made_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "MAPPED_BYTES", 4000)
    small = zeros_or_memmap((99, 10), tmp_path)
    large = zeros_or_memmap((100, 10), tmp_path / "new")
    nowhere = zeros_or_memmap((100, 10), None)
    assert small.base is None and nowhere.base is None and isinstance(large.base, np.memmap)
    large[7] = 3
    assert large.sum() == 30 and not list((tmp_path / "new").iterdir()), (
        "the file has a name, so somebody must delete it"
    )


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("p_10.npy", "p_9.npy", "p_1.npy", "q.txt", "a.npy"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path)] == ["a.npy", "p_1.npy", "p_9.npy", "p_10.npy"]
    matching = [file.name for file in files_of(tmp_path / "p_*.npy")]
    assert matching == ["p_1.npy", "p_9.npy", "p_10.npy"]
    (own := tmp_path / "p[1].npy").touch()
    assert files_of(own) == [own], "a file's own name is no pattern"
    with pytest.raises(UserError, match=r"has no \.npy files"):
        files_of(tmp_path / "x*.npy")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            np.ones((3, 5), np.float32),
            r"do not go together: 0\.npy float32 \(N, 4\) and 1\.npy float32 \(N, 5\)",
        ),
        (np.ones((3, 4), np.float16), r"do not go together: .* and 1\.npy float16"),
    ],
)
def test_files_that_do_not_go_together_are_named(second: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "1.npy", second)
    with pytest.raises(UserError, match=message):
        open_vectors(tmp_path)
    (tmp_path / "1.npy").write_text("hello")
    with pytest.raises(UserError, match=r"1\.npy is not a \.npy array"):
        open_vectors(tmp_path)


def test_parts_of_several_vectors_an_image(tmp_path: Path) -> None:
    made = np.random.default_rng(0).standard_normal((30, 3, 8)).astype(np.float32)
    gallery = ConcatArray([made[:11], made[11:]])
    rows, scores = topk(made[:5, 0], gallery, 7)
    same, again = topk(made[:5, 0], made, 7)
    assert (rows == same).all() and (scores == again).all()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.array([[1.0, np.nan]], np.float32), "row 0 is not finite"),
        (np.array([[1.0], [np.inf]], np.float16), "row 1 is not finite"),
        (np.array([[[1.0], [1.0]], [[1.0], [np.nan]]], np.float32), "row 1 is not finite"),
        (
            np.ones((2, 2)),
            "must be a float16 or float32 array of rows and dimensions, found float64 \\(2, 2\\)",
        ),
        (np.ones(3, np.float32), "found float32 \\(3,\\)"),
        (np.ones((3, 0), np.float32), "found float32 \\(3, 0\\)"),
    ],
)
def test_what_is_no_finite_table_is_refused(vectors: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate_embeddings(vectors, "--gallery-embeddings")
