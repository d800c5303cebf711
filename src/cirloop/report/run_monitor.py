"""The monitor of a run: its place in the plan for the live view, its numbers for the trackers.

The monitor subscribes to events (`monitoring/events.py`) and reads each stage's numbers from its
artifact. Artifacts of an earlier attempt count too, so a tracker that is added later gets their
numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.store import Artifact, Store
from cirloop.config import notices
from cirloop.config.run import RunConfig
from cirloop.loop import expected_artifacts
from cirloop.monitoring import events
from cirloop.monitoring.console import metric_rows
from cirloop.monitoring.costs import Costs
from cirloop.monitoring.live import RunHeader, duration
from cirloop.monitoring.stage_names import STAGES, stage_words

logger = logging.getLogger(__name__)
Numbers = dict[str, float]
BASE = "evaluation_base.json"
WARM_UP = "checkpoint_iter_0"


class RunMonitor:
    """A listener to the events of one run."""

    def __init__(self, config: RunConfig, store: Store, costs: Costs, counts: bool) -> None:
        self._config = config
        self._store = store
        self._costs = costs
        self._plan = expected_artifacts(config, counts)
        self._evaluations: list[dict[str, Any]] = []
        self._iteration = 0

    def __call__(self, kind: str, payload: dict[str, Any]) -> None:
        if kind == "begins":
            self._iteration = payload["iteration"] or 0
            events.emit("head", head=self._head(payload["name"], payload["iteration"]))
        elif kind == "step":
            self._tell_step(payload["row"], self._iteration)
        elif kind == "ended":
            self._ended(payload["artifact"], payload["iteration"] or 0)

    def _head(self, name: str, iteration: int | None) -> RunHeader:
        number = self._plan.index(name) + 1
        base = name.endswith("_base.json")
        run = f"{notices.title(self._config)}{self._config.directory}"
        return RunHeader(
            run,
            stage_words(name),
            number,
            len(self._plan),
            None if base else iteration,
            self._config.num_iterations,
            self._left(self._plan[number - 1 :]),
            self._recalls(),
        )

    def _left(self, names: Sequence[str]) -> float | None:
        """Return the seconds that stages take, each as long as the last finished one of its kind.

        Returns None where one has none. Iteration 0 is a kind of its own: it sees fewer images a
        step.
        """
        last = {_kind(row["stage"]): row for row in self._costs.read() if row["finished"]}
        seconds = 0.0
        for name in names:
            if name in self._store.names:
                continue
            row = last.get(_kind(name))
            if row is None:
                return None
            # A resumed stage did some of the steps.
            trains = _kind(name) == "checkpoint" and row["steps"]
            seconds += row["seconds"] * (
                self._config.training.steps_per_iteration / row["steps"] if trains else 1.0
            )
        return seconds

    def _recalls(self) -> list[list[str]]:
        if not self._evaluations:
            return []
        last = self._evaluations[-1]
        columns = [c for c in self._config.data.protocol.reported if c in last["metrics"]]
        return [["iteration", *columns], *metric_rows(self._evaluations, columns)]

    def _steps_before(self, iteration: int) -> int:
        t = self._config.training
        return t.iteration_0_steps + (iteration - 1) * t.steps_per_iteration if iteration else 0

    def _tell_step(self, row: dict[str, Any], iteration: int, found: bool = False) -> None:
        values = {
            f"train/{name}": float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        step = self._steps_before(iteration) + row["step"]
        events.emit(
            "numbers", step=step, values=values | {"train/iteration": float(iteration)}, found=found
        )

    def _ended(self, artifact: Artifact, iteration: int) -> None:
        kind = schema.kind_of(f"{artifact.name.removesuffix('.json')}.json")
        if kind == "evaluation":
            self._evaluations.append(artifact.read())
            if artifact.made_now and artifact.name != BASE:
                self._log_round(artifact.name, iteration)
        if not self._config.runtime.report_to:
            return
        found = not artifact.made_now
        if artifact.path.is_dir() and found:  # else each step was told
            for row in schema.read(artifact.path / "training_log.json")["rows"]:
                self._tell_step(row, iteration, found)
        # The others come before the training of t.
        trained = kind in (
            "checkpoint",
            "hard_negatives",
            "evaluation",
        )
        step = 0 if artifact.name == BASE else self._steps_before(iteration + trained)
        events.emit(
            "numbers", step=step, values=dict(self._numbers(artifact, iteration)), found=found
        )

    def _log_round(self, evaluation: str, iteration: int) -> None:
        """Log that a round is over, and how long all later ones take."""
        seconds = self._left(self._plan[self._plan.index(evaluation) + 1 :])
        left = f"; about {duration(seconds)} left in all" if seconds else ""
        done = f"iteration {iteration} of {self._config.num_iterations}"
        logger.info("%s done%s", done if iteration else "warm-up", left)

    def _numbers(self, artifact: Artifact, iteration: int) -> Iterator[tuple[str, float]]:
        """Yield the numbers of one stage: its results, and its metrics."""
        part = STAGES[_kind(artifact.name) if artifact.name != WARM_UP else "checkpoint"]
        if part == "evaluation":
            content = self._evaluations[-1]
            for name, value in content["metrics"].items():
                yield f"{part}/{name}", value
                yield f"{part}/{name} standard error", content["standard_errors"][name]
        elif part != "training":
            content = artifact.read()
            for name, value in (content.get("summary") or content).items():
                for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, int | float) and name not in ("schema", "iteration"):
                        yield f"{part}/{name} {inner}".strip(), float(number)
        rows = [
            row for row in self._costs.read() if row["stage"] == artifact.name and row["finished"]
        ]
        for name, value in rows[-1].items() if rows else ():
            if (
                isinstance(value, int | float)
                and name not in ("finished", "attempt")
                and math.isfinite(value)
            ):
                yield f"cost/{part}/{name}", float(value)


def _kind(name: str) -> str:
    """Return the kind of a stage; stages of one kind take similar time."""
    return WARM_UP if name == WARM_UP else schema.kind_of(f"{name.removesuffix('.json')}.json")
