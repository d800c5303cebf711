"""Images in memory, and the digest that identifies their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from cirloop.types import ImageId


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
