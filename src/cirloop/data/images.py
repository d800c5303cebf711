"""Images by id, drawn or from files, as upright RGB, and the digest that identifies their content.

This module alone decodes image files. A file loads as a viewer shows it (rotated by its EXIF tag,
its first frame, transparency over white, 16 bits scaled to 8) or raises `BadImage`.
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
"""Pixels of the largest image that is decoded: Pillow's own guard against decompression bombs,
256 MiB of RGB."""
MAX_ASPECT = 200
"""Largest ratio of the longer to the shorter side; Qwen2-VL's image processor takes no more."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats that are decoded, by content and not by name. Pillow knows more, among them EPS, for
which it starts Ghostscript."""
NOT_THERE = "is not there"
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
# Bytes of one decompressed PNG text. Pillow's own bound of 1 MiB refuses images with a long editing
# history, which every viewer opens; all texts of a file together stay below Pillow's 64 MiB.
ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)
"""Exceptions of Pillow's decoders."""


class BadImage(UserError):
    """A file that is no image, or not one that can be used."""


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image file's bytes inside a table; `where` names the cell in messages."""

    where: str
    sha256: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


ImageFile = Path | InlineImage


def file_signature(image: ImageFile) -> tuple[object, ...]:
    """Return values that change when the image does: a file's path, size and time, or the digest
    of inline bytes."""
    if isinstance(image, InlineImage):
        return (image.sha256,)
    try:
        status = image.stat()
    except (OSError, ValueError):  # missing, or no name that a file can have
        return (str(image), None, None)
    return (str(image), status.st_size, status.st_mtime_ns)


def quick_hash(image: ImageFile) -> int | None:
    """Return a number that equal images share and that needs no reading: a file's size. None where
    there is no file."""
    if isinstance(image, InlineImage):
        return int(image.sha256[:12], 16)
    try:
        status = image.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def content_digest(image: ImageFile) -> str:
    """Return the SHA-256 of an image's bytes, computed once for a file that does not change.

    Raises OSError or ValueError where the file cannot be read.
    """
    if isinstance(image, InlineImage):
        return image.sha256
    status = image.stat()
    return _file_digest(image, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escapes_root(name: str) -> bool:
    """Return whether an image's name in annotations could stand for a file outside its folder."""
    parts = PurePosixPath(name).parts
    return not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name


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
    """Images from files or inside a table; the digest is of the file's bytes."""

    def __init__(self, files: Mapping[ImageId, ImageFile]) -> None:
        self._files = files
        self._digests: dict[ImageId, str] = {}

    def load(self, image: ImageId) -> Image.Image:
        """Decode an image. Raises BadImage with the image and its file named."""
        try:
            return decode(self._files[image])
        except BadImage as error:
            raise BadImage(
                f"image {image!r}: {self._files[image]} {error}. Replace the file."
            ) from None

    def digest(self, image: ImageId) -> str:
        if image not in self._digests:
            self._digests[image] = content_digest(self._files[image])
        return self._digests[image]


class GreyImages:
    """Uniformly grey images of the sizes of others: what a query shows without its reference."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def load(self, image: ImageId) -> Image.Image:
        return Image.new("RGB", self._images.load(image).size, (128, 128, 128))

    def digest(self, image: ImageId) -> str:
        return hashlib.sha256(f"blank {self._images.digest(image)}".encode()).hexdigest()


def decode(file: ImageFile) -> Image.Image:
    """Decode an image file as upright RGB. Raises BadImage with what is wrong."""
    path = io.BytesIO(file.read()) if isinstance(file, InlineImage) else file
    try:
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
            raise BadImage(
                "is a directory" if path.is_dir() else "is a pipe or a device, not a file"
            )
        with warnings.catch_warnings():
            # `_check_size` refuses large images
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as image:
                _check_size(image)
                image.load()
                _check_size(image)  # some formats tell their size only after loading
                return upright_rgb(image)
    except FileNotFoundError:
        raise BadImage(NOT_THERE) from None
    except PermissionError:
        raise BadImage("may not be read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"has far more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        content = path.getvalue() if isinstance(path, io.BytesIO) else path.read_bytes()
        raise BadImage(_describe_unknown(content)) from None
    except BadImage:
        raise
    except DECODER_ERRORS as error:
        raise BadImage(f"cannot be decoded ({getattr(error, 'strerror', None) or error})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image upright, as RGB, on white where it is transparent. Raises BadImage."""
    rotated = image.getexif().get(ORIENTATION, 1) != 1
    return _to_rgb(ImageOps.exif_transpose(image) if rotated else image)


def in_memory(image: object, name: str) -> InlineImage:
    """Return an image of Pillow's as a file with it would be read. Raises BadImage, also for what
    is none."""
    if not isinstance(image, Image.Image):
        raise BadImage(f"is a {type(image).__name__}, and no image of Pillow's")
    _check_size(image)
    file = io.BytesIO()
    try:
        upright_rgb(image).save(file, "PNG")
    except DECODER_ERRORS as error:
        raise BadImage(f"cannot be decoded ({error})") from None
    content = file.getvalue()
    return InlineImage(name, hashlib.sha256(content).hexdigest(), lambda: content)


def _describe_unknown(content: bytes) -> str:
    """Say what bytes are that are no image: often what a download left in its place."""
    start = content[:64].lstrip().lower()
    if not content:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return f"is {LFS}"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is not an image but a web page, which servers send in place of a file that is gone"
    return "is not an image of a known kind"


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"is {width}x{height}, one side more than {MAX_ASPECT} times the other")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise BadImage(f"holds 32-bit values (mode {image.mode}), which have no fixed range")
    if image.mode.startswith("I;16"):
        pixels = (np.asarray(image, np.uint32) // 257).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")
