"""The loss of a step's batch and its gradient: the whole batch at once, or by gradient caching.

Every process knows the whole batch; each encodes its share of queries and candidates, embeddings are gathered with
gradients, and each computes the loss of the whole batch. Averaging the gradients then gives the one-process gradient.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import nn

from cirloop import cost, memory
from cirloop.backbones import Item
from cirloop.backbones.base import each_once
from cirloop.backbones.features import VisionFeatures
from cirloop.backbones.similarity import similarity
from cirloop.training.batches import Batch, Batches
from cirloop.training.config import TrainingSettings
from cirloop.training.dropout import Window, drawn_for, random_state
from cirloop.training.losses import Marks
from cirloop.training.masters import Masters
from cirloop.training.online import online_mask, rows_of
from cirloop.training.sharded import Gather
from cirloop.types import UserError

logger = logging.getLogger(__name__)


class Pair(nn.Module):
    """Queries and candidates through one call, so that distributed wrappers see one forward per backward."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self._no_split_modules = sorted(_layers(embedder))  # read by Accelerate: what FSDP2 shards one at a time

    def forward(
        self, inputs: Sequence[dict[str, torch.Tensor]], draws: Sequence[Callable[[], object]] = ()
    ) -> list[torch.Tensor]:
        """With `draws`, one per call of the embedder, each sets the random numbers that its call draws dropout from."""
        made = []
        for place, each in enumerate(inputs):
            if draws:
                draws[place]()
            made.append(self.embedder(each))
        return made


def _layers(module: nn.Module) -> set[str]:
    """Classes of the layers that transformers' models are made of."""
    names = {name for each in module.modules() for name in getattr(each, "_no_split_modules", None) or ()}
    return names & {type(each).__name__ for each in module.modules()}


def seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that are encoded at once: `rows[first:last]` of a chunk of the settings, with the lengths of all of that
    chunk's rows where the piece is a part of it."""

    rows: Sequence[Item]
    chunk: int
    first: int
    last: int
    lengths: Sequence[int]

    @property
    def items(self) -> Sequence[Item]:
        return self.rows[self.first : self.last]


def marks_of(scores_BN: torch.Tensor, batch: Batch, settings: TrainingSettings) -> Marks:
    """What a batch knows of its candidates, and with `hardest` which of them online mining keeps."""
    arrays = (batch.target_B, batch.also_right_BN, batch.own_BK)
    target_B, right_BN, own_BK = (torch.from_numpy(array).to(scores_BN.device) for array in arrays)
    if not settings.hardest:
        return Marks(target_B, right_BN, own_BK)
    kept_BN = online_mask(scores_BN, target_B, right_BN, settings.hardest_of, settings.hardest, settings.hardest_margin)
    hardest_BH = rows_of(kept_BN.scatter(1, target_B[:, None], False), settings.hardest)
    return Marks(target_B, right_BN | ~kept_BN, own_BK, hardest_BH)


