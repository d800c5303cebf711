"""The flags of `cirloop compare`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cirloop.cli.iterations import BEST
from cirloop.config import cli

PROGRAM = "cirloop compare"
MAX_EXAMPLES = 50


class CompareConfig(cli.Flags):
    """Compares runs with the first of them, on the queries that all were evaluated on."""

    runs: CliPositionalArg[tuple[str, ...]]
    """Run directories. NAME=DIR,DIR,DIR is a group, shown as mean ± standard error over its runs,
    such as those of several seeds; in quotes a DIR may have `*` in it."""
    iterations: str = BEST
    """Iterations of each run, separated by commas: `best` by its evaluations, numbers, `last` or
    `base`. Each has a row, compared with the first run's row of this name."""
    eval_dataset: str | None = None
    """Evaluate these iterations now on another data set and split, such as shapes_test, which takes
    the models; by default the evaluations in the run directories are compared."""
    html: Path | None = None
    """Write a page with the tables, and with queries won and lost with their images."""
    examples: int = Field(4, ge=0, le=MAX_EXAMPLES)
    """Queries won, and queries lost, that the page shows of each comparison."""
    data_dir: Path | None = None
    """The directory of the benchmark that --eval_dataset names; without that, where the runs' data
    are now, if they were moved: only images of the page need them."""
    output_file: Path | None = None
    """Also write the results here, as JSON."""


def parse(argv: Sequence[str]) -> CompareConfig:
    """Read the flags. Raises UserError with all that is wrong."""
    return cli.parse_flags(CompareConfig, _with_runs_first(argv), PROGRAM)


def _with_runs_first(argv: Sequence[str]) -> list[str]:
    """Return a command line that has its runs before its flags, in quotes, so that none is divided
    at its commas."""
    runs: list[str] = []
    flags: list[str] = []
    for before, word in pairwise(["", *argv]):
        is_value = before.startswith("-") and "=" not in before
        (flags if word.startswith("-") or is_value else runs).append(word)
    return [*(f'"{run}"' for run in runs), *flags]
