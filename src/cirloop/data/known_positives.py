"""Images that are no negatives of a training query, and why.

Known right are the target and what a line names beside it, the targets of every query with the same
reference and text, and images for which the captioner wrote the query's text, for whichever query
those were mined; and, with `foundation.exclude_right`, what the catalogue says is right. Images
are the same where their contents are (equal bytes, whatever their names),
references too; texts are the same but for case, spaces, a full stop and Unicode form. A copy of the
reference is not right, but no negative either. All of it comes from training lines and from the
run's own artifacts: what an evaluation knows to be right never gets here.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Artifact
from cirloop.types import AugmentedTriplet, ImageId, Query, QueryId, TrainSplit, Triplet

LINE = "positives of the line"
TARGET = "copies of the target"
REFERENCE = "copies of the reference"
SAME_TEXT = "same text"
CONFIRMED = "confirmed by the captioner"
JUDGED = "right by the catalogue"
KINDS = (LINE, TARGET, REFERENCE, SAME_TEXT, CONFIRMED, JUDGED)
"""Why an image is left out, the first that fits."""
WRITTEN_AGAIN = "same as the original text"
SURER_KEPT = "a surer text was kept"
DUPLICATE = "duplicate"
ENOUGH = "enough for this query"
ENOUGH_IN_ALL = "enough for this iteration"
KNOWN_ALREADY = "ranked high enough already"
SAID_RIGHT = (WRITTEN_AGAIN, SURER_KEPT, DUPLICATE, ENOUGH, ENOUGH_IN_ALL, KNOWN_ALREADY)
"""The reasons of rejected captions that no check found wrong: what the captioner wrote is right for
the mined image."""

Confirmed = tuple[ImageId, str, ImageId]
"""A reference, a text that the captioner wrote, and the mined image for which it did."""
Key = tuple[str, str]


def normal_text(text: str) -> str:
    """Return the text without differences of case, spaces, Unicode form and a final full stop."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split()).rstrip(" .")


def _name(image: ImageId) -> str:
    return image


class KnownPositives:
    """Known positives by query. `content` gives what identifies an image's content, by default its
    name."""

    def __init__(
        self,
        triplets: Sequence[Triplet],
        augmented: Iterable[AugmentedTriplet] = (),
        positives: Mapping[QueryId, frozenset[ImageId]] | None = None,
        confirmed: Iterable[Confirmed] = (),
        content: Callable[[ImageId], str] = _name,
    ) -> None:
        self.content = content
        self._judge: Callable[[Query], Iterable[ImageId]] | None = None
        self._judged: dict[Key, frozenset[str]] = {}
        self._notes: dict[Key, list[tuple[QueryId | None, str, str]]] = defaultdict(list)
        """By reference and text: the query whose image it is (None: the captioner's), the kind of
        positive it is for that query, and its content."""
        queries = {triplet.query.id: triplet.query for triplet in triplets}
        for triplet in (*triplets, *(row.triplet for row in augmented)):
            self._note(triplet.query, TARGET, triplet.target)
        for name, images in (positives or {}).items():
            for image in sorted(images):
                self._note(queries[name], LINE, image)
        for reference, text, image in confirmed:
            self._notes[self._key(reference, text)].append((None, CONFIRMED, self.content(image)))

    @classmethod
    def of(
        cls,
        train: TrainSplit,
        augmented: Iterable[AugmentedTriplet] = (),
        confirmed: Iterable[Confirmed] = (),
    ) -> Self:
        """Collect the positives of a train split and of its captions so far; an image's content is
        its digest."""
        positives = cls(train.triplets, augmented, train.positives, confirmed, train.images.digest)
        judge = train.judge
        if judge is not None:
            positives._judge = lambda query: judge.right(
                query.reference, query.text, train.gallery.ids
            )
        return positives

    def right(self, query: Query) -> dict[str, str]:
        """Return the kind of positive by the content of each image that is right for a query."""
        kinds: dict[str, str] = {}
        for source, kind, content in self._notes[self._key(query.reference, query.text)]:
            if source not in (query.id, None):
                kind = SAME_TEXT
            kinds[content] = min(kind, kinds.get(content, kind), key=KINDS.index)
        for content in self._right_by_judge(query):
            kinds.setdefault(content, JUDGED)
        return kinds

    def _right_by_judge(self, query: Query) -> frozenset[str]:
        """Return the contents of the images that the judge calls right; once for equal queries."""
        key = self._key(query.reference, query.text)
        if self._judge is not None and key not in self._judged:
            self._judged[key] = frozenset(map(self.content, self._judge(query)))
        return self._judged.get(key, frozenset())

    def barred(self, query: Query) -> dict[str, str]:
        """Return `right` and the reference: all that may be no explicit negative of a query."""
        return {self.content(query.reference): REFERENCE} | self.right(query)

    def _note(self, query: Query, kind: str, image: ImageId) -> None:
        self._notes[self._key(query.reference, query.text)].append(
            (query.id, kind, self.content(image))
        )

    def _key(self, reference: ImageId, text: str) -> Key:
        return self.content(reference), normal_text(text)


def read_confirmed(artifact: Artifact) -> list[Confirmed]:
    """Read the texts that the captioner wrote for mined images and no check refused, without those
    of accepted triplets."""
    return [
        (r["reference"], r["text"], r["image"])
        for r in artifact.read()["rejected"]
        if r["reason"] in SAID_RIGHT
    ]


def known_positives(train: TrainSplit, samples: Sequence[Artifact]) -> KnownPositives:
    """Collect what is right by the training lines and by the augmented samples so far."""
    augmented = [row for artifact in samples for row in read_augmented(artifact)]
    confirmed = [row for artifact in samples for row in read_confirmed(artifact)]
    return KnownPositives.of(train, augmented, confirmed)
