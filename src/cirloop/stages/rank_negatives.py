"""Explicit negatives from a window of ranks, for human and augmented queries alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Artifact
from cirloop.data.known_positives import KnownPositives, known_positives
from cirloop.negatives.base import MiningContext
from cirloop.retrieval.arrays import Floats, Rows
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.topk import topk
from cirloop.stages.context import RunContext
from cirloop.training.config import RankedNegatives
from cirloop.types import ImageId, MinedNegative, Triplet

STRATEGY = "rank window"


def rank_negatives(
    run: RunContext, iteration: int, checkpoint: Artifact, augmented: Sequence[Artifact]
) -> Artifact | None:
    """Write ranked_negatives_iter_{t}.json: images from the window of ranks of
    `training.negatives`, by M_{t-1}; None where that asks for mined images.

    Ranks count from 1 among the images that may be negatives: the target, known positives, the
    reference and copies of them have none.
    """
    window = run.config.training.negatives
    if not isinstance(window, RankedNegatives):
        return None

    def build(path: Path) -> None:
        texts = [row.triplet for artifact in augmented for row in read_augmented(artifact)]
        parts = [run.data.train.triplets, texts if window.rows == "all" else []]
        triplets = [triplet for part in parts for triplet in part]
        positives = known_positives(run.data.train, augmented)
        rows_QK, scores_QK = _rank_gallery(run, window, checkpoint, parts, positives)
        context = MiningContext(
            run.config.seed + iteration, query_ids=[triplet.query.id for triplet in triplets]
        )
        gallery_ids = run.data.train.gallery.ids
        negatives = [
            MinedNegative(
                triplet.query.id,
                gallery_ids[rows_QK[q, k]],
                int(k) + 1,
                round(float(scores_QK[q, k]), 6),
                0,
                0.0,
                STRATEGY,
            )
            for q, triplet in enumerate(triplets)
            for k in _draw(window, rows_QK[q], context.rng(q))
        ]
        content = {
            "schema": 1,
            "iteration": iteration,
            "window": window.model_dump(mode="json"),
            "summary": {"queries": len(triplets), "images": len(negatives)},
            "negatives": [asdict(negative) for negative in negatives],
        }
        write_json(path, run.mark | content)

    settings = run.stage_config("model", "data")
    settings["negatives"] = window.model_dump(mode="json")
    inputs = [checkpoint.digest, run.data.digest, *(artifact.digest for artifact in augmented)]
    name = f"ranked_negatives_iter_{iteration}.json"
    return run.build(name, settings, inputs, build, iteration)


def _rank_gallery(
    run: RunContext,
    window: RankedNegatives,
    checkpoint: Artifact,
    parts: Sequence[Sequence[Triplet]],
    positives: KnownPositives,
) -> tuple[Rows, Floats]:
    """Return rows and scores (Q, K) of each query's best images that may be negatives, down to the
    window's last rank. `parts` are the human triplets, as mining embeds them, and the others."""
    train = run.data.train
    backbone = run.embedder(checkpoint)
    gallery = run.gallery_embeddings(backbone, train)
    last = len(train.gallery.ids) if window.last_rank is None else window.last_rank
    ranked = []
    for triplets, name in zip(parts, ("queries", "texts"), strict=True):
        if not triplets:
            continue
        items = query_items([triplet.query for triplet in triplets])
        vectors = run.embed_cached(backbone, items, train, f"embed {train.name} {name}")
        excluded_QE = _excluded_rows(train.gallery.ids, triplets, positives)
        ranked.append(topk(vectors, gallery, last, excluded=excluded_QE))
    rows, scores = zip(*ranked, strict=True)
    return np.concatenate(rows), np.concatenate(scores)


def _excluded_rows(
    gallery_ids: Sequence[ImageId], triplets: Sequence[Triplet], positives: KnownPositives
) -> Rows:
    """Return the gallery rows (Q, E) that are no negatives of each query, filled up with -1."""
    rows_of: dict[str, list[int]] = {}
    for row, image in enumerate(gallery_ids):
        rows_of.setdefault(positives.content(image), []).append(row)
    barred = [
        [row for content in positives.barred(triplet.query) for row in rows_of.get(content, ())]
        for triplet in triplets
    ]
    excluded_QE = np.full((len(triplets), max(map(len, barred))), -1, np.int64)
    for q, rows in enumerate(barred):
        excluded_QE[q, : len(rows)] = rows
    return excluded_QE


def _draw(window: RankedNegatives, rows_K: Rows, rng: np.random.Generator) -> Rows:
    """Draw positions of a query's ranking from its window, best-ranked first."""
    positions = np.flatnonzero(rows_K >= 0)[window.first_rank - 1 :]
    return np.sort(rng.choice(positions, min(window.num, len(positions)), replace=False))
