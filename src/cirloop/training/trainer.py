"""One training stage under Accelerate: one process, DDP, FSDP2, or DeepSpeed, the same batches and the same loss.

Every process knows the whole batch; each encodes its share of queries and candidates, embeddings are gathered with
gradients, and each computes the loss of the whole batch. Averaging the gradients then gives the one-process gradient.
Randomness is a function of (seed, step, process), so resuming needs no random-number state: a step checkpoint is the
adapter, the optimizer's moments and the log, in safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn

from cirloop import cost
from cirloop.artifacts import file_digest, fingerprint, sync_tree, write_json
from cirloop.backbones import Item, flops
from cirloop.backbones.base import each_once
from cirloop.backbones.features import VisionFeatures
from cirloop.backbones.similarity import similarity
from cirloop.training.batches import Batch, Batches
from cirloop.training.config import TrainingSettings
from cirloop.training.losses import Marks
from cirloop.training.online import online_mask
from cirloop.training.sharded import Gather, full, in_step, like, made_whole, whole
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Row = dict[str, float]


class Pair(nn.Module):
    """Queries and candidates through one call, so that distributed wrappers see one forward per backward."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self._no_split_modules = sorted(_layers(embedder))  # read by Accelerate: what FSDP2 shards one at a time

    def forward(self, inputs: Sequence[dict[str, torch.Tensor]], seeds: Sequence[int] = ()) -> list[torch.Tensor]:
        """With `seeds`, one per call of the embedder, each call draws its dropout from its own."""
        made = []
        for place, each in enumerate(inputs):
            if seeds:
                torch.manual_seed(seeds[place])
            made.append(self.embedder(each))
        return made


def _layers(module: nn.Module) -> set[str]:
    """Classes of the layers that transformers' models are made of."""
    names = {name for each in module.modules() for name in getattr(each, "_no_split_modules", None) or ()}
    return names & {type(each).__name__ for each in module.modules()}


def seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


