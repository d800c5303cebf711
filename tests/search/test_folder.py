"""The index of a folder: kept by content, whole whatever happens, and every image that cannot be
used is named."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import Engine
from cirloop.tools.search.index import Index
from cirloop.types import ImageId, UserError

COUNTS = re.compile(
    r"(\d+) images, (\d+) embedded now, (\d+) in the index before, (\d+) no longer there"
)


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Path:
    """Nine images: six in it, three in a folder of its own."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for number, image in enumerate(engine.gallery.ids[:9]):
        within = place / "more" if number > 5 else place
        engine.gallery.images.load(image).save(within / f"{number}.png")
    (place / "README.txt").write_text("no image")
    (place / ".hidden.png").write_bytes(b"")
    return place


@pytest.fixture
def searched(
    finished: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> Callable[..., list[int]]:
    """Search the folder anew: images, embedded, known before, dropped. `run` is the directory,
    `label` the model."""

    def counts(label: str = "1", **options: Any) -> list[int]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "cirloop"):
            made = Engine(SearchOptions(experiment_dir=finished, gallery=folder, **options))
            made.load(label)
        (found,) = COUNTS.findall(caplog.text)
        return [int(number) for number in found]

    return counts


def index_of(finished: Path, folder: Path, label: str = "1") -> tuple[Engine, Path]:
    engine = Engine(SearchOptions(experiment_dir=finished, gallery=folder))
    fingerprint = engine.load(label)._backbone.fingerprint
    return engine, Index(engine.cache / "search", fingerprint, engine.gallery.key).path


def test_it_is_updated_by_content(searched: Callable[..., list[int]], folder: Path) -> None:
    assert searched() == [9, 9, 0, 0]
    assert searched() == [9, 0, 9, 0]
    (folder / "0.png").rename(folder / "more" / "renamed.png")
    assert searched() == [9, 0, 9, 0]
    Image.new("RGB", (84, 84), "red").save(folder / "red.png")
    assert searched() == [10, 1, 9, 0]
    (folder / "1.png").unlink()
    assert searched() == [9, 0, 9, 1]
    shutil.copy(folder / "2.png", folder / "copy.png")  # the same content embeds once
    Image.new("RGB", (84, 84), "blue").save(folder / "3.png")
    assert searched() == [10, 1, 8, 1]
    assert searched("0") == [10, 9, 0, 0]  # another adapter, another index
    assert searched() == [10, 0, 9, 0]


def test_names_scores_and_copies(finished: Path, folder: Path) -> None:
    shutil.copy(folder / "2.png", folder / "copy.png")
    engine, _ = index_of(finished, folder)
    assert list(engine.gallery.ids) == sorted(engine.gallery.ids)
    assert "more/7.png" in engine.gallery.ids
    by_id = engine.search("1", ImageId("2.png"), None, 20)
    by_path = engine.search("1", engine.reference(str(folder / "2.png")), None, 20)
    assert by_id.hits[0].image == "copy.png" and by_id.hits[0].score == pytest.approx(1, abs=1e-5)
    # the same bytes are the reference
    assert not {"2.png", "copy.png"} & {hit.image for hit in by_path.hits}
    kept = engine.search("1", ImageId("2.png"), None, 20, keep=True).hits
    assert [hit.image for hit in kept[:2]] == ["2.png", "copy.png"]
    assert kept[0].score == kept[1].score


def test_an_updated_index_gives_what_a_new_one_does(finished: Path, folder: Path) -> None:
    old, path = index_of(finished, folder)
    Image.new("RGB", (84, 84), "red").save(folder / "red.png")
    (folder / "1.png").unlink()
    updated = index_of(finished, folder)[0].search("1", ImageId("2.png"), "make it red", 20)
    path.unlink()
    new = index_of(finished, folder)[0].search("1", ImageId("2.png"), "make it red", 20)
    assert [hit.image for hit in updated.hits] == [hit.image for hit in new.hits]
    old_scores, new_scores = ([hit.score for hit in found.hits] for found in (updated, new))
    assert np.allclose(old_scores, new_scores, atol=1e-5)
    assert "1.png" not in {hit.image for hit in new.hits} and "1.png" in old.gallery.ids


