"""The numbers of a comparison: metrics of each run or group, and its paired difference to the
first.

Of one run a metric has its standard error over queries; of a group it is the mean over runs, with
the standard error over them. A difference is of the metric that iterations are compared on, query
by query, for a group of the means over its runs; its standard error and p are over queries
(`evaluation/significance.py`), and where there are groups it has a standard error over runs too.
Q queries, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.evaluation.best import BASE
from cirloop.evaluation.significance import (
    Difference,
    Estimate,
    difference_over_runs,
    holm,
    over_runs,
    paired,
)
from cirloop.tools.compare.groups import Evaluated, Group, shared_queries
from cirloop.types import QueryId

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What a system changes on the first one. `over_runs` has the standard error over runs, where
    one of the two has several; `p_corrected` is for all comparisons (Holm)."""

    difference: Difference
    over_runs: Estimate | None
    p_corrected: float
    won: Sequence[int]
    """Queries whose value rises, by their number among the shared ones."""
    lost: Sequence[int]


@dataclass(frozen=True)
class Row:
    """A run or group at an iteration that was chosen by name. `change` is None for the first."""

    group: Group
    chosen: str
    evaluated: Sequence[Evaluated]
    values_RQ: Values
    """The metric that differences are of, by run and shared query."""
    metrics: Mapping[str, Estimate]
    change: Change | None = None

    @property
    def values_Q(self) -> Values:
        """Return the mean over runs."""
        mean_Q: Values = self.values_RQ.mean(0)
        return mean_Q

    @property
    def iterations(self) -> str:
        """Return the iteration of each run, one where all have the same."""
        labels = [each.iteration for each in self.evaluated]
        shown = ", ".join(labels if len({*labels}) > 1 else labels[:1])
        return shown if self.chosen in (shown, BASE) else f"{shown} ({self.chosen})"


@dataclass(frozen=True)
class Comparison:
    """The rows of all systems, and what they have in common."""

    queries: Sequence[QueryId]
    rows: Sequence[Row]

    @property
    def common(self) -> Mapping[str, Any]:
        """Return an evaluation, for what all have in common."""
        return self.rows[0].evaluated[0].content

    @property
    def metric(self) -> str:
        """Return the metric that differences are of."""
        name: str = self.common["compared_on"]
        return name

    @property
    def changes(self) -> list[tuple[Row, Row, Change]]:
        """Return the comparisons: the first system's row, the other's, and the change."""
        firsts: dict[str, Row] = {}
        for row in self.rows:
            firsts.setdefault(row.chosen, row)
        return [(firsts[row.chosen], row, row.change) for row in self.rows if row.change]


def compare(
    groups: Sequence[Group], evaluations: Mapping[str, Sequence[Sequence[Evaluated]]]
) -> Comparison:
    """Compare each group with the first, for each name of an iteration. Raises UserError where no
    query is shared."""
    queries = shared_queries([e for rows in evaluations.values() for row in rows for e in row])
    rows: list[Row] = []
    tests: list[Difference | None] = []
    for chosen, evaluated_by_group in evaluations.items():
        block = [
            _row(group, chosen, evaluated, queries)
            for group, evaluated in zip(groups, evaluated_by_group, strict=True)
        ]
        clusters = block[0].evaluated[0].column(3, queries)
        rows += block
        tests += [None, *(paired(block[0].values_Q, row.values_Q, clusters) for row in block[1:])]
    corrected = iter(holm([test.p for test in tests if test is not None]))
    finished: list[Row] = []
    for row, test in zip(rows, tests, strict=True):
        if test is None:
            first = row
            finished.append(row)
        else:
            change = _change(first, row, test, next(corrected))
            finished.append(replace(row, change=change))
    return Comparison(queries, finished)


def _row(
    group: Group, chosen: str, evaluated: Sequence[Evaluated], queries: Sequence[QueryId]
) -> Row:
    """Return a row without its change."""
    values_RQ = np.array([each.column(2, queries) for each in evaluated], np.float64)
    metrics = {}
    for name in evaluated[0].content["metrics"]:
        values = [each.content["metrics"].get(name) for each in evaluated]
        if None in values:
            continue
        metrics[name] = over_runs(values)
        if len(evaluated) == 1:
            metrics[name] = Estimate(values[0], evaluated[0].content["standard_errors"][name])
    return Row(group, chosen, evaluated, values_RQ, metrics)


def _change(first: Row, row: Row, test: Difference, p_corrected: float) -> Change:
    """Return the change of a row on the first, whose paired test is `test`."""
    signs_Q = np.sign(np.round(row.values_Q - first.values_Q, 9))
    won, lost = (np.flatnonzero(signs_Q == sign).tolist() for sign in (1, -1))
    several = max(len(first.evaluated), len(row.evaluated)) > 1
    seeds = difference_over_runs(_by_seed(first), _by_seed(row)) if several else None
    return Change(test, seeds, p_corrected, won, lost)


def _by_seed(row: Row) -> dict[Hashable, float]:
    """Return the metric that differences are of, by the runs' seeds; by their directories where
    two have the same one."""
    seeds: list[Hashable] = [each.run.config.seed for each in row.evaluated]
    if len({*seeds}) < len(seeds):
        seeds = [each.run.directory for each in row.evaluated]
    return dict(zip(seeds, row.values_RQ.mean(1).tolist(), strict=True))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON."""
    common = comparison.common
    return {
        "schema": 1,
        "split": common["split"],
        "protocol": common["protocol"],
        "gallery": common["gallery"],
        "metric": comparison.metric,
        "shared_queries": len(comparison.queries),
        "rows": [_row_json(row, comparison.queries) for row in comparison.rows],
    }


def _row_json(row: Row, queries: Sequence[QueryId]) -> dict[str, Any]:
    return {
        "name": row.group.name,
        "iteration": row.chosen,
        "runs": [
            {
                "directory": str(each.run.directory),
                "iteration": each.iteration,
                "seed": each.run.config.seed,
                "queries": each.content["queries"],
            }
            for each in row.evaluated
        ],
        "metrics": {name: round(m.value, 6) for name, m in row.metrics.items()},
        "standard_errors": {name: _known(m.se) for name, m in row.metrics.items()},
        "difference": None if row.change is None else _change_json(row.change, queries),
    }


def _change_json(change: Change, queries: Sequence[QueryId]) -> dict[str, Any]:
    return {
        "value": change.difference.value,
        "se": change.difference.se,
        "se_over_runs": None if change.over_runs is None else _known(change.over_runs.se),
        "p": change.difference.p,
        "p_corrected": change.p_corrected,
        "won": [queries[number] for number in change.won],
        "lost": [queries[number] for number in change.lost],
    }


def _known(se: float) -> float | None:
    return None if math.isnan(se) else round(se, 6)
