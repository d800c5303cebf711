"""What the stages of a run share: its configuration, its data, its run directory, and the one model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.artifacts import Artifact, Store
from cirloop.backbones import Item
from cirloop.backbones.features import VisionFeatures
from cirloop.backbones.weights import is_adapter
from cirloop.config import RunConfig
from cirloop.data import Dataset
from cirloop.data.dataset import eval_digest
from cirloop.report.terminal import progress
from cirloop.retrieval.embed import embed, query_items
from cirloop.retrieval.search import rank
from cirloop.types import EvalSplit, ImageId, Query, TrainSplit

Vectors = npt.NDArray[np.float32]


class Run:
    """A configuration, its data, its run directory, and the one model that is loaded."""

    def __init__(self, config: RunConfig, store: Store, data: Dataset) -> None:
        self.config, self.store, self.data = config, store, data
        self._model: tuple[str, Any] | None = None
        self._features: tuple[str, VisionFeatures] | None = None
        self._gallery: tuple[str, Vectors] | None = None
        self._digests: dict[str, str] = {}

    def key(self, *names: str) -> dict[str, Any]:
        """The settings a stage depends on, with the digests of a model's files in the place of their paths."""
        settings: dict[str, Any] = {name: self.config.decisive()[name] for name in (*names, "seed")}
        for name in {"model", "foundation"} & {*names}:
            settings[name] = {**settings[name], **getattr(self.config, name).content()}
        return settings

    def eval_digest(self, split_name: str) -> str:
        if split_name not in self._digests:
            self._digests[split_name] = eval_digest(self.data.parts(split_name))
        return self._digests[split_name]

    def embedder(self, checkpoint: Artifact | None) -> Any:
        """The embedder of a checkpoint (None = the base), kept until another is asked for."""
        adapter = adapter_of(checkpoint)
        name = str(adapter)
        if self._model is None or self._model[0] != name:
            self._model = None
            self._model = (name, self.config.model.build(adapter))
        return self._model[1]

    def features(self, encoder: Any, split: TrainSplit | EvalSplit) -> VisionFeatures:
        name = split.gallery.name + encoder.vision_key
        if self._features is None or self._features[0] != name:
            self._features = (name, VisionFeatures(encoder, split.images, self.config.cache / "vision"))
        return self._features[1]

    def vectors(self, backbone: Any, items: Sequence[Item], split: TrainSplit | EvalSplit, title: str) -> Vectors:
        return embed(
            backbone,
            self.features(backbone, split),
            items,
            self.config.runtime.embed_batch_size,
            progress,
            title,
        )

    def gallery(self, backbone: Any, split: TrainSplit | EvalSplit) -> Vectors:
        """Gallery vectors of the last (model, split) asked for are kept."""
        name = f"{backbone.fingerprint} {split.gallery.name}"
        if self._gallery is None or self._gallery[0] != name:
            items = [Item(image) for image in split.gallery.ids]
            self._gallery = (name, self.vectors(backbone, items, split, f"embed {split.gallery.name} gallery"))
        return self._gallery[1]

    def ranks(
        self,
        backbone: Any,
        queries: Sequence[Query],
        targets: Sequence[ImageId],
        split: TrainSplit | EvalSplit,
        depth: int,
    ) -> Any:
        vectors = self.vectors(backbone, query_items(queries), split, f"embed {split.name} queries")
        search = self.config.runtime.search
        return rank(queries, targets, split.gallery, vectors, self.gallery(backbone, split), depth, search)


def adapter_of(checkpoint: Artifact | None) -> Path | None:
    """The adapter directory of a checkpoint; None for the base model, which a warm-up of 0 steps leaves as it is."""
    if checkpoint is None or not is_adapter(checkpoint.path):
        return None
    return checkpoint.path
