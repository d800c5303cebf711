"""The run as its report sees it, the parts that a section of the page is made of, and how much of a
run is shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from PIL import Image

from cirloop.io.redact import sanitize
from cirloop.report.charts import Chart, Table
from cirloop.report.legend import Legend
from cirloop.types import EvalSplit, ImageId, Images, Query, QueryId, TrainSplit, UserError

T = TypeVar("T")
MAX_LETTERS = 400
"""Of a text; longer ones are cut."""
SIDE = 256
"""Longest side of a thumbnail, in pixels: it is shown small, and enlarged by a click."""
MAX_BYTES = 16_000_000
"""Of all thumbnails of a page as text. Further ones say that they are left out."""


@dataclass(frozen=True)
class ReportData:
    """A run as its report sees it.

    `names` are the finished artifacts, `missing` those still to come, and `read` gives the content
    of one (of a checkpoint its training log). `settings` are the run's as JSON, `headline` the
    metrics to draw, `num_examples` how many examples of each kind (None: as usual), `used` what
    automatic settings came to. Where the data set cannot be read, `train` is None, `evals` is empty
    and `no_data` says why. `notices` are what a reader must know first, `mark` stands before
    titles, and `control` is the directory of another run. `results` is `evaluation_results.json`,
    empty where that cannot be read.
    """

    directory: Path
    names: frozenset[str]
    missing: Sequence[str]
    read: Callable[[str], dict[str, Any]]
    settings: Mapping[str, Any]
    headline: Sequence[str]
    train: TrainSplit | None
    evals: Sequence[EvalSplit]
    no_data: str = ""
    control: Path | None = None
    notices: Sequence[str] = ()
    mark: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    used: Mapping[str, str] = field(default_factory=dict)

    def iterations(self, pattern: str) -> list[int]:
        """Return the iterations t whose artifact `pattern`, with {t} in it, is finished, in
        order."""
        before, after = pattern.split("{t}")
        numbers = (
            name.removeprefix(before).removesuffix(after)
            for name in self.names
            if name.startswith(before)
        )
        return sorted(int(number) for number in numbers if number.isdigit())

    def artifacts(self, pattern: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield iterations with the content of each artifact, one at a time to bound memory."""
        for t in self.iterations(pattern):
            yield t, self.read(pattern.format(t=t))

    @cached_property
    def accounts(self) -> dict[int, dict[str, Any]]:
        """Return the accounting by iteration, where the data set knows the truth."""
        return dict(self.artifacts("accounting_iter_{t}.json"))

    @cached_property
    def train_split(self) -> SplitLookup:
        triplets = self.train.triplets if self.train else ()
        queries = {t.query.id: t.query for t in triplets}
        targets = {t.query.id: t.target for t in triplets}
        return SplitLookup(queries, targets, [self.train.images] if self.train else [])

    @cached_property
    def eval_split(self) -> SplitLookup:
        queries = {query.id: query for part in self.evals for query in part.queries}
        targets = {
            q: image
            for part in self.evals
            if part.relevance
            for q, image in part.relevance.targets.items()
        }
        positives = {
            q: images
            for part in self.evals
            if part.relevance
            for q, images in part.relevance.positives.items()
        }
        return SplitLookup(queries, targets, [part.images for part in self.evals], positives)


@dataclass(frozen=True, slots=True)
class SplitLookup:
    """The queries of a split, their targets and images, and all right images where those are known.
    Empty where the data set cannot be read."""

    queries: Mapping[QueryId, Query]
    targets: Mapping[QueryId, ImageId]
    images: Sequence[Images]
    positives: Mapping[QueryId, frozenset[ImageId]] = field(default_factory=dict)

    def text(self, query: QueryId) -> str:
        return shortened(self.queries[query].text) if query in self.queries else "(text not known)"

    def load(self, image: ImageId) -> Image.Image:
        """Load an image.

        Raises KeyError for an image that no part knows, UserError or OSError for an unusable one.
        """
        for images in self.images:
            try:
                return images.load(image)
            except KeyError:
                continue
        raise KeyError(image)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An image of the page, or why it is `missing`. `frame` is `right` (the target or another right
    image), `wrong` or empty."""

    source: Markup
    alt: str
    caption: str
    missing: str
    frame: str


class Thumbnails:
    """The images of one page, up to `MAX_BYTES`."""

    def __init__(self) -> None:
        self._sources: dict[tuple[int, ImageId], Markup] = {}
        self.places = self.filled = self.bytes = 0
        self.gone: set[ImageId] = set()

    def add(
        self, split: SplitLookup, image: ImageId, role: str, note: str = "", frame: str = ""
    ) -> Thumbnail:
        """Add an image to the page; `role` is what the image is to the query."""
        self.places += 1
        source = Markup()
        missing = ""
        if not split.images:
            missing = "no data"
        elif self.bytes >= MAX_BYTES:
            missing = "left out"
        else:
            try:
                source = self._source(split, image)
                self.bytes += len(source)
                self.filled += 1
            except (UserError, OSError, KeyError):
                missing = "not there"
                self.gone.add(image)
        words = [role, note]
        return Thumbnail(source, join(", ", [role, image, note]), join(": ", words), missing, frame)

    def query(self, split: SplitLookup, query: QueryId, note: str = "") -> list[Thumbnail]:
        """Add the reference and the target of a query, as far as known; `note` is about the
        target."""
        images = []
        if query in split.queries:
            images.append(self.add(split, split.queries[query].reference, "reference"))
        if query in split.targets:
            images.append(self.add(split, split.targets[query], "target", note, "right"))
        return images

    def _source(self, split: SplitLookup, image: ImageId) -> Markup:
        """Return a data URI of the image's thumbnail."""
        key = (id(split), image)
        if key not in self._sources:
            thumbnail = split.load(image)
            thumbnail.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            thumbnail.save(out, "JPEG", quality=80, optimize=True)
            self._sources[key] = Markup(
                "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
            )
        return self._sources[key]


@dataclass(frozen=True, slots=True)
class Card:
    """An example: the images of a query with its texts, then named rows of images. A row is None
    where the images were not kept. `good` colours the verdict."""

    query: str
    texts: Sequence[tuple[str, str]]
    images: Sequence[Thumbnail]
    rows: Sequence[tuple[str, Sequence[Thumbnail] | None]] = ()
    verdict: str = ""
    good: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class Examples:
    """Cards under a title; `count` says of how many."""

    title: str
    count: str
    cards: Sequence[Card]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, in the order of its fields."""

    anchor: str
    title: str
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Examples] = ()
    legend: Legend = ()


def shortened(text: str) -> str:
    """Shorten a text for the page; the template escapes it."""
    shown = sanitize(text)
    return shown if len(shown) <= MAX_LETTERS else shown[:MAX_LETTERS] + "…"


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items at even distances, the first among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def join(separator: str, words: Iterable[str]) -> str:
    """Join the words that are not empty."""
    return separator.join(word for word in words if word)


def try_read(read: Callable[[], T]) -> tuple[T | None, str]:
    """Return what `read` gives, or None and the first line of the error."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error).splitlines()[0]
