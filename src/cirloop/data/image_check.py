"""Check that every image of a data set exists and decodes, before a run spends time."""

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
    """Return what is wrong with each image that cannot be used, by id.

    Threads share the work, since Pillow decodes without the GIL.
    """

    def problem(image: ImageId) -> str | None:
        try:
            decode(files[image])
        except BadImage as error:
            return str(error)
        return None

    images = sorted(files)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(problem, images, chunksize=16)
        checked = zip(progress(images), results, strict=True)
        return {image: error for image, error in checked if error is not None}
