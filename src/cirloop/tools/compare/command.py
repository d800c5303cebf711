"""Runs side by side: their metrics, and paired differences to the first on the queries that they
share.

    cirloop compare experiments/a experiments/b experiments/c --html comparison.html
    cirloop compare a=experiments/a_1,experiments/a_2 'b=experiments/b_*' --output_file c.json

It reads the evaluations of run directories, or makes others (docs/comparing.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from cirloop.artifacts.atomic import write_json
from cirloop.config import notices
from cirloop.monitoring.console import table, title_prefix
from cirloop.monitoring.live import console
from cirloop.tools.compare import tables
from cirloop.tools.compare.comparison import compare, to_json
from cirloop.tools.compare.config import CompareConfig, parse
from cirloop.tools.compare.groups import load_evaluations, open_groups, stored_evaluation
from cirloop.validation import ValidationReport

logger = logging.getLogger("cirloop.tools.compare")
PIPE_WIDTH = 160
"""Columns of the table in a file or pipe."""


def main(argv: Sequence[str]) -> None:
    """Compare runs. Raises UserError for wrong flags, and for runs that cannot be compared."""
    options = parse(argv)
    _check_outputs(options)
    groups = open_groups(options.runs)
    configs = [run.config for group in groups for run in group.runs]
    reported = configs[0].data.protocol.reported
    load = stored_evaluation
    if options.eval_dataset is not None:
        from cirloop.tools.compare import benchmark

        [first, *_] = benchmark.open_splits(groups[0].runs[0], options)
        reported = first.labeled.protocol.reported
        load = partial(benchmark.evaluate_now, options=options)
    names = [name.strip() for name in options.iterations.split(",")]
    comparison = compare(groups, load_evaluations(groups, [*dict.fromkeys(names)], load))
    for notice in dict.fromkeys(line for config in configs for line in notices.of(config)):
        logger.warning("%s", notice)
    simulated = next((config for config in configs if notices.mark(config)), configs[0])
    with title_prefix(notices.title(simulated)):
        shown = tables.main_table(comparison, reported)
        out = None if console.is_terminal else Console(width=PIPE_WIDTH)
        table(shown.caption, shown.columns, shown.rows, out)
    for line in (tables.explanation(comparison), tables.counts_note(comparison.rows)):
        if line:
            logger.info("%s", line)
    if options.output_file is not None:
        write_json(options.output_file, notices.mark(simulated) | to_json(comparison))
        logger.info("wrote %s", options.output_file)
    if options.html is not None:
        from cirloop.tools.compare.page import write_page

        write_page(groups, comparison, reported, options, notices.title(simulated))
        logger.info("wrote %s", options.html)


def _check_outputs(options: CompareConfig) -> None:
    """Raise UserError where a file cannot be written, before anything is read."""
    problems = ValidationReport()
    for flag, path in (("--html", options.html), ("--output_file", options.output_file)):
        if path is None:
            continue
        if path.is_dir():
            problems.add(f"{flag} {path}", "is a directory; give a file")
        elif not path.absolute().parent.is_dir():
            problems.add(f"{flag} {path}", "its directory does not exist")
    problems.raise_if_any()
