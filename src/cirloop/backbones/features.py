"""The vision tower's output per image, computed once and kept on disk.

Valid wherever image bytes, processor, pixel budget, vision weights and dtype are the same: across
stages, rounds and runs. Kept in shards (key: image digest and patch grid), which processes share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.backbones.base import Grid, VisionInput
from cirloop.backbones.oom_retry import in_halves
from cirloop.backbones.prefetch import loaded
from cirloop.backbones.tensor_cache import TensorCache
from cirloop.config.runtime import Runtime
from cirloop.monitoring import profiling
from cirloop.types import ImageId, Images

if TYPE_CHECKING:
    import torch
    from PIL import Image

RUNTIME = Runtime()
WAY_OUT = (
    "Set max_pixels of the model lower, or its dtype to bfloat16, or use a device with more memory."
)


class VisionFeatures:
    """Vision tokens of images by id. `encoder` has `prepare_images`, `encode_images` and
    `vision_key`."""

    def __init__(
        self,
        encoder: Any,
        images: Images,
        directory: Path,
        runtime: Runtime = RUNTIME,
        shard_bytes: int = 256 << 20,
    ) -> None:
        self._encoder, self._images, self._tower = encoder, images, encoder.vision_key[:16]
        self._batch_size, self._num_workers = runtime.vision_batch_size, runtime.num_workers
        max_bytes = int(runtime.feature_cache_max_gb * 1e9)
        self._shard_bytes = min(shard_bytes, max_bytes // 16) if max_bytes else shard_bytes
        self._tensors = TensorCache(directory, self._tower, max_bytes)

    def grids(self, images: Sequence[ImageId]) -> list[Grid]:
        """Patch grids (frames, height, width) of `images`, which must have been ensured."""
        return [_grid(self._tensors.key(self._images.digest(image))) for image in images]

    def get(self, images: Sequence[ImageId]) -> list[VisionInput]:
        """Vision tokens of `images`, in order; what is not there yet is computed and kept."""
        self.ensure(images)
        with profiling.data_wait():
            tokens = [self._tensors.read(self._images.digest(image)) for image in images]
        return [VisionInput(*each) for each in zip(tokens, self.grids(images), strict=True)]

    def ensure(self, images: Sequence[ImageId], progress: Callable[[Any], Any] = iter) -> None:
        """Have `images` on disk; `progress` wraps the list of batches that must be computed."""
        self.make(self.missing(images), progress)

    def missing(self, images: Sequence[ImageId]) -> list[list[ImageId]]:
        """The batches of `images` that must be computed."""
        wanted = {self._images.digest(image): image for image in images}
        missing = self._tensors.missing(wanted)
        profiling.count_cache_hits(self._tower, wanted, missing)
        ids = [wanted[digest] for digest in missing]
        return [ids[i : i + self._batch_size] for i in range(0, len(ids), self._batch_size)]

    def make(self, batches: Sequence[list[ImageId]], progress: Callable[[Any], Any] = iter) -> None:
        """Compute `batches` of images and write them to disk."""
        if not batches:
            return
        fresh: dict[str, torch.Tensor] = {}
        with closing(
            loaded(batches, self._images, self._encoder.prepare_images, self._num_workers)
        ) as ready:
            for batch in profiling.profile_batches(progress(batches), "vision"):
                with profiling.data_wait():
                    pictures = next(ready)
                encoded = self._encode(*pictures)
                profiling.add(images_encoded=len(encoded))
                for image, vision in zip(batch, encoded, strict=True):
                    fresh[f"{self._images.digest(image)}@{'x'.join(map(str, vision.grid))}"] = (
                        vision.tokens
                    )
                if sum(t.nbytes for t in fresh.values()) >= self._shard_bytes:
                    self._tensors.write(fresh)
                    fresh = {}
        if fresh:
            self._tensors.write(fresh)

    def _encode(self, pictures: list[Image.Image], prepared: Any) -> list[VisionInput]:
        def encode(some: Sequence[Image.Image]) -> Sequence[VisionInput]:
            return self._encoder.encode_images(some, prepared if some is pictures else None)  # type: ignore[no-any-return]

        parts = in_halves(encode, pictures, "images in the vision tower", WAY_OUT)
        return [vision for part in parts for vision in part]

    def known(self, images: Sequence[ImageId]) -> None:
        """Leave `images` to the costs of another process of the stage, which finds them on disk or
        makes them."""
        digests = {self._images.digest(image) for image in images}
        profiling.count_cache_hits(self._tower, digests, digests)


def _grid(key: str) -> Grid:
    t, h, w = (int(n) for n in key.split("@")[1].split("x"))
    return t, h, w
