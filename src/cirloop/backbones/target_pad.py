"""CLIP4Cir's padding of images before a centre crop (arXiv 2308.11485), which QuRe uses too."""

from __future__ import annotations

from PIL import Image, ImageOps


def target_pad(image: Image.Image, ratio: float) -> Image.Image:
    """Add black bars along the long sides of an image until its sides differ by `ratio` only.

    A centre crop then loses less of a tall image. 0 = no padding.
    """
    longer = max(image.size)
    shorter = min(image.size)
    if not ratio or longer / shorter < ratio:
        return image
    x, y = (max(int((longer / ratio - side) / 2), 0) for side in image.size)
    return ImageOps.expand(image.convert("RGB"), (x, y, x, y))
