"""Pictures as thumbnails inside the page, up to a limit; a tile says why where there is none."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from markupsafe import Markup
from PIL import Image

from cirloop.report.html.source import Album, clean
from cirloop.types import ImageId, UserError

SIDE = 128
"""Longest side of a thumbnail, in pixels; smaller pictures are not enlarged."""
QUALITY = 82
MAX_BYTES = 8_000_000
"""Of all thumbnails of a page as text. Further tiles say that they are left out."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture of the page, or why there is none. `role` is what it is to the query, `right` frames it."""

    image: str
    source: Markup
    missing: str
    role: str
    note: str = ""
    right: bool = False
    wrong: bool = False

    @property
    def alt(self) -> str:
        return ", ".join(part for part in (self.role, self.image, self.note) if part)


class Thumbnails:
    """Thumbnails by image, made once. Kept from one report of a run to the next."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ImageId], Markup] = {}

    def data(self, album: Album, image: ImageId) -> Markup:
        """A data URI. Raises UserError where the picture cannot be used, OSError and KeyError where it is not there."""
        key = (album.name, image)
        if key not in self._made:
            picture = album.load(image)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=QUALITY, optimize=True, subsampling=0)
            letters = base64.b64encode(out.getvalue()).decode()
            self._made[key] = Markup("data:image/jpeg;base64," + letters)
        return self._made[key]


class Shelf:
    """The pictures of one page, counted."""

    def __init__(self, thumbnails: Thumbnails, max_bytes: int) -> None:
        self._thumbnails, self._max_bytes = thumbnails, max_bytes
        self.asked = self.shown = self.bytes = 0
        self.gone: set[str] = set()

    def tile(
        self, album: Album | None, image: ImageId, role: str, note: str = "", right: bool = False, wrong: bool = False
    ) -> Tile:
        self.asked += 1
        source, missing = Markup(), ""
        if album is None:
            missing = "no data"
        elif self.bytes >= self._max_bytes:
            missing = "left out"
        else:
            try:
                source = self._thumbnails.data(album, image)
            except (UserError, OSError, KeyError):
                missing = "not there"
                self.gone.add(image)
        self.bytes += len(source)
        self.shown += bool(source)
        return Tile(clean(image), source, missing, role, note, right, wrong)
