"""What was mined: counts by iteration and strategy, similarities of targets and negatives, and
images of some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cirloop.report import legend
from cirloop.report.charts import Chart, Table, draw, percent
from cirloop.report.legend import Legend
from cirloop.report.report_data import (
    Card,
    Examples,
    ReportData,
    Section,
    Thumbnails,
    evenly_spaced,
    shortened,
)
from cirloop.types import ImageId, QueryId

ARTIFACT = "hard_negatives_iter_{t}.json"
Rows = Sequence[Mapping[str, Any]]
MAX_ITERATIONS = 3
"""Latest iterations whose mined images are shown."""
MAX_STRATEGIES = 4
MAX_QUERIES = 6
"""Queries of an iteration and strategy whose mined images are shown."""
MAX_IMAGES = 5
MAX_HISTOGRAMS = 4
"""Of iterations at even distances; the last is one of them."""
NUM_BARS = 40
COLUMNS = (
    "by model",
    "strategy: images",
    "queries",
    "target first",
    "queries mined",
    "images",
    "left out as right",
    "false negatives",
)
Summaries = dict[int, Mapping[str, Any]]
"""What the artifacts say of themselves, by iteration."""


def section(data: ReportData, thumbnails: Thumbnails) -> tuple[Section, Summaries]:
    iterations = data.iterations(ARTIFACT)
    drawn = evenly_spaced(iterations[::-1], MAX_HISTOGRAMS)[::-1]
    rows: list[Sequence[str]] = []
    charts: list[Chart] = []
    examples: list[Examples] = []
    summaries: Summaries = {}
    has_anchors = False
    for t, content in data.artifacts(ARTIFACT):
        summaries[t] = content["summary"]
        anchors = content.get("anchors", {"queries": [], "pairs": []})
        has_anchors |= bool(anchors["queries"])
        counts = Counter(row["strategy"] for row in content["negatives"])
        rows.append(_row(data, t, content, counts))
        if t in drawn and counts:
            charts.append(_chart(data, drawn.index(t) + 1, t, content["negatives"]))
        if t in iterations[-MAX_ITERATIONS:]:
            examples[:0] = [
                *(
                    _examples(data, t, content["negatives"], name, thumbnails)
                    for name in [*counts][:MAX_STRATEGIES]
                ),
                *_anchors(data, t, anchors, thumbnails),
            ]
    if not rows:
        return Section("mined", "Mined negatives", ["Nothing is mined yet."]), {}
    if data.train is not None and data.train.oracle is not None:
        truth_note = (
            "This data set knows every right image: a mined image that is right is marked as a"
            " false negative."
        )
    else:
        truth_note = "Whether a mined image is right after all is not known for this data set."
    note = f"Wrong images that the current model ranks high for a training query. {truth_note}"
    if has_anchors:
        note += (
            " Anchors are images that no human wrote a text about: one is written for each of their"
            " neighbours."
        )
    tables = [
        Table("Mined negatives by the model that was wrong", COLUMNS, rows),
        *_filtered(summaries),
    ]
    section = Section(
        "mined", "Mined negatives", [note], (), charts, tables, examples, _legend(summaries)
    )
    return section, summaries


def _filtered(summaries: Summaries) -> list[Table]:
    """Return how many images each filter saw and dropped, where there are filters."""
    rows = [
        [str(t), count["filter"], str(count["seen"]), str(count["dropped"])]
        for t, summary in summaries.items()
        for count in summary["filters"]
    ]
    columns = ("by model", "filter", "seen", "dropped")
    return [Table("Mined images that filters dropped", columns, rows)] if rows else []


def _legend(summaries: Summaries) -> Legend:
    """Return what the words of the section's tables mean."""
    left_out = [kind for row in summaries.values() for kind, num in row["left_out"].items() if num]
    filters = [count["filter"] for row in summaries.values() for count in row["filters"]]
    return [
        *legend.COLUMNS.items(),
        *legend.legend(legend.LEFT_OUT, left_out),
        *legend.legend(legend.FILTERS, filters),
    ]


