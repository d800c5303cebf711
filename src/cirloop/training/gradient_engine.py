"""The loss of a step's batch and its gradient: the whole batch at once, or by gradient caching.

Every process knows the whole batch; each encodes its share of queries and candidates, embeddings
are gathered with gradients, and each computes the loss of the whole batch. Averaging the gradients
then gives the one-process gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cirloop.backbones import Item
from cirloop.backbones.base import each_once
from cirloop.backbones.features import VisionFeatures
from cirloop.backbones.similarity import similarity
from cirloop.monitoring import profiling
from cirloop.training.batches import Batch, Batches
from cirloop.training.config import TrainingSettings
from cirloop.training.hard_candidates import online_mask, rows_of
from cirloop.training.losses import Marks
from cirloop.training.master_weights import Masters
from cirloop.training.sharded import AllGatherWithGrad


class QueryCandidateModule(nn.Module):
    """Queries and candidates through one call, so that distributed wrappers see one forward per
    backward."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self._no_split_modules = sorted(
            _layers(embedder)
        )  # read by Accelerate: what FSDP2 shards one at a time

    def forward(
        self, inputs: Sequence[Mapping[str, torch.Tensor]], seeds: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """With `seeds`, one per call of the embedder, each call draws its dropout from its own."""
        embeddings = []
        for place, each in enumerate(inputs):
            if seeds:
                torch.manual_seed(seeds[place])
            embeddings.append(self.embedder(each))
        return embeddings


def _layers(module: nn.Module) -> set[str]:
    """Classes of the layers that transformers' models are made of."""
    names = {
        name for each in module.modules() for name in getattr(each, "_no_split_modules", None) or ()
    }
    return names & {type(each).__name__ for each in module.modules()}


def seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def marks_of(scores_BN: torch.Tensor, batch: Batch, settings: TrainingSettings) -> Marks:
    """What a batch knows of its candidates, and with `hardest` which of them online mining
    keeps."""
    arrays = (batch.target_B, batch.also_right_BN, batch.own_BK)
    target_B, right_BN, own_BK = (torch.from_numpy(array).to(scores_BN.device) for array in arrays)
    if not settings.num_hard_candidates:
        return Marks(target_B, right_BN, own_BK)
    kept_BN = online_mask(
        scores_BN,
        target_B,
        right_BN,
        settings.hard_candidate_pool,
        settings.num_hard_candidates,
        settings.hard_candidate_margin,
    )
    hardest_BH = rows_of(kept_BN.scatter(1, target_B[:, None], False), settings.num_hard_candidates)
    return Marks(target_B, right_BN | ~kept_BN, own_BK, hardest_BH)


class GradientEngine:
    """Computes gradients of `backbone`'s trained weights by `module`, its prepared
    `QueryCandidateModule`.

    With `masters`, the float32 copies of weights in half precision get the gradients.
    """

    def __init__(
        self,
        backbone: Any,
        features: VisionFeatures,
        batches: Batches,
        settings: TrainingSettings,
        seed: int,
        accelerator: Accelerator,
        module: Any,
        masters: Masters | None,
    ) -> None:
        self.backbone, self.features, self.batches, self.settings = (
            backbone,
            features,
            batches,
            settings,
        )
        self.seed, self.accelerator, self.module, self.masters = seed, accelerator, module, masters
        self.loss = settings.loss.build()

    def backward(self, step: int) -> float:
        """Add the gradient of a step's batch to the weights' gradients; returns the batch's
        loss."""
        batch = self.batches[step]
        if self.accelerator.is_main_process:
            profiling.add(steps=1, triplets=len(batch.queries))
        queries, candidates = (self._local_rows(items) for items, _ in self._encoder_inputs(batch))
        self.features.ensure(
            [item.image for item in (*queries, *candidates)]
        )  # in one go: threads read ahead
        chunked = (
            self._backward_in_chunks
            if self.settings.grad_cache_chunk_size
            else self._backward_whole
        )
        loss = chunked(step, batch, queries, candidates)
        if self.masters is not None:
            self.masters.average(self.accelerator)
        return loss

    @staticmethod
    def _encoder_inputs(
        batch: Batch,
    ) -> tuple[tuple[list[Item], list[int]], tuple[list[Item], list[int]]]:
        """What is embedded of queries and of candidates, equal inputs once, and each row's place
        among them."""
        queries = [Item(q.reference, q.text, q.category) for q in batch.queries]
        return each_once(queries), each_once([Item(image) for image in batch.candidates])

    def _local_rows(self, rows: Sequence[Item]) -> list[Item]:
        """This process's rows: every num_processes-th, the last ones repeated so that all have
        equally many."""
        n, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [rows[min(i, len(rows) - 1)] for i in range(rank, -(-len(rows) // n) * n, n)]

    def _gather(self, local: torch.Tensor, count: int) -> torch.Tensor:
        """All rows in their order, with gradients to the processes they came from."""
        if self.accelerator.num_processes == 1:
            return local[:count]
        rows: torch.Tensor = AllGatherWithGrad.apply(local)
        return rows.flatten(0, 1)[:count]

    def _loss(self, batch: Batch, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Of this process's embeddings; a gradient is the sum over the rows that share an
        embedding."""
        (asked, query_B), (shown, image_N) = self._encoder_inputs(batch)
        queries, candidates = (
            self._gather(queries, len(asked))[query_B],
            self._gather(candidates, len(shown))[image_N],
        )
        scores = similarity(queries, candidates)
        return self.loss(scores, marks_of(scores, batch, self.settings))

    def _inputs_of(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = self.backbone.inputs(
            items, self.features.get([item.image for item in items])
        )
        if torch.is_grad_enabled():  # of gradient caching's two passes, the second
            profiling.add_tokens(inputs)
            profiling.add(items=len(items))
        return inputs

    def _backward_whole(
        self, step: int, batch: Batch, queries: list[Item], candidates: list[Item]
    ) -> float:
        torch.manual_seed(seed_of(self.seed, step, self.accelerator.process_index))
        with nullcontext() if self.masters is None else self.accelerator.no_sync(self.module):
            loss = self._loss(
                batch, *self.module([self._inputs_of(queries), self._inputs_of(candidates)])
            )
            self.accelerator.backward(loss)
        return float(loss.detach())

    def _backward_in_chunks(
        self, step: int, batch: Batch, queries: list[Item], candidates: list[Item]
    ) -> float:
        """GradCache (arXiv 2101.06983): embed without a graph, take the loss's gradient, replay
        chunk by chunk."""
        size = self.settings.grad_cache_chunk_size
        chunks = [
            rows[i : i + size] for rows in (queries, candidates) for i in range(0, len(rows), size)
        ]
        num_query_chunks, last_chunk = -(-len(queries) // size), len(chunks) - 1

        def forward(*numbers: int) -> list[torch.Tensor]:
            rank = self.accelerator.process_index
            seeds = [
                seed_of(self.seed, step, rank, number) for number in numbers
            ]  # the replay sees the same dropout
            embeddings: list[torch.Tensor] = self.module(
                [self._inputs_of(chunks[number]) for number in numbers], seeds
            )
            return embeddings

        with torch.no_grad():
            cached = [forward(number)[0].requires_grad_() for number in range(len(chunks))]
        loss = self._loss(
            batch, torch.cat(cached[:num_query_chunks]), torch.cat(cached[num_query_chunks:])
        )
        grads = torch.autograd.grad(loss, cached)
        # Gradients are summed over processes once, at the last call: it holds a chunk of each side,
        # since some models have weights for one side alone, and DDP waits for all of them.
        for call in [*((number,) for number in range(1, last_chunk)), (0, last_chunk)]:
            synced = call[0] == 0 and self.masters is None  # copies are averaged by themselves
            with nullcontext() if synced else self.accelerator.no_sync(self.module):
                embeddings = forward(*call)
                parts = [
                    e.flatten() @ grads[number].flatten()
                    for number, e in zip(call, embeddings, strict=True)
                ]
                total = torch.stack(parts).sum()
                if total.requires_grad:  # images alone have no trained weight in some models
                    self.accelerator.backward(total)
        return float(loss.detach())
