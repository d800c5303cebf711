"""Texts that were written for mined images: how many passed which check, and some of each kind with both pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cirloop.report.html.charts import Chart, Series, Table, bars
from cirloop.report.html.pictures import Shelf, Tile
from cirloop.report.html.source import ITERATIONS, TEXTS, Known, Source, shortened, spread
from cirloop.types import ImageId, QueryId

NAME = "augmented_samples_iter_{t}.json"
ACCEPTED = "accepted"
NO_TEXT = ("cut off", "declined", "set phrase", "unparseable")
"""Reasons for which there is nothing to be true."""


@dataclass(frozen=True, slots=True)
class Text:
    """A written text. `reason` is why it was rejected; empty = accepted. `original` is None where it is not known."""

    source: str
    reference: str
    image: str
    original: str | None
    text: str
    reason: str
    checks: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What is kept of augmented_samples_iter_{t}.json."""

    iteration: int
    summary: Mapping[str, Any]
    texts: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Example:
    text: Text
    original: str
    new: str
    reference: Tile
    image: Tile
    checks: str
    true: str


@dataclass(frozen=True, slots=True)
class Captions:
    chart: Chart | None
    table: Table | None
    shown: tuple[tuple[int, tuple[Example, ...]], ...]
    iterations: tuple[Written, ...]


def written(source: Source) -> tuple[Written, ...]:
    return tuple(source.once(("texts", t), lambda t=t: _read(source, t)) for t in source.iterations(NAME))  # type: ignore[misc]


def _read(source: Source, iteration: int) -> Written:
    content = source.read(NAME.format(t=iteration))
    texts = []
    for row in spread(content["accepted"], TEXTS):
        query, target = row["triplet"]["query"], row["triplet"]["target"]
        texts.append(Text(row["source"], query["reference"], target, None, query["text"], "", row["checks"]))
    for reason in content["summary"]["rejected"]:
        for row in spread([r for r in content["rejected"] if r["reason"] == reason], TEXTS // 2):
            texts.append(Text(row["source"], row["reference"], row["image"], row["original_text"], row["text"], reason,
                              row["checks"]))  # fmt: skip
    return Written(iteration, content["summary"], tuple(texts))


def captions(source: Source, shelf: Shelf) -> Captions:
    found, known = written(source), Known.of_train(source.train)
    if not found:
        return Captions(None, None, (), ())
    reasons = sorted({reason for w in found for reason in w.summary["rejected"]})
    counts = {w.iteration: {ACCEPTED: w.summary[ACCEPTED], **w.summary["rejected"]} for w in found}
    kinds = [ACCEPTED, *reasons]
    rows = tuple(
        (str(t), *(str(count.get(kind, 0)) for kind in kinds), str(sum(count.values()))) for t, count in counts.items()
    )
    table = Table("Texts by what became of them", ("iteration", *map(shortened, kinds), "texts"), rows)
    parts = [
        Series(shortened(kind), tuple(map(float, counts)), tuple(float(c.get(kind, 0)) for c in counts.values()), (), i)
        for i, kind in enumerate(kinds)
    ]
    last = found[-1]
    chart = bars(
        "Texts accepted and rejected",
        f"A bar an iteration. In iteration {last.iteration} {last.summary[ACCEPTED]} of {last.summary['candidates']} "
        "texts were accepted.",
        table, parts, [(float(t), str(t)) for t in counts], ("iteration", "texts"),
    )  # fmt: skip
    shown = tuple(
        (w.iteration, tuple(_example(source, known, t, shelf) for t in w.texts)) for w in found[::-1][:ITERATIONS]
    )
    return Captions(chart, _accounted(source, found) or table, shown, found)


def _accounted(source: Source, found: tuple[Written, ...]) -> Table | None:
    """How many of the accepted texts are true, where the data set knows."""
    rows = []
    for w in found:
        name = f"accounting_iter_{w.iteration}.json"
        if name in source.names:
            account = source.once(name, lambda name=name: source.read(name))  # type: ignore[misc]
            true, all_ = account["true_captions"], account["accepted"]
            rows.append((str(w.iteration), str(all_), f"{true} ({100 * true / all_:.1f}%)" if all_ else "0"))
    return Table("Accepted texts that are true", ("iteration", "accepted", "true"), tuple(rows)) if rows else None


def _example(source: Source, known: Known, text: Text, shelf: Shelf) -> Example:
    query = QueryId(text.source)
    original = known.text(query) if text.original is None else shortened(text.original)
    checks = []
    if "verify" in text.checks:
        checks.append(f"verified with {float(text.checks['verify']):.2f}")
    if "round_trip_rank" in text.checks:
        checks.append(f"found at rank {text.checks['round_trip_rank']}")
    oracle, true = source.train.oracle if source.train else None, ""
    if oracle is not None and text.reason not in NO_TEXT:
        held = oracle.text_is_true(ImageId(text.reference), text.text, ImageId(text.image))
        true = "the text is true" if held else "the text is not true"
    return Example(
        text, original, shortened(text.text), shelf.tile(known.album, ImageId(text.reference), "reference"),
        shelf.tile(known.album, ImageId(text.image), "mined image"), ", ".join(checks), true,
    )  # fmt: skip
