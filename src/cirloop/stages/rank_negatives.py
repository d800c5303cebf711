"""Explicit negatives from a window of ranks, for human and augmented queries alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Artifact
from cirloop.data.known_positives import known_positives
from cirloop.negatives.base import MiningContext
from cirloop.retrieval.arrays import Floats, Rows
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.topk import topk
from cirloop.stages.context import RunContext
from cirloop.training.config import RankedNegatives
from cirloop.types import MinedNegative, Triplet

STRATEGY = "rank window"


def rank_negatives(
    run: RunContext, iteration: int, checkpoint: Artifact, augmented: Sequence[Artifact]
) -> Artifact | None:
    """Write ranked_negatives_iter_{t}.json: images from the window of ranks of
    `training.negatives`, by M_{t-1}; None where that asks for mined images.

    Ranks count from 1 among the images that may be negatives: the target, known positives, the
    reference and copies of them have none.
    """
    train = run.data.train
    window = run.config.training.negatives
    if not isinstance(window, RankedNegatives):
        return None

    def draw(
        triplet: Triplet, rows_K: Rows, scores_K: Floats, rng: np.random.Generator
    ) -> list[MinedNegative]:
        """Draw images of a query's window, best-ranked first."""
        positions = np.flatnonzero(rows_K >= 0)[window.first_rank - 1 :]
        chosen = np.sort(rng.choice(positions, min(window.num, len(positions)), replace=False))
        name = triplet.query.id
        drawn = []
        for position in chosen:
            image = train.gallery.ids[rows_K[position]]
            score = round(float(scores_K[position]), 6)
            drawn.append(MinedNegative(name, image, int(position) + 1, score, 0, 0.0, STRATEGY))
        return drawn

    def build(path: Path) -> None:
        texts = [row.triplet for artifact in augmented for row in read_augmented(artifact)]
        triplets = [*train.triplets, *(texts if window.rows == "all" else [])]
        known = known_positives(train, augmented)
        backbone = run.embedder(checkpoint)
        vectors = run.embed_cached(
            backbone,
            query_items([triplet.query for triplet in triplets]),
            train,
            f"embed {train.name} queries and texts",
        )
        gallery = run.gallery_embeddings(backbone, train)
        rows_of: dict[str, list[int]] = {}
        for row, image in enumerate(train.gallery.ids):
            rows_of.setdefault(known.content(image), []).append(row)
        barred = [
            [row for content in known.barred(triplet.query) for row in rows_of.get(content, ())]
            for triplet in triplets
        ]
        excluded_QE = np.full((len(triplets), max(map(len, barred))), -1, np.int64)
        for q, rows in enumerate(barred):
            excluded_QE[q, : len(rows)] = rows
        last = len(train.gallery.ids) if window.last_rank is None else window.last_rank
        rows_QK, scores_QK = topk(vectors, gallery, last, excluded=excluded_QE)
        context = MiningContext(
            run.config.seed + iteration, query_ids=[triplet.query.id for triplet in triplets]
        )
        negatives = [
            asdict(row)
            for q, triplet in enumerate(triplets)
            for row in draw(triplet, rows_QK[q], scores_QK[q], context.rng(q))
        ]
        content = {
            "schema": 1,
            "iteration": iteration,
            "window": window.model_dump(mode="json"),
            "summary": {"queries": len(triplets), "images": len(negatives)},
            "negatives": negatives,
        }
        write_json(path, run.mark | content)

    settings = run.stage_config("model", "data")
    settings["negatives"] = window.model_dump(mode="json")
    inputs = [checkpoint.digest, run.data.digest, *(each.digest for each in augmented)]
    name = f"ranked_negatives_iter_{iteration}.json"
    return run.build(name, settings, inputs, build, iteration)
