"""Padding keeps every pixel and leaves no side longer than the ratio."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cirloop.backbones.target_pad import target_pad


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 100), (400, 320)),
        ((100, 240), (192, 240)),
        ((100, 300), (240, 300)),
        ((100, 120), (100, 120)),
    ],
)
def test_long_images_are_padded_to_the_ratio(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    padded = target_pad(Image.new("RGB", size, "white"), 1.25)
    assert padded.size == expected
    assert np.asarray(padded).sum() == 3 * 255 * size[0] * size[1]
    assert padded.getpixel((expected[0] // 2, expected[1] // 2)) == (255, 255, 255)
    assert expected == size or padded.getpixel((0, 0)) == (0, 0, 0)
    assert target_pad(Image.new("RGB", size), 0).size == size
