"""The page of a comparison: its tables, and queries won and lost with their images, in one file.

It is made of the report's parts (`cirloop.report`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from cirloop.artifacts.atomic import write_text
from cirloop.config import notices
from cirloop.report import ReportData, query_changes
from cirloop.report.builder import readable_data
from cirloop.report.charts import COLORS, Chart, Table, draw
from cirloop.report.metrics_section import Evaluation
from cirloop.report.page import render
from cirloop.report.report_data import Examples, Section, Thumbnails, evenly_spaced
from cirloop.tools.compare import tables
from cirloop.tools.compare.comparison import Change, Comparison, Row
from cirloop.tools.compare.config import CompareConfig
from cirloop.tools.compare.groups import Group, Run
from cirloop.types import EvalSplit, UserError

MAX_LABEL = 20
"""Letters of a name beside a chart."""


def write_page(
    groups: Sequence[Group],
    comparison: Comparison,
    reported: Sequence[str],
    options: CompareConfig,
    mark: str,
) -> None:
    """Write the page, with the metrics `reported`, and `mark` before titles. Raises OSError where
    the disk refuses."""
    assert options.html is not None
    data = _page_data(groups, reported, options, mark)
    thumbnails = Thumbnails()
    sections = [
        _metrics_section(data, comparison),
        _changes_section(data, comparison, thumbnails, options.examples),
        _settings_section(groups),
    ]
    names = [group.name for group in groups]
    common = comparison.common
    about = (
        f"{', '.join(names[1:])} compared with {names[0]} on {common['split']}:"
        f" {len(comparison.queries):,} shared queries, {common['gallery']:,} images."
    )
    more = {"name": " · ".join(names), "about": about}
    write_text(options.html, render("comparison.html.j2", data, sections, thumbnails, more))


def _page_data(
    groups: Sequence[Group], reported: Sequence[str], options: CompareConfig, mark: str
) -> ReportData:
    """Return what the page knows of the data set, of the first run that has its files."""
    runs = [run for group in groups for run in group.runs]
    evals: Sequence[EvalSplit] = ()
    problems = []
    for run in runs:
        try:
            evals = _eval_splits(run, options)
            break
        except UserError as error:
            problems.append(str(error))
    first = runs[0].config
    return ReportData(
        runs[0].directory,
        frozenset(),
        (),
        lambda name: runs[0].store.load(name).read(),
        first.to_json(),
        reported,
        None,
        evals,
        "" if evals else problems[0],
        notices=[*dict.fromkeys(line for run in runs for line in notices.of(run.config))],
        mark=mark,
    )


def _eval_splits(run: Run, options: CompareConfig) -> Sequence[EvalSplit]:
    if options.eval_dataset is not None:
        from cirloop.tools.compare.benchmark import open_splits

        return open_splits(run, options)
    config = run.config.model_copy(update={"data_dir": options.data_dir or run.config.data_dir})
    return readable_data(config).eval_splits(config.evaluation.split)


def _metrics_section(data: ReportData, comparison: Comparison) -> Section:
    table = tables.main_table(comparison, data.headline)
    notes = [tables.explanation(comparison), tables.counts_note(comparison.rows)]
    charts = [_chart(data, comparison)]
    return Section("metrics", "Metrics and differences", notes, (), charts, [table])


def _chart(data: ReportData, comparison: Comparison) -> Chart:
    """Draw the difference of each row to the first system, with one standard error over queries."""
    changes = comparison.changes
    labels = [f"{row.group.name}, {row.iterations}" for _, row, _ in changes]
    tests = [change.difference for *_, change in changes]
    rows = [
        [label, f"{test.value} ± {test.se}", str(test.p)]
        for label, test in zip(labels, tests, strict=True)
    ]
    caption = "Differences as fractions ± standard errors, p not corrected"
    table = Table(caption, ("run", "difference", "p"), rows)

    def plot(axes: Axes) -> None:
        places = range(len(tests), 0, -1)
        points = [100 * test.value for test in tests]
        axes.errorbar(points, places, xerr=[100 * test.se for test in tests], fmt="o")
        axes.axvline(0, color=COLORS[-1], linestyle="--")
        axes.set_yticks(places, [_short(label) for label in labels])
        axes.set_ylim(0.5, len(tests) + 0.5)
        axes.set_xlabel(f"{comparison.metric}, points")

    title = f"{data.mark}Difference to {_short(comparison.rows[0].group.name)} ± standard error"
    return draw("comparison", title, table, plot)


def _short(text: str) -> str:
    """Return a name that fits beside a chart: of a long one its end."""
    return text if len(text) <= MAX_LABEL else "…" + text[-MAX_LABEL:]


def _changes_section(
    data: ReportData, comparison: Comparison, thumbnails: Thumbnails, num: int
) -> Section:
    """Build the section of queries won and lost, with images of each comparison."""
    notes = [
        f"A query is won where {comparison.metric} is higher than with"
        f" {comparison.rows[0].group.name}, lost where it is lower. Some are shown, at even"
        " distances through the list; the target is framed, and so is what else is known to be"
        " right."
    ]
    if any(len(row.evaluated) > 1 for row in comparison.rows):
        notes.append(
            "Of several runs the mean decides what is won; ranks and images are of the first run."
        )
    examples = [
        _examples(data, comparison, change, thumbnails, num) for change in comparison.changes
    ]
    return Section("changes", "Queries won and lost", notes, examples=examples if num else ())


def _examples(
    data: ReportData,
    comparison: Comparison,
    rows: tuple[Row, Row, Change],
    thumbnails: Thumbnails,
    num: int,
) -> Examples:
    first, other, change = rows
    pair = (_evaluation(first, comparison), _evaluation(other, comparison))
    shown = [(number, True) for number in evenly_spaced(change.won, num)]
    shown += [(number, False) for number in evenly_spaced(change.lost, num)]
    tops = [_tops(row, comparison, [number for number, _ in shown]) for row in (first, other)]
    titles = (first.group.name, other.group.name)
    cards = [
        query_changes.card(data, pair, number, is_won, tops, thumbnails, titles)
        for number, is_won in shown
    ]
    return Examples(
        f"{other.group.name}, iteration {other.iterations}, against {first.group.name},"
        f" iteration {first.iterations}: {len(change.won)} won, {len(change.lost)} lost",
        f"{len(cards)} shown",
        cards,
    )


def _evaluation(row: Row, comparison: Comparison) -> Evaluation:
    """Return the evaluation of a row's first run on the shared queries, as the report has it."""
    first = row.evaluated[0]
    ranks_Q = np.array(first.column(1, comparison.queries), np.float64)
    values_Q = row.values_Q.astype(np.float32)
    return Evaluation(
        "", row.group.name, dict(first.content), comparison.queries, values_Q, ranks_Q
    )


def _tops(row: Row, comparison: Comparison, numbers: Sequence[int]) -> query_changes.Tops:
    """Return the best images of some of the shared queries, of a row's first run; empty where they
    were not kept."""
    first = row.evaluated[0]
    top = first.content["top"]
    if not top:
        return {}
    rows = {number: first.rows[comparison.queries[number]] for number in numbers}
    return {number: top[place][: query_changes.NUM_SHOWN] for number, place in rows.items()}


def _settings_section(groups: Sequence[Group]) -> Section:
    table = tables.settings_table(groups)
    if not table.rows:
        note = "The runs have the same settings."
        return Section("different-settings", "Settings that differ", [note])
    note = (
        "Those that decide results, of the first run of each. A cell is empty where there is no"
        " such setting."
    )
    return Section("different-settings", "Settings that differ", [note], tables=[table])
