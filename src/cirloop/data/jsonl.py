"""Data of one's own: JSON lines and a folder of pictures.

`train.jsonl`, `val.jsonl` and `test.jsonl` hold one object a line (see `triplets.py`). Images are paths relative to the
picture folder. The gallery is every picture of the folder and all that the lines name, or those of a list, one a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cirloop.data import triplets
from cirloop.data.dataset import Dataset
from cirloop.data.images import Picture, leads_out
from cirloop.data.sources import Sources, eval_splits, train_split
from cirloop.problems import Entry, Problems
from cirloop.types import EvalSplit, ImageId, Judged, TrainSplit

if TYPE_CHECKING:
    from cirloop.data.config import JsonlSettings

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def folder_of_pictures(folder: Path, problems: Problems) -> dict[ImageId, Picture]:
    """Every picture of a folder, by its path in it."""
    if not folder.is_dir():
        problems.add(folder, "is no directory of pictures (data.images)")
        return {}
    found = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURES]
    if not found:
        problems.add(folder, f"holds no pictures ({', '.join(PICTURES)})")
    return {ImageId(path.relative_to(folder).as_posix()): path for path in sorted(found)}


def pictures(directory: Path, settings: JsonlSettings, problems: Problems) -> dict[ImageId, Picture]:
    """The gallery's images and where they are."""
    folder = directory / settings.images
    if settings.gallery is None or not folder.is_dir():
        return folder_of_pictures(folder, problems)
    names = [name for name in problems.lines(directory / settings.gallery) if name]
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            problems.add(directory / settings.gallery, f"{name!r} is there more than once")
        if leads_out(name):
            problems.add(directory / settings.gallery, f"{name!r} is not inside the picture folder")
    return {ImageId(name): folder / name for name in names if not leads_out(name)}


def with_named(
    files: Mapping[ImageId, Picture], folder: Path, entries: Iterable[tuple[str, Entry]]
) -> dict[ImageId, Picture]:
    """The pictures of a folder and those that objects name and that are not there, to be found missing."""
    names = {ImageId(image) for _, entry in entries for _, image in triplets.named(entry)}
    return {image: folder / image for image in sorted(names) if not leads_out(image)} | dict(files)


def judged(
    directory: Path, settings: JsonlSettings, split: str, problems: Problems
) -> tuple[list[Judged], dict[ImageId, Picture]]:
    """The queries of `split`, a part per category if its lines have one, and the pictures."""
    files = pictures(directory, settings, problems)
    path = directory / getattr(settings, split)
    entries = list(problems.json_lines(path))
    if settings.gallery is None and files:
        files = with_named(files, directory / settings.images, entries)
    return triplets.judged(entries, files, "jsonl", split, path, problems), files


def load(settings: JsonlSettings, sources: Sources) -> Dataset:
    """Train, val and test from the files that `settings` names."""
    directory, allow = sources.root("jsonl"), settings.allow_missing_images
    sources = sources.around(directory / settings.images)

    def read(split: str) -> tuple[list[tuple[Judged, dict[ImageId, Picture]]], Problems]:
        problems = Problems(f"Put {split} right under --data_dir {directory}; docs/datasets.md has the form of a line.")
        parts, files = judged(directory, settings, split, problems)
        return [(part, files) for part in parts], problems

    def train() -> TrainSplit:
        parts, problems = read("train")
        return train_split(parts, allow, sources, problems)

    def evaluated(split: str) -> tuple[EvalSplit, ...]:
        parts, problems = read(split)
        return eval_splits(parts, allow, sources, problems)

    return Dataset("jsonl", train, {split: partial(evaluated, split) for split in ("val", "test")})
