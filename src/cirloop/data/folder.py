"""The images of a folder: which files count as images, and which are skipped.

An image is named by its path in the folder, in Unicode NFC. Hidden files and folders, among them
macOS' `._*`, and files without an image's suffix are skipped and counted; every other file must
decode.
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
from cirloop.validation import ValidationReport

UNSUPPORTED = frozenset({".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raw", ".svg"})
"""Suffixes of image formats that are not decoded; such files are skipped with a warning."""


@dataclass(frozen=True, slots=True)
class FolderScan:
    """Images by name, and the skipped files: their number by suffix, and one example of each."""

    files: dict[ImageId, Path] = field(default_factory=dict)
    num_skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skipped(self, suffixes: frozenset[str] | None = None) -> str:
        """Describe the skipped files, such as `2 .heic (a.heic)`; empty where there are none."""
        return ", ".join(
            f"{count:,} {kind} ({self.examples[kind]})"
            for kind, count in sorted(self.num_skipped.items())
            if suffixes is None or kind in suffixes
        )


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the image formats that are decoded here."""
    formats = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in formats.items() if kind in FORMATS and kind in Image.OPEN
    )


def scan_folder(directory: Path, follow_links: bool, problems: ValidationReport) -> FolderScan:
    """List the files below a folder, linked ones too. Each folder is scanned once, so that cyclic
    links end.

    Links to folders are problems unless `follow_links`: one may bring in another tree. Names that
    are not UTF-8, or equal in NFC, are problems too.
    """
    scan = FolderScan()
    scanned_folders = {os.path.realpath(directory)}

    def report_unreadable(error: OSError) -> None:
        problems.add(error.filename, f"cannot be read ({error.strerror})")

    tree = os.walk(directory, followlinks=follow_links, onerror=report_unreadable)
    for parent, folders, names in tree:
        folders[:] = sorted(
            name
            for name in folders
            if _should_enter(Path(parent, name), follow_links, scanned_folders, problems)
        )
        for name in sorted(names):
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if not name.startswith(".") and suffix in image_suffixes():
                _add_file(path, directory, scan.files, problems)
                continue
            kind = "hidden" if name.startswith(".") else suffix or "without an ending"
            scan.num_skipped[kind] += 1
            scan.examples.setdefault(kind, _printable(name))
    return scan


def _printable(name: str | Path) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _add_file(
    path: Path, directory: Path, files: dict[ImageId, Path], problems: ValidationReport
) -> None:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        problems.add(_printable(path), "has a name that is not UTF-8")
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


def _should_enter(
    folder: Path, follow_links: bool, scanned_folders: set[str], problems: ValidationReport
) -> bool:
    """Return whether to scan a folder: not a hidden one, nor one scanned under another name."""
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
    if real in scanned_folders:
        return False
    scanned_folders.add(real)
    return True
