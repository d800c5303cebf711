"""What a step checkpoint holds of the optimizer: a run that goes on from it takes the same steps,
also where a loss scale skips some."""

from __future__ import annotations

import torch
from torch import nn
from torch.amp import GradScaler

from cirloop.training.step_state import StepState

STEPS = 6
OVERFLOW = 2
"""The step whose gradient is not finite."""


def started(*, scaled: bool) -> StepState:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=False)
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaled else None
    return StepState(dict(layer.named_parameters()), optimizer, scaler)


def take(state: StepState, first: int, last: int) -> None:
    for step in range(first, last):
        state.optimizer.zero_grad()
        rows = torch.full((1, 3), torch.inf if step == OVERFLOW else 1.0 + step)
        weight, bias = state.parameters["weight"], state.parameters["bias"]
        loss = nn.functional.linear(rows, weight, bias).square().sum()
        if isinstance(state.scaler, GradScaler):
            state.scaler.scale(loss).backward()
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            loss.backward()
            state.optimizer.step()


def test_with_a_loss_scale_the_steps_taken_and_the_scale_are_kept() -> None:
    whole = started(scaled=True)
    assert whole.num_taken() == 0 and whole.kind == ("GradScaler",)
    take(whole, 0, STEPS)
    stopped = started(scaled=True)
    take(stopped, 0, OVERFLOW + 2)
    kept = stopped.gather()
    resumed = started(scaled=True)
    resumed.load(kept, OVERFLOW + 2)
    assert resumed.num_taken() == OVERFLOW + 1  # one was skipped
    take(resumed, OVERFLOW + 2, STEPS)
    expected, found = whole.gather(), resumed.gather()
    assert expected.keys() == found.keys() and whole.num_taken() == STEPS - 1
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert found["loss_scale/scale"] == 16  # doubled, halved, doubled


def test_without_one_the_tensors_are_weights_and_moments_alone() -> None:
    state = started(scaled=False)
    take(state, 0, OVERFLOW)
    assert state.kind == () and state.num_taken() == OVERFLOW
    parts = ("parameter", "exp_avg", "exp_avg_sq")
    names = {f"{part}/{name}" for part in parts for name in ("weight", "bias")}
    kept = state.gather()
    assert kept.keys() == names
    again = started(scaled=False)
    again.load(kept, OVERFLOW)
    assert again.num_taken() == OVERFLOW
