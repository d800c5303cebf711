"""Minutes of a run by stage: its counts of work by what each piece costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cirloop.config.run import RunConfig
from cirloop.distributed import launcher
from cirloop.stages import work
from cirloop.stages.lengths import Lengths
from cirloop.stages.work import Cost, Counts, Piece

AT_MOST = ("caption", "rank negatives")
"""Stages whose work depends on how many texts pass: they are planned as if all did."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds by stage: before the first round, and of a round; how many rounds do each stage.

    `unknown` are stages without a cost.
    """

    once: dict[str, float]
    round: dict[str, float]
    num_rounds: dict[str, int]
    unknown: tuple[str, ...] = ()

    @property
    def of_round(self) -> float:
        return sum(self.round.values())

    @property
    def total(self) -> float:
        """Return the seconds of the whole run."""
        rounds = sum(took * self.num_rounds[stage] for stage, took in self.round.items())
        return sum(self.once.values()) + rounds

    def rows(self) -> list[tuple[str, str, str]]:
        """Return a table: stage, minutes of a round, minutes in all."""
        rows = [(stage, "-", minutes(took)) for stage, took in self.once.items()]
        for stage, took in self.round.items():
            most = ", at most" if stage in AT_MOST else ""
            rows.append((stage + most, minutes(took), minutes(took * self.num_rounds[stage])))
        rows += [(stage, "not known", "not known") for stage in self.unknown]
        return [*rows, ("all", minutes(self.of_round), minutes(self.total))]


def minutes(seconds: float) -> str:
    number = seconds / 60
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def plan(config: RunConfig, counts: Counts, lengths: Lengths, costs: Mapping[Piece, Cost]) -> Plan:
    """Plan a run by what its pieces cost in one process; several are as fast as so many devices."""
    num = launcher.num_processes(config.runtime)
    once = work.once(config, counts, lengths)
    stages = work.of_round(config, counts, lengths) if config.num_iterations else {}
    seconds_once = work.seconds(once, costs, num)
    seconds = work.seconds(stages, costs, num)
    limit = config.mining.num_rounds or config.num_iterations
    num_rounds = {
        stage: min(limit, config.num_iterations)
        if stage in ("mine", "caption")
        else config.num_iterations
        for stage in seconds
    }
    unknown = (*once.keys() - seconds_once.keys(), *stages.keys() - seconds.keys())
    return Plan(seconds_once, seconds, num_rounds, tuple(sorted(unknown)))
