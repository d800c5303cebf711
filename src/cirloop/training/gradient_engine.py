"""The loss of a step's batch and its gradient: the whole batch at once, or by gradient caching.

Every process knows the whole batch. Each encodes its share of queries and candidates, embeddings
are gathered with gradients, and each computes the loss of the whole batch. Averaging the gradients
over processes then gives the one-process gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from cirloop.backbones import EmbedInput
from cirloop.backbones.base import Backbone, Inputs, deduplicate
from cirloop.backbones.features import VisionCache
from cirloop.backbones.similarity import similarity
from cirloop.backbones.transfer import to_device
from cirloop.monitoring import profiling
from cirloop.training.batches import Batch, BatchSampler
from cirloop.training.config import TrainingSettings
from cirloop.training.hard_candidates import candidate_rows, hard_candidate_mask
from cirloop.training.losses import CandidateMasks
from cirloop.training.master_weights import MasterWeights
from cirloop.training.sharded import AllGatherWithGrad


class QueryCandidateModule(nn.Module):
    """An embedder that encodes queries and candidates in one call.

    So distributed wrappers see one forward per backward.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        # Accelerate reads this: the layers that FSDP2 shards one at a time.
        self._no_split_modules = sorted(_layer_classes(embedder))

    def forward(self, inputs: Sequence[Inputs], seeds: Sequence[int] = ()) -> list[torch.Tensor]:
        """Embed each of `inputs`; with `seeds`, each call draws its dropout from its own seed."""
        embeddings = []
        for number, call_inputs in enumerate(inputs):
            if seeds:
                torch.manual_seed(seeds[number])
            embeddings.append(self.embedder(call_inputs))
        return embeddings


def _layer_classes(module: nn.Module) -> set[str]:
    """Return the names of the layer classes that transformers' models do not split."""
    submodules = [*module.modules()]
    names: set[str] = set()
    for submodule in submodules:
        names.update(getattr(submodule, "_no_split_modules", None) or ())
    return names & {type(submodule).__name__ for submodule in submodules}


def seed_of(*parts: object) -> int:
    """Derive a seed of 56 bits from `parts`."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def candidate_masks(
    scores_BN: torch.Tensor, batch: Batch, settings: TrainingSettings
) -> CandidateMasks:
    """Return the masks of a batch; with `num_hard_candidates`, online mining ignores the rest."""
    device = scores_BN.device
    target_B = to_device(torch.from_numpy(batch.target_B), device)
    known_positive_BN = to_device(torch.from_numpy(batch.known_positive_BN), device)
    hard_negatives_BK = to_device(torch.from_numpy(batch.hard_negatives_BK), device)
    if not settings.num_hard_candidates:
        return CandidateMasks(target_B, known_positive_BN, hard_negatives_BK)
    kept_BN = hard_candidate_mask(
        scores_BN,
        target_B,
        known_positive_BN,
        settings.hard_candidate_pool,
        settings.num_hard_candidates,
        settings.hard_candidate_margin,
    )
    negatives_BN = kept_BN.scatter(1, target_B[:, None], False)
    hard_candidates_BH = candidate_rows(negatives_BN, settings.num_hard_candidates)
    ignored_BN = known_positive_BN | ~kept_BN
    return CandidateMasks(target_B, ignored_BN, hard_negatives_BK, hard_candidates_BH)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """This process's share of a batch, each input once."""

    queries: list[EmbedInput]
    candidates: list[EmbedInput]


