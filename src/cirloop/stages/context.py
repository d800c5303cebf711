"""The run context: configuration, data, run directory and the owner of the models, which all stages
share."""

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
from cirloop.backbones import EmbedInput
from cirloop.backbones.config import SimulatedSettings
from cirloop.backbones.weights import is_adapter
from cirloop.captioning.batched_captioner import BatchedCaptioner, CaptionClient
from cirloop.captioning.journal import DIRECTORY as ANSWERS
from cirloop.captioning.journal import Journal
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
from cirloop.monitoring.costs import Costs, log_start
from cirloop.retrieval.collapse import COLLAPSE_THRESHOLD, mean_cosine
from cirloop.retrieval.embed import embed, query_items
from cirloop.retrieval.topk import ranks
from cirloop.retrieval.vectors import zeros_or_memmap
from cirloop.stages.models import Embedder, Models
from cirloop.types import EvalSplit, ImageId, Query, TrainSplit

Vectors = npt.NDArray[np.float32]
MAX_CACHED_EMBEDDINGS = 4
"""Results of embedding that are kept: a gallery, its queries, their texts alone, and new texts."""
EMBED_CHUNK = 1 << 18
"""Items embedded before their vectors are put away."""


class RunContext:
    """A run: its configuration, data, store and models."""

    def __init__(self, config: RunConfig, store: Store, data: Dataset) -> None:
        self.config = config
        self.store = store
        self.data = data
        self.models = Models(config)
        self._vectors: OrderedDict[str, Vectors] = OrderedDict()
        self._digests: dict[str, str] = {}
        self._checked_for_collapse: set[tuple[str, str]] = set()
        self.costs = Costs(store.directory, notices.mark(config))
        self.log: Path | None = None
        """That of the attempt, once it is open; launched processes have theirs beside it."""

    def build(
        self,
        name: str,
        settings: object,
        inputs: Iterable[str],
        build: Callable[[Path], None],
        iteration: int | None,
    ) -> Artifact:
        """Get or build an artifact, emit `begins` and `ended`, and record the metrics in
        `costs.json`.

        Raises GracefulStop where a stop was requested before the build.
        """

        def metered(path: Path) -> None:
            log_start(name)
            preemption.raise_if_requested()
            with self.costs.stage(name, self.config.runtime.profile):
                build(path)

        events.emit("begins", name=name, iteration=iteration)
        artifact = self.store.get_or_build(name, settings, inputs, metered, iteration)
        events.emit("ended", name=name, iteration=iteration, artifact=artifact)
        return artifact

    @property
    def mark(self) -> dict[str, Any]:
        """Return what stands first in each JSON file of this run."""
        return notices.mark(self.config)

    def stage_config(self, *names: str) -> dict[str, Any]:
        """Return the settings that a stage depends on, with digests of model files instead of
        paths."""
        settings: dict[str, Any] = {
            name: self.config.result_settings()[name] for name in (*names, "seed")
        }
        for name in {"model", "foundation"} & {*names}:
            settings[name] = {**settings[name], **getattr(self.config, name).path_digests()}
        if "foundation" in names:
            settings["foundation"] |= self.config.foundation.train_digests(self.data.train)
        return settings

    def eval_digest(self, split_name: str) -> str:
        if split_name not in self._digests:
            self._digests[split_name] = eval_digest(self.data.eval_splits(split_name))
        return self._digests[split_name]

    def embedder(self, checkpoint: Artifact | None) -> Embedder:
        """Return the embedder of a checkpoint (None = the base); its weights are loaded when they
        are needed."""
        return self.models.embedder(adapter_path(checkpoint))

    def embed_cached(
        self,
        backbone: Embedder,
        items: Sequence[EmbedInput],
        split: TrainSplit | EvalSplit,
        title: str,
    ) -> Vectors:
        """Embed `items`, or return the kept result; the last few results are kept.

        The run's own model embeds in several processes if the run has several.
        """
        name = fingerprint(
            [backbone.fingerprint, split.gallery.name, [astuple(item) for item in items]]
        )
        if name not in self._vectors:
            while len(self._vectors) >= MAX_CACHED_EMBEDDINGS:
                self._vectors.popitem(last=False)
            self._vectors[name] = self._embed_pieces(backbone, items, split, title)
        self._vectors.move_to_end(name)
        return self._vectors[name]

    def _embed_pieces(
        self,
        backbone: Embedder,
        items: Sequence[EmbedInput],
        split: TrainSplit | EvalSplit,
        title: str,
    ) -> Vectors:
        """Embed with at most one chunk in memory: large galleries are kept on disk
        (`zeros_or_memmap`)."""
        if len(items) <= EMBED_CHUNK:
            return self._embed(backbone, items, split, title)
        for start in range(0, len(items), EMBED_CHUNK):
            vectors = self._embed(backbone, items[start : start + EMBED_CHUNK], split, title)
            if start == 0:
                out = zeros_or_memmap((len(items), *vectors.shape[1:]), self.config.cache)
            out[start : start + len(vectors)] = vectors
        return out

    def _embed(
        self,
        backbone: Embedder,
        items: Sequence[EmbedInput],
        split: TrainSplit | EvalSplit,
        title: str,
    ) -> Vectors:
        runtime = self.config.runtime
        if isinstance(backbone.settings, SimulatedSettings):
            vectors: Vectors = self.models.load(backbone).vectors(items)
            return vectors
        if launcher.num_processes(runtime) > 1 and backbone.settings == self.config.model and items:
            name = backbone.fingerprint
            return self._executor(split).embed(items, backbone.adapter, name, title)
        features = self.models.vision_cache(backbone, split)
        size = runtime.embed_batch_size
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
        """Return an executor of several processes, each of which loads the model; this process
        holds none meanwhile."""
        self.models.release()
        work = self.store.scratch_dir(f"shares_{os.getpid()}")
        return ShardedExecutor(self.config, self.data, split, work, self.log)

    def captioner(self, backbone: Callable[[], Embedder]) -> CaptionClient:
        """Return the captioner for the train split's images, in this process or in several; a
        server, or vLLM, is asked by this process alone.

        In this process it shares the weights of the embedder that `backbone` returns, where that
        has the same base. Delete it before the embedder is used again.
        """
        config = self.config
        train = self.data.train
        answers = self._answers()
        journal = Journal(answers, shared=config.runtime.answers_dir)
        client = config.foundation.client(train.images, journal, progress)
        if client is not None:
            return client
        if config.foundation.in_processes and launcher.num_processes(config.runtime) > 1:
            return DistributedCaptioner(self._executor(train), answers)
        captioner = self.models.captioner(backbone(), train)
        return BatchedCaptioner(
            captioner,
            train.images,
            config.cache / "vision",
            config.captioning.batch_size,
            progress,
            config.runtime,
            journal=journal,
        )

    def _answers(self) -> Path:
        """Return the directory of this run's answers."""
        shared = self.config.runtime.answers_dir
        if shared is None:
            return self.store.scratch_dir(ANSWERS)
        return shared / fingerprint(str(self.config.directory.resolve()))[:12]

    def gallery_embeddings(self, backbone: Embedder, split: TrainSplit | EvalSplit) -> Vectors:
        """Embed a split's images, and warn where the embeddings have collapsed."""
        items = [EmbedInput(image) for image in split.gallery.ids]
        vectors = self.embed_cached(backbone, items, split, f"embed {split.gallery.name} gallery")
        key = (backbone.fingerprint, split.gallery.name)
        if key not in self._checked_for_collapse:
            self._checked_for_collapse.add(key)
            cosine = mean_cosine(vectors, self.config.seed)
            if cosine is not None and cosine > COLLAPSE_THRESHOLD:
                self.costs.warn(
                    f"{split.gallery.name}: two images have a cosine of {cosine:.4f} on average,"
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
        """Return the rank of each query's target among all images but the query's reference."""
        rows = split.gallery.rows()
        vectors = self.embed_cached(
            backbone, query_items(queries), split, f"embed {split.name} queries"
        )
        target_Q = np.array([rows[target] for target in targets], np.int64)
        reference_Q = np.array([rows[query.reference] for query in queries], np.int64)
        gallery = self.gallery_embeddings(backbone, split)
        ranks_Q1, _ = ranks(vectors, gallery, target_Q[:, None], excluded=reference_Q[:, None])
        return [int(rank) for rank in ranks_Q1[:, 0]]


def adapter_path(checkpoint: Artifact | None) -> Path | None:
    """Return the adapter directory of a checkpoint; None for the base model, which 0 steps leave as
    it is."""
    if checkpoint is None or not is_adapter(checkpoint.path):
        return None
    return checkpoint.path
