"""What was mined: counts by iteration and strategy, similarities of positives and negatives, and pictures of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.report.html.charts import Chart, Series, Table, areas
from cirloop.report.html.pictures import Shelf, Tile
from cirloop.report.html.source import IMAGES, ITERATIONS, MINED, STRATEGIES, Known, Source, shortened, spread
from cirloop.types import ImageId, Oracle, Query, QueryId, TrainSplit

NAME = "hard_negatives_iter_{t}.json"
BINS = np.linspace(-1, 1, 201)
"""Edges of the histograms: cosine similarities, 0.01 wide."""
MAX_BARS = 40
HISTOGRAMS = 4
"""At most, of iterations at even distances; the last is one of them."""


@dataclass(frozen=True, slots=True)
class Group:
    """The mined images of a query by one strategy, as rows of the artifact."""

    query: QueryId
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Mined:
    """What is kept of hard_negatives_iter_{t}.json. `positive_B` and `negative_B` are counts per bin of `BINS`."""

    iteration: int
    strategy: Mapping[str, Any]
    summary: Mapping[str, Any]
    by_strategy: Mapping[str, int]
    positive_B: npt.NDArray[np.int64]
    negative_B: npt.NDArray[np.int64]
    groups: Mapping[str, tuple[Group, ...]]


@dataclass(frozen=True, slots=True)
class Example:
    query: str
    text: str
    reference: Tile | None
    target: Tile | None
    images: tuple[Tile, ...]
    left: int
    """Mined images of the query that are not shown."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Examples of one iteration and strategy."""

    iteration: int
    strategy: str
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Negatives:
    table: Table | None
    charts: tuple[Chart, ...]
    shown: tuple[Shown, ...]
    iterations: tuple[Mined, ...]
    knows: bool
    """Whether the data set knows which images are right."""


def mined(source: Source) -> tuple[Mined, ...]:
    return tuple(source.once(("mined", t), lambda t=t: _read(source, t)) for t in source.iterations(NAME))  # type: ignore[misc]


def _read(source: Source, iteration: int) -> Mined:
    content = source.read(NAME.format(t=iteration))
    rows: list[dict[str, Any]] = content["negatives"]
    groups = [Group(QueryId(query), tuple(found)) for query, found in groupby(rows, lambda row: row["query"])]
    by_strategy: dict[str, int] = {}
    for row in rows:
        by_strategy[row["strategy"]] = by_strategy.get(row["strategy"], 0) + 1
    return Mined(
        iteration, content["strategy"], content["summary"], by_strategy,
        _histogram([group.rows[0]["target_score"] for group in groups]), _histogram([row["score"] for row in rows]),
        {name: tuple(_some(groups, name)) for name in list(by_strategy)[:STRATEGIES]},
    )  # fmt: skip


def _some(groups: Sequence[Group], strategy: str) -> list[Group]:
    """A few queries at even distances, with the images that `strategy` mined for them."""
    there = [group for group in groups if any(row["strategy"] == strategy for row in group.rows)]
    return [
        Group(g.query, tuple(dict(row) for row in g.rows if row["strategy"] == strategy)) for g in spread(there, MINED)
    ]


def _histogram(scores: Sequence[float]) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = np.histogram(np.clip(np.array(scores, np.float64), -1, 1), BINS)[0]
    return counts


def negatives(source: Source, shelf: Shelf) -> Negatives:
    found = mined(source)
    told = spread(found[::-1], HISTOGRAMS)[::-1]
    charts = tuple(_chart(m) for m in told if m.negative_B.sum())
    known = Known.of_train(source.train)
    shown = tuple(
        Shown(m.iteration, shortened(name), m.by_strategy[name],
              tuple(_example(source.train, known, group, shelf) for group in groups))
        for m in found[::-1][:ITERATIONS] for name, groups in m.groups.items()
    )  # fmt: skip
    knows = source.train is not None and source.train.oracle is not None
    return Negatives(_table(source, found) if found else None, charts, shown, found, knows)


