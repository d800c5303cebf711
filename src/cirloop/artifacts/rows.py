"""Domain values as JSON rows of artifacts, and back."""

from __future__ import annotations

from cirloop.artifacts.store import Artifact
from cirloop.types import AugmentedTriplet, MinedAnchors, MinedNegative, Query, Triplet


def read_mined(artifact: Artifact) -> list[MinedNegative]:
    return [MinedNegative(**row) for row in artifact.read()["negatives"]]


def read_anchors(artifact: Artifact) -> MinedAnchors:
    """Read the self-made anchors of a round; none where it has none."""
    rows = artifact.read().get("anchors", {"queries": [], "pairs": []})
    return MinedAnchors(
        [Query(**row) for row in rows["queries"]], [MinedNegative(**row) for row in rows["pairs"]]
    )


def read_augmented(artifact: Artifact) -> list[AugmentedTriplet]:
    out = []
    content = artifact.read()
    for row in (*content["accepted"], *content.get("relabelled", ())):
        triplet = Triplet(Query(**row["triplet"]["query"]), row["triplet"]["target"])
        out.append(AugmentedTriplet(**(row | {"triplet": triplet})))
    return out
