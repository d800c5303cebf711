"""The words of the domain. Standard library and numpy arrays only; imports nothing of ours.

Array suffixes, here and everywhere: Q queries, G gallery, K kept, N images, D embedding, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

ImageId = NewType("ImageId", str)
QueryId = NewType("QueryId", str)


class UserError(ValueError):
    """Something the user can put right. The message says what is wrong, what is accepted and the way out."""


@dataclass(frozen=True, slots=True)
class Query:
    """A composed query: a reference image and the text that modifies it. It has no target."""

    id: QueryId
    reference: ImageId
    text: str


@dataclass(frozen=True, slots=True)
class Triplet:
    """A query and its annotated target. Training only."""

    query: Query
    target: ImageId


@dataclass(frozen=True, slots=True)
class Relevance:
    """What counts as right, per query. Evaluation only: never reaches mining, captioning or training.

    `targets` holds the one annotated target, `positives` every correct image where the data set knows them.
    """

    targets: Mapping[QueryId, ImageId]
    positives: Mapping[QueryId, frozenset[ImageId]]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Row i of every matrix of this gallery is `ids[i]`. Ids are sorted: ties broken by row are broken by id."""

    name: str
    ids: tuple[ImageId, ...]

    def __post_init__(self) -> None:
        if list(self.ids) != sorted(set(self.ids)):
            raise ValueError(f"gallery {self.name!r}: ids must be unique and sorted")

    def rows(self) -> dict[ImageId, int]:
        return {image: row for row, image in enumerate(self.ids)}


@dataclass(frozen=True, slots=True)
class Rankings:
    """The best K images per query, best first, ties by id, and the annotated target's place.

    `images_QK` are gallery rows (int32), `scores_QK` cosine similarities (float32). `target_rank_Q` counts
    from 1 among all ranked images (the reference is not ranked); `target_score_Q` is the target's similarity.
    """

    queries: tuple[QueryId, ...]
    gallery: Gallery
    images_QK: npt.NDArray[np.int32]
    scores_QK: npt.NDArray[np.float32]
    target_rank_Q: npt.NDArray[np.int32]
    target_score_Q: npt.NDArray[np.float32]


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
class AugmentedTriplet:
    """A mined negative turned into a positive by a new text; `source` is the human query it came from."""

    triplet: Triplet
    source: QueryId
    iteration: int
    captioner: str
    prompt: str
    checks: Mapping[str, float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """An embedder: a base model directory or hub name, and the LoRA adapter on it (None = the base)."""

    base: str
    adapter: str | None
    fingerprint: str


class Images(Protocol):
    """Where pixels come from. `digest` identifies the image's content; `load` returns it as RGB."""

    def load(self, image: ImageId) -> Image.Image: ...

    def digest(self, image: ImageId) -> str: ...


class Oracle(Protocol):
    """Exact knowledge of synthetic data. Accounting only: never reaches mining, captioning or training."""

    def positives(self, query: Query) -> frozenset[ImageId]: ...

    def text_is_true(self, reference: ImageId, text: str, image: ImageId) -> bool: ...

    def distance(self, reference: ImageId, image: ImageId) -> int: ...


@dataclass(frozen=True, slots=True)
class TrainSplit:
    """Human triplets and the gallery that is mined."""

    name: str
    triplets: tuple[Triplet, ...]
    gallery: Gallery
    images: Images
    oracle: Oracle | None = None

    def __iter__(self) -> Iterator[Triplet]:
        return iter(self.triplets)


@dataclass(frozen=True, slots=True)
class EvalSplit:
    """Queries, the gallery they are ranked against, and what is right."""

    name: str
    queries: tuple[Query, ...]
    gallery: Gallery
    images: Images
    relevance: Relevance


def targets_of(triplets: Sequence[Triplet]) -> dict[QueryId, ImageId]:
    return {triplet.query.id: triplet.target for triplet in triplets}
