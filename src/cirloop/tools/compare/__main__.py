"""Runs side by side: their metrics, and paired differences to the first on the queries that they
share.

    cirloop compare experiments/a experiments/b experiments/c --html comparison.html
    cirloop compare a=experiments/a_1,experiments/a_2 'b=experiments/b_*' --output_file c.json

It reads the evaluations of run directories and loads no model (docs/comparing.md).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from cirloop.artifacts.atomic import write_json
from cirloop.cli import entry
from cirloop.config import notices
from cirloop.monitoring.console import table, title_prefix
from cirloop.tools.compare import tables
from cirloop.tools.compare.comparison import compare, to_json
from cirloop.tools.compare.config import CompareConfig, parse
from cirloop.tools.compare.groups import load_evaluations, open_groups
from cirloop.validation import ValidationReport

logger = logging.getLogger("cirloop.tools.compare")


def main(argv: Sequence[str]) -> None:
    """Compare runs. Raises UserError for wrong flags, and for runs that cannot be compared."""
    options = parse(argv)
    _check_outputs(options)
    groups = open_groups(options.runs)
    names = [name.strip() for name in options.iterations.split(",")]
    comparison = compare(groups, load_evaluations(groups, [*dict.fromkeys(names)]))
    configs = [run.config for group in groups for run in group.runs]
    for notice in dict.fromkeys(line for config in configs for line in notices.of(config)):
        logger.warning("%s", notice)
    simulated = next((config for config in configs if notices.mark(config)), configs[0])
    with title_prefix(notices.title(simulated)):
        shown = tables.main_table(comparison, configs[0].data.protocol.reported)
        table(shown.caption, shown.columns, shown.rows)
    for line in (tables.explanation(comparison), tables.counts_note(comparison.rows)):
        if line:
            logger.info("%s", line)
    if options.output_file is not None:
        write_json(options.output_file, notices.mark(simulated) | to_json(comparison))
        logger.info("wrote %s", options.output_file)
    if options.html is not None:
        from cirloop.tools.compare.page import write_page

        write_page(options.html, groups, comparison, options)
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


if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
