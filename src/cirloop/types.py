"""The words of the domain. Standard library and numpy arrays only; imports nothing of ours.

Array suffixes, here and everywhere: Q queries, G gallery, K kept, N images, D embedding, B batch, T
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    from PIL import Image

ImageId = NewType("ImageId", str)
QueryId = NewType("QueryId", str)
Rankings = Mapping[QueryId, Sequence[ImageId]]
"""Images of each query, best first."""


class UserError(ValueError):
    """Something the user can put right. The message says what is wrong, what is accepted and the
    way out."""


@dataclass(frozen=True, slots=True)
class Query:
    """A composed query: a reference image and the text that modifies it. It has no target."""

    id: QueryId
    reference: ImageId
    text: str
    category: str | None = None
    """What kind of thing it is about, where the data set says so."""


@dataclass(frozen=True, slots=True)
class Triplet:
    """A query and its annotated target. Training only."""

    query: Query
    target: ImageId


@dataclass(frozen=True, slots=True)
class Preference:
    """Two sets of images that a person saw for a query, and which was preferred: 1 or 2."""

    first: tuple[ImageId, ...]
    second: tuple[ImageId, ...]
    preferred: int


@dataclass(frozen=True, slots=True)
class Relevance:
    """What counts as right, per query. Evaluation only: never reaches mining, captioning or
    training.

    `targets` holds the one annotated target, `positives` every correct image where the data set
    knows them, `aspects` the names of what a text asks for (CIRCO). Where people chose between sets
    there are `preferences` and no targets.
    """

    targets: Mapping[QueryId, ImageId]
    positives: Mapping[QueryId, frozenset[ImageId]] = field(default_factory=dict)
    aspects: Mapping[QueryId, tuple[str, ...]] = field(default_factory=dict)
    preferences: Mapping[QueryId, Preference] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gallery:
    """A gallery of images: row i of every matrix of it is `ids[i]`. Ids are sorted, so ties broken
    by row are broken by id."""

    name: str
    ids: tuple[ImageId, ...]

    def __post_init__(self) -> None:
        if list(self.ids) != sorted(set(self.ids)):
            raise ValueError(f"gallery {self.name!r}: ids must be unique and sorted")

    def rows(self) -> dict[ImageId, int]:
        return {image: row for row, image in enumerate(self.ids)}


@dataclass(frozen=True, slots=True)
class MinedNegative:
    """A wrong image that the current model ranks high for a training query."""

    query: QueryId
    image: ImageId
    rank: int
    score: float
    target_rank: int
    target_score: float
    strategy: str


@dataclass(frozen=True, slots=True)
class MinedAnchors:
    """Self-made anchors of a round: a query for each, and images near its reference.

    A query's text is an example, a human text of other images.
    """

    queries: Sequence[Query]
    pairs: Sequence[MinedNegative]


@dataclass(frozen=True, slots=True)
class AugmentedTriplet:
    """A mined image turned into a target by a new text; `source` is the human query, or the
    self-made anchor's, that it came from."""

    triplet: Triplet
    source: QueryId
    iteration: int
    captioner: str
    prompt: str
    checks: Mapping[str, float | bool] = field(default_factory=dict)


class Images(Protocol):
    """A source of pixels. `digest` identifies an image's content; `load` returns the image as
    RGB."""

    def load(self, image: ImageId) -> Image.Image: ...

    def digest(self, image: ImageId) -> str: ...


class Oracle(Protocol):
    """Exact knowledge of synthetic data. Accounting only: never reaches mining, captioning or
    training."""

    def positives(self, query: Query) -> frozenset[ImageId]: ...

    def text_is_true(self, reference: ImageId, text: str, image: ImageId) -> bool: ...

    def distance(self, reference: ImageId, image: ImageId) -> int: ...


class Catalogue(Protocol):
    """What images show, known exactly, with the words for it: writes and judges texts."""

    @property
    def fingerprint(self) -> str: ...

    def write(self, reference: ImageId, image: ImageId, seed: int) -> str | None:
        """Write a text that leads from the reference to the image; None where they are equal or
        differ in too much, or no words are known."""

    def is_true(self, reference: ImageId, text: str, image: ImageId) -> bool:
        """Return whether the text leads from the reference to the image."""

    def knows(self, image: ImageId) -> bool:
        """Return whether it is known what the image shows."""

    def right(self, reference: ImageId, text: str, images: Sequence[ImageId]) -> list[ImageId]:
        """Return those of `images` to which the text leads from the reference."""

    def limited(self, max_changes: int) -> Catalogue:
        """Return a catalogue that writes for images that differ in at most `max_changes`."""


