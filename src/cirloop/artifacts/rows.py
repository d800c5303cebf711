"""Domain values as JSON rows of artifacts, and back."""

from __future__ import annotations

from cirloop.artifacts.store import Artifact
from cirloop.types import AugmentedTriplet, MinedNegative, Query, Triplet


def read_mined(artifact: Artifact) -> list[MinedNegative]:
    return [MinedNegative(**row) for row in artifact.read()["negatives"]]


def read_augmented(artifact: Artifact) -> list[AugmentedTriplet]:
    out = []
    for row in artifact.read()["accepted"]:
        triplet = Triplet(Query(**row["triplet"]["query"]), row["triplet"]["target"])
        out.append(AugmentedTriplet(**(row | {"triplet": triplet})))
    return out
