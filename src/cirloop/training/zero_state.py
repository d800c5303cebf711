"""The state of a step checkpoint under DeepSpeed's ZeRO, which cuts it into pieces.

ZeRO keeps a group's weights as one flat float32 tensor, of which each process has a part, and
Adam's moments likewise. DeepSpeed's own functions gather and set what belongs to one weight. They
fail before the first step, when there are no moments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cirloop.training.step_state import MOMENTS, StepState
from cirloop.types import UserError

SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes of DeepSpeed's loss scale; a fixed one has the first alone."""


class ZeroState(StepState):
    """The state under ZeRO-1, ZeRO-2 and ZeRO-3."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, scaled: bool
    ) -> None:
        """`optimizer` is what Accelerate made of DeepSpeed's. Raises UserError for one that is not
        ZeRO's."""
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self.zero: Any = getattr(optimizer, "optimizer", None)
        if isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
            self.flat = self.zero.fp32_partitioned_groups_flat
        elif isinstance(self.zero, DeepSpeedZeroOptimizer):
            self.flat = self.zero.single_partition_of_fp32_groups
        else:
            raise UserError(
                f"DeepSpeed made the optimizer {type(self.zero).__name__} of its configuration, for"
                " which there are no step checkpoints. Set zero_optimization.stage 2 or 3."
            )
        super().__init__(parameters, optimizer, self.zero.loss_scaler if scaled else None)

    def _gather_weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(parameter).detach().cpu().clone().contiguous()
            for name, parameter in self.parameters.items()
        }

    def _gather_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        value: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return value

    def _set_moments(self, state: dict[str, Tensor], taken: int) -> None:
        """Set the float32 weights and the moments."""
        self._create_moments()
        for name, parameter in self.parameters.items():
            _set_part(parameter, state[f"parameter/{name}"])
            for moment in MOMENTS:
                _set_part(parameter, state[f"{moment}/{name}"], moment)
        for found in self.optimizer.state.values():
            kind = type(found["step"])  # torch's is a tensor, that of DeepSpeed's own a number
            found["step"] = torch.tensor(float(taken)) if kind is Tensor else kind(taken)

    def _create_moments(self) -> None:
        """Let the optimizer make its state by a step without a gradient; what that moves is set
        afterwards."""
        for number, flat in enumerate(self.flat):
            kept = flat.grad  # of an optimizer on the CPU
            flat.grad = torch.zeros_like(flat)
            self.zero._optimizer_step(number)  # noqa: SLF001 - there is no public way
            flat.grad = kept

    def _scale(self) -> dict[str, float]:
        scale = vars(self.scaler)
        return {name: scale[name] for name in SCALE_FIELDS if name in scale}

    def _set_scale(self, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            setattr(self.scaler, name, number if name == "cur_scale" else int(number))


def _set_part(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Set this process's part of a weight in float32, or of a moment, to that of a whole value."""
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):  # ZeRO-3's mark: each weight is cut into equal parts, padded
        num = dist.get_world_size()
        padded = nn.functional.pad(value.flatten(), (0, -value.numel() % num))
        part = padded.chunk(num)[dist.get_rank()]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, moment)
