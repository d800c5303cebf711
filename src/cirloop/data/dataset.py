"""What a data set gives the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import Field

from cirloop.artifacts.store import fingerprint
from cirloop.config.base import Settings
from cirloop.data.images import GreyImages
from cirloop.types import (
    EvalProtocol,
    EvalSplit,
    Gallery,
    Images,
    Query,
    TrainSplit,
    Triplet,
    UserError,
)

if TYPE_CHECKING:
    from cirloop.data.paths import DataPaths

GREY_SUFFIX = "/grey"
"""Ends the gallery's name of a split whose pictures are grey."""


class DatasetSettings(Settings):
    """What the settings of every data set have."""

    protocol: ClassVar[EvalProtocol]
    """How its evaluation splits are scored."""
    type: str

    def build(self, data_paths: DataPaths) -> Dataset:
        """The data set, its splits made when asked for. Raises UserError where its files are not
        there."""
        raise NotImplementedError


class FileSettings(DatasetSettings):
    """What the settings of data sets from files share."""

    allow_missing_images: int = Field(0, ge=0)
    """Pictures of a split that may be missing or damaged. Queries that need one are dropped, every
    result says so."""


@dataclass(frozen=True)
class Dataset:
    """`load_train` gives the train split, `evals` the parts of an evaluation split by name (`val`,
    `test`).

    Both are made when asked for, so that evaluating needs no training data.
    """

    name: str
    load_train: Callable[[], TrainSplit]
    evals: Mapping[str, Callable[[], tuple[EvalSplit, ...]]]
    _loaded: dict[str, tuple[EvalSplit, ...]] = field(default_factory=dict, init=False, repr=False)

    def eval_splits(self, split: str) -> tuple[EvalSplit, ...]:
        """The parts of an evaluation split, made once. Raises UserError where the data set has no
        such split."""
        if split not in self.evals:
            raise UserError(
                f"evaluation.split {split}: {self.name} has only {', '.join(self.evals)}."
            )
        if split not in self._loaded:
            self._loaded[split] = self.evals[split]()
        return self._loaded[split]

    @cached_property
    def train(self) -> TrainSplit:
        return self.load_train()

    def split_key(self, split: TrainSplit | EvalSplit) -> tuple[str, str]:
        """How another process finds a split of this data set again: what holds it, and the name of
        its gallery."""
        gallery = split.gallery.name.removesuffix(GREY_SUFFIX)
        held = [
            name
            for name, parts in self._loaded.items()
            if gallery in [part.gallery.name for part in parts]
        ]
        return ("train" if isinstance(split, TrainSplit) else held[0]), split.gallery.name

    def split_by_key(self, where: Sequence[str]) -> TrainSplit | EvalSplit:
        """The split that `split_key` names."""
        holder, gallery = where
        splits: Sequence[TrainSplit | EvalSplit] = (
            [self.train] if holder == "train" else self.eval_splits(holder)
        )
        (found,) = [
            split for split in splits if split.gallery.name == gallery.removesuffix(GREY_SUFFIX)
        ]
        return with_grey_images(found) if gallery.endswith(GREY_SUFFIX) else found

    @cached_property
    def digest(self) -> str:
        """Of the train split's triplets, further right answers and pixels."""
        right = self.train.positives
        rows = [[*_row(t), *sorted(right.get(t.query.id, ()))] for t in self.train.triplets]
        return fingerprint(rows + _pixels(self.train.gallery, self.train.images))


def _row(triplet: Triplet) -> list[object]:
    query = triplet.query
    return [query.id, query.reference, query.text, query.category, triplet.target]


Split = TypeVar("Split", TrainSplit, EvalSplit, TrainSplit | EvalSplit)


def with_grey_images(split: Split) -> Split:
    """The same split with grey pictures."""
    gallery = replace(split.gallery, name=split.gallery.name + GREY_SUFFIX)
    return replace(split, images=GreyImages(split.images), gallery=gallery)


def eval_digest(parts: Sequence[EvalSplit]) -> str:
    """Of an evaluation split's queries, right answers and pixels."""
    return fingerprint([[_queries(part), _pixels(part.gallery, part.images)] for part in parts])


def _queries(part: EvalSplit) -> list[list[object]]:
    def right(query: Query) -> list[object]:
        if part.relevance is None:
            return []
        if query.id in part.relevance.preferences:
            preference = part.relevance.preferences[query.id]
            return [preference.first, preference.second, preference.preferred]
        return [
            part.relevance.targets[query.id],
            sorted(part.relevance.positives.get(query.id, ())),
        ]

    return [
        [q.id, q.reference, q.text, q.category, *right(q), part.labeled.groups.get(q.id, ())]
        for q in part.queries
    ]


def _pixels(gallery: Gallery, images: Images) -> list[str]:
    return [images.digest(image) for image in gallery.ids]
