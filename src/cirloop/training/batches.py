"""Which rows make which batch: a function of the seed and the step alone, so that a resumed run sees the same.

A batch holds augmented triplets together with the human triplets they came from (ReCALL's best setting), filled up
with human triplets from one seeded shuffle per epoch. Its candidates are the targets and the mined negatives, each
image once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet


@dataclass(frozen=True, slots=True)
class Batch:
    """`target_B[i]` is the row in `candidates` of query i's target; `also_right_BN` other candidates known right."""

    queries: tuple[Query, ...]
    candidates: tuple[ImageId, ...]
    target_B: npt.NDArray[np.int64]
    also_right_BN: npt.NDArray[np.bool_]


class Batches:
    """The batches of one training stage."""

    def __init__(
        self,
        human: Sequence[Triplet],
        augmented: Sequence[AugmentedTriplet],
        mined: Sequence[MinedNegative],
        batch_size: int,
        augmented_share: float,
        num_negatives: int,
        seed: int,
    ) -> None:
        if not human:
            raise ValueError("no human triplets to train on")
        self._human, self._augmented = list(human), list(augmented)
        self._by_id = {t.query.id: t for t in human}
        self._num_augmented = int(batch_size * augmented_share) if augmented else 0
        self._batch_size, self._num_negatives, self._seed = batch_size, num_negatives, seed
        self._shuffles: dict[tuple[str, int], list[int]] = {}
        self._negatives: dict[QueryId, list[ImageId]] = defaultdict(list)
        for negative in mined:
            self._negatives[negative.query].append(negative.image)
        self._right: dict[tuple[ImageId, str], set[ImageId]] = defaultdict(set)
        for triplet in [*human, *(a.triplet for a in augmented)]:
            self._right[triplet.query.reference, triplet.query.text].add(triplet.target)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, from 0."""
        rows: dict[QueryId, Triplet] = {}
        for position in self._stream("augmented", len(self._augmented), step, self._num_augmented):
            pair = self._augmented[position]
            source = self._by_id[pair.source]
            rows[pair.triplet.query.id] = pair.triplet
            rows[source.query.id] = source
        for position in self._stream("human", len(self._human), step, self._batch_size - 2 * self._num_augmented):
            rows.setdefault(self._human[position].query.id, self._human[position])
        if len(rows) < self._batch_size:  # triplets coincided: fill up with others
            others = [triplet for triplet in self._human if triplet.query.id not in rows]
            short = min(self._batch_size - len(rows), len(others))
            rows |= {t.query.id: t for t in Random(f"{self._seed}/top up/{step}").sample(others, short)}
        return self._batch(list(rows.values()), Random(f"{self._seed}/negatives/{step}"))

    def _stream(self, name: str, size: int, step: int, count: int) -> list[int]:
        """Positions `step * count` onward of an endless run of seeded shuffles of `range(size)`."""
        out = []
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, size)
            out.append(self._shuffle(name, size, epoch)[offset])
        return out

    def _shuffle(self, name: str, size: int, epoch: int) -> Sequence[int]:
        key = (name, epoch)
        if key not in self._shuffles:
            order = list(range(size))
            Random(f"{self._seed}/{name}/{epoch}").shuffle(order)
            self._shuffles = {k: v for k, v in self._shuffles.items() if k[0] != name or k[1] == epoch - 1} | {
                key: order
            }
        return self._shuffles[key]

    def _batch(self, rows: Sequence[Triplet], random: Random) -> Batch:
        images = [row.target for row in rows]
        for row in rows:
            negatives = self._negatives.get(row.query.id, [])
            images += random.sample(negatives, min(self._num_negatives, len(negatives)))
        candidates = tuple(dict.fromkeys(images))
        place = {image: i for i, image in enumerate(candidates)}
        also_right = np.zeros((len(rows), len(candidates)), bool)
        for i, row in enumerate(rows):
            for image in self._right[row.query.reference, row.query.text]:
                if image in place and image != row.target:
                    also_right[i, place[image]] = True
        return Batch(tuple(r.query for r in rows), candidates, np.array([place[r.target] for r in rows]), also_right)


def known_positives(human: Sequence[Triplet]) -> Mapping[QueryId, frozenset[ImageId]]:
    """Targets of every triplet with the same reference and text, per query."""
    right: dict[tuple[ImageId, str], set[ImageId]] = defaultdict(set)
    for triplet in human:
        right[triplet.query.reference, triplet.query.text].add(triplet.target)
    return {t.query.id: frozenset(right[t.query.reference, t.query.text]) for t in human}
