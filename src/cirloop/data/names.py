"""Names of images: one spelling of each, one name for files of equal bytes, and the existing name
that a wrong one most likely stands for."""

from __future__ import annotations

import difflib
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from cirloop.data.images import ImageFile, content_digest, quick_hash
from cirloop.types import ImageId

MAX_COMPARED = 5_000
"""Names that a misspelt one is compared with letter by letter."""


def nfc(name: str) -> str:
    """Return the name in Unicode NFC: `é` is one character, however a file system writes it."""
    return unicodedata.normalize("NFC", name)


def normalize_name(name: str, folder: Path | None = None) -> str:
    """Return an image's name in NFC, without `.`, `..`, `//` and the path of `folder` before it.

    A name that leads out of the folder stays as it is, for the caller to refuse.
    """
    composed = nfc(name)
    if folder is None or not composed.strip() or "\0" in composed:
        return composed
    roots = [nfc(os.path.abspath(folder)), nfc(os.path.realpath(folder))]
    return name_below(posixpath.join(roots[0], composed), roots) or composed


def name_below(path: str, roots: Iterable[str]) -> str | None:
    """Return an absolute path as a name below the first of `roots` that it is below; None where it
    is below none."""
    normal = PurePosixPath(posixpath.normpath(path))
    below = (normal.relative_to(root).as_posix() for root in roots if normal.is_relative_to(root))
    return next(below, None)


def find_copies(files: Mapping[ImageId, ImageFile]) -> dict[ImageId, ImageId]:
    """Map images whose bytes are those of another one to the first name (sorted) of these bytes."""
    by_hash: dict[int, list[ImageId]] = defaultdict(list)
    for image, file in files.items():
        key = quick_hash(file)
        if key is not None:
            by_hash[key].append(image)
    first: dict[str, ImageId] = {}
    copy_of: dict[ImageId, ImageId] = {}
    for image in sorted(image for group in by_hash.values() if len(group) > 1 for image in group):
        try:
            digest = content_digest(files[image])
        except (OSError, ValueError):
            continue
        if first.setdefault(digest, image) != image:
            copy_of[image] = first[digest]
    return copy_of


class NameMatcher:
    """Search for the image that a wrong name stands for: another prefix, suffix, case, slash or
    escape."""

    def __init__(self, names: Iterable[str]) -> None:
        self._all_names = names

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._all_names)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            by_stem[_parts(name)[-1]].append(name)
        return by_stem

    def suggest(self, name: str) -> str | None:
        """Return the image that a name most likely stands for; None where none or several fit."""
        parts = _parts(name)
        candidates = self._by_stem.get(parts[-1], []) if parts else []
        similarity = {
            other: (_common_suffix(parts, _parts(other)), _stem(name) == _stem(other))
            for other in candidates
        }
        if similarity:
            highest = max(similarity.values())
            nearest = [other for other in candidates if similarity[other] == highest]
            return nearest[0] if len(nearest) == 1 else None
        if len(self._names) > MAX_COMPARED:
            return None
        return next(iter(difflib.get_close_matches(name, self._names, 1, 0.85)), None)


def _parts(name: str) -> list[str]:
    """Return the folders and the stem of a name, in small letters."""
    path = PurePosixPath(unicodedata.normalize("NFKC", unquote(name)).casefold().replace("\\", "/"))
    return [*path.parts[:-1], path.stem.strip()] if path.parts else [""]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _common_suffix(first: list[str], second: list[str]) -> int:
    """Count the last parts that are the same."""
    count = 0
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            break
        count += 1
    return count
