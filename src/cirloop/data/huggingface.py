"""A user's own data in Hugging Face `datasets`: a hub name, a directory of `save_to_disk`, or a
folder of Parquet, JSON or CSV that `load_dataset` reads.

Each row is a triplet; `columns` say which column is which (see `triplets.py`). Reference and target
are images (then a split's gallery is all images of its rows, an image's id the start of its bytes'
SHA-256), or names of images, which lie in a gallery table or in a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from cirloop.config.base import Settings
from cirloop.data import own, triplets
from cirloop.data.images import ImageFile, InlineImage
from cirloop.data.names import nfc
from cirloop.data.paths import DataPaths
from cirloop.data.splits import FileSettings, QueryFiles, ReadSplit
from cirloop.data.tables import COLUMNS, ImageCell, Table, Tables
from cirloop.types import EvalProtocol, ImageId, LabeledQueries
from cirloop.validation import Entry, ValidationReport

logger = logging.getLogger(__name__)
ROLES = ("reference", "target")
OPTIONAL = ("target", "category", "subset", "positives", "id")
"""Columns whose empty cells are left out."""
ID_LENGTH = 20
"""Hex digits of an image's SHA-256 in its id."""


class Columns(Settings):
    """Which column of a table is what; None = there is none."""

    reference: str = "reference"
    """Images, or names of images."""
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
    """A table of the same data set that holds the images."""

    split: str
    """The split that holds the images."""
    name: str | None = None
    """Its configuration, where the data set has several."""
    id: str = "id"
    """The column with the names that rows use."""
    image: str = "image"
    """Columns: the name that rows use, and the image."""


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
    """Where images that rows name are."""
    images: str | None = None
    """Or the folder of them under --data_dir."""
    allow_symlinks: bool = False
    """Follow links to folders among the images; links to files are always followed."""

    def reader(self, data_paths: DataPaths) -> ReadSplit:
        return partial(_read, self, Tables(self, data_paths), data_paths)


def _read(
    settings: HuggingFaceSettings, tables: Tables, data_paths: DataPaths, split: str
) -> tuple[QueryFiles, ValidationReport]:
    problems = ValidationReport(
        f"The settings under `data` say what is where in {tables.name}; see docs/datasets.md."
    )
    parts, files = load_queries(settings, tables, split, data_paths, problems)
    if settings.images is None:
        _refuse_outside(files.values(), data_paths.directory, problems)
    return [(part, files) for part in parts], problems


def holds_images(table: Table, column: str) -> bool:
    import datasets

    return isinstance(table.features[column], datasets.Image)


def image_of_cell(
    table: Table, row: int, column: str, cell: ImageCell | None, name: str
) -> ImageFile | None:
    """Return the image of a cell: its bytes in the table, or the file it points to; None for an
    empty cell."""
    if cell is None:
        return None
    content = cell["bytes"]
    if content is None:
        return Path(cell["path"]) if cell["path"] else None

    def read() -> bytes:
        stored: bytes = table[row][column]["bytes"]
        return stored

    return InlineImage(f"{name} row {row} {column}", hashlib.sha256(content).hexdigest(), read)


def _id(file: ImageFile) -> ImageId:
    if isinstance(file, InlineImage):
        return ImageId(file.sha256[:ID_LENGTH])
    content = file.read_bytes() if file.is_file() else str(file).encode()
    return ImageId(hashlib.sha256(content).hexdigest()[:ID_LENGTH])


def image_folder(settings: HuggingFaceSettings, data_paths: DataPaths) -> Path | None:
    """Return the folder of images that rows name, where the settings have one."""
    if settings.images is None:
        return None
    return own.path_on_disk(data_paths.require_dir("huggingface") / settings.images)


def _gallery_files(
    settings: HuggingFaceSettings, folder: Path | None, tables: Tables, problems: ValidationReport
) -> dict[ImageId, ImageFile] | None:
    """Return the images that rows name, from the folder or the gallery table; None without both."""
    if folder is not None:
        return own.images_in_folder(folder, settings.allow_symlinks, problems)
    if settings.gallery is not None:
        return gallery_table_files(settings.gallery, tables, problems)
    return None


