"""Images decoded and preprocessed by threads, ahead of the tower that takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from cirloop.backbones.base import PreparedImages
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    from PIL import Image

PREFETCH_BATCHES = 2
"""Batches prepared while another is in the tower: pixels of so many batches lie in memory besides
that one."""
PrefetchedBatch = tuple[list["Image.Image"], PreparedImages]
"""Images of a batch, and the image processor's output for them."""


def prefetch_images(
    batches: Sequence[Sequence[ImageId]],
    images: Images,
    prepare: Callable[[list[Image.Image]], PreparedImages],
    num_workers: int,
) -> Generator[PrefetchedBatch]:
    """Yield each batch's images, in order, with the output of `prepare` for them.

    `num_workers` 0 = without threads. Every image is a task, and so is `prepare` of a batch, which
    is queued behind the images it waits for: it never waits for an image that no thread is free to
    load. Raises at its batch what loading or preparing raised.
    """
    if not num_workers:
        for batch in batches:
            loaded = [images.load(image) for image in batch]
            yield loaded, prepare(loaded)
        return

    def prepared(loads: Sequence[Future[Image.Image]]) -> PrefetchedBatch:
        loaded = [load.result() for load in loads]
        return loaded, prepare(loaded)

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="images")
    queue: deque[Future[PrefetchedBatch]] = deque()
    try:
        for batch in batches:
            loads = [pool.submit(images.load, image) for image in batch]
            queue.append(pool.submit(prepared, loads))
            if len(queue) > PREFETCH_BATCHES:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
