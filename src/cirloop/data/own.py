"""Images and files of a user's own data: one spelling of each name, one image for equal bytes, and
hints for what is missing.

Shared by `jsonl` and `huggingface`. Files of equal bytes are one image, by the first of their
names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cirloop.data import triplets
from cirloop.data.folder import UNSUPPORTED, image_suffixes, scan_folder
from cirloop.data.images import BadImage, ImageFile, decode, escapes_root
from cirloop.data.names import find_copies, nfc, normalize_name
from cirloop.data.splits import warn_once
from cirloop.io import parse
from cirloop.types import ImageId, UserError
from cirloop.validation import Entry, ValidationReport

logger = logging.getLogger(__name__)
LINE = 'One object a line: {"reference": "a.jpg", "text": "the same in red", "target": "b.jpg"}.'
TABLE = (
    "A table (CSV, Excel, Parquet, JSON) becomes these files, its columns and images found by usual"
    " names, by: cirloop import FILE --images FOLDER --val 0.2 --output DIR (docs/own-data.md)."
)
SPLIT = (
    "One file is split by reference by: cirloop import FILE --images FOLDER --val 0.2 --output DIR"
    " (docs/own-data.md)."
)
TABLES = (".csv", ".tsv", ".parquet", ".xls", ".xlsx")
TRIPLET_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", *TABLES)
"""Suffixes of files that people keep triplets in."""


@dataclass(frozen=True, slots=True)
class UniqueImages:
    """A split's images by name, each once, and the image that stands for each copy."""

    files: dict[ImageId, ImageFile] = field(default_factory=dict)
    copy_of: dict[ImageId, ImageId] = field(default_factory=dict)


def path_on_disk(path: Path) -> Path:
    """Return the path with its last part as the disk spells it, in whichever Unicode form (NFC,
    NFD)."""
    if path.parent.is_dir() and not path.exists():
        twins = [other for other in path.parent.iterdir() if nfc(other.name) == nfc(path.name)]
        return twins[0] if twins else path
    return path


def images_in_folder(
    folder: Path, follow_links: bool, problems: ValidationReport
) -> dict[ImageId, ImageFile]:
    """List every image of a folder, by its path in it."""
    if not folder.is_dir():
        image_folders = ", ".join(f"{path.name!r}" for path in _image_folders(folder.parent))
        hint = f"; images are in {image_folders}" if image_folders else ""
        remedy = "Name the folder of images by --data.images." if image_folders else ""
        problems.add(folder, f"is no directory of images (data.images){hint}", remedy)
        return {}
    scan = scan_folder(folder, follow_links, problems)
    unsupported = scan.skipped(UNSUPPORTED)
    if unsupported:
        warn_once(
            f"{folder}: passed over, since they are not read: {unsupported}. Convert them to JPEG"
            " or PNG to use them"
        )
    not_images = scan.skipped(frozenset(scan.num_skipped.keys() - UNSUPPORTED))
    if not_images:
        _info_once(f"{folder}: passed over, no images by their names or hidden: {not_images}")
    if not scan.files:
        problems.add(folder, f"holds no images ({', '.join(sorted(image_suffixes()))})")
    return dict(scan.files)


def _image_folders(directory: Path) -> list[Path]:
    """List the folders of a directory that hold images, at most ten."""
    if not directory.is_dir():
        return []
    folders = [
        path
        for path in sorted(directory.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]
    return [folder for folder in folders[:100] if _holds_images(folder)][:10]


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in image_suffixes() for path in folder.rglob("*"))


def with_named_images(
    files: Mapping[ImageId, ImageFile], folder: Path, entries: Iterable[tuple[str, Entry]]
) -> dict[ImageId, ImageFile]:
    """Add the images that entries name and the folder lacks, so that the check reports them."""
    names = {ImageId(image) for _, entry in entries for _, image in triplets.named_images(entry)}
    return {image: folder / image for image in sorted(names) if not escapes_root(image)} | dict(
        files
    )


