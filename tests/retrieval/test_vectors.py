"""Galleries in many files: searched part by part they give what the whole gives, and nothing large is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cirloop.mining import Vectors, mine
from cirloop.negatives import Band, TopK
from cirloop.negatives.base import About
from cirloop.retrieval import blocks, search, top, vectors
from cirloop.retrieval.vectors import Parts, files_of, open_vectors, room
from cirloop.types import Gallery, ImageId, Query, QueryId, UserError


@pytest.fixture
def whole() -> Any:
    """Small integers, so that scores are exact and many tie, and no two programs round them differently."""
    return np.random.default_rng(0).integers(-1, 2, (700, 12)).astype(np.float32)


@pytest.fixture
def parts(whole: Any, tmp_path: Path) -> Any:
    for number, (start, stop) in enumerate([(0, 100), (100, 101), (101, 450), (450, 700)]):
        np.save(tmp_path / f"part_{number if number < 3 else 10}.npy", whole[start:stop])
    return open_vectors(tmp_path)


def test_parts_are_read_as_one_array(whole: Any, parts: Any) -> None:
    assert parts.shape == whole.shape and parts.dtype == whole.dtype and len(parts) == 700 and parts.ndim == 2
    for rows in (slice(0, 5), slice(90, 460), slice(449, 452), slice(0, None), slice(699, 900), slice(3, 3)):
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
    queries, wanted = whole[::9], np.arange(0, 700, 9)[::-1].copy()
    order = np.argsort(-(queries @ whole.T), axis=1, kind="stable")
    monkeypatch.setattr(top, "shard_size", lambda _: step)
    monkeypatch.setattr(blocks, "shard_size", lambda _: step)
    for k in (1, 30, 700):
        rows, scores = top.best_rows(queries, parts, k, device)
        assert (rows == order[:, :k]).all()
        assert (scores == np.take_along_axis(queries @ whole.T, order[:, :k], 1)).all()
    places, _ = top.places(queries, parts, wanted, device)
    assert (places == (order == wanted[:, None]).argmax(1) + 1).all()
    made = np.concatenate([scores for _, scores in blocks.score_blocks(queries, parts, np.arange(78), device)])
    assert (made == queries @ whole.T).all()


def test_what_parts_of_a_gallery_found_is_joined_exactly(whole: Any) -> None:
    """Each part searched alone, as another machine would; ties across parts by row."""
    queries, found = whole[:40], []
    for start in (0, 100, 420):
        rows, scores = top.best_rows(queries, whole[start : {0: 100, 100: 420, 420: 700}[start]], 25)
        found.append((rows + start, scores))
    rows, scores = top.joined(found, 25)
    all_rows, all_scores = top.best_rows(queries, whole, 25)
    assert (rows == all_rows).all() and (scores == all_scores).all()
    assert (np.diff(scores, axis=1) == 0).any(), "nothing tied, so nothing was shown"


@pytest.mark.parametrize("strategy", [TopK(k=4, below="all", only_wrong=False), Band(k=2), Band(k=2, how="hardest")])
def test_mining_parts_is_mining_the_whole(
    strategy: Any, whole: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = np.arange(0, 700, 20)
    given = [list(mine(strategy, Vectors(whole[targets], g, targets), About(0))) for g in (whole, parts)]
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 3000)  # blocks of 4 queries, shards of 250 images
    given.append(list(mine(strategy, Vectors(whole[targets], parts, targets), About(0))))
    rows = [[(f.columns.tolist(), f.ranks.tolist(), f.target_rank) for f in found] for found in given]
    assert rows[0] == rows[1] == rows[2] and any(columns for columns, _, _ in rows[0])


def test_a_mapped_gallery_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.ones((50, 4), np.float32))
    mapped = open_vectors(tmp_path / "g.npy")
    assert blocks.tensor(mapped[10:40], "cpu").data_ptr() == mapped[10:40].ctypes.data
    assert blocks.checked(mapped, "gallery") is mapped


def test_blocks_of_a_run_search_are_bounded(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery("g", tuple(ImageId(f"{row:03d}") for row in range(700)))
    queries = [Query(QueryId(str(n)), gallery.ids[n], "") for n in range(50)]
    wanted, seen = [[gallery.ids[-1 - n]] for n in range(50)], []
    before = search.places(queries, wanted, gallery, whole[:50], whole)
    monkeypatch.setattr(search, "BLOCK_NUMBERS", 700 * 8)
    real = search.similarity
    monkeypatch.setattr(search, "similarity", lambda q, g: seen.append(len(q)) or real(q, g))
    assert search.places(queries, wanted, gallery, whole[:50], whole) == before
    assert max(seen) == 8 and sum(seen) == 50


def test_large_arrays_are_made_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "MAPPED_BYTES", 4000)
    small, large, nowhere = room((99, 10), tmp_path), room((100, 10), tmp_path / "new"), room((100, 10), None)
    assert small.base is None and nowhere.base is None and isinstance(large.base, np.memmap)
    large[7] = 3
    assert large.sum() == 30 and not list((tmp_path / "new").iterdir()), (
        "the file has a name, so somebody must delete it"
    )


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("p_10.npy", "p_9.npy", "p_1.npy", "q.txt", "a.npy"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path)] == ["a.npy", "p_1.npy", "p_9.npy", "p_10.npy"]
    assert [file.name for file in files_of(tmp_path / "p_*.npy")] == ["p_1.npy", "p_9.npy", "p_10.npy"]
    (tmp_path / "p[1].npy").touch()
    assert files_of(tmp_path / "p[1].npy") == [tmp_path / "p[1].npy"], "a file's own name is no pattern"
    with pytest.raises(UserError, match=r"has no \.npy files"):
        files_of(tmp_path / "x*.npy")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.ones((3, 5), np.float32), r"do not go together: 0\.npy float32 \(N, 4\) and 1\.npy float32 \(N, 5\)"),
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
    gallery = Parts([made[:11], made[11:]])
    rows, scores = top.best_rows(made[:5, 0], gallery, 7)
    same, again = top.best_rows(made[:5, 0], made, 7)
    assert (rows == same).all() and (scores == again).all()
