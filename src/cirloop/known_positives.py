"""Which images are no negative of a training query, and why.

Known right are the target and what a line names beside it, the targets of every query with the same reference and text,
and images for which the captioner wrote the query's own text again. Images are the same where their contents are (equal
bytes, whatever their names), references too; texts are the same but for case, spaces, a full stop and Unicode form. A
copy of the reference is not right, but no negative either. All of it comes from training lines and from the run's own
artifacts: what an evaluation knows to be right never gets here.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from cirloop.types import AugmentedTriplet, ImageId, Query, QueryId, TrainSplit, Triplet

LINE = "positives of the line"
TARGET = "copies of the target"
REFERENCE = "copies of the reference"
SAME_TEXT = "same text"
CONFIRMED = "confirmed by the captioner"
KINDS = (LINE, TARGET, REFERENCE, SAME_TEXT, CONFIRMED)
"""Why an image is left out, the first that fits."""
WRITTEN_AGAIN = "same as the original text"
"""The reason of a rejected caption that says that the mined image is what its query asked for."""

Confirmed = tuple[QueryId, ImageId]
"""A query and a mined image for which the captioner wrote the query's text again."""
Key = tuple[str, str]


def normal_text(text: str) -> str:
    """The text without differences of case, of spaces, of Unicode form and of a full stop at its end."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split()).rstrip(" .")


def _name(image: ImageId) -> str:
    return image


class KnownPositives:
    """Known positives by query. `content` gives what identifies an image's content, by default its name."""

    def __init__(
        self,
        triplets: Sequence[Triplet],
        augmented: Iterable[AugmentedTriplet] = (),
        positives: Mapping[QueryId, frozenset[ImageId]] | None = None,
        confirmed: Iterable[Confirmed] = (),
        content: Callable[[ImageId], str] = _name,
    ) -> None:
        self.content = content
        self._notes: dict[Key, list[tuple[QueryId, str, str]]] = defaultdict(list)
        """By reference and text: whose image it is, the kind it is for that query, and its content."""
        queries = {triplet.query.id: triplet.query for triplet in triplets}
        for triplet in (*triplets, *(each.triplet for each in augmented)):
            self._note(triplet.query, TARGET, triplet.target)
        for name, images in (positives or {}).items():
            for image in sorted(images):
                self._note(queries[name], LINE, image)
        for name, image in confirmed:
            self._note(queries[name], CONFIRMED, image)

    @classmethod
    def of(
        cls, train: TrainSplit, augmented: Iterable[AugmentedTriplet] = (), confirmed: Iterable[Confirmed] = ()
    ) -> Self:
        """What a train split knows, and what was written for it so far; contents are digests of the pictures."""
        return cls(train.triplets, augmented, train.positives, confirmed, train.images.digest)

    def right(self, query: Query) -> dict[str, str]:
        """Contents of the images that are right for a query -> the kind that each is."""
        kinds: dict[str, str] = {}
        for source, kind, content in self._notes[self._key(query)]:
            if source != query.id and kind != CONFIRMED:
                kind = SAME_TEXT
            kinds[content] = min(kind, kinds.get(content, kind), key=KINDS.index)
        return kinds

    def barred(self, query: Query) -> dict[str, str]:
        """The same and the content of the reference: what may be no explicit negative of a query."""
        return {self.content(query.reference): REFERENCE} | self.right(query)

    def _note(self, query: Query, kind: str, image: ImageId) -> None:
        self._notes[self._key(query)].append((query.id, kind, self.content(image)))

    def _key(self, query: Query) -> Key:
        return self.content(query.reference), normal_text(query.text)
