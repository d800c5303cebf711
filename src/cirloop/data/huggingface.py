"""Data of one's own in Hugging Face `datasets`: a hub name, a directory of `save_to_disk`, or a
folder of Parquet, JSON or CSV that `load_dataset` reads.

Each row is a triplet; `columns` say which column is which (see `triplets.py`). Reference and target
are pictures (then a split's gallery is all pictures of its rows, an image's id the start of its
bytes' SHA-256), or names of pictures, which lie in a gallery table or in a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from cirloop.config.base import Settings
from cirloop.data import own, triplets
from cirloop.data.dataset import Dataset, FileSettings
from cirloop.data.images import ImageFile, InlineImage
from cirloop.data.names import nfc
from cirloop.data.paths import DataPaths, build_eval_splits, build_train_split
from cirloop.data.tables import COLUMNS, Tables
from cirloop.types import EvalProtocol, EvalSplit, ImageId, LabeledQueries, TrainSplit
from cirloop.validation import Entry, Problems

logger = logging.getLogger(__name__)
ROLES = ("reference", "target")
ID_LENGTH = 20
"""Hex digits of a picture's SHA-256 in its id."""


class Columns(Settings):
    """Which column of a table is what; None = there is none."""

    reference: str = "reference"
    """Pictures, or names of pictures."""
    text: str = "text"
    """A text, or a list of texts."""
    target: str | None = "target"
    """Without targets a split is for prediction only."""
    id: str | None = None
    """A query's id; by default its place in the split."""
    category: str | None = None
    """Metrics are also given per category."""
    subset: str | None = None
    """Images of the query's group; adds `recall_subset@K`."""
    positives: str | None = None
    """Further right answers; adds `map@K`."""


class GalleryTable(Settings):
    """A table of the same data set that holds the pictures."""

    split: str
    """The split that holds the pictures."""
    name: str | None = None
    """Its configuration, where the data set has several."""
    id: str = "id"
    """The column with the names that rows use."""
    image: str = "image"
    """Columns: the name that rows use, and the picture."""


class HuggingFaceSettings(FileSettings):
    """Your own triplets in Hugging Face `datasets`."""

    type: Literal["huggingface"] = "huggingface"
    protocol: ClassVar[EvalProtocol] = triplets.PROTOCOL
    path: str | None = None
    """A name on the hub; by default --data_dir is a directory of `save_to_disk`, or one that
    `load_dataset` reads."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    train: str = "train"
    """Splits."""
    val: str = "validation"
    """Evaluated after each iteration."""
    test: str = "test"
    """Evaluated on request."""
    columns: Columns = Columns()
    gallery: GalleryTable | None = None
    """Where pictures that rows name are."""
    images: str | None = None
    """Or the folder of them under --data_dir."""
    allow_symlinks: bool = False
    """Follow links to folders among the pictures; links to files are always followed."""

    def build(self, data_paths: DataPaths) -> Dataset:
        return load(self, data_paths)


def is_picture(table: Any, column: str) -> bool:
    import datasets

    return isinstance(table.features[column], datasets.Image)


def packed(table: Any, row: int, column: str, cell: Any, name: str) -> ImageFile | None:
    """The picture of a cell: its bytes in the table, or the file it points to; None for an empty
    cell."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        return None
    if cell["bytes"] is None:
        return Path(cell["path"])

    def read() -> bytes:
        content: bytes = table[row][column]["bytes"]
        return content

    return InlineImage(
        f"{name} row {row} {column}", hashlib.sha256(cell["bytes"]).hexdigest(), read
    )


def _id(picture: ImageFile) -> ImageId:
    if isinstance(picture, InlineImage):
        return ImageId(picture.sha256[:ID_LENGTH])
    content = picture.read_bytes() if picture.is_file() else str(picture).encode()
    return ImageId(hashlib.sha256(content).hexdigest()[:ID_LENGTH])


def gallery(
    settings: HuggingFaceSettings, tables: Tables, data_paths: DataPaths, problems: Problems
) -> dict[ImageId, ImageFile] | None:
    """The pictures that rows name, from the gallery table or the folder; None where there is
    neither."""
    if settings.images is not None:
        folder = own.path_on_disk(data_paths.require_dir("huggingface") / settings.images)
        return own.images_in_folder(folder, settings.allow_symlinks, problems)
    if settings.gallery is None:
        return None
    found, wanted = settings.gallery, (settings.gallery.id, settings.gallery.image)
    table = tables.split(found.split, problems, found.name)
    if table is None or _lacks(table, wanted, f"{tables.name} {found.split}", problems):
        return {}
    files: dict[ImageId, ImageFile] = {}
    where = f"{tables.name} {found.split}"
    if not is_picture(table, found.image):
        problems.add(where, f"data.gallery.image: the column {found.image!r} holds no pictures")
        return {}
    for row, cells in enumerate(table.select_columns([*wanted])):
        image, picture = (
            ImageId(nfc(str(cells[found.id]))),
            packed(table, row, found.image, cells[found.image], where),
        )
        if image in files:
            problems.add(f"{where} row {row}", f"the id {image!r} is there more than once")
        if picture is None:
            problems.add(f"{where} row {row}", f"{found.image!r} is empty")
        else:
            files[image] = picture
    return files


