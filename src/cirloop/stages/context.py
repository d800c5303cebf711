"""What the stages of a run share: its configuration, its data, its run directory, and the owner of
its models."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.artifacts.store import Artifact, Store, fingerprint
from cirloop.backbones import Item
from cirloop.backbones.config import SimulatedSettings
from cirloop.backbones.weights import is_adapter
from cirloop.captioning.batched_captioner import Asked, Eyes
from cirloop.config import notices
from cirloop.config.run import RunConfig
from cirloop.config.run_dir import CONFIG as CONFIG
from cirloop.config.run_dir import run_directory as run_directory
from cirloop.data import Dataset
from cirloop.data.dataset import eval_digest
from cirloop.distributed import launcher
from cirloop.distributed.sharded_executor import DistributedCaptioner, ShardedExecutor
from cirloop.monitoring import events, preemption
from cirloop.monitoring.console import progress
from cirloop.monitoring.costs import Costs
from cirloop.retrieval.collapse import COLLAPSE_THRESHOLD, mean_cosine
from cirloop.retrieval.embed import embed, query_items
from cirloop.retrieval.topk import ranks
from cirloop.retrieval.vectors import zeros_or_memmap
from cirloop.stages.models import Embedder, Models
from cirloop.types import EvalSplit, ImageId, Query, TrainSplit

Vectors = npt.NDArray[np.float32]
KEPT = 3
"""Results of embedding that are kept: a gallery, its queries, and their texts alone."""
PIECE = 1 << 18
"""Items embedded before their vectors are put away."""


class Run:
    """A configuration, its data, its run directory, and the owner of its models."""

    def __init__(self, config: RunConfig, store: Store, data: Dataset) -> None:
        self.config, self.store, self.data = config, store, data
        self.models = Models(config)
        self._vectors: OrderedDict[str, Vectors] = OrderedDict()
        self._digests: dict[str, str] = {}
        self._looked_at: set[tuple[str, str]] = set()
        self.costs = Costs(store.directory, notices.mark(config))
        self.log: Path | None = None
        """That of the attempt, once it is open; launched processes have theirs beside it."""

    def make(
        self,
        name: str,
        settings: Any,
        inputs: Iterable[str],
        build: Callable[[Path], None],
        iteration: int | None,
    ) -> Artifact:
        """`store.make`, told to those who watch; what the making costs goes to `costs.json`. Before
        it is a moment to stop."""

        def metered(path: Path) -> None:
            preemption.check()
            with self.costs.stage(name, self.config.runtime.profile):
                build(path)

        events.tell("begins", name=name, iteration=iteration)
        artifact = self.store.make(name, settings, inputs, metered, iteration)
        events.tell("ended", name=name, iteration=iteration, artifact=artifact)
        return artifact

    @property
    def mark(self) -> dict[str, Any]:
        """What stands first in each JSON file of this run."""
        return notices.mark(self.config)

    def key(self, *names: str) -> dict[str, Any]:
        """The settings a stage depends on, with the digests of a model's files in the place of
        their paths."""
        settings: dict[str, Any] = {name: self.config.decisive()[name] for name in (*names, "seed")}
        for name in {"model", "foundation"} & {*names}:
            settings[name] = {**settings[name], **getattr(self.config, name).content()}
        return settings

    def eval_digest(self, split_name: str) -> str:
        if split_name not in self._digests:
            self._digests[split_name] = eval_digest(self.data.eval_splits(split_name))
        return self._digests[split_name]

    def embedder(self, checkpoint: Artifact | None) -> Embedder:
        """The embedder of a checkpoint (None = the base); its weights are loaded when they are
        needed."""
        return self.models.embedder(adapter_of(checkpoint))

    def vectors(
        self, backbone: Embedder, items: Sequence[Item], split: TrainSplit | EvalSplit, title: str
    ) -> Vectors:
        """Vectors of `items`; the last few results are kept. In several processes if there are, for
        the run's model."""
        name = fingerprint(
            [backbone.fingerprint, split.gallery.name, [astuple(item) for item in items]]
        )
        if name not in self._vectors:
            while len(self._vectors) >= KEPT:
                self._vectors.popitem(last=False)
            self._vectors[name] = self._embed_pieces(backbone, items, split, title)
        self._vectors.move_to_end(name)
        return self._vectors[name]

    def _embed_pieces(
        self, backbone: Embedder, items: Sequence[Item], split: TrainSplit | EvalSplit, title: str
    ) -> Vectors:
        """With no more than one piece in memory: large galleries are kept on disk (`room`)."""
        if len(items) <= PIECE:
            return self._embed(backbone, items, split, title)
        for start in range(0, len(items), PIECE):
            made = self._embed(backbone, items[start : start + PIECE], split, title)
            if start == 0:
                out = zeros_or_memmap((len(items), *made.shape[1:]), self.config.cache)
            out[start : start + len(made)] = made
        return out

    def _embed(
        self, backbone: Embedder, items: Sequence[Item], split: TrainSplit | EvalSplit, title: str
    ) -> Vectors:
        runtime = self.config.runtime
        if isinstance(backbone.settings, SimulatedSettings):
            vectors: Vectors = self.models.load(backbone).vectors(items)
            return vectors
        if launcher.processes(runtime) > 1 and backbone.settings == self.config.model and items:
            name = backbone.fingerprint
            return self._executor(split).embed(items, backbone.adapter, name, title)
        features, size = self.models.features(backbone, split), runtime.embed_batch_size
        return embed(
            self.models.load(backbone),
            features,
            items,
            size,
            progress,
            title,
            runtime.max_tokens_per_batch,
        )

    def _executor(self, split: TrainSplit | EvalSplit) -> ShardedExecutor:
        """Several processes, each of which loads the model: this one holds none meanwhile."""
        self.models.release()
        work = self.store.workspace(f"shares_{os.getpid()}")
        return ShardedExecutor(self.config, self.data, split, work, self.log)

    def asked(self, backbone: Callable[[], Embedder]) -> Asked:
        """The foundation model on the train split's images: in this process, on the weights of the
        embedder that `backbone` gives where that has the same base; or in several. Let go of it
        before the embedder is used again."""
        config, train = self.config, self.data.train
        if launcher.processes(config.runtime) > 1:
            return DistributedCaptioner(self._executor(train))
        captioner = self.models.captioner(backbone())
        kept, size = config.cache / "vision", config.captioning.batch_size
        return Eyes(captioner, train.images, kept, size, progress, config.runtime)

    def gallery(self, backbone: Embedder, split: TrainSplit | EvalSplit) -> Vectors:
        """Vectors of a split's images; a warning where they are nearly all the same."""
        items = [Item(image) for image in split.gallery.ids]
        vectors = self.vectors(backbone, items, split, f"embed {split.gallery.name} gallery")
        known = (backbone.fingerprint, split.gallery.name)
        if known not in self._looked_at:
            self._looked_at.add(known)
            alike = mean_cosine(vectors, self.config.seed)
            if alike is not None and alike > COLLAPSE_THRESHOLD:
                self.costs.warn(
                    f"{split.gallery.name}: two images have a cosine of {alike:.4f} on average,"
                    f" more than {COLLAPSE_THRESHOLD}: the embeddings have collapsed, and rankings"
                    " mean little"
                )
        return vectors

    def rank_targets(
        self,
        backbone: Embedder,
        queries: Sequence[Query],
        targets: Sequence[ImageId],
        split: TrainSplit | EvalSplit,
    ) -> list[int]:
        """The rank of each query's target among all images but the query's reference."""
        rows = split.gallery.rows()
        vectors = self.vectors(backbone, query_items(queries), split, f"embed {split.name} queries")
        target_Q = np.array([rows[target] for target in targets], np.int64)
        reference_Q = np.array([rows[query.reference] for query in queries], np.int64)
        gallery = self.gallery(backbone, split)
        ranks_Q1, _ = ranks(vectors, gallery, target_Q[:, None], excluded=reference_Q[:, None])
        return [int(rank) for rank in ranks_Q1[:, 0]]


def adapter_of(checkpoint: Artifact | None) -> Path | None:
    """The adapter directory of a checkpoint; None for the base model, which a warm-up of 0 steps
    leaves as it is."""
    if checkpoint is None or not is_adapter(checkpoint.path):
        return None
    return checkpoint.path