@dataclass(frozen=True, slots=True)
class TrainSplit:
    """Human triplets and the gallery that is mined.

    `groups` and `categories` are there where the data set has them: images shown together with a
    query, the kind of thing an image shows. `positives` are further right answers that training
    lines name, of the gallery. `catalogue` writes texts where the data set knows what its images
    show. `judge` names right answers that no line names (`foundation.exclude_right`).
    """

    name: str
    triplets: tuple[Triplet, ...]
    gallery: Gallery
    images: Images
    oracle: Oracle | None = None
    groups: Mapping[QueryId, tuple[ImageId, ...]] = field(default_factory=dict)
    categories: Mapping[ImageId, str] = field(default_factory=dict)
    positives: Mapping[QueryId, frozenset[ImageId]] = field(default_factory=dict)
    catalogue: Catalogue | None = None
    judge: Catalogue | None = None

    def __iter__(self) -> Iterator[Triplet]:
        return iter(self.triplets)


@dataclass(frozen=True, slots=True)
class EvalProtocol:
    """How a benchmark scores a ranking, and which of its metrics are shown and compared.

    `description` is printed beside every result; `{gallery}` in it becomes the kind of gallery.
    `cutoffs` are the K of recall@K and map@K, in images. `primary_metric` is what iterations are
    compared on, query by query; `reported` are the metrics that the papers' tables show.
    """

    description: str
    primary_metric: str
    reported: tuple[str, ...]
    cutoffs: tuple[int, ...] = (1, 5, 10, 50)
    keep_reference: bool = False
    """The reference is ranked with the rest of the gallery."""
    without_reference_too: bool = False
    """Recalls are also given with the reference removed."""
    any_correct_cutoffs: tuple[int, ...] = ()
    """The K of `any correct recall@K`, the recall of the first right image, annotated or not."""
    mean_average_precision: bool = True
    """map@K is given where queries have several right answers."""
    mean_recall: tuple[int, ...] = ()
    """The K over which a further metric averages recall@K."""


@dataclass(frozen=True, slots=True)
class LabeledQueries:
    """Queries and their right answers, without pixels: all that scoring a ranking needs.

    `relevance` is None for a split whose targets are not published, `gallery` where the list of its
    images is not there (CIRCO without the COCO files). `category` is FashionIQ's, else empty.
    `groups` holds CIRR's: the five other images of a query's group, which it is also ranked among.
    `clusters` names what queries share where that is more than the reference: standard errors count
    by it. `official` is how many queries and images the published split has, where that is known.
    """

    name: str
    queries: tuple[Query, ...]
    relevance: Relevance | None
    gallery: Gallery | None
    protocol: EvalProtocol
    category: str = ""
    groups: Mapping[QueryId, tuple[ImageId, ...]] = field(default_factory=dict)
    clusters: Mapping[QueryId, str] = field(default_factory=dict)
    official: tuple[int, int] | None = None

    def cluster_of(self, query: Query) -> str:
        """Return the name of the cluster of queries that are not independent of this one."""
        return self.clusters.get(query.id, query.reference)

    @property
    def benchmark(self) -> str:
        """The data set of a split: `fashioniq` of `fashioniq_val`."""
        return benchmark_of(self.name)

    def relevant_images(self, query: Query) -> set[ImageId]:
        """Return the images that decide a query's metrics: its reference, right answers, group and
        sets."""
        images = {query.reference, *self.groups.get(query.id, ())}
        if self.relevance is not None:
            images |= self.relevance.positives.get(query.id, frozenset())
            if query.id in self.relevance.targets:
                images.add(self.relevance.targets[query.id])
            if query.id in self.relevance.preferences:
                preference = self.relevance.preferences[query.id]
                images |= {*preference.first, *preference.second}
        return images


@dataclass(frozen=True, slots=True)
class EvalSplit:
    """What is evaluated: labeled queries, the gallery they are ranked against, and its images.

    One per category where a benchmark has several. `missing` images of the gallery could not be
    used and are not ranked; `dropped` queries needed one of them. Every result says both.
    """

    labeled: LabeledQueries
    gallery: Gallery
    images: Images
    missing: int = 0
    dropped: int = 0

    @property
    def name(self) -> str:
        return self.labeled.name

    @property
    def queries(self) -> tuple[Query, ...]:
        return self.labeled.queries

    @property
    def relevance(self) -> Relevance | None:
        return self.labeled.relevance


def benchmark_of(split: str) -> str:
    """Return the data set of a split: `hp_fashioniq` of `hp_fashioniq_val`, `fashioniq` of
    `fashioniq_val:dress`."""
    return split.partition(":")[0].rpartition("_")[0]


def targets_of(triplets: Sequence[Triplet]) -> dict[QueryId, ImageId]:
    """Return the target of each query."""
    return {triplet.query.id: triplet.target for triplet in triplets}
