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

from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.weight_sharing import lends
from cirloop.config.run import RunConfig

if TYPE_CHECKING:
    from cirloop.backbones.model_settings import ModelSettings
    from cirloop.captioning.base import Captioner
    from cirloop.types import EvalSplit, TrainSplit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedder:
    """An embedder by its settings and adapter, without the weights."""

    models: Models
    settings: ModelSettings
    adapter: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.settings.model_dump_json()} {self.adapter}"

    @property
    def fingerprint(self) -> str:
        """Of everything that decides an embedding; the weights are loaded where it is not known
        yet."""
        return self.models.fingerprint(self)


class Models:
    """Loads what is asked for and lets go of everything else before: the model, and the vision
    features that it encodes for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._loaded: tuple[str, Any] | None = None
        self._features: tuple[str, VisionFeatures] | None = None
        self._fingerprints: dict[str, str] = {}

    def embedder(self, adapter: Path | None, settings: ModelSettings | None = None) -> Embedder:
        """The run's embedder with the `adapter` of a checkpoint (None = the base), or one with
        other `settings`."""
        return Embedder(self, settings or self._config.model, adapter)

    def fingerprint(self, embedder: Embedder) -> str:
        """Of an embedder; loads it the first time."""
        if embedder.name not in self._fingerprints:
            self.load(embedder)
        return self._fingerprints[embedder.name]

    def load(self, embedder: Embedder) -> Any:
        """The `Backbone` itself. Keep no reference to it: it is one of two in memory when the next
        one is loaded."""
        name = f"embedder {embedder.name}"
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            began, settings = time.monotonic(), embedder.settings
            backbone: Any = settings.build(embedder.adapter)  # type: ignore[attr-defined]  # each of the union has it
            self._loaded = (name, backbone)
            self._fingerprints[embedder.name] = backbone.fingerprint
            logger.debug(
                "loaded %s in %.1f s", embedder.adapter or settings.path, time.monotonic() - began
            )
        return self._loaded[1]

    def vision_cache(self, embedder: Embedder, split: TrainSplit | EvalSplit) -> VisionFeatures:
        """Vision features of a split's images, encoded by this embedder's tower; they go when its
        weights go."""
        backbone = self.load(embedder)
        name = split.gallery.name + backbone.vision_key
        if self._features is None or self._features[0] != name:
            cache, runtime = self._config.cache / "vision", self._config.runtime
            self._features = (name, VisionFeatures(backbone, split.images, cache, runtime))
        return self._features[1]

    def captioner(self, base: Embedder) -> Captioner:
        """The run's foundation model: on the weights of the embedder `base` where those are the
        same and can be lent, else in their place."""
        foundation = self._config.foundation
        if foundation.shares(base.settings):
            backbone = self.load(base)
            if lends(backbone, foundation):
                return foundation.build(backbone)
            del backbone
        name = f"captioner {foundation.model_dump_json()}"
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            self._loaded = (name, foundation.build())
        captioner: Captioner = self._loaded[1]
        return captioner

    def release(self) -> None:
        """Let go of the weights and of all that holds them, and give the device's memory back."""
        self._loaded = self._features = None
        clear_device_cache(garbage_collection=True)  # models hold themselves in cycles
