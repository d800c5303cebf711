"""Real photographs, named by their place in sorted order; skips what needs them where they are not
there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cirloop.data.images import FileImages
from cirloop.types import ImageId

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"


def photographs(num: int, directory: Path) -> tuple[FileImages, list[ImageId]]:
    """`num` photographs of different kinds and shapes, reduced to about 200 pixels so that tests
    are quick."""
    files = sorted(PHOTOS.glob("*/*.jpg"))
    if len(files) < num:
        pytest.skip(f"needs {num} photographs in {PHOTOS}, which has {len(files)}")
    paths = {}
    for number, file in enumerate(files[:: len(files) // num][:num]):
        image = Image.open(file).convert("RGB")
        image.thumbnail((200 - 24 * number, 200 - 24 * number))
        paths[ImageId(f"photo {number}")] = directory / f"{number}.png"
        image.save(directory / f"{number}.png")
    return FileImages(paths), list(paths)
