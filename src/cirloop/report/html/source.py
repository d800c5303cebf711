"""What a report is made of, and the limits of how much of it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from cirloop.shown import safe
from cirloop.types import EvalSplit, ImageId, Images, Query, QueryId, TrainSplit, UserError

T = TypeVar("T")
PAIRS = 4
"""Latest pairs of neighbouring evaluations that are shown with pictures, besides the first against the last."""
QUERIES = 4
"""Queries won, and queries lost, of a pair."""
ITERATIONS = 3
"""Latest iterations whose mined images and captions are shown with pictures."""
MINED = 6
"""Queries of an iteration and strategy whose mined images are shown, with up to `IMAGES` of them."""
IMAGES = 5
STRATEGIES = 4
TEXTS = 4
"""Accepted captions of an iteration, and half as many rejected for each reason."""
LETTERS = 400
"""Of a text; longer ones are cut."""


@dataclass(frozen=True, slots=True)
class Source:
    """A run as its report sees it.

    `names` are the finished artifacts, `read` gives the content of one (of a checkpoint its training log). `settings`
    are the run's as JSON, `headline` the metrics to draw. Where the data set cannot be read `train` is None, `evals`
    empty and `no_data` says why. `hardness` is a curriculum's, of an iteration and the losses so far. `kept` holds what
    was read of artifacts, from one report to the next. `notices` are what a reader must know first, `mark` stands
    before the title.
    """

    directory: Path
    names: frozenset[str]
    read: Callable[[str], dict[str, Any]]
    settings: Mapping[str, Any]
    headline: tuple[str, ...]
    train: TrainSplit | None
    evals: tuple[EvalSplit, ...]
    no_data: str = ""
    hardness: Callable[[int, Sequence[float]], float] | None = None
    control: Path | None = None
    kept: dict[Any, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    mark: str = ""

    def once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def iterations(self, pattern: str) -> list[int]:
        """Iterations t whose artifact `pattern`, with {t} in it, is finished."""
        before, after = pattern.split("{t}")
        found = [n[len(before) : len(n) - len(after)] for n in self.names if n.startswith(before) and n.endswith(after)]
        return sorted(int(t) for t in found if t.isdigit())


@dataclass(frozen=True, slots=True)
class Album:
    """The pictures of a split, whichever of its parts has them. `name` tells albums apart."""

    name: str
    parts: tuple[Images, ...]

    def load(self, image: ImageId) -> Image.Image:
        """Raises KeyError for an image that no part knows, UserError or OSError for one that cannot be used."""
        for images in self.parts:
            try:
                return images.load(image)
            except KeyError:
                continue
        raise KeyError(image)


@dataclass(frozen=True, slots=True)
class Known:
    """The queries of a split, their targets and pictures. Empty where the data set cannot be read."""

    queries: Mapping[QueryId, Query]
    targets: Mapping[QueryId, ImageId]
    album: Album | None

    @classmethod
    def of_train(cls, train: TrainSplit | None) -> Known:
        triplets = train.triplets if train else ()
        album = Album("train", (train.images,)) if train else None
        return cls({t.query.id: t.query for t in triplets}, {t.query.id: t.target for t in triplets}, album)

    @classmethod
    def of_evals(cls, parts: Sequence[EvalSplit]) -> Known:
        queries = {query.id: query for part in parts for query in part.queries}
        targets = {q: image for part in parts if part.relevance for q, image in part.relevance.targets.items()}
        return cls(queries, targets, Album("evals", tuple(part.images for part in parts)) if parts else None)

    def text(self, query: QueryId) -> str:
        return shortened(self.queries[query].text) if query in self.queries else "(text not known)"


@lru_cache(1 << 14)
def clean(text: str) -> str:
    """`safe`, which looks at the whole environment each time. Forgotten when a page is begun."""
    return safe(text)


def shortened(text: str) -> str:
    """What of a text is shown; the template escapes it."""
    shown = clean(text)
    return shown if len(shown) <= LETTERS else shown[:LETTERS] + "…"


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, at even distances, the first among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def or_none(read: Callable[[], T]) -> tuple[T | None, str]:
    """What `read` gives, or None and the first line of what is wrong."""
    try:
        return read(), ""
    except UserError as error:
        return None, clean(str(error)).splitlines()[0]
