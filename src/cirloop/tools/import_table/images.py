"""The image that a name in a table stands for: as it is written, or under another folder, ending,
case, slash or Unicode form.

A name is never guessed by its letters. One that fits several images fits none.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from cirloop.data.folder import UNSUPPORTED, image_suffixes
from cirloop.data.names import NameMatcher, nfc, normalize_name
from cirloop.types import ImageId

EXACT = "as it is written"
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Match:
    """The image that a name stands for, and how the two differ; or why there is none."""

    image: ImageId | None
    how: str


class ImageFinder:
    """The images of a folder, found by names as people write them."""

    def __init__(self, files: Mapping[ImageId, Path], folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._matcher = NameMatcher(files)
        self._matches: dict[str, Match] = {}

    @cached_property
    def _by_stem(self) -> dict[str, list[ImageId]]:
        by_stem: dict[str, list[ImageId]] = defaultdict(list)
        for image in sorted(self._files):
            by_stem[_parts(image)[-1]].append(image)
        return by_stem

    def find(self, name: str) -> Match:
        """Return the image that `name` stands for."""
        if name not in self._matches:
            self._matches[name] = self._find(name)
        return self._matches[name]

    def _find(self, name: str) -> Match:
        """Return the image that `name` stands for.

        One of the two paths must be the end of the other, without ending, case, and the form of
        slashes and letters. Of several the one that shares most folders counts, then the one with
        the same ending, then the one in the same case.
        """
        normal = ImageId(normalize_name(name, self._folder))
        if normal in self._files:
            return Match(normal, EXACT if normal == name else _difference(name, normal))
        parts = _parts(name)
        fitting = [image for image in self._by_stem.get(parts[-1], []) if _fits(parts, image)]
        closeness = {image: _closeness(name, image) for image in fitting}
        best = [image for image in fitting if closeness[image] == max(closeness.values())]
        if len(best) == 1:
            return Match(best[0], _difference(name, best[0]))
        if best:
            listed = ", ".join(map(repr, best[:SHOWN]))
            return Match(None, f"may be each of {len(best)} images: {listed}")
        similar = self._matcher.suggest(name)
        hint = "" if similar is None else f"; did you mean {similar!r}?"
        return Match(None, f"is no image of {str(self._folder)!r}{hint}")


def _plain(name: str) -> str:
    """Return a name with `/` between folders, without escapes and doubled blanks."""
    return re.sub(r"\s+", " ", unquote(nfc(name)).replace("\\", "/")).strip()


def _suffix(name: str) -> str:
    """Return the ending, where it is one of images."""
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in image_suffixes() | UNSUPPORTED else ""


def _parts(name: str) -> list[str]:
    """Return the folders of a name and its last part without ending, in small letters."""
    plain = unicodedata.normalize("NFKC", _plain(name))
    parts = PurePosixPath(plain.removesuffix(_suffix(plain))).parts
    return [part.casefold().strip() for part in parts if part not in ("/", ".")] or [""]


def _fits(parts: list[str], image: ImageId) -> bool:
    """Return whether one of two paths is the end of the other."""
    own = _parts(image)
    shared = min(len(own), len(parts))
    return own[-shared:] == parts[-shared:]


def _closeness(name: str, image: ImageId) -> tuple[int, bool, bool]:
    shared = min(len(_parts(image)), len(_parts(name)))
    suffix = _suffix(_plain(name)).casefold()
    return shared, suffix == _suffix(image).casefold(), _plain(name).endswith(image)


def _difference(name: str, image: ImageId) -> str:
    """Say what differs between a name and the image it stands for."""
    plain = _plain(name)
    suffixes = (_suffix(plain), _suffix(image))
    stems = [
        PurePosixPath(whole.removesuffix(suffix)).parts
        for whole, suffix in zip((plain, image), suffixes, strict=True)
    ]
    shared = min(map(len, stems))
    same_case = stems[0][-shared:] == stems[1][-shared:]
    other_suffix = suffixes[0].casefold() != suffixes[1].casefold()
    kinds = {
        "slashes": "\\" in name,
        "Unicode form": nfc(name) != name,
        "blanks or escapes": plain != nfc(name).replace("\\", "/"),
        "folder": len(stems[0]) != len(stems[1]),
        "ending": other_suffix,
        "case": not same_case or (not other_suffix and suffixes[0] != suffixes[1]),
    }
    return " and ".join(kind for kind, differs in kinds.items() if differs) or "spelling"
