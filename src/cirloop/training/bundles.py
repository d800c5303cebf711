"""Bundles: a human triplet with the texts written from it in all rounds, or an anchor's texts.

The images of one reference, each with its own text, are then in one batch, where each is the
others' negative. An epoch of a seeded shuffle holds every bundle once; a bundle with more texts
than it has room for takes random ones of them each time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from cirloop.types import AugmentedTriplet, QueryId, Triplet


class BundleOrder:
    """The triplets of bundles that each step trains on: a function of the seed and the step."""

    def __init__(
        self,
        human: Sequence[Triplet],
        augmented: Sequence[AugmentedTriplet],
        size: int,
        num_rows: int,
        seed: int,
    ) -> None:
        """`size` is the most triplets of a bundle, `num_rows` those of a step."""
        root_of: Mapping[QueryId, Triplet] = {triplet.query.id: triplet for triplet in human}
        texts: dict[QueryId, list[Triplet]] = defaultdict(list)
        for row in augmented:
            texts[row.source].append(row.triplet)
        self._bundles = [
            ([root_of[source]] if source in root_of else [], written)
            for source, written in texts.items()
        ]
        self._size = size
        self._num_rows = num_rows
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        self._first_of_step = [0]
        """Position of each step's first bundle in the run of shuffles."""

    def __getitem__(self, step: int) -> list[list[Triplet]]:
        """Return the bundles of `step`, from 0, `num_rows` triplets or less in all."""
        if not self._bundles:
            return []
        while len(self._first_of_step) <= step + 1:
            self._first_of_step.append(self._end(self._first_of_step[-1]))
        rows_left = self._num_rows
        bundles = []
        for position in range(self._first_of_step[step], self._first_of_step[step + 1]):
            bundle = self._drawn(position)[:rows_left]
            rows_left -= len(bundle)
            bundles.append(bundle)
        return bundles

    def _end(self, position: int) -> int:
        """Return the position after the bundles of a step that begins at `position`."""
        num_rows = 0
        begin = position
        while num_rows < self._num_rows and position - begin < len(self._bundles):
            num_rows += len(self._drawn(position))
            position += 1
        return position

    def _drawn(self, position: int) -> list[Triplet]:
        """Return the triplets of the bundle at a position in the run of shuffles."""
        epoch, offset = divmod(position, len(self._bundles))
        root, texts = self._bundles[self._order(epoch)[offset]]
        room = min(self._size - len(root), len(texts))
        return root + Random(f"{self._seed}/bundle/{position}").sample(texts, room)

    def _order(self, epoch: int) -> list[int]:
        """Return an epoch's shuffle of the bundles."""
        if epoch not in self._orders:
            order = list(range(len(self._bundles)))
            Random(f"{self._seed}/bundles/{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]