def gallery_table_files(
    gallery: GalleryTable, tables: Tables, problems: ValidationReport
) -> dict[ImageId, ImageFile]:
    """Return the images of the gallery table by the names that rows use."""
    table = tables.split(gallery.split, problems, gallery.name)
    where = f"{tables.name} {gallery.split}"
    columns = (gallery.id, gallery.image)
    if table is None or _lacks(table, columns, where, problems):
        return {}
    if not holds_images(table, gallery.image):
        problems.add(where, f"data.gallery.image: the column {gallery.image!r} holds no images")
        return {}
    files: dict[ImageId, ImageFile] = {}
    for row, cells in enumerate(table.select_columns([*columns])):
        image = ImageId(nfc(str(cells[gallery.id])))
        file = image_of_cell(table, row, gallery.image, cells[gallery.image], where)
        if image in files:
            problems.add(f"{where} row {row}", f"the id {image!r} is there more than once")
        if file is None:
            problems.add(f"{where} row {row}", f"{gallery.image!r} is empty")
        else:
            files[image] = file
    return files


def _lacks(table: Table, columns: Iterable[str], where: str, problems: ValidationReport) -> bool:
    missing = [column for column in columns if column not in table.column_names]
    for column in missing:
        names = ", ".join(table.column_names)
        problems.add(where, f"has no column {column!r}; there are: {names}", COLUMNS)
    return bool(missing)


def load_queries(
    settings: HuggingFaceSettings,
    tables: Tables,
    split: str,
    data_paths: DataPaths,
    problems: ValidationReport,
) -> tuple[list[LabeledQueries], dict[ImageId, ImageFile]]:
    """Read the queries of `split` and the image files of its gallery."""
    name = getattr(settings, split)
    where = f"{tables.name} {name}"
    table = tables.split(name, problems)
    all_columns = settings.columns.model_dump()
    columns = {role: column for role, column in all_columns.items() if column is not None}
    if table is None or _lacks(table, columns.values(), where, problems):
        return [], {}
    folder = image_folder(settings, data_paths)
    gallery = _gallery_files(settings, folder, tables, problems)
    image_roles = [role for role in ROLES if role in columns]
    inline_roles = [role for role in image_roles if holds_images(table, columns[role])]
    if gallery is None and len(inline_roles) < len(image_roles):
        problems.add(
            where,
            "names its images, so say where they are: data.gallery (a table) or data.images (a"
            " folder)",
            "Give the folder under --data_dir by --data.images images.",
        )
        return [], {}
    if gallery is not None and inline_roles:
        problems.add(
            where,
            f"holds its images in {', '.join(inline_roles)}; leave data.gallery and"
            " data.images out",
        )
    files = dict(gallery or {})
    entries = _entries(table, columns, inline_roles, where, files, problems)
    # `normalize_names` reads all rows, and so adds all inline images to `files`
    rows = own.normalize_names(entries, folder)
    if folder is not None and files:
        files = own.with_named_images(files, folder, rows)
    unique = own.deduplicate(files, where if folder is None else folder)
    parts = triplets.load_queries(
        rows, unique.files, "huggingface", split, where, problems, unique.copy_of
    )
    return parts, unique.files


def _entries(
    table: Table,
    columns: Mapping[str, str],
    inline_roles: Sequence[str],
    where: str,
    files: dict[ImageId, ImageFile],
    problems: ValidationReport,
) -> Iterator[tuple[str, Entry]]:
    """Yield each row as an entry, and add its inline images to `files`."""
    for row, cells in enumerate(table.select_columns(list(dict.fromkeys(columns.values())))):
        place = f"{where} row {row}"
        fields: dict[str, object] = {}
        for role, column in columns.items():
            value = cells[column]
            if role in inline_roles:
                file = image_of_cell(table, row, column, value, where)
                if file is not None:
                    value = _id(file)
                    files.setdefault(value, file)
            elif role in ROLES or role == "id":
                value = str(value) if isinstance(value, int) else value
            elif role == "text" and isinstance(value, list):
                role = "texts"
            if value is not None or role not in OPTIONAL:
                fields[role] = value
        yield place, Entry(fields, place, problems)


def _refuse_outside(
    files: Iterable[ImageFile], directory: Path | None, problems: ValidationReport
) -> None:
    """Refuse files that a table names outside of its directory and of the caches of `datasets`.

    Raises ProblemsFound.
    """
    from datasets import config
    from huggingface_hub import constants

    folders = [Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]
    if directory is not None:
        folders.append(directory)
    roots = {os.path.abspath(folder) for folder in folders}
    roots |= {os.path.realpath(folder) for folder in folders}
    outside = [file for file in files if isinstance(file, Path) and not _is_inside(file, roots)]
    for file in outside:
        problems.add(
            file,
            "is outside of the data directory",
            "Put the images into the data directory, or their bytes into the table.",
        )
    if outside:
        problems.raise_if_any()


def _is_inside(file: Path, roots: Iterable[str]) -> bool:
    return any(Path(os.path.abspath(file)).is_relative_to(root) for root in roots)
