"""What is compared: runs by the words of the command line, and their evaluations, which must be of
one benchmark."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cirloop.artifacts.store import Store
from cirloop.cli.iterations import evaluation_name, select_iteration
from cirloop.config.base import differences
from cirloop.config.run import RunConfig
from cirloop.config.run_dir import CONFIG, run_directory
from cirloop.types import QueryId, UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
Content = Mapping[str, Any]
"""The JSON of an evaluation."""
COMPARABLE = {
    "split": "split",
    "gallery": "number of images in the gallery",
    "protocol": "protocol",
    "compared_on": "metric that iterations are compared on",
}
"""What evaluations must have in common, and what it is called."""
WAYS_OUT = (
    "Give --eval_dataset, such as cirr_val, to evaluate all runs on one benchmark now; or compare"
    " runs that were evaluated alike."
)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    directory: Path
    config: RunConfig
    store: Store


@dataclass(frozen=True)
class Group:
    """Runs that count as one system, under a name; mostly a single one."""

    name: str
    runs: Sequence[Run]


@dataclass(frozen=True)
class Evaluated:
    """A run at one of its iterations; `content` is its evaluation."""

    run: Run
    iteration: str
    content: Content

    @cached_property
    def rows(self) -> dict[QueryId, int]:
        """Return the row of each query in the evaluation."""
        return {row[0]: number for number, row in enumerate(self.content["ranks"])}

    def column(self, column: int, queries: Sequence[QueryId]) -> list[Any]:
        """Return a column of the evaluation's rows, for `queries`: 1 the target's rank, 2 the value
        of the metric, 3 the cluster."""
        ranks = self.content["ranks"]
        return [ranks[self.rows[query]][column] for query in queries]


def open_groups(words: Sequence[str]) -> list[Group]:
    """Open the run directories that the command line names. Raises UserError with all that is wrong
    with them."""
    problems = ValidationReport()
    directories: dict[str, list[Path]] = {}
    for word in words:
        name, found = _directories(word, problems)
        directories.setdefault(name, []).extend(found)
    groups = []
    seen: dict[Path, str] = {}
    for name, paths in directories.items():
        runs = []
        for path in paths:
            if path.resolve() in seen:
                problems.add(str(path), f"is given twice, as {seen[path.resolve()]} before")
                continue
            seen[path.resolve()] = name
            if not (path / CONFIG).is_file():
                problems.add(str(path), f"is no run directory (no {CONFIG})")
                continue
            try:
                config, store = run_directory(path)
                runs.append(Run(path, config, store))
            except UserError as error:
                problems.merge(error, str(path))
        groups.append(Group(name, runs))
    if len(groups) < 2:
        problems.add("runs", "there is nothing to compare: give two runs or groups, or more")
    problems.raise_if_any()
    for group in groups:
        _warn_of_other_settings(group)
    return groups


def _directories(word: str, problems: ValidationReport) -> tuple[str, list[Path]]:
    """Return the name of a group and its directories, which a word names."""
    name, sign, patterns = word.partition("=")
    if not sign or Path(word).is_dir():
        return word.rstrip("/"), [Path(word)]
    if not name:
        problems.add(word, "has no name before the =")
    found: list[Path] = []
    for pattern in patterns.split(","):
        if "*" not in pattern:
            found.append(Path(pattern))
            continue
        root = Path("/") if pattern.startswith("/") else Path()
        matches = sorted(path for path in root.glob(pattern.lstrip("/")) if path.is_dir())
        if not matches:
            problems.add(pattern, "there is no such directory")
        found += matches
    return name, found


def _warn_of_other_settings(group: Group) -> None:
    """Warn where runs of a group differ in more than their seeds."""
    first = group.runs[0].config.result_settings()
    lines = {
        line
        for run in group.runs[1:]
        for line in differences(first, run.config.result_settings())
        if not line.partition(":")[0].endswith("seed")
    }
    if lines:
        logger.warning(
            "the runs of %s differ in more than the seed: %s", group.name, "; ".join(sorted(lines))
        )


def stored_evaluation(run: Run, label: str) -> Content:
    """Return the run's own evaluation of an iteration. Raises UserError where there is none."""
    name = evaluation_name(label)
    if name not in run.store.names:
        raise UserError(f"iteration {label} is not evaluated. Give others by --iterations.")
    return run.store.load(name).read()


def load_evaluations(
    groups: Sequence[Group], names: Sequence[str], load: Callable[[Run, str], Content]
) -> dict[str, list[list[Evaluated]]]:
    """Load, for each name of an iteration, the evaluations of each group's runs, by `load`.

    Raises UserError with all that is missing, and with all that cannot be compared.
    """
    labels = _labels(groups, names)
    problems = ValidationReport()
    by_name: dict[str, list[list[Evaluated]]] = {}
    for name in names:
        by_name[name] = []
        for group in groups:
            evaluated: list[Evaluated] = []
            by_name[name].append(evaluated)
            for run in group.runs:
                label = labels[run.directory, name]
                try:
                    evaluated.append(Evaluated(run, label, load(run, label)))
                except UserError as error:
                    problems.merge(error, str(run.directory))
    problems.raise_if_any()
    _check_comparable([each for rows in by_name.values() for row in rows for each in row])
    return by_name


def _labels(groups: Sequence[Group], names: Sequence[str]) -> dict[tuple[Path, str], str]:
    """Return the iteration of each run by each name. Raises UserError with all that there are
    not."""
    problems = ValidationReport()
    labels: dict[tuple[Path, str], str] = {}
    for group in groups:
        for run in group.runs:
            for name in names:
                try:
                    label = select_iteration(name, run.store, "--iterations")
                    labels[run.directory, name] = label
                except UserError as error:
                    problems.merge(error, str(run.directory))
    problems.raise_if_any()
    return labels


def _check_comparable(evaluations: Sequence[Evaluated]) -> None:
    """Raise UserError with all evaluations that cannot be compared with the first, and why."""
    problems = ValidationReport()
    first = evaluations[0]
    for each in evaluations[1:]:
        where = f"{each.run.directory}, iteration {each.iteration}"
        different = [
            f"{title} ({each.content[key]!r}, not {first.content[key]!r})"
            for key, title in COMPARABLE.items()
            if each.content[key] != first.content[key]
        ]
        shared = [query for query in first.rows if query in each.rows]
        if different:
            problem = f"was evaluated with another {', another '.join(different)}"
        elif not shared:
            problem = "has no query in common"
        elif each.column(3, shared) != first.column(3, shared):
            problem = "has other references in the queries of the same ids: the data are others"
        else:
            continue
        problems.add(
            where, f"cannot be compared with {first.run.directory}: it {problem}", WAYS_OUT
        )
    problems.raise_if_any()


def shared_queries(evaluations: Sequence[Evaluated]) -> list[QueryId]:
    """Return the queries that all evaluations have, in the order of the first. Raises UserError
    where there are none."""
    shared = [query for query in evaluations[0].rows if all(query in e.rows for e in evaluations)]
    if not shared:
        raise UserError("no query is in the evaluations of all runs. Compare fewer of them.")
    return shared
