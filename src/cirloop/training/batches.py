"""Training batches: a function of the seed and the step alone, so that a resumed run sees the same.

A batch holds augmented triplets together with the human triplets they came from (ReCALL's best
setting), or whole bundles of them (`bundles.py`), filled up with human triplets from one seeded
shuffle per epoch. Its candidates are the targets and the explicit negatives, each image once.

A query's hard negatives, for losses of pairs, are the targets of its augmented triplets in the
batch, which are the mined images that those were written for (ReCALL's I_h), and `num_negatives` of
its mined images; where it has neither, `num_negatives` random targets of other queries. No image
that is known to be right for a query is its hard negative.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import numpy as np
import numpy.typing as npt

from cirloop.data.known_positives import REFERENCE, KnownPositives
from cirloop.training.bundles import BundleOrder
from cirloop.training.config import BundleSettings
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet

HUMAN = "human"
"""The origin of triplets that no foundation model wrote."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries and candidates of a step.

    `target_B[i]` is the row in `candidates` of query i's target. `known_positive_BN` marks other
    candidates that are known to be right. `hard_negatives_BK` are rows of each query's hard
    negatives, -1 where it has fewer than K.
    """

    queries: tuple[Query, ...]
    candidates: tuple[ImageId, ...]
    target_B: npt.NDArray[np.int64]
    known_positive_BN: npt.NDArray[np.bool_]
    hard_negatives_BK: npt.NDArray[np.int64]


class BatchSampler:
    """The batches of one training stage, by step."""

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
        bundles: BundleSettings | None = None,
    ) -> None:
        """With `groups`, by human query, a batch's human triplets come from one or few groups.

        `known` says what is right for a query; by default only the targets of the triplets are.
        `bundles` of a size other than 0 take the place of `augmented_fraction`.
        """
        if not human:
            raise ValueError("no human triplets to train on")
        self._human = list(human)
        self._augmented = list(augmented)
        self._by_id = {triplet.query.id: triplet for triplet in human}
        self._batch_size = batch_size
        self._num_augmented = int(batch_size * augmented_fraction) if augmented else 0
        self._num_human = batch_size - 2 * self._num_augmented
        self._bundles: BundleOrder | None = None
        if bundles is not None and bundles.size and augmented:
            self._num_augmented = 0
            self._num_human = int(batch_size * bundles.plain_fraction)
            num_rows = batch_size - self._num_human
            self._bundles = BundleOrder(human, augmented, bundles.size, num_rows, seed)
        self._num_negatives = num_negatives
        self._seed = seed
        self._unique_targets = unique_targets
        self._groups = groups
        self._shuffles: dict[tuple[str, int], list[int]] = {}
        self._source_of = {row.triplet.query.id: row.source for row in augmented}
        self._origin_of = {row.triplet.query.id: str(row.iteration) for row in augmented}
        self._known = known or KnownPositives(human, augmented)
        self._queries = {t.query.id: t.query for t in (*human, *(a.triplet for a in augmented))}
        self._negatives: dict[QueryId, list[ImageId]] = defaultdict(list)
        self.num_known_positives = 0
        """Mined images that are no negatives: known to be right, or copies of the reference."""
        for negative in mined:
            if self._is_known_positive(negative):
                self.num_known_positives += 1
            else:
                self._negatives[negative.query].append(negative.image)

    def _is_known_positive(self, negative: MinedNegative) -> bool:
        """Return whether a mined image is known to be right for its query, or is barred as a copy.

        The reference itself is a negative: `mining.rank_reference` asks for it.
        """
        query = self._queries[negative.query]
        kind = self._known.barred(query).get(self._known.content(negative.image))
        is_reference = kind == REFERENCE and negative.image == query.reference
        return kind is not None and not is_reference

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of `step`, from 0."""
        return self._batch(self._triplets(step), step)

    def drawn(self, steps: int) -> dict[str, dict[str, int]]:
        """Count the triplets that `steps` train on, and how often in all (`rows`), by origin:
        `human`, or the iteration whose texts they are."""
        counts: dict[str, Counter[QueryId]] = defaultdict(Counter)
        for step in range(steps):
            for triplet in self._triplets(step):
                query = triplet.query.id
                counts[self._origin_of.get(query, HUMAN)][query] += 1
        return {
            origin: {"triplets": len(counter), "rows": counter.total()}
            for origin, counter in sorted(counts.items())
        }

    def _triplets(self, step: int) -> list[Triplet]:
        """Return the triplets of `step`."""
        rows: dict[QueryId, Triplet] = {}
        for bundle in self._bundles[step] if self._bundles else ():
            for triplet in bundle:
                self._add(rows, triplet)
        for position in self._augmented_positions(step):
            augmented = self._augmented[position]
            source = self._by_id.get(augmented.source)  # a self-made anchor has no human triplet
            self._add(rows, augmented.triplet, *([] if source is None else [source]))
        for position in self._human_positions(step):
            self._add(rows, self._human[position])
        if len(rows) < self._batch_size:  # triplets coincided
            self._fill_up(rows, step)
        return list(rows.values())

    def _fill_up(self, rows: dict[QueryId, Triplet], step: int) -> None:
        """Add other human triplets until the batch is full, or none is left."""
        triplets = [triplet for triplet in self._human if triplet.query.id not in rows]
        Random(f"{self._seed}/top up/{step}").shuffle(triplets)
        for triplet in triplets:
            if len(rows) == self._batch_size:
                break
            self._add(rows, triplet)

    def _add(self, rows: dict[QueryId, Triplet], *triplets: Triplet) -> None:
        """Add triplets to a batch, all or none: none where a target is another row's already."""
        new = [triplet for triplet in triplets if triplet.query.id not in rows]
        targets = [row.target for row in (*rows.values(), *new)]
        if not self._unique_targets or len({*targets}) == len(targets):
            rows |= {triplet.query.id: triplet for triplet in new}

    def _augmented_positions(self, step: int) -> list[int]:
        count = self._num_augmented
        size = len(self._augmented)
        return self._shuffled_positions("augmented", size, size, step, count)

    def _human_positions(self, step: int) -> list[int]:
        """Return the positions of human triplets; with groups, of whole groups where possible."""
        count = self._num_human
        size = len(self._human)
        if self._groups is None:
            return self._shuffled_positions("human", size, size, step, count)
        # An epoch of whole batches: otherwise later batches would straddle two groups.
        epoch_size = size // count * count if 0 < count <= size else size
        return self._shuffled_positions("human", size, epoch_size, step, count, block=count)

    def _shuffled_positions(
        self, name: str, size: int, epoch_size: int, step: int, count: int, block: int = 0
    ) -> list[int]:
        """Return a step's `count` positions in an endless run of seeded shuffles of `range(size)`.

        An epoch takes the first `epoch_size` positions of a shuffle.
        """
        positions = []
        for index in range(step * count, (step + 1) * count):
            epoch, offset = divmod(index, epoch_size)
            positions.append(self._shuffle(name, size, epoch, block)[offset])
        return positions

    def _shuffle(self, name: str, size: int, epoch: int, block: int) -> Sequence[int]:
        """Return an order of `range(size)`; with a `block` size, groups stay together in blocks.

        The shuffles of this epoch and the one before are kept.
        """
        if (name, epoch) not in self._shuffles:
            order = list(range(size))
            random = Random(f"{self._seed}/{name}/{epoch}")
            random.shuffle(order)
            if block and self._groups is not None:
                group_of = [self._groups[triplet.query.id] for triplet in self._human]
                order = _grouped(order, group_of, block, random)
            kept = {
                key: shuffle
                for key, shuffle in self._shuffles.items()
                if key[0] != name or key[1] == epoch - 1
            }
            self._shuffles = kept | {(name, epoch): order}
        return self._shuffles[name, epoch]

    def _batch(self, rows: Sequence[Triplet], step: int) -> Batch:
        random = Random(f"{self._seed}/negatives/{step}")
        mined: list[list[ImageId]] = []
        for row in rows:
            negatives = self._negatives.get(row.query.id, [])
            mined.append(random.sample(negatives, min(self._num_negatives, len(negatives))))
        targets = [row.target for row in rows]
        candidates = tuple(dict.fromkeys([*targets, *chain.from_iterable(mined)]))
        row_of = {image: row for row, image in enumerate(candidates)}
        hard_negatives = self._hard_negatives(rows, mined, step)
        num_columns = max(1, *map(len, hard_negatives))
        hard_negatives_BK = np.full((len(rows), num_columns), -1, np.int64)
        for i, negatives in enumerate(hard_negatives):
            hard_negatives_BK[i, : len(negatives)] = [row_of[image] for image in negatives]
        target_B = np.array([row_of[target] for target in targets])
        known_positive_BN = self._known_positive(rows, candidates)
        known_positive_BN[np.arange(len(rows)), target_B] = False
        queries = tuple(row.query for row in rows)
        return Batch(queries, candidates, target_B, known_positive_BN, hard_negatives_BK)

    def _hard_negatives(
        self, rows: Sequence[Triplet], mined: Sequence[Sequence[ImageId]], step: int
    ) -> list[list[ImageId]]:
        """Return each query's hard negatives: rewritten images, mined ones, or else random ones."""
        random = Random(f"{self._seed}/others/{step}")
        rewritten: dict[QueryId, list[ImageId]] = defaultdict(list)
        for row in rows:
            if row.query.id in self._source_of:
                rewritten[self._source_of[row.query.id]].append(row.target)
        hard_negatives = []
        for row, sampled in zip(rows, mined, strict=True):
            images = self._not_barred(row.query, rewritten[row.query.id])
            negatives = list(dict.fromkeys([*images, *sampled]))
            if not negatives:
                negatives = self._random_negatives(row.query, rows, random)
            hard_negatives.append(negatives)
        return hard_negatives

    def _random_negatives(
        self, query: Query, rows: Sequence[Triplet], random: Random
    ) -> list[ImageId]:
        """Sample targets of other queries of the batch."""
        targets = self._not_barred(query, [row.target for row in rows])
        candidates = list(dict.fromkeys(targets))
        return random.sample(candidates, min(self._num_negatives, len(candidates)))

    def _not_barred(self, query: Query, images: Sequence[ImageId]) -> list[ImageId]:
        """Return the images that may be negatives of `query`."""
        barred = self._known.barred(query)
        return [image for image in images if self._known.content(image) not in barred]

    def _known_positive(
        self, rows: Sequence[Triplet], candidates: Sequence[ImageId]
    ) -> npt.NDArray[np.bool_]:
        """Mark (B, N) the candidates that are known to be right, the targets among them."""
        columns_of: dict[str, list[int]] = defaultdict(list)
        for column, image in enumerate(candidates):
            columns_of[self._known.content(image)].append(column)
        known_positive_BN = np.zeros((len(rows), len(candidates)), bool)
        for i, row in enumerate(rows):
            for content in self._known.right(row.query):
                known_positive_BN[i, columns_of[content]] = True
        return known_positive_BN


def _grouped(order: list[int], group_of: Sequence[str], block: int, random: Random) -> list[int]:
    """Sort a shuffled order by group, and shuffle its blocks of `block` positions.

    Groups follow in the order of their first positions. What is left after the last whole block
    stays at the end.
    """
    first = {group_of[position]: i for i, position in reversed([*enumerate(order)])}
    by_group = sorted(order, key=lambda position: first[group_of[position]])
    end = len(order) // block * block
    blocks = [by_group[i : i + block] for i in range(0, end, block)]
    random.shuffle(blocks)
    return [*chain.from_iterable(blocks), *by_group[end:]]
