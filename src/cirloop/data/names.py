"""Names of pictures: one spelling of each, one name for files of equal bytes, and the name that a
wrong one is like."""

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

from cirloop.data.images import ImageFile, content_digest, size_or_prefix
from cirloop.types import ImageId

MAX_COMPARED = 5_000
"""Names that a misspelt one is compared with letter by letter."""


def nfc(name: str) -> str:
    """The name in Unicode NFC: `é` is one character, however a file system or an editor writes
    it."""
    return unicodedata.normalize("NFC", name)


def normalize_name(name: str, folder: Path | None = None) -> str:
    """The one spelling of a picture's name: NFC, without `.`, `..`, `//` and the path of `folder`
    before it.

    A name that leads out of the folder stays as it is, for the caller to refuse.
    """
    plain = nfc(name)
    if folder is None or not plain.strip() or "\0" in plain:
        return plain
    here = nfc(os.path.abspath(folder))
    path = PurePosixPath(posixpath.normpath(posixpath.join(here, plain)))
    for root in (here, nfc(os.path.realpath(folder))):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return plain


def find_copies(files: Mapping[ImageId, ImageFile]) -> dict[ImageId, ImageId]:
    """Pictures whose bytes are those of another one, and the first name (sorted) of these bytes."""
    sizes: dict[object, list[ImageId]] = defaultdict(list)
    for image, picture in files.items():
        size = size_or_prefix(picture)
        if size is not None:
            sizes[size].append(image)
    first: dict[str, ImageId] = {}
    same: dict[ImageId, ImageId] = {}
    for image in sorted(image for group in sizes.values() if len(group) > 1 for image in group):
        digest = content_digest(files[image])
        if digest is None:
            continue
        if first.setdefault(digest, image) != image:
            same[image] = first[digest]
    return same


class NameMatcher:
    """Finds, for a name that no picture has, the one that is meant: another prefix, ending, case,
    slash or escape."""

    def __init__(self, names: Iterable[str]) -> None:
        self._given = names

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._given)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            by_stem[_parts(name)[-1]].append(name)
        return by_stem

    def suggest(self, name: str) -> str | None:
        """The picture that a name most likely stands for; None where none or several do."""
        parts = _parts(name)
        candidates = self._by_stem.get(parts[-1], []) if parts else []
        likeness = {
            other: (_shared(parts, _parts(other)), _stem(name) == _stem(other))
            for other in candidates
        }
        if likeness:
            best = max(likeness.values())
            nearest = [other for other in candidates if likeness[other] == best]
            return nearest[0] if len(nearest) == 1 else None
        if len(self._names) > MAX_COMPARED:
            return None
        return next(iter(difflib.get_close_matches(name, self._names, 1, 0.85)), None)


def _parts(name: str) -> list[str]:
    """The folders and the stem of a name, in small letters."""
    path = PurePosixPath(unicodedata.normalize("NFKC", unquote(name)).casefold().replace("\\", "/"))
    return [*path.parts[:-1], path.stem.strip()] if path.parts else [""]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _shared(one: list[str], other: list[str]) -> int:
    """How many last parts are the same."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
