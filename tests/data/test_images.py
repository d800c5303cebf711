"""Odd images either load as a person would see them, or are named."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cirloop.data.image_check import unreadable_images
from cirloop.data.images import BadImage, FileImages, decode
from cirloop.types import ImageId

RED = (255, 0, 0)
WHITE = (255, 255, 255)


def saved(picture: Image.Image, path: Path, **how: object) -> Path:
    picture.save(path, **how)
    return path


def exif_turned(path: Path) -> Path:
    """4x2 pixels, the left half red, to be shown turned by 90 degrees clockwise: 2x4, the upper
    half red."""
    picture = Image.new("RGB", (4, 2), WHITE)
    picture.paste(RED, (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture, path, exif=exif)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    seen = decode(exif_turned(tmp_path / "a.png"))
    assert seen.size == (2, 4) and seen.getpixel((0, 0)) == RED and seen.getpixel((1, 3)) == WHITE


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "a.png")
    assert np.asarray(decode(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (*RED, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    kinds = {"rgba": picture, "palette": picture.quantize(4), "la": picture.convert("LA")}
    for name, made in kinds.items():
        seen = decode(saved(made, tmp_path / f"{name}.png"))
        assert seen.mode == "RGB" and seen.getpixel((1, 0)) == WHITE, name


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "jpg"), ("L", "jpg"), ("1", "png"), ("P", "gif"), ("YCbCr", "jpg")]
)
def test_every_mode_comes_out_as_the_same_colour(mode: str, kind: str, tmp_path: Path) -> None:
    grey = Image.new("RGB", (8, 8), WHITE).convert(mode)
    seen = decode(saved(grey, tmp_path / f"a.{kind}"))
    assert seen.mode == "RGB" and np.asarray(seen).min() >= 254


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE, (0, 0, 255))]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(path).getpixel((1, 1)) == RED


def test_one_pixel_and_long_strips(tmp_path: Path) -> None:
    assert decode(saved(Image.new("RGB", (1, 1), RED), tmp_path / "a.png")).size == (1, 1)
    assert decode(saved(Image.new("RGB", (200, 1)), tmp_path / "b.png")).size == (200, 1)


@pytest.mark.parametrize(("megabytes", "opens"), [(2, True), (15, True), (17, False)])
def test_a_png_with_a_long_text_opens_up_to_a_bound(
    megabytes: int, opens: bool, tmp_path: Path
) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "A" * (megabytes << 20), zip=True)
    path = saved(Image.new("RGB", (4, 4), RED), tmp_path / "a.png", pnginfo=text)
    if opens:
        assert decode(path).getpixel((0, 0)) == RED
    else:
        with pytest.raises(BadImage, match="cannot be decoded"):
            decode(path)


def bomb(path: Path) -> Path:
    """Write a PNG of a few bytes that says it is 60,000 x 60,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def truncated(path: Path) -> Path:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return path


def written(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def plain(mode: str, width: int, height: int, kind: str = "PNG") -> Callable[[Path], Path]:
    return lambda path: saved(Image.new(mode, (width, height)), path, format=kind)


def directory(path: Path) -> Path:
    path.mkdir()
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "is not there"),
    "empty": (written(b""), "is empty"),
    "text": (written(b"not an image"), "is not an image of a known kind"),
    "html": (written(b"<html>404</html>"), "is not an image but a web page"),
    "head": (written(b"\x89PNG\r\n\x1a\n"), ""),
    "cut": (truncated, "cannot be decoded"),
    "bomb": (bomb, "pixels"),
    "large": (plain("1", 10_000, 9_000), "has 10000x9000 pixels"),
    "strip": (plain("L", 201, 1), "is 201x1, one side more than 200 times"),
    "float": (plain("F", 4, 4, "TIFF"), "holds 32-bit values (mode F)"),
    "directory": (directory, "is a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_image_that_cannot_be_used_is_named(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    path = make(tmp_path / f"{name}.jpg")
    with pytest.raises(BadImage) as caught:
        FileImages({ImageId("it"): path}).load(ImageId("it"))
    assert message in str(caught.value) and "'it'" in str(caught.value)
    assert path.name in str(caught.value)


def test_all_bad_images_are_found_at_once(tmp_path: Path) -> None:
    files = {ImageId(name): make(tmp_path / f"{name}.jpg") for name, (make, _) in BAD.items()}
    for n in range(40):
        good = saved(Image.new("RGB", (9, 9)), tmp_path / f"good_{n}.png")
        files[ImageId(f"good {n}")] = good
    seen: list[ImageId] = []

    def progress(images: object) -> object:
        for image in images:  # type: ignore[attr-defined]
            seen.append(image)
            yield image

    found = unreadable_images(files, 4, progress)  # type: ignore[arg-type]
    assert set(found) == set(BAD) and seen == sorted(files)
    assert all(BAD[name][1] in what for name, what in found.items())


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    a = saved(Image.new("RGB", (4, 4), RED), tmp_path / "a.png")
    b = saved(Image.new("RGB", (4, 4), WHITE), tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(a.read_bytes())
    images = FileImages({ImageId(n): tmp_path / f"{n}.png" for n in "abc"})
    digest = {n: images.digest(ImageId(n)) for n in "abc"}
    assert b.exists() and digest["a"] == digest["c"] != digest["b"]
