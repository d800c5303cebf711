"""The one owner of loaded models: never more than one whole set of base weights lies in memory.

Stages hold an `Embedder`, which is a name. Whoever needs the weights asks `Models.load` for the
length of a call and keeps no reference, so that loading another model finds the memory free.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils.memory import clear_device_cache

from cirloop.backbones.features import VisionCache
from cirloop.captioning.weight_sharing import can_share_weights
from cirloop.config.run import RunConfig

if TYPE_CHECKING:
    from cirloop.backbones.model_settings import EmbedderSettings
    from cirloop.captioning.base import Captioner
    from cirloop.types import EvalSplit, TrainSplit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedder:
    """An embedder by its settings and adapter, without the weights."""

    models: Models
    settings: EmbedderSettings
    adapter: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.settings.model_dump_json()} {self.adapter}"

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of everything that decides an embedding; loads the weights the
        first time."""
        return self.models.fingerprint(self)


class Models:
    """The owner of the loaded model and its vision cache; it releases one model before it loads
    another."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._loaded: tuple[str, Any] | None = None
        self._features: tuple[str, VisionCache] | None = None
        self._fingerprints: dict[str, str] = {}

    def embedder(self, adapter: Path | None, settings: EmbedderSettings | None = None) -> Embedder:
        """Return the run's embedder with an `adapter` (None = the base), or one with other
        `settings`."""
        return Embedder(self, settings or self._config.model, adapter)

    def fingerprint(self, embedder: Embedder) -> str:
        """Return the fingerprint of an embedder; loads it the first time."""
        if embedder.name not in self._fingerprints:
            self.load(embedder)
        return self._fingerprints[embedder.name]

    def load(self, embedder: Embedder) -> Any:
        """Load the `Backbone` of an embedder.

        Keep no reference to it: two models would be in memory when the next one is loaded.
        """
        name = f"embedder {embedder.name}"
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            began = time.monotonic()
            settings = embedder.settings
            backbone: Any = settings.build(embedder.adapter)
            self._loaded = (name, backbone)
            self._fingerprints[embedder.name] = backbone.fingerprint
            logger.debug(
                "loaded %s in %.1f s", embedder.adapter or settings.path, time.monotonic() - began
            )
        return self._loaded[1]

    def vision_cache(self, embedder: Embedder, split: TrainSplit | EvalSplit) -> VisionCache:
        """Return the vision features of a split's images, encoded by this embedder's tower.

        They are released with the embedder's weights.
        """
        backbone = self.load(embedder)
        name = split.gallery.name + backbone.vision_key
        if self._features is None or self._features[0] != name:
            cache = self._config.cache / "vision"
            runtime = self._config.runtime
            self._features = (name, VisionCache(backbone, split.images, cache, runtime))
        return self._features[1]

    def captioner(self, base: Embedder, train: TrainSplit) -> Captioner:
        """Load the captioner for the images of `train`: on the weights of the embedder `base` where
        they can be shared, else in their place."""
        foundation = self._config.foundation
        if foundation.shares_base_with(base.settings):
            backbone = self.load(base)
            if can_share_weights(backbone, foundation):
                return foundation.build(backbone, train)
            del backbone
        name = f"captioner {foundation.model_dump_json()}"
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            self._loaded = (name, foundation.build(None, train))
        captioner: Captioner = self._loaded[1]
        return captioner

    def release(self) -> None:
        """Release the weights and everything that holds them, and return the device's memory."""
        self._loaded = self._features = None
        clear_device_cache(garbage_collection=True)  # models hold themselves in cycles
