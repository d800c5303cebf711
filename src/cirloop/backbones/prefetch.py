"""Images decoded and preprocessed by threads, ahead of the tower that takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    from PIL import Image

AHEAD = 2
"""Batches in the making while one is in the tower: so many batches of pixels lie in memory besides
that one."""
Loaded = tuple[list["Image.Image"], Any]


def loaded(
    batches: Sequence[Sequence[ImageId]],
    images: Images,
    prepare: Callable[[list[Image.Image]], Any],
    num_workers: int,
) -> Generator[Loaded]:
    """Per batch, in order, its pictures and what `prepare` makes of them. `num_workers` 0 = without
    threads.

    A picture is a task of its own, its batch's `prepare` another: that is queued behind the
    pictures it waits for, so it never waits for one that no thread is free to load. Raises what
    loading or preparing raised, at its batch.
    """
    if not num_workers:
        for batch in batches:
            pictures = [images.load(image) for image in batch]
            yield pictures, prepare(pictures)
        return

    def prepared(loads: Sequence[Future[Image.Image]]) -> Loaded:
        pictures = [load.result() for load in loads]
        return pictures, prepare(pictures)

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="images")
    queue: deque[Future[Loaded]] = deque()
    try:
        for batch in batches:
            queue.append(
                pool.submit(prepared, [pool.submit(images.load, image) for image in batch])
            )
            if len(queue) > AHEAD:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
