"""The optimizer's parameter groups and the schedule of its learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from cirloop.training.config import TrainingSettings
from cirloop.types import UserError


def lr_factor(step: int, steps: int, settings: TrainingSettings) -> float:
    """Return the learning rate at `step`, from 0, of `steps`, as a share of its peak."""
    warmup_steps = max(1, round(settings.lr_warmup_ratio * steps))
    remaining = (steps - step) / max(1, steps - warmup_steps)
    decay = {
        "linear": remaining,
        "cosine": (1 - math.cos(math.pi * min(1.0, remaining))) / 2,
        "constant": 1.0,
    }
    return min((step + 1) / warmup_steps, decay[settings.lr_scheduler])


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], settings: TrainingSettings
) -> list[dict[str, Any]]:
    """Group weights by learning rate, those of `settings.lr_overrides` apart.

    `top` of a group is the peak of its rate. Raises UserError for a pattern that matches no weight.
    """
    overrides = settings.lr_overrides
    pattern_of = {name: _first_match(overrides, name) for name in parameters}
    unused = sorted(overrides.keys() - {*pattern_of.values()})
    if unused:
        raise UserError(
            f"training.lr_overrides: {', '.join(unused)} fit no trained weight, such as"
            f" {next(iter(pattern_of))}."
        )
    peaks = [(None, settings.learning_rate), *overrides.items()]
    groups = []
    for pattern, peak in peaks:
        weights = [weight for name, weight in parameters.items() if pattern_of[name] == pattern]
        if weights:
            groups.append({"params": weights, "top": peak})
    return groups


def _first_match(patterns: Mapping[str, float], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.match(pattern, name)), None)