class GradientEngine:
    """Computes gradients of `backbone`'s trained weights with its prepared `module`.

    With `master_weights`, the float32 copies of weights in half precision get the gradients.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: VisionCache,
        batches: BatchSampler,
        settings: TrainingSettings,
        seed: int,
        accelerator: Accelerator,
        module: nn.Module,
        master_weights: MasterWeights | None,
    ) -> None:
        self.backbone = backbone
        self.features = features
        self.batches = batches
        self.settings = settings
        self.seed = seed
        self.accelerator = accelerator
        self.module = module
        self.master_weights = master_weights
        self.loss = settings.loss.build()

    def backward(self, step: int) -> float:
        """Add the gradient of a step's batch to the weights' gradients; return the loss."""
        batch = self.batches[step]
        if self.accelerator.is_main_process:
            profiling.add(steps=1, triplets=len(batch.queries))
        (queries, _), (candidates, _) = self._encoder_inputs(batch)
        share = MicroBatch(self._local_rows(queries), self._local_rows(candidates))
        # In one call, so that threads read ahead.
        self.features.precompute([item.image for item in (*share.queries, *share.candidates)])
        if self.settings.grad_cache_chunk_size:
            loss = self._backward_in_chunks(step, batch, share)
        else:
            loss = self._backward_whole(step, batch, share)
        if self.master_weights is not None:
            self.master_weights.average(self.accelerator)
        return loss

    @staticmethod
    def _encoder_inputs(
        batch: Batch,
    ) -> tuple[tuple[list[EmbedInput], list[int]], tuple[list[EmbedInput], list[int]]]:
        """Return the unique inputs of queries and of candidates, and each row's index in them."""
        queries = [EmbedInput(q.reference, q.text, q.category) for q in batch.queries]
        candidates = [EmbedInput(image) for image in batch.candidates]
        return deduplicate(queries), deduplicate(candidates)

    def _local_rows(self, rows: Sequence[EmbedInput]) -> list[EmbedInput]:
        """Return this process's rows: every num_processes-th.

        The last row is repeated so that all processes have equally many.
        """
        num_processes = self.accelerator.num_processes
        padded_length = -(-len(rows) // num_processes) * num_processes
        indices = range(self.accelerator.process_index, padded_length, num_processes)
        return [rows[min(i, len(rows) - 1)] for i in indices]

    def _gather(self, local: torch.Tensor, count: int) -> torch.Tensor:
        """Gather the rows of all processes in order, with gradients to where they came from."""
        if self.accelerator.num_processes == 1:
            return local[:count]
        rows: torch.Tensor = AllGatherWithGrad.apply(local)
        return rows.flatten(0, 1)[:count]

    def _loss(self, batch: Batch, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Compute the loss of this process's embeddings.

        The gradient of an embedding is the sum over the rows that share it.
        """
        (query_inputs, query_B), (candidate_inputs, candidate_N) = self._encoder_inputs(batch)
        queries_BD = self._gather(queries, len(query_inputs))[query_B]
        candidates_ND = self._gather(candidates, len(candidate_inputs))[candidate_N]
        scores_BN = similarity(queries_BD, candidates_ND)
        return self.loss(scores_BN, candidate_masks(scores_BN, batch, self.settings))

    def _inputs_of(self, items: Sequence[EmbedInput]) -> Inputs:
        features = self.features.get([item.image for item in items])
        inputs = self.backbone.inputs(items, features)
        if torch.is_grad_enabled():  # of gradient caching's two passes, the second
            profiling.add_tokens(inputs)
            profiling.add(items=len(items))
        return inputs

    def _synchronized(self, synchronize: bool) -> AbstractContextManager[object]:
        """Let a backward pass average gradients over processes, or not."""
        return nullcontext() if synchronize else self.accelerator.no_sync(self.module)

    def _backward_whole(self, step: int, batch: Batch, share: MicroBatch) -> float:
        torch.manual_seed(seed_of(self.seed, step, self.accelerator.process_index))
        with self._synchronized(self.master_weights is None):
            inputs = [self._inputs_of(share.queries), self._inputs_of(share.candidates)]
            queries, candidates = self.module(inputs)
            loss = self._loss(batch, queries, candidates)
            self.accelerator.backward(loss)
        return float(loss.detach())

    def _backward_in_chunks(self, step: int, batch: Batch, share: MicroBatch) -> float:
        """Compute gradients by GradCache (arXiv 2101.06983).

        Embed without a graph, take the loss's gradient, and replay chunk by chunk.
        """
        size = self.settings.grad_cache_chunk_size
        chunks = [*_chunks(share.queries, size), *_chunks(share.candidates, size)]
        num_query_chunks = -(-len(share.queries) // size)
        last_chunk = len(chunks) - 1

        def forward(*numbers: int) -> list[torch.Tensor]:
            rank = self.accelerator.process_index
            # The replay draws the same dropout.
            seeds = [seed_of(self.seed, step, rank, number) for number in numbers]
            inputs = [self._inputs_of(chunks[number]) for number in numbers]
            embeddings: list[torch.Tensor] = self.module(inputs, seeds)
            return embeddings

        with torch.no_grad():
            cached = [forward(number)[0].requires_grad_() for number in range(len(chunks))]
        queries = torch.cat(cached[:num_query_chunks])
        candidates = torch.cat(cached[num_query_chunks:])
        loss = self._loss(batch, queries, candidates)
        grads = torch.autograd.grad(loss, cached)
        # Gradients are summed over processes once, at the last call: it holds a chunk of each side,
        # since some models have weights for one side alone, and DDP waits for all of them.
        for numbers in [*((number,) for number in range(1, last_chunk)), (0, last_chunk)]:
            # Master weights are averaged by themselves.
            with self._synchronized(numbers[0] == 0 and self.master_weights is None):
                products = [
                    embeddings.flatten() @ grads[number].flatten()
                    for number, embeddings in zip(numbers, forward(*numbers), strict=True)
                ]
                total = torch.stack(products).sum()
                if total.requires_grad:  # images alone have no trained weight in some models
                    self.accelerator.backward(total)
        return float(loss.detach())


def _chunks(rows: Sequence[EmbedInput], size: int) -> list[Sequence[EmbedInput]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
