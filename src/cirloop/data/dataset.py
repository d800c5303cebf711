"""The data set that the loop trains and evaluates on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

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
"""Suffix of the gallery's name of a split whose images are grey."""


class DatasetSettings(Settings):
    """Settings that every data set has."""

    protocol: ClassVar[EvalProtocol]
    """How its evaluation splits are scored."""
    type: str

    def build(self, data_paths: DataPaths) -> Dataset:
        """Define the data set, whose splits load on first use. Raises UserError where its files are
        missing."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dataset:
    """Train and evaluation splits, loaded on first use, so that evaluating needs no training data.

    `evals` loads an evaluation split by name (`val`, `test`), one part per category.
    """

    name: str
    load_train: Callable[[], TrainSplit]
    evals: Mapping[str, Callable[[], tuple[EvalSplit, ...]]]
    _loaded: dict[str, tuple[EvalSplit, ...]] = field(default_factory=dict, init=False, repr=False)

    def eval_splits(self, split: str) -> tuple[EvalSplit, ...]:
        """Load an evaluation split once, one part per category. Raises UserError where the data set
        has no such split."""
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
        """Return the key by which another process loads the split again: the name of the split that
        holds it, and the name of its gallery."""
        gallery = split.gallery.name.removesuffix(GREY_SUFFIX)
        if isinstance(split, TrainSplit):
            return "train", split.gallery.name
        for name, parts in self._loaded.items():
            if gallery in [part.gallery.name for part in parts]:
                return name, split.gallery.name
        raise AssertionError(f"{split.gallery.name} is not of {self.name}")

    def split_by_key(self, key: Sequence[str]) -> TrainSplit | EvalSplit:
        """Return the split with this key (`split_key`)."""
        name, gallery = key
        splits: Sequence[TrainSplit | EvalSplit] = (
            [self.train] if name == "train" else self.eval_splits(name)
        )
        plain_gallery = gallery.removesuffix(GREY_SUFFIX)
        (split,) = [split for split in splits if split.gallery.name == plain_gallery]
        return with_grey_images(split) if gallery.endswith(GREY_SUFFIX) else split

    @cached_property
    def digest(self) -> str:
        """The digest of the train split's triplets, further right answers, judge and pixels."""
        positives = self.train.positives
        rows = [[*_row(t), *sorted(positives.get(t.query.id, ()))] for t in self.train.triplets]
        judge = [[self.train.judge.fingerprint]] if self.train.judge else []
        return fingerprint(rows + judge + _pixels(self.train.gallery, self.train.images))


def _row(triplet: Triplet) -> list[object]:
    query = triplet.query
    return [query.id, query.reference, query.text, query.category, triplet.target]


Split = TypeVar("Split", TrainSplit, EvalSplit, TrainSplit | EvalSplit)


def with_grey_images(split: Split) -> Split:
    """Return the split with grey images."""
    gallery = replace(split.gallery, name=split.gallery.name + GREY_SUFFIX)
    return replace(split, images=GreyImages(split.images), gallery=gallery)


def eval_digest(parts: Sequence[EvalSplit]) -> str:
    """Return the digest of an evaluation split's queries, right answers and pixels."""
    return fingerprint([[_queries(part), _pixels(part.gallery, part.images)] for part in parts])


def _queries(part: EvalSplit) -> list[list[object]]:
    return [
        [
            *(query.id, query.reference, query.text, query.category),
            *_answers(part, query),
            part.labeled.groups.get(query.id, ()),
        ]
        for query in part.queries
    ]


def _answers(part: EvalSplit, query: Query) -> list[object]:
    if part.relevance is None:
        return []
    if query.id in part.relevance.preferences:
        preference = part.relevance.preferences[query.id]
        return [preference.first, preference.second, preference.preferred]
    positives = part.relevance.positives.get(query.id, ())
    return [part.relevance.targets[query.id], sorted(positives)]


def _pixels(gallery: Gallery, images: Images) -> list[str]:
    return [images.digest(image) for image in gallery.ids]
