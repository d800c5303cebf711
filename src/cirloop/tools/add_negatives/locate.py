"""Where the samples of a split lie when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

ENDINGS = (".json", ".jsonl", ".ndjson")
STEMS = ("{split}", "annotations_{split}", "{split}_annotations")
SPLIT_NAMES = (
    *(*STEMS, "samples_{split}", "{split}_samples"),
    *(f"annotations/{stem}" for stem in STEMS),
)
"""Names of a split's own file, without ending, in the image directory or beside it."""
COMMON_NAMES = ("annotations", "samples")
"""Names of a file with all splits."""


def _names(split: str | None) -> list[str]:
    own = [name.format(split=split) for name in SPLIT_NAMES] if split else []
    return [*own, *COMMON_NAMES]


def split_files(image_dir: Path, split: str | None) -> list[Path]:
    """Return the files that are there, in the image directory and then beside it, one of several
    links to a file."""
    files: dict[str, Path] = {}
    for folder in (image_dir, image_dir.absolute().parent):
        for name in _names(split):
            for path in (folder / f"{name}{ending}" for ending in ENDINGS):
                if path.is_file():
                    files.setdefault(os.path.realpath(path), path)
    return [*files.values()]


def looked_at(image_dir: Path, split: str | None) -> str:
    """Return the places in words."""
    names = f"{', '.join(_names(split))}, each with {', '.join(ENDINGS)}"
    return f"{names}, in {image_dir} and in {image_dir.absolute().parent}"


def is_of(path: Path, split: str) -> bool:
    """Whether a file is a split's own by its name."""
    return path.stem in {name.format(split=split).rpartition("/")[2] for name in SPLIT_NAMES}
