"""Data of one's own: JSON lines and a folder of pictures.

`train.jsonl`, `val.jsonl` and `test.jsonl` hold one object a line (see `triplets.py`). Images are
paths relative to the picture folder, in any spelling; files of equal bytes are one image. The
gallery is every picture of the folder and all that the lines name, or those of a list, one a line.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from cirloop.data import own, triplets
from cirloop.data.dataset import Dataset, FileSettings
from cirloop.data.folder import scan_folder
from cirloop.data.images import ImageFile, escapes_root
from cirloop.data.names import normalize_name
from cirloop.data.paths import DataPaths, build_eval_splits, build_train_split
from cirloop.types import EvalProtocol, EvalSplit, ImageId, LabeledQueries, TrainSplit
from cirloop.validation import Problems


class JsonlSettings(FileSettings):
    """Your own triplets as JSON lines, with a folder of pictures."""

    type: Literal["jsonl"] = "jsonl"
    protocol: ClassVar[EvalProtocol] = triplets.PROTOCOL
    train: str = "train.jsonl"
    """Files under --data_dir."""
    val: str = "val.jsonl"
    """Evaluated after each iteration."""
    test: str = "test.jsonl"
    """Evaluated on request."""
    images: str = "images"
    """The folder of pictures; images are named by their path in it."""
    gallery: str | None = None
    """A file with one image a line; by default the gallery is every picture of the folder."""
    allow_symlinks: bool = False
    """Follow links to folders among the pictures; links to files are always followed."""

    def build(self, data_paths: DataPaths) -> Dataset:
        return load(self, data_paths)


def pictures(
    directory: Path, settings: JsonlSettings, problems: Problems
) -> dict[ImageId, ImageFile]:
    """The gallery's images and where they are."""
    folder = own.path_on_disk(directory / settings.images)
    if settings.gallery is None or not folder.is_dir():
        return own.images_in_folder(folder, settings.allow_symlinks, problems)
    listed = own.path_on_disk(directory / settings.gallery)
    names = [normalize_name(name, folder) for name in problems.lines(listed) if name]
    if not names:
        problems.add(listed, "names no images")
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            problems.add(listed, f"{name!r} is there more than once")
        if escapes_root(name):
            problems.add(listed, f"{name!r} is not inside the picture folder")
    files = scan_folder(
        folder, settings.allow_symlinks, Problems()
    ).files  # names as the disk has them, which may be NFD
    return {
        ImageId(name): files.get(ImageId(name), folder / name)
        for name in names
        if not escapes_root(name)
    }


def load_queries(
    directory: Path, settings: JsonlSettings, split: str, problems: Problems
) -> tuple[list[LabeledQueries], dict[ImageId, ImageFile]]:
    """The queries of `split`, a part per category if its lines have one, and the pictures."""
    files = pictures(directory, settings, problems)
    path, folder = (
        own.path_on_disk(directory / getattr(settings, split)),
        own.path_on_disk(directory / settings.images),
    )
    if not os.path.lexists(path):
        own.report_missing_file(path, f"data.{split}", problems)
        return [], files
    entries = own.normalize_names(problems.json_lines(path), folder)
    if settings.gallery is None and files:
        files = own.with_named_images(files, folder, entries)
    gallery = own.deduplicate(files, folder)
    parts = triplets.load_queries(
        entries, gallery.files, "jsonl", split, path, problems, gallery.same
    )
    return parts, gallery.files


def load(settings: JsonlSettings, data_paths: DataPaths) -> Dataset:
    """Train, val and test from the files that `settings` names."""
    directory, allow = data_paths.require_dir("jsonl"), settings.allow_missing_images

    def read(split: str) -> tuple[list[tuple[LabeledQueries, dict[ImageId, ImageFile]]], Problems]:
        problems = Problems(
            f"Put {split} right under --data_dir {directory}; docs/datasets.md has the form of a"
            " line."
        )
        parts, files = load_queries(directory, settings, split, problems)
        return [(part, files) for part in parts], problems

    def load_train() -> TrainSplit:
        parts, problems = read("train")
        return build_train_split(parts, allow, data_paths, problems)

    def load_eval(split: str) -> tuple[EvalSplit, ...]:
        parts, problems = read(split)
        return build_eval_splits(parts, allow, data_paths, problems)

    return Dataset(
        "jsonl", load_train, {split: partial(load_eval, split) for split in ("val", "test")}
    )