def deduplicate(files: Mapping[ImageId, ImageFile], where: object) -> UniqueImages:
    """Keep one image of equal ones. Undecodable ones stay, so that the check names each."""
    copies = find_copies(files)
    copy_of = {copy: first for copy, first in copies.items() if _decodes(files[copy])}
    if copy_of:
        copy, first = min(copy_of.items())
        warn_once(
            f"{where}: {len(copy_of):,} of {len(files):,} images have the bytes of another one"
            f" and are that one, such as {copy!r}, which is {first!r}"
        )
    unique = {image: file for image, file in files.items() if image not in copy_of}
    return UniqueImages(unique, copy_of)


def _decodes(file: ImageFile) -> bool:
    try:
        decode(file)
    except BadImage:
        return False
    return True


def normalize_names(
    entries: Iterable[tuple[str, Entry]], folder: Path | None
) -> list[tuple[str, Entry]]:
    """Give each image's name in the entries its one spelling."""
    rows = list(entries)
    for _, entry in rows:
        for role in ("reference", "target", *triplets.LISTS):
            value = entry.fields.get(role)
            if isinstance(value, str):
                entry.fields[role] = normalize_name(value, folder)
            elif isinstance(value, list):
                entry.fields[role] = [
                    normalize_name(name, folder) if isinstance(name, str) else name
                    for name in value
                ]
    return rows


def report_missing_file(path: Path, setting: str, problems: ValidationReport) -> None:
    """Report that a split's file is missing, and which other files may be meant."""
    if not path.parent.is_dir():
        problems.add(path, "there is no such file")
        return
    siblings = sorted(path.parent.iterdir())
    triplet_files = [
        p for p in siblings if p.suffix.lower() in TRIPLET_SUFFIXES and p.is_file() and p != path
    ]
    twins = [p for p in triplet_files if p.stem.casefold() == path.stem.casefold()]
    for twin in twins:
        problems.add(
            path,
            f"there is no such file, but there is {twin.name!r}{_form(twin)}",
            f"{LINE}\n{TABLE}",
        )
    if twins:
        return
    lines = [p.name for p in triplet_files if p.suffix.lower() in (".jsonl", ".ndjson")]
    tables = [p.name for p in triplet_files if p.suffix.lower() in TABLES]
    if lines or tables:
        listed = ", ".join(map(repr, (lines or tables)[:10]))
        remedy = f"Name the file of the split by --{setting} FILE. {SPLIT}" if lines else TABLE
        problems.add(path, f"there is no such file; in its directory: {listed}", remedy)
        return
    problems.add(path, "there is no such file", LINE)


def _form(path: Path) -> str:
    try:
        form = parse.detect_format(parse.read_text(path))
    except UserError:
        return ""
    return f", {form}" if form else ""


def refuse_unread(data_set: str, data_dir: Path | None) -> None:
    """Raise UserError for a directory that `shapes`, which is drawn, would not read."""
    if data_dir is not None and data_set == "shapes":
        raise UserError(
            f"--data_dir {data_dir}: the data set is `shapes`, which is drawn and reads no"
            f" files. {how_to_start(data_dir)}"
        )


def how_to_start(place: Path) -> str:
    """Say how a run starts on the user's own data in `place`, a directory or a file."""
    folder = place if place.is_dir() else place.parent
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    lines = [file for file in files if file.name == "train.jsonl"]
    if lines and place.is_dir():
        return (
            f"It holds train.jsonl: give --dataset_name jsonl, or --config with settings for your"
            f" GPU, made by: cirloop init --data_dir {place} --gpu_memory 24 --output own.yaml"
        )
    tables = [file for file in files if file.suffix.lower() in TABLES]
    table = place if place.is_file() else next(iter(tables), None)
    images = next(iter(_image_folders(folder)), None) if table else None
    return (
        "Name a benchmark that lies there by --dataset_name. Triplets of your own begin with a"
        f" table: cirloop import {table or 'triplets.csv'} --images {images or 'photos'} --val 0.2"
        " --output own; then: cirloop train --dataset_name jsonl --data_dir own (docs/own-data.md)"
    )


@cache
def _info_once(note: str) -> None:
    logger.info("%s", note)
