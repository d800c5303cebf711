"""The vision tower's output per image, computed once and kept on disk.

An entry is valid wherever image bytes, processor, pixel budget, vision weights and dtype are the
same: across stages, iterations and runs. Entries are kept in shards (key: image digest and patch
grid), which processes share.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.backbones.base import Grid, ImageEncoder, ImageFeatures, PreparedImages
from cirloop.backbones.oom_retry import run_with_oom_split
from cirloop.backbones.prefetch import prefetch_images
from cirloop.backbones.tensor_cache import TensorCache
from cirloop.backbones.transfer import one_behind, to_host
from cirloop.config.runtime import Runtime
from cirloop.monitoring import profiling
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    import torch
    from PIL import Image

RUNTIME = Runtime()
OOM_ADVICE = (
    "Set max_pixels of the model lower, or its dtype to bfloat16, or use a device with more memory."
)


class VisionCache:
    """Vision features of images by id, which `encoder` computes."""

    def __init__(
        self,
        encoder: ImageEncoder,
        images: Images,
        directory: Path,
        runtime: Runtime = RUNTIME,
        shard_bytes: int = 256 << 20,
    ) -> None:
        self._encoder = encoder
        self._images = images
        self._tower = encoder.vision_key[:16]
        self._batch_size = runtime.vision_batch_size
        self._num_workers = runtime.num_workers
        max_bytes = int(runtime.feature_cache_max_gb * 1e9)
        self._shard_bytes = min(shard_bytes, max_bytes // 16) if max_bytes else shard_bytes
        self._tensors = TensorCache(directory, self._tower, max_bytes)

    def grids(self, images: Sequence[ImageId]) -> list[Grid]:
        """Return the patch grids (frames, height, width) of `images`, which must be cached."""
        return [_grid(self._tensors.key(self._images.digest(image))) for image in images]

    def get(self, images: Sequence[ImageId]) -> list[ImageFeatures]:
        """Return the features of `images`, in order; compute and keep what is missing."""
        self.precompute(images)
        with profiling.data_wait():
            tokens = [self._tensors.read(self._images.digest(image)) for image in images]
        return [ImageFeatures(*pair) for pair in zip(tokens, self.grids(images), strict=True)]

    def precompute(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        """Put the features of `images` on disk; `progress` wraps the list of batches to compute."""
        self.compute(self.missing_batches(images), progress)

    def missing_batches(self, images: Sequence[ImageId]) -> list[list[ImageId]]:
        """Return the batches of `images` that must be computed."""
        image_of = {self._images.digest(image): image for image in images}
        missing = self._tensors.missing(image_of)
        profiling.count_cache_hits(self._tower, image_of, missing)
        ids = [image_of[digest] for digest in missing]
        return [ids[i : i + self._batch_size] for i in range(0, len(ids), self._batch_size)]

    def compute(
        self, batches: Sequence[list[ImageId]], progress: Callable[[Any], Any] = iter
    ) -> None:
        """Compute the features of `batches` of images and write them to disk."""
        if not batches:
            return
        unwritten: dict[str, torch.Tensor] = {}
        encoded = self._encoded(batches, progress)
        with closing(encoded):
            for copies in one_behind(encoded):
                unwritten |= {key: copied() for key, copied in copies.items()}
                if sum(tokens.nbytes for tokens in unwritten.values()) >= self._shard_bytes:
                    self._tensors.write(unwritten)
                    unwritten = {}
        if unwritten:
            self._tensors.write(unwritten)

    def _encoded(
        self, batches: Sequence[list[ImageId]], progress: Callable[[Any], Any]
    ) -> Generator[dict[str, Callable[[], torch.Tensor]]]:
        """Yield for each batch what gives its images' tokens on the host (`to_host`), by key."""
        prefetched = prefetch_images(
            batches, self._images, self._encoder.prepare_images, self._num_workers
        )
        with closing(prefetched):
            for batch in profiling.profile_batches(progress(batches), "vision"):
                with profiling.data_wait():
                    images, prepared = next(prefetched)
                encoded = self._encode(images, prepared)
                profiling.add(images_encoded=len(encoded))
                copies = {
                    _key(self._images.digest(image), features.grid): to_host(features.tokens)
                    for image, features in zip(batch, encoded, strict=True)
                }
                del encoded  # a GPU has room for the next batch
                yield copies

    def _encode(self, images: list[Image.Image], prepared: PreparedImages) -> list[ImageFeatures]:
        def encode(part: Sequence[Image.Image]) -> Sequence[ImageFeatures]:
            return self._encoder.encode_images(part, prepared if part is images else None)

        parts = run_with_oom_split(encode, images, "images in the vision tower", OOM_ADVICE)
        return [features for part in parts for features in part]

    def mark_counted_elsewhere(self, images: Sequence[ImageId]) -> None:
        """Leave `images` to the costs of another process of the stage, which counts them."""
        digests = {self._images.digest(image) for image in images}
        profiling.count_cache_hits(self._tower, digests, digests)


def _key(digest: str, grid: Grid) -> str:
    return f"{digest}@{'x'.join(map(str, grid))}"


def _grid(key: str) -> Grid:
    frames, height, width = (int(n) for n in key.split("@")[1].split("x"))
    return frames, height, width