def _lacks(table: Any, columns: Any, where: str, problems: Problems) -> bool:
    missing = [column for column in columns if column not in table.column_names]
    for column in missing:
        there = ", ".join(table.column_names)
        problems.add(where, f"has no column {column!r}; there are: {there}", COLUMNS)
    return bool(missing)


def load_queries(
    settings: HuggingFaceSettings,
    tables: Tables,
    split: str,
    data_paths: DataPaths,
    problems: Problems,
) -> tuple[list[LabeledQueries], dict[ImageId, ImageFile]]:
    """The queries of `split` and the pictures of its gallery."""
    name = getattr(settings, split)
    where, table = f"{tables.name} {name}", tables.split(name, problems)
    chosen = {
        role: column for role, column in settings.columns.model_dump().items() if column is not None
    }
    if table is None or _lacks(table, chosen.values(), where, problems):
        return [], {}
    named = gallery(settings, tables, data_paths, problems)
    files: dict[ImageId, ImageFile] = dict(named or {})
    packed_roles = [role for role in ROLES if role in chosen and is_picture(table, chosen[role])]
    if named is None and len(packed_roles) < len([role for role in ROLES if role in chosen]):
        problems.add(
            where,
            "names its pictures, so say where they are: data.gallery (a table) or data.images (a"
            " folder)",
            "Give the folder under --data_dir by --data.images images.",
        )
        return [], {}
    if named is not None and packed_roles:
        problems.add(
            where,
            f"holds its pictures in {', '.join(packed_roles)}; leave data.gallery and"
            " data.images out",
        )

    def entries() -> Iterator[tuple[str, Entry]]:
        for row, cells in enumerate(table.select_columns(list(dict.fromkeys(chosen.values())))):
            place, fields = f"{where} row {row}", {}
            for role, column in chosen.items():
                value = cells[column]
                if role in packed_roles:
                    picture = packed(table, row, column, value, where)
                    if picture is not None:
                        value = _id(picture)
                        files.setdefault(value, picture)
                elif role in ROLES or role == "id":
                    value = str(value) if isinstance(value, int) else value
                elif role == "text" and isinstance(value, list):
                    role = "texts"
                if value is not None or role not in (
                    "target",
                    "category",
                    "subset",
                    "positives",
                    "id",
                ):
                    fields[role] = value
            yield place, Entry(fields, place, problems)

    folder = (
        None
        if settings.images is None
        else own.path_on_disk(data_paths.require_dir("huggingface") / settings.images)
    )
    rows = own.normalize_names(
        entries(), folder
    )  # all pictures are known before the first row is looked at
    if folder is not None and files:
        files = own.with_named_images(files, folder, rows)
    once = own.deduplicate(files, where if folder is None else folder)
    return (
        triplets.load_queries(rows, once.files, "huggingface", split, where, problems, once.same),
        once.files,
    )


def _refuse_outside(
    pictures: Iterable[ImageFile], directory: Path | None, problems: Problems
) -> None:
    """Raises ProblemsFound for files that a table names outside of its directory and of the caches
    of `datasets`."""
    from datasets import config
    from huggingface_hub import constants

    folders = [
        Path(config.HF_DATASETS_CACHE),
        Path(constants.HF_HUB_CACHE),
        *([directory] if directory else []),
    ]
    roots = {
        root for folder in folders for root in (os.path.abspath(folder), os.path.realpath(folder))
    }
    way = "Put the pictures into the data directory, or their bytes into the table."
    files = [picture for picture in pictures if isinstance(picture, Path)]
    outside = [
        file
        for file in files
        if not any(Path(os.path.abspath(file)).is_relative_to(root) for root in roots)
    ]
    for file in outside:
        problems.add(file, "is outside of the data directory", way)
    if outside:
        problems.stop()


def load(settings: HuggingFaceSettings, data_paths: DataPaths) -> Dataset:
    """Train, val and test from the splits that `settings` names."""
    tables, allow = Tables(settings, data_paths), settings.allow_missing_images

    def read(split: str) -> tuple[list[tuple[LabeledQueries, dict[ImageId, ImageFile]]], Problems]:
        problems = Problems(
            f"The settings under `data` say what is where in {tables.name}; see docs/datasets.md."
        )
        parts, files = load_queries(settings, tables, split, data_paths, problems)
        if settings.images is None:
            _refuse_outside(files.values(), data_paths.directory, problems)
        return [(part, files) for part in parts], problems

    def load_train() -> TrainSplit:
        parts, problems = read("train")
        return build_train_split(parts, allow, data_paths, problems)

    def load_eval(split: str) -> tuple[EvalSplit, ...]:
        parts, problems = read(split)
        return build_eval_splits(parts, allow, data_paths, problems)

    return Dataset(
        "huggingface", load_train, {split: partial(load_eval, split) for split in ("val", "test")}
    )
