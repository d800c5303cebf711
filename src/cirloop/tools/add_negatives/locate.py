"""Where the samples of a split lie when nobody says, and where the result goes then."""

from __future__ import annotations

import os
from pathlib import Path

ENDINGS = (".json", ".jsonl", ".ndjson")
SPLIT_NAMES = (
    "{split}",
    "annotations_{split}",
    "{split}_annotations",
    "samples_{split}",
    "{split}_samples",
    "annotations/{split}",
    "annotations/annotations_{split}",
    "annotations/{split}_annotations",
)
"""Names of a split's own file, without ending, in the picture directory or beside it."""
COMMON_NAMES = ("annotations", "samples")
"""Names of a file with all splits."""


def places(image_dir: Path, split: str | None) -> list[Path]:
    """Every path that is looked at: in the picture directory, then beside it."""
    names = [name.format(split=split) for name in SPLIT_NAMES] if split else []
    folders = (image_dir, image_dir.absolute().parent)
    return [
        folder / f"{name}{end}"
        for folder in folders
        for name in (*names, *COMMON_NAMES)
        for end in ENDINGS
    ]


def split_files(image_dir: Path, split: str | None) -> list[Path]:
    """Return the files that are there, one of several links to a file."""
    files: dict[str, Path] = {}
    for path in places(image_dir, split):
        if path.is_file():
            files.setdefault(os.path.realpath(path), path)
    return [*files.values()]


def result_beside(annotations: Path) -> Path:
    """Return the result's file beside the annotations."""
    return annotations.with_name(f"{annotations.stem}_with_negatives.json")


def looked_at(image_dir: Path, split: str | None) -> str:
    """Return the places in words."""
    names = [name.format(split=split) for name in SPLIT_NAMES] if split else []
    stems = ", ".join((*names, *COMMON_NAMES))
    return (
        f"{stems}, each with {', '.join(ENDINGS)}, in {image_dir} and in"
        f" {image_dir.absolute().parent}"
    )


def is_of(path: Path, split: str) -> bool:
    """Whether a file is a split's own by its name."""
    return path.stem in {name.format(split=split).rpartition("/")[2] for name in SPLIT_NAMES}
