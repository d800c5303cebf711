"""One training stage under Accelerate: one process, DDP, FSDP2, or DeepSpeed, the same batches and
the same loss.

Randomness is a function of (seed, step, process), so resuming needs no random-number state: a step
checkpoint is the adapter, the optimizer's moments and the log, in safetensors and JSON.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.features import VisionFeatures
from cirloop.monitoring import oom, preemption, profiling
from cirloop.training.batches import Batches
from cirloop.training.checkpoints import StepCheckpoints
from cirloop.training.config import TrainingSettings
from cirloop.training.gradient_engine import GradientEngine, QueryCandidateModule
from cirloop.training.health import BadBatch, bad_row
from cirloop.training.master_weights import Masters
from cirloop.training.sharded import (
    gather_parameters,
    gather_tensor,
    replaced,
    reshard_all,
    shard_like,
    unsharded,
)
from cirloop.types import UserError

logger = logging.getLogger(__name__)
Row = dict[str, Any]
"""A step in the training log: loss, rate, gradient norm; of a bad batch that was left out,
`bad_row`."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """Trains the LoRA of `backbone` for `steps` steps; `key` identifies everything that decides the
    result."""

    def __init__(
        self,
        backbone: Any,
        features: VisionFeatures,
        batches: Batches,
        settings: TrainingSettings,
        steps: int,
        seed: int,
        key: str,
        workspace: Path,
        checkpoint_every_steps: int,
        accelerator: Accelerator,
        note: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """`note` gets each row of the log, also those of steps that an attempt before has done."""
        self.backbone, self.batches, self.settings, self.accelerator = (
            backbone,
            batches,
            settings,
            accelerator,
        )
        self.steps, self.checkpoint_every_steps, self.note = steps, checkpoint_every_steps, note
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.key = fingerprint([key, accelerator.num_processes])
        self.checkpoints = StepCheckpoints(workspace, self.key)
        self.log: list[Row] = []
        if self.deepspeed:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = max(
                1, settings.batch_size // accelerator.num_processes
            )
            config["gradient_clipping"] = settings.max_grad_norm
        self.parameters = backbone.trainable()
        self.masters: Masters | None = None
        """Where weights are trained in half precision: their float32 copies."""
        if settings.lora.dtype == "base":
            self.masters = Masters(self.parameters, getattr(torch, backbone.settings.dtype))
            self.parameters = self.masters.copies
        optimizer = torch.optim.AdamW(
            self._groups(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            foreach=False,
        )
        self.module, self.optimizer = accelerator.prepare(
            QueryCandidateModule(backbone.module), optimizer
        )
        if self.masters is None:
            self.parameters = backbone.trainable()  # FSDP2 puts others in their place
        self.engine = GradientEngine(
            backbone, features, batches, settings, seed, accelerator, self.module, self.masters
        )
        self.scaled = bool(
            self.module.fp16_enabled() if self.deepspeed else accelerator.scaler is not None
        )
        """Whether gradients carry a scale that is lowered at those that are not finite; their step
        is left out."""

    def run(self, progress: Callable[[Iterable[int]], Iterable[int]]) -> list[Row]:
        """Do the steps left, and return a row for each. Raises BadBatch, and GracefulStop after the
        step at which the run is asked to stop."""
        start = 0 if self.deepspeed else self._resume()
        self.module.train()
        before = gather_parameters(self._lora_B()) if start == 0 else {}
        for row in self.log:
            self.note(row)
        for step in profiling.profile_batches(progress(range(start, self.steps)), "training"):
            with oom.explain_oom(f"training step {step + 1}", self._way_out()):
                stop = self._step(step, before)
            self.note(self.log[-1])
            if stop and step + 1 < self.steps:
                self._stop(step + 1)
            if (
                not self.deepspeed
                and self.checkpoint_every_steps
                and (step + 1) % self.checkpoint_every_steps == 0
                and step + 1 < self.steps
            ):
                self._save(step + 1)
        return self.log

    def _step(self, step: int, before: dict[str, torch.Tensor]) -> bool:
        """One step, or a bad batch left out; a row in the log; whether the run is asked to stop.
        `before`: every trained lora_B as it was at the start, until a step with a gradient."""
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * rate
        loss = self.engine.backward(
            step
        )  # under DeepSpeed, Accelerate takes the optimizer's step in here too
        norm = self._norm()
        finite = math.isfinite(loss) and (norm is None or self.scaled or math.isfinite(norm))
        stop, bad = self._any(preemption.stop_requested(), not finite)
        if bad:
            self._pass_over(bad_row(step + 1, loss, norm, self.batches[step]))
            return stop
        if self._num_skipped() == step and not self.deepspeed:  # the first that is taken
            self._assert_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not None:
            self.masters.round()
        if (
            norm is None or 0 < norm < math.inf
        ):  # a loss of 0, where no negative counts, moves nothing
            self._assert_all_trained(before)
            before.clear()
        row: Row = {
            "step": step + 1,
            "loss": round(loss, 6),
            "learning_rate": self.settings.learning_rate * rate,
        }
        if norm is not None and not self.deepspeed and math.isfinite(norm):
            row["grad_norm"] = round(norm, 6)
        self.log.append(row)
        return stop

    def _way_out(self) -> str:
        """What to set where memory does not suffice for a step."""
        rest = (
            "a smaller training.batch_size or model.max_pixels, or model.gradient_checkpointing"
            " true."
        )
        rows = self.settings.grad_cache_chunk_size or -(
            -self.settings.batch_size // self.accelerator.num_processes
        )
        if self.deepspeed or rows == 1:
            return f"Set {rest}"
        return (
            f"Go on by --training.grad_cache_chunk_size {rows // 2} --auto_resume, so many rows at"
            f" once. Or start anew with {rest}"
        )

    def _norm(self) -> float | None:
        """The gradient's norm, which is cut to the highest allowed; None where DeepSpeed, which
        cuts it, tells none."""
        if self.deepspeed:
            total = self.module.get_global_grad_norm()
            return None if total is None else float(total)
        norm = self.accelerator.clip_grad_norm_(
            self.parameters.values(), self.settings.max_grad_norm
        )
        return float(gather_tensor(norm))

    def _any(self, *flags: bool) -> list[bool]:
        """Each of `flags`, true in all processes where it is in one: they stop and pass over
        together."""
        local = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return [bool(flag) for flag in self.accelerator.reduce(local, "sum").tolist()]

    def _num_skipped(self) -> int:
        """How many bad batches were left out so far."""
        return sum("ids" in row for row in self.log)

    def _pass_over(self, row: Row) -> None:
        """Leave a bad batch's step out, if so many may be. Raises BadBatch."""
        skipped = self._num_skipped()
        if skipped >= self.settings.max_skipped_batches:
            raise BadBatch(row, self.steps, skipped)
        self.optimizer.zero_grad()
        self.log.append(row)
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d is left out (bad batch %d of at most %d): loss %s, gradient norm %s",
                row["step"],
                skipped + 1,
                self.settings.max_skipped_batches,
                row["loss"],
                row["grad_norm"],
            )

    def _stop(self, step: int) -> None:
        """Keep what `step` steps have made. Raises GracefulStop."""
        if not self.deepspeed:
            self._save(step)
        self.accelerator.wait_for_everyone()  # the first one writes
        if self.accelerator.is_main_process:
            kept = "not kept, since DeepSpeed has no step checkpoints" if self.deepspeed else "kept"
            logger.info("asked to stop: %d of %d steps are done and %s", step, self.steps, kept)
        raise preemption.GracefulStop

    def _rate(self, step: int) -> float:
        """Share of the highest learning rate."""
        rise = max(1, round(self.settings.lr_warmup_ratio * self.steps))
        left = (self.steps - step) / max(1, self.steps - rise)
        fall = {
            "linear": left,
            "cosine": (1 - math.cos(math.pi * min(1.0, left))) / 2,
            "constant": 1.0,
        }
        return min((step + 1) / rise, fall[self.settings.lr_scheduler])

    def _groups(self) -> list[dict[str, Any]]:
        """Weights by learning rate, those of `settings.lr_overrides` apart. Raises UserError for a
        pattern that fits none."""
        rates = self.settings.lr_overrides
        of = {n: next((p for p in rates if re.match(p, n)), None) for n in self.parameters}
        idle = sorted(rates.keys() - {p for p in of.values() if p})
        if idle:
            raise UserError(
                f"training.lr_overrides: {', '.join(idle)} fit no trained weight, such as"
                f" {next(iter(of))}."
            )
        tops: list[tuple[str | None, float]] = [(None, self.settings.learning_rate), *rates.items()]
        groups = [
            {"params": [w for n, w in self.parameters.items() if of[n] == p], "top": top}
            for p, top in tops
        ]
        return [group for group in groups if group["params"]]

    def _assert_gradients(self) -> None:
        dead = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if dead:
            raise RuntimeError(f"{len(dead)} trained weights get no gradient, the first: {dead[0]}")

    def _assert_all_trained(self, before: dict[str, torch.Tensor]) -> None:
        """Every lora_B has moved after the first step with a gradient, so every one had one."""
        now = gather_parameters(self._lora_B())
        dead = [name for name, value in before.items() if torch.equal(now[name], value)]
        if dead:
            raise RuntimeError(f"{len(dead)} LoRA matrices get no gradient, the first: {dead[0]}")

    def _lora_B(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if "lora_B" in name}

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter, once; every process calls this, since each may have a piece of it."""
        reshard_all(self.module)
        whole = unsharded(self.parameters) if self.masters is None else self.masters.copies
        with replaced(self.backbone.core, whole):
            if self.accelerator.is_main_process:
                self.backbone.save_adapter(directory)

    def _save(self, step: int) -> None:
        if self._num_skipped() == step:  # all batches so far were bad: the start is as good
            return
        state = {f"parameter/{n}": value for n, value in gather_parameters(self.parameters).items()}
        for n, p in self.parameters.items():
            for moment in MOMENTS:
                state[f"{moment}/{n}"] = (
                    gather_tensor(self.optimizer.state[p][moment].detach()).cpu().contiguous()
                )
        if self.accelerator.is_main_process:
            self.checkpoints.write(step, state, self.log)

    def _resume(self) -> int:
        """Load the newest step checkpoint of this very stage; returns the step to go on with."""
        newest = self.checkpoints.newest()
        if newest is None:
            return 0
        record, state = newest
        self.log, step = record["log"], int(record["step"])
        taken = step - self._num_skipped()
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.copy_(shard_like(state[f"parameter/{n}"], p))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(taken)),
                    **{m: shard_like(state[f"{m}/{n}"], p) for m in MOMENTS},
                }
        if self.masters is not None:
            self.masters.round()
        logger.info("resuming training at step %d of %d", step, self.steps)
        return step
