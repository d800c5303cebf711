"""Domain values as JSON rows of artifacts, and back."""

from __future__ import annotations

from collections.abc import Sequence

from cirloop.artifacts.store import Artifact
from cirloop.data.known_positives import SAID_RIGHT, Confirmed, KnownPositives
from cirloop.types import AugmentedTriplet, MinedNegative, Query, TrainSplit, Triplet


def read_mined(artifact: Artifact) -> list[MinedNegative]:
    return [MinedNegative(**row) for row in artifact.read()["negatives"]]


def read_augmented(artifact: Artifact) -> list[AugmentedTriplet]:
    out = []
    for row in artifact.read()["accepted"]:
        triplet = Triplet(Query(**row["triplet"]["query"]), row["triplet"]["target"])
        out.append(AugmentedTriplet(**(row | {"triplet": triplet})))
    return out


def read_confirmed(artifact: Artifact) -> list[Confirmed]:
    """Texts that the captioner wrote for mined images and no check found wrong, but for those of accepted triplets."""
    return [(r["reference"], r["text"], r["image"]) for r in artifact.read()["rejected"] if r["reason"] in SAID_RIGHT]


def known_positives(train: TrainSplit, samples: Sequence[Artifact]) -> KnownPositives:
    """What is right by the training lines and by the augmented samples so far."""
    augmented = [row for each in samples for row in read_augmented(each)]
    confirmed = [pair for each in samples for pair in read_confirmed(each)]
    return KnownPositives.of(train, augmented, confirmed)
