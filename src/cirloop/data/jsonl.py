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
from cirloop.data.folder import walk
from cirloop.data.images import Picture, leads_out
from cirloop.data.names import spelled
from cirloop.data.paths import Sources, eval_splits, train_split
from cirloop.types import EvalProtocol, EvalSplit, ImageId, Judged, TrainSplit
from cirloop.validation import ValidationReport


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

    def build(self, sources: Sources) -> Dataset:
        return load(self, sources)


def pictures(
    directory: Path, settings: JsonlSettings, problems: ValidationReport
) -> dict[ImageId, Picture]:
    """The gallery's images and where they are."""
    folder = own.on_disk(directory / settings.images)
    if settings.gallery is None or not folder.is_dir():
        return own.folder_of_pictures(folder, settings.allow_symlinks, problems)
    listed = own.on_disk(directory / settings.gallery)
    names = [spelled(name, folder) for name in problems.lines(listed) if name]
    if not names:
        problems.add(listed, "names no images")
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            problems.add(listed, f"{name!r} is there more than once")
        if leads_out(name):
            problems.add(listed, f"{name!r} is not inside the picture folder")
    files = walk(
        folder, settings.allow_symlinks, ValidationReport()
    ).files  # names as the disk has them, which may be NFD
    return {
        ImageId(name): files.get(ImageId(name), folder / name)
        for name in names
        if not leads_out(name)
    }


def judged(
    directory: Path, settings: JsonlSettings, split: str, problems: ValidationReport
) -> tuple[list[Judged], dict[ImageId, Picture]]:
    """The queries of `split`, a part per category if its lines have one, and the pictures."""
    files = pictures(directory, settings, problems)
    path, folder = (
        own.on_disk(directory / getattr(settings, split)),
        own.on_disk(directory / settings.images),
    )
    if not os.path.lexists(path):
        own.missing_file(path, f"data.{split}", problems)
        return [], files
    entries = own.respelled(problems.json_lines(path), folder)
    if settings.gallery is None and files:
        files = own.with_named(files, folder, entries)
    gallery = own.without_copies(files, folder)
    parts = triplets.judged(entries, gallery.files, "jsonl", split, path, problems, gallery.same)
    return parts, gallery.files


def load(settings: JsonlSettings, sources: Sources) -> Dataset:
    """Train, val and test from the files that `settings` names."""
    directory, allow = sources.root("jsonl"), settings.allow_missing_images

    def read(split: str) -> tuple[list[tuple[Judged, dict[ImageId, Picture]]], ValidationReport]:
        problems = ValidationReport(
            f"Put {split} right under --data_dir {directory}; docs/datasets.md has the form of a"
            " line."
        )
        parts, files = judged(directory, settings, split, problems)
        return [(part, files) for part in parts], problems

    def train() -> TrainSplit:
        parts, problems = read("train")
        return train_split(parts, allow, sources, problems)

    def evaluated(split: str) -> tuple[EvalSplit, ...]:
        parts, problems = read(split)
        return eval_splits(parts, allow, sources, problems)

    return Dataset("jsonl", train, {split: partial(evaluated, split) for split in ("val", "test")})
