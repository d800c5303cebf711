"""The pictures that the page shows and takes: small copies by the digest of their content, and
uploads, in memory.

A picture is named to the page by a digest and nothing else, so no request can name a file.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from PIL import Image

from cirloop.data.images import BadImage
from cirloop.tools.search.engine import Engine, Reference, UploadedImage, decode_upload
from cirloop.types import UserError

SIDE = 256
"""Longer side of a picture on the page, in pixels; smaller ones stay as they are."""
KEPT = 2000
"""Small copies in memory, about 10 KB each."""
UPLOADS = 16
"""Uploaded pictures kept, of all who use the page; the one not used for longest goes."""


class Desk:
    """References by key: the digest of a picture of the gallery or of an upload. Threads may share
    it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        images = engine.gallery.images
        self.digests = {image: images.digest(image) for image in engine.gallery.ids}
        self._images = {digest: image for image, digest in reversed(self.digests.items())}
        self._uploads: OrderedDict[str, UploadedImage] = OrderedDict()
        self._small: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, content: bytes) -> str:
        """Return the key of an uploaded picture. Raises UserError for what is none, or too
        large."""
        if not content:
            raise UserError("the uploaded file is empty. Give another picture.")
        made = decode_upload(content, "the uploaded file")
        with self._lock:
            self._uploads[made.digest] = made
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)
        return made.digest

    def reference(self, key: str) -> Reference:
        """Return what has a key. Raises UserError for a key that nothing has, or has no more."""
        with self._lock:
            if key in self._uploads:
                self._uploads.move_to_end(key)
                return self._uploads[key]
        if key not in self._images:
            raise UserError("that picture is not here any more. Choose or upload it again.")
        return self._images[key]

    def small(self, key: str) -> bytes:
        """Return a picture as WebP of at most SIDE. Raises UserError where it is not there or
        cannot be read any more."""
        with self._lock:
            if key in self._small:
                self._small.move_to_end(key)
                return self._small[key]
        found = self.reference(key)
        try:
            picture = (
                found.picture
                if isinstance(found, UploadedImage)
                else self._engine.gallery.images.load(found)
            )
        except BadImage as error:
            raise UserError(str(error)) from None
        out = io.BytesIO()
        copy = picture.copy()
        copy.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        copy.save(out, "WEBP", quality=85)
        with self._lock:
            self._small[key] = out.getvalue()
            while len(self._small) > KEPT:
                self._small.popitem(last=False)
        return out.getvalue()
