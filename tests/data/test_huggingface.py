"""Own data in Hugging Face `datasets`: images in the rows, in a gallery table, or in a folder;
mistakes named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from cirloop.data.huggingface import Columns, GalleryTable, HuggingFaceSettings
from cirloop.data.paths import DataPaths
from cirloop.types import UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def save(
    directory: Path, rows: list[dict[str, Any]], gallery: Any = None, pictures: tuple[str, ...] = ()
) -> Path:
    tables = {
        "train": datasets.Dataset.from_list(rows),
        "validation": datasets.Dataset.from_list(rows),
    }
    if gallery is not None:
        tables["gallery"] = datasets.Dataset.from_list(gallery)
    for name, table in tables.items():
        for column in {*pictures, "image"} & {*table.column_names}:
            tables[name] = tables[name].cast_column(column, datasets.Image())
    datasets.DatasetDict(tables).save_to_disk(str(directory))
    return directory


def build(directory: Path, **settings: Any) -> Any:
    data_paths = DataPaths(directory, directory / "cache", lambda items, _: items)
    return HuggingFaceSettings(**settings).build(data_paths)


INSIDE = [
    {"before": picture("red"), "say": ["is green", "has no red"], "after": picture("green")},
    {"before": picture("green"), "say": ["is blue"], "after": picture("blue")},
]
COLUMNS = Columns(reference="before", text="say", target="after")
GALLERY = [{"id": n, "image": picture(colour)} for n, colour in enumerate(COLOURS)]
NAMED = [
    {"reference": 0, "text": "is green", "target": 1},
    {"reference": 1, "text": "is blue", "target": 2},
]
TABLE = GalleryTable(split="gallery")


def colour_of(split: Any, image: Any) -> str:
    pixel = tuple(np.asarray(split.images.load(image))[0, 0])
    return next(name for name, value in COLOURS.items() if value == pixel)


def test_images_in_the_rows(tmp_path: Path) -> None:
    data = build(save(tmp_path, INSIDE, pictures=("before", "after")), columns=COLUMNS)
    [part] = data.eval_splits("val")
    assert [q.text for q in part.queries] == ["is green and has no red", "is blue"]
    assert len(part.gallery.ids) == 3  # the green image is in two rows
    assert [colour_of(part, q.reference) for q in part.queries] == ["red", "green"]
    assert part.relevance is not None
    assert [colour_of(part, part.relevance.targets[q.id]) for q in part.queries] == [
        "green",
        "blue",
    ]
    assert [colour_of(data.train, t.target) for t in data.train.triplets] == ["green", "blue"]
    assert data.digest == build(tmp_path, columns=COLUMNS).digest


def test_images_in_a_gallery_table(tmp_path: Path) -> None:
    [part] = build(save(tmp_path, NAMED, GALLERY), gallery=TABLE).eval_splits("val")
    assert part.gallery.ids == ("0", "1", "2") and [q.reference for q in part.queries] == ["0", "1"]
    assert [colour_of(part, image) for image in part.gallery.ids] == list(COLOURS)


def test_images_in_a_folder_beside_a_folder_of_parquet(tmp_path: Path) -> None:
    rows = [{"reference": "red.png", "text": "is green", "target": "green.png"}]
    for name in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(
            str(tmp_path / f"{name}-00000-of-00001.parquet")
        )
    (tmp_path / "photos").mkdir()
    for colour in COLOURS:
        (tmp_path / "photos" / f"{colour}.png").write_bytes(picture(colour)["bytes"])
    [part] = build(tmp_path, images="photos").eval_splits("val")
    assert part.gallery.ids == ("blue.png", "green.png", "red.png")
    (tmp_path / "photos" / "red.png").unlink()
    with pytest.raises(UserError, match=r"photos/red\.png: is not there"):
        build(tmp_path, images="photos").eval_splits("val")


def test_a_split_without_targets_is_for_prediction(tmp_path: Path) -> None:
    settings = {"columns": Columns(reference="before", text="say", target=None)}
    [part] = build(save(tmp_path, INSIDE, pictures=("before", "after")), **settings).eval_splits(
        "val"
    )
    assert part.relevance is None and len(part.gallery.ids) == 2


def spoiled(**cells: Any) -> list[dict[str, Any]]:
    return [INSIDE[0] | cells, INSIDE[1]]


TEXT_FILE = {"bytes": b"<html>", "path": None}


def inside(message: str, **cells: Any) -> tuple[Any, ...]:
    return spoiled(**cells), None, {"columns": COLUMNS}, message


def named(message: str, table: Any = None, **settings: Any) -> tuple[Any, ...]:
    return NAMED, table, settings, message


WRONG: dict[str, tuple[Any, ...]] = {
    "no column": (
        INSIDE,
        None,
        {},
        "validation: has no column 'reference'; there are: before, say, after",
    ),
    "no split": (
        INSIDE,
        None,
        {"columns": COLUMNS, "val": "dev"},
        "has no split 'dev'; there are: train, validation",
    ),
    "no image": inside("row 0: 'reference' must be text, found null", before=None),
    "no text": inside("row 0: 'text' must be text, found null", say=None),
    "empty text": inside("row 0: has no 'text'", say=[" "]),
    "no image file": inside("row 0 after: is not an image but", after=TEXT_FILE),
    "no target": inside("1 of 2 lines have no targets, and others have", after=None),
    "named and nowhere": named("names its images, so say where they are: data.gallery"),
    "not in the gallery": named(
        "row 1: target '2' is not in the gallery", GALLERY[:2], gallery=TABLE
    ),
    "id twice": named(
        "row 3: the id '0' is there more than once", [*GALLERY, GALLERY[0]], gallery=TABLE
    ),
    "gallery of words": named(
        "the column 'words' holds no images",
        [{"id": 0, "words": "x"}],
        gallery={"split": "gallery", "image": "words"},
    ),
    "no folder": named("photos: is no directory of images", images="photos"),
    "both": (
        INSIDE,
        GALLERY,
        {"columns": COLUMNS, "gallery": TABLE},
        "holds its images in reference, target; leave",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named(name: str, tmp_path: Path) -> None:
    rows, gallery, settings, message = WRONG[name]
    pictures = ("before", "after") if "before" in rows[0] else ()
    with pytest.raises(UserError) as caught:
        build(save(tmp_path, rows, gallery, pictures), **settings).eval_splits("val")
    assert message in str(caught.value)


def test_one_table_is_no_data_set(tmp_path: Path) -> None:
    datasets.Dataset.from_list(NAMED).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="is one table and has no splits"):
        build(tmp_path).eval_splits("val")


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, "cannot be loaded by `datasets`"), ("no/such", "no/such cannot be")],
)
def test_what_cannot_be_loaded_is_named(path: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, path=path).eval_splits("val")
