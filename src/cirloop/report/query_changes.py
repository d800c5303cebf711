"""Queries that an iteration won or lost against an earlier one, with the best images before and
after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from cirloop.report.charts import Table
from cirloop.report.metrics_section import Evaluation
from cirloop.report.report_data import (
    Card,
    Examples,
    ReportData,
    Section,
    Thumbnail,
    Thumbnails,
    evenly_spaced,
    shortened,
)
from cirloop.types import ImageId, QueryId

MAX_PAIRS = 4
"""Latest pairs of neighbouring evaluations that are shown with images, besides the first against
the last."""
MAX_QUERIES = 4
"""Queries won, and queries lost, of a pair."""
NUM_SHOWN = 5
"""Best images that are shown of a query."""
Pair = tuple[Evaluation, Evaluation]
Tops = Mapping[int, Sequence[ImageId]]
"""The best images of queries, by the queries' rows."""


def section(data: ReportData, evaluated: Sequence[Evaluation], thumbnails: Thumbnails) -> Section:
    """Build the section: all pairs of neighbours are counted, the latest and first-to-last shown
    with images."""
    pairs = [(a, b) for a, b in pairwise(evaluated) if a.queries == b.queries]
    if not pairs:
        text = f"Two evaluations are needed; {len(evaluated)} are there."
        return Section("changes", "Queries won and lost", [text])
    shown = pairs[-MAX_PAIRS:]
    if len(pairs) > 1:
        first_to_last = (pairs[0][0], pairs[-1][1])
        shown = [*shown, first_to_last]
        pairs = [*pairs, first_to_last]
    rows = [(_title(pair), *(str(len(rows_Q)) for rows_Q in _changed(pair))) for pair in pairs]
    metric = evaluated[-1].result["compared_on"]
    notes = [
        f"A query is won where {metric} rises, lost where it falls. {len(shown)} of {len(pairs)}"
        " comparisons are shown with images, each with a few queries at even distances through"
        " the list; the target is framed, and so is what else is known to be right."
    ]
    if any(map(_by_ranks, pairs)):
        notes.append(
            f"Where {metric} is 0 in both evaluations, a query is won where its target's rank"
            " improves, lost where it falls back."
        )
    if data.evals and not data.eval_split.targets:
        notes.append("People chose between sets of images here, so there is no ranking to show.")
    table = Table(
        f"Queries won and lost by {metric}", ("iterations", "won", "lost", "as before"), rows
    )
    examples = [_examples(data, pair, thumbnails) for pair in reversed(shown)]
    return Section("changes", "Queries won and lost", notes, tables=[table], examples=examples)


def _title(pair: Pair) -> str:
    return f"{pair[0].label} → {pair[1].label}"


def _changed(pair: Pair) -> tuple[list[int], list[int], list[int]]:
    """Return the rows of queries that were won, lost and neither."""
    if _by_ranks(pair):
        signs_Q = np.sign(pair[0].ranks_Q - pair[1].ranks_Q)
    else:
        signs_Q = np.sign(pair[1].values_Q - pair[0].values_Q)
    won, lost, equal = (np.flatnonzero(signs_Q == sign).tolist() for sign in (1, -1, 0))
    return won, lost, equal


def _by_ranks(pair: Pair) -> bool:
    """Tell whether no query is right in either evaluation, so that only ranks differ."""
    return not any(evaluation.values_Q.any() for evaluation in pair)


def _examples(data: ReportData, pair: Pair, thumbnails: Thumbnails) -> Examples:
    won, lost, _ = _changed(pair)
    num_shown = data.num_examples or MAX_QUERIES
    rows = [(row, True) for row in evenly_spaced(won, num_shown)]
    rows += [(row, False) for row in evenly_spaced(lost, num_shown)]
    tops = [_tops(data, evaluation.name, [row for row, _ in rows]) for evaluation in pair]
    titles = (f"Before ({pair[0].label})", f"After ({pair[1].label})")
    cards = [card(data, pair, row, is_won, tops, thumbnails, titles) for row, is_won in rows]
    return Examples(
        f"{_title(pair)}: {len(won)} won, {len(lost)} lost", f"{len(cards)} shown", cards
    )


def _tops(data: ReportData, name: str, rows: Sequence[int]) -> Tops:
    """Return queries' best images, as many as are shown; empty where they were not kept."""
    tops = data.read(name)["top"]
    return {row: tops[row][:NUM_SHOWN] for row in rows} if tops else {}


def card(
    data: ReportData,
    pair: Pair,
    row: int,
    won: bool,
    tops: Sequence[Tops],
    thumbnails: Thumbnails,
    titles: tuple[str, str],
) -> Card:
    """Return the card of a query that the second evaluation of a pair won or lost; `titles` stand
    above the best images of each."""
    split = data.eval_split
    query = QueryId(pair[0].queries[row])
    target = split.targets.get(query)

    positives = split.positives.get(query, frozenset())

    def note(image: ImageId) -> str:
        if image == target:
            return "the target"
        return "right" if image in positives else ""

    def best(top: Sequence[ImageId] | None) -> list[Thumbnail] | None:
        if top is None:
            return None
        return [
            thumbnails.add(split, image, str(place), note(image), "right" if note(image) else "")
            for place, image in enumerate(top, 1)
        ]

    before = pair[0].ranks_Q[row]
    after = pair[1].ranks_Q[row]
    if query in split.queries and target is None:  # a preference between sets
        change = f"set 1 over set 2 by {before:.4f}, then {after:.4f}"
    else:
        change = f"the target's rank: {before:.0f}, then {after:.0f}"
    return Card(
        shortened(query),
        [("", split.text(query))],
        thumbnails.query(split, query),
        [
            (titles[0], best(tops[0].get(row))),
            (titles[1], best(tops[1].get(row))),
        ],
        "Won" if won else "Lost",
        won,
        change,
    )
