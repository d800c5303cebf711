"""Self-made anchors of a round: references that no human wrote a text for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cirloop.backbones.similarity import mean_pool
from cirloop.data.known_positives import KnownPositives
from cirloop.negatives.anchors import draw_anchors
from cirloop.stages.context import RunContext
from cirloop.stages.models import Embedder
from cirloop.types import AugmentedTriplet, MinedNegative, Query, QueryId

logger = logging.getLogger(__name__)
STRATEGY = "anchor"
"""What mined rows of anchors have as their strategy."""


def mine_anchors(
    run: RunContext,
    backbone: Embedder,
    iteration: int,
    known: KnownPositives,
    augmented: Sequence[AugmentedTriplet],
) -> dict[str, Any]:
    """Return the round's anchors as JSON: `queries` with a human text as example, and `pairs`.

    An image is no anchor where it has the content of a reference of a human triplet or of an
    anchor with an accepted text.
    """
    train = run.data.train
    rng = np.random.default_rng([run.config.seed, iteration])
    gallery = mean_pool(run.gallery_embeddings(backbone, train))
    content = [known.content(image) for image in train.gallery.ids]
    triplets = (*train.triplets, *(row.triplet for row in augmented))
    references = {known.content(triplet.query.reference) for triplet in triplets}
    is_reference = [image_content in references for image_content in content]
    queries = list[Query]()
    pairs = list[MinedNegative]()
    for anchor in draw_anchors(run.config.mining.anchors, gallery, content, is_reference, rng):
        example = train.triplets[rng.integers(len(train.triplets))].query
        name = QueryId(f"anchor{iteration}.{len(queries)}")
        reference = train.gallery.ids[anchor.row]
        queries.append(Query(name, reference, example.text, example.category))
        for row, rank, score in zip(
            anchor.neighbors_N, anchor.ranks_N, anchor.scores_N, strict=True
        ):
            image = train.gallery.ids[row]
            score = round(float(score), 6)
            pairs.append(MinedNegative(name, image, int(rank), score, 0, 0.0, STRATEGY))
    if len(queries) < run.config.mining.anchors.num:
        logger.info(
            "anchors: %d of the %d of mining.anchors.num; no other image is without a text",
            len(queries),
            run.config.mining.anchors.num,
        )
    return {
        "queries": [asdict(query) for query in queries],
        "pairs": [asdict(pair) for pair in pairs],
    }