def _row(
    data: ReportData, t: int, content: Mapping[str, Any], counts: Mapping[str, int]
) -> list[str]:
    """Return counts of an iteration, and false negatives where they were counted."""
    summary = content["summary"]
    account = data.accounts.get(t + 1)
    false = "not known"
    if account:
        false = (
            f"{account['false_negatives']}"
            f" ({100 * account['false_negatives'] / max(account['mined'], 1):.1f}%)"
        )
    return [
        str(t),
        _counted(counts) or content["strategy"]["type"],
        *(str(summary[name]) for name in ("queries", "target_first", "queries_mined", "negatives")),
        _counted(summary["left_out"]) or "none",
        false,
    ]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{shortened(name)}: {count}" for name, count in counts.items() if count)


def _chart(data: ReportData, number: int, t: int, rows: Rows) -> Chart:
    """Draw histograms of similarity: of queries' targets, and of the images mined for these
    queries."""
    targets = [*{row["query"]: float(row["target_score"]) for row in rows}.values()]
    scores = [float(row["score"]) for row in rows]
    edges = np.histogram_bin_edges([*targets, *scores], NUM_BARS)
    counts = {
        "targets": np.histogram(targets, edges)[0],
        "mined images": np.histogram(scores, edges)[0],
    }
    table = Table(
        f"Counts, model {t}",
        ("cosine similarity", *counts),
        [
            (f"{low:.3f} to {high:.3f}", *(str(bins[i]) for bins in counts.values()))
            for i, (low, high) in enumerate(pairwise(edges))
        ],
    )

    def plot(axes: Axes) -> None:
        for name, bins in counts.items():
            axes.stairs(bins / bins.sum(), edges, fill=True, alpha=0.7, label=name)
        percent(axes)
        axes.set_xlabel("cosine similarity")
        axes.set_ylabel("of each")

    return draw(
        f"similarity_{number}", f"{data.mark}Similarity to the query, model {t}", table, plot
    )


def _examples(
    data: ReportData, t: int, negatives: Rows, strategy: str, thumbnails: Thumbnails
) -> Examples:
    rows = [row for row in negatives if row["strategy"] == strategy]
    groups = [list(group) for _, group in groupby(rows, lambda row: row["query"])]
    cards = [
        _card(data, group, thumbnails)
        for group in evenly_spaced(groups, data.num_examples or MAX_QUERIES)
    ]
    return Examples(
        f"Model {t}, {shortened(strategy)}",
        f"{len(cards)} queries; {len(rows)} images in all",
        cards,
    )


def _anchors(
    data: ReportData, t: int, anchors: Mapping[str, Rows], thumbnails: Thumbnails
) -> list[Examples]:
    """Return some of an iteration's anchors with their neighbours; nothing where it drew none."""
    if not anchors["queries"]:
        return []
    split = data.train_split
    cards = []
    for anchor in evenly_spaced(anchors["queries"], data.num_examples or MAX_QUERIES):
        image = thumbnails.add(split, ImageId(anchor["reference"]), "anchor")
        near = [row for row in anchors["pairs"] if row["query"] == anchor["id"]][:MAX_IMAGES]
        images = [thumbnails.add(split, ImageId(row["image"]), "", _rank(row)) for row in near]
        cards.append(Card(shortened(anchor["id"]), [], [image], [("Neighbours", images)]))
    count = f"{len(cards)} of {len(anchors['queries'])}; {len(anchors['pairs'])} neighbours in all"
    return [Examples(f"Model {t}, anchors", count, cards)]


def _rank(row: Mapping[str, Any]) -> str:
    return f"rank {row['rank']}, {row['score']:.3f}"


def _card(data: ReportData, rows: Rows, thumbnails: Thumbnails) -> Card:
    split = data.train_split
    query = QueryId(rows[0]["query"])
    right: frozenset[ImageId] = frozenset()
    if data.train is not None and data.train.oracle is not None and query in split.queries:
        right = data.train.oracle.positives(split.queries[query])
    images = []
    for row in rows[:MAX_IMAGES]:
        is_false = row["image"] in right
        note = _rank(row) + (", false negative" if is_false else "")
        images.append(
            thumbnails.add(split, ImageId(row["image"]), "", note, "wrong" if is_false else "")
        )
    more = f" (and {len(rows) - MAX_IMAGES} more)" if len(rows) > MAX_IMAGES else ""
    target = f"rank {rows[0]['target_rank']}, {rows[0]['target_score']:.3f}"
    return Card(
        shortened(query),
        [("", split.text(query))],
        thumbnails.query(split, query, target),
        [(f"Mined{more}", images)],
    )
