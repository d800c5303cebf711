"""Pictures and files of one's own data, as people have them: found, spelled one way, and a way out
where they are not.

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
from cirloop.data.folder import UNREAD, image_suffixes, scan_folder
from cirloop.data.images import BadImage, ImageFile, decode, escapes_root
from cirloop.data.names import find_copies, nfc, normalize_name
from cirloop.io import parse
from cirloop.types import ImageId, UserError
from cirloop.validation import Entry, Problems

logger = logging.getLogger(__name__)
LINE = 'One object a line: {"reference": "a.jpg", "text": "the same in red", "target": "b.jpg"}.'
TABLE = (
    "A table (CSV with commas, or Parquet) is read by --dataset_name huggingface, its columns named"
    " by --data.columns.reference, --data.columns.text and --data.columns.target and the folder of"
    " its pictures by --data.images images; docs/datasets.md has an example."
)
LIST = "A JSON list becomes JSON lines by: jq -c '.[]' FILE.json > FILE.jsonl"
TABLES = (".csv", ".tsv", ".parquet", ".xls", ".xlsx")
NOTES = (".json", ".jsonl", ".ndjson", ".txt", *TABLES)
"""Endings of files that people keep triplets in."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """A split's pictures by name, and which names are copies of which."""

    files: dict[ImageId, ImageFile] = field(default_factory=dict)
    same: dict[ImageId, ImageId] = field(default_factory=dict)


def path_on_disk(path: Path) -> Path:
    """The path as the disk has its last part, which may be the same in another Unicode form (NFC,
    NFD)."""
    if path.parent.is_dir() and not path.exists():
        twins = [other for other in path.parent.iterdir() if nfc(other.name) == nfc(path.name)]
        return twins[0] if twins else path
    return path


def images_in_folder(
    folder: Path, follow_links: bool, problems: Problems
) -> dict[ImageId, ImageFile]:
    """Every picture of a folder, by its path in it."""
    if not folder.is_dir():
        others = [f"{place.name!r}" for place in _image_folders(folder.parent)]
        hint = f"; pictures are in {', '.join(others)}" if others else ""
        way = "Name the folder of pictures by --data.images." if others else ""
        problems.add(folder, f"is no directory of pictures (data.images){hint}", way)
        return {}
    seen = scan_folder(folder, follow_links, problems)
    unread = seen.skipped(UNREAD)
    if unread:
        _warn_once(
            f"{folder}: passed over, since they are not read: {unread}. Convert them to JPEG or PNG"
            " to use them"
        )
    rest = seen.skipped(frozenset(seen.others.keys() - UNREAD))
    if rest:
        _info_once(f"{folder}: passed over, no pictures by their names or hidden: {rest}")
    if not seen.files:
        problems.add(folder, f"holds no pictures ({', '.join(sorted(image_suffixes()))})")
    return dict(seen.files)


def _image_folders(directory: Path) -> list[Path]:
    """Folders of a directory that hold pictures, at most ten."""
    if not directory.is_dir():
        return []
    inner = [
        place
        for place in sorted(directory.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    ]
    return [
        place
        for place in inner[:100]
        if any(path.suffix.lower() in image_suffixes() for path in place.rglob("*"))
    ][:10]


def with_named_images(
    files: Mapping[ImageId, ImageFile], folder: Path, entries: Iterable[tuple[str, Entry]]
) -> dict[ImageId, ImageFile]:
    """The pictures of a folder and those that objects name and that are not there, to be found
    missing."""
    names = {ImageId(image) for _, entry in entries for _, image in triplets.named(entry)}
    return {image: folder / image for image in sorted(names) if not escapes_root(image)} | dict(
        files
    )


def deduplicate(files: Mapping[ImageId, ImageFile], where: object) -> Gallery:
    """The same pictures, each once. Those that cannot be used stay, so that each is named."""
    same = {copy: first for copy, first in find_copies(files).items() if _decodes(files[copy])}
    if same:
        copy, first = next(iter(sorted(same.items())))
        _warn_once(
            f"{where}: {len(same):,} of {len(files):,} pictures have the bytes of another one and"
            f" are that one, such as {copy!r}, which is {first!r}"
        )
    return Gallery({image: picture for image, picture in files.items() if image not in same}, same)


def _decodes(picture: ImageFile) -> bool:
    try:
        decode(picture)
    except BadImage:
        return False
    return True


def normalize_names(
    entries: Iterable[tuple[str, Entry]], folder: Path | None
) -> list[tuple[str, Entry]]:
    """The same objects with each picture's name in its one spelling."""
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


def report_missing_file(path: Path, setting: str, problems: Problems) -> None:
    """Note that a split's file is not there, and which other files may be meant."""
    if not path.parent.is_dir():
        problems.add(path, "there is no such file")
        return
    others = [
        p
        for p in sorted(path.parent.iterdir())
        if p.suffix.lower() in NOTES and p.is_file() and p != path
    ]
    twins = [p for p in others if p.stem.casefold() == path.stem.casefold()]
    for twin in twins:
        way = TABLE if twin.suffix.lower() in TABLES else LIST
        problems.add(
            path,
            f"there is no such file, but there is {twin.name!r}{_form(twin)}",
            f"{LINE}\n{way}",
        )
    if twins:
        return
    lines = [p.name for p in others if p.suffix.lower() in (".jsonl", ".ndjson")]
    tables = [p.name for p in others if p.suffix.lower() in TABLES]
    if lines or tables:
        listed = ", ".join(map(repr, (lines or tables)[:10]))
        way = f"Name the file of the split by --{setting} FILE." if lines else TABLE
        problems.add(path, f"there is no such file; in its directory: {listed}", way)
        return
    problems.add(path, "there is no such file", LINE)


def _form(path: Path) -> str:
    try:
        form = parse.other_form(parse.text(path))
    except UserError:
        return ""
    return f", {form}" if form else ""


@cache
def _warn_once(note: str) -> None:
    logger.warning("%s", note)


@cache
def _info_once(note: str) -> None:
    logger.info("%s", note)