@pytest.mark.parametrize("what", ["cut", "flipped", "empty", "another"])
def test_a_damaged_index_is_made_again_and_said(
    finished: Path,
    folder: Path,
    searched: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    path = index_of(finished, folder)[1]
    content = path.read_bytes()
    middle = len(content) - 100
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    other = index_of(finished, folder, "0")[1].read_bytes()
    damaged = {"cut": content[:-7], "flipped": flipped, "empty": b"", "another": other}
    path.write_bytes(damaged[what])
    assert searched() == [9, 9, 0, 0]
    assert f"the index {path} is damaged" in caplog.text
    assert path.read_bytes() == content  # batches are the same, so bytes are


def test_what_a_killed_one_left_does_no_harm(
    finished: Path, folder: Path, searched: Callable[..., list[int]]
) -> None:
    path = index_of(finished, folder)[1]
    path.with_name(f".{path.stem}.1.00000000.tmp").write_bytes(b"half")
    assert searched() == [9, 0, 9, 0]


def test_two_at_once_leave_a_whole_index(tmp_path: Path) -> None:
    """Each reader sees all of one writer's vectors or all of the other's."""

    def vectors(kind: int) -> dict[str, Any]:
        return {f"{row:064x}": np.full(4, kind, np.float32) for row in range(50 + kind)}

    sets = [vectors(1), vectors(2)]
    done, seen = threading.Event(), []

    def write(known: dict[str, Any]) -> None:
        for _ in range(40):
            Index(tmp_path, "model", "key").write(known)

    def read() -> None:
        while not done.is_set():
            found = Index(tmp_path, "model", "key").read()
            seen.append((len(found), {float(vector.mean()) for vector in found.values()}))

    with ThreadPoolExecutor(3) as threads:
        reader, writers = threads.submit(read), [threads.submit(write, known) for known in sets]
        wait(writers)
        done.set()
    for thread in (reader, *writers):
        thread.result()
    assert {len(found) for found in sets} <= {number for number, _ in seen} <= {0, 51, 52}
    assert all(values == {number - 50} for number, values in seen if number)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_every_rubbish_image_is_named(
    finished: Path, folder: Path, tmp_path: Path, searched: Any
) -> None:
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "<b>\x1b[31m.png").write_text("rubbish")
    with pytest.raises(UserError) as caught:
        Engine(SearchOptions(experiment_dir=finished, gallery=folder))
    said = str(caught.value)
    for name in ("text.jpg", "empty.png", "cut.png", "<b>", "--allow_missing_images 4"):
        assert name in said
    with pytest.raises(UserError, match="4 of 13 images"):
        Engine(SearchOptions(experiment_dir=finished, gallery=folder, allow_missing_images=3))
    assert searched(allow_missing_images=4) == [9, 9, 0, 0]


def test_links_are_followed_and_circles_end(folder: Path, tmp_path: Path, searched: Any) -> None:
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (84, 84), "red").save(tmp_path / "outside" / "red.png")
    (folder / "link.png").symlink_to(tmp_path / "outside" / "red.png")
    (folder / "inner.png").symlink_to(folder / "1.png")
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "circle").symlink_to(folder)
    said = r"2 problems:(.|\n)*is a link to a folder(.|\n)*--allow_symlinks"
    with pytest.raises(UserError, match=said):
        searched()
    assert searched(allow_symlinks=True)[0] == 9 + 3


@pytest.mark.parametrize("what", ["missing", "file", "none"])
def test_a_folder_that_is_none(finished: Path, tmp_path: Path, what: str) -> None:
    place = tmp_path / what
    if what == "file":
        place.write_text("")
    elif what == "none":
        place.mkdir()
        (place / "a.txt").write_text("")
    said = "holds no images" if what == "none" else "no such directory"
    with pytest.raises(UserError, match=said):
        Engine(SearchOptions(experiment_dir=finished, gallery=place))
