"""Queries that an iteration won or lost against an earlier one, with the pictures that were found before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cirloop.report.html.charts import Table
from cirloop.report.html.pictures import Shelf, Tile
from cirloop.report.html.recalls import Evaluated
from cirloop.report.html.source import PAIRS, QUERIES, Known, Source, shortened, spread
from cirloop.types import ImageId, QueryId


@dataclass(frozen=True, slots=True)
class Example:
    """A query between two evaluations. `before` and `after` are None where nothing is ranked."""

    query: str
    text: str
    change: str
    reference: Tile | None
    target: Tile | None
    before: tuple[Tile, ...] | None
    after: tuple[Tile, ...] | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two evaluations: how many queries were won and lost, and some of them."""

    first: str
    second: str
    num_won: int
    num_lost: int
    won: tuple[Example, ...]
    lost: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    metric: str
    table: Table | None
    pairs: tuple[Pair, ...]
    num_pairs: int
    sets: bool
    """Whether people chose between sets of images, so that nothing is ranked."""


def changes(source: Source, found: Sequence[Evaluated], shelf: Shelf) -> Changes:
    """Every pair of neighbours is counted; the latest, and the first against the last, are shown with pictures."""
    pairs = [(a, b) for a, b in pairwise(found) if a.queries == b.queries]
    known = Known.of_evals(source.evals)
    metric = found[-1].result["compared_on"] if found else ""
    sets = bool(found) and bool(source.evals) and not known.targets
    rows = [(f"{a.label} → {b.label}", *(str(n) for n in _counts(a, b))) for a, b in pairs]
    shown = pairs[-PAIRS:]
    if len(pairs) > 1:
        shown = [*shown, (pairs[0][0], pairs[-1][1])]
        rows.append((f"{shown[-1][0].label} → {shown[-1][1].label}", *(str(n) for n in _counts(*shown[-1]))))
    table = Table(f"Queries won and lost by {metric}", ("iterations", "won", "lost", "as before"), tuple(rows))
    made = tuple(_pair(source, known, a, b, shelf) for a, b in reversed(shown))
    return Changes(metric, table if rows else None, made, len(pairs), sets)


def _counts(a: Evaluated, b: Evaluated) -> tuple[int, int, int]:
    won, lost = int((b.values_Q > a.values_Q).sum()), int((b.values_Q < a.values_Q).sum())
    return won, lost, len(a.queries) - won - lost


def _tops(source: Source, name: str, rows: Sequence[int]) -> list[list[ImageId]]:
    """The best images of some queries; empty where nothing is ranked."""

    def read() -> Any:
        tops = source.read(name)["top"]
        return [tops[row] for row in rows] if tops else []

    found: list[list[ImageId]] = source.once(("top", name, tuple(rows)), read)
    return found


def _pair(source: Source, known: Known, a: Evaluated, b: Evaluated, shelf: Shelf) -> Pair:
    won_Q, lost_Q = np.flatnonzero(b.values_Q > a.values_Q), np.flatnonzero(b.values_Q < a.values_Q)
    rows = {"won": spread(won_Q.tolist(), QUERIES), "lost": spread(lost_Q.tolist(), QUERIES)}
    every = [*rows["won"], *rows["lost"]]
    tops = [dict(zip(every, _tops(source, e.name, every), strict=False)) for e in (a, b)]
    made = {
        kind: tuple(_example(known, a, b, row, [top.get(row) for top in tops], shelf) for row in chosen)
        for kind, chosen in rows.items()
    }
    return Pair(a.label, b.label, len(won_Q), len(lost_Q), made["won"], made["lost"])


def _example(
    known: Known, a: Evaluated, b: Evaluated, row: int, tops: Sequence[list[ImageId] | None], shelf: Shelf
) -> Example:
    query: QueryId = a.queries[row]
    target, asked = known.targets.get(query), known.queries.get(query)

    def tiles(top: list[ImageId] | None) -> tuple[Tile, ...] | None:
        if top is None:
            return None
        return tuple(
            shelf.tile(known.album, image, f"place {place}", "the target" if image == target else "", image == target)
            for place, image in enumerate(top, 1)
        )

    if asked is not None and target is None:  # a preference between sets
        change = f"set 1 over set 2 by {a.ranks_Q[row]:.4f}, then {b.ranks_Q[row]:.4f}"
    else:
        change = f"the target's rank: {a.ranks_Q[row]:.0f}, then {b.ranks_Q[row]:.0f}"
    return Example(
        shortened(query), known.text(query), change,
        shelf.tile(known.album, asked.reference, "reference") if asked else None,
        shelf.tile(known.album, target, "target", right=True) if target is not None else None,
        tiles(tops[0]), tiles(tops[1]),
    )  # fmt: skip