class Trainer:
    """Trains the LoRA of `backbone` for `steps` steps; `key` identifies everything that decides the result."""

    def __init__(
        self, backbone: Any, features: VisionFeatures, batches: Batches, settings: TrainingSettings, steps: int,
        seed: int, key: str, workspace: Path, save_every: int, accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.backbone, self.features, self.batches, self.settings = backbone, features, batches, settings
        self.steps, self.seed, self.workspace, self.save_every = steps, seed, workspace, save_every
        self.accelerator, self.loss = accelerator, settings.loss.build()
        self.key = fingerprint([key, accelerator.num_processes])
        self.log: list[Row] = []
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed:
            if settings.chunk_size:
                raise UserError(
                    "training.chunk_size is not available under DeepSpeed; set it to 0 or train without --deepspeed."
                )
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = max(1, settings.batch_size // accelerator.num_processes)
            config["gradient_clipping"] = settings.max_grad_norm
        self.parameters = backbone.trainable()
        self.flops = flops.language(backbone)
        self.again = bool(settings.chunk_size) + bool(getattr(backbone.settings, "gradient_checkpointing", False))
        optimizer = torch.optim.AdamW(
            self._groups(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            foreach=False,
        )
        self.module, self.optimizer = accelerator.prepare(Pair(backbone.module), optimizer)
        self.parameters = backbone.trainable()  # FSDP2 puts others in their place

    def run(self, progress: Callable[[Iterable[int]], Iterable[int]]) -> list[Row]:
        start = 0 if self.deepspeed else self._resume()
        self.module.train()
        before = whole(self._lora_B()) if start == 0 else {}
        for step in cost.traced(progress(range(start, self.steps)), "training"):
            rate = self._rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["top"] * rate
            loss = self._backward(step)  # under DeepSpeed, Accelerate takes the optimizer's step in here too
            norm = (
                None
                if self.deepspeed
                else self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
            )
            if step == 0 and not self.deepspeed:
                self._assert_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step == 0:
                self._assert_all_trained(before)
            self.log.append(
                {"step": step + 1, "loss": round(loss, 6), "learning_rate": self.settings.learning_rate * rate}
                | ({"grad_norm": round(float(full(norm)), 6)} if norm is not None else {})
            )
            if not self.deepspeed and self.save_every and (step + 1) % self.save_every == 0 and step + 1 < self.steps:
                self._save(step + 1)
        return self.log

    def _rate(self, step: int) -> float:
        """Share of the highest learning rate."""
        rise = max(1, round(self.settings.rate_warm_up * self.steps))
        left = (self.steps - step) / max(1, self.steps - rise)
        fall = {"linear": left, "cosine": (1 - math.cos(math.pi * min(1.0, left))) / 2, "constant": 1.0}
        return min((step + 1) / rise, fall[self.settings.schedule])

    def _groups(self) -> list[dict[str, Any]]:
        """Weights by learning rate, those of `settings.rates` apart. Raises UserError for a pattern that fits none."""
        rates = self.settings.rates
        of = {n: next((p for p in rates if re.match(p, n)), None) for n in self.parameters}
        idle = sorted(rates.keys() - {p for p in of.values() if p})
        if idle:
            raise UserError(f"training.rates: {', '.join(idle)} fit no trained weight, such as {next(iter(of))}.")
        tops: list[tuple[str | None, float]] = [(None, self.settings.learning_rate), *rates.items()]
        groups = [{"params": [w for n, w in self.parameters.items() if of[n] == p], "top": top} for p, top in tops]
        return [group for group in groups if group["params"]]

    @staticmethod
    def _sides(batch: Batch) -> tuple[tuple[list[Item], list[int]], tuple[list[Item], list[int]]]:
        """What is embedded of queries and of candidates, equal inputs once, and each row's place among them."""
        queries = [Item(q.reference, q.text) for q in batch.queries]
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
        device, ((asked, query_B), (shown, image_N)) = queries.device, self._sides(batch)
        queries, candidates = self._gather(queries, len(asked))[query_B], self._gather(candidates, len(shown))[image_N]
        target, out, own = (torch.from_numpy(a).to(device) for a in (batch.target_B, batch.also_right_BN, batch.own_BK))
        scores = similarity(queries, candidates)
        if self.settings.hardest:
            out = out | ~online_mask(scores, target, out, self.settings.hardest_of, self.settings.hardest)
        loss = self.loss(scores, Marks(target, out, own))
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()}; queries of the batch: {', '.join(q.id for q in batch.queries)}")
        return loss

    def _inputs(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = self.backbone.inputs(items, self.features.get([item.image for item in items]))
        if torch.is_grad_enabled():  # of gradient caching's two passes, the second
            flops.count(self.flops, made, backward=True, again=self.again)
            cost.add(items=len(items))
        return made

    def _backward(self, step: int) -> float:
        batch = self.batches[step]
        if self.accelerator.is_main_process:
            cost.add(steps=1, triplets=len(batch.queries))
        queries, candidates = (self._share(items) for items, _ in self._sides(batch))
        if self.settings.chunk_size:
            return self._backward_in_chunks(step, batch, queries, candidates)
        torch.manual_seed(seed_of(self.seed, step, self.accelerator.process_index))
        loss = self._loss(batch, *self.module([self._inputs(queries), self._inputs(candidates)]))
        self.accelerator.backward(loss)
        return float(loss.detach())

    def _backward_in_chunks(self, step: int, batch: Batch, queries: list[Item], candidates: list[Item]) -> float:
        """GradCache (arXiv 2101.06983): embed without a graph, take the loss's gradient, replay chunk by chunk."""
        size, rank = self.settings.chunk_size, self.accelerator.process_index
        chunks = [rows[i : i + size] for rows in (queries, candidates) for i in range(0, len(rows), size)]

        def forward(*numbers: int) -> list[torch.Tensor]:
            seeds = [seed_of(self.seed, step, rank, number) for number in numbers]  # the replay sees the same dropout
            made: list[torch.Tensor] = self.module([self._inputs(chunks[number]) for number in numbers], seeds)
            return made

        with torch.no_grad():
            vectors = [forward(i)[0] for i in range(len(chunks))]
        for vector in vectors:
            vector.requires_grad_()
        first = -(-len(queries) // size)
        loss = self._loss(batch, torch.cat(vectors[:first]), torch.cat(vectors[first:]))
        grads = torch.autograd.grad(loss, vectors)
        # Gradients are summed over processes once, at the last call: it holds a chunk of each side, since some models
        # have weights for one side alone, and DDP waits for all of them.
        calls: list[tuple[int, ...]] = [(i,) for i in range(1, len(chunks) - 1)] + [(0, len(chunks) - 1)]
        for call in calls:
            with nullcontext() if call is calls[-1] else self.accelerator.no_sync(self.module):
                made = forward(*call)
                parts = [v.flatten() @ grads[i].flatten() for i, v in zip(call, made, strict=True)]
                total = torch.stack(parts).sum()
                if total.requires_grad:  # images alone have no trained weight in some models
                    self.accelerator.backward(total)
        return float(loss.detach())

    def _assert_gradients(self) -> None:
        dead = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if dead:
            raise RuntimeError(f"{len(dead)} trained weights get no gradient, the first: {dead[0]}")

    def _assert_all_trained(self, before: dict[str, torch.Tensor]) -> None:
        """Every lora_B has moved after the first step, so every one had a gradient."""
        now = whole(self._lora_B())
        dead = [name for name, value in before.items() if torch.equal(now[name], value)]
        if dead:
            raise RuntimeError(f"{len(dead)} LoRA matrices get no gradient, the first: {dead[0]}")

    def _lora_B(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if "lora_B" in name}

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter, once; every process calls this, since each may have a piece of it."""
        in_step(self.module)
        with made_whole(self.backbone.core, self.parameters):
            if self.accelerator.is_main_process:
                self.backbone.save_adapter(directory)

    def _save(self, step: int) -> None:
        state = {f"parameter/{n}": value for n, value in whole(self.parameters).items()}
        for n, p in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{n}"] = full(self.optimizer.state[p][moment].detach()).cpu().contiguous()
        if not self.accelerator.is_main_process:
            return
        goal, aside = self.workspace / f"step_{step:06d}", self.workspace / "new"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(state, aside / "state.safetensors")
        digest = file_digest(aside / "state.safetensors")
        write_json(aside / "state.json", {"key": self.key, "step": step, "digest": digest, "log": self.log})
        sync_tree(aside)
        aside.replace(goal)
        for old in sorted(self.workspace.glob("step_*"))[:-1]:
            shutil.rmtree(old)

    def _resume(self) -> int:
        """Load the newest step checkpoint of this very stage; returns the step to go on with."""
        import json

        for path in sorted(self.workspace.glob("step_*"), reverse=True):
            record = json.loads((path / "state.json").read_text("utf-8"))
            if record["key"] != self.key:
                raise UserError(
                    f"{path} is of a training stage with other settings or inputs. Delete it to train from the start."
                )
            if file_digest(path / "state.safetensors") != record["digest"]:
                raise UserError(f"{path / 'state.safetensors'} is altered. Delete {path} to train from the start.")
            state = load_file(path / "state.safetensors")
            with torch.no_grad():
                for n, p in self.parameters.items():
                    p.copy_(like(state[f"parameter/{n}"], p))
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(record["step"])),
                        **{m: like(state[f"{m}/{n}"], p) for m in ("exp_avg", "exp_avg_sq")},
                    }
            self.log = record["log"]
            logger.info("resuming training at step %d of %d", record["step"], self.steps)
            return int(record["step"])
        return 0
