"""Gallery rows that are no negatives of a query: right answers, copies of target and reference."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from cirloop.data.known_positives import KINDS, REFERENCE, TARGET, KnownPositives
from cirloop.types import AugmentedTriplet, ImageId, TrainSplit

SPELLING = "other spellings of target or reference"
"""Of the copies, those whose names differ in spelling alone, as `./a.png` and `a.png`."""
EXCLUSION_KINDS = (*KINDS, SPELLING)


def barred_rows(
    train: TrainSplit, known: KnownPositives
) -> tuple[list[frozenset[int]], dict[str, int]]:
    """Return per query the gallery rows that are no negative of it, the target among them, and
    counts by kind.

    Counted are pairs of a query and an image other than its target and reference, each once,
    whether or not a strategy would have chosen it. The reference itself is left to
    `mining.rank_reference`.
    """
    gallery = train.gallery
    out = []
    rows = gallery.rows()
    counts = Counter[str]()
    of_content: dict[str, list[int]] = defaultdict(list)
    for row, image in enumerate(gallery.ids):
        of_content[known.content(image)].append(row)
    for triplet in train.triplets:
        target = rows[triplet.target]
        reference = rows[triplet.query.reference]
        spelled = {_spelling(triplet.target), _spelling(triplet.query.reference)}
        barred = {target}
        for content, kind in known.barred(triplet.query).items():
            equal = {*of_content[content]}
            other_rows = equal - {target, reference}
            copies = kind in (TARGET, REFERENCE)
            counts.update(
                SPELLING if copies and _spelling(gallery.ids[row]) in spelled else kind
                for row in other_rows
            )
            barred |= other_rows if kind == REFERENCE else equal
        out.append(frozenset(barred))
    return out, {kind: counts[kind] for kind in EXCLUSION_KINDS}


def captioned_rows(
    train: TrainSplit, known: KnownPositives, augmented: Sequence[AugmentedTriplet]
) -> list[frozenset[int]]:
    """Return per query the gallery rows for which there is an accepted text from its reference."""
    captioned: dict[str, set[str]] = defaultdict(set)
    for row in augmented:
        reference = known.content(row.triplet.query.reference)
        captioned[reference].add(known.content(row.triplet.target))
    of_content: dict[str, set[int]] = defaultdict(set)
    for row_number, image in enumerate(train.gallery.ids):
        of_content[known.content(image)].add(row_number)
    barred = []
    for triplet in train.triplets:
        contents = captioned[known.content(triplet.query.reference)]
        barred.append(frozenset().union(*(of_content[content] for content in contents)))
    return barred


def _spelling(image: ImageId) -> str:
    """Normalise a name: without `./`, `//` and the like, in Unicode's composed form."""
    return posixpath.normpath(unicodedata.normalize("NFC", image))