def _table(source: Source, found: Sequence[Mined]) -> Table:
    """Counts by iteration, and false negatives where they were accounted for."""
    rows = []
    for m in found:
        name = f"accounting_iter_{m.iteration + 1}.json"
        wrong = "not known"
        if name in source.names:
            account = source.once(name, lambda name=name: source.read(name))  # type: ignore[misc]
            share = account["false_negatives"] / account["mined"] if account["mined"] else 0.0
            wrong = f"{account['false_negatives']} ({100 * share:.1f}%)"
        strategies = ", ".join(f"{shortened(name)}: {count}" for name, count in m.by_strategy.items())
        rows.append((
            str(m.iteration), strategies or shortened(m.strategy["type"]), str(m.summary["queries"]),
            str(m.summary["target_first"]), str(m.summary["queries_mined"]), str(m.summary["negatives"]),
            _left_out(m), wrong,
        ))  # fmt: skip
    columns = (
        "by model", "strategy: images", "queries", "target first", "queries mined", "images", "left out as right",
        "false negatives",
    )  # fmt: skip
    return Table("Mined negatives by the model that was wrong", columns, tuple(rows))


def _left_out(m: Mined) -> str:
    """Pairs of a query and an image that was known to be no negative of it, by kind."""
    counts = m.summary["left_out"].items()
    return ", ".join(f"{kind}: {count}" for kind, count in counts if count) or "none"


def _chart(m: Mined) -> Chart:
    """Both histograms over the range where there is anything, in at most `MAX_BARS` bars."""
    there = np.flatnonzero(m.positive_B + m.negative_B)
    first, last = int(there[0]), int(there[-1]) + 1
    step = -(-(last - first) // MAX_BARS)
    starts = np.arange(first, last, step)
    edges = [float(BINS[i]) for i in starts] + [float(BINS[min(int(starts[-1]) + step, len(BINS) - 1)])]
    sums = [np.add.reduceat(counts[first:last], starts - first) for counts in (m.positive_B, m.negative_B)]
    series = [
        Series(name, tuple(edges[:-1]), tuple((part / max(part.sum(), 1)).tolist()), (), color, dashed)
        for name, part, color, dashed in (("targets", sums[0], 2, False), ("mined images", sums[1], 1, True))
    ]
    rows = tuple(
        (f"{low:.2f} to {high:.2f}", str(a), str(b))
        for low, high, a, b in zip(edges[:-1], edges[1:], sums[0].tolist(), sums[1].tolist(), strict=True)
    )
    quarters = {name: m.summary["similarity"][name] or {} for name in ("positive", "negative")}
    told = "; ".join(f"{name} mean {q.get('mean', 'none')}" for name, q in quarters.items())
    return areas(
        f"Similarity to the query, model {m.iteration}",
        f"Two histograms: targets of the mined queries, and mined images. Over all queries: {told}.",
        Table(f"Counts, model {m.iteration}", ("cosine similarity", "targets", "mined images"), rows),
        edges, series, ("cosine similarity", "percent of each"),
    )  # fmt: skip


def _example(train: TrainSplit | None, known: Known, group: Group, shelf: Shelf) -> Example:
    asked, first = known.queries.get(group.query), group.rows[0]
    target = known.targets.get(group.query)
    right = _right(train.oracle if train else None, asked)
    tiles = []
    for row in group.rows[:IMAGES]:
        image = ImageId(row["image"])
        note = f"rank {row['rank']}, {row['score']:.3f}"
        wrong = right is not None and image in right
        tiles.append(shelf.tile(known.album, image, "", note + (", false negative" if wrong else ""), wrong=wrong))
    told = f"rank {first['target_rank']}, {first['target_score']:.3f}"
    return Example(
        shortened(group.query), known.text(group.query),
        shelf.tile(known.album, asked.reference, "reference") if asked else None,
        shelf.tile(known.album, target, "target", told, right=True) if target is not None else None,
        tuple(tiles), max(0, len(group.rows) - IMAGES),
    )  # fmt: skip


def _right(oracle: Oracle | None, query: Query | None) -> frozenset[ImageId] | None:
    return None if oracle is None or query is None else oracle.positives(query)
