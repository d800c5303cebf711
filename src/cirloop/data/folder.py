"""The pictures of a folder: which files are taken for pictures, and what is passed over.

A picture is named by its path in the folder, in Unicode NFC. Hidden files and folders, among them
macOS' `._*`, and files whose names do not end as a picture's do are passed over and counted; every
other file must decode.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from cirloop.data.images import FORMATS
from cirloop.data.names import nfc
from cirloop.types import ImageId
from cirloop.validation import Problems

UNREAD = frozenset({".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raw", ".svg"})
"""Endings of pictures that are not read, and are passed over with a warning."""


@dataclass(frozen=True, slots=True)
class FolderScan:
    """Pictures by name, and what was passed over: how often by ending, and one file of each
    ending."""

    files: dict[ImageId, Path] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skipped(self, suffixes: frozenset[str] | None = None) -> str:
        """What was passed over, such as `2 .heic (a.heic)`; empty where nothing was."""
        wanted = [kind for kind in sorted(self.others) if suffixes is None or kind in suffixes]
        return ", ".join(f"{self.others[kind]:,} {kind} ({self.examples[kind]})" for kind in wanted)


@cache
def image_suffixes() -> frozenset[str]:
    """How the names of pictures end, of the kinds that are decoded here."""
    known = Image.registered_extensions()
    return frozenset(
        ending for ending, kind in known.items() if kind in FORMATS and kind in Image.OPEN
    )


def scan_folder(directory: Path, follow_links: bool, problems: Problems) -> FolderScan:
    """The files below a folder, linked ones too. Each folder is walked once, so that links in a
    circle end.

    Links to folders are problems unless `follow_links`: one may bring in another tree. Names that
    are not UTF-8, or the same in NFC, are problems too.
    """
    folder, seen = FolderScan(), {os.path.realpath(directory)}

    def not_read(error: OSError) -> None:
        problems.add(error.filename, f"cannot be read ({error.strerror})")

    for place, folders, names in os.walk(directory, followlinks=follow_links, onerror=not_read):
        folders[:] = sorted(
            name
            for name in folders
            if _should_enter(Path(place, name), follow_links, seen, problems)
        )
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or path.suffix.lower() not in image_suffixes():
                kind = (
                    "hidden" if name.startswith(".") else path.suffix.lower() or "without an ending"
                )
                folder.others[kind] += 1
                folder.examples.setdefault(
                    kind, os.fsencode(name).decode("utf-8", "backslashreplace")
                )
                continue
            _add_file(path, directory, folder.files, problems)
    return folder


def _add_file(path: Path, directory: Path, files: dict[ImageId, Path], problems: Problems) -> None:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        problems.add(
            os.fsencode(path).decode("utf-8", "backslashreplace"), "has a name that is not UTF-8"
        )
        return
    image = ImageId(nfc(path.relative_to(directory).as_posix()))
    if image in files:
        problems.add(
            path,
            "has the same name as another file but for its Unicode form (NFC, NFD):"
            f" {str(files[image])!r}",
        )
        return
    files[image] = path


def _should_enter(folder: Path, follow_links: bool, seen: set[str], problems: Problems) -> bool:
    """Whether a folder is walked: not a hidden one, nor one that was walked by another name."""
    if folder.name.startswith("."):
        return False
    real = os.path.realpath(folder)
    if folder.is_symlink() and not follow_links:
        problems.add(
            folder,
            f"is a link to a folder: {real}",
            "Let links to folders be followed by --allow_symlinks.",
        )
        return False
    if real in seen:
        return False
    seen.add(real)
    return True
