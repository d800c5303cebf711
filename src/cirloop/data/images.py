"""Images by id, drawn or from files, as upright RGB, and the digest that identifies their content.

The only place that knows paths. A file loads as a person would see it (turned as its EXIF says, its
first frame, transparency over white, 16 bits scaled to 8) or raises `BadImage`; nothing is guessed
at.
"""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from cirloop.io.parse import LFS
from cirloop.types import ImageId, Images, UserError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused: Pillow's own guard against decompression bombs, 256 MiB of RGB."""
MAX_ASPECT = 200
"""Longer side over shorter; Qwen2-VL's image processor takes no more."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is decoded, by content and not by name. Pillow knows more, among them EPS, for which it
starts Ghostscript."""
NOT_THERE = "is not there"
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
"""Bytes of one text in a PNG, unfolded. Pillow's own bound of 1 MiB refuses pictures with a long
history or workflow in them, which every viewer opens; all texts of a file together stay below
Pillow's 64 MiB."""
ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""


class BadImage(UserError):
    """A file that is no picture, or not one that can be used."""


@dataclass(frozen=True, slots=True)
class InlineImage:
    """A picture file's bytes that lie in a table; `where` names the place in messages."""

    where: str
    sha256: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


ImageFile = Path | InlineImage


def file_signature(picture: ImageFile) -> tuple[object, ...]:
    """What changes when a picture does: the path, size and time of a file, the digest of packed
    bytes."""
    if isinstance(picture, InlineImage):
        return (picture.sha256,)
    try:
        seen = picture.stat()
    except (OSError, ValueError):  # not there, or no name that a file can have
        return (str(picture), None, None)
    return (str(picture), seen.st_size, seen.st_mtime_ns)


def size_or_prefix(picture: ImageFile) -> int | None:
    """Something that equal pictures share and that is quick to tell: a file's bytes. None where
    there is no file."""
    if isinstance(picture, InlineImage):
        return int(picture.sha256[:12], 16)
    try:
        seen = picture.stat()
    except (OSError, ValueError):
        return None
    return seen.st_size if stat.S_ISREG(seen.st_mode) else None


def content_digest(picture: ImageFile) -> str | None:
    """The SHA-256 of a picture's bytes, computed once for a file that does not change; None where
    it cannot be read."""
    if isinstance(picture, InlineImage):
        return picture.sha256
    try:
        seen = picture.stat()
        return _file_digest(picture, seen.st_size, seen.st_mtime_ns, seen.st_ino)
    except (OSError, ValueError):
        return None


@cache
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escapes_root(name: str) -> bool:
    """Whether a name of a picture in annotations could stand for a file outside of its folder."""
    parts = PurePosixPath(name).parts
    return (
        not parts or name.startswith("/") or ".." in parts or any(sign in name for sign in "\0\\")
    )


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

    def __init__(self, files: Mapping[ImageId, ImageFile]) -> None:
        self._files = files
        self._digests: dict[ImageId, str] = {}

    def load(self, image: ImageId) -> Image.Image:
        """Raises BadImage, with the image and its file named."""
        try:
            return decode(self._files[image])
        except BadImage as error:
            raise BadImage(
                f"image {image!r}: {self._files[image]} {error}. Replace the file."
            ) from None

    def digest(self, image: ImageId) -> str:
        picture = self._files[image]
        if isinstance(picture, InlineImage):
            return picture.sha256
        if image not in self._digests:
            seen = picture.stat()
            self._digests[image] = _file_digest(
                picture, seen.st_size, seen.st_mtime_ns, seen.st_ino
            )
        return self._digests[image]


class GreyImages:
    """The same images as grey pictures of their own sizes: what is left of a query when its
    reference is taken away."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def load(self, image: ImageId) -> Image.Image:
        return Image.new("RGB", self._images.load(image).size, (128, 128, 128))

    def digest(self, image: ImageId) -> str:
        return hashlib.sha256(f"blank {self._images.digest(image)}".encode()).hexdigest()


def decode(source: ImageFile) -> Image.Image:
    """The picture of a file, upright RGB. Raises BadImage with what is wrong."""
    path = io.BytesIO(source.read()) if isinstance(source, InlineImage) else source
    try:
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
            raise BadImage(
                "is a directory" if path.is_dir() else "is a pipe or a device, not a file"
            )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the size is checked below
            with Image.open(path, formats=_formats()) as picture:
                _check_size(picture)
                picture.load()
                _check_size(picture)  # some formats say it only now
                turned = picture.getexif().get(ORIENTATION, 1) != 1
                return _rgb(ImageOps.exif_transpose(picture) if turned else picture)
    except FileNotFoundError:
        raise BadImage(NOT_THERE) from None
    except PermissionError:
        raise BadImage("may not be read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"has far more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BadImage(
            _no_picture(path.getvalue() if isinstance(path, io.BytesIO) else path.read_bytes())
        ) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
    ) as error:  # what Pillow's decoders raise
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"cannot be decoded ({getattr(error, 'strerror', None) or error})") from None


def _no_picture(content: bytes) -> str:
    """What the bytes are that are no picture: often what a download left in its place."""
    start = content[:64].lstrip().lower()
    if not content:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return f"is {LFS}"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is not a picture but a web page, which servers send in place of a file that is gone"
    return "is not a picture of a known kind"


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"is {width}x{height}, one side more than {MAX_ASPECT} times the other")


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("F", "I"):
        raise BadImage(f"holds 32-bit values (mode {picture.mode}), which have no fixed range")
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture, np.uint32) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGB", clear.size, (255, 255, 255))
        white.paste(clear, mask=clear.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")
