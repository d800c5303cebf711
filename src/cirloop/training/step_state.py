"""The tensors of a step checkpoint: trained weights, Adam's moments, and the loss scale if any.

They are whole and in full precision, also where a weight lies in pieces, so what one strategy wrote
another can load. Every process of the stage calls these functions together: gathering is a
collective.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from cirloop.training.sharded import gather_parameters, gather_tensor, set_parameters, shard_like

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "loss_scale/"
TAKEN = "steps_taken"


class StepState:
    """The state of `parameters`, as `optimizer` and the gradients' `scaler` have it.

    In one process, DDP and FSDP2; ZeroState is DeepSpeed's.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: object | None,
    ) -> None:
        """`scaler` is what scales gradients, where something does."""
        self.parameters = parameters
        self.optimizer = optimizer
        self.scaler = scaler

    @property
    def kind(self) -> tuple[str, ...]:
        """What a checkpoint's state depends on beside the weights: the loss scale's class."""
        return () if self.scaler is None else (type(self.scaler).__name__,)

    def num_taken(self) -> int:
        """Count the steps that the optimizer has taken."""
        return next((int(state["step"]) for state in self.optimizer.state.values() if state), 0)

    def gather(self) -> dict[str, Tensor]:
        """Return all tensors, whole and on the CPU; at least one step must have been taken."""
        found = {f"parameter/{name}": value for name, value in self._gather_weights().items()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                value = self._gather_moment(parameter, moment)
                found[f"{moment}/{name}"] = value.detach().cpu().contiguous()
        if self.scaler is not None:  # it skips steps
            found[TAKEN] = torch.tensor(self.num_taken())
            for name, number in self._scale().items():
                found[SCALE + name] = torch.tensor(number, dtype=torch.float64)
        return found

    def load(self, state: dict[str, Tensor], taken: int) -> None:
        """Go on from what `gather` returned after `taken` steps, or as many as it says itself."""
        taken = int(state.get(TAKEN, taken))
        set_parameters(self.parameters, {n: state[f"parameter/{n}"] for n in self.parameters})
        self._set_moments(state, taken)
        if self.scaler is not None:
            self._set_scale({name: state[SCALE + name].item() for name in self._scale()})

    def _gather_weights(self) -> dict[str, Tensor]:
        return gather_parameters(self.parameters)

    def _gather_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        return gather_tensor(self.optimizer.state[parameter][moment])

    def _set_moments(self, state: dict[str, Tensor], taken: int) -> None:
        for name, parameter in self.parameters.items():
            moments = {m: shard_like(state[f"{m}/{name}"], parameter) for m in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(taken)), **moments}

    def _scale(self) -> dict[str, float]:
        """Return what changes of the loss scale."""
        assert isinstance(self.scaler, GradScaler)
        found = self.scaler.state_dict()
        return {name: found[name] for name in ("scale", "_growth_tracker")}

    def _set_scale(self, numbers: dict[str, float]) -> None:
        assert isinstance(self.scaler, GradScaler)
        count = {"_growth_tracker": int(numbers["_growth_tracker"])}
        self.scaler.load_state_dict(self.scaler.state_dict() | numbers | count)
