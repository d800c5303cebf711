"""Which rows make which batch: a function of the seed and the step alone, so that a resumed run
sees the same.

A batch holds augmented triplets together with the human triplets they came from (ReCALL's best
setting), filled up with human triplets from one seeded shuffle per epoch. Its candidates are the
targets and the mined negatives, each image once.

A query's own negatives, for losses of pairs, are the targets of its augmented triplets in the
batch, which are the mined images that those were written for (ReCALL's I_h), and `num_negatives` of
its mined images; where it has neither, `num_negatives` random targets of other queries. No image
that is known to be right for a query is its own negative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from cirloop.data.known_positives import REFERENCE, KnownPositives
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet


@dataclass(frozen=True, slots=True)
class Batch:
    """`target_B[i]` is the row in `candidates` of query i's target; `also_right_BN` other
    candidates known right; `own_BK` the rows of each query's own negatives, -1 where it has fewer.
    """

    queries: tuple[Query, ...]
    candidates: tuple[ImageId, ...]
    target_B: npt.NDArray[np.int64]
    also_right_BN: npt.NDArray[np.bool_]
    own_BK: npt.NDArray[np.int64]


class Batches:
    """The batches of one training stage."""

    def __init__(
        self,
        human: Sequence[Triplet],
        augmented: Sequence[AugmentedTriplet],
        mined: Sequence[MinedNegative],
        batch_size: int,
        augmented_fraction: float,
        num_negatives: int,
        seed: int,
        unique_targets: bool = True,
        groups: Mapping[QueryId, str] | None = None,
        known: KnownPositives | None = None,
    ) -> None:
        """`groups` names the group of each human query; a batch's human triplets then come from one
        or few of them. `known` says what is right for a query, by default the targets of the
        triplets alone."""
        if not human:
            raise ValueError("no human triplets to train on")
        self._human, self._augmented = list(human), list(augmented)
        self._by_id = {t.query.id: t for t in human}
        self._num_augmented = int(batch_size * augmented_fraction) if augmented else 0
        self._batch_size, self._num_negatives, self._seed = batch_size, num_negatives, seed
        self._unique, self._groups = unique_targets, groups
        self._shuffles: dict[tuple[str, int], list[int]] = {}
        self._source = {pair.triplet.query.id: pair.source for pair in augmented}
        self._known = known or KnownPositives(human, augmented)
        self._negatives: dict[QueryId, list[ImageId]] = defaultdict(list)
        self.num_right = 0
        """Mined images that are no negatives, since they are known to be right or copies of the
        reference."""
        for negative in mined:
            query = self._by_id[negative.query].query
            kind = self._known.barred(query).get(self._known.content(negative.image))
            asked_for = (
                kind == REFERENCE and negative.image == query.reference
            )  # by `mining.rank_reference`
            if kind is not None and not asked_for:
                self.num_right += 1
            else:
                self._negatives[negative.query].append(negative.image)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, from 0."""
        rows: dict[QueryId, Triplet] = {}
        for position in self._stream("augmented", len(self._augmented), step, self._num_augmented):
            pair = self._augmented[position]
            self._add(rows, pair.triplet, self._by_id[pair.source])
        for position in self._stream(
            "human", len(self._human), step, self._batch_size - 2 * self._num_augmented
        ):
            self._add(rows, self._human[position])
        if len(rows) < self._batch_size:  # triplets coincided: fill up with others
            others = [triplet for triplet in self._human if triplet.query.id not in rows]
            Random(f"{self._seed}/top up/{step}").shuffle(others)
            for triplet in others:
                if len(rows) == self._batch_size:
                    break
                self._add(rows, triplet)
        return self._batch(list(rows.values()), step)

    def _add(self, rows: dict[QueryId, Triplet], *together: Triplet) -> None:
        """Put triplets into a batch, all or none: none where a target is another row's already."""
        new = [triplet for triplet in together if triplet.query.id not in rows]
        targets = [row.target for row in (*rows.values(), *new)]
        if not self._unique or len({*targets}) == len(targets):
            rows |= {triplet.query.id: triplet for triplet in new}

    def _stream(self, name: str, size: int, step: int, count: int) -> list[int]:
        """Positions `step * count` onward of an endless run of seeded shuffles of `range(size)`."""
        out = []
        grouped = name == "human" and self._groups is not None
        length = (
            size // count * count if grouped and 0 < count <= size else size
        )  # else batches straddle two groups
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, length)
            out.append(self._shuffle(name, size, epoch, count if grouped else 0)[offset])
        return out

    def _shuffle(self, name: str, size: int, epoch: int, piece: int) -> Sequence[int]:
        """An order of `range(size)`; with a `piece`, groups stay together in pieces of that many,
        and pieces mixed."""
        key = (name, epoch)
        if key not in self._shuffles:
            order, random = list(range(size)), Random(f"{self._seed}/{name}/{epoch}")
            random.shuffle(order)
            if piece and self._groups is not None:
                of = [self._groups[triplet.query.id] for triplet in self._human]
                first = {of[position]: place for place, position in reversed([*enumerate(order)])}
                order.sort(key=lambda position: first[of[position]])
                whole = [order[i : i + piece] for i in range(0, size // piece * piece, piece)]
                random.shuffle(whole)
                order = [position for each in whole for position in each] + order[
                    size // piece * piece :
                ]
            self._shuffles = {
                k: v for k, v in self._shuffles.items() if k[0] != name or k[1] == epoch - 1
            } | {key: order}
        return self._shuffles[key]

    def _batch(self, rows: Sequence[Triplet], step: int) -> Batch:
        random = Random(f"{self._seed}/negatives/{step}")
        mined: list[list[ImageId]] = []
        for row in rows:
            negatives = self._negatives.get(row.query.id, [])
            mined.append(random.sample(negatives, min(self._num_negatives, len(negatives))))
        images = [row.target for row in rows] + [image for each in mined for image in each]
        candidates = tuple(dict.fromkeys(images))
        place = {image: i for i, image in enumerate(candidates)}
        own = self._own(rows, mined, step)
        own_BK = np.full((len(rows), max(1, *map(len, own))), -1, np.int64)
        for i, negatives in enumerate(own):
            own_BK[i, : len(negatives)] = [place[image] for image in negatives]
        targets = np.array([place[r.target] for r in rows])
        also_right_BN = self._also_right(rows, candidates)
        also_right_BN[np.arange(len(rows)), targets] = False
        return Batch(tuple(r.query for r in rows), candidates, targets, also_right_BN, own_BK)

    def _own(
        self, rows: Sequence[Triplet], mined: Sequence[Sequence[ImageId]], step: int
    ) -> list[list[ImageId]]:
        """Each query's own negatives: of its augmented triplets, of its mined images, or else of
        other queries."""
        random, out = Random(f"{self._seed}/others/{step}"), []
        rewritten: dict[QueryId, list[ImageId]] = defaultdict(list)
        for row in rows:
            if row.query.id in self._source:
                rewritten[self._source[row.query.id]].append(row.target)
        for row, drawn in zip(rows, mined, strict=True):
            barred = self._known.barred(row.query)
            of_pairs = [
                image
                for image in rewritten[row.query.id]
                if self._known.content(image) not in barred
            ]
            negatives = list(dict.fromkeys([*of_pairs, *drawn]))
            if not negatives:
                others = dict.fromkeys(
                    r.target for r in rows if self._known.content(r.target) not in barred
                )
                negatives = random.sample(list(others), min(self._num_negatives, len(others)))
            out.append(negatives)
        return out

    def _also_right(
        self, rows: Sequence[Triplet], candidates: Sequence[ImageId]
    ) -> npt.NDArray[np.bool_]:
        """(B, N): which candidates are known to be right for a query, the targets among them."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, image in enumerate(candidates):
            places[self._known.content(image)].append(place)
        right_BN = np.zeros((len(rows), len(candidates)), bool)
        for i, row in enumerate(rows):
            for content in self._known.right(row.query):
                right_BN[i, places[content]] = True
        return right_BN
