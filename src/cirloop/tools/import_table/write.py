"""The directory that `--dataset_name jsonl` reads: written aside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from cirloop.artifacts.atomic import write_text
from cirloop.artifacts.fs import remove_tree_quietly, sync_directory, sync_tree
from cirloop.tools.import_table.split import Triple
from cirloop.types import ImageId
from cirloop.validation import ValidationReport

IMAGES = "images"


def check_output(output: Path, images: Path, problems: ValidationReport) -> None:
    """Report an output that is used, or that lies among the images."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        problems.add(f"--output {output}", "is there already and no directory; give another")
    elif output.is_dir() and any(output.iterdir()):
        problems.add(f"--output {output}", "is a directory that holds something; give another")
    if output.resolve().is_relative_to(images.resolve()):
        problems.add(f"--output {output}", "lies in the folder of images; give one outside")


def write(
    output: Path,
    splits: Mapping[str, Sequence[Triple]],
    images: Path,
    copies: Mapping[ImageId, Path] | None,
) -> None:
    """Write a file of lines for each split, and a link to the folder of images or their copies.

    What was begun is removed where the disk refuses.
    """
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        for name, rows in splits.items():
            lines = [json.dumps(row.fields, ensure_ascii=False) for row in rows]
            write_text(aside / f"{name}.jsonl", "\n".join(lines) + "\n")
        if copies is None:
            (aside / IMAGES).symlink_to(images.resolve(), target_is_directory=True)
        else:
            _copy(copies, aside / IMAGES)
        sync_directory(aside)
        aside.replace(output)
    finally:
        remove_tree_quietly(aside)  # renamed, it is not there
    sync_directory(output.parent)


def _copy(files: Mapping[ImageId, Path], folder: Path) -> None:
    for image, file in files.items():
        place = folder / image
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    sync_tree(folder)
