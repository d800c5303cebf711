"""One training stage under Accelerate: in one process, DDP, FSDP2 or DeepSpeed.

Batches and losses are the same in all of them. Randomness is a function of (seed, step, process),
so resuming needs no state of random generators: a step checkpoint is the trained weights, the
optimizer's moments and the log, in safetensors and JSON.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.base import Backbone
from cirloop.backbones.features import VisionCache
from cirloop.monitoring import oom, preemption, profiling
from cirloop.training.batches import BatchSampler
from cirloop.training.checkpoints import StepCheckpoints
from cirloop.training.config import TrainingSettings
from cirloop.training.gradient_engine import GradientEngine, QueryCandidateModule
from cirloop.training.health import NonFiniteBatch, non_finite_row
from cirloop.training.log import Row, SkippedRow, StepRow, is_skipped
from cirloop.training.master_weights import MasterWeights
from cirloop.training.optimization import lr_factor, parameter_groups
from cirloop.training.sharded import (
    gather_parameters,
    gather_tensor,
    replaced,
    reshard_all,
    unsharded,
)
from cirloop.training.step_state import StepState
from cirloop.training.zero_state import ZeroState

logger = logging.getLogger(__name__)


class Trainer:
    """Trains `backbone` for `steps` steps; `key` identifies all that decides the result."""

    def __init__(
        self,
        backbone: Backbone,
        features: VisionCache,
        batches: BatchSampler,
        settings: TrainingSettings,
        steps: int,
        seed: int,
        key: str,
        workspace: Path,
        checkpoint_every_steps: int,
        accelerator: Accelerator,
        note: Callable[[Row], None] = lambda row: None,
        schedule: tuple[int, int] | None = None,
    ) -> None:
        """`note` gets each row of the log, also those of steps that an earlier attempt took.

        `schedule`: the first of these steps in the learning rate's, and that one's length.
        """
        self.backbone = backbone
        self.batches = batches
        self.settings = settings
        self.accelerator = accelerator
        self.steps = steps
        self.schedule = schedule or (0, steps)
        self.checkpoint_every_steps = checkpoint_every_steps
        self.note = note
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.log: list[Row] = []
        self.parameters = backbone.trainable()
        self.master_weights: MasterWeights | None = None
        """Float32 copies, where weights are trained in half precision."""
        if settings.lora.dtype == "base":
            dtype = getattr(torch, backbone.settings.dtype)
            self.master_weights = MasterWeights(self.parameters, dtype)
            self.parameters = self.master_weights.copies
        self._prepare()
        self.state = self._step_state()
        identity = [key, accelerator.num_processes, *self.state.kind]
        self.checkpoints = StepCheckpoints(workspace, fingerprint(identity))
        self.engine = GradientEngine(
            backbone,
            features,
            batches,
            settings,
            seed,
            accelerator,
            self.module,
            self.master_weights,
        )

    def _prepare(self) -> None:
        """Set up the module and its optimizer for the processes that train."""
        if self.deepspeed:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            rows = self.settings.batch_size // self.accelerator.num_processes
            config["train_micro_batch_size_per_gpu"] = max(1, rows)
            config["gradient_clipping"] = self.settings.max_grad_norm
        optimizer = torch.optim.AdamW(
            parameter_groups(self.parameters, self.settings),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            foreach=False,
        )
        module = QueryCandidateModule(self.backbone.module)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        if self.master_weights is None:
            self.parameters = self.backbone.trainable()  # FSDP2 puts others in their place

    def _step_state(self) -> StepState:
        if self.deepspeed:
            return ZeroState(self.parameters, self.optimizer, scaled=self.scaled)
        return StepState(self.parameters, self.optimizer, self.accelerator.scaler)

    @property
    def scaled(self) -> bool:
        """Whether gradients are scaled: the scale falls where they are not finite, and the step is
        skipped."""
        has_scaler = self.accelerator.scaler is not None
        return bool(self.module.fp16_enabled() if self.deepspeed else has_scaler)

    def run(self, progress: Callable[[Iterable[int]], Iterable[int]]) -> list[Row]:
        """Take the remaining steps, and return a row for each step.

        Raises NonFiniteBatch, and GracefulStop after the step at which the run is asked to stop.
        """
        start = self._resume()
        self.module.train()
        before = gather_parameters(self._lora_B()) if start == 0 else {}
        for row in self.log:
            self.note(row)
        for step in profiling.profile_batches(progress(range(start, self.steps)), "training"):
            with oom.explain_oom(f"training step {step + 1}", self._way_out()):
                stop = self._step(step, before)
            self.note(self.log[-1])
            if step + 1 == self.steps:
                continue
            if stop:
                self._stop(step + 1)
            if self.checkpoint_every_steps and (step + 1) % self.checkpoint_every_steps == 0:
                self._save(step + 1)
        return self.log

    def _step(self, step: int, before: dict[str, torch.Tensor]) -> bool:
        """Take a step, or skip a bad batch; log a row; return whether the run is asked to stop.

        `before` holds every trained lora_B as it was at the start, until a step with a gradient.
        """
        factor = lr_factor(self.schedule[0] + step, self.schedule[1], self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * factor
        # Under DeepSpeed, Accelerate takes the optimizer's step in here too.
        loss = self.engine.backward(step)
        norm = self._clip_gradient()
        finite = math.isfinite(loss) and (norm is None or self.scaled or math.isfinite(norm))
        stop, bad = self._any(preemption.stop_requested(), not finite)
        if bad:
            self._skip_step(non_finite_row(step + 1, loss, norm, self.batches[step]))
            return stop
        if self._num_skipped() == step and not self.deepspeed:  # the first step that is taken
            self._assert_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.master_weights is not None:
            self.master_weights.copy_to_model()
        # A loss of 0, where no negative counts, moves nothing.
        if before and (norm is None or 0 < norm < math.inf):
            self._assert_all_trained(before)
            before.clear()
        row: StepRow = {
            "step": step + 1,
            "loss": round(loss, 6),
            "learning_rate": self.settings.learning_rate * factor,
        }
        if norm is not None and not self.deepspeed and math.isfinite(norm):
            row["grad_norm"] = round(norm, 6)
        self.log.append(row)
        return stop

    def _way_out(self) -> str:
        """Return what to set where memory does not suffice for a step."""
        rest = "a smaller training.batch_size or model.max_pixels, or model.gradient_checkpointing"
        share = -(-self.settings.batch_size // self.accelerator.num_processes)
        rows = self.settings.grad_cache_chunk_size or share
        if self.deepspeed or rows == 1:
            return f"Set {rest} true."
        return (
            f"Go on by --training.grad_cache_chunk_size {rows // 2} --auto_resume, so many rows at"
            f" once. Or start anew with {rest} true."
        )

    def _clip_gradient(self) -> float | None:
        """Clip the gradient to the highest norm allowed, and return its norm before.

        DeepSpeed clips by itself; None where it does not tell the norm.
        """
        if self.deepspeed:
            total = self.module.get_global_grad_norm()
            return None if total is None else float(total)
        norm = self.accelerator.clip_grad_norm_(
            self.parameters.values(), self.settings.max_grad_norm
        )
        return float(gather_tensor(norm))

    def _any(self, *flags: bool) -> list[bool]:
        """Return for each of `flags` whether it is true in any process.

        So all processes stop and skip steps together.
        """
        local = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return [bool(flag) for flag in self.accelerator.reduce(local, "sum").tolist()]

    def _num_skipped(self) -> int:
        """Count the bad batches that were skipped."""
        return sum(map(is_skipped, self.log))

    def _skip_step(self, row: SkippedRow) -> None:
        """Skip a bad batch's step. Raises NonFiniteBatch where no more may be skipped."""
        num_skipped = self._num_skipped()
        if num_skipped >= self.settings.max_skipped_batches:
            raise NonFiniteBatch(row, self.steps, num_skipped)
        self.optimizer.zero_grad()
        self.log.append(row)
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d is left out (bad batch %d of at most %d): loss %s, gradient norm %s",
                row["step"],
                num_skipped + 1,
                self.settings.max_skipped_batches,
                row["loss"],
                row["grad_norm"],
            )

    def _stop(self, step: int) -> None:
        """Write a step checkpoint after `step` steps. Raises GracefulStop."""
        self._save(step)
        self.accelerator.wait_for_everyone()  # the first one writes
        if self.accelerator.is_main_process:
            logger.info("asked to stop: %d of %d steps are done and kept", step, self.steps)
        raise preemption.GracefulStop

    def _assert_gradients(self) -> None:
        dead = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if dead:
            raise RuntimeError(f"{len(dead)} trained weights get no gradient, the first: {dead[0]}")

    def _assert_all_trained(self, before: dict[str, torch.Tensor]) -> None:
        """Assert that the first step with a gradient has moved every lora_B."""
        now = gather_parameters(self._lora_B())
        dead = [name for name, value in before.items() if torch.equal(now[name], value)]
        if dead:
            raise RuntimeError(f"{len(dead)} LoRA matrices get no gradient, the first: {dead[0]}")

    def _lora_B(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if "lora_B" in name}

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter, once; every process calls this, since each may have a shard of it."""
        reshard_all(self.module)
        master = self.master_weights
        full = unsharded(self.parameters) if master is None else master.copies
        with replaced(self.backbone.root_module, full):
            if self.accelerator.is_main_process:
                self.backbone.save_adapter(directory)

    def _save(self, step: int) -> None:
        """Write a step checkpoint, unless no step was taken so far: the start is as good."""
        if self.state.num_taken() == 0:
            return
        state = self.state.gather()
        if self.accelerator.is_main_process:
            self.checkpoints.write(step, state, self.log)

    def _resume(self) -> int:
        """Load this stage's newest step checkpoint; return the step to continue with."""
        newest = self.checkpoints.newest()
        if newest is None:
            return 0
        record, state = newest
        self.log = record["log"]
        step = int(record["step"])
        self.state.load(state, step - self._num_skipped())
        if self.master_weights is not None:
            self.master_weights.copy_to_model()
        logger.info("resuming training at step %d of %d", step, self.steps)
        return step
