"""Every picture of a data set looked at before any hour is spent: is it there, does it decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cirloop.data.images import BadImage, ImageFile, decode
from cirloop.types import ImageId

WORKERS = os.cpu_count() or 1


def unreadable_images(
    files: Mapping[ImageId, ImageFile],
    workers: int,
    progress: Callable[[Sequence[ImageId]], Iterable[ImageId]] = iter,
) -> dict[ImageId, str]:
    """What is wrong with each image that cannot be used, by id. Threads: Pillow decodes without the
    GIL."""

    def problem(image: ImageId) -> str | None:
        try:
            decode(files[image])
        except BadImage as error:
            return str(error)
        return None

    images = sorted(files)
    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(progress(images), pool.map(problem, images, chunksize=16), strict=True))
    return {image: what for image, what in found.items() if what is not None}
