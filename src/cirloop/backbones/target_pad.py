"""CLIP4Cir's padding of images before a centre crop (arXiv 2308.11485), which QuRe takes over."""

from __future__ import annotations

from PIL import Image, ImageOps


def target_pad(image: Image.Image, ratio: float) -> Image.Image:
    """Black bars along the long sides of an image whose sides differ by more than `ratio`, until
    they differ by that.

    A centre crop then loses less of a tall picture. 0 = none.
    """
    longer, shorter = max(image.size), min(image.size)
    if not ratio or longer / shorter < ratio:
        return image
    x, y = (max(int((longer / ratio - side) / 2), 0) for side in image.size)
    return ImageOps.expand(image.convert("RGB"), (x, y, x, y))
