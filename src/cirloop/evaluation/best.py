"""The best iteration of a run, and when a run has stopped improving.

Iterations are ranked by the metric that they are compared on (`compared_on` of an evaluation). Of
equal ones the earlier is the best. The base model is no iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE = "base"
Evaluation = Mapping[str, Any]
"""The JSON of an evaluation."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best iteration, and the `value` (a fraction) of the metric that says so; `base` is that
    of the base model, where that was evaluated."""

    iteration: int
    metric: str
    split: str
    value: float
    base: float | None = None

    def describe(self) -> str:
        """Say which iteration it is, with metric, split and value."""
        words = (
            f"iteration {self.iteration} is the best by {self.metric} on {self.split}"
            f" ({100 * self.value:.1f})"
        )
        if self.base is not None and self.base > self.value:
            words += f"; the base model is better there ({100 * self.base:.1f})"
        return words

    def to_json(self) -> dict[str, Any]:
        """Return what `evaluation_results.json` holds of it."""
        return {"iteration": self.iteration, "metric": self.metric, "value": self.value}


def best_of(evaluations: Sequence[Evaluation]) -> Best | None:
    """Return the best iteration; None where no iteration is evaluated."""
    iterations = [row for row in evaluations if row["iteration"] != BASE]
    if not iterations:
        return None
    row = max(iterations, key=lambda row: (_value(row), -int(row["iteration"])))
    base = [_value(row) for row in evaluations if row["iteration"] == BASE]
    return Best(
        int(row["iteration"]),
        row["compared_on"],
        row["split"],
        _value(row),
        base[0] if base else None,
    )


def gain_words(evaluations: Sequence[Evaluation]) -> str:
    """Say what the best iteration gained over the first evaluation, such as `recall@1 53.1: +24.6
    over base, val, iteration 2`; nothing where it is the first."""
    best = best_of(evaluations)
    first = evaluations[0]["iteration"]
    if best is None or first == str(best.iteration):
        return ""
    gain = 100 * (best.value - _value(evaluations[0]))
    over = first if first == BASE else f"iteration {first}"
    place = f"{best.split}, iteration {best.iteration}"
    return f"{best.metric} {100 * best.value:.1f}: {gain:+.1f} over {over}, {place}"


def _value(evaluation: Evaluation) -> float:
    value: float = evaluation["metrics"][evaluation["compared_on"]]
    return value


def is_out_of_patience(evaluations: Sequence[Evaluation], patience: int) -> bool:
    """Return whether the last `patience` rounds in a row have not improved on the best iteration
    before them; never where `patience` is 0."""
    best = best_of(evaluations)
    if best is None or not patience:
        return False
    return int(evaluations[-1]["iteration"]) - best.iteration >= patience