class Gradients:
    """Gradients of `backbone`'s trained weights. `optimizer` and `module`, prepared, are given afterwards."""

    module: Any
    optimizer: Any

    def __init__(
        self, backbone: Any, features: VisionFeatures, batches: Batches, settings: TrainingSettings, seed: int,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.backbone, self.features, self.batches, self.settings = backbone, features, batches, settings
        self.seed, self.accelerator, self.loss = seed, accelerator, settings.loss.build()
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.chunk_size = settings.chunk_size
        """Rows at once; smaller than set from the step on at which memory did not suffice."""
        self.masters: Masters | None = None
        """Where weights are trained in half precision: their float32 copies, which also get the gradients."""

    @staticmethod
    def _sides(batch: Batch) -> tuple[tuple[list[Item], list[int]], tuple[list[Item], list[int]]]:
        """What is embedded of queries and of candidates, equal inputs once, and each row's place among them."""
        queries = [Item(q.reference, q.text, q.category) for q in batch.queries]
        return each_once(queries), each_once([Item(image) for image in batch.candidates])

    def _share(self, rows: Sequence[Item]) -> list[Item]:
        """This process's rows: every num_processes-th, the last ones repeated so that all have equally many."""
        n, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [rows[min(i, len(rows) - 1)] for i in range(rank, -(-len(rows) // n) * n, n)]

    def _gather(self, local: torch.Tensor, count: int) -> torch.Tensor:
        """All rows in their order, with gradients to the processes they came from."""
        if self.accelerator.num_processes == 1:
            return local[:count]
        rows: torch.Tensor = Gather.apply(local)
        return rows.flatten(0, 1)[:count]

    def _loss(self, batch: Batch, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Of this process's vectors for `_sides(batch)`; a gradient is the sum over the rows that share a vector."""
        (asked, query_B), (shown, image_N) = self._sides(batch)
        queries, candidates = self._gather(queries, len(asked))[query_B], self._gather(candidates, len(shown))[image_N]
        scores = similarity(queries, candidates)
        return self.loss(scores, marks_of(scores, batch, self.settings))

    def _inputs(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = self.backbone.inputs(items, self.features.get([item.image for item in items]))
        if torch.is_grad_enabled():  # of gradient caching's two passes, the second
            cost.add_tokens(made)
            cost.add(items=len(items))
        return made

    def _backward(self, step: int) -> float:
        """The loss of a step's batch, and its gradient; where memory does not suffice, in smaller chunks."""
        batch = self.batches[step]
        if self.accelerator.is_main_process:
            cost.add(steps=1, triplets=len(batch.queries))
        while True:
            try:
                loss = self._backward_of(step, batch)
                if self.masters is not None:
                    self.masters.average(self.accelerator)
                return loss
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                why = memory.first_line(error)
            self._split(step, why)  # only here have the tensors of the attempt gone with its error

    def _backward_of(self, step: int, batch: Batch) -> float:
        queries, candidates = (self._share(items) for items, _ in self._sides(batch))
        self.features.ensure([item.image for item in (*queries, *candidates)])  # in one go: threads read ahead
        if self.chunk_size:
            return self._backward_in_chunks(step, batch, queries, candidates)
        torch.manual_seed(seed_of(self.seed, step, self.accelerator.process_index))
        with nullcontext() if self.masters is None else self.accelerator.no_sync(self.module):
            loss = self._loss(batch, *self.module([self._inputs(queries), self._inputs(candidates)]))
            self.accelerator.backward(loss)
        return float(loss.detach())

    @property
    def _smaller(self) -> str:
        chunks = "" if self.deepspeed else "training.chunk_size, "
        return f"Set a smaller {chunks}training.batch_size or model.max_pixels, or model.gradient_checkpointing true."

    def _split(self, step: int, why: str) -> None:
        """From this step on, half as many rows at once by gradient caching. Raises UserError where that cannot be."""
        size = self.chunk_size or self.settings.batch_size
        norms = [each for each in self.module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        mixing = any(norm.training for norm in norms)
        cannot = {
            "a step is split in a single process only": self.accelerator.num_processes > 1 or self.deepspeed,
            "a batch is not split with batch normalisation, which sees all of it": mixing,
            "one row alone is too large": size == 1,
        }
        for reason, so in cannot.items():
            if so:
                raise UserError(f"training step {step + 1}: {why}\nHere {reason}. {self._smaller}")
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        self.chunk_size = size // 2
        logger.warning(
            "training step %d: %s\nFrom this step on, %d rows at once by gradient caching (training.chunk_size %d).",
            step + 1, why, self.chunk_size, self.chunk_size,
        )  # fmt: skip

    def _pieces(self, rows: list[Item], chunk: int) -> list[Piece]:
        """The chunks of the settings, numbered from `chunk`, each in pieces of as many rows as memory holds."""
        size = self.settings.chunk_size or len(rows)
        chunks = enumerate((rows[i : i + size] for i in range(0, len(rows), size)), chunk)
        pieces = []
        for number, part in chunks:
            lengths = self._lengths(part) if len(part) > self.chunk_size else []
            for i in range(0, len(part), self.chunk_size):
                pieces.append(Piece(part, number, i, min(i + self.chunk_size, len(part)), lengths))
        return pieces

    def _draws(self, step: int) -> Callable[[Piece], Callable[[], object]]:
        """What sets the random numbers that a piece draws from: those of its chunk, which have a seed. A batch in one
        has one seed, and its candidates go on where its queries ended, where each piece of the queries ends too."""
        parts = [self.seed, step, self.accelerator.process_index]
        ends: list[Callable[[], object]] = []

        def draws(piece: Piece) -> Callable[[], object]:
            if self.settings.chunk_size:
                return partial(torch.manual_seed, seed_of(*parts, piece.chunk))
            if piece.chunk == 0:
                return partial(torch.manual_seed, seed_of(*parts))
            ends[:] = ends or [random_state(self.accelerator.device)]
            return ends[0]

        return draws

    def _window(self, piece: Piece) -> Window:
        """The place of a piece's dropout in that of its chunk."""
        if not getattr(self.backbone.settings, "packed", False):
            return Window(piece.first, piece.last - piece.first, len(piece.rows))
        first, last = sum(piece.lengths[: piece.first]), sum(piece.lengths[: piece.last])
        return Window(first, last - first, sum(piece.lengths), dim=1)

    def _lengths(self, rows: Sequence[Item]) -> list[int]:
        seen = self.features.get([item.image for item in rows])
        return [self.backbone.length(item, each.grid) for item, each in zip(rows, seen, strict=True)]

    def _of(self, piece: Piece) -> dict[str, torch.Tensor]:
        """The inputs of a piece, in rows as long as its chunk's."""
        made = self._inputs(piece.items)
        if piece.lengths and "input_ids" in made:
            more = (0, max(piece.lengths) - made["input_ids"].shape[1])
            made["input_ids"] = F.pad(made["input_ids"], more, value=self.backbone.processor.tokenizer.pad_token_id)
            made["attention_mask"] = F.pad(made["attention_mask"], more)
        return made

    def _backward_in_chunks(self, step: int, batch: Batch, queries: list[Item], candidates: list[Item]) -> float:
        """GradCache (arXiv 2101.06983): embed without a graph, take the loss's gradient, replay piece by piece."""
        asked = self._pieces(queries, 0)
        pieces = asked + self._pieces(candidates, asked[-1].chunk + 1)
        split, draws = self.chunk_size != self.settings.chunk_size, self._draws(step)

        def forward(*numbers: int) -> list[torch.Tensor]:
            starts = [draws(pieces[number]) for number in numbers]  # the replay sees the same dropout
            made: list[torch.Tensor] = self.module([self._of(pieces[number]) for number in numbers], starts)
            return made

        def dropout(number: int) -> AbstractContextManager[None]:
            return drawn_for(self._window(pieces[number])) if pieces[number].lengths else nullcontext()

        vectors: list[torch.Tensor] = []
        for number in range(len(pieces)):
            with torch.no_grad(), dropout(number):
                vectors += forward(number)
        for vector in vectors:
            vector.requires_grad_()
        loss = self._loss(batch, torch.cat(vectors[: len(asked)]), torch.cat(vectors[len(asked) :]))
        grads = torch.autograd.grad(loss, vectors)
        # Gradients are summed over processes once, at the last call: it holds a chunk of each side, since some models
        # have weights for one side alone, and DDP waits for all of them. A step is split in one process only.
        calls: list[tuple[int, ...]] = [(i,) for i in range(1, len(pieces) - 1)] + [(0, len(pieces) - 1)]
        for call in [(i,) for i in range(len(pieces))] if split else calls:
            last = call is calls[-1] and self.masters is None  # copies are averaged by themselves
            summed = nullcontext() if split or last else self.accelerator.no_sync(self.module)
            with summed, dropout(call[0]):  # checkpointed layers drop out again on the way back
                made = forward(*call)
                parts = [v.flatten() @ grads[i].flatten() for i, v in zip(call, made, strict=True)]
                total = torch.stack(parts).sum()
                if total.requires_grad:  # images alone have no trained weight in some models
                    self.accelerator.backward(total)
        return float(loss.detach())
