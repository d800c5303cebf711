"""Images by id, drawn or from files, as upright RGB, and the digest that identifies their content.

The only place that knows paths. A file loads as a person would see it (turned as its EXIF says, its first frame,
transparency over white, 16 bits scaled to 8) or raises `BadImage`; nothing is guessed at.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cirloop.types import ImageId, Images, UserError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused: Pillow's own guard against decompression bombs, 256 MiB of RGB."""
MAX_ASPECT = 200
"""Longer side over shorter; Qwen2-VL's image processor takes no more."""

ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""


class BadImage(UserError):
    """A file that is no picture, or not one that can be used."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A picture file's bytes that lie in a table; `where` names the place in messages."""

    where: str
    sha256: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


Picture = Path | Packed


def stamp(picture: Picture) -> tuple[object, ...]:
    """What changes when a picture does: the path, size and time of a file, the digest of packed bytes."""
    if isinstance(picture, Packed):
        return (picture.sha256,)
    stat = picture.stat() if picture.exists() else None
    return (str(picture), stat and stat.st_size, stat and stat.st_mtime_ns)


class DrawnImages:
    """Images drawn on demand: `draw(id)` gives RGB pixels (H, W, 3)."""

    def __init__(self, draw: Callable[[ImageId], npt.NDArray[np.uint8]]) -> None:
        self._draw = draw
        self._digests: dict[ImageId, str] = {}

    def load(self, image: ImageId) -> Image.Image:
        return Image.fromarray(self._draw(image))

    def digest(self, image: ImageId) -> str:
        if image not in self._digests:
            self._digests[image] = hashlib.sha256(self._draw(image).tobytes()).hexdigest()
        return self._digests[image]


class FileImages:
    """Images from files, or packed in a table; the digest is of the file's bytes."""

    def __init__(self, files: Mapping[ImageId, Picture]) -> None:
        self._files = files
        self._digests: dict[ImageId, str] = {}

    def load(self, image: ImageId) -> Image.Image:
        """Raises BadImage, with the image and its file named."""
        try:
            return decode(self._files[image])
        except BadImage as error:
            raise BadImage(f"image {image!r}: {self._files[image]} {error}. Replace the file.") from None

    def digest(self, image: ImageId) -> str:
        picture = self._files[image]
        if isinstance(picture, Packed):
            return picture.sha256
        if image not in self._digests:
            with picture.open("rb") as file:
                self._digests[image] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[image]


class Blanked:
    """The same images as grey pictures of their own sizes: what is left of a query when its reference is taken away."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def load(self, image: ImageId) -> Image.Image:
        return Image.new("RGB", self._images.load(image).size, (128, 128, 128))

    def digest(self, image: ImageId) -> str:
        return hashlib.sha256(f"blank {self._images.digest(image)}".encode()).hexdigest()


def decode(source: Picture) -> Image.Image:
    """The picture of a file, upright RGB. Raises BadImage with what is wrong."""
    path = io.BytesIO(source.read()) if isinstance(source, Packed) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise BadImage(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise BadImage(f"is {width}x{height}, one side more than {MAX_ASPECT} times the other")
                picture.load()
                turned = picture.getexif().get(ORIENTATION, 1) != 1
                return _rgb(ImageOps.exif_transpose(picture) if turned else picture)
    except FileNotFoundError:
        raise BadImage("is not there") from None
    except IsADirectoryError:
        raise BadImage("is a directory") from None
    except PermissionError:
        raise BadImage("may not be read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"has far more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        empty = not path.getbuffer() if isinstance(path, io.BytesIO) else path.stat().st_size == 0
        raise BadImage("is empty" if empty else "is not a picture of a known kind") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # what Pillow's decoders raise
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"cannot be decoded ({error})") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("F", "I"):
        raise BadImage(f"holds 32-bit values (mode {picture.mode}), which have no fixed range")
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture, np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGB", clear.size, (255, 255, 255))
        white.paste(clear, mask=clear.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")
