"""Search a folder of images, or a run's own gallery, with a model of a run or any other.

    python -m cirloop.search --experiment_dir RUN --gallery FOLDER
    python -m cirloop.search --experiment_dir RUN --gallery FOLDER --reference a.jpg --text "in red"
    python -m cirloop.search --experiment_dir RUN --gallery FOLDER --queries queries.jsonl
    python -m cirloop.search --model NAME --images FOLDER --text "in red"

The first brings the index up to date and ends; the others do that too, and answer
(docs/search.md). The last one needs no run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cirloop.cli.iterations import BASE
from cirloop.config import cli
from cirloop.monitoring.console import table
from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import Engine
from cirloop.tools.search.queries import SearchQuery, answer, answers, lines_of, write
from cirloop.validation import ValidationReport

logger = logging.getLogger("cirloop.tools.search")
PROGRAM = "python -m cirloop.search"
SOME_WRONG = 1
"""The exit code where a line of --queries was answered with an error."""


class SearchConfig(SearchOptions):
    """Search images with a model of a run, or any other. Without --reference, --text and --queries
    the index of the gallery is brought up to date, and that is all."""

    reference: str | None = None
    """An image: its path in the gallery (an id of the run's gallery), or any other file."""
    text: str | None = None
    """What should be different in the image; alone, what to find."""
    queries: Path | None = None
    """Answer the queries of a file of JSON lines, `-` for standard input, as JSON lines in the same
    order."""
    keep_reference: bool = False
    """Let the reference be among the results."""
    as_json: bool = Field(False, validation_alias="json")
    """One JSON line instead of a table."""


def main(argv: Sequence[str]) -> int:
    """Return the exit code. Raises UserError for what is wrong with the flags, the run or the
    folder."""
    options = cli.parse_flags(SearchConfig, argv, PROGRAM)
    query = SearchQuery(options.reference, options.text)
    problems = ValidationReport()
    if options.queries is not None and query != SearchQuery():
        problems.add("--queries", "is given with --reference or --text; give the one or the others")
    problems.raise_if_any(f"All flags: {cli.program(PROGRAM)} --help")
    engine = Engine(options)
    label = engine.label(options.iteration)
    model = "the base model" if label == BASE else f"iteration {label}"
    source = options.experiment_dir or options.model
    logger.info("searching %s with %s of %s", engine.gallery.name, model, source)
    engine.load(label)
    if options.queries is not None:
        return _all(engine, label, options)
    if query != SearchQuery():
        content = answer(engine, label, query, options.k, options.keep_reference)
        if options.as_json:
            write(content)
        else:
            rows = [
                [hit["rank"], hit["image"], f"{hit['score']:.4f}"] for hit in content["results"]
            ]
            words = " + ".join(part for part in (query.reference, query.text) if part)
            table(f"{words} ({model}, {content['ms']:.0f} ms)", ("rank", "image", "score"), rows)
    return 0


def _all(engine: Engine, label: str, options: SearchConfig) -> int:
    assert options.queries is not None
    wrong = done = 0
    for row in answers(engine, label, lines_of(options.queries), options.k, options.keep_reference):
        write(row)
        wrong = wrong + ("error" in row)
        done = done + 1
    logger.info("%d queries answered, %d of them with an error", done, wrong)
    return SOME_WRONG if wrong else 0
